"""Experts in 4 bits through fused kernels: the same answer as `FourBitExperts.forward`, which stays the reference.

Tokens are sorted once a layer and nothing waits for the device, so that layers may be compiled, recomputed and captured
in graphs. A gate is fused where, tried out, it is one of the known ones; any other runs between the two products.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_cli.core.experts.four_bit_experts import ExpertLora, FourBitExperts
from qlora_cli.core.experts.layout import ExpertWeight
from qlora_cli.core.experts.stack import of_this_pass
from qlora_cli.kernels.experts.operands import NO_GATE, Gate, Lora, Routing
from qlora_cli.kernels.gated import GATES, activate
from qlora_cli.kernels.weights import FrozenWeight

if importlib.util.find_spec("triton"):  # not there beside a CPU-only torch
    from qlora_cli.kernels.experts import grouped, layer

LIMITS, SLOPES = ("limit", "swiglu_limit"), ("alpha", "swiglu_alpha")  # what experts call what their gate is bound by
TRIAL_SIZE = 4001  # gates and ups, from well below any limit to well above


def plain_gate(rows: Tensor, how: Gate) -> Tensor:
    """Gated rows, (…, size), of (…, 2 * size): the reference of `rows.gate`."""
    gate, linear = (rows[..., ::2], rows[..., 1::2]) if how.interleaved else rows.chunk(2, dim=-1)
    if how.limit is not None:
        gate, linear = gate.clamp(max=how.limit), linear.clamp(-how.limit, how.limit)
    act = gate * torch.sigmoid(how.slope * gate) if how.kind == "sigmoid" else activate(gate, how.kind)
    return act * (linear + how.shift)


def find_gate(experts: FourBitExperts) -> Gate | None:
    """The gate of a module of experts, found by trying out those that there are kernels for; None for any other."""
    if not experts.expert_weights[0].name.startswith("gate"):
        return None
    limits = [getattr(experts, name) for name in LIMITS if isinstance(getattr(experts, name, None), int | float)]
    slopes = [getattr(experts, name) for name in SLOPES if isinstance(getattr(experts, name, None), int | float)]
    kinds = [(kind, 1.0) for kind in GATES] + [("sigmoid", float(slope)) for slope in slopes]
    generator = torch.Generator().manual_seed(0)
    most = 3.0 * max([2.0, *limits])
    rows = (2 * torch.rand(2, 2 * TRIAL_SIZE, generator=generator) - 1) * most
    try:
        own = experts.gated(rows)
    except (RuntimeError, TypeError, ValueError):  # it takes rows of its own size alone
        return None
    for kind, slope in kinds:
        for limit in (None, *map(float, limits)):
            for shift in (0.0, 1.0):
                for interleaved in (False, True):
                    how = Gate(kind, limit, shift, slope, interleaved)
                    found = plain_gate(rows, how)
                    if own.shape == found.shape and torch.allclose(found, own, atol=1e-5, rtol=1e-5):
                        return how
    return None


@dataclass(eq=False)
class FusedExperts:
    """What a module of experts computes with in place of its own forward.

    Attributes:
        module: The module.
        gate: Its gate, `NO_GATE` for one that it computes itself.
        up: Shape and values of the first stack; None for values that are sharded, and whole only as a layer computes.
        down: Of the second.
        step: Whose `recomputing` says that a pass is a repetition; None for never.
        output_unused_in_recompute: Whether a repetition of the forward pass can do without the output.
    """

    module: FourBitExperts
    gate: Gate
    up: tuple[ExpertWeight, FrozenWeight | None]
    down: tuple[ExpertWeight, FrozenWeight | None]
    step: Any = None
    output_unused_in_recompute: bool = False

    def __call__(self, hidden_states: Tensor, index: Tensor | None, weights: Tensor | None) -> Tensor:
        """As `FourBitExperts.forward`."""
        module = self.module
        up_layout, down_layout = self.up[0], self.down[0]
        up_weight, down_weight = (
            of_this_pass(values or module.stack(layout.name).values) for layout, values in (self.up, self.down)
        )
        x = hidden_states.to(module.compute_dtype)
        if index is None or weights is None:  # each expert's rows in turn
            each = len(x) // up_layout.experts
            index = torch.arange(len(x), device=x.device, dtype=torch.int32)[:, None] // each
            weights = torch.ones_like(index, dtype=x.dtype)
        routing = self.route(index, up_layout.experts)
        rows = self.multiply_up(x, routing, up_weight, self._lora(up_layout))
        up_bias, bias = (None if w.bias is None else getattr(module, w.bias) for w in (up_layout, down_layout))
        if self.gate.kind == "none":
            if up_bias is not None:
                rows = rows + F.pad(up_bias, (0, 0, 0, 1))[routing.expert]
            rows, up_bias = module.gated(rows), None
        answer = self.multiply_down(
            rows,
            weights,
            routing,
            down_weight,
            self._lora(down_layout),
            how=self.gate,
            up_bias=up_bias,
            bias=bias,
            output_needed=not (self.output_unused_in_recompute and self.step is not None and self.step.recomputing),
        )
        return answer.to(hidden_states.dtype)

    def take_stacks(self) -> None:
        """Takes the module's stacks as they are by now."""
        self.up, self.down = _stacks_of(self.module)

    def stay_unpacked(self, *, wanted: bool) -> None:
        """Has the stacks stay unpacked as they are multiplied, for the same answers, or not any longer."""
        module = self.module
        module.unpacked.clear()
        module.unpacked |= {  # of all, or of none where memory runs out
            weight.name: grouped.unpack(module.stack(weight.name).values, weight.experts, module.compute_dtype)
            for weight in (module.expert_weights if wanted else ())
        }
        self.take_stacks()

    def unpacked_bytes(self) -> int:
        """What they would take then."""
        itemsize, scales = self.module.compute_dtype.itemsize, self.module.scales
        return sum(w.experts * w.elements * (2 if w.name in scales else itemsize) for w in self.module.expert_weights)

    def route(self, index: Tensor, experts: int) -> Routing:
        """As `layer.route_tokens`."""
        return layer.route_tokens(index, experts)

    def multiply_up(self, x: Tensor, routing: Routing, weight: FrozenWeight, lora: Lora | None) -> Tensor:
        """As `layer.up`."""
        return layer.up(x, routing, weight, lora)

    def multiply_down(
        self, rows: Tensor, weights: Tensor, routing: Routing, weight: FrozenWeight, lora: Lora | None, **how: Any
    ) -> Tensor:
        """As `layer.down`."""
        return layer.down(rows, weights, routing, weight, lora, **how)

    def _lora(self, layout: ExpertWeight) -> Lora | None:
        lora = self.module.lora_of(layout.name)
        return None if lora is None else Lora(*_views(lora, layout), lora.scaling)


def _stacks_of(module: FourBitExperts) -> list[tuple[ExpertWeight, FrozenWeight | None]]:
    """`FusedExperts.up` and `FusedExperts.down`."""
    return [(w, None if module.is_sharded else module.stack(w.name).values) for w in module.expert_weights]


def _views(lora: ExpertLora, layout: ExpertWeight) -> tuple[Tensor, Tensor]:
    """(experts, rank, in) and (experts, rank, out), views of the parameters."""
    experts = layout.experts
    a = lora.a.view(experts, lora.a.shape[0] // experts, -1)
    b = lora.b.view(lora.b.shape[0], -1, experts).permute(2, 1, 0)
    return (b, a) if layout.adapter_swapped else (a, b)


def _forward(
    self: Any, hidden_states: Tensor, top_k_index: Any = None, top_k_weights: Any = None, **named: Any
) -> Tensor:
    """Replaces `forward` on one instance."""
    fused: FusedExperts = self.fused
    return fused(hidden_states, named.get("router_indices", top_k_index), named.get("routing_weights", top_k_weights))


def can_fuse(experts: FourBitExperts) -> bool:
    """Whether the kernels compute what a module of experts does: its answers are summed as they are."""
    return not getattr(experts, "has_post_expert_norm", False)


def fuse_experts(
    model: nn.Module, step: Any = None, kind: "Callable[..., FusedExperts]" = FusedExperts
) -> Callable[[], None]:
    """Gives every module of 4-bit experts that is covered the fused forward.

    Args:
        model: On a device that runs Triton's kernels, as `kind` needs it.
        step: See `FusedExperts`.
        kind: What makes one.

    Returns:
        What puts them back; a second call does nothing.
    """
    modules: list[Any] = [m for m in model.modules() if isinstance(m, FourBitExperts) and can_fuse(m)]
    gates: dict[type, Gate | None] = {}
    for module in modules:
        if type(module) not in gates:
            gates[type(module)] = find_gate(module)
        module.fused = kind(module, gates[type(module)] or NO_GATE, *_stacks_of(module), step)
        module.forward = MethodType(_forward, module)

    def put_back() -> None:
        for module in modules:
            del module.fused, module.forward
        modules.clear()

    return put_back
