"""LoRA on routed experts: PEFT's adapter of a stacked parameter, computed by rows on a stack that is packed in 4 bits.

Each expert has a pair (A, B) of its own; those of a stack lie in two matrices, A (rank * experts, in) with the rows of an
expert together and B (out, rank * experts) with its columns `experts` apart. PEFT adds B @ A to the whole stack in every
forward pass, which 4-bit weights cannot take and which costs a second stack in memory; `FourBitExperts` multiplies the
rows that an expert gets by the expert's pair.
"""

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any

import qlora_cli.core.bnb_before_peft  # noqa: F401 - with the compiler otherwise

# isort: split
from peft import LoraConfig
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from transformers import PreTrainedModel

from qlora_cli.core.adapters.targets import stack_names
from qlora_cli.core.experts.four_bit_experts import ExpertLora, FourBitExperts
from qlora_cli.core.experts.layout import ExpertWeight, expert_weights, find_experts, met_experts
from qlora_cli.errors import AdapterError
from qlora_cli.settings.groups import LoraSettings


class ExpertsLora(ParamWrapper):
    """PEFT's wrapper of one stack of experts, packed or not."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, *, config: LoraConfig, **arguments: Any) -> None:
        super().__init__(base_layer, adapter_name, config=_without_dropout(config), **arguments)
        base: Any = self.get_base_layer()
        if isinstance(base, FourBitExperts):
            base.lora[self.parameter_name] = self._adapter

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **arguments: Any) -> None:
        super().update_layer(adapter_name, r, lora_alpha, config=_without_dropout(config), **arguments)

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        shape = self._weight().shape
        self.num_experts, self._param_ndim = shape[0], len(shape)
        return shape[1:]

    def _weight(self) -> ExpertWeight:
        return next(w for w in expert_weights(self.get_base_layer()) if w.name == self.parameter_name)

    @contextlib.contextmanager
    def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
        if isinstance(self.get_base_layer(), FourBitExperts):  # which asks for it
            yield
            return
        with super()._activate_lora([name for name in active_adapters or () if name in self.lora_A]):
            yield

    def _adapter(self) -> ExpertLora | None:
        """Of packed experts; asked for rather than left with them by each pass, which a layer that is compiled and
        recomputed may not: it would silently not be compiled."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        if not active or self.disable_adapters or self.merged:
            return None
        a, b = (getattr(self, half)[active[-1]].weight for half in ("lora_A", "lora_B"))
        return ExpertLora(a, b, self.scaling[active[-1]])

    def unload_and_optionally_merge_module(self, *given: Any, **named: Any) -> nn.Module:
        base: Any = super().unload_and_optionally_merge_module(*given, **named)
        if isinstance(base, FourBitExperts):
            base.lora.clear()
        return base


ExpertsLora.__name__ = (
    ParamWrapper.__name__
)  # by which PEFT knows a module whose stacks it may wrap one after the other


def _without_dropout(config: LoraConfig) -> LoraConfig:
    """Dropout is of the other layers' inputs: a stack's update is one matrix for all of its rows."""
    changed = copy.copy(config)
    changed.lora_dropout = 0.0
    return changed


def use_expert_lora(config: LoraConfig, model: nn.Module) -> None:
    """Has PEFT attach `ExpertsLora` to the stacks of experts among the parameters that a configuration targets."""
    kinds = {type(module) for _, module in find_experts(model)}
    if config.target_parameters and kinds:
        config._register_custom_module(dict.fromkeys(kinds, ExpertsLora))


def expert_targets(model: PreTrainedModel, lora: LoraSettings) -> list[str]:
    """Full names of the stacks of experts to adapt; [] where it is not asked for.

    Raises:
        AdapterError: The model has none, or a setting is not for them.
    """
    if not lora.adapt_experts:
        if lora.expert_rank is not None:
            raise AdapterError("--expert-rank is of adapted experts.", "Add --adapt-experts.")
        return []
    names = stack_names(model)
    if not names:
        raise AdapterError(
            f"This {model.config.model_type} model has no stack of experts to adapt.", "Leave --adapt-experts out."
        )
    wrong = [flag for flag, value in (("--dora", lora.dora), ("--dropout", lora.dropout)) if value]
    if wrong:
        raise AdapterError(f"Adapted experts take no {wrong[0]}.", f"Leave {wrong[0]} or --adapt-experts out.")
    return names


def expert_rank(model: PreTrainedModel, lora: LoraSettings) -> int:
    """Rank that an expert gets: those that a token meets have `lora.rank` together, by default."""
    return lora.expert_rank or max(1, lora.rank // (met_experts(model.config) or 1))


def short_parameters(names: Sequence[str], model: nn.Module) -> list[str]:
    """The shortest way to name parameters for PEFT: their ends, as `mlp.experts.down_proj`, where those name no other."""
    ends = sorted({".".join(name.split(".")[-3:]) for name in names})
    every = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    return ends if {n for n in every if n.endswith(tuple(f".{end}" for end in ends))} == set(names) else sorted(names)
