"""FSDP2 over a 4-bit base: each rank holds a shard of every weight, gathered layer by layer as the model computes.

The engine is FSDP2 (`torch.distributed.fsdp.fully_shard`). accelerate's own FSDP2 path prepares a whole model at once,
and wraps every parameter of a layer in one group of one kind: it can neither take a layer whose shard is all that was
loaded, nor leave out the adapter, which trains in float32 in buffers of its own. So its layers are given to FSDP2 directly.

What is sharded is each linear's packed bytes and their constants, which are nine tenths of a base, and embeddings and head
where they are plain. The adapter stays whole on every rank, its gradients added up: it is what the optimizer works on.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from qlora_cli.core.distributed.weight_shards import WeightShards
from qlora_cli.core.experts.four_bit_experts import FourBitExperts
from qlora_cli.core.models.quantization import STREAMED, four_bit_linears
from qlora_cli.kernels.weights import FrozenWeight

# FSDP2 of torch 2.11 makes parameters of floating-point numbers only, so bytes travel viewed as such, only ever copied.
# Not 16-bit ones: on CUDA `torch._foreach_copy_`, which packs them for the all-gather, takes each through float32 and
# back (ATen/native/cuda/ForeachBinaryOpList.cu), and every NaN comes out as one and the same.
CARRIER = torch.float32
ATTRIBUTE = "_qlora_sharded_weight"  # of a linear whose weight is sharded: its `ShardedWeight`


@dataclass(frozen=True)
class ShardedWeight:
    """A 4-bit weight whose large tensors are parameters of its module, sharded over the ranks.

    Attributes:
        module: Holds the bytes of `weight` and `absmax`, as `CARRIER`, whole only while its layer computes.
        whole: The weight without these two, which are small.
        blocks: Elements of `absmax`.
        absmax_dtype: uint8 codes, or fp32.
    """

    module: nn.Module
    whole: FrozenWeight
    blocks: int
    absmax_dtype: torch.dtype

    def gathered(self) -> FrozenWeight:
        """The weight, where its layer computes."""
        module: Any = self.module
        packed, absmax = module.weight.detach().view(torch.uint8), module.absmax.detach().view(self.absmax_dtype)
        return self.whole._replace(packed=packed[: -(-self.elements // 2)], absmax=absmax[: self.blocks])

    @property
    def elements(self) -> int:
        """Weights it stands for."""
        return self.whole.rows * self.whole.columns


def sharded_weight_of(module: nn.Module) -> ShardedWeight | None:
    """The sharded weight of a linear layer; None where it is whole."""
    return module.__dict__.get(ATTRIBUTE)


def is_sharded(model: nn.Module) -> bool:
    """Whether parts of a model are sharded over the ranks: then all ranks have to run it equally often."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def shard_base(
    base: Any, decoder: nn.Module, layers: list[nn.Module], shards: WeightShards, device: torch.device
) -> None:
    """Hands a causal language model, an adapter attached or not, of which each rank has loaded its shard, over to FSDP2,
    in place. Each of the decoder's `layers` is gathered as a whole."""
    for parameter in base.parameters():
        if parameter.requires_grad and parameter.device != device:
            parameter.data = parameter.data.to(device)  # an adapter goes where its layer's shard is
    mesh = init_device_mesh(device.type, (shards.ranks.world_size,))
    offload = CPUOffloadPolicy(pin_memory=device.type == "cuda") if shards.on_host else OffloadPolicy()

    def hand_over(unit: nn.Module, mine: set[nn.Parameter]) -> None:
        fully_shard(unit, mesh=mesh, offload_policy=offload, ignored_params=set(unit.parameters()) - mine)

    inside = {id(module) for layer in layers for module in layer.modules()}
    wrappers = {id(module.base_layer): module for module in base.modules() if hasattr(module, "base_layer")}
    alone = [wrappers.get(id(linear), linear) for _, linear in four_bit_linears(base) if id(linear) not in inside]
    for unit in (*layers, *alone):
        held = [shard for _, linear in list(four_bit_linears(unit)) for shard in _take_shards(linear, shards)]
        experts = [module for module in unit.modules() if isinstance(module, FourBitExperts)]
        held += [shard for module in experts for shard in _take_expert_shards(module, shards)]
        hand_over(unit, {getattr(module, name) for module, name, _ in held})
        for module, name, shard in held:
            _put_shard(module, name, shard.cpu() if shards.on_host else shard, device)
    tables = (base.get_input_embeddings(), base.get_output_embeddings())
    if tables[1] is None or tables[0].weight is not tables[1].weight:
        for table in tables:
            if type(table) in (nn.Embedding, nn.Linear) and not table.weight.requires_grad:
                hand_over(table, {table.weight})
    hand_over(decoder, set())
    hand_over(base, set())
    for layer, following in pairwise(layers):
        layer.set_modules_to_forward_prefetch([following])  # type: ignore[operator]


def _take_shards(linear: Any, shards: WeightShards) -> list[tuple[nn.Module, str, Tensor]]:
    """Empties a 4-bit linear, whose large tensors become parameters without memory; what it held, with their places."""
    weight, state = linear.weight, linear.weight.quant_state
    whole = FrozenWeight.of_state(state)._replace(absmax=None)
    blocks = -(-whole.rows * whole.columns // state.blocksize)
    setattr(linear, ATTRIBUTE, ShardedWeight(linear, whole, blocks, state.absmax.dtype))
    held = {"weight": weight.detach().as_subclass(Tensor), "absmax": state.absmax}
    held = {name: shard.flatten().view(CARRIER) for name, shard in held.items()}
    linear.quant_state = None
    for name, shard in held.items():
        empty = torch.empty(shard.numel() * shards.ranks.world_size, dtype=CARRIER, device="meta")
        linear.register_parameter(name, nn.Parameter(empty, requires_grad=False))
    return [(linear, name, shard) for name, shard in held.items()]


def _take_expert_shards(experts: FourBitExperts, shards: WeightShards) -> list[tuple[nn.Module, str, Tensor]]:
    """As `_take_shards`, of each stack of a module of experts."""
    held = {name: getattr(experts, name).detach().flatten().view(CARRIER) for name in experts.shard_names()}
    for name, shard in held.items():
        empty = torch.empty(shard.numel() * shards.ranks.world_size, dtype=CARRIER, device="meta")
        experts._buffers.pop(name, None)
        experts.register_parameter(name, nn.Parameter(empty, requires_grad=False))
    return [(experts, name, shard) for name, shard in held.items()]


def _put_shard(module: nn.Module, name: str, shard: Tensor, device: torch.device) -> None:
    """Gives FSDP2 this rank's shard of a parameter that has no memory yet; it is taken up before the first use."""
    pinned = shard.pin_memory() if shard.device.type == "cpu" and device.type == "cuda" else shard
    whole: Any = getattr(module, name)  # on the meta device
    # Not `DTensor.from_local`, which moves what waits on the host to the card.
    filled = DTensor(pinned, whole._spec, requires_grad=False)
    module.register_parameter(name, nn.Parameter(filled, requires_grad=False))


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """A module's parameters whole on the device inside the block, where they are used other than by calling it."""
    if (bring := module.__dict__.get(STREAMED)) is not None:
        bring()
    if not isinstance(module, FSDPModule):
        yield
        return
    module.unshard()
    try:
        yield
    finally:
        module.reshard()
