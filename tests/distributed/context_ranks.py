"""One of some ranks that share the tokens of packs: losses and gradients against those of whole packs, which it computes alone.

On cards: torchrun --nproc-per-node 2 context_ranks.py 2 DIRECTORY...
"""

import os
import sys

import numpy as np
import torch
import torch.distributed as dist

from qlora_cli.core.adapters.lora import attach_adapter
from qlora_cli.core.data.packing import MicroBatch, collate
from qlora_cli.core.distributed.context_group import share_tokens
from qlora_cli.core.distributed.process_group import ProcessGroup
from qlora_cli.core.engine.engine import install_engine
from qlora_cli.core.models.files import resolve_model
from qlora_cli.core.models.loading import load_base
from qlora_cli.core.models.structure import find_decoder, underlying_model
from qlora_cli.events import report_nothing
from qlora_cli.settings.groups import LoraSettings, QuantizationSettings, StepSettings
from tests.adapted import draw_b
from tests.faults.victims import fork_ranks

# Lengths of rows: cut in the middle of one, at the end of one, at odd places; one of a token; fewer tokens than ranks.
PACKS = {
    "several rows": (40, 7, 34),
    "cut between rows": (30, 30),
    "one row of odd length": (67,),
    "equal rows": (32, 32),
    "no more tokens than ranks": (2,),
}
LONG = {"one long row": (601,), "equal long rows": (320, 320), "long rows": (300, 777)}  # on cards, of other kernels


def packs(device: torch.device) -> dict[str, MicroBatch]:
    """Micro-batches of random tokens; in the last one all that is trained lies in the last part."""
    rng = np.random.default_rng(0)
    made = {}
    for name, lengths in (PACKS | (LONG if device.type == "cuda" else {})).items():
        rows = [(rng.integers(2, 384, n).astype(np.int32), rng.random(n) < (0.8 if n > 2 else 1)) for n in lengths]
        made[name] = collate(rows, range(len(rows)))
    ids = rng.integers(2, 384, 64).astype(np.int32)
    return {**made, "trained at its end": collate([(ids, np.arange(64) >= 60)], [0])}


def run_on_cpu(world_size: int, context: int, directories: list[str], **settings: object) -> None:
    """All ranks, in processes forked from this one."""
    codes = fork_ranks(world_size, lambda rank: check("cpu", context, directories, **settings))
    assert codes == [0] * world_size, codes


def check(kind: str, context: int, directories: list[str], **settings: object) -> None:
    """One rank. Fails where a loss or a gradient is another one."""
    device = torch.device(kind, int(os.environ["LOCAL_RANK"])) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    ranks = ProcessGroup(dist.get_rank(), dist.get_world_size(), context)
    of_loss, of_gradients = (2e-3, 3e-2) if kind == "cuda" else (1e-5, 1e-5)  # rounding in bf16, and in float32
    for directory in directories:
        model = adapted(directory, device)
        whole = losses(model, device, ProcessGroup(), **settings)
        base = underlying_model(model)
        share_tokens(base, find_decoder(base), ranks, device)
        shared = losses(model, device, ranks, **settings)
        for name, (loss, gradients) in whole.items():
            found, found_gradients = shared[name]
            gap, size = (found_gradients - gradients).norm(), gradients.norm()
            where = f"{directory}, {name}: loss {found} for {loss}, gradients {gap / size:.2e} apart"
            print(where, flush=True)
            assert torch.allclose(found, loss, rtol=of_loss) and gap <= of_gradients * size, where
    print(f"all as one rank's, {len(directories)} models", flush=True)
    dist.destroy_process_group()


def adapted(directory: str, device: torch.device) -> torch.nn.Module:
    """A 4-bit base with an adapter that does something."""
    files = resolve_model(directory, report=report_nothing)
    quantization = QuantizationSettings(base_cache=False)
    base, _ = load_base(files, quantization, compute_dtype=dtype_on(device), device=device)
    return draw_b(attach_adapter(base, LoraSettings(rank=4, alpha=8))).train()


def dtype_on(device: torch.device) -> torch.dtype:
    """Of the arithmetic."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def losses(
    model: torch.nn.Module, device: torch.device, ranks: ProcessGroup, **settings: object
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Loss and gradients of each pack, added up over the ranks that share it."""
    run = {"max_tokens": 128 if device.type == "cpu" else 2048, "total_steps": 3, "report": report_nothing}
    asked = StepSettings(**{"gradient_checkpointing": "off", "compile": False, **settings})
    engine = install_engine(model, asked, device=device, compute_dtype=dtype_on(device), **run)
    assert ("packs shared" in engine.describe()) == (ranks.context > 1)
    found = {}
    for name, pack in packs(device).items():
        model.zero_grad(set_to_none=True)
        loss = engine.loss(pack.part_of(ranks.rank % ranks.context, ranks.context))
        loss.backward()
        gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
        groups = ranks.of_rows.world_size  # all have computed the same
        found[name] = tuple(ranks.all_reduce_sum(t.detach().clone()) / groups for t in (loss, gradients))
    engine.close()
    return found


if __name__ == "__main__":
    check("cuda", int(sys.argv[1]), sys.argv[2:])
