"""A tiny model's training step on the CPU, 4-bit base and fast engine, beside the same model in plain fp32 LoRA.

    python benchmarks/step_cpu.py

Both take the same rows of differing lengths; the plain one pads them, as a model knows no better. Steps alternate, so
that whatever else the machine does falls on both. The bar: ours takes at most 1.5 times as long.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from support.models import write_checkpoint
from transformers import AutoModelForCausalLM

from qlora_cli.core.adapters.lora import attach_adapter
from qlora_cli.core.data.packing import collate
from qlora_cli.core.engine.engine import install_engine
from qlora_cli.core.models.files import resolve_model
from qlora_cli.core.models.loading import load_base
from qlora_cli.core.training.flat_parameters import TrainableParameters
from qlora_cli.settings.groups import LoraSettings, QuantizationSettings, StepSettings

CPU = torch.device("cpu")
STEPS, WARM, ROWS = 40, 5, 8


def stepper(base, kind: str):
    """A function that takes one optimizer step on a batch."""
    model = attach_adapter(base, LoraSettings(rank=16, alpha=32, dropout=0.0), seed=0).train()
    engine = install_engine(
        model,
        StepSettings(engine=kind, gradient_checkpointing="off"),
        device=CPU,
        compute_dtype=torch.float32,
        max_tokens=4096,
        total_steps=STEPS,
        report=lambda event: None,
    )
    parameters = TrainableParameters(model)
    optimizer = torch.optim.AdamW([buffer.values for buffer in parameters.buffers], lr=1e-4, fused=True)

    def step(batch) -> float:
        started = time.perf_counter()
        parameters.zero_gradients()
        loss = engine.loss(batch)
        (loss / batch.trained_tokens).backward()
        optimizer.step()
        return time.perf_counter() - started

    return step


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write_checkpoint("tiny-llama", Path(folder) / "tiny")
        plain = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).requires_grad_(False)
        base, _ = load_base(
            resolve_model(str(checkpoint), report=lambda event: None),
            QuantizationSettings(quant_type="nf4", double_quant=True, base_cache=False),
            compute_dtype=torch.float32,
            device=CPU,
        )
    steps = {"4-bit, fast engine": stepper(base, "fast"), "fp32 LoRA": stepper(plain, "plain")}
    rng = np.random.default_rng(0)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(STEPS + WARM):
        lengths = rng.integers(30, 120, ROWS)
        rows = [(rng.integers(5, 1000, n).astype(np.int32), np.ones(n, dtype=bool)) for n in lengths]
        batch = collate(rows, range(ROWS))
        for name, step in steps.items():
            seconds[name].append(step(batch))
    medians = {name: statistics.median(times[WARM:]) for name, times in seconds.items()}
    ratio = medians["4-bit, fast engine"] / medians["fp32 LoRA"]
    for name, median in medians.items():
        print(f"{name:<20}{1000 * median:8.1f} ms")
    print(f"ratio {ratio:.2f}, bar 1.5")
    print("RESULT " + json.dumps({"ms": {n: 1000 * m for n, m in medians.items()}, "ratio": ratio}))


if __name__ == "__main__":
    main()
