"""Rows of 8,192 to 524,288 tokens through the engine on one card: speed, its share of what the arithmetic allows, and peak
memory beside what is predicted.

    python benchmarks/long_rows.py --json long_rows.json [--run 131072 --run 8192 ...]

A run is a process of its own, on a random 4-bit base. Those on fewer layers than the model has keep within what the rest
would leave of the card: all that grows with the row is there for one layer at a time, or waits on the host, so that the
others' weights and adapters are all that is missing. The share is of the card's 989 TFLOP/s, by the arithmetic of a step
without what is repeated, attention included; `busy` counts that too.
"""

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from step_engine import run_apart
from support.models import ALL16, build

GIB = 2**30
CARD_FLOPS = 989e12
# run → (architecture with its layers, the whole one, tokens of the row, GiB of the card, steps timed)
RUNS = {
    "8192": ("llama3-8b", "llama3-8b", 8192, 24, 6),
    "32768": ("llama3-8b-8-layers", "llama3-8b", 32768, 24, 3),
    "131072": ("llama3-8b", "llama3-8b", 131072, 24, 1),
    "524288": ("llama3-8b-2-layers", "llama3-8b", 524288, 80, 1),
    "tiny": ("tiny-llama", "tiny-llama", 300, 2, 1),
}


def plan(name: str, tokens: int, vram_bytes: int, on_cuda: bool, **options):
    """What `qlora train` would decide, with the model's profile."""
    import torch
    from support.models import make_config

    from qlora_cli.core.planning.model_profile import profile_model
    from qlora_cli.core.planning.planner import RowLengths, plan_training
    from qlora_cli.settings.groups import LoraSettings, QuantizationSettings, StepSettings

    lora = LoraSettings(alpha=32, **ALL16)
    profile = profile_model(make_config(name), lora, QuantizationSettings(), compute_dtype=torch.bfloat16)
    settings = StepSettings(optimizer="adamw", stream=False, **options)
    return profile, plan_training(profile, settings, RowLengths(tokens), vram_bytes=vram_bytes, on_cuda=on_cuda)


def held_bytes(memory) -> int:
    """Of the model and its adapter, whatever a step computes."""
    return memory.base_bytes + memory.adapter_bytes + memory.gradient_bytes + memory.optimizer_bytes


def run(name: str, device_name: str) -> dict:
    """Trains one configuration and returns its figures."""
    from dataclasses import replace

    import numpy as np
    import torch

    from qlora_cli.core.adapters.lora import attach_adapter
    from qlora_cli.core.data.packing import collate
    from qlora_cli.core.device import limit_memory
    from qlora_cli.core.engine.engine import install_engine
    from qlora_cli.core.planning.memory_estimate import ResolvedStep, count_flops, estimate_training
    from qlora_cli.core.training.flat_parameters import TrainableParameters
    from qlora_cli.settings.groups import LoraSettings, StepSettings

    architecture, whole, tokens, vram_gib, steps = RUNS[name]
    device, cuda = torch.device(device_name), device_name == "cuda"
    result: dict = {"run": name, "architecture": architecture, "tokens": tokens}
    _, decided = plan(whole, tokens, vram_gib * GIB, True)
    missing = 0
    few, part = plan(architecture, tokens, vram_gib * GIB, True)
    if architecture != whole:
        missing = held_bytes(decided.memory) - held_bytes(part.memory)
        part = plan(architecture, tokens, vram_gib * GIB - missing, True)[1]
    tiling, held = decided.tiling, {}
    if architecture != whole and tiling:  # a few layers would be kept whole, or on the card
        held = {"gradient_checkpointing": "on", "offload_activations": decided.measures.offload_activations}
    result |= {
        "predicted_whole": {"fits": decided.fits, **decided.settings, **decided.memory.to_dict()},
        "predicted": {"fits": part.fits, **part.settings, **part.memory.to_dict()},
    }
    started = time.time()
    base = build(architecture, device_name)
    if cuda:
        torch.cuda.empty_cache()
        limit_memory(device, part.allocator_bytes)
    model = attach_adapter(base, LoraSettings(alpha=32, **ALL16)).train()
    parameters = TrainableParameters(model)
    result["build_s"] = time.time() - started
    generator = np.random.default_rng(0)
    rows = [(generator.integers(5, 1000, tokens).astype(np.int32), np.ones(tokens, dtype=bool))]
    batch = collate(rows, [0])
    started = time.time()
    engine = install_engine(
        model,
        StepSettings(**tiling, **held),
        device=device,
        compute_dtype=torch.bfloat16,
        max_tokens=tokens,
        total_steps=100_000 if not tiling else 100,
        optimizer_bytes=8 * parameters.elements,
        report=lambda event: print("   ", event.text, flush=True),
    )
    if architecture != whole and tiling and not decided.measures.keeps_attention:  # for which all layers want the host
        engine._apply(replace(engine.plan, keeps_attention=False))
    result["install_s"], result["engine"] = time.time() - started, engine.describe()
    print("   ", result["engine"], flush=True)
    if engine.planner is not None:
        print("   ", engine.planner.needs, f"{engine.planner.available_bytes / GIB:.2f} GiB left", flush=True)
    optimizer = torch.optim.AdamW([b.values for b in parameters.buffers], lr=1e-4, fused=cuda)

    def step() -> float:
        while True:
            parameters.zero_gradients()
            try:
                loss = engine.loss(engine.prepare(batch.pin() if cuda else batch))
                (loss / batch.trained_tokens).backward()
                break
            except torch.OutOfMemoryError as error:
                print("   ", str(error).splitlines()[0][:200], flush=True)
                loss = None
            if not engine.reduce_memory():
                raise MemoryError("no leaner plan")
        optimizer.step()
        return float(loss.detach()) / batch.trained_tokens

    def wait() -> None:
        if cuda:
            torch.cuda.synchronize()

    if cuda:
        torch.cuda.reset_peak_memory_stats()
    losses = []
    if steps > 1:  # a step of one minute has nothing to warm up
        losses += [step() for _ in range(4)]
    wait()
    started = time.time()
    losses += [step() for _ in range(steps)]
    wait()
    seconds = (time.time() - started) / steps
    as_run = engine.plan_by_tokens(tokens)
    resolved = ResolvedStep(tokens, tokens, "adamw", measures=as_run, compiled=engine.compiled, on_cuda=True)
    needed, busy = (count_flops(few, replace(resolved, measures=m)) for m in (replace(as_run, recomputed=0), as_run))
    result |= {
        "step_s": seconds,
        "tok_s": tokens / seconds,
        "share": needed * tokens / seconds / CARD_FLOPS,
        "busy": busy * tokens / seconds / CARD_FLOPS,
        "losses": losses,
        "plan": repr(as_run),
        "predicted_as_run_gib": estimate_training(few, resolved).peak_bytes / GIB,
        "missing_gib": missing / GIB,
    }
    if cuda:
        result["peak_gib"] = torch.cuda.max_memory_allocated() / GIB
        result["reserved_gib"] = torch.cuda.max_memory_reserved() / GIB
    engine.close()
    return result


def main() -> None:
    """Runs the chosen configurations one after another and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="append", choices=RUNS)
    parser.add_argument("--limit-s", type=int, default=600)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path, default=Path("long_rows.json"))
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        print("RESULT " + json.dumps(run(arguments.inside, arguments.device)), flush=True)
        return
    results = []
    for name in arguments.run or [n for n in RUNS if n != "tiny"]:
        command = [sys.executable, __file__, "--inside", name, "--device", arguments.device]
        results.append(run_apart(name, command, arguments.limit_s))
        arguments.json.write_text(json.dumps(results, indent=1))
    columns = ("tok_s", "step_s", "share", "busy", "peak_gib", "predicted_as_run_gib", "missing_gib")
    print(f"\n{'run':<14}" + "".join(f"{column:>21}" for column in columns))
    for result in results:
        if "error" in result:
            print(f"{result['run']:<14} FAILED {(result['error'].splitlines() or [''])[-1][:90]}")
            continue
        print(f"{result['run']:<14}" + "".join(f"{result.get(column, 0):>21.3f}" for column in columns))


if __name__ == "__main__":
    main()
