"""Tokens per second and peak memory of what a user would pick instead, on the works of train_speed.py.

    python benchmarks/train_peers.py --work llama-free --work falcon --folder /tmp/bench --json peers.json
    python benchmarks/train_peers.py --work neox-quotes --peer trl --peer unsloth

The same checkpoints, rows, ranks and targets, in a process each. Tokens are real ones, never padding; steps are timed
between synchronisations; the peak is `torch.cuda.max_memory_allocated`. A peer that is not installed is reported as
such. In turn with ours, on one card: train_beside.py.
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

from train_speed import (
    WORKS,
    checkpoint_of,
    draw_table,
    figures_of,
    max_length_of,
    read_steps,
    write_model,
    write_work_rows,
)

# work → peers: (library, packs rows, recomputes layers, rows a batch, accumulation, steps that count)
PEERS = {
    "llama-free": [("unsloth", False, False, 2, 1, 9)],
    "llama-least": [("unsloth", False, True, 2, 1, 7)],
    "llama-gsm8k": [("unsloth", True, False, 2, 1, 9)],
    "qwen3-moe-free": [("unsloth", False, False, 2, 1, 6)],
    "qwen3-moe-least": [("unsloth", False, True, 2, 1, 6)],
    "gpt-oss-least": [("unsloth", False, True, 2, 1, 6)],
    "qwen3-moe-free-experts": [("unsloth", False, False, 2, 1, 6)],
    "qwen3-moe-least-experts": [("unsloth", False, True, 2, 1, 6)],
    "gpt-oss-least-experts": [("unsloth", False, True, 2, 1, 6)],
    "qwen3-moe-quarter-gsm8k-experts": [("unsloth", True, False, 2, 1, 6)],
    "qwen3-moe-gsm8k": [("unsloth", True, False, 2, 1, 6)],
    "qwen3-moe-gsm8k-experts": [("unsloth", True, False, 2, 1, 6)],
    "llama-8rows": [("unsloth", False, False, 8, 1, 6)],
    "llama3-long": [("unsloth", False, False, 2, 1, 8)],
    "llama3-least": [("unsloth", False, True, 2, 1, 8)],
    "qwen3-r64": [("unsloth", False, False, 2, 1, 8)],
    "mistral-long": [("unsloth", False, False, 1, 1, 8)],
    "qwen3-moe-quarter-gsm8k": [("unsloth", True, False, 2, 1, 6)],
    "neox-fixed": [("unsloth", False, True, 1, 1, 7)],
    "neox-quotes": [("trl", True, True, 1, 1, 7), ("unsloth", False, True, 1, 8, 3), ("hf", False, True, 1, 8, 2)],
    "pythia": [("unsloth", False, False, 4, 1, 17)],
    "falcon": [("hf", False, True, 1, 1, 7)],
    "tiny": [("hf", False, True, 2, 1, 4), ("trl", True, False, 2, 1, 4)],
    "tiny-moe": [("hf", False, True, 2, 1, 4)],
    "tiny-oss": [("hf", False, True, 2, 1, 4)],
}
LIBRARIES = ("hf", "trl", "unsloth")
LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NEOX = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]


def flags_of(work: str) -> argparse.Namespace:
    """What of the work's command line concerns a peer too."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--rank", type=int)
    parser.add_argument("--alpha", type=int)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--target-modules", nargs="*")
    parser.add_argument("--adapt-experts", action="store_true")
    parser.add_argument("--max-length", type=int, default=max_length_of(work))
    known, _ = parser.parse_known_args(shlex.split(WORKS[work][4]))
    every = NEOX if WORKS[work][0].startswith(("neox", "pythia")) else LLAMA
    chosen = [name for names in known.target_modules or () for name in names.split(",")]
    known.target_modules = every if known.adapt_experts else chosen or every  # experts are named by their projections
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
        device_map={"": torch.cuda.current_device() if torch.cuda.is_available() else "cpu"},
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


def step_clock():
    """Class of a callback that keeps the seconds of each step, between synchronisations of this process's card."""
    import torch  # not before Unsloth, which changes what follows
    from transformers import TrainerCallback

    def wait() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    class StepClock(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []

        def on_step_begin(self, *_, **__):
            wait()
            self.began = time.perf_counter()

        def on_step_end(self, *_, **__):
            wait()
            self.seconds.append(time.perf_counter() - self.began)

    return StepClock


def training_settings(*, rows: int, accumulation: int, steps: int) -> dict:
    """Settings of a transformers trainer: rows a batch, batches a step, steps in all."""
    import torch

    cuda = torch.cuda.is_available()
    return {
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


def run_inside(work: str, number: int, folder: Path, steps: int) -> None:
    """One peer on one work, in this process; each step becomes a line of its file as soon as it is done."""
    library, packs, recomputes, rows, accumulation, _ = PEERS[work][number]
    if library == "unsloth":
        import unsloth  # noqa: F401  # has to come before what it changes
    import torch
    from datasets import Dataset
    from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

    flags = flags_of(work)
    checkpoint = str(checkpoint_of(work, folder))
    load = load_unsloth if library == "unsloth" else load_plain
    model, tokenizer = load(checkpoint, flags, recomputes)
    print("trainable parameters", sum(p.numel() for p in model.parameters() if p.requires_grad), flush=True)
    lines = (folder / f"{work}.jsonl").read_text().splitlines()
    data = Dataset.from_list([{"input_ids": json.loads(line)["input_ids"]} for line in lines])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    cuda = torch.cuda.is_available()
    tokens: list[int] = []  # of each batch; a loader may have read ahead
    written = steps_file(work, number, folder).open("w", buffering=1)

    class Clock(step_clock()):
        step = 0

        def on_log(self, *_, logs, **__):  # follows each step, and once more the whole, without its loss
            if "loss" in logs:
                line = {
                    "step": self.step + 1,
                    "loss": float(logs["loss"]),
                    "tokens": sum(tokens[self.step * accumulation : (self.step + 1) * accumulation]),
                    "step_seconds": self.seconds[-1],
                    "peak_vram_bytes": torch.cuda.max_memory_allocated() if cuda else None,
                }
                written.write(json.dumps(line) + "\n")
                self.step += 1

    common = training_settings(rows=rows, accumulation=accumulation, steps=steps)
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
    trainer.train()


def chosen_peers(work: str, wanted: list[str] | None) -> list[int]:
    """Numbers of the work's peers: those named, as LIBRARY for any work or WORK:LIBRARY; all where none concerns it."""
    named = {name.rpartition(":")[2] for name in wanted or () if name.rpartition(":")[0] in ("", work)}
    peers = PEERS.get(work, [])
    return [number for number, (library, *_) in enumerate(peers) if not named or library in named]


def peer_name(work: str, number: int) -> str:
    """As the tables have it."""
    library, packs, *_ = PEERS[work][number]
    return library + (" + TRL packing" if packs and library != "trl" else " packing" if packs else "")


def steps_file(work: str, number: int, folder: Path) -> Path:
    """Where the peer's steps stand, like those of a metrics.jsonl."""
    return folder / f"{PEERS[work][number][0]}-{work}.jsonl"


def peer_command(
    work: str, number: int, folder: Path, steps: int, site: str | None
) -> tuple[list[str], dict[str, str]]:
    """A peer on a work for so many steps, and its environment; what it wrote before is gone.

    Args:
        site: The peers' packages, where they have a place of their own; they come first then.
    """
    steps_file(work, number, folder.resolve()).unlink(missing_ok=True)
    command = [sys.executable, __file__, "--inside", work, str(number), str(steps), "--folder", str(folder)]
    first = site and str(Path(site).resolve())
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "UNSLOTH_DISABLE_STATISTICS": "1",
        # No two may write one folder of sources.
        "UNSLOTH_COMPILE_LOCATION": str(folder.resolve() / f"unsloth-{work}-{number}"),
        "PYTHONPATH": os.pathsep.join(filter(None, [first, os.environ.get("PYTHONPATH")])),
    }
    return command, environment


def run_peer(work: str, number: int, folder: Path, arguments: argparse.Namespace) -> dict:
    """One peer on one work in a process of its own: its figures, or what went wrong.

    Args:
        work: Its name.
        number: Of the peer, in PEERS.
        folder: Models and rows.
        arguments: `peer_warm`, `peer_site` and `timeout` of the command line.
    """
    named = {"work": work, "who": peer_name(work, number)}
    steps = arguments.peer_warm + PEERS[work][number][-1]
    command, environment = peer_command(work, number, folder, steps, arguments.peer_site)
    path = steps_file(work, number, folder.resolve())
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=arguments.timeout, env=environment)
    except subprocess.TimeoutExpired:
        return {**named, "error": f"timed out after {arguments.timeout} s", "log": ""}
    if done.returncode:
        return {**named, "error": f"exit {done.returncode}", "log": (done.stdout + done.stderr)[-1500:]}
    return {**named, **figures_of(read_steps(path)[arguments.peer_warm :])}


def _peer(name: str) -> str:
    if name.rpartition(":")[2] not in LIBRARIES:
        raise argparse.ArgumentTypeError(f"{name} names none of {', '.join(LIBRARIES)}")
    return name


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What train_beside.py takes too."""
    parser.add_argument(
        "--peer",
        type=_peer,
        action="append",
        help=f"LIBRARY ({', '.join(LIBRARIES)}) or WORK:LIBRARY; repeat; default all",
    )
    parser.add_argument("--peer-site", help="folder of the peers' packages, in front of PYTHONPATH for them alone")
    parser.add_argument("--peer-warm", type=int, default=3, help="steps of a peer left out at the start")


def main() -> None:
    """Runs the chosen works' peers and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", action="append", choices=sorted(PEERS), help="repeat for several; default all")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/qlora-bench"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--timeout", type=float, default=240, help="seconds for one peer")
    parser.add_argument("--inside", nargs=3, help=argparse.SUPPRESS)
    add_arguments(parser)
    arguments = parser.parse_args()
    if arguments.inside:
        work, number, steps = arguments.inside
        run_inside(work, int(number), arguments.folder, int(steps))
        return
    arguments.folder.mkdir(parents=True, exist_ok=True)
    results = []
    for work in arguments.work or [name for name in PEERS if not name.startswith("tiny")]:
        write_model(work, arguments.folder)
        write_work_rows(work, arguments.folder)
        for number in chosen_peers(work, arguments.peer):
            results.append(run_peer(work, number, arguments.folder, arguments))
            if arguments.json:
                arguments.json.write_text(json.dumps(results, indent=1))
    print(draw_table(results))


if __name__ == "__main__":
    main()
