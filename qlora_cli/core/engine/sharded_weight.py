"""A 4-bit linear layer whose weight is sharded over the ranks in; while its layer computes, the whole weight out."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qlora_cli.kernels.weights import FrozenWeight

# FSDP2 of torch 2.11 makes parameters of floating-point numbers only. These are bytes in their dress: only ever copied.
# Not 16-bit ones: on CUDA `torch._foreach_copy_`, which lays them out for the all-gather, takes each through float32 and
# back (ATen/native/cuda/ForeachBinaryOpList.cu), and every NaN comes out as one and the same.
CARRIER = torch.float32
_ATTRIBUTE = "_qlora_sliced"


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


def mark_sliced(module: nn.Module, whole: FrozenWeight, blocks: int, absmax_dtype: torch.dtype) -> None:
    """Notes on a linear layer that its weight is sharded."""
    setattr(module, _ATTRIBUTE, ShardedWeight(module, whole, blocks, absmax_dtype))


def sliced_weight_of(module: nn.Module) -> ShardedWeight | None:
    """The sharded weight of a linear layer; None where it is whole."""
    return module.__dict__.get(_ATTRIBUTE)


def on_meta(elements: int) -> nn.Parameter:
    """A frozen parameter of `CARRIER` without memory."""
    return nn.Parameter(torch.empty(elements, dtype=CARRIER, device="meta"), requires_grad=False)
