"""Predicted against measured peak memory of training steps, and the same steps under a cap of the prediction + 3 %.

    python benchmarks/memory_prediction.py --json memory.json --table benchmarks/memory.md

Each architecture is a process of its own: a random base is built and quantised on the card, the real engine and
optimizer train a few steps of rows of 2,048 random ids in each setting, and `torch.cuda.max_memory_allocated` is
compared with what `qlora inspect` says from the configuration alone. The cap is set as `qlora train --vram` sets it: on
all that PyTorch's allocator reserves, in segments that can grow. In the setting "planned" the engine itself decides how
to keep within a limit, and what the planner predicted for that limit is compared. On the CPU nothing is measured; it
shows that the steps run (--architecture tiny-llama --row-tokens 128).
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.models import ALL16, QKV8, QKV16, build

ADAPTERS = {"llama-7b": ALL16, "neox-20b": QKV8, "pythia-410m": ALL16, "falcon-7b": QKV16, "tiny-llama": ALL16}
ADAPTERS |= {"qwen3-30b-a3b": ALL16, "gpt-oss-20b": ALL16, "mixtral-8x7b": ALL16}
KEPT = {"gradient_checkpointing": "off", "offload_activations": False, "offload_embeddings": False}
RECOMPUTED = KEPT | {"gradient_checkpointing": "on"}
OFFLOADED = {"gradient_checkpointing": "on", "offload_activations": True, "offload_embeddings": True}
# setting → (rows of 2,048 tokens in a micro-batch, engine options, steps the engine is told of: from 8 on it makes graphs)
SETTINGS = {
    "recomputed, one row": (1, RECOMPUTED | {"compile": False}, 4),
    "recomputed, two rows": (2, RECOMPUTED | {"compile": False}, 4),
    "kept": (2, KEPT | {"compile": False}, 4),
    "recomputed": (4, RECOMPUTED | {"compile": False}, 4),
    "offloaded": (2, OFFLOADED | {"compile": False}, 4),
    "planned": (2, {"compile": False}, 4),
    "kept, graphs": (2, KEPT | {"compile": False}, 100),
    "kept, compiled": (2, KEPT | {"compile": True}, 4),
    "offloaded, compiled": (1, OFFLOADED | {"compile": True}, 4),
}
MAIN = ("kept", "recomputed", "offloaded")
# Of the card, for "planned": less than keeping everything takes, more than the least.
LIMITS_GIB = {"llama-7b": 14, "neox-20b": 18, "pythia-410m": 3.5, "falcon-7b": 9, "tiny-llama": 1.5}
ROW_TOKENS = 2048
STEPS = 4
LEAST_SECONDS = 10  # that an architecture takes
CAP = 1.03
OPTIMIZER = "paged_adamw_8bit"


def predict(name: str, rows: int, row_tokens: int, options: dict, on_cuda: bool, limit_bytes: int | None = None):
    """What `qlora inspect` says; with a limit, of what was left open as it decides."""
    import torch
    from support.models import make_config

    from qlora_cli.core.planning.model_profile import profile_model
    from qlora_cli.core.planning.planner import RowLengths, plan_training
    from qlora_cli.settings.groups import LoraSettings, QuantizationSettings, StepSettings

    lora = LoraSettings(alpha=32, **ADAPTERS[name])
    profile = profile_model(make_config(name), lora, QuantizationSettings(), compute_dtype=torch.bfloat16)
    settings = StepSettings(batch_size=rows, optimizer=OPTIMIZER, resident_weights=False, **options)
    return plan_training(profile, settings, RowLengths(row_tokens), vram_bytes=limit_bytes, on_cuda=on_cuda)


def measure(name: str, settings: list[str], row_tokens: int, device_name: str) -> None:
    """Trains one architecture in every setting; prints one JSON line each."""
    import torch

    from qlora_cli.core.adapters.lora import attach_adapter
    from qlora_cli.core.device import limit_memory
    from qlora_cli.core.training.flat_parameters import TrainableParameters
    from qlora_cli.settings.groups import LoraSettings

    device = torch.device(device_name)
    cuda = device.type == "cuda"
    if cuda:
        limit_memory(device, torch.cuda.get_device_properties(device).total_memory)  # before the first allocation
    started = time.time()
    model = attach_adapter(build(name, device_name), LoraSettings(alpha=32, **ADAPTERS[name])).train()
    parameters = TrainableParameters(model)
    loaded_bytes = torch.cuda.memory_allocated() if cuda else None
    print(
        json.dumps({"architecture": name, "loaded_bytes": loaded_bytes, "build_s": time.time() - started}), flush=True
    )
    for setting in settings:
        rows, options, told_steps = SETTINGS[setting]
        result: dict = {"architecture": name, "setting": setting, "rows": rows}
        limit_bytes = int(LIMITS_GIB[name] * 2**30) if setting == "planned" else None
        try:
            plan = predict(name, rows, row_tokens, options, cuda, limit_bytes)
            predicted = plan.memory
            result |= {
                "limit_bytes": limit_bytes,
                "recomputed_layers": plan.measures.recomputed,
                "token_budget": plan.token_budget,
                "predicted_bytes": predicted.peak_bytes,
                "predicted": predicted.to_dict(),
            }
            result |= measure_setting(
                model, parameters, plan.token_budget // row_tokens, row_tokens, options, told_steps, plan, device
            )
        except Exception as error:  # the other settings are still of interest
            result["error"] = f"{type(error).__name__}: {str(error)[:500]}"
        print(json.dumps(result), flush=True)


def measure_setting(
    model, parameters, rows: int, row_tokens: int, options: dict, told_steps: int, plan, device
) -> dict:
    """Peak of a few steps, and whether they run again under caps: the allocator's, and that of the whole card."""
    import gc

    import torch

    from qlora_cli.core.device import CONTEXT_BYTES, limit_memory
    from qlora_cli.core.engine.engine import install_engine
    from qlora_cli.core.training.optimizer import build_optimizer, set_learning_rate, state_bytes, step_optimizer
    from qlora_cli.settings.groups import StepSettings

    cuda = device.type == "cuda"
    notices: list = []
    if cuda and plan.vram_bytes:
        limit_memory(device, plan.vram_bytes - CONTEXT_BYTES)
    engine = install_engine(
        model,
        StepSettings(resident_weights=False, **options),
        device=device,
        compute_dtype=torch.bfloat16,
        max_tokens=rows * row_tokens,
        total_steps=told_steps,
        optimizer_bytes=state_bytes(OPTIMIZER, parameters.elements),
        report=notices.append,
    )
    optimizer = build_optimizer(OPTIMIZER, parameters, weight_decay=0.0)
    set_learning_rate(optimizer, 1e-4)

    def train() -> None:
        for number in range(STEPS):
            batch = make_batch(model, rows, row_tokens, number)
            engine.loss(batch).backward()
            parameters.gradient_norm()
            step_optimizer(optimizer)
            parameters.zero_gradients()

    def clear() -> None:
        gc.collect()
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    result: dict = {"engine": engine.describe(), "notices": [notice.text for notice in notices]}
    try:
        clear()
        if not cuda:
            train()
            return result
        train()
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        result |= {
            "measured_bytes": torch.cuda.max_memory_allocated(),
            "reserved_bytes": torch.cuda.max_memory_reserved(),
            "outside_allocator_bytes": total - free - torch.cuda.memory_reserved(),
        }
        result["error_percent"] = round(100 * (plan.memory.peak_bytes / result["measured_bytes"] - 1), 2)
        # Of what PyTorch reserves; and of the card, of which `qlora train --vram` leaves the rest to CUDA's context.
        caps = {"allocator": CAP * plan.memory.peak_bytes, "card": CAP * plan.memory.device_bytes - CONTEXT_BYTES}
        for cap, cap_bytes in caps.items():
            clear()
            limit_memory(device, int(cap_bytes))
            try:
                train()
                torch.cuda.synchronize()
                result[f"runs_under_{cap}_cap"] = True
            except torch.OutOfMemoryError as error:
                result |= {f"runs_under_{cap}_cap": False, f"{cap}_cap_error": str(error)[:600]}
            parameters.zero_gradients()
            result[f"reserved_under_{cap}_cap_bytes"] = torch.cuda.max_memory_reserved()
    finally:
        if cuda:
            torch.cuda.set_per_process_memory_fraction(1.0)
        engine.close()
        parameters.zero_gradients()
        clear()
    return result


def make_batch(model, rows: int, row_tokens: int, seed: int):
    """A micro-batch of random ids, every token trained."""
    import numpy as np

    from qlora_cli.core.data.packing import collate

    random = np.random.default_rng(seed)
    vocabulary = model.get_base_model().get_input_embeddings().weight.shape[0]
    ids = [random.integers(5, vocabulary, row_tokens).astype(np.int32) for _ in range(rows)]
    batch = collate([(row, np.ones(row_tokens, dtype=bool)) for row in ids], range(rows))
    return batch.pin() if next(model.parameters()).is_cuda else batch


def write_table(results: list[dict], path: Path, device: str) -> None:
    """The results as the table between the markers of a Markdown file."""
    lines = [
        "",
        f"{device}; rows of {ROW_TOKENS} tokens, bf16, NF4 with double quantisation, {OPTIMIZER}.",
        "",
        "| model | setting | rows | predicted GiB | measured GiB | error | reserved GiB | runs at prediction + 3 % |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        if "measured_bytes" not in r:
            lines += [f"| {r['architecture']} | {r['setting']} | {r['rows']} | – | – | {r.get('error', '')} | – | – |"]
            continue
        predicted, measured, reserved = (
            f"{r[key] / 2**30:.2f}" for key in ("predicted_bytes", "measured_bytes", "reserved_bytes")
        )
        runs = " / ".join("yes" if r.get(f"runs_under_{cap}_cap") else "no" for cap in ("allocator", "card"))
        limit = f" {r['limit_bytes'] / 2**30:g} GiB" if r["limit_bytes"] else ""
        head = f"| {r['architecture']} | {r['setting']}{limit} | {r['rows']} "
        lines.append(f"{head}| {predicted} | {measured} | {r['error_percent']:+.1f} % | {reserved} | {runs} |")
    start, end = "<!-- results -->", "<!-- end of results -->"
    before, _, rest = path.read_text(encoding="utf-8").partition(start)
    after = rest.partition(end)[2]
    path.write_text("\n".join([before + start, *lines, "", end + after]), encoding="utf-8")


def run_child(command: list[str], timeout: float, results: list[dict], write: Callable[[], None]) -> str:
    """Runs one architecture and takes over its lines as they come; returns what went wrong, if anything did."""
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        timer = threading.Timer(timeout, process.kill)
        timer.start()
        assert process.stdout is not None
        for line in process.stdout:
            if not line.startswith("{"):
                continue
            content = json.loads(line)
            if "setting" in content:
                results.append(content)
                write()
            print(json.dumps({key: value for key, value in content.items() if key != "predicted"}), flush=True)
        timer.cancel()
        log.seek(0)
        return "" if process.wait() == 0 else log.read()[-2000:] or "it took too long"


def main() -> None:
    """Runs every architecture in a process of its own and gathers the lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", action="append", choices=list(ADAPTERS))
    parser.add_argument("--setting", action="append", choices=list(SETTINGS))
    parser.add_argument("--row-tokens", type=int, default=ROW_TOKENS)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--table", type=Path, help="Markdown file with the markers of a results table.")
    parser.add_argument("--timeout", type=float, default=1200, help="Seconds in all.")
    parser.add_argument("--device", default=None)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    settings = arguments.setting or list(SETTINGS)
    import torch

    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.child:
        measure(arguments.child, settings, arguments.row_tokens, device)
        return
    card = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    results: list[dict] = []

    def write() -> None:
        if arguments.json:
            content = {"device": card, "torch": torch.__version__, "results": results}
            arguments.json.write_text(json.dumps(content, indent=1), encoding="utf-8")
        if arguments.table:
            write_table(results, arguments.table, f"{card}, torch {torch.__version__}")

    names = arguments.architecture or [name for name in ADAPTERS if not name.startswith("tiny")]
    ends = time.time() + arguments.timeout
    # What has to be shown first.
    for part in ([name for name in settings if name in MAIN], [name for name in settings if name not in MAIN]):
        for name in names if part else ():
            command = [sys.executable, __file__, "--child", name, "--device", device]
            command += ["--row-tokens", str(arguments.row_tokens)]
            command += [word for setting in part for word in ("--setting", setting)]
            if ends - time.time() < LEAST_SECONDS:
                print(f"{name}, {', '.join(part)}: left out, the time is up", file=sys.stderr, flush=True)
                continue
            if log := run_child(command, ends - time.time(), results, write):
                print(f"{name}: {log}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
