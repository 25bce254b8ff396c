"""Rows of experts: expanded from tokens, gated, and joined to tokens again, a launch each (Triton)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlora_cli.kernels.experts.operands import Gate, Routing
from qlora_cli.kernels.float8 import LEAST_ROW, quantise_rows
from qlora_cli.kernels.triton.activations import activate, slope
from qlora_cli.kernels.triton.float8 import row_codes

COLUMNS = 2048  # most columns that a program has at once
LARGEST_ROUNDED = 8192  # most columns of a row that is rounded as it is gated


@triton.jit
def _expand(x, source, out, size, choices, COLUMNS: tl.constexpr):
    """Each place's row of its token."""
    place = tl.program_id(0).to(tl.int64)
    token = (tl.load(source + place) // choices).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    for first in range(0, size, COLUMNS):
        used = first + column < size
        value = tl.load(x + token * size + first + column, mask=used, other=0.0)
        tl.store(out + place * size + first + column, value, mask=used)


@triton.jit
def _dots(x, source, bias, expert, out, size, choices, experts, COLUMNS: tl.constexpr):
    """Of each place, the product of its token's row with its expert's bias; 0 for no expert."""
    place = tl.program_id(0).to(tl.int64)
    token = (tl.load(source + place) // choices).to(tl.int64)
    number = tl.load(expert + place).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float32)
    for first in range(0, size, COLUMNS):
        used = first + column < tl.where(number < experts, size, 0)
        value = tl.load(x + token * size + first + column, mask=used, other=0.0).to(tl.float32)
        total += value * tl.load(bias + number * size + first + column, mask=used, other=0.0).to(tl.float32)
    tl.store(out + place, tl.sum(total, 0))


@triton.jit
def _join(
    rows,
    back,
    expert,
    weights,
    bias,
    out,
    size,
    experts,
    CHOICES: tl.constexpr,
    WEIGHTED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Of each token, the (weighted) sum over its rows, in the order of its choices."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float32)
    for choice in range(CHOICES):
        pair = token * CHOICES + choice
        place = tl.load(back + pair).to(tl.int64)
        number = tl.load(expert + place).to(tl.int64)
        used = column < tl.where(number < experts, size, 0)  # none of a row of no expert
        value = tl.load(rows + place * size + column, mask=used, other=0.0).to(tl.float32)
        if HAS_BIAS:
            value += tl.load(bias + number * size + column, mask=used, other=0.0).to(tl.float32)
        if WEIGHTED:
            value *= tl.load(weights + pair).to(tl.float32)
        total += value
    tl.store(out + token * size + column, total.to(out.dtype.element_ty), mask=column < size)


@triton.jit
def _halves(rows, bias, place, number, column, used, size, INTERLEAVED: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Gate and up of some columns of a row, in fp32, with the expert's bias."""
    first = 2 * column if INTERLEAVED else column
    second = 2 * column + 1 if INTERLEAVED else size + column
    gate = tl.load(rows + place * 2 * size + first, mask=used, other=0.0).to(tl.float32)
    up = tl.load(rows + place * 2 * size + second, mask=used, other=0.0).to(tl.float32)
    if HAS_BIAS:
        gate += tl.load(bias + number * 2 * size + first, mask=used, other=0.0).to(tl.float32)
        up += tl.load(bias + number * 2 * size + second, mask=used, other=0.0).to(tl.float32)
    return gate, up, first, second


@triton.jit
def _activate(value, bend, KIND: tl.constexpr):
    if KIND == "sigmoid":
        result = value / (1 + tl.exp(-bend * value))
    else:
        result = activate(value, KIND)
    return result


@triton.jit
def _slope(value, bend, KIND: tl.constexpr):
    if KIND == "sigmoid":
        share = 1 / (1 + tl.exp(-bend * value))
        result = share * (1 + bend * value * (1 - share))
    else:
        result = slope(value, KIND)
    return result


@triton.jit
def _gate(
    rows,
    bias,
    expert,
    out,
    codes,
    scales,
    size,
    experts,
    limit,
    shift,
    bend,
    least,
    KIND: tl.constexpr,
    LIMITED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KEEP: tl.constexpr,
    CODED: tl.constexpr,
    ROUNDS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Some columns of a gated row; CODED, all of them, and their e4m3 codes, those of the row as it is rounded first."""
    place = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    number = tl.load(expert + place).to(tl.int64)
    used = column < tl.where(number < experts, size, 0)
    gate, up, _, _ = _halves(rows, bias, place, number, column, used, size, INTERLEAVED, HAS_BIAS)
    if LIMITED:
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit)
    result = (_activate(gate, bend, KIND) * (up + shift)).to(rows.dtype.element_ty)
    if KEEP:
        tl.store(out + place * size + column, result, mask=column < size)
    if CODED:
        code, scale = row_codes(tl.where(column < size, result.to(tl.float32), 0.0), least, ROUNDS)
        tl.store(codes + place * size + column, code, mask=column < size)
        tl.store(scales + place, scale)


@triton.jit
def _gate_backward(
    grad,
    rows,
    bias,
    expert,
    source,
    weights,
    dots,
    out,
    weight_out,
    gated_out,
    size,
    experts,
    limit,
    shift,
    bend,
    KIND: tl.constexpr,
    LIMITED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_DOTS: tl.constexpr,
    KEEP: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """From the gradient of a gated row, not yet weighted, those of the row and of its weight; KEEP also gives the row."""
    place = tl.program_id(0).to(tl.int64)
    number = tl.load(expert + place).to(tl.int64)
    pair = tl.load(source + place)
    weight = tl.load(weights + pair).to(tl.float32)
    total = tl.zeros((COLUMNS,), tl.float32)
    for first_column in range(0, size, COLUMNS):
        column = first_column + tl.arange(0, COLUMNS)
        inside = column < size
        used = column < tl.where(number < experts, size, 0)
        above = tl.load(grad + place * size + column, mask=used, other=0.0).to(tl.float32)
        if KIND == "none":
            value = tl.load(rows + place * size + column, mask=used, other=0.0).to(tl.float32)
            tl.store(out + place * size + column, (weight * above).to(out.dtype.element_ty), mask=inside)
        else:
            gate, up, first, second = _halves(rows, bias, place, number, column, used, size, INTERLEAVED, HAS_BIAS)
            low = gate
            passed = above * weight
            of_up = passed
            if LIMITED:
                low = tl.minimum(gate, limit)
                of_up = tl.where((up >= -limit) & (up <= limit), passed, 0.0)
                up = tl.minimum(tl.maximum(up, -limit), limit)
            act = _activate(low, bend, KIND)
            value = act * (up + shift)
            of_gate = passed * (up + shift) * _slope(low, bend, KIND)
            if LIMITED:
                of_gate = tl.where(gate <= limit, of_gate, 0.0)
            tl.store(out + place * 2 * size + first, of_gate.to(out.dtype.element_ty), mask=inside)
            tl.store(out + place * 2 * size + second, (of_up * act).to(out.dtype.element_ty), mask=inside)
        if KEEP:
            tl.store(gated_out + place * size + column, value.to(gated_out.dtype.element_ty), mask=inside)
        total += value * above
    whole = tl.sum(total, 0)
    if HAS_DOTS:
        whole += tl.load(dots + place)
    whole = tl.where(number < experts, whole, 0.0)
    tl.store(weight_out + pair, whole.to(weight_out.dtype.element_ty))


def _columns(size: int) -> int:
    return min(COLUMNS, max(16, triton.next_power_of_2(size)))


def expand(x: Tensor, routing: Routing) -> Tensor:
    """Rows of the places, (pairs, size), of those of the tokens, (tokens, size), contiguous."""
    size, pairs = x.shape[1], len(routing.source)
    out = torch.empty(pairs, size, dtype=x.dtype, device=x.device)
    with torch.cuda.device_of(x):
        _expand[(pairs,)](x, routing.source, out, size, routing.choices, COLUMNS=_columns(size))
    return out


def dots(x: Tensor, routing: Routing, bias: Tensor) -> Tensor:
    """Products of the places' rows with their experts' biases, fp32 (pairs,).

    Args:
        x: Rows of the tokens, (tokens, size), contiguous.
        routing: Places.
        bias: (experts, size).
    """
    size, pairs = x.shape[1], len(routing.source)
    out = torch.empty(pairs, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _dots[(pairs,)](
            x,
            routing.source,
            bias,
            routing.expert,
            out,
            size,
            routing.choices,
            len(routing.ends),
            COLUMNS=_columns(size),
        )
    return out


def join(rows: Tensor, routing: Routing, weights: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """Of each token, the sum of its experts' rows, summed in fp32 in the order of its choices, rounded once.

    Args:
        rows: (pairs, size), contiguous; those of no expert are not read.
        routing: Places.
        weights: (tokens, choices), factors of the rows; None for 1.
        bias: (experts, size), added to the rows.

    Returns:
        (tokens, size).
    """
    size, tokens = rows.shape[1], len(routing.source) // routing.choices
    out = torch.empty(tokens, size, dtype=rows.dtype, device=rows.device)
    columns = min(1024, _columns(size))
    with torch.cuda.device_of(rows):
        _join[(tokens, triton.cdiv(size, columns))](
            rows,
            routing.back,
            routing.expert,
            weights,
            bias,
            out,
            size,
            len(routing.ends),
            CHOICES=routing.choices,
            WEIGHTED=weights is not None,
            HAS_BIAS=bias is not None,
            COLUMNS=columns,
        )
    return out


def gate(
    rows: Tensor, routing: Routing, how: Gate, bias: Tensor | None = None, *, keep: bool = True, rounded: bool = False
) -> tuple[Tensor | None, tuple[Tensor, Tensor] | None]:
    """Gated rows, (pairs, size), of (pairs, 2 * size), in fp32, rounded once; zeros for places of no expert.

    Args:
        rows: Contiguous.
        routing: Places.
        how: Any but `NO_GATE`.
        bias: (experts, 2 * size), added to the rows first.
        keep: Whether they are the first result.
        rounded: Whether what `float8.quantise_rows` makes of them is the second.
    """
    pairs, size = rows.shape[0], rows.shape[1] // 2
    coded = rounded and size <= LARGEST_ROUNDED
    out = torch.empty(pairs, size, dtype=rows.dtype, device=rows.device) if keep or not coded else None
    codes = torch.empty(pairs, size, dtype=torch.float8_e4m3fn, device=rows.device) if coded else None
    scales = torch.empty(pairs, 1, dtype=torch.float32, device=rows.device) if coded else None
    columns = max(16, triton.next_power_of_2(size)) if coded else min(1024, _columns(size))
    with torch.cuda.device_of(rows):
        _gate[(pairs, triton.cdiv(size, columns))](
            rows,
            bias,
            routing.expert,
            out,
            codes,
            scales,
            size,
            len(routing.ends),
            *_numbers(how),
            LEAST_ROW,
            **_constants(how, bias),
            KEEP=out is not None,
            CODED=coded,
            ROUNDS=not rows.is_cuda,
            COLUMNS=columns,
            num_warps=4 if columns <= 1024 else 8,
        )
    if codes is not None and scales is not None:
        return out, (codes, scales)
    return out, quantise_rows(out) if rounded and out is not None else None


def gate_backward(
    grad: Tensor,
    rows: Tensor,
    routing: Routing,
    how: Gate,
    weights: Tensor,
    bias: Tensor | None = None,
    dots: Tensor | None = None,
    *,
    keep: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of rows and of their weights.

    Args:
        grad: (pairs, size), of the gated rows as if their weights were 1.
        rows: What was given to `gate`; with `NO_GATE`, (pairs, size).
        routing: Places.
        how: As given to `gate`.
        weights: (tokens, choices).
        bias: As given to `gate`.
        dots: fp32 (pairs,), a further part of the weights' gradients, by places; None for none.
        keep: Whether the gated rows are the third result.

    Returns:
        Like `rows`, like `weights`, (pairs, size) or None.
    """
    size = grad.shape[1]
    out, of_weights = torch.empty_like(rows), torch.empty_like(weights, memory_format=torch.contiguous_format)
    kept = torch.empty_like(grad) if keep and how.kind != "none" else None
    with torch.cuda.device_of(rows):
        _gate_backward[(rows.shape[0],)](
            grad,
            rows,
            bias,
            routing.expert,
            routing.source,
            weights,
            dots,
            out,
            of_weights,
            kept,
            size,
            len(routing.ends),
            *_numbers(how),
            **_constants(how, bias),
            HAS_DOTS=dots is not None,
            KEEP=kept is not None,
            COLUMNS=min(1024, _columns(size)),
        )
    return out, of_weights, rows if keep and how.kind == "none" else kept


def _numbers(how: Gate) -> tuple[float, float, float]:
    return (0.0 if how.limit is None else how.limit), how.shift, how.slope


def _constants(how: Gate, bias: Tensor | None) -> dict[str, object]:
    return {
        "KIND": how.kind,
        "LIMITED": how.limit is not None,
        "INTERLEAVED": how.interleaved,
        "HAS_BIAS": bias is not None,
    }
