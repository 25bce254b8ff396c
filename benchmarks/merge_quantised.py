"""Where the seconds of `merge --quantize` go, and its peak memory: a random model of a real architecture, a short run, a merge.

    python benchmarks/merge_quantised.py --model llama-7b --layers 8 --folder /tmp/bench       # a quarter of it
    python benchmarks/merge_quantised.py --model llama-7b --folder /tmp/bench                  # whole, 14 GB of disk

Parts that lie inside of others are indented. Each waits for the device at both ends, which costs a few milliseconds.
Figures: benchmarks/quality.md.
"""

import argparse
import functools
import json
import os
import time
from collections import Counter
from pathlib import Path

PARTS = {
    "candidates.choice.load_base": "the base is loaded",
    "candidates.losses._read_merged": "weights are merged",
    "candidates.losses.round_layer": "layers are rounded",
    "candidates.compensated_rounding._gather": "  tokens go through",
    "candidates.compensated_rounding._settle": "  least squares",
    "candidates.rounded_weights.round_to_four_bits": "  columns are rounded",
    "candidates.losses.ActivationStream.advance": "streams move on",
    "candidates.losses.mean_loss": "losses behind the last layer",
}


def time_parts(seconds: Counter, wait) -> None:
    """Has every part add what it takes to `seconds`; `wait` waits for the device."""
    import importlib

    for path, label in PARTS.items():
        module, _, name = path.rpartition(".")
        owner, _, method = module.rpartition(".")
        if method[:1].isupper():
            holder = getattr(importlib.import_module(f"qlora_cli.core.{owner}"), method)
        else:
            holder = importlib.import_module(f"qlora_cli.core.{module}")
        plain = getattr(holder, name)

        def timed(*args, plain=plain, label=label, **kwargs):
            wait()
            started = time.perf_counter()
            try:
                return plain(*args, **kwargs)
            finally:
                wait()
                seconds[label] += time.perf_counter() - started

        setattr(holder, name, functools.wraps(plain)(timed))


def make_model(name: str, layers: int | None, folder: Path) -> Path:
    """A random checkpoint of that architecture, of so many layers."""
    from support.models import CONFIGS, write_checkpoint

    kind, values = CONFIGS[name]
    if layers:
        name = f"{name}-{layers}"
        CONFIGS[name] = (kind, values | {"num_hidden_layers": layers})
    return write_checkpoint(name, folder / name)


def main() -> None:
    """Makes the model and the run, merges, and prints a table and the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-7b", help="an architecture of support/models.py")
    parser.add_argument("--layers", type=int, help="so many instead of all")
    parser.add_argument("--rows", type=int, default=600, help="of GSM8K's lengths, 158 tokens in the mean")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/qlora-bench"))
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    os.environ["QLORA_CACHE"] = str(arguments.folder / "merge-cache")
    began = time.perf_counter()
    import torch
    from support.models import CONFIGS, write_rows

    import qlora_cli.commands.train as training
    from qlora_cli.commands.merge import merge
    from qlora_cli.config import MergeConfig, TrainConfig

    def told(what: str) -> None:
        print(f"{what} after {time.perf_counter() - began:.1f} s", flush=True)

    told("imported")
    model = make_model(arguments.model, arguments.layers, arguments.folder)
    told("made")
    rows = arguments.folder / "merge-rows.jsonl"
    write_rows("gsm8k", rows, rows=arguments.rows, vocab_size=CONFIGS[arguments.model][1]["vocab_size"])
    run, merged = arguments.folder / "merge-run", arguments.folder / "merge-output"
    shared = {"model": str(model), "overwrite": True}
    settings = {"data": str(rows), "output": str(run), "init": "default", "max_steps": 2, "eval_rows": 64}
    settings |= {"engine": "plain", "max_length": 512}
    training.measure_held_out = lambda *_: None  # which is no part of a merge
    training.train(TrainConfig(**shared, **settings), lambda event: None)
    told("trained")
    cuda = torch.cuda.is_available()
    seconds: Counter = Counter()
    time_parts(seconds, torch.cuda.synchronize if cuda else lambda: None)
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    config = MergeConfig(**shared, adapter=str(run), output=str(merged), quantize=True, min_kept=-9.0, verify=False)
    result = merge(config, lambda event: None)
    told("merged")
    whole = time.perf_counter() - started
    assert result.base_losses, "nothing was measured"
    layers = arguments.layers or CONFIGS[arguments.model][1]["num_hidden_layers"]
    for label in PARTS.values():
        print(f"{label:32} {seconds[label]:7.2f} s, a layer {seconds[label] / layers:6.3f}")
    print(f"{'whole, without verification':32} {whole:7.2f} s, of {layers} layers")
    figures = {label.strip(): round(value, 2) for label, value in seconds.items()}
    figures |= {"layers": layers, "whole_s": round(whole, 2), "losses": result.base_losses}
    if cuda:
        figures["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    print("RESULT", json.dumps(figures))


if __name__ == "__main__":
    main()
