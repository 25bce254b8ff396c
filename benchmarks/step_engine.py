"""Tokens per second, peak memory and a profile of the engine's step alone, on random 4-bit models of the real sizes.

    python benchmarks/step_engine.py --json step_engine.json [--run llama-free --run neox-quotes ...] [--profile]

Each run is a process of its own with a time limit. Models are built and quantised on the GPU, no checkpoint touches
the disk; rows are random ids. The optimizer is torch's fused AdamW over one buffer; where experts are adapted that of a
run, whose state may wait on the host, with memory at each moment of a step. Tokens are real ones, no padding.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.models import ALL16, ALL64, EXPERTS16, QKV8, QKV16, build

FREE = {"gradient_checkpointing": "off", "resident_weights": False, "compile": True}
RESIDENT = FREE | {"resident_weights": True}
EVERY_LAYER = {"gradient_checkpointing": "on", "compile": True}
# run → (architecture, row lengths of a step, adapter, engine options; limit_gib is that of PyTorch's allocator)
RUNS = {
    "llama-free": ("llama-7b", (2048,) * 2, ALL16, RESIDENT),
    "llama-free-flash": ("llama-7b", (2048,) * 2, ALL16, RESIDENT | {"cudnn": False}),
    "llama-free-packed4": ("llama-7b", (2048,) * 2, ALL16, FREE),
    "llama-free-eager": ("llama-7b", (2048,) * 2, ALL16, RESIDENT | {"compile": False}),
    "llama-free-nograph": ("llama-7b", (2048,) * 2, ALL16, RESIDENT | {"graphs": False}),
    "llama-least": ("llama-7b", (2048,) * 2, ALL16, {"compile": True, "limit_gib": 5.2}),
    "llama-gsm8k": ("llama-7b", "gsm8k", ALL16, RESIDENT),
    "neox-fixed": ("neox-20b", (2048,), QKV8, {"compile": True, "limit_gib": 11.9}),
    "neox-quotes": ("neox-20b", "quotes", QKV8, {"compile": True, "limit_gib": 11.75}),
    "neox-quotes-eager": ("neox-20b", "quotes", QKV8, {"compile": False, "limit_gib": 11.75}),
    "neox-11gib": ("neox-20b", (512,), QKV8, {"compile": False, "limit_gib": 11.0}),
    "pythia": ("pythia-410m", (2048,) * 4, ALL16, RESIDENT),
    "pythia-eager": ("pythia-410m", (2048,) * 4, ALL16, RESIDENT | {"compile": False}),
    "falcon": ("falcon-7b", (2048,), QKV16, {"compile": True, "limit_gib": 6.6}),
    "gemma2-free": ("gemma2-9b", (2048,) * 2, ALL16, {"compile": True, "limit_gib": 40.0}),
    "qwen3-moe-free": ("qwen3-30b-a3b", (2048,) * 2, ALL16, RESIDENT),
    "qwen3-moe-least": ("qwen3-30b-a3b", (2048,) * 2, ALL16, EVERY_LAYER | {"limit_gib": 21.2}),
    "qwen3-moe-gsm8k": ("qwen3-30b-a3b", "gsm8k", ALL16, RESIDENT),
    "qwen3-moe-quarter-free": ("qwen3-30b-a3b-quarter", (2048,) * 2, ALL16, RESIDENT),
    "qwen3-moe-quarter-eager": ("qwen3-30b-a3b-quarter", (2048,) * 2, ALL16, RESIDENT | {"compile": False}),
    "qwen3-moe-quarter-least": ("qwen3-30b-a3b-quarter", (2048,) * 2, ALL16, EVERY_LAYER),
    "qwen3-moe-quarter-plain": ("qwen3-30b-a3b-quarter", (2048,) * 2, ALL16, EVERY_LAYER | {"experts": False}),
    "gpt-oss-least": ("gpt-oss-20b", (2048,) * 2, ALL16, EVERY_LAYER | {"limit_gib": 14.2}),
    # limit_gib is what `qlora train --vram` of one GiB more leaves the allocator; waiting, the share of the optimizer's state
    # on the host that it then plans.
    "qwen3-moe-free-experts": ("qwen3-30b-a3b", (2048,) * 2, EXPERTS16, RESIDENT | {"waiting": 0.0}),
    "qwen3-moe-least-experts": (
        "qwen3-30b-a3b",
        (2048,) * 2,
        EXPERTS16,
        {"compile": True, "limit_gib": 21.7, "waiting": 0.875},
    ),
    "gpt-oss-least-experts": (
        "gpt-oss-20b",
        (2048,) * 2,
        EXPERTS16,
        {"compile": True, "limit_gib": 14.35, "waiting": 0.0},
    ),
    "qwen3-moe-gsm8k-experts": ("qwen3-30b-a3b", "gsm8k", EXPERTS16, RESIDENT | {"waiting": 0.0}),
    "qwen3-moe-quarter-free-experts": ("qwen3-30b-a3b-quarter", (2048,) * 2, EXPERTS16, RESIDENT | {"waiting": 0.0}),
    "qwen3-moe-quarter-gsm8k-experts": ("qwen3-30b-a3b-quarter", "gsm8k", EXPERTS16, RESIDENT | {"waiting": 0.0}),
    "gpt-oss-free-experts": ("gpt-oss-20b", (2048,) * 2, EXPERTS16, RESIDENT | {"waiting": 0.0}),
    "tiny-moe-experts": ("tiny-moe", (100, 28), EXPERTS16, FREE | {"waiting": 0.5}),
    "llama-free-8rows": ("llama-7b", (2048,) * 8, ALL16, RESIDENT),
    "llama3-long": ("llama3-8b", (4096,) * 2, ALL16, RESIDENT),
    "llama3-least": ("llama3-8b", (2048,) * 2, ALL16, {"compile": True, "limit_gib": 7.1}),
    "qwen3-free": ("qwen3-8b", (2048,) * 2, ALL64, RESIDENT),
    "mistral-long": ("mistral-7b", (8192,), ALL16, RESIDENT),
    "neox-free": ("neox-20b", (2048,) * 4, QKV8, RESIDENT),
    "tiny": ("tiny-llama", (100, 28), ALL16, FREE),
}
# Any run with `-fp8` behind its name, multiplied in 8 bits.
RUNS |= {f"{name}-fp8": (*run[:3], run[3] | {"matmul": "fp8"}) for name, run in RUNS.items()}
RUNS["qwen3-moe-least-experts-fp8"][3]["waiting"] = 0.625  # codes leave the card room for more of the state
KINDS = {
    "to 8 bits": ("_quantise_rows", "_unpack"),
    "expert adapters": ("_project_rows", "_outer_rows", "_add_rows", "_turn_matrices"),
    "experts": ("_multiply_", "grouped", "groupproblem", "_expand", "_join", "_gate", "_count", "_place", "_dots"),
    "attention": ("flash", "fmha", "cudnn", "attention", "sdpa", "_attend", "_of_keys", "_of_queries"),
    "GEMM": ("gemm", "cutlass", "nvjet", "xmma", "cublas", "splitk"),
    "dequantise": ("_dequantize",),
    "loss": ("_loss_and_gradient",),
    "dropout": ("_drop",),
    "compiled": ("triton_",),
    "copies": ("memcpy", "memset", "copy"),
    "optimizer": ("adam", "multi_tensor"),
}


def lengths_of(kind, generator) -> list[int]:
    """Row lengths of one step: given, packs of GSM8K-like rows (110-330 tokens), or 8 quotes (12-80 tokens)."""
    if kind == "quotes":
        return [int(n) for n in generator.integers(12, 81, 8)]
    if kind != "gsm8k":
        return list(kind)
    lengths: list[int] = []
    while True:
        n = int(min(500, max(60, generator.lognormal(5.1, 0.35))))
        if sum(lengths) + n > 4096:
            return lengths
        lengths.append(n)


def run(name: str, steps: int, warm: int, profile: bool, device: str) -> dict:
    """Trains one configuration and returns its figures."""
    if "limit_gib" in RUNS[name][3]:
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    import numpy as np
    import torch

    from qlora_cli.core.adapters.lora import attach_adapter
    from qlora_cli.core.data.packing import collate
    from qlora_cli.core.device import limit_memory
    from qlora_cli.core.engine import fast as engine_fast
    from qlora_cli.core.engine.cuda_graphs import bucket
    from qlora_cli.core.engine.engine import install_engine
    from qlora_cli.core.training.flat_parameters import TrainableParameters
    from qlora_cli.core.training.optimizer import (
        allocated_state_bytes,
        build_optimizer,
        set_learning_rate,
        step_optimizer,
    )
    from qlora_cli.settings.groups import LoraSettings, StepSettings

    architecture, rows, adapter, options = RUNS[name]
    cuda = device == "cuda"
    options = dict(options)
    started = time.time()
    if options.pop("cudnn", True) is False:
        engine_fast.takes_equal_rows = lambda *_: False
    if options.pop("graphs", True) is False:
        engine_fast.GRAPHS_PAY_STEPS = 10**9
    if options.pop("experts", True) is False:
        engine_fast.fuse_experts = lambda *_: lambda: None
    limit_gib, waiting = options.pop("limit_gib", None), options.pop("waiting", None)
    base = build(architecture, device)
    if limit_gib and cuda:
        torch.cuda.empty_cache()
        limit_memory(torch.device(device), int(limit_gib * 2**30))
    model = attach_adapter(base, LoraSettings(alpha=32, **adapter)).train()
    if cuda:
        torch.cuda.empty_cache()
    result: dict = {"run": name, "options": dict(options), "build_s": time.time() - started}
    result["base_gib"] = torch.cuda.memory_allocated() / 2**30 if cuda else 0
    generator = np.random.default_rng(0)
    batches = []
    for _ in range(steps):
        lengths = lengths_of(rows, generator)
        ids = [(generator.integers(5, 1000, n).astype(np.int32), np.ones(n, dtype=bool)) for n in lengths]
        batches.append(collate(ids, range(len(ids))))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    parameters = TrainableParameters(model) if waiting is None else None  # as in a run, after the engine
    started = time.time()
    engine = install_engine(
        model,
        StepSettings(**options),
        device=torch.device(device),
        compute_dtype=torch.bfloat16,
        max_tokens=max(b.tokens for b in batches),
        total_steps=100,
        optimizer_bytes=12 * trained if parameters else allocated_state_bytes("paged_adamw_8bit", trained, waiting),
        report=lambda event: print("   ", event.text, flush=True),
    )
    result["install_s"] = time.time() - started
    result["engine"] = engine.describe()
    print("   ", result["engine"], flush=True)
    if engine.planner is not None:
        print("   ", engine.planner.needs, f"{engine.planner.available_bytes / 2**30:.2f} GiB left", flush=True)
    if parameters is None:
        parameters = TrainableParameters(model)
        waits = {"on_host": lambda event: print("   ", event.text, flush=True), "waiting_share": waiting}
        optimizer = build_optimizer("paged_adamw_8bit", parameters, weight_decay=0.0, **(waits if waiting else {}))
        set_learning_rate(optimizer, 1e-4)
    else:
        optimizer = torch.optim.AdamW([b.values for b in parameters.buffers], lr=1e-4, fused=cuda)
    if cuda:
        torch.cuda.reset_peak_memory_stats()

    def update() -> None:
        optimizer.step() if waiting is None else step_optimizer(optimizer)

    def step(batch) -> torch.Tensor:
        while True:
            parameters.zero_gradients()
            try:
                loss = engine.loss(replace(batch.pin() if cuda else batch, opens_step=True))
                (loss / batch.trained_tokens).backward()
                break
            except torch.OutOfMemoryError as error:
                print("   ", str(error).splitlines()[0][:400], flush=True)
                loss = None
            if not engine.reduce_memory():
                raise MemoryError("no leaner plan")
        update()
        return loss.detach() / batch.trained_tokens

    def wait() -> None:
        if cuda:
            torch.cuda.synchronize()

    started = time.time()
    # Lengths that vary: every shape is met once before, as it is after a few dozen steps of a run.
    losses = [step(batch) for batch in (batches[:1] + batches if isinstance(rows, str) else (batches * warm)[:warm])]
    wait()
    result["warm_s"] = time.time() - started
    for batch in batches[:2]:
        step(batch)
    wait()
    started = time.time()
    hosts = []
    for batch in batches:
        before = time.time()
        losses.append(step(batch))
        hosts.append(time.time() - before)
    wait()
    seconds = time.time() - started
    plans = {batch.tokens: engine.plan_by_tokens(bucket(batch.tokens), engine.lends) for batch in batches}
    result["plans"] = {tokens: [plan.recomputed, plan.sent, plan.lent] for tokens, plan in sorted(plans.items())}
    result["step_ms"] = seconds / steps * 1e3
    result["host_ms"] = sorted(hosts)[len(hosts) // 2] * 1e3
    result["tok_s"] = sum(b.tokens for b in batches) / seconds
    result["losses"] = [float(losses[0]), float(losses[-1])]
    if cuda:
        result["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        result["reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
    if profile and cuda:
        result |= profile_of(step, batches[-2:])
    if waiting is not None and cuda:
        result["moments"] = moments_of(engine, parameters, update, batches[0])
    engine.close()
    return result


def moments_of(engine, parameters, update, batch) -> dict[str, list[float]]:
    """(seconds, GiB at its end, GiB at most) of the parts of one step that is taken part by part."""
    import torch

    found, losses = {}, []

    def run_pass() -> None:
        losses.append(engine.loss(replace(batch.pin(), opens_step=True)) / batch.trained_tokens)

    parts = {
        "zero": parameters.zero_gradients,
        "forward": run_pass,
        "backward": lambda: losses.pop().backward(),
        "norm": lambda: parameters.gradient_norm().item(),
        "update": update,
    }
    for name, part in parts.items():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        started = time.time()
        part()
        torch.cuda.synchronize()
        at_end, most = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
        found[name] = [round(time.time() - started, 4), round(at_end / 2**30, 3), round(most / 2**30, 3)]
    return found


def profile_of(step, batches) -> dict:
    """GPU milliseconds a step by kind of kernel, and the longest kernels."""
    import torch
    from torch.profiler import ProfilerActivity

    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for batch in batches:
            step(batch)
        torch.cuda.synchronize()
    kinds: dict[str, float] = {}
    kernels = []
    for event in profiler.key_averages():
        ms = event.self_device_time_total / 1e3 / len(batches)
        if ms == 0:
            continue
        lower = event.key.lower()
        kind = next((k for k, marks in KINDS.items() if any(mark in lower for mark in marks)), "other")
        kinds[kind] = kinds.get(kind, 0) + ms
        kernels.append((ms, event.count // len(batches), event.key[:100]))
    kernels.sort(reverse=True)
    return {
        "gpu_ms": {k: round(v, 2) for k, v in sorted(kinds.items(), key=lambda item: -item[1])},
        "kernels": [[round(ms, 2), count, key] for ms, count, key in kernels[:60]],
        "launches": sum(count for _, count, _ in kernels),
    }


def run_apart(name: str, command: list[str], limit_s: float) -> dict:
    """One configuration in a process of its own, whose output is passed on as it comes: its figures, or what went wrong."""
    print(name, flush=True)
    started, found, last = time.time(), "", [""]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        timer = threading.Timer(limit_s, process.kill)
        timer.start()
        for line in process.stdout or ():
            if line.startswith("RESULT "):
                found = line.removeprefix("RESULT ")
            else:
                print(line, end="", flush=True)
                last = [*last, line.strip()][-8:]
        timer.cancel()
    total_s = time.time() - started
    if found:
        result = json.loads(found)
    else:
        late = f"longer than {limit_s} s; " if total_s >= limit_s else ""
        result = {"run": name, "error": late + " | ".join(last)[-800:]}
    for ms, count, key in result.get("kernels", [])[:30]:
        print(f"    {ms:9.2f} ms {count:6d} x {key}")
    print("   ", {k: v for k, v in result.items() if k not in ("kernels", "engine")}, flush=True)
    return result | {"total_s": total_s}


def main() -> None:
    """Runs the chosen configurations one after another and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="append", choices=RUNS)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warm", type=int, default=4)
    parser.add_argument("--limit-s", type=int, default=240)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path, default=Path("step_engine.json"))
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        result = run(arguments.inside, arguments.steps, arguments.warm, arguments.profile, arguments.device)
        print("RESULT " + json.dumps(result), flush=True)
        return
    flags = ["--steps", arguments.steps, "--warm", arguments.warm, "--device", arguments.device]
    flags += ["--profile"] if arguments.profile else []
    results = []
    for name in arguments.run or [n for n in RUNS if n not in ("tiny", "tiny-fp8")]:
        command = [sys.executable, __file__, "--inside", name, *map(str, flags)]
        results.append(run_apart(name, command, arguments.limit_s))
        arguments.json.write_text(json.dumps(results, indent=1))
    print(f"\n{'run':<20}{'tok/s':>10}{'step ms':>10}{'host ms':>10}{'gpu ms':>10}{'peak GiB':>10}")
    for result in results:
        if "error" in result:
            print(f"{result['run']:<20} FAILED {(result['error'].splitlines() or [''])[-1][:90]}")
            continue
        gpu = sum(result.get("gpu_ms", {}).values())
        figures = (result["tok_s"], result["step_ms"], result["host_ms"], gpu, result.get("peak_gib", 0))
        print(f"{result['run']:<20}" + "".join(f"{figure:>10.1f}" for figure in figures))


if __name__ == "__main__":
    main()
