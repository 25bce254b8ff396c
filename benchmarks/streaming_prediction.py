"""Predicted against measured memory and speed of bases that stream: ten settings, one after another in one process.

    python benchmarks/streaming_prediction.py --json prediction.json
    python benchmarks/streaming_prediction.py --plans              # what is predicted, without a card
    python benchmarks/streaming_prediction.py --planned plans      # which is kept in that file, or taken from it

Models are those of `streaming.py` with fewer layers of the real size. Memory is predicted by the planner from the
configuration alone, and what it planned is what runs; speed by the engine before the first step, from one layer and the
link, as its notice says it. Measured are the peak of PyTorch's allocator and the median step.
"""

import argparse
import gc
import json
import pickle
import time
from pathlib import Path

from streaming import GIB, Bench, Setting, plan_of
from support.models import ALL16, QKV8

ON, OFF = {"gradient_checkpointing": "on"}, {"gradient_checkpointing": "off"}
AWAY = ON | {"offload_activations": True, "offload_embeddings": True}
KEPT = {"offload_activations": False, "offload_embeddings": False}
# (what is trained, how the step is asked to be); without a limit every layer streams, within one as many as are planned.
SETTINGS = {
    "all layers, recomputed": (Setting("llama-70b-tenth", ALL16, None, 4, 2048), ON | KEPT),
    "few tokens": (Setting("llama-70b-tenth", ALL16, None, 1, 1024), ON | KEPT),
    "hidden states away": (Setting("llama-70b-tenth", ALL16, None, 4, 2048), AWAY),
    "within 5.5 GiB": (Setting("llama-70b-tenth", ALL16, 5.5, 2, 2048), {}),
    "one linear": (Setting("neox-20b-quarter", QKV8, None, 2, 2048), ON | KEPT),
    "some recomputed": (Setting("neox-20b-quarter", QKV8, None, 2, 2048), {"gradient_checkpointing": "6"} | KEPT),
    "nothing recomputed": (Setting("llama-7b-half", ALL16, None, 2, 2048), OFF | KEPT),
    "experts": (Setting("qwen3-30b-a3b-quarter", ALL16, None, 4, 2048), ON | KEPT),
    "large experts": (Setting("mixtral-8x7b-eighth", ALL16, None, 4, 2048), ON | KEPT),
    "tied embeddings": (Setting("gemma2-9b-quarter", ALL16, None, 4, 1024), ON | KEPT),
}
TINY = {"tiny": (Setting("tiny-llama", ALL16, None, 4, 64), ON | KEPT)}
COLUMNS = ("streamed", "tokens", "predicted_gib", "measured_gib", "memory_percent")
COLUMNS += ("predicted_tok_s", "measured_tok_s", "speed_percent", "took_s", "error")


def planned(setting: Setting, asked: dict):
    """The decision of the planner."""
    return plan_of(
        setting,
        False,
        matmul="bf16",
        resident_weights=False,
        **asked,
        **({} if setting.limit_gib else {"stream": True}),
    )


def run(setting: Setting, plan, device: str) -> dict:
    """One setting: what was predicted and what came."""
    import torch

    from qlora_cli.core.device import limit_memory
    from qlora_cli.core.engine.decoder_layers import find_layers
    from qlora_cli.core.models.structure import find_decoder
    from qlora_cli.core.planning.memory_estimate import CONTEXT_BYTES
    from qlora_cli.core.streaming.streamed_base import stream_base

    started, cuda = time.time(), device == "cuda"
    if cuda:
        limit_memory(torch.device(device), torch.cuda.get_device_properties(0).total_memory)
    bench = Bench(setting, device, 5, False)
    layers = find_layers(find_decoder(bench.base))
    streamed = stream_base(bench.base, layers, bench.device, streamed=plan.measures.streamed)
    if cuda and setting.limit_gib:
        torch.cuda.empty_cache()
        limit_memory(bench.device, int(setting.limit_gib * GIB) - CONTEXT_BYTES)
    chosen = {name: value for name, value in plan.settings.items() if name not in ("optimizer", "resident_weights")}
    if not cuda:
        chosen |= {"offload_activations": False, "offload_embeddings": False}
    engine = bench.install(plan.token_budget, **chosen)
    measured = bench.train(engine, plan.token_budget)
    engine.close()
    predicted_gib = plan.memory.peak_bytes / GIB
    result = {
        "architecture": setting.architecture,
        "streamed": f"{streamed.streamed} of {streamed.layers}",
        "tokens": plan.token_budget,
        "predicted_gib": round(predicted_gib, 3),
        "measured_gib": round(measured["peak_gib"], 3),
        "predicted_tok_s": round(measured["predicted_tok_s"] or 0),
        "measured_tok_s": round(measured["tok_s"]),
        "engine": measured["engine"],
        "step_s": measured["step_s"],
        "issued_s": measured["issued_s"],
        "took_s": round(time.time() - started, 1),
    }
    if cuda:
        result["memory_percent"] = round(100 * (predicted_gib / measured["peak_gib"] - 1), 2)
        result["speed_percent"] = round(100 * (measured["predicted_tok_s"] / measured["tok_s"] - 1), 2)
        result["needs"] = {k: str(v) for k, v in vars(engine.planner.needs).items()}
    return result


def main() -> None:
    """Runs the settings and prints a line of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", action="append", choices=[*SETTINGS, *TINY])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--limit-s", type=float, default=150, help="begins no setting after that")
    parser.add_argument("--plans", action="store_true", help="only says what is predicted")
    parser.add_argument("--planned", type=Path, default=Path("streaming_plans.pickle"))
    parser.add_argument("--json", type=Path, default=Path("streaming_prediction.json"))
    arguments = parser.parse_args()
    names, results = arguments.setting or list(SETTINGS), []
    plans = pickle.loads(arguments.planned.read_bytes()) if arguments.planned.is_file() else {}
    for name in names:
        if name not in plans:
            plans[name] = planned(*(SETTINGS | TINY)[name])
            arguments.planned.write_bytes(pickle.dumps(plans))
        if arguments.plans:
            print(
                f"{name}: {plans[name].measures.streamed} layers, {plans[name].token_budget} tokens, {plans[name].measures}"
            )
            memory = plans[name].memory
            print(f"    {memory.peak_bytes / GIB:.2f} GiB of the allocator, {memory.moment}", flush=True)
    started = time.time()
    for name in () if arguments.plans else names:
        if time.time() - started > arguments.limit_s:
            print(f"| {name} | no time left", flush=True)
            continue
        try:
            results.append({"setting": name, **run((SETTINGS | TINY)[name][0], plans[name], arguments.device)})
        except Exception as error:  # the other settings are still of interest
            results.append({"setting": name, "error": f"{type(error).__name__}: {str(error)[:500]}"})
            error.__traceback__ = None
        gc.collect()
        arguments.json.write_text(json.dumps(results, indent=1))
        print("   ", {k: v for k, v in results[-1].items() if k not in COLUMNS}, flush=True)
        print("|", name, "|", *(f"{results[-1].get(column, '')} |" for column in COLUMNS), flush=True)


if __name__ == "__main__":
    main()
