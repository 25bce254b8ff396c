"""Rows of 8,192 to 524,288 tokens through the engine on one card: speed, its share of what the arithmetic allows, and peak
memory beside what is predicted.

    python benchmarks/long_rows.py --json long_rows.json [--run 131072 --run 8192 ...] [--profile] [--tile-tokens N]

A run is a process of its own, on a random 4-bit base; what it prints comes as it goes. Those on fewer layers than the model
has keep within what the rest would leave of the card: all that grows with the row is there for one layer at a time, or waits
on the host, so that the others' weights and adapters are all that is missing. Their `whole_share` is that of a step of all
layers: so many times the time of a layer, and the head's. The share is of the card's 989 TFLOP/s, by the arithmetic of a step
without what is repeated, attention included; `busy` counts that too. Memory of the host is page-locked in the first step alone
(`pinned_s`), which is timed only where there is one step.
"""

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from step_engine import profile_of, run_apart
from support.models import ALL16, build

GIB = 2**30
CARD_FLOPS = 989e12
# run → (architecture with its layers, the whole one, tokens of the row, GiB of the card, steps before, steps timed)
RUNS = {
    "8192": ("llama3-8b", "llama3-8b", 8192, 24, 4, 6),
    "32768": ("llama3-8b-8-layers", "llama3-8b", 32768, 24, 1, 3),
    "131072": ("llama3-8b-8-layers", "llama3-8b", 131072, 24, 1, 1),
    "131072-whole": ("llama3-8b", "llama3-8b", 131072, 24, 1, 1),
    "524288": ("llama3-8b-2-layers", "llama3-8b", 524288, 80, 0, 1),
    "tiny": ("tiny-llama-half", "tiny-llama", 300, 2, 1, 1),
}


def plan(name: str, tokens: int, vram_bytes: int | None, on_cuda: bool, **options):
    """What `qlora train` would decide, with the model's profile."""
    import torch
    from support.models import make_config

    from qlora_cli.core.planning.model_profile import profile_model
    from qlora_cli.core.planning.planner import RowLengths, plan_training
    from qlora_cli.settings.groups import LoraSettings, QuantizationSettings, StepSettings

    lora = LoraSettings(alpha=32, **ALL16)
    profile = profile_model(make_config(name), lora, QuantizationSettings(), compute_dtype=torch.bfloat16)
    settings = StepSettings(optimizer="adamw", stream=False, matmul="bf16", **options)
    return profile, plan_training(profile, settings, RowLengths(tokens), vram_bytes=vram_bytes, on_cuda=on_cuda)


def held_bytes(memory) -> int:
    """Of the model and its adapter, whatever a step computes."""
    trained = memory.adapter_bytes + memory.gradient_bytes + memory.optimizer_bytes
    return memory.base_bytes + trained


def plan_part(run: str, **tiling):
    """The plan of the whole model; the profiles of both; the bytes that the part lacks of it."""
    architecture, whole, tokens, vram_gib, *_ = RUNS[run]
    all_layers, decided = plan(whole, tokens, vram_gib * GIB, True, **tiling)
    if architecture == whole:
        return decided, all_layers, all_layers, 0
    few, part = plan(architecture, tokens, None, True)
    return decided, all_layers, few, held_bytes(decided.memory) - held_bytes(part.memory)


def of_part(measures, layers: int, few: int):
    """What was planned for a model, for one of fewer layers of which as many are not recomputed, and the same share keeps
    attention's results."""
    from dataclasses import replace

    recomputed = max(0, few - (layers - measures.recomputed))
    kept = round(measures.attention_kept * recomputed / max(1, measures.recomputed))
    return replace(measures, recomputed=recomputed, attention_kept=kept)


def plan_as_whole(engine, all_layers, few) -> None:
    """Has an engine of a part run as it would plan for the whole model by what it measured."""
    from dataclasses import replace

    from qlora_cli.core.engine.memory_plan import plan_memory

    planner = engine.planner
    needs = replace(planner.needs, layers=all_layers.layers, dense_bytes=all_layers.dense_bytes)
    whole = plan_memory(needs, planner.available_bytes, planner.settings, workspaces=planner.workspaces)
    say(f"the whole model: {whole.describe(all_layers.layers)}, {whole.step_bytes(needs) / GIB:.2f} GiB beside it")
    planner.adapts = False
    engine._apply(of_part(whole, all_layers.layers, few.layers))


def say(text: object) -> None:
    """Prints what a run is at, with the time."""
    print(f"    {time.strftime('%H:%M:%S')} {text}", flush=True)


class TimedHead:
    """A head whose loss is waited for and timed: its gradient is computed with it."""

    def __init__(self, head, wait) -> None:
        self.head, self.wait, self.seconds, self.frozen = head, wait, 0.0, head.frozen

    def loss(self, *given):
        """Of the head."""
        self.wait()
        started = time.time()
        result = self.head.loss(*given)
        self.wait()
        self.seconds = time.time() - started
        return result


def time_pinning(pinned: list[tuple[float, int]]) -> None:
    """Has seconds and bytes of the host's memory that is page-locked for activations noted."""
    from qlora_cli.core.engine.offload import ActivationOffload

    carve = ActivationOffload._carve

    def timed(self, bytes_: int):
        started = time.time()
        buffer = carve(self, bytes_)
        pinned.append((time.time() - started, bytes_))
        return buffer

    ActivationOffload._carve = timed


def time_kept(engine, step, layers: int, counts: list[int]) -> dict:
    """Seconds of a step of all layers of a part, recomputed, where so many keep attention's results; memory for them is
    page-locked before. In between lies what fewer kept ones take."""
    from dataclasses import replace

    from qlora_cli.core.streaming.host_memory import lock_pages

    planner, found = engine.planner, {}
    plans = {kept: replace(engine.plan, recomputed=layers, sent=0, attention_kept=kept) for kept in counts}
    taken = max(plan.sent_bytes(planner.needs) for plan in plans.values()) + GIB // 4
    started = time.time()
    if engine.on_cuda:
        engine.offload.chunk, engine.offload.chunk_used = lock_pages(taken), 0
    say(f"{taken / GIB:.2f} GiB page-locked in {time.time() - started:.1f} s")
    for kept, part in plans.items():
        engine.plan_by_tokens = lambda *_, part=part: part
        started = time.time()
        loss = step()
        seconds, head_s = time.time() - started, getattr(engine.head, "seconds", 0.0)
        found[kept] = {"step_s": seconds, "head_s": head_s, "layer_s": (seconds - head_s) / layers, "loss": loss}
        say(f"attention kept of {kept} of {layers}: {found[kept]}")
    return found


def run(name: str, device_name: str, profile: bool, tile_tokens: int | None, kept: list[int]) -> dict:
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

    architecture, whole, tokens, vram_gib, warm, steps = RUNS[name]
    device, cuda = torch.device(device_name), device_name == "cuda"
    result: dict = {"run": name, "architecture": architecture, "tokens": tokens}
    tiling = {} if tile_tokens is None else {"tile_tokens": tile_tokens}
    decided, all_layers, few, missing = plan_part(name, **tiling)
    tiling |= decided.tiling
    result |= {
        "predicted_whole": {"fits": decided.fits, **decided.settings, **decided.memory.to_dict()},
        "planned": repr(decided.measures),
    }
    say(f"planned: {decided.measures.describe(all_layers.layers)}, {decided.memory.device_bytes / GIB:.2f} GiB")
    base = build(architecture, device_name)
    if cuda:
        torch.cuda.empty_cache()
        limit_memory(device, vram_gib * GIB - missing - decided.memory.context_bytes)
    model = attach_adapter(base, LoraSettings(alpha=32, **ALL16)).train()
    parameters = TrainableParameters(model)
    say("built")
    generator = np.random.default_rng(0)
    rows = [(generator.integers(5, 1000, tokens).astype(np.int32), np.ones(tokens, dtype=bool))]
    batch = collate(rows, [0])
    started = time.time()
    pinned: list[tuple[float, int]] = []
    time_pinning(pinned)
    engine = install_engine(
        model,
        StepSettings(matmul="bf16", **tiling),
        device=device,
        compute_dtype=torch.bfloat16,
        max_tokens=tokens,
        total_steps=100 if tiling else 100_000,
        optimizer_bytes=8 * parameters.elements,
        report=lambda event: say(event.text),
    )
    if architecture != whole and engine.planner is not None:
        plan_as_whole(engine, all_layers, few)
    result["install_s"], result["engine"] = time.time() - started, engine.describe()
    say(result["engine"])
    if engine.planner is not None:
        say(f"{engine.planner.needs} {engine.planner.available_bytes / GIB:.2f} GiB left")
    optimizer = torch.optim.AdamW([b.values for b in parameters.buffers], lr=1e-4, fused=cuda)

    def wait() -> None:
        if cuda:
            torch.cuda.synchronize()

    eager = engine.graphs is None
    if eager:
        engine.head = TimedHead(engine.head, wait)
    phases: dict[str, float] = {}

    def step(*_: object) -> float:
        while True:
            parameters.zero_gradients()
            times = [time.time()]
            try:
                loss = engine.loss(engine.prepare(batch.pin() if cuda else batch))
                if eager:
                    wait()
                times.append(time.time())
                (loss / batch.trained_tokens).backward()
                break
            except torch.OutOfMemoryError as error:
                say(str(error).splitlines()[0][:200])
                loss = None
            if not engine.reduce_memory():
                raise MemoryError("no leaner plan")
        if eager:
            wait()
            phases.update(forward_s=times[1] - times[0], backward_s=time.time() - times[1])
            phases.update(head_s=engine.head.seconds, pinned_s=sum(seconds for seconds, _ in pinned))
            phases.update(pinned_gib=sum(bytes_ for _, bytes_ in pinned) / GIB)
            say(f"step: { ({k: round(v, 3) for k, v in phases.items()}) }")
        optimizer.step()
        return float(loss.detach()) / batch.trained_tokens

    if cuda:
        torch.cuda.reset_peak_memory_stats()
    if kept:
        return result | {"kept": time_kept(engine, step, few.layers, kept)}
    losses = [step() for _ in range(warm)]
    wait()
    started = time.time()
    losses += [step() for _ in range(steps)]
    wait()
    seconds = (time.time() - started) / steps
    as_run = engine.plan_by_tokens(tokens, False)
    resolved = ResolvedStep(tokens, tokens, "adamw", measures=as_run, compiled=engine.compiled, on_cuda=True)
    needed, busy = (
        count_flops(few, replace(resolved, measures=m))
        for m in (replace(as_run, recomputed=0, attention_kept=0), as_run)
    )
    result |= {
        **phases,
        "step_s": seconds,
        "tok_s": tokens / seconds,
        "share": needed * tokens / seconds / CARD_FLOPS,
        "busy": busy * tokens / seconds / CARD_FLOPS,
        "losses": losses,
        "plan": repr(as_run),
        "predicted_gib": estimate_training(few, resolved).peak_bytes / GIB,
        "missing_gib": missing / GIB,
    }
    if phases:
        head_s, times = phases["head_s"], all_layers.layers / few.layers
        result["whole_s"] = (seconds - head_s) * times + head_s
        arithmetic = count_flops(
            all_layers, replace(resolved, measures=replace(as_run, recomputed=0, attention_kept=0))
        )
        result["whole_share"] = arithmetic * tokens / result["whole_s"] / CARD_FLOPS
    if cuda:
        result["peak_gib"] = torch.cuda.max_memory_allocated() / GIB
        result["reserved_gib"] = torch.cuda.max_memory_reserved() / GIB
        if profile:
            result |= profile_of(step, [None])
    engine.close()
    return result


def main() -> None:
    """Runs the chosen configurations one after another and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="append", choices=RUNS)
    parser.add_argument("--limit-s", type=int, default=600)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--profile", action="store_true", help="one step more, by kind of kernel")
    parser.add_argument("--tile-tokens", type=int, help="in place of what is planned")
    parser.add_argument(
        "--kept", action="append", type=int, help="only times steps of which so many layers keep attention"
    )
    parser.add_argument("--json", type=Path, default=Path("long_rows.json"))
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        found = run(arguments.inside, arguments.device, arguments.profile, arguments.tile_tokens, arguments.kept or [])
        print("RESULT " + json.dumps(found), flush=True)
        return
    flags = ["--device", arguments.device, *(["--profile"] if arguments.profile else [])]
    flags += ["--tile-tokens", str(arguments.tile_tokens)] if arguments.tile_tokens is not None else []
    flags += [f"--kept={kept}" for kept in arguments.kept or ()]
    results = []
    for name in arguments.run or [n for n in RUNS if n != "tiny"]:
        command = [sys.executable, __file__, "--inside", name, *flags]
        results.append(run_apart(name, command, arguments.limit_s))
        arguments.json.write_text(json.dumps(results, indent=1))
    columns = ("tok_s", "step_s", "share", "busy", "whole_share", "peak_gib", "predicted_gib", "missing_gib")
    print(f"\n{'run':<14}" + "".join(f"{column:>14}" for column in columns))
    for result in results:
        if "error" in result:
            print(f"{result['run']:<14} FAILED {result['error'][-200:]}")
            continue
        print(f"{result['run']:<14}" + "".join(f"{result.get(column, 0):>14.3f}" for column in columns))


if __name__ == "__main__":
    main()
