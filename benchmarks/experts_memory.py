"""Mixtures of experts at their real sizes through `qlora train` on one card: peak memory, speed, and what was predicted.

    python benchmarks/experts_memory.py --json experts.json [--model qwen3-30b-a3b]

Each checkpoint is written as it is released: Qwen3-30B-A3B and Mixtral-8x7B with a bfloat16 matrix for every expert,
gpt-oss-20b with MXFP4 blocks; one shard a layer. Experts of the first two are holes in sparse files, which read as zeros:
memory does not depend on values, and the disk holds neither. Everything else, routers too, is random. On the CPU
`--model tiny-moe` shows that it runs.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.hollow_checkpoint import write_hollow_checkpoint
from support.models import make_config, write_rows

# architecture of models.py → (layout on disk, memory a peer trains it in)
MODELS = {
    "qwen3-30b-a3b": ("gated", "21.7GiB"),
    "gpt-oss-20b": ("mxfp4", "14.7GiB"),
    "mixtral-8x7b": ("mixtral", "32GiB"),
    "tiny-moe": ("gated", "4GiB"),
    "tiny-oss": ("mxfp4", "4GiB"),
}


def run_qlora(arguments: list[str], timeout: float) -> tuple[int, str, str]:
    """A command of ours: exit code, what it printed, and what it said."""
    root = str(Path(__file__).resolve().parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "qlora_cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout)
    return done.returncode, done.stdout, done.stderr


def measure(name: str, work: Path, *, row_tokens: int, rows: int, steps: int, vram: str, timeout: float) -> dict:
    """Trains with all linear layers adapted and recomputation, within `vram`; and the prediction for the same."""
    model, output = work / name, work / f"{name}-out"
    started = time.perf_counter()
    size = write_hollow_checkpoint(make_config(name), model, MODELS[name][0])
    facts: dict = {"model": name, "checkpoint_bytes": size, "write_seconds": time.perf_counter() - started}
    data = write_rows("fixed", work / "rows.jsonl", rows=rows * steps, vocab_size=1000, max_length=row_tokens - 1)
    step = [
        "--max-length",
        str(row_tokens),
        "--batch-size",
        str(rows),
        "--vram",
        vram,
        "--gradient-checkpointing",
        "on",
    ]
    code, out, said = run_qlora(["inspect", "--model", str(model), *step, "--json"], timeout)
    facts["predicted"] = json.loads(out) if out.strip().startswith("{") else said[-2000:]
    started = time.perf_counter()
    train = ["train", "--model", str(model), "--data", str(data), "--output", str(output), *step, "--no-cache"]
    train += [
        "--max-steps",
        str(steps),
        "--gradient-accumulation-steps",
        "1",
        "--save-every",
        "1000",
        "--init",
        "default",
    ]
    try:
        code, out, said = run_qlora(train, timeout)
    except subprocess.TimeoutExpired as error:
        return {**facts, "failed": f"not done after {timeout:.0f} s", "said": str(error.stderr)[-3000:]}
    facts |= {"exit_code": code, "train_seconds": time.perf_counter() - started, "said": said[-4000:]}
    if code == 0:
        lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        last = lines[steps // 2 :]
        seconds = sorted(line["step_seconds"] for line in last)[len(last) // 2]
        facts["peak_gib"] = max(line["peak_vram_bytes"] or 0 for line in lines) / 2**30
        facts["tokens_per_second"] = rows * row_tokens / seconds
        facts["losses"] = [line["loss"] for line in lines]
    shutil.rmtree(model)
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=list(MODELS))
    parser.add_argument("--row-tokens", type=int, default=2048)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--vram", help="instead of what a peer trains the model in")
    parser.add_argument("--timeout", type=float, default=500, help="seconds for each command")
    parser.add_argument("--work", type=Path, help="where checkpoints are written")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        for name in arguments.model or ["qwen3-30b-a3b", "gpt-oss-20b", "mixtral-8x7b"]:
            found = measure(
                name,
                Path(folder),
                row_tokens=arguments.row_tokens,
                rows=arguments.rows,
                steps=arguments.steps,
                vram=arguments.vram or MODELS[name][1],
                timeout=arguments.timeout,
            )
            results.append(found)
            predicted = found["predicted"]
            training = predicted.get("training", {}) if isinstance(predicted, dict) else predicted
            print(json.dumps({k: v for k, v in found.items() if k not in ("predicted", "said")}), flush=True)
            print(f"predicted: {training}\n{found.get('said', '')}", flush=True)
            if arguments.json:
                arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
