"""Tensors of an adapter on stacks of experts: which stack each pair in a file belongs to, and what it adds to an expert.

PEFT wraps a module once for each of its parameters that is adapted, in the order in which the module has them, the first
one innermost: with two, `experts.base_layer.lora_A.weight` is of `gate_up_proj` and `experts.lora_A.weight` of
`down_proj`; with one alone the latter name is that one's, and only the configuration says whose.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from qlora_cli.core.adapters.adapter_facts import PREFIX, AdapterFacts
from qlora_cli.core.experts.layout import ExpertWeight, expert_weights
from qlora_cli.errors import AdapterError

PAIR = re.compile(r"(?P<module>.+?)(?P<depth>(\.base_layer)*)\.lora_(?P<half>[AB])\.weight")


@dataclass(frozen=True)
class ExpertPair:
    """What an adapter has for one stack; a and b name tensors of it.

    Attributes:
        weight: The stack.
        a: (rank * experts, in), in and out exchanged where `ExpertWeight.adapter_swapped`.
        b: (out, rank * experts).
        scaling: On B @ A.
    """

    weight: ExpertWeight
    a: str
    b: str
    scaling: float


def expert_pairs(facts: AdapterFacts, model: nn.Module) -> dict[str, ExpertPair]:
    """The pairs on stacks of experts, by the parameter's name in the model, which is not adapted.

    Raises:
        AdapterError: The configuration does not say whose a pair is, one is not whole, or of another shape.
    """
    pairs = {}
    for parameter, halves, weight in stacked_pairs(facts, model):
        rank = max(1, facts.tensors[halves["A"]][0][0] // weight.experts)  # of one expert, by which PEFT scales
        pairs[parameter] = ExpertPair(weight, halves["A"], halves["B"], facts.scaling_of(parameter, rank))
        _check_shapes(facts, parameter, pairs[parameter])
    return pairs


def stacked_pairs(facts: AdapterFacts, model: nn.Module) -> list[tuple[str, dict[str, str], ExpertWeight]]:
    """Of each pair on a stack of experts the parameter's name in the model, the names of A and B, and the stack.

    Raises:
        AdapterError: The configuration does not say whose a pair is, or one is not whole.
    """
    found: dict[str, dict[int, dict[str, str]]] = {}
    modules = dict(model.named_modules())
    for name in facts.tensors:
        match = PAIR.fullmatch(name.removeprefix(PREFIX))
        if match and stacks_of(modules.get(match["module"])):
            depths = found.setdefault(match["module"], {})
            depths.setdefault(match["depth"].count("."), {})[match["half"]] = name
    pairs = []
    for module, depths in found.items():
        weights = [w for w in stacks_of(modules[module]) if _is_target(f"{module}.{w.name}", facts.config)]
        if sorted(depths) != list(range(len(weights))):
            raise AdapterError(
                f"The adapter has {len(depths)} pairs for {module}, and its target_parameters name {len(weights)} of "
                "its stacks.",
                "Save the adapter with PEFT again.",
            )
        for place, weight in enumerate(weights):
            halves = depths[len(weights) - 1 - place]
            if len(halves) != 2:
                raise AdapterError(f"The adapter has half of a pair for {module}.{weight.name}.")
            pairs.append((f"{module}.{weight.name}", halves, weight))
    return pairs


def adapter_sizes(weight: ExpertWeight) -> tuple[int, int]:
    """(in, out) of the pairs that PEFT makes for a stack."""
    return (weight.rows, weight.columns) if weight.adapter_swapped else (weight.columns, weight.rows)


def stacks_of(module: nn.Module | None) -> list[ExpertWeight]:
    """The stacks of a module, adapted or not, in the order in which it has them."""
    inner: Any = module
    while hasattr(inner, "base_layer"):
        inner = inner.base_layer
    if inner is None or not expert_weights(inner):
        return []
    place = {name: number for number, (name, _) in enumerate(inner.named_parameters(recurse=False))}
    return sorted(expert_weights(inner), key=lambda weight: place[weight.name])


def _is_target(parameter: str, config: Mapping[str, Any]) -> bool:
    return any(parameter == item or parameter.endswith(f".{item}") for item in config.get("target_parameters") or ())


def _check_shapes(facts: AdapterFacts, parameter: str, pair: ExpertPair) -> None:
    inner, outer = adapter_sizes(pair.weight)
    a, b = facts.tensors[pair.a][0], facts.tensors[pair.b][0]
    total = a[0]
    if a != (total, inner) or b != (outer, total) or total % pair.weight.experts or not total:
        raise AdapterError(
            f"The adapter does not fit this base: for {parameter} it has {a} and {b} where (n, {inner}) and "
            f"({outer}, n) are needed, n a multiple of {pair.weight.experts} experts.",
            "Give the base it was trained on with --model.",
        )
