"""Loss curves of 200 steps on real rows: engine on and engine off, for some seeds, whose differences are the yardstick.

    python benchmarks/step_curves.py --data gsm8k_train.jsonl [--architecture pythia-410m --device cuda --seeds 4] [--fp8]

Each row's text is trained on byte by byte. All runs see the same rows in the same order and start at the same random
base; runs of one seed start at the same adapter. Where the engine is right, its curve differs from the plain one by
rounding, less than those of two seeds do; where it routes tokens to experts, rounding sends some elsewhere, and single
pairs come apart as far as seeds do: the mean over several seeds counts. With --fp8 both are of the engine, one with products in 8 bits.
"""

import argparse
import json
import sys
import tempfile
from itertools import combinations
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
        losses.append(run_pass(engine, batch))
        optimizer.step()
    engine.close()
    return torch.stack(losses).double().cpu().numpy()


def run_pass(engine, batch) -> torch.Tensor:
    """Mean loss of a batch, whose gradients are added. No graph outlives it: one that did would break off the capture of
    the next step as a CUDA graph."""
    loss = engine.loss(batch) / batch.trained_tokens
    loss.backward()
    return loss.detach()


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
    parser.add_argument("--seeds", type=int, default=2, help="at least 2")
    parser.add_argument("--fp8", action="store_true", help="8 bits and bf16, instead of engine on and off")
    arguments = parser.parse_args()
    kinds = KINDS_OF_PRODUCTS if arguments.fp8 else KINDS
    one_kind, another_kind = kinds
    rows = read_rows(arguments.data, arguments.steps * arguments.batch, arguments.longest)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write_checkpoint(arguments.architecture, Path(folder) / "base")
        curves = {
            (name, seed): curve(checkpoint, kind, seed, rows, arguments)
            for seed in range(arguments.seeds)
            for name, kind in kinds.items()
        }
    names = {key: f"{key[0]}, seed {key[1]}" for key in curves}
    for step in [*range(0, arguments.steps, max(1, arguments.steps // 8)), arguments.steps - 1]:
        print(f"step {step + 1:4d}   " + "   ".join(f"{names[key]} {c[step]:.4f}" for key, c in curves.items()))
    seeds = range(arguments.seeds)
    apart = [float(np.abs(curves[one_kind, seed] - curves[another_kind, seed]).mean()) for seed in seeds]
    seeds_apart = [
        float(np.abs(curves[one_kind, one] - curves[one_kind, other]).mean()) for one, other in combinations(seeds, 2)
    ]
    last = slice(-min(20, arguments.steps), None)
    figures = {
        f"{one_kind} and {another_kind} apart, mean of all steps and seeds": float(np.mean(apart)),
        f"two seeds of {one_kind} apart, mean of all steps and pairs": float(np.mean(seeds_apart)),
        "the first by seed": apart,
        "the second by pair": seeds_apart,
    } | {f"{names[key]}, mean of the last {-last.start}": float(values[last].mean()) for key, values in curves.items()}
    for name, value in figures.items():
        print(f"{name:<60}{np.round(value, 5)}")
    print("RESULT " + json.dumps(figures))
    if np.mean(apart) > np.mean(seeds_apart):
        raise SystemExit(f"{one_kind} and {another_kind} differ by more than two seeds do")


if __name__ == "__main__":
    main()
