"""Tokens per second and peak memory of `qlora train` itself, read from its metrics.jsonl.

    python benchmarks/train_speed.py --work llama-free --work neox-quotes --folder /tmp/bench --json results.json

Each work trains a random checkpoint of a real architecture (made on the spot, see support/models.py) through the command line
in a process of its own. Tokens are real ones, never padding; the first `--warm` steps are left out; the peak is
`torch.cuda.max_memory_allocated`. `--cached-base` writes a random quantised base into a cache under --folder instead
(see support/random_base.py), which spares the minutes in which a large checkpoint is written, read and quantised. In
turn with the peers: train_beside.py.
"""

import argparse
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from support.hollow_checkpoint import LAYOUTS
from support.models import CONFIGS, write_rows

HERE = Path(__file__).resolve().parent

ALL = "--rank 16 --alpha 32"
QKV16 = "--rank 16 --alpha 32 --target-modules query_key_value"
QKV8 = "--rank 8 --alpha 32 --dropout 0.05 --target-modules query_key_value"
ATTENTION = "--rank 16 --alpha 32 --target-modules q_proj,k_proj,v_proj,o_proj"
EXPERTS = f"{ATTENTION} --adapt-experts --expert-rank 16"
ONE = "--gradient-accumulation-steps 1 --compile"
# --vram is the whole process, CUDA's context of about 1 GiB included; the peak that is reported is that of tensors.
# Runs of a few dozen steps would not be compiled by themselves.
# work → (architecture, rows, row count, steps, flags)
WORKS = {
    "llama-free": ("llama-7b", "fixed", 64, 24, f"{ALL} --batch-size 2 {ONE}"),
    "llama-least": ("llama-7b", "fixed", 64, 16, f"{ALL} --batch-size 2 {ONE} --vram 6.05GiB"),
    "llama-gsm8k": ("llama-7b", "gsm8k", 1400, 40, f"{ALL} --batch-size 2 {ONE} --packing"),
    "neox-fixed": ("neox-20b", "fixed", 24, 14, f"{QKV8} --batch-size 1 {ONE} --vram 12.86GiB"),
    "neox-quotes": (
        "neox-20b",
        "quotes",
        2000,
        240,
        f"{QKV8} --batch-size 1 --gradient-accumulation-steps 8 --compile --warmup-steps 2 --vram 12.9GiB",
    ),
    "neox-11gib": ("neox-20b", "fixed", 24, 10, f"{QKV8} --batch-size 1 {ONE} --max-length 512 --vram 12GiB"),
    "pythia": ("pythia-410m", "fixed", 240, 50, f"{ALL} --batch-size 4 {ONE}"),
    "falcon": ("falcon-7b", "fixed", 24, 20, f"{QKV16} --batch-size 1 {ONE} --vram 7.6GiB"),
    "llama-8rows": ("llama-7b", "fixed", 160, 14, f"{ALL} --batch-size 8 {ONE}"),
    "llama3-long": ("llama3-8b", "fixed", 64, 16, f"{ALL} --batch-size 2 {ONE} --max-length 4096"),
    "llama3-least": ("llama3-8b", "fixed", 64, 16, f"{ALL} --batch-size 2 {ONE} --vram 7.95GiB"),
    "qwen3-r64": ("qwen3-8b", "fixed", 64, 16, f"--rank 64 --alpha 64 --dropout 0.1 --batch-size 2 {ONE}"),
    "mistral-long": ("mistral-7b", "fixed", 32, 16, f"{ALL} --batch-size 1 {ONE} --max-length 8192"),
    "neox-free": ("neox-20b", "fixed", 96, 12, f"{QKV8} --batch-size 4 {ONE}"),
    "gemma2-free": ("gemma2-9b", "fixed", 64, 16, f"{ALL} --batch-size 2 {ONE} --vram 40GiB"),
    # Experts are not adapted, here and by the peers, where the name does not say so: of Qwen3-MoE and gpt-oss that leaves
    # attention. Memory is the peer's. Its 21.73 and 14.72 GiB with experts are `max_memory_allocated`, tensors alone: as much
    # for ours is a process of 1 GiB more.
    "qwen3-moe-free": ("qwen3-30b-a3b", "fixed", 64, 16, f"{ATTENTION} --batch-size 2 {ONE} --vram 41.4GiB"),
    "qwen3-moe-least": ("qwen3-30b-a3b", "fixed", 64, 16, f"{ATTENTION} --batch-size 2 {ONE} --vram 21.7GiB"),
    "gpt-oss-least": ("gpt-oss-20b", "fixed", 64, 16, f"{ATTENTION} --batch-size 2 {ONE} --vram 14.7GiB"),
    "qwen3-moe-quarter-gsm8k": (
        "qwen3-30b-a3b-quarter",
        "gsm8k",
        700,
        24,
        f"{ATTENTION} --batch-size 2 {ONE} --packing",
    ),
    "qwen3-moe-free-experts": ("qwen3-30b-a3b", "fixed", 64, 16, f"{EXPERTS} --batch-size 2 {ONE} --vram 41.4GiB"),
    "qwen3-moe-least-experts": ("qwen3-30b-a3b", "fixed", 64, 16, f"{EXPERTS} --batch-size 2 {ONE} --vram 22.7GiB"),
    "gpt-oss-least-experts": ("gpt-oss-20b", "fixed", 64, 16, f"{EXPERTS} --batch-size 2 {ONE} --vram 15.7GiB"),
    "qwen3-moe-quarter-gsm8k-experts": (
        "qwen3-30b-a3b-quarter",
        "gsm8k",
        700,
        24,
        f"{EXPERTS} --batch-size 2 {ONE} --packing",
    ),
    "qwen3-moe-gsm8k": ("qwen3-30b-a3b", "gsm8k", 700, 64, f"{ATTENTION} --batch-size 2 {ONE} --packing"),
    "qwen3-moe-gsm8k-experts": ("qwen3-30b-a3b", "gsm8k", 700, 64, f"{EXPERTS} --batch-size 2 {ONE} --packing"),
    "tiny": ("tiny-llama", "gsm8k", 64, 6, f"{ALL} --batch-size 2 {ONE} --packing"),
    "tiny-moe": ("tiny-moe", "fixed", 64, 6, f"{ATTENTION} --batch-size 2 {ONE}"),
    "tiny-oss": ("tiny-oss", "fixed", 64, 6, f"{ATTENTION} --batch-size 2 {ONE}"),
    "tiny-oss-experts": ("tiny-oss", "fixed", 64, 6, f"{EXPERTS} --batch-size 2 {ONE}"),
    "tiny-moe-experts": ("tiny-moe", "fixed", 64, 6, f"{EXPERTS} --batch-size 2 {ONE}"),
}
WARM = {
    "neox-quotes": 40,
    "llama-gsm8k": 12,
    "qwen3-moe-quarter-gsm8k": 12,
    "qwen3-moe-quarter-gsm8k-experts": 12,
    "qwen3-moe-gsm8k": 40,
    "qwen3-moe-gsm8k-experts": 40,
}  # rows of many lengths: each shape of a step is captured once


def max_length_of(work: str) -> int:
    """Tokens of the longest row or pack."""
    flags = WORKS[work][4].split()
    if "--max-length" in flags:
        return int(flags[flags.index("--max-length") + 1])
    return 512 if WORKS[work][0].startswith("tiny") else 2048


def warm_of(work: str, warm: int) -> int:
    """Steps left out at the start of ours."""
    return max(warm, WARM.get(work, 0))


def write_work_rows(work: str, folder: Path) -> None:
    """The rows that all who do this work are given."""
    architecture, kind, rows, _, _ = WORKS[work]
    vocab_size = CONFIGS[architecture][1]["vocab_size"]
    write_rows(kind, folder / f"{work}.jsonl", rows=rows, vocab_size=vocab_size, max_length=max_length_of(work))


def checkpoint_of(work: str, folder: Path, *, cached: bool = False) -> Path:
    """Where the work's model is; peers cannot read one whose weights are in our cache alone."""
    return folder / (WORKS[work][0] + "-cached" * cached)


def write_model(work: str, folder: Path, *, cached: bool = False) -> None:
    """Makes the work's model, once."""
    directory = checkpoint_of(work, folder.resolve(), cached=cached)
    if cached or not (directory / "tokenizer.json").is_file():  # it is written last
        hollow = WORKS[work][0] in LAYOUTS
        module = "support.random_base" if cached else "support.hollow_checkpoint" if hollow else "support.models"
        command = [sys.executable, "-m", module, WORKS[work][0], str(directory)]
        subprocess.run(command, check=True, cwd=HERE, env=our_environment(folder, cached=cached))


def our_environment(folder: Path, *, cached: bool = False) -> dict[str, str]:
    """This checkout's `qlora`, and a cache of its own for bases that are written there."""
    path = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, **({"QLORA_CACHE": str(folder.resolve() / "cache")} if cached else {})}


def our_command(work: str, folder: Path, *, steps: int, extra: list[str], cached: bool = False) -> list[str]:
    """`qlora train` on the work; its run directory is `run-WORK` in the folder."""
    flags = [*shlex.split(WORKS[work][4]), *extra]
    if "--max-length" not in flags:
        flags += ["--max-length", str(max_length_of(work))]
    command = [sys.executable, "-m", "qlora_cli", "train", "--model", checkpoint_of(work, folder, cached=cached)]
    command += ["--data", folder / f"{work}.jsonl", "--output", folder / f"run-{work}", "--overwrite"]
    return [*map(str, command), "--max-steps", str(steps), "--save-every", "100000", *flags]


def read_steps(path: Path) -> list[dict]:
    """The steps of a metrics.jsonl that may still be written; train_peers.py writes such files too."""
    steps = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            steps.append(json.loads(line))
        except ValueError:
            break  # half a line, so far
    return [step for step in steps if "tokens" in step]


def figures_of(steps: list[dict]) -> dict:
    """Speed and memory of the steps that count."""
    seconds = [step["step_seconds"] for step in steps]
    return {
        "tokens_per_second": round(sum(step["tokens"] for step in steps) / sum(seconds), 1),
        "median_step_ms": round(1000 * statistics.median(seconds), 1),
        "peak_gib": round(max(step["peak_vram_bytes"] or 0 for step in steps) / 2**30, 2),
        "steps": len(steps),
        "last_loss": steps[-1]["loss"],
    }


def run_work(work: str, folder: Path, extra: list[str], warm: int, timeout_s: float, *, cached: bool) -> dict:
    """Trains one work and returns its figures, or what went wrong."""
    write_model(work, folder, cached=cached)
    write_work_rows(work, folder)
    command = our_command(work, folder, steps=WORKS[work][3], extra=extra, cached=cached)
    output = folder / f"run-{work}"
    started = time.time()
    environment = our_environment(folder, cached=cached)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env=environment)
    except subprocess.TimeoutExpired as late:
        return {
            "work": work,
            "who": "ours",
            "error": f"timed out after {timeout_s} s",
            "log": str(late.stderr or "")[-2000:],
        }
    if done.returncode:
        return {
            "work": work,
            "who": "ours",
            "error": f"exit {done.returncode}",
            "log": (done.stdout + done.stderr)[-3000:],
        }
    steps = read_steps(output / "metrics.jsonl")
    result = {
        "work": work,
        "who": "ours",
        "flags": shlex.join([*shlex.split(WORKS[work][4]), *extra]),
        **figures_of(steps[warm_of(work, warm) :]),
        "first_loss": steps[0]["loss"],
        "whole_command_s": round(time.time() - started, 1),
        "log": done.stderr[-1500:],
    }
    shutil.rmtree(output)
    return result


def draw_table(results: list[dict]) -> str:
    """A line for each work and who did it; after a peer, how much faster the next run of ours is."""
    lines = ["| work | who | tok/s | step ms | peak GiB | loss | ours / it |", "|---|---|---|---|---|---|---|"]
    for position, r in enumerate(results):
        if "error" in r:
            print(r["log"], file=sys.stderr)
            lines.append(f"| {r['work']} | {r['who']} | {r['error']} | | | | |")
            continue
        following = results[position + 1] if position + 1 < len(results) else {}
        paired = r["who"] != "ours" and following.get("who") == "ours" and "error" not in following
        ratio = f"{following['tokens_per_second'] / r['tokens_per_second']:.2f}" if paired else ""
        speed = f"{r['tokens_per_second']:,} | {r['median_step_ms']} | {r['peak_gib']}"
        loss = f"{r['first_loss']:.2f} → {r['last_loss']:.2f}" if "first_loss" in r else f"{r['last_loss']:.2f}"
        lines.append(f"| {r['work']} | {r['who']} | {speed} | {loss} | {ratio} |")
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What train_beside.py takes too."""
    parser.add_argument("--folder", type=Path, default=Path("/tmp/qlora-bench"), help="models, rows and runs")
    parser.add_argument("--json", type=Path, help="where the results go")
    parser.add_argument("--warm", type=int, default=4, help="steps left out at the start")
    parser.add_argument("--extra", default="", help="more flags for qlora train")
    parser.add_argument("--cached-base", action="store_true", help="write quantised bases for ours, no checkpoints")


def main() -> None:
    """Runs the chosen works and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", action="append", choices=sorted(WORKS), help="repeat for several; default all")
    parser.add_argument("--timeout", type=float, default=240, help="seconds for one work")
    add_arguments(parser)
    arguments = parser.parse_args()
    extra = shlex.split(arguments.extra)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    results = []
    for work in arguments.work or [name for name in WORKS if not name.startswith("tiny")]:
        results.append(
            run_work(work, arguments.folder, extra, arguments.warm, arguments.timeout, cached=arguments.cached_base)
        )
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=1))
    print(draw_table(results))


if __name__ == "__main__":
    main()
