"""Tokens per second and peak memory of what a user would pick instead, on the works of train_speed.py.

    python benchmarks/train_peers.py --work llama-free --work falcon --folder /tmp/bench --json peers.json

The same checkpoints, rows, ranks, targets and steps, in a process each; give both scripts one --folder to measure side
by side. Tokens are real ones, never padding; steps are timed between synchronisations; the peak is
`torch.cuda.max_memory_allocated`. A peer that is not installed is reported as such.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from models import CONFIGS, write_checkpoint, write_rows
from train_speed import WORKS

# work → peers: (library, packs rows, recomputes layers, rows a batch, accumulation, steps)
PEERS = {
    "llama-free": [("unsloth", False, False, 2, 1, 12)],
    "llama-least": [("unsloth", False, True, 2, 1, 10)],
    "llama-gsm8k": [("unsloth", True, False, 2, 1, 12)],
    "neox-fixed": [("unsloth", False, True, 1, 1, 10)],
    "neox-quotes": [("trl", True, True, 1, 1, 10), ("unsloth", False, True, 1, 8, 6), ("hf", False, True, 1, 8, 5)],
    "pythia": [("unsloth", False, False, 4, 1, 20)],
    "falcon": [("hf", False, True, 1, 1, 10)],
    "tiny": [("hf", False, True, 2, 1, 4), ("trl", True, False, 2, 1, 4)],
}
LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NEOX = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]


def flags_of(work: str) -> argparse.Namespace:
    """What of the work's command line concerns a peer too."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--rank", type=int)
    parser.add_argument("--alpha", type=int)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--target-modules", nargs="*")
    parser.add_argument("--max-length", type=int, default=512 if WORKS[work][0].startswith("tiny") else 2048)
    known, _ = parser.parse_known_args(shlex.split(WORKS[work][4]))
    every = NEOX if WORKS[work][0].startswith(("neox", "pythia")) else LLAMA
    known.target_modules = known.target_modules or every
    return known


def load_unsloth(checkpoint: str, flags: argparse.Namespace, recomputes: bool):
    """Model and tokenizer, adapter attached."""
    from unsloth import FastLanguageModel

    base, tokenizer = FastLanguageModel.from_pretrained(checkpoint, max_seq_length=flags.max_length, load_in_4bit=True)
    model = FastLanguageModel.get_peft_model(
        base,
        r=flags.rank,
        lora_alpha=flags.alpha,
        lora_dropout=flags.dropout,
        target_modules=flags.target_modules,
        use_gradient_checkpointing="unsloth" if recomputes else False,
        max_seq_length=flags.max_length,
    )
    return model, tokenizer


def load_plain(checkpoint: str, flags: argparse.Namespace, recomputes: bool):
    """Model and tokenizer, adapter attached, as PEFT's documentation has it."""
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    base = AutoModelForCausalLM.from_pretrained(
        checkpoint,
        quantization_config=quantization,
        device_map={"": 0 if torch.cuda.is_available() else "cpu"},
        dtype=torch.bfloat16,
    )
    base = prepare_model_for_kbit_training(
        base, use_gradient_checkpointing=recomputes, gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    lora = LoraConfig(
        r=flags.rank,
        lora_alpha=flags.alpha,
        lora_dropout=flags.dropout,
        target_modules=flags.target_modules,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(base, lora), AutoTokenizer.from_pretrained(checkpoint)


def run_inside(work: str, number: int, folder: Path, warm: int) -> dict:
    """One peer on one work, in this process."""
    library, packs, recomputes, rows, accumulation, steps = PEERS[work][number]
    if library == "unsloth":
        import unsloth  # noqa: F401  # has to come before what it changes
    import torch
    from datasets import Dataset
    from transformers import DataCollatorForLanguageModeling, Trainer, TrainerCallback, TrainingArguments

    flags = flags_of(work)
    checkpoint = str(folder / WORKS[work][0])
    load = load_unsloth if library == "unsloth" else load_plain
    model, tokenizer = load(checkpoint, flags, recomputes)
    lines = (folder / f"{work}.jsonl").read_text().splitlines()
    data = Dataset.from_list([{"input_ids": json.loads(line)["input_ids"]} for line in lines])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    cuda = torch.cuda.is_available()
    times: list[float] = []
    tokens: list[int] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            if cuda:
                torch.cuda.synchronize()
            self.began = time.perf_counter()

        def on_step_end(self, *_, **__):
            if cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - self.began)

    common = {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": accumulation,
        "max_steps": steps,
        "learning_rate": 2e-4,
        "bf16": True,
        "use_cpu": not cuda,
        "optim": "paged_adamw_8bit" if cuda else "adamw_torch",
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "logging_steps": 1,
    }
    if packs:
        from trl import SFTConfig, SFTTrainer

        arguments = SFTConfig(**common, packing=True, max_length=flags.max_length)
        trainer = SFTTrainer(
            model=model, processing_class=tokenizer, train_dataset=data, args=arguments, callbacks=[Clock()]
        )
    else:
        data = data.map(lambda row: {"attention_mask": [1] * len(row["input_ids"])})
        trainer = Trainer(
            model=model,
            train_dataset=data,
            data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
            args=TrainingArguments(**common),
            callbacks=[Clock()],
        )
    collate = trainer.data_collator

    def counting(examples):
        batch = collate(examples)
        # Without a mask every token of a pack is real.
        tokens.append(int(batch["attention_mask"].sum()) if "attention_mask" in batch else batch["input_ids"].numel())
        return batch

    trainer.data_collator = counting
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    losses = [entry["loss"] for entry in _trained(trainer) if "loss" in entry]
    measured = tokens[warm * accumulation : steps * accumulation]  # a loader may have read ahead
    return {
        "work": work,
        "peer": library + (" + TRL packing" if packs and library != "trl" else " packing" if packs else ""),
        "tokens_per_second": round(sum(measured) / sum(times[warm:]), 1),
        "median_step_ms": round(1000 * sorted(times[warm:])[len(times[warm:]) // 2], 1),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if cuda else 0.0,
        "losses": [losses[0], losses[-1]],
    }


def _trained(trainer) -> list[dict]:
    trainer.train()
    return trainer.state.log_history


def run_work(work: str, folder: Path, warm: int, timeout_s: float) -> list[dict]:
    """All peers of one work, each in a process of its own; what went wrong in place of figures."""
    architecture, kind, rows, _, _ = WORKS[work]
    write_checkpoint(architecture, folder / architecture)
    data = folder / f"{work}.jsonl"
    if not data.is_file():
        vocab_size = CONFIGS[architecture][1]["vocab_size"]
        write_rows(kind, data, rows=rows, vocab_size=vocab_size, max_length=flags_of(work).max_length)
    results = []
    for number, (library, *_) in enumerate(PEERS[work]):
        command = [sys.executable, __file__, "--inside", work, str(number), "--folder", str(folder)]
        command += ["--warm", str(warm)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1"}
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env=environment)
            told = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
            failure = {"work": work, "peer": library, "error": (done.stdout + done.stderr)[-1500:]}
            results.append(json.loads(told[-1].removeprefix("RESULT ")) if told else failure)
        except subprocess.TimeoutExpired:
            results.append({"work": work, "peer": library, "error": f"timed out after {timeout_s} s"})
    return results


def main() -> None:
    """Runs the chosen works' peers and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", action="append", choices=sorted(PEERS), help="repeat for several; default all")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/qlora-bench"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--warm", type=int, default=3, help="steps left out at the start")
    parser.add_argument("--timeout", type=float, default=240, help="seconds for one peer")
    parser.add_argument("--inside", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        work, number = arguments.inside
        print("RESULT", json.dumps(run_inside(work, int(number), arguments.folder, arguments.warm)), flush=True)
        return
    arguments.folder.mkdir(parents=True, exist_ok=True)
    results = []
    for work in arguments.work or [name for name in PEERS if name != "tiny"]:
        results += run_work(work, arguments.folder, arguments.warm, arguments.timeout)
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=1))
    print("| work | peer | tok/s | step ms | peak GiB |\n|---|---|---|---|---|")
    for r in results:
        if "error" in r:
            print(r["error"], file=sys.stderr)
            print(f"| {r['work']} | {r['peer']} | failed | | |")
        else:
            peak = r["peak_gib"]
            print(f"| {r['work']} | {r['peer']} | {r['tokens_per_second']:,} | {r['median_step_ms']} | {peak} |")


if __name__ == "__main__":
    main()
