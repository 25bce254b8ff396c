"""Routing held still: the same tokens go to the same experts in two runs that are compared.

Which experts a token goes to is decided by differences that rounding can turn, and one token that goes elsewhere changes
more than a wrong attention mask does. A trial that asks whether two forms of attention give the same takes what the first
run chose for the second run too; routers see single tokens and are not what is tried.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qlora_cli.core.experts.four_bit_experts import FourBitExperts

CHOICES = ("top_k_index", "router_indices"), ("top_k_weights", "routing_weights")  # arguments after the hidden states


class HeldRouting:
    """What the routers of a model chose in one run, for others.

    Args:
        model: Whose 4-bit experts are given their tokens' choices; others route as they do.
    """

    def __init__(self, model: nn.Module) -> None:
        self.experts: list[nn.Module] = [module for module in model.modules() if isinstance(module, FourBitExperts)]
        self.chosen: dict[nn.Module, list[Tensor | None]] = {}  # index and weights, (tokens, k) each

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Within it every module of experts notes what its last call was given."""

        def note(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            self.chosen[module] = [_given(number, arguments, named) for number in range(len(CHOICES))]

        self.chosen.clear()
        yield from self._hooked(note)

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Within it the last tokens of each call, as many as were noted, go where they went then, with those weights."""

        def replay(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            given = list(arguments)
            for number, held in enumerate(self.chosen.get(module, ())):
                now = _given(number, arguments, named)
                if held is None or now is None or len(now) < len(held):
                    continue
                both = torch.cat([now[: len(now) - len(held)], held.to(now.dtype)])
                if number + 1 < len(given):
                    given[number + 1] = both
                else:
                    named = {**named, next(name for name in CHOICES[number] if name in named): both}
            return tuple(given), named

        yield from self._hooked(replay)

    def _hooked(self, hook: Any) -> Iterator[None]:
        handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module in self.experts]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _given(number: int, arguments: tuple[Any, ...], named: dict[str, Any]) -> Tensor | None:
    """The index (0) or the weights (1) among what a module of experts is called with; None where there are none."""
    if number + 1 < len(arguments):
        return arguments[number + 1]
    return next((named[name] for name in CHOICES[number] if name in named), None)
