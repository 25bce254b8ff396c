"""A 4-bit linear layer whose weight is spread over the ranks in; while its layer computes, the whole weight out."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qlora_cli.kernels.weights import FrozenWeight

_ATTRIBUTE = "_qlora_sliced"


@dataclass(frozen=True)
class SlicedWeight:
    """A 4-bit weight whose large tensors are parameters of its module, spread over the ranks.

    Attributes:
        module: Holds `weight` (bytes,) uint8 and `absmax` (blocks,), whole only while its layer computes.
        whole: The weight without these two, which are small.
        blocks: Elements of `absmax`.
    """

    module: nn.Module
    whole: FrozenWeight
    blocks: int

    def gathered(self) -> FrozenWeight:
        """The weight, where its layer computes."""
        module: Any = self.module
        packed, absmax = module.weight.detach(), module.absmax.detach()
        return self.whole._replace(packed=packed[: -(-self.elements // 2)], absmax=absmax[: self.blocks])

    @property
    def elements(self) -> int:
        """Weights it stands for."""
        return self.whole.rows * self.whole.columns


def mark_sliced(module: nn.Module, whole: FrozenWeight, blocks: int) -> None:
    """Notes on a linear layer that its weight is spread."""
    setattr(module, _ATTRIBUTE, SlicedWeight(module, whole, blocks))


def sliced_weight_of(module: nn.Module) -> SlicedWeight | None:
    """The spread weight of a linear layer; None where it is whole."""
    return module.__dict__.get(_ATTRIBUTE)


def on_meta(elements: int, dtype: torch.dtype) -> nn.Parameter:
    """A frozen parameter without memory."""
    return nn.Parameter(torch.empty(elements, dtype=dtype, device="meta"), requires_grad=False)
