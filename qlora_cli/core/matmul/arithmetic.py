"""Arithmetic of a run: how much there is, and whether it takes long enough for what takes its time before the first step."""

from torch import nn

from qlora_cli.core.experts.layout import expert_weights, find_experts, share_of_experts

PAYS_SECONDS = 120  # of a run
ASSUMED_FLOPS_PER_SECOND = 4e14


def compiling_pays(asked: bool | None, base: nn.Module, dense_elements: int, tokens: int) -> bool:
    """Whether layers are to be compiled: as asked, else where the run takes long enough by the arithmetic.

    Compiled, a step takes a fifth less; compiling takes some 15 s.

    Args:
        dense_elements: Of all 4-bit weights but routed experts.
        tokens: Of all steps.
    """
    return takes_long(met_elements(base, dense_elements), tokens) if asked is None else asked


def takes_long(elements: float, tokens: int) -> bool:
    """Whether a run takes so long, by its arithmetic, that what takes some 15 s before its first step pays.

    Args:
        elements: Of the 4-bit weights that a token meets.
        tokens: Of all steps.
    """
    return 6 * elements * tokens / ASSUMED_FLOPS_PER_SECOND > PAYS_SECONDS


def met_elements(base: nn.Module, dense_elements: int) -> float:
    """Elements of the 4-bit weights that a token meets, where those of all but routed experts are `dense_elements`."""
    experts = sum(w.experts * w.elements for _, m in find_experts(base) for w in expert_weights(m))
    return dense_elements + experts * share_of_experts(base)
