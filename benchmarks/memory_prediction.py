"""Predicted against measured peak memory of training steps, and the same steps under a cap of the prediction + 3 %.

    python benchmarks/memory_prediction.py --json memory.json --table benchmarks/memory.md

Each architecture is a process of its own: a random base is built and quantised on the card, the real engine and
optimizer train a few steps of rows of 2,048 random ids in each setting, and `torch.cuda.max_memory_allocated` is
compared with what `qlora inspect` says from the configuration alone. On the CPU nothing is measured; it shows that the
steps run (--architecture tiny-llama --row-tokens 128).
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from step_engine import ALL16, QKV8, QKV16, build

ADAPTERS = {"llama-7b": ALL16, "neox-20b": QKV8, "pythia-410m": ALL16, "falcon-7b": QKV16, "tiny-llama": ALL16}
KEPT = {"gradient_checkpointing": "off", "offload_activations": False, "offload_embeddings": False}
RECOMPUTED = KEPT | {"gradient_checkpointing": "on"}
OFFLOADED = {"gradient_checkpointing": "on", "offload_activations": True, "offload_embeddings": True}
# setting → (rows of 2,048 tokens in a micro-batch, engine options, steps the engine is told of: from 8 on it makes graphs)
SETTINGS = {
    "kept": (2, KEPT | {"compile": False}, 4),
    "recomputed": (4, RECOMPUTED | {"compile": False}, 4),
    "offloaded": (2, OFFLOADED | {"compile": False}, 4),
    "kept, graphs": (2, KEPT | {"compile": False}, 100),
    "kept, compiled": (2, KEPT | {"compile": True}, 4),
    "offloaded, compiled": (1, OFFLOADED | {"compile": True}, 4),
}
ROW_TOKENS = 2048
STEPS = 4
CAP = 1.03
OPTIMIZER = "paged_adamw_8bit"


def predict(name: str, rows: int, row_tokens: int, options: dict, on_cuda: bool):
    """What `qlora inspect` says."""
    import torch
    from models import make_config

    from qlora_cli.core.engine import count_recomputed_layers
    from qlora_cli.core.model_facts import gather_facts
    from qlora_cli.core.prediction import StepSettings, predict_training

    adapter = {"dropout": 0.0, "target_modules": None} | ADAPTERS[name]
    facts = gather_facts(
        make_config(name),
        alpha=32,
        rslora=False,
        dora=False,
        modules_to_save=None,
        quant_type="nf4",
        double_quant=True,
        compute_dtype=torch.bfloat16,
        engine="fast",
        **adapter,
    )
    recomputed = count_recomputed_layers(options["gradient_checkpointing"], facts.layers)
    assert recomputed is not None
    step = StepSettings(
        tokens=rows * row_tokens,
        row_tokens=row_tokens,
        engine="fast",
        optimizer=OPTIMIZER,
        recomputed_layers=recomputed,
        offload_activations=options["offload_activations"],
        offload_embeddings=options["offload_embeddings"] and facts.embedding_bytes > 0,
        resident_weights=False,
        compiled=options["compile"],
        on_cuda=on_cuda,
    )
    return predict_training(facts, step)


def measure(name: str, settings: list[str], row_tokens: int, device_name: str) -> None:
    """Trains one architecture in every setting; prints one JSON line each."""
    import torch

    from qlora_cli.core.adapter import attach_adapter
    from qlora_cli.core.parameters import TrainableParameters

    device = torch.device(device_name)
    cuda = device.type == "cuda"
    started = time.time()
    model = attach_adapter(build(name, device_name), alpha=32, **ADAPTERS[name]).train()
    parameters = TrainableParameters(model)
    loaded_bytes = torch.cuda.memory_allocated() if cuda else None
    print(
        json.dumps({"architecture": name, "loaded_bytes": loaded_bytes, "build_s": time.time() - started}), flush=True
    )
    for setting in settings:
        rows, options, told_steps = SETTINGS[setting]
        result: dict = {"architecture": name, "setting": setting, "rows": rows}
        try:
            predicted = predict(name, rows, row_tokens, options, cuda)
            result |= {"predicted_bytes": predicted.peak_bytes, "predicted": predicted.to_dict()}
            result |= measure_setting(
                model, parameters, rows, row_tokens, options, told_steps, predicted.peak_bytes, device
            )
        except Exception as error:  # the other settings are still of interest
            result["error"] = f"{type(error).__name__}: {str(error)[:500]}"
        print(json.dumps(result), flush=True)


def measure_setting(
    model, parameters, rows: int, row_tokens: int, options: dict, told_steps: int, predicted_bytes: int, device
) -> dict:
    """Peak of a few steps, and whether they run again under the cap."""
    import gc

    import torch

    from qlora_cli.core.engine import install_engine
    from qlora_cli.core.optimizer import build_optimizer, set_learning_rate, step_optimizer

    cuda = device.type == "cuda"
    notices: list = []
    engine = install_engine(
        model,
        kind="fast",
        device=device,
        compute_dtype=torch.bfloat16,
        resident_weights=False,
        max_tokens=rows * row_tokens,
        total_steps=told_steps,
        report=notices.append,
        **options,
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
        result["error_percent"] = round(100 * (predicted_bytes / result["measured_bytes"] - 1), 2)
        clear()
        torch.cuda.set_per_process_memory_fraction(CAP * predicted_bytes / total)
        try:
            train()
            torch.cuda.synchronize()
            result["runs_under_cap"] = True
        except torch.OutOfMemoryError as error:
            result |= {"runs_under_cap": False, "cap_error": str(error)[:400]}
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

    from qlora_cli.core.packing import collate

    random = np.random.default_rng(seed)
    vocabulary = model.get_base_model().get_input_embeddings().weight.shape[0]
    ids = [random.integers(5, vocabulary, row_tokens).astype(np.int32) for _ in range(rows)]
    batch = collate([(row, np.ones(row_tokens, dtype=bool)) for row in ids], range(rows))
    return batch.pin() if next(model.parameters()).is_cuda else batch


def write_table(results: list[dict], path: Path, device: str) -> None:
    """The results as the table between the markers of a Markdown file."""
    lines = [
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
        runs = "yes" if r["runs_under_cap"] else "no"
        head = f"| {r['architecture']} | {r['setting']} | {r['rows']} "
        lines.append(f"{head}| {predicted} | {measured} | {r['error_percent']:+.1f} % | {reserved} | {runs} |")
    start, end = "<!-- results -->", "<!-- end of results -->"
    before, _, rest = path.read_text(encoding="utf-8").partition(start)
    after = rest.partition(end)[2]
    path.write_text("\n".join([before + start, *lines, end + after]), encoding="utf-8")


def main() -> None:
    """Runs every architecture in a process of its own and gathers the lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", action="append", choices=list(ADAPTERS))
    parser.add_argument("--setting", action="append", choices=list(SETTINGS))
    parser.add_argument("--row-tokens", type=int, default=ROW_TOKENS)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--table", type=Path, help="Markdown file with the markers of a results table.")
    parser.add_argument("--timeout", type=float, default=240, help="Seconds for one architecture.")
    parser.add_argument("--device", default=None)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    settings = arguments.setting or list(SETTINGS)
    import torch

    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.child:
        measure(arguments.child, settings, arguments.row_tokens, device)
        return
    results = []
    for name in arguments.architecture or [name for name in ADAPTERS if not name.startswith("tiny")]:
        command = [sys.executable, __file__, "--child", name, "--device", device]
        command += ["--row-tokens", str(arguments.row_tokens)]
        command += [word for setting in settings for word in ("--setting", setting)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=arguments.timeout)
            output, log = done.stdout, done.stderr if done.returncode else ""
        except subprocess.TimeoutExpired as late:
            output = late.stdout.decode() if isinstance(late.stdout, bytes) else late.stdout or ""
            log = f"timed out after {arguments.timeout} s"
        lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
        results += [line for line in lines if "setting" in line]
        for line in lines:
            print(json.dumps({key: value for key, value in line.items() if key != "predicted"}), flush=True)
        if log:
            print(f"{name}: {log[-2000:]}", file=sys.stderr, flush=True)
    if arguments.json:
        card = torch.cuda.get_device_name() if device == "cuda" else "CPU"
        content = {"device": card, "torch": torch.__version__, "results": results}
        arguments.json.write_text(json.dumps(content, indent=1), encoding="utf-8")
    if arguments.table:
        card = torch.cuda.get_device_name() if device == "cuda" else "CPU"
        write_table(results, arguments.table, f"{card}, torch {torch.__version__}")


if __name__ == "__main__":
    main()
