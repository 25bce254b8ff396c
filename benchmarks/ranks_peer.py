"""One card's share of a peer's run, started by `accelerate launch` in: TRL's SFTTrainer, or transformers' own without TRL.

ranks.py starts it. Rows of one length, so nothing is padded; steps are timed between synchronisations of this card; the
main rank writes tokens per second over all cards.
"""

import argparse
import json
import os
from pathlib import Path

from train_peers import LLAMA, load_plain, step_clock, training_settings


def main() -> None:
    """Trains, and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--max-length", type=int, required=True)
    parser.add_argument("--batch-size", type=int, required=True, help="rows of a card's micro-batch")
    parser.add_argument("--step-rows", type=int, required=True, help="rows of a step, of all cards")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--warm", type=int, required=True, help="steps left out at the start")
    parser.add_argument("--recompute", action="store_true", help="recompute layers in the backward pass")
    arguments = parser.parse_args()

    import torch

    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    from datasets import Dataset
    from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

    try:
        from trl import SFTConfig, SFTTrainer
    except ImportError:
        SFTConfig = SFTTrainer = None
    cards = int(os.environ.get("WORLD_SIZE", "1"))
    flags = argparse.Namespace(rank=16, alpha=32, dropout=0.0, target_modules=LLAMA)
    model, tokenizer = load_plain(arguments.checkpoint, flags, arguments.recompute)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    rows = [json.loads(line)["input_ids"] for line in arguments.rows.read_text().splitlines()]
    assert {len(row) for row in rows} == {arguments.max_length}
    clock = step_clock()()
    accumulation = arguments.step_rows // (arguments.batch_size * cards)
    common = training_settings(rows=arguments.batch_size, accumulation=accumulation, steps=arguments.steps)
    common["gradient_checkpointing"] = False  # where asked for, the model does it already
    if cards > 1:
        common |= {"ddp_backend": "nccl" if cuda else "gloo", "ddp_find_unused_parameters": False}
    if SFTTrainer is not None:
        arguments_of_trl = SFTConfig(**common, max_length=arguments.max_length)
        data = Dataset.from_dict({"input_ids": rows})
        trainer = SFTTrainer(
            model=model, processing_class=tokenizer, train_dataset=data, args=arguments_of_trl, callbacks=[clock]
        )
    else:
        trainer = Trainer(
            model=model,
            train_dataset=Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}),
            data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
            args=TrainingArguments(**common),
            callbacks=[clock],
        )
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    assert trainer.args.world_size == cards and len(clock.seconds) == arguments.steps
    if trainer.is_world_process_zero():
        measured = sorted(clock.seconds[arguments.warm :])
        found = {
            "peer": "Trainer" if SFTTrainer is None else "SFTTrainer",
            "tokens_per_second": round(arguments.step_rows * arguments.max_length * len(measured) / sum(measured), 1),
            "median_step_ms": round(1000 * measured[len(measured) // 2], 1),
            "peak_vram_bytes": torch.cuda.max_memory_allocated() if cuda else None,
            "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        }
        arguments.json.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
