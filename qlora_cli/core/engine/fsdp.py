"""A loaded base of which each rank holds a share in; the same model, gathered layer by layer as it computes, out.

The engine is FSDP2 (`torch.distributed.fsdp.fully_shard`). accelerate's own FSDP2 path prepares a whole model at once,
and wraps every parameter of a layer in one group of one kind: it can neither take a layer whose share is all that was
loaded, nor leave out the adapter, which trains in float32 in buffers of its own. So its layers are given to FSDP2 directly.

What is sharded is each linear's packed bytes and their constants, which are nine tenths of a base, and embeddings and head
where they are plain. The adapter stays whole on every rank, its gradients added up: it is what the optimizer works on.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from qlora_cli.core.distributed.weight_shards import WeightShards
from qlora_cli.core.engine.sharded_weight import CARRIER, mark_sliced, on_meta
from qlora_cli.core.models.quantization import four_bit_linears
from qlora_cli.kernels.weights import FrozenWeight


def is_sharded(model: nn.Module) -> bool:
    """Whether parts of a model are sharded over the ranks: then all ranks have to run it equally often."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def shard_base(
    base: Any, decoder: nn.Module, layers: list[nn.Module], slices: WeightShards, device: torch.device
) -> None:
    """Hands a base, loaded in slices, over to FSDP2, in place.

    Args:
        base: The causal language model, an adapter attached or not.
        decoder: The part below its head.
        layers: The decoder's layers, each gathered as a whole.
        slices: With which it was loaded.
        device: Where it computes.
    """
    for parameter in base.parameters():
        if parameter.requires_grad and parameter.device != device:
            parameter.data = parameter.data.to(device)  # an adapter goes where its layer's share is
    mesh = init_device_mesh(device.type, (slices.ranks.world_size,))
    offload = CPUOffloadPolicy(pin_memory=device.type == "cuda") if slices.on_host else OffloadPolicy()

    def hand_over(unit: nn.Module, mine: set[nn.Parameter]) -> None:
        fully_shard(unit, mesh=mesh, offload_policy=offload, ignored_params=set(unit.parameters()) - mine)

    inside = {id(module) for layer in layers for module in layer.modules()}
    wrappers = {id(module.base_layer): module for module in base.modules() if hasattr(module, "base_layer")}
    alone = [wrappers.get(id(linear), linear) for _, linear in four_bit_linears(base) if id(linear) not in inside]
    for unit in (*layers, *alone):
        shares = [share for _, linear in list(four_bit_linears(unit)) for share in _take_shares(linear, slices)]
        hand_over(unit, {getattr(module, name) for module, name, _ in shares})
        for module, name, share in shares:
            _put_share(module, name, share.cpu() if slices.on_host else share, device)
    tables = (base.get_input_embeddings(), base.get_output_embeddings())
    if tables[1] is None or tables[0].weight is not tables[1].weight:
        for table in tables:
            if type(table) in (nn.Embedding, nn.Linear) and not table.weight.requires_grad:
                hand_over(table, {table.weight})
    hand_over(decoder, set())
    hand_over(base, set())
    for layer, following in pairwise(layers):
        layer.set_modules_to_forward_prefetch([following])  # type: ignore[operator]


def _take_shares(linear: Any, slices: WeightShards) -> list[tuple[nn.Module, str, Tensor]]:
    """Empties a 4-bit linear, whose large tensors become parameters without memory; what it held, with their places."""
    weight, state = linear.weight, linear.weight.quant_state
    nested = state.state2
    rows, columns = state.shape
    whole = FrozenWeight(
        rows=rows,
        columns=columns,
        code=state.code,
        nested_absmax=nested.absmax if nested is not None else None,
        nested_code=nested.code if nested is not None else None,
        offset=state.offset if nested is not None else None,
        blocksize=state.blocksize,
        nested_blocksize=nested.blocksize if nested is not None else 256,
    )
    mark_sliced(linear, whole, -(-rows * columns // state.blocksize), state.absmax.dtype)
    held = {"weight": weight.detach().as_subclass(Tensor), "absmax": state.absmax}
    shares = {name: share.flatten().view(CARRIER) for name, share in held.items()}
    linear.quant_state = None
    for name, share in shares.items():
        linear.register_parameter(name, on_meta(share.numel() * slices.ranks.world_size))
    return [(linear, name, share) for name, share in shares.items()]


def _put_share(module: nn.Module, name: str, share: Tensor, device: torch.device) -> None:
    """Gives FSDP2 this rank's part of a parameter that it has no memory for yet; it is taken up before the first use."""
    pinned = share.pin_memory() if share.device.type == "cpu" and device.type == "cuda" else share
    whole: Any = getattr(module, name)  # on the meta device
    # Not `DTensor.from_local`, which moves what waits on the host to the card.
    filled = DTensor(pinned, whole._spec, requires_grad=False)
    module.register_parameter(name, nn.Parameter(filled, requires_grad=False))


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """A module's parameters whole inside the block, where they are used other than by calling it."""
    if not isinstance(module, FSDPModule):
        yield
        return
    module.unshard()
    try:
        yield
    finally:
        module.reshard()
