"""Tokens per second and peak memory of `qlora train` itself, read from its metrics.jsonl.

    python benchmarks/train_speed.py --work llama-free --work neox-quotes --folder /tmp/bench --json results.json

Each work trains a random checkpoint of a real architecture (made on the spot, see models.py) through the command line
in a process of its own. Tokens are real ones, never padding; the first `--warm` steps are left out; the peak is
`torch.cuda.max_memory_allocated`.
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

from models import CONFIGS, write_checkpoint, write_rows

ALL = "--rank 16 --alpha 32"
QKV16 = "--rank 16 --alpha 32 --target-modules query_key_value"
QKV8 = "--rank 8 --alpha 32 --dropout 0.05 --target-modules query_key_value"
ONE = "--gradient-accumulation-steps 1 --compile"
# --vram is the whole process, CUDA's context of about 1 GiB included; the peak that is reported is that of tensors.
# Runs of a few dozen steps would not be compiled by themselves.
# work → (architecture, rows, row count, steps, flags)
WORKS = {
    "llama-free": ("llama-7b", "fixed", 64, 24, f"{ALL} --batch-size 2 {ONE}"),
    "llama-least": ("llama-7b", "fixed", 64, 16, f"{ALL} --batch-size 2 {ONE} --vram 6.2GiB"),
    "llama-gsm8k": ("llama-7b", "gsm8k", 1400, 40, f"{ALL} --batch-size 2 {ONE} --packing"),
    "neox-fixed": ("neox-20b", "fixed", 24, 14, f"{QKV8} --batch-size 1 {ONE} --vram 12.6GiB"),
    "neox-quotes": (
        "neox-20b",
        "quotes",
        1200,
        140,
        f"{QKV8} --batch-size 1 --gradient-accumulation-steps 8 --compile --warmup-steps 2 --vram 12.6GiB",
    ),
    "neox-11gib": ("neox-20b", "fixed", 24, 10, f"{QKV8} --batch-size 1 {ONE} --max-length 512 --vram 12GiB"),
    "pythia": ("pythia-410m", "fixed", 240, 50, f"{ALL} --batch-size 4 {ONE}"),
    "falcon": ("falcon-7b", "fixed", 24, 20, f"{QKV16} --batch-size 1 {ONE} --vram 7.6GiB"),
    "tiny": ("tiny-llama", "gsm8k", 64, 6, f"{ALL} --batch-size 2 {ONE} --packing"),
}
WARM = {"neox-quotes": 40, "llama-gsm8k": 12}  # rows of many lengths: each shape of a step is captured once


def run_work(work: str, folder: Path, extra: list[str], warm: int, timeout_s: float) -> dict:
    """Trains one work and returns its figures, or what went wrong."""
    architecture, kind, rows, steps, flags = WORKS[work]
    checkpoint = write_checkpoint(architecture, folder / architecture)
    max_length = 512 if "--max-length 512" in flags or architecture.startswith("tiny") else 2048
    data = folder / f"{work}.jsonl"
    vocab_size = CONFIGS[architecture][1]["vocab_size"]
    write_rows(kind, data, rows=rows, vocab_size=vocab_size, max_length=max_length)
    output = folder / f"run-{work}"
    command = [sys.executable, "-m", "qlora_cli", "train", "--model", str(checkpoint), "--data", str(data)]
    command += ["--output", str(output), "--max-steps", str(steps), "--overwrite", "--save-every", "100000"]
    command += [*shlex.split(flags), *extra]
    if "--max-length" not in command:
        command += ["--max-length", str(max_length)]
    started = time.time()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")])}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env=environment)
    except subprocess.TimeoutExpired as late:
        return {"work": work, "error": f"timed out after {timeout_s} s", "log": str(late.stderr or "")[-2000:]}
    if done.returncode:
        return {"work": work, "error": f"exit {done.returncode}", "log": (done.stdout + done.stderr)[-3000:]}
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "tokens" in line][max(warm, WARM.get(work, 0)) :]
    seconds = [line["step_seconds"] for line in logged]
    result = {
        "work": work,
        "flags": shlex.join([*shlex.split(flags), *extra]),
        "tokens_per_second": round(sum(line["tokens"] for line in logged) / sum(seconds), 1),
        "median_step_ms": round(1000 * statistics.median(seconds), 1),
        "peak_gib": round(max(line["peak_vram_bytes"] or 0 for line in logged) / 2**30, 2),
        "first_loss": lines[0]["loss"],
        "last_loss": logged[-1]["loss"],
        "whole_command_s": round(time.time() - started, 1),
        "log": done.stderr[-1500:],
    }
    shutil.rmtree(output)
    return result


def main() -> None:
    """Runs the chosen works and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", action="append", choices=sorted(WORKS), help="repeat for several; default all")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/qlora-bench"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--warm", type=int, default=4, help="steps left out at the start")
    parser.add_argument("--timeout", type=float, default=240, help="seconds for one work")
    parser.add_argument("--extra", default="", help="more flags for qlora train")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    results = []
    for work in arguments.work or [name for name in WORKS if name != "tiny"]:
        results.append(
            run_work(work, arguments.folder, shlex.split(arguments.extra), arguments.warm, arguments.timeout)
        )
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=1))
        if "error" in results[-1]:
            print(results[-1]["log"], flush=True)
    print("| work | tok/s | step ms | peak GiB | loss |\n|---|---|---|---|---|")
    for r in results:
        if "error" in r:
            print(f"| {r['work']} | {r['error']} | | | |")
        else:
            loss = f"{r['first_loss']:.2f} → {r['last_loss']:.2f}"
            print(f"| {r['work']} | {r['tokens_per_second']:,} | {r['median_step_ms']} | {r['peak_gib']} | {loss} |")


if __name__ == "__main__":
    main()
