"""Layouts of expert weights: which parameters of a mixture-of-experts module are stacks of matrices, and which way round.

transformers keeps the routed experts of a layer as one module with parameters of three dimensions:
`gate_up_proj` (experts, 2 * intermediate, hidden) and `down_proj` (experts, hidden, intermediate), `up_proj` instead of
the former where there is no gate; gpt_oss, aria and llama4 keep each matrix the other way round.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig

# What configurations call the experts that a token meets.
CHOICES = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts", "moe_top_k")
FIRST, SECOND = ("gate_up_proj", "up_proj"), "down_proj"  # names of the two stacks; an expert has one of the first


@dataclass(frozen=True)
class ExpertWeight:
    """One stack of expert matrices, W (out, in) each, as `y = x @ W.T`.

    Attributes:
        name: Of the parameter in its module.
        experts: Matrices in the stack.
        rows: out features.
        columns: in features.
        transposed: Whether the parameter is (experts, in, out) rather than (experts, out, in).
        adapter_swapped: Whether PEFT, for want of an `is_transposed`, takes the stored (in, out) for (out, in): its A is
            then (rank * experts, out) and its B (in, rank * experts). So it is in llama4.
        bias: Name of the parameter (experts, out) that is added, or None.
    """

    name: str
    experts: int
    rows: int
    columns: int
    transposed: bool
    adapter_swapped: bool
    bias: str | None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the parameter as the model has it, (experts, …, …)."""
        matrix = (self.columns, self.rows) if self.transposed else (self.rows, self.columns)
        return (self.experts, *matrix)

    @property
    def elements(self) -> int:
        """Weights of one expert."""
        return self.rows * self.columns

    def as_matrix(self, stored: Tensor) -> Tensor:
        """Matrices (…, out, in) of stored ones, as a view; its own inverse."""
        return stored.transpose(-2, -1) if self.transposed else stored


def expert_weights(module: nn.Module) -> tuple[ExpertWeight, ...]:
    """The stacks of a module that holds a layer's routed experts, in the order of the computation; () for any other."""
    if hasattr(module, "expert_weights"):  # packed ones keep what they were
        return module.expert_weights  # type: ignore[return-value]
    own = module._parameters
    first = next((name for name in FIRST if own.get(name) is not None), None)
    if first is None or own.get(SECOND) is None:
        return ()
    up, down = own[first], own[SECOND]
    if up is None or down is None or up.ndim != 3 or down.ndim != 3 or len(up) != len(down):
        return ()
    if any(own[n] is not None and own[n].ndim == 3 for n in own.keys() - {first, SECOND}):  # type: ignore[union-attr]
        return ()  # a third stack: another computation, as in inkling's shared experts
    transposed = getattr(module, "is_transposed", None)
    swapped = transposed is None
    if transposed is None:  # hidden is what both share: the last of one and the first of the other
        transposed = up.shape[1] == down.shape[2] and up.shape[2] != down.shape[1]
    return tuple(_expert_weight(module, name, transposed, swapped and transposed) for name in (first, SECOND))


def _expert_weight(module: nn.Module, name: str, transposed: bool, swapped: bool) -> ExpertWeight:
    parameter: Any = module._parameters[name]
    matrix = parameter.shape[1:]
    rows, columns = matrix[::-1] if transposed else matrix
    bias = f"{name}_bias" if module._parameters.get(f"{name}_bias") is not None else None
    return ExpertWeight(name, parameter.shape[0], rows, columns, transposed, swapped, bias)


def find_experts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module that holds routed experts, packed or not, with its name."""
    return ((name, module) for name, module in model.named_modules() if expert_weights(module))


def met_experts(config: PreTrainedConfig) -> int | None:
    """Of a layer's routed experts, how many a token meets; None where the configuration does not say."""
    text = config.get_text_config(decoder=True)
    return next((value for name in CHOICES if isinstance(value := getattr(text, name, None), int)), None)


def share_of_experts(model: Any) -> float:
    """Of a layer's routed experts, the share that a token meets; 1 where the configuration does not say."""
    experts = next((expert_weights(module)[0].experts for _, module in find_experts(model)), 0)
    return (met_experts(model.config) or experts) / experts if experts else 1.0
