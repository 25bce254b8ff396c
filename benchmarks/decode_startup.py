"""Seconds from a loaded interpreter to a loaded base and a first token: quantising, and from the kept copy.

    python benchmarks/decode_startup.py --json decode_startup.json [--model llama-7b] [--work DIR]

A random checkpoint is written once. Each start is a process of its own; the file system's cache is warm in all of
them. `qlora generate` is started three times: with --no-cache, then twice with the cache, the first of which makes the
copy. Until `load_base` uses the cache, --direct times `save_base` and `restore_base` themselves.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def start(checkpoint: Path, cache: Path, *flags: str) -> dict:
    """One `qlora generate`: seconds in all, to the loaded model, and from there to the first token."""
    command = [sys.executable, "-m", "qlora_cli", "generate", "--model", str(checkpoint), "Hello", "--json"]
    command += ["--max-new-tokens", "8", "--temperature", "0", *flags]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "QLORA_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    started = time.time()
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280, check=False)
    seconds = time.time() - started
    if done.returncode:
        return {"failed": (done.stdout + done.stderr)[-500:]}
    found = json.loads(done.stdout)
    return {
        "process seconds": seconds,
        "load seconds": found["load_seconds"],
        "first token seconds": found["first_token_seconds"],
        "answer": found["answers"][0]["answer"],
    }


def direct(checkpoint: Path, cache: Path) -> dict:
    """Quantising, keeping and restoring a base in this process, and whether the logits are the same bits."""
    import bitsandbytes as bnb
    import torch

    from qlora_cli.core.base_cache import cache_size_bytes, restore_base, save_base
    from qlora_cli.core.base_model import build_empty, choose_device, freeze_base, load_base, load_config

    os.environ["QLORA_CACHE"] = str(cache)
    device = choose_device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def make_linear(packed, bias):
        weight = packed.pop("")
        stats = {name.removeprefix("."): value for name, value in packed.items()}
        with torch.device("meta"):
            linear = bnb.nn.Linear4bit(1, 1, bias=bias is not None, compute_dtype=dtype)
        linear.weight = bnb.nn.Params4bit.from_prequantized(weight, stats, device=device, module=linear)
        linear.out_features, linear.in_features = linear.weight.quant_state.shape
        linear.bias = None if bias is None else torch.nn.Parameter(bias, requires_grad=False)
        return linear

    def timed(work):
        started = time.time()
        result = work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return result, time.time() - started

    ids, facts, figures = torch.arange(5, 60, device=device)[None], {"checkpoint": str(checkpoint)}, {}
    figures["untimed first load seconds"] = timed(
        lambda: load_base(str(checkpoint), compute_dtype=dtype, device=device, cache=False)
    )[1]
    (base, _), figures["quantise seconds"] = timed(
        lambda: load_base(str(checkpoint), compute_dtype=dtype, device=device, cache=False)
    )
    started = time.time()
    save_base(base, facts)
    figures["save seconds"] = time.time() - started
    with torch.no_grad():
        expected = base(input_ids=ids).logits.cpu()
    del base
    again, figures["restore seconds"] = timed(
        lambda: freeze_base(restore_base(facts, lambda: build_empty(load_config(str(checkpoint))), make_linear, device))
    )
    with torch.no_grad():
        figures["same logits"] = torch.equal(again(input_ids=ids).logits.cpu(), expected)
    figures["times faster"] = figures["quantise seconds"] / figures["restore seconds"]
    figures["copy bytes"] = cache_size_bytes()
    return figures


def main() -> None:
    """Writes the checkpoint, starts the processes, prints the table."""
    from models import CONFIGS, write_checkpoint

    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path, default=Path("decode_startup.json"))
    parser.add_argument("--model", default="llama-7b", choices=list(CONFIGS))
    parser.add_argument("--work", type=Path, default=None)
    parser.add_argument("--direct", action="store_true", help="time the cache's own functions")
    arguments = parser.parse_args()
    work = arguments.work or Path(tempfile.mkdtemp(prefix="decode_startup."))
    started = time.time()
    checkpoint = write_checkpoint(arguments.model, work / arguments.model)
    results: dict[str, dict] = {"checkpoint": {"write seconds": time.time() - started}}
    if arguments.direct:
        results["direct"] = direct(checkpoint, work / "cache-direct")
    else:
        for case, flags in (("quantised", ["--no-cache"]), ("copy made", []), ("copy used", [])):
            results[case] = start(checkpoint, work / "cache", *flags)
            print(case, results[case], flush=True)
        if all("load seconds" in results[key] for key in ("quantised", "copy used")):
            faster = results["quantised"]["load seconds"] / results["copy used"]["load seconds"]
            results["copy used"]["times faster"] = faster
            results["copy used"]["same answer"] = results["quantised"]["answer"] == results["copy used"]["answer"]
    arguments.json.write_text(json.dumps(results, indent=1))
    for case, figures in results.items():
        for name, value in figures.items():
            print(f"{case:12} {name:28} {value:.3g}" if isinstance(value, float) else f"{case:12} {name:28} {value}")


if __name__ == "__main__":
    main()
