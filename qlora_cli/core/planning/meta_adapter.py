"""Adapter on a model without weights: plain LoRA attached by modules like PEFT's, so that counting needs no PEFT.

Importing PEFT and bitsandbytes takes as long as all else that `qlora inspect` of a model does. Which modules are adapted is
decided where it is for training (`adapters.targets`); what they get here has PEFT's names, shapes and dtypes, and
tests/planning/test_meta_adapter.py holds that profiles over both are equal. Everything but plain LoRA of one rank on linear
layers is attached by PEFT here too.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlora_cli.core.adapters.targets import check_settings, find_targets
from qlora_cli.core.models.structure import is_plain_linear
from qlora_cli.settings.groups import LoraSettings

NAME = "default"  # of the adapter, as PEFT calls it


class LoraOnMeta(nn.Module):
    """A linear layer with A and B beside it, under the names that PEFT gives them.

    Args:
        base: The layer, frozen.
        lora_a: A, (rank, in) in float32.
        lora_b: B, (out, rank) in float32.
        dropout: Of the inputs of A.
    """

    def __init__(self, base: nn.Linear, lora_a: nn.Linear, lora_b: nn.Linear, dropout: float) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_dropout = nn.ModuleDict({NAME: nn.Dropout(dropout) if dropout else nn.Identity()})
        self.lora_A, self.lora_B = nn.ModuleDict({NAME: lora_a}), nn.ModuleDict({NAME: lora_b})
        self.in_features, self.out_features = base.in_features, base.out_features

    weight = property(lambda self: self.base_layer.weight)
    bias = property(lambda self: self.base_layer.bias)

    def forward(self, x: Tensor, *given: Any, **named: Any) -> Tensor:
        """What PEFT's computes, but for the scaling."""
        y: Tensor = self.base_layer(x, *given, **named)
        a, b = self.lora_A[NAME], self.lora_B[NAME]
        return y + b(a(self.lora_dropout[NAME](x.float()))).to(y.dtype)


def attach_on_meta(model: PreTrainedModel, lora: LoraSettings, *, fused: bool) -> Any:
    """Attaches an adapter to a model of `build_empty`, as `attach_adapter` does.

    Args:
        fused: Whether the fast engine is to run it; PEFT's own forward pass is traced otherwise.

    Raises:
        AdapterError: As `attach_adapter`.
    """
    asked = (
        lora.adapt_experts,
        lora.expert_rank,
        lora.dora,
        lora.modules_to_save,
        lora.rank_pattern,
        lora.alpha_pattern,
    )
    if fused and not any(asked):
        check_settings(model, lora)
        names = find_targets(model, lora)
        linears = {name: model.get_submodule(name) for name in names}
        if all(is_plain_linear(linear) for linear in linears.values()):
            return _attach(model, lora, linears)
    from qlora_cli.core.adapters.lora import attach_adapter

    return attach_adapter(model, lora)


def _attach(model: PreTrainedModel, lora: LoraSettings, linears: dict[str, Any]) -> PreTrainedModel:
    model.requires_grad_(False)
    pairs: dict[tuple[int, type], tuple[nn.Linear, nn.Linear]] = {}  # layers of one weight share one
    for name, linear in linears.items():
        key = id(linear.weight), type(linear)
        if key not in pairs:
            how: dict[str, Any] = {"bias": False, "device": "meta", "dtype": torch.float32}
            pairs[key] = (
                nn.Linear(linear.in_features, lora.rank, **how),
                nn.Linear(lora.rank, linear.out_features, **how),
            )
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, LoraOnMeta(linear, *pairs[key], lora.dropout))
    return model
