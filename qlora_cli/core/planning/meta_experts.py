"""Meta kernels of experts in 4 bits, plain and fused: what they keep for the backward pass, and allocate on the way.

The moments of the fused ones are those of `kernels.experts.layer`, whose ops a test runs beside them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qlora_cli.core.experts.four_bit_experts import FourBitExperts
from qlora_cli.core.experts.fused_experts import FusedExperts
from qlora_cli.core.experts.layout import ExpertWeight
from qlora_cli.core.experts.stack import bytes_at_once
from qlora_cli.core.planning.meta_ops import FixedBytes, LiveBytes
from qlora_cli.kernels.experts.operands import Lora, Routing, is_scattered
from qlora_cli.kernels.grouped_mm import tiles_are_faster


class ExpertValues(FixedBytes):
    """Bytes of unpacked experts, as many as are multiplied at once.

    Attributes:
        in_8_bits: Whether they are multiplied so, with the codes of their rows beside them.
    """

    in_8_bits = False

    @classmethod
    def of(cls, weight: ExpertWeight, itemsize: int, *, in_8_bits: bool = False) -> "ExpertValues":
        """Of a stack in a dtype of so many bytes, or in 8 bits."""
        values = cls(bytes_at_once(weight, 1 if in_8_bits else itemsize))
        values.in_8_bits = in_8_bits
        return values

    def codes(self, like: Tensor, rows: int, size: int) -> tuple[Tensor, ...]:
        """The codes of so many rows, and a scale for each, where there are such."""
        if not self.in_8_bits:
            return ()
        return like.new_empty(rows, size, dtype=torch.uint8), like.new_empty(rows, dtype=torch.float32)


class ExpertProduct(torch.autograd.Function):
    """`experts.grouped_product.packed_product`: keeps nothing, and dequantises experts in both passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, out_features: int, values: ExpertValues, live: LiveBytes) -> Tensor:
        ctx.values, ctx.live, ctx.in_shape = values, live, x.shape
        y = x.new_empty(x.shape[0], out_features)
        live.mark(values)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x = gradients[0].new_empty(ctx.in_shape)
        ctx.live.mark(ctx.values)
        return x, None, None, None


@dataclass(frozen=True)
class ExpertNotes:
    """Who is told of what experts do.

    Attributes:
        live: What counts at this moment.
        read: Told which tensors a layer that is compiled keeps.
        moment: Told of a moment of its backward pass, the scratch memory and what is there beside what is kept.
        last: Experts that ran, behind which nothing was saved so far.
    """

    live: Callable[[], LiveBytes]
    read: Callable[..., None]
    moment: Callable[[int, int], None]
    last: list["TracedExperts"] = field(default_factory=list)

    def saved(self, tensor: Tensor) -> Tensor:
        """Told of what a layer that keeps everything saves, as `saved_tensors_hooks` tell it."""
        self.last.clear()
        return tensor

    def settle(self) -> None:
        """A layer is past: a repetition of its forward pass has no use for what the last experts gave, as the engine finds."""
        for experts in self.last:
            experts.output_unused_in_recompute = True


class _Repetition:
    """The `step` of traced experts: what runs within a backward pass is a repetition."""

    @property
    def recomputing(self) -> bool:
        return torch._C._current_graph_task_id() != -1


def plain_product(module: FourBitExperts, notes: ExpertNotes) -> Callable[..., Tensor]:
    """The product of rows with experts, their adapter and bias, as `FourBitExperts.product` makes it on a card."""

    def product(name: str, x: Tensor, routing: Any, expert_ids: Tensor) -> Tensor:
        weight = module.weight_of(name)
        result = ExpertProduct.apply(x, weight.rows, ExpertValues.of(weight, x.element_size()), notes.live())
        if (lora := module.lora_of(name)) is not None:
            first, second = lora.factors(weight, x.dtype)
            result = result + lora.scaling * ((x @ first[0]) @ second[0])
        if weight.bias is not None:
            result = result + getattr(module, weight.bias)[expert_ids]
        notes.read(x, result)  # plain experts are not compiled
        return result

    return product


@dataclass(eq=False)
class TracedExperts(FusedExperts):
    """Fused experts on the meta device."""

    notes: Any = None

    def __post_init__(self) -> None:
        self.step = _Repetition()

    def route(self, index: Tensor, experts: int) -> Routing:
        """Tables of the right size."""
        source, back, expert = (index.new_empty(index.numel(), dtype=torch.int32) for _ in range(3))
        return Routing(source, back, expert, index.new_empty(experts, dtype=torch.int32), index.shape[1])

    def multiply_up(self, x: Tensor, routing: Routing, weight: Any, lora: Lora | None) -> Tensor:
        """The first product."""
        values = ExpertValues.of(self.up[0], x.element_size(), in_8_bits=weight.stack_scale is not None)
        rows = _Up.apply(x, *routing, *_factors(lora), self.up[0].rows, values, self.notes.live())
        pairs, row_bytes = len(rows), x.element_size() * x.shape[1]
        self.notes.read(*routing[:4], rows, *(() if lora is None else (x,)))
        self.notes.moment(values, rows.nbytes + pairs * row_bytes + rows.numel() * values.in_8_bits)
        return rows

    def multiply_down(
        self, rows: Tensor, weights: Tensor, routing: Routing, weight: Any, lora: Lora | None, **how: Any
    ) -> Tensor:
        """The gate and the second product."""
        layout = self.down[0]
        values = ExpertValues.of(layout, rows.element_size(), in_8_bits=weight.stack_scale is not None)
        gated, needed = how["how"].kind != "none", how["output_needed"]
        answer = _Down.apply(
            rows, weights, *routing, *_factors(lora), how["bias"], layout, gated, needed, values, self.notes.live()
        )
        self.notes.last.append(self)
        below = len(rows) * rows.element_size() * layout.columns
        above = _expanded(rows, len(rows), layout.rows)
        expanded_bytes = 0 if above is None else above.nbytes
        self.notes.read(rows, weights)
        self.notes.moment(values, below + expanded_bytes + answer.numel() * values.in_8_bits)
        self.notes.moment(0, below + rows.nbytes + (below if gated and lora is not None else 0))
        return answer


def _expanded(like: Tensor, pairs: int, size: int) -> Tensor | None:
    """Rows of the places, where products are the library's: our own read them through their tokens."""
    by_library = torch.cuda.is_available() and not tiles_are_faster(torch.device("cuda"))
    return like.new_empty(pairs, size) if by_library else None


def _arranged(matrices: Tensor | None, like: Tensor, pairs: int) -> Tensor | None:
    """An adapter's matrices laid out anew for so many rows."""
    return like.new_empty(matrices.shape) if matrices is not None and is_scattered(matrices, pairs) else None


def _gradient(matrices: Tensor, pairs: int) -> Tensor:
    """Of an adapter's matrices, from a copy where they are laid out anew for so many rows."""
    gradient = matrices.new_empty(matrices.shape)
    copy = _arranged(matrices, matrices, pairs)
    del copy
    return gradient


def _factors(lora: Lora | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if lora is None else (lora.first, lora.second)


class _Up(torch.autograd.Function):
    """`qlora::experts_up`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        source: Tensor,
        back: Tensor,
        expert: Tensor,
        ends: Tensor,
        choices: int,
        first: Tensor | None,
        second: Tensor | None,
        out_features: int,
        values: ExpertValues,
        live: LiveBytes,
    ) -> Tensor:
        pairs = len(source)
        projected = None if first is None else x.new_empty(pairs, first.shape[1])
        spread, arranged = _expanded(x, pairs, x.shape[1]), _arranged(second, x, pairs)
        codes = values.codes(x, *x.shape)
        y = x.new_empty(pairs, out_features)
        live.mark(values)
        del spread, arranged, codes
        ctx.save_for_backward(None if first is None else x, projected, source, back, expert, ends, first, second)
        ctx.in_shape, ctx.values, ctx.live = x.shape, values, live
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient, (_, projected, *_, first, second) = gradients[0], ctx.saved_tensors
        of_adapter: tuple = (None, None)
        of_x, of_projected, unused = None, None, None
        if first is not None:
            unused = gradient.new_empty(projected.shape)  # zeros that autograd makes for the op's second output
            of_projected = gradient.new_empty(projected.shape)
            of_adapter = tuple(_gradient(factor, len(gradient)) for factor in (first, second))
        if ctx.needs_input_grad[0]:
            arranged, codes = _arranged(first, gradient, len(gradient)), ctx.values.codes(gradient, *gradient.shape)
            spread = gradient.new_empty(len(gradient), ctx.in_shape[1])
            ctx.live.mark(ctx.values)
            del arranged, codes
            of_x = gradient.new_empty(ctx.in_shape)
            del spread
        del of_projected, unused
        return of_x, None, None, None, None, None, *of_adapter, None, None, None


class _Down(torch.autograd.Function):
    """`qlora::experts_down`, the gate in it."""

    @staticmethod
    def forward(
        ctx: Any,
        given: Tensor,
        weights: Tensor,
        source: Tensor,
        back: Tensor,
        expert: Tensor,
        ends: Tensor,
        choices: int,
        first: Tensor | None,
        second: Tensor | None,
        bias: Tensor | None,
        layout: ExpertWeight,
        gated: bool,
        needed: bool,
        values: ExpertValues,
        live: LiveBytes,
    ) -> Tensor:
        pairs = len(source)
        # What is gated becomes codes as it is made, which stay, and is not kept where no adapter asks for it; other rows
        # have theirs for the product alone.
        own = values.codes(given, pairs, layout.columns) if needed else ()
        inner = (
            given.new_empty(pairs, layout.columns) if gated and (first is not None or (needed and not own)) else None
        )
        projected = None if first is None else given.new_empty(pairs, first.shape[1])
        found = given.new_empty(pairs, layout.rows) if needed else None
        arranged = _arranged(second, given, pairs) if needed else None
        if needed:
            live.mark(values)
        del arranged
        own = own if gated else ()
        answer = given.new_empty(pairs // choices, layout.rows)
        del inner, found, own
        ctx.save_for_backward(given, weights, projected, source, back, expert, ends, first, second)
        ctx.layout, ctx.gated, ctx.has_bias, ctx.values, ctx.live = layout, gated, bias is not None, values, live
        return answer

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient = gradients[0]
        given, weights, projected, source, *_, first, second = ctx.saved_tensors
        pairs = len(source)
        unused = None if first is None else gradient.new_empty(projected.shape)  # as above
        dots = gradient.new_empty(pairs, dtype=torch.float32) if ctx.has_bias else None
        of_projected = None if first is None else gradient.new_empty(projected.shape)
        above, arranged = _expanded(gradient, pairs, ctx.layout.rows), _arranged(first, gradient, pairs)
        below, codes = gradient.new_empty(pairs, ctx.layout.columns), ctx.values.codes(gradient, *gradient.shape)
        ctx.live.mark(ctx.values)
        del above, arranged, codes
        of_given, of_weights = given.new_empty(given.shape), weights.new_empty(weights.shape)
        gated = gradient.new_empty(below.shape) if ctx.gated and first is not None else None
        of_adapter: tuple = (None, None)
        if first is not None:
            of_adapter = tuple(_gradient(factor, pairs) for factor in (first, second))
        del dots, below, of_projected, unused, gated
        return of_given, of_weights, None, None, None, None, None, *of_adapter, *(None,) * 6
