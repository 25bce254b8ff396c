"""A norm or a gate and the first half of the adapter that reads it, in one launch, for a few tokens.

Each program computes what it needs of the row again, which takes less time than another launch; one of those that share
a span of columns writes it down for the product that follows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlora_cli.kernels.decode.gemv import APART_TOKENS, StackedAdapter, span_of
from qlora_cli.kernels.decode.overlap import follow, overlaps
from qlora_cli.kernels.decode.pointwise import weigh
from qlora_cli.kernels.triton.activations import activate

RANKS = 4  # rows of A a program: fewer read the row too often, more wait for A


@triton.jit
def _load_a(a, ranks, size, SPAN: tl.constexpr, RANKS: tl.constexpr):
    """A program's rows of A and columns of them, which of these there are, and A there."""
    rank = tl.program_id(0) * RANKS + tl.arange(0, RANKS)
    column = tl.program_id(1) * SPAN + tl.arange(0, SPAN)
    inside = column < size
    used = (rank[:, None] < ranks) & inside[None, :]
    return rank, column, inside, tl.load(a + rank[:, None] * size + column[None, :], mask=used, other=0.0)


@triton.jit
def _store_projected(down, values, scaling, out, tokens, ranks, rank):
    """One span of scaling A x of one token."""
    total = tl.sum(down.to(tl.float32) * values.to(tl.float32)[None, :], 1)
    total *= tl.load(scaling + rank, mask=rank < ranks, other=0.0)
    place = (tl.program_id(1) * tokens + tl.program_id(2)) * ranks + rank
    tl.store(out + place, total, mask=rank < ranks)


@triton.jit
def _normalise_and_project(
    x,
    y,
    weight,
    total,
    normed,
    a,
    scaling,
    out,
    tokens,
    ranks,
    epsilon,
    offset,
    SIZE: tl.constexpr,
    SIZE_ROOM: tl.constexpr,
    SPAN: tl.constexpr,
    RANKS: tl.constexpr,
    ROUND_FIRST: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    rank, column, inside, down = _load_a(a, ranks, SIZE, SPAN, RANKS)
    factor = tl.load(weight + column, mask=inside, other=0.0)
    if OVERLAP:
        follow()
    start = tl.program_id(2).to(tl.int64) * SIZE
    place = tl.arange(0, SIZE_ROOM)
    whole = tl.load(x + start + place, mask=place < SIZE, other=0.0).to(tl.float32)
    whole += tl.load(y + start + place, mask=place < SIZE, other=0.0).to(tl.float32)
    whole = whole.to(x.dtype.element_ty).to(tl.float32)
    shrink = tl.rsqrt(tl.sum(whole * whole, 0) / SIZE + epsilon)
    values = tl.load(x + start + column, mask=inside, other=0.0).to(tl.float32)
    values += tl.load(y + start + column, mask=inside, other=0.0).to(tl.float32)
    values = values.to(x.dtype.element_ty)
    result = weigh(values.to(tl.float32) * shrink, factor, offset, x, ROUND_FIRST).to(x.dtype.element_ty)
    first = inside & (column * 0 + tl.program_id(0) == 0)
    tl.store(total + start + column, values, mask=first)
    tl.store(normed + start + column, result, mask=first)
    _store_projected(down, result, scaling, out, tokens, ranks, rank)


@triton.jit
def _gate_and_project(
    gate,
    up,
    gated,
    a,
    scaling,
    out,
    gate_row,
    up_row,
    tokens,
    size,
    ranks,
    SPAN: tl.constexpr,
    RANKS: tl.constexpr,
    KIND: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    rank, column, inside, down = _load_a(a, ranks, size, SPAN, RANKS)
    if OVERLAP:
        follow()
    row = tl.program_id(2).to(tl.int64)
    x = tl.load(gate + row * gate_row + column, mask=inside, other=0.0)
    y = tl.load(up + row * up_row + column, mask=inside, other=0.0)
    # Rounded before it is multiplied, as where the steps are launched one by one.
    result = activate(x.to(tl.float32), KIND).to(x.dtype).to(tl.float32) * y.to(tl.float32)
    result = result.to(x.dtype)
    tl.store(gated + row * size + column, result, mask=inside & (column * 0 + tl.program_id(0) == 0))
    _store_projected(down, result, scaling, out, tokens, ranks, rank)


def _divide(adapter: StackedAdapter, tokens: int) -> tuple[tuple[int, int, int], Tensor]:
    """Programs, and room for (parts, tokens, ranks) of scaling A x.

    Raises:
        ValueError: Too many tokens.
    """
    ranks, columns = adapter.a.shape
    if tokens > APART_TOKENS:
        raise ValueError(f"{tokens} tokens, and no more than {APART_TOKENS} have their projection fused")
    parts = triton.cdiv(columns, span_of(columns))
    out = torch.empty(parts, tokens, ranks, dtype=torch.float32, device=adapter.a.device)
    return (triton.cdiv(ranks, RANKS), parts, tokens), out


def normalise_and_project(
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    epsilon: float,
    adapter: StackedAdapter,
    *,
    offset: float = 0.0,
    round_first: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """`add_and_rms_norm`, and what `gemv.project` makes of the second result, but for rounding.

    Args:
        x: (..., size), contiguous, at most APART_TOKENS tokens.
        y: Like `x`.
        weight: As for `rms_norm`, like `epsilon`, `offset` and `round_first`.
        adapter: Reads the norm; in the dtype of x.

    Returns:
        The sum and its norm, (..., size), and fp32 (parts, tokens, ranks).

    Raises:
        ValueError: Too many tokens.
    """
    size, total, normed = x.shape[-1], torch.empty_like(x), torch.empty_like(x)
    tokens = x.numel() // size
    programs, out = _divide(adapter, tokens)
    with torch.cuda.device_of(x):
        _normalise_and_project[programs](
            x,
            y,
            weight,
            total,
            normed,
            adapter.a,
            adapter.scaling,
            out,
            tokens,
            out.shape[2],
            epsilon,
            offset,
            SIZE=size,
            SIZE_ROOM=triton.next_power_of_2(size),
            SPAN=span_of(size),
            RANKS=RANKS,
            ROUND_FIRST=round_first,
            OVERLAP=overlaps(x.device),
            num_warps=4,
            launch_pdl=overlaps(x.device),
        )
    return total, normed, out


def gate_and_project(gate: Tensor, up: Tensor, kind: str, adapter: StackedAdapter) -> tuple[Tensor, Tensor]:
    """`pointwise.gate`, and what `gemv.project` makes of it.

    Args:
        gate: (..., size), a view whose last dimension is contiguous and whose others are one row after another; at most
            APART_TOKENS rows.
        up: Like `gate`.
        kind: One of `gated.GATES`.
        adapter: Reads the result; in its dtype.

    Returns:
        (..., size), contiguous, and fp32 (parts, tokens, ranks).

    Raises:
        ValueError: Too many tokens.
    """
    gated = gate.new_empty(gate.shape)
    gate, up = gate.reshape(-1, gate.shape[-1]), up.reshape(-1, up.shape[-1])
    tokens, size = gate.shape
    programs, out = _divide(adapter, tokens)
    with torch.cuda.device_of(gate):
        _gate_and_project[programs](
            gate,
            up,
            gated,
            adapter.a,
            adapter.scaling,
            out,
            gate.stride(0),
            up.stride(0),
            tokens,
            size,
            out.shape[2],
            SPAN=span_of(size),
            RANKS=RANKS,
            KIND=kind,
            OVERLAP=overlaps(gate.device),
            num_warps=4,
            launch_pdl=overlaps(gate.device),
        )
    return gated, out
