"""The two halves of a layer of 4-bit experts as ops: tokens to the rows of their experts, and these to tokens again.

Between forward and backward pass the first half keeps its input, the second what the first gave and no row more: the
gradient of a routing weight is <W^T g, h> rather than <g, W h>, and what was gated is gated again. Opaque to the
compiler, of static shapes for every routing, and never waiting for the device.
"""

from typing import Any

import torch
from torch import Tensor

from qlora_cli.kernels.experts import low_rank, rows
from qlora_cli.kernels.experts.grouped import multiply, multiply_rounded, rounds
from qlora_cli.kernels.experts.operands import NO_GATE, Gate, Lora, Routing, Update
from qlora_cli.kernels.experts.routing import route
from qlora_cli.kernels.weights import FrozenWeight

_Tensor = Tensor | None


@torch.library.custom_op("qlora::experts_route", mutates_args=())
def _route_op(ids: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return route(ids, experts)[:4]


@_route_op.register_fake
def _(ids: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    source, back, expert = (ids.new_empty(ids.numel(), dtype=torch.int32) for _ in range(3))
    return source, back, expert, ids.new_empty(experts, dtype=torch.int32)


def route_tokens(ids: Tensor, experts: int) -> Routing:
    """As `routing.route`, for code that is compiled."""
    source, back, expert, ends = torch.ops.qlora.experts_route(ids, experts)
    return Routing(source, back, expert, ends, ids.shape[1])


@torch.library.custom_op("qlora::experts_up", mutates_args=())
def _up_op(
    x: Tensor,
    source: Tensor,
    back: Tensor,
    expert: Tensor,
    ends: Tensor,
    choices: int,
    first: _Tensor,
    second: _Tensor,
    scaling: float,
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    nested_absmax: _Tensor,
    nested_code: _Tensor,
    offset: _Tensor,
    stack_scale: _Tensor,
    unpacked: _Tensor,
    turned: _Tensor,
    matrix_rows: int,
    columns: int,
    nested_blocksize: int,
) -> tuple[Tensor, Tensor]:
    routing = Routing(source, back, expert, ends, choices)
    tensors = (packed, absmax, code, nested_absmax, nested_code, offset, stack_scale, unpacked, turned)
    weight = _weight(ends, tensors, matrix_rows, columns, nested_blocksize)
    x = x.contiguous()
    if first is None or second is None:
        return multiply(x, weight, ends, gathered=routing), x.new_empty(0)
    projected = low_rank.project(x, first, ends, scaling, source, choices)
    return multiply(x, weight, ends, gathered=routing, update=Update(projected, second)), projected


@_up_op.register_fake
def _(x: Tensor, source: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    first, matrix_rows = rest[4], rest[16]
    pairs = source.shape[0]
    return x.new_empty(pairs, matrix_rows), x.new_empty(0) if first is None else x.new_empty(pairs, first.shape[1])


@torch.library.custom_op("qlora::experts_up_backward", mutates_args=())
def _up_backward_op(
    grad: Tensor,
    x: _Tensor,
    projected: _Tensor,
    source: Tensor,
    back: Tensor,
    expert: Tensor,
    ends: Tensor,
    first: _Tensor,
    second: _Tensor,
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    nested_absmax: _Tensor,
    nested_code: _Tensor,
    offset: _Tensor,
    stack_scale: _Tensor,
    unpacked: _Tensor,
    turned: _Tensor,
    choices: int,
    scaling: float,
    matrix_rows: int,
    columns: int,
    nested_blocksize: int,
    needs_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    routing = Routing(source, back, expert, ends, choices)
    tensors = (packed, absmax, code, nested_absmax, nested_code, offset, stack_scale, unpacked, turned)
    weight = _weight(ends, tensors, matrix_rows, columns, nested_blocksize)
    of_x, of_first, of_second = (grad.new_empty(0) for _ in range(3))
    update = None
    if first is not None and second is not None and x is not None and projected is not None:
        update = Update(low_rank.project(grad, second, ends, scaling), first)
        of_first = low_rank.outer_products(update.projected, x.contiguous(), routing, first, gathered=True)
        of_second = low_rank.outer_products(projected, grad, routing, second)
    if needs_x:
        of_x = rows.join(multiply(grad, weight, ends, backward=True, update=update), routing)
    return of_x, of_first, of_second


@_up_backward_op.register_fake
def _(grad: Tensor, x: _Tensor, projected: _Tensor, source: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    first, second, choices, columns, needs_x = rest[3], rest[4], rest[14], rest[17], rest[19]
    of_x = grad.new_empty(source.shape[0] // choices, columns) if needs_x else grad.new_empty(0)
    if first is None or second is None:
        return of_x, grad.new_empty(0), grad.new_empty(0)
    return of_x, torch.empty_like(first), torch.empty_like(second)


def _save_up(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, source, back, expert, ends, choices, first, second, scaling, *weight = inputs
    adapted = first is not None
    ctx.mark_non_differentiable(output[1])
    tables = (source, back, expert, ends, first, second, *weight[:9])
    ctx.save_for_backward(x if adapted else None, output[1] if adapted else None, *tables)
    ctx.numbers = (choices, scaling, *weight[9:])


def _differentiate_up(ctx: Any, grad: Tensor, _: Any) -> tuple:
    needs_x = ctx.needs_input_grad[0]
    saved = ctx.saved_tensors  # once: recomputation hands them out a single time
    of_x, of_first, of_second = torch.ops.qlora.experts_up_backward(grad.contiguous(), *saved, *ctx.numbers, needs_x)
    adapted = saved[6] is not None
    given = (of_first, of_second) if adapted else (None, None)
    return (of_x if needs_x else None, *(None,) * 5, *given, *(None,) * 13)


_up_op.register_autograd(_differentiate_up, setup_context=_save_up)


@torch.library.custom_op("qlora::experts_down", mutates_args=())
def _down_op(
    given: Tensor,
    weights: Tensor,
    source: Tensor,
    back: Tensor,
    expert: Tensor,
    ends: Tensor,
    choices: int,
    first: _Tensor,
    second: _Tensor,
    scaling: float,
    up_bias: _Tensor,
    bias: _Tensor,
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    nested_absmax: _Tensor,
    nested_code: _Tensor,
    offset: _Tensor,
    stack_scale: _Tensor,
    unpacked: _Tensor,
    turned: _Tensor,
    matrix_rows: int,
    columns: int,
    nested_blocksize: int,
    kind: str,
    limit: float | None,
    shift: float,
    slope: float,
    interleaved: bool,
    output_needed: bool,
) -> tuple[Tensor, Tensor]:
    routing = Routing(source, back, expert, ends, choices)
    tokens = source.shape[0] // choices
    if not output_needed and first is None:
        return given.new_empty(tokens, matrix_rows), given.new_empty(0)
    tensors = (packed, absmax, code, nested_absmax, nested_code, offset, stack_scale, unpacked, turned)
    weight = _weight(ends, tensors, matrix_rows, columns, nested_blocksize)
    given = given.contiguous()
    gated: _Tensor = given
    rounded = None
    if kind != "none":
        how = Gate(kind, limit, shift, slope, interleaved)
        in_8_bits = output_needed and rounds(len(given), weight, len(ends))
        gated, rounded = rows.gate(
            given, routing, how, up_bias, keep=first is not None or not in_8_bits, rounded=in_8_bits
        )
    projected, update = given.new_empty(0), None
    if first is not None and second is not None and gated is not None:
        projected = low_rank.project(gated, first, ends, scaling)
        update = Update(projected, second)
    if not output_needed:
        return given.new_empty(tokens, matrix_rows), projected
    if rounded is not None:
        found = multiply_rounded(rounded, given.dtype, weight, ends, update=update)
    else:
        assert gated is not None
        found = multiply(gated, weight, ends, update=update)
    return rows.join(found, routing, weights.contiguous(), bias), projected


@_down_op.register_fake
def _(given: Tensor, weights: Tensor, source: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    choices, first, matrix_rows = rest[3], rest[4], rest[18]
    pairs = source.shape[0]
    projected = given.new_empty(0) if first is None else given.new_empty(pairs, first.shape[1])
    return given.new_empty(pairs // choices, matrix_rows), projected


@torch.library.custom_op("qlora::experts_down_backward", mutates_args=())
def _down_backward_op(
    grad: Tensor,
    given: Tensor,
    weights: Tensor,
    projected: _Tensor,
    source: Tensor,
    back: Tensor,
    expert: Tensor,
    ends: Tensor,
    first: _Tensor,
    second: _Tensor,
    up_bias: _Tensor,
    bias: _Tensor,
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    nested_absmax: _Tensor,
    nested_code: _Tensor,
    offset: _Tensor,
    stack_scale: _Tensor,
    unpacked: _Tensor,
    turned: _Tensor,
    choices: int,
    scaling: float,
    matrix_rows: int,
    columns: int,
    nested_blocksize: int,
    kind: str,
    limit: float | None,
    shift: float,
    slope: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    routing = Routing(source, back, expert, ends, choices)
    tensors = (packed, absmax, code, nested_absmax, nested_code, offset, stack_scale, unpacked, turned)
    weight = _weight(ends, tensors, matrix_rows, columns, nested_blocksize)
    weights = weights.contiguous()
    dots = None if bias is None else rows.dots(grad, routing, bias)
    update = None
    if first is not None and second is not None:
        update = Update(low_rank.project(grad, second, ends, scaling, source, choices), first)
    below = multiply(grad, weight, ends, backward=True, gathered=routing, update=update)
    how = Gate(kind, limit, shift, slope, interleaved)
    of_given, of_weights, gated = rows.gate_backward(
        below, given.contiguous(), routing, how, weights, up_bias, dots, keep=first is not None
    )
    of_first, of_second = grad.new_empty(0), grad.new_empty(0)
    if first is not None and second is not None and update is not None and projected is not None:
        assert gated is not None
        of_first = low_rank.outer_products(update.projected, gated, routing, first, weights=weights)
        of_second = low_rank.outer_products(projected, grad, routing, second, gathered=True, weights=weights)
    return of_given, of_weights, of_first, of_second


@_down_backward_op.register_fake
def _(grad: Tensor, given: Tensor, weights: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    first, second = rest[5], rest[6]
    found = torch.empty_like(given).contiguous(), torch.empty_like(weights).contiguous()
    if first is None or second is None:
        return *found, grad.new_empty(0), grad.new_empty(0)
    return *found, torch.empty_like(first), torch.empty_like(second)


def _save_down(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    given, weights, *tables, choices, first, second, scaling, up_bias, bias = inputs[:12]
    weight, numbers = inputs[12:21], inputs[21:29]
    ctx.mark_non_differentiable(output[1])
    projected = output[1] if first is not None else None
    ctx.save_for_backward(given, weights, projected, *tables, first, second, up_bias, bias, *weight)
    ctx.numbers = (choices, scaling, *numbers)


def _differentiate_down(ctx: Any, grad: Tensor, _: Any) -> tuple:
    saved = ctx.saved_tensors  # once: recomputation hands them out a single time
    of_given, of_weights, of_first, of_second = torch.ops.qlora.experts_down_backward(
        grad.contiguous(), *saved, *ctx.numbers
    )
    given = (of_first, of_second) if saved[7] is not None else (None, None)
    of_weights = of_weights if ctx.needs_input_grad[1] else None
    return (of_given, of_weights, *(None,) * 5, *given, *(None,) * 21)


_down_op.register_autograd(_differentiate_down, setup_context=_save_down)


def _weight(
    ends: Tensor, tensors: tuple[_Tensor, ...], matrix_rows: int, columns: int, nested_blocksize: int
) -> FrozenWeight:
    packed, absmax, code, nested_absmax, nested_code, offset, stack_scale, unpacked, turned = tensors
    dense, codes = (unpacked, None) if turned is None else (None, unpacked)
    stored = (dense, packed, absmax, code, nested_absmax, nested_code, offset)
    in_8_bits = {"codes": codes, "turned_codes": turned, "stack_scale": stack_scale}
    return FrozenWeight(len(ends) * matrix_rows, columns, *stored, 64, nested_blocksize, **in_8_bits)


def _parts(weight: FrozenWeight, experts: int) -> tuple:
    unpacked = weight.dense if weight.codes is None else weight.codes
    numbers = weight.rows // experts, weight.columns, weight.nested_blocksize
    return (*weight[3:9], weight.stack_scale, unpacked, weight.turned_codes, *numbers)


def up(x: Tensor, routing: Routing, weight: FrozenWeight, lora: Lora | None = None) -> Tensor:
    """Rows of the experts that tokens go to, by each one's first matrix; differentiable in x and the adapter.

    Args:
        x: (tokens, in) in the compute dtype.
        routing: Of the tokens.
        weight: Of all experts, (experts * out, in), packed in blocks of 64.
        lora: Its adapter; gradients are in the dtype of its matrices.

    Returns:
        (pairs, out), sorted by expert; rows of no expert are undefined.
    """
    adapter = (None, None, 1.0) if lora is None else lora
    return torch.ops.qlora.experts_up(x, *routing, *adapter, *_parts(weight, len(routing.ends)))[0]


def down(
    given: Tensor,
    weights: Tensor,
    routing: Routing,
    weight: FrozenWeight,
    lora: Lora | None = None,
    *,
    how: Gate = NO_GATE,
    up_bias: Tensor | None = None,
    bias: Tensor | None = None,
    output_needed: bool = True,
) -> Tensor:
    """Tokens' answers from the rows of their experts: gated, by each one's second matrix, weighted and summed.

    Differentiable in the rows, the weights and the adapter.

    Args:
        given: (pairs, in), or (pairs, 2 * in) where they are to be gated, in the compute dtype.
        weights: (tokens, choices), of any floating dtype.
        routing: Of the tokens.
        weight: Of all experts, (experts * out, in), packed in blocks of 64.
        lora: Its adapter.
        how: The gate.
        up_bias: (experts, 2 * in), added before the gate.
        bias: (experts, out), added to an expert's answer.
        output_needed: False where a recomputation needs only what the backward pass saves.

    Returns:
        (tokens, out).
    """
    adapter = (None, None, 1.0) if lora is None else lora
    parts = _parts(weight, len(routing.ends))
    return torch.ops.qlora.experts_down(given, weights, *routing, *adapter, up_bias, bias, *parts, *how, output_needed)[
        0
    ]
