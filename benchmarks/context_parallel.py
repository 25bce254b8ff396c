"""What a second card brings on one row that cards share (--context-parallel), against one card on the whole row.

    python benchmarks/context_parallel.py --json context.json                        # two GPUs of one host
    python benchmarks/context_parallel.py --device cpu --model tiny-llama --tokens 600 --layers 2   # to try the script

Each card first trains on the whole row alone, both at once, then both on half of it each: the same random 4-bit base of
fewer layers, adapter, rows and optimizer, so that losses are to be the same but for rounding. A step is forward, backward,
all-reduce of the adapter's gradients and AdamW; every layer is recomputed, as rows of this length ask for on most cards.
The parts named behind --compiled also time one card with compiled layers, which cards that share rows do without.
"""

import argparse
import ctypes
import json
import os
import signal
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.models import ALL16, CONFIGS, build

WARM_TOKENS = 4_096
PR_SET_PDEATHSIG = 1  # of Linux's prctl
EXCHANGES = 5  # timed, of a layer's query, key, value and output


def main() -> None:
    """Starts the ranks, or is one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama3-8b")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=262_144)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--cards", type=int, default=2)
    parser.add_argument("--compiled", action="store_true", help="also one card with compiled layers")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if "RANK" in os.environ:
        run_rank(options)
        return
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(options.cards)]
    os.execv(sys.executable, [sys.executable, *ranks, *sys.argv])  # a signal to this process is one to torchrun


def run_rank(options: argparse.Namespace) -> None:
    """Both ways, and what they came to, on one rank."""
    import torch
    import torch.distributed as dist

    from qlora_cli.core.adapters.lora import attach_adapter
    from qlora_cli.core.distributed.context_group import share_tokens
    from qlora_cli.core.distributed.process_group import ProcessGroup
    from qlora_cli.core.models.structure import find_decoder
    from qlora_cli.core.training.flat_parameters import TrainableParameters
    from qlora_cli.settings.groups import LoraSettings

    cuda = options.device == "cuda"
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a rank ends with torchrun, whatever it computes
    dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    CONFIGS[options.model][1]["num_hidden_layers"] = options.layers
    started = time.perf_counter()
    base = build(options.model, str(device))
    model = attach_adapter(base, LoraSettings(alpha=32, **ALL16)).train()
    parameters = TrainableParameters(model)
    initial = [buffer.values.detach().clone() for buffer in parameters.buffers]
    say = print if dist.get_rank() == 0 else lambda *_, **__: None
    say(f"built in {time.perf_counter() - started:.1f} s", flush=True)
    found: dict = {"options": {name: str(value) for name, value in vars(options).items()}}
    ways = [
        ("one", ProcessGroup(), False),
        ("shared", ProcessGroup(dist.get_rank(), dist.get_world_size(), dist.get_world_size()), False),
    ]
    ways += [("one compiled", ProcessGroup(), True)] if options.compiled else []
    for name, ranks, compiled in ways:
        if ranks.context > 1:
            share_tokens(base, find_decoder(base), ranks, device)
        for buffer, values in zip(parameters.buffers, initial, strict=True):
            buffer.values.data.copy_(values)
        found[name] = train(model, parameters, options, ranks, device, compiled=compiled)
        say(name, json.dumps(found[name]), flush=True)
        if ranks.context > 1:
            found["exchange"] = time_exchange(base, options, device)
            for module in {base, *find_decoder(base).modules()}:
                vars(module).pop("_qlora_context")
            say("exchange", json.dumps(found["exchange"]), flush=True)
        dist.barrier()
        if dist.get_rank() == 0 and options.json:
            options.json.write_text(json.dumps(found, indent=1))
    one, shared = found["one"], found["shared"]
    found["ratio"] = statistics.median(one["seconds"]) / statistics.median(shared["seconds"])
    found["apart"] = max(abs(a - b) for a, b in zip(one["losses"], shared["losses"], strict=True))
    if "one compiled" in found:
        found["ratio_to_compiled"] = statistics.median(found["one compiled"]["seconds"]) / statistics.median(
            shared["seconds"]
        )
    if dist.get_rank() == 0 and options.json:
        options.json.write_text(json.dumps(found, indent=1))
    say({name: found.get(name) for name in ("ratio", "ratio_to_compiled", "apart")}, one["losses"], shared["losses"])
    dist.destroy_process_group()


def train(model, parameters, options: argparse.Namespace, ranks, device, *, compiled: bool) -> dict:
    """Some steps on one row; losses, seconds and peak memory."""
    import numpy as np
    import torch

    from qlora_cli.core.data.packing import collate
    from qlora_cli.core.engine.engine import install_engine
    from qlora_cli.settings.groups import StepSettings

    cuda = device.type == "cuda"
    generator = np.random.default_rng(0)

    def row(tokens: int):
        ids = generator.integers(5, 500, tokens).astype(np.int32)
        batch = collate([(ids, np.ones(tokens, dtype=bool))], [0]).part_of(ranks.rank % ranks.context, ranks.context)
        return batch.pin() if cuda else batch

    settings = StepSettings(
        gradient_checkpointing="on", compile=compiled, offload_activations=False, resident_weights=False
    )
    engine = install_engine(
        model,
        settings,
        device=device,
        compute_dtype=torch.bfloat16,
        max_tokens=options.tokens,
        total_steps=2,  # too few for graphs
        report=lambda event: print("   ", event.text, flush=True) if ranks.is_main else None,
    )
    optimizer = torch.optim.AdamW([buffer.values for buffer in parameters.buffers], lr=1e-4, fused=cuda)
    warm, batches = row(WARM_TOKENS if cuda else 64), [row(options.tokens)] * (options.steps + 1)
    losses, seconds = [], []
    for number, batch in enumerate((warm, *batches)):
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        parameters.zero_gradients()
        loss = engine.loss(batch)
        (loss / (batch.pack_tokens - 1)).backward()
        for gradient in parameters.gradients():
            ranks.all_reduce_sum(gradient)
        loss = float(ranks.all_reduce_sum(loss.detach().double())) / (batch.pack_tokens - 1)
        if number > 0:  # the first only warms up
            optimizer.step()
            losses.append(loss)
            seconds.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0
    described = engine.describe()
    engine.close()
    return {"engine": described, "losses": losses, "seconds": seconds[1:], "first_s": seconds[0], "peak_gib": peak}


def time_exchange(base, options: argparse.Namespace, device) -> dict:
    """A layer's exchanges of one forward pass alone: seconds, and bytes that leave each card."""
    import torch

    from qlora_cli.core.distributed.context_group import context_of

    context, config = context_of(base), base.config
    size = config.hidden_size // config.num_attention_heads
    part = -(-options.tokens // context.size)
    heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    given = [torch.zeros(part, count, size, dtype=torch.bfloat16, device=device) for count in heads]
    seconds = []
    for _ in range(EXCHANGES):
        started = _now(device)
        query, *_ = context.to_heads(*given)
        context.to_tokens(query)
        seconds.append(_now(device) - started)
    sent = sum(tensor.nbytes for tensor in (*given, given[0])) * (context.size - 1) // context.size
    return {"seconds": statistics.median(seconds), "gigabytes": sent / 1e9}


def _now(device) -> float:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
