"""Loss curves of 200 steps on real rows: engine on and engine off, for two seeds, whose difference is the yardstick.

    python benchmarks/step_curves.py --data gsm8k_train.jsonl [--architecture pythia-410m --device cuda] [--fp8]

Each row's text is trained on byte by byte. All runs see the same rows in the same order and start at the same random
base; runs of one seed start at the same adapter. Where the engine is right, its curve differs from the plain one by
rounding, far less than those of two seeds do. With --fp8 both are of the engine, one with products in 8 bits.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from support.models import write_checkpoint

from qlora_cli.core.adapters.lora import attach_adapter
from qlora_cli.core.data.packing import collate
from qlora_cli.core.engine.engine import install_engine
from qlora_cli.core.models.files import resolve_model
from qlora_cli.core.models.loading import load_base
from qlora_cli.core.training.flat_parameters import TrainableParameters
from qlora_cli.settings.groups import LoraSettings, QuantizationSettings, StepSettings

# What is compared: name → settings of a step.
KINDS = {"on": {"engine": "fast", "matmul": "bf16"}, "off": {"engine": "plain", "matmul": "bf16"}}
KINDS_OF_PRODUCTS = {"fp8": {"matmul": "fp8"}, "bf16": {"matmul": "bf16"}}


def read_rows(path: Path, count: int, longest: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Bytes of question and answer, all but the first trained on."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines()[:count]:
        record = json.loads(line)
        ids = np.frombuffer((record["question"] + "\n" + record["answer"]).encode(), np.uint8)[:longest]
        rows.append((ids.astype(np.int32) + 1, np.arange(len(ids)) > 0))
    return rows


def curve(checkpoint: Path, kind: dict[str, str], seed: int, rows: list, arguments: argparse.Namespace) -> np.ndarray:
    """Mean loss a token of each step."""
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    base, _ = load_base(
        resolve_model(str(checkpoint), report=lambda event: None),
        QuantizationSettings(quant_type="nf4", double_quant=True, base_cache=False),
        compute_dtype=dtype,
        device=device,
    )
    model = attach_adapter(base, LoraSettings(rank=16, alpha=32, dropout=0.0), seed=seed).train()
    engine = install_engine(
        model,
        StepSettings(gradient_checkpointing="off", **kind),
        device=device,
        compute_dtype=dtype,
        max_tokens=arguments.batch * arguments.longest,
        total_steps=arguments.steps,
        report=lambda event: print("   ", event.text, flush=True),
    )
    print("   ", kind, seed, engine.describe(), flush=True)
    parameters = TrainableParameters(model)
    optimizer = torch.optim.AdamW([buffer.values for buffer in parameters.buffers], lr=arguments.learning_rate)
    losses = []
    for step in range(arguments.steps):
        places = range(step * arguments.batch, (step + 1) * arguments.batch)
        batch = collate([rows[i % len(rows)] for i in places], places)
        parameters.zero_gradients()
        loss = engine.loss(batch) / batch.trained_tokens
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    engine.close()
    return torch.stack(losses).double().cpu().numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="JSON lines with question and answer")
    parser.add_argument("--architecture", default="tiny-llama")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--longest", type=int, default=400)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--fp8", action="store_true", help="8 bits and bf16, instead of engine on and off")
    arguments = parser.parse_args()
    kinds = KINDS_OF_PRODUCTS if arguments.fp8 else KINDS
    one_kind, another_kind = kinds
    rows = read_rows(arguments.data, arguments.steps * arguments.batch, arguments.longest)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write_checkpoint(arguments.architecture, Path(folder) / "base")
        curves = {
            name + ", other seed" * seed: curve(checkpoint, kind, seed, rows, arguments)
            for seed in (0, 1)
            for name, kind in kinds.items()
        }
    on, off, other, other_off = curves.values()
    for step in [*range(0, arguments.steps, max(1, arguments.steps // 8)), arguments.steps - 1]:
        print(f"step {step + 1:4d}   " + "   ".join(f"{name} {values[step]:.4f}" for name, values in curves.items()))
    against = f"{one_kind} against {another_kind}"
    pairs = {against: (on, off), "the same, other seed": (other, other_off), "two seeds": (on, other)}
    figures = {
        f"{name}, {kind} |difference|": float(take(np.abs(one - another)))
        for name, (one, another) in pairs.items()
        for kind, take in (("mean", np.mean), ("largest", np.max))
    }
    last = slice(-min(20, arguments.steps), None)
    figures |= {f"{name}, mean of the last 20": float(values[last].mean()) for name, values in curves.items()}
    for name, value in figures.items():
        print(f"{name:<45}{value:.5f}")
    print("RESULT " + json.dumps(figures))
    yardstick = figures["two seeds, mean |difference|"]
    if max(figures[f"{against}, mean |difference|"], figures["the same, other seed, mean |difference|"]) > yardstick:
        raise SystemExit(f"{one_kind} and {another_kind} differ by more than two seeds do")


if __name__ == "__main__":
    main()
