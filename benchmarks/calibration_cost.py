"""What `--init calibrated` costs a run: seconds from a loaded base to a started adapter, and peak memory beside training's.

    python benchmarks/calibration_cost.py --model llama-7b --folder /tmp/bench --vram 6.05GiB

The checkpoint is a random one of the real architecture (see support/models.py) or, with a path, a real one; its files are
read once before, so that the disk is left out. Figures: benchmarks/quality.md.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent


def measure(arguments: argparse.Namespace, model: Path, rows: Path) -> dict:
    """One `qlora train` of a few steps, the start of its adapter timed."""
    import torch

    import qlora_cli.commands.train as command
    from qlora_cli.config import TrainConfig

    figures: dict = {}
    plain = command.start_adapter

    def timed(run, *args, **kwargs):
        cuda = run.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        result = plain(run, *args, **kwargs)
        if cuda:
            torch.cuda.synchronize()
            figures["calibration_peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        figures["calibration_s"] = round(time.perf_counter() - started, 1)
        figures.update(result)
        return result

    command.start_adapter = timed
    config = TrainConfig(
        model=str(model),
        data=str(rows),
        output=str(arguments.folder / "calibration-run"),
        overwrite=True,
        init="calibrated",
        rank=16,
        alpha=32,
        max_steps=arguments.steps,
        batch_size=arguments.batch_size,
        gradient_accumulation_steps=1,
        max_length=arguments.max_length,
        eval_rows=0,
        vram=arguments.vram,
    )
    result = command.train(config, lambda event: None)
    figures["training_peak_gib"] = round((result.peak_vram_bytes or 0) / 2**30, 2)
    return figures


def main() -> None:
    """Makes the checkpoint and the rows, reads the files once, and measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-7b", help="an architecture of support/models.py, or a path")
    parser.add_argument("--rows", type=Path, help="JSON Lines to train on; default made rows of GSM8K's lengths")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/qlora-bench"))
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--vram", help="as --vram of qlora train")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    os.environ["QLORA_CACHE"] = str(arguments.folder / "calibration-cache")
    model, rows = Path(arguments.model), arguments.rows
    if not model.is_dir():
        model = arguments.folder / arguments.model
        if not (model / "tokenizer.json").is_file():
            subprocess.run([sys.executable, "-m", "support.models", arguments.model, str(model)], check=True, cwd=HERE)
    if rows is None:
        from support.models import CONFIGS, write_rows

        rows = arguments.folder / "calibration.jsonl"
        vocab_size = CONFIGS[arguments.model][1]["vocab_size"]
        write_rows("gsm8k", rows, rows=400, vocab_size=vocab_size, max_length=512)
    for path in model.glob("*.safetensors"):
        with path.open("rb") as file:
            while file.read(2**24):
                pass
    print("RESULT", json.dumps(measure(arguments, model, rows), default=str))


if __name__ == "__main__":
    main()
