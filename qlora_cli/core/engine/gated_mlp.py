"""What compiled layers do together: products of linears with one input, and gated MLPs with both adapters inside."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from qlora_cli.core.engine.lora_linear import (
    ATTRIBUTE,
    FastLinear,
    adapter_is_active,
    fast_linear_of,
    group_by_input,
    replace_forward,
)
from qlora_cli.kernels.float8 import join
from qlora_cli.kernels.gated import GATES, activate, gated_product
from qlora_cli.kernels.joined import covers, joined_linears
from qlora_cli.kernels.linear import project_shared, qlora_linear
from qlora_cli.kernels.weights import FrozenWeight

GATED_PARTS = {"gate_proj", "up_proj", "act_fn", "down_proj"}  # what a gated MLP of transformers calls them
TRIAL_POINTS = 4001


class SharedProjection:
    """Adapted layers that read the same tensor, whose first products are one while a layer is being compiled, and where
    that pays in 8 bits the frozen ones too: then their weights become parts of one.

    Between the first and the last of them it holds what the others will ask for; an eager step does without, where
    the state would only be in the way.

    Args:
        members: In the order of their calls, of one scaling, without dropout.
    """

    def __init__(self, members: list["FastLinear"]) -> None:
        self.members = members
        self.enabled = True
        self.x: Tensor | None = None
        self.parts: Sequence[Tensor] = ()
        self.joined: FrozenWeight | None = None
        weights = [member.weight for member in members if isinstance(member.weight, FrozenWeight)]
        if covers(weights) and len({member.b.dtype for member in members}) == 1:
            self.joined, parts = join(weights)
            for member, part in zip(members, parts, strict=True):
                member.weight = part

    def part(self, x: Tensor, place: int) -> Tensor:
        """(tokens, rank) of the member in that place; (..., out), its output, where the frozen products are one."""
        if self.x is not x:
            self.x = x
            self.parts = project_shared(x, [member.a for member in self.members], self.members[0].options.scaling)
            if self.joined is not None:
                b, lora_b = zip(*((member.b, member.lora_b) for member in self.members), strict=True)
                outputs = zip(self.members, joined_linears(x, self.joined, self.parts, b, lora_b), strict=True)
                self.parts = [y if member.bias is None else y + member.bias for member, y in outputs]
        part = self.parts[place]
        if place + 1 == len(self.members):
            self.x, self.parts = None, ()
        return part


@dataclass
class GatedUnit:
    """One gated MLP whose gate is fused.

    Attributes:
        gate: Its first linear.
        up: Its second, which shares the first one's projection.
        shared: That projection.
        kind: The activation, one of `GATES`.
        enabled: Whether it is to be used where the layer is compiled: it keeps the product that is gated.
    """

    gate: FastLinear
    up: FastLinear
    shared: SharedProjection
    kind: str
    enabled: bool = True

    def __call__(self, x: Tensor) -> Tensor:
        """(..., in) to what the last linear is given, (..., size)."""
        projected = self.shared.part(x, 0), self.shared.part(x, 1)
        gate, up = (
            qlora_linear(x, linear.frozen(), linear.bias, None, None, None, None, None, linear.options)
            for linear in (self.gate, self.up)
        )
        b: Any = self.gate.b, self.up.b
        lora_b: Any = self.gate.lora_b, self.up.lora_b
        return gated_product(gate, up, projected, b, lora_b, self.kind)


def _forward(self: Any, x: Tensor) -> Tensor:
    """Replaces `forward` on one MLP instance."""
    unit: GatedUnit = getattr(self, ATTRIBUTE)
    wanted = torch.compiler.is_compiling() and unit.enabled and unit.shared.enabled and x.dtype == unit.gate.dtype
    linears = ((self.gate_proj, unit.gate), (self.up_proj, unit.up))
    if wanted and all(adapter_is_active(module, fast.adapter) for module, fast in linears):
        return self.down_proj(unit(x))
    return type(self).forward(self, x)


def share_projections(modules: Iterable[nn.Module], run: Callable[[], Any]) -> None:
    """Finds swapped layers that get the same tensor while `run` runs, and lets them share one projection."""
    fast_of = {module: fast for module in modules if (fast := fast_linear_of(module)) is not None}
    sharing = [module for module, fast in fast_of.items() if fast.adapter is not None and fast.rate == 0]
    for group in group_by_input(sharing, run):
        members = [fast_of[module] for module in group]
        if len(members) > 1 and len({member.options.scaling for member in members}) == 1:
            shared = SharedProjection(members)
            for place, member in enumerate(members):
                member.shared, member.place = shared, place


def fuse_gates(modules: Iterable[nn.Module]) -> Callable[[], None]:
    """Gives gated MLPs whose two linears share a projection the fused form; returns what puts them back."""
    units = {module: unit for module in modules if (unit := _gated_unit(module)) is not None}
    return replace_forward(units, _forward)


def gated_mlp_kind(module: Any) -> str | None:
    """The activation, one of `GATES`, of an MLP that is down(act(gate) * up) and nothing else; None for other modules."""
    forward = type(module).forward
    if not isinstance(forward, FunctionType) or not set(forward.__code__.co_names) >= GATED_PARTS:
        return None
    if "forward" in vars(module) or not all(hasattr(module, part) for part in GATED_PARTS):
        return None
    if not _is_plainly_gated(module):
        return None
    points = torch.linspace(-8, 8, TRIAL_POINTS)
    own = module.act_fn(points)
    return next((kind for kind in GATES if torch.allclose(activate(points, kind), own, atol=1e-6)), None)


def _gated_unit(module: Any) -> GatedUnit | None:
    kind = gated_mlp_kind(module)
    if kind is None:
        return None
    gate, up = (fast_linear_of(m) for m in (module.gate_proj, module.up_proj))
    if gate is None or up is None or gate.shared is None or gate.shared.members != [gate, up]:
        return None
    if gate.lora_b is None or up.lora_b is None or (gate.b.dtype, gate.b.shape) != (up.b.dtype, up.b.shape):
        return None
    return GatedUnit(gate, up, gate.shared, kind)


def _is_plainly_gated(module: Any) -> bool:
    """Whether the MLP's own forward, with functions in place of its linears, is down(act(gate) * up) and nothing else."""
    parts = SimpleNamespace(
        gate_proj=lambda x: 1.25 * x + 0.1,
        up_proj=lambda x: 0.75 * x - 0.2,
        down_proj=lambda x: -1.5 * x + 0.3,
        act_fn=module.act_fn,
    )
    x = torch.linspace(-3, 3, 64)
    try:
        found = type(module).forward(parts, x)
    except Exception:  # it asks for more than its parts or another shape, and says so in a way of its own
        return False
    expected = parts.down_proj(parts.act_fn(parts.gate_proj(x)) * parts.up_proj(x))
    return isinstance(found, Tensor) and torch.equal(found, expected)
