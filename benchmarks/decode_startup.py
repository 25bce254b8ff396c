"""Seconds from a loaded interpreter to a loaded base and a first token: quantising, and from the kept copy.

    python benchmarks/decode_startup.py --json decode_startup.json [--model llama-7b | --checkpoint DIR] [--work DIR]
                                        [--direct] [--repeats 3]

A random checkpoint is written once, where none is given. First `load_base` is timed in this process, after one load
that is not: quantising, keeping a copy, and from the copy. Then `qlora generate` is started three times: with
--no-cache, and twice with the cache, the first of which makes the copy. --direct leaves the processes out. The file
system's cache is warm in all of them.
"""

import argparse
import gc
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
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


def watch(owner, name: str, spent: dict[str, float]) -> None:
    """From now on adds the seconds of each call of a function to `spent`."""
    function = getattr(owner, name)

    def timed(*arguments, **settings):
        started = time.perf_counter()
        try:
            return function(*arguments, **settings)
        finally:
            spent[name] = spent.get(name, 0.0) + time.perf_counter() - started

    setattr(owner, name, timed)


def sha256_rate(threads: int) -> float:
    """Bytes a second that so many threads hash: the bound of reading a copy."""
    block = bytes(8 * 2**20)

    def work(_: int) -> None:
        for _ in range(20):
            hashlib.sha256(block)

    with ThreadPoolExecutor(threads) as pool:
        started = time.perf_counter()
        list(pool.map(work, range(threads)))
        return threads * 20 * len(block) / (time.perf_counter() - started)


def direct(checkpoint: Path, cache: Path, repeats: int) -> dict:
    """Medians of loading a base both ways in this process, and whether the logits are the same bits."""
    import torch

    from qlora_cli.core.device import choose_device, resolve_compute_dtype
    from qlora_cli.core.models import files, loading
    from qlora_cli.core.models import quantized_cache as base_cache
    from qlora_cli.core.models.quantized_cache import cache_size_bytes
    from qlora_cli.core.storage.hashed_file import THREADS, HashedFile
    from qlora_cli.settings.groups import QuantizationSettings

    os.environ["QLORA_CACHE"] = str(cache)
    device = choose_device()
    dtype = resolve_compute_dtype(None, device)
    ids, logits = torch.arange(5, 60, device=device)[None], {}

    def load(case: str, use_cache: bool) -> float:
        """Seconds of one load; the memory it takes is new to the process, as at a start."""
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.synchronize()
        events: list = []
        started = time.perf_counter()
        base, _ = loading.load_base(
            files.resolve_model(str(checkpoint), report=events.append),
            QuantizationSettings(base_cache=use_cache),
            compute_dtype=dtype,
            device=device,
        )
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        from_copy = any("Using the quantised base" in getattr(event, "text", "") for event in events)
        assert from_copy == (case == "copy"), events
        with torch.no_grad():
            logits[case] = base(input_ids=ids).logits.cpu()
        return seconds

    figures: dict = {"first load seconds": load("quantised", False)}
    quantised = [load("quantised", False) for _ in range(repeats)]
    figures["quantise and keep seconds"] = load("kept", True)
    restored = [load("copy", True) for _ in range(repeats)]
    spent: dict[str, float] = {}
    for owner, name in (
        (files, "weights_digest"),
        (base_cache, "_read"),  # of which `fill` is the part after the header is read and memory is taken
        (HashedFile, "fill"),
        (base_cache, "build_empty"),
        (base_cache, "_fill"),
        (loading, "freeze_base"),
    ):
        watch(owner, name, spent)
    figures["watched copy seconds"] = load("copy", True)
    figures["of which"] = ", ".join(f"{name} {seconds:.3f}" for name, seconds in spent.items())
    figures["sha256 GB/s, one thread"] = sha256_rate(1) / 1e9
    figures[f"sha256 GB/s, {THREADS} threads"] = sha256_rate(THREADS) / 1e9
    figures["all quantise seconds"] = " ".join(f"{seconds:.3f}" for seconds in quantised)
    figures["all copy seconds"] = " ".join(f"{seconds:.3f}" for seconds in restored)
    figures["quantise seconds"] = statistics.median(quantised)
    figures["copy seconds"] = statistics.median(restored)
    figures["times faster"] = figures["quantise seconds"] / figures["copy seconds"]
    figures["same logits"] = torch.equal(logits["copy"], logits["quantised"])
    figures["copy bytes"] = cache_size_bytes()
    return figures


def main() -> None:
    """Writes the checkpoint, starts the processes, prints the table."""
    from support.models import CONFIGS, write_checkpoint

    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path, default=Path("decode_startup.json"))
    parser.add_argument("--model", default="llama-7b", choices=list(CONFIGS))
    parser.add_argument("--checkpoint", type=Path, default=None, help="an existing one with its tokenizer")
    parser.add_argument("--work", type=Path, default=None)
    parser.add_argument("--direct", action="store_true", help="start no processes")
    parser.add_argument("--repeats", type=int, default=3, help="timed loads of each kind in this process")
    arguments = parser.parse_args()
    work = arguments.work or Path(tempfile.mkdtemp(prefix="decode_startup."))
    started = time.time()
    checkpoint = arguments.checkpoint or write_checkpoint(arguments.model, work / arguments.model)
    results: dict[str, dict] = {"checkpoint": {"write seconds": time.time() - started}}
    for cache in ("cache-direct", "cache"):  # of an earlier run
        shutil.rmtree(work / cache, ignore_errors=True)
    results["in one process"] = direct(checkpoint, work / "cache-direct", arguments.repeats)
    print("in one process", results["in one process"], flush=True)
    if not arguments.direct:
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
            print(f"{case:14} {name:28} {value:.3f}" if isinstance(value, float) else f"{case:14} {name:28} {value}")


if __name__ == "__main__":
    main()
