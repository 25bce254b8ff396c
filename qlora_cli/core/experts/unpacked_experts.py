"""Experts that stay unpacked beside their 4 bits where memory is plentiful, which spares each step unpacking them twice."""

from typing import Any

from torch import nn

from qlora_cli.core.experts.four_bit_experts import FourBitExperts
from qlora_cli.core.experts.fused_experts import FusedExperts


class UnpackedExperts:
    """The fused experts of a model instance's layers, of which the first ones stay unpacked.

    Attributes:
        modules: All modules of 4-bit experts, one a layer that has some, in their order.
        kept: Those that stay unpacked.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = [module for module in model.modules() if isinstance(module, FourBitExperts)]
        self.kept: list[FusedExperts] = []

    def _fused(self) -> list[FusedExperts]:
        found = (module.__dict__.get("fused") for module in self.modules if not module.is_sharded)
        return [fused for fused in found if isinstance(fused, FusedExperts)]

    def needs(self) -> dict[str, Any]:
        """How many layers' experts may stay unpacked, and what those of one then take, in the mean: fields of `StepNeeds`."""
        fused = self._fused()
        bytes_each = sum(each.unpacked_bytes() for each in fused) // max(1, len(fused))
        return {"expert_layers": len(fused), "unpacked_bytes": bytes_each}

    def keep(self, count: int) -> None:
        """Has those of so many layers stay unpacked, and no others, which may be fused no more.

        Raises:
            torch.OutOfMemoryError: There is not the memory; some of them stay unpacked.
        """
        for each in self.kept[count:]:
            each.stay_unpacked(wanted=False)
        self.kept = self.kept[:count]
        for each in self._fused()[len(self.kept) : count]:
            each.stay_unpacked(wanted=True)
            self.kept.append(each)
