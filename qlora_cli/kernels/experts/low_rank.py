"""Low-rank products of rows sorted by expert with each expert's LoRA matrices, and their gradients (Triton)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlora_cli.kernels.experts.operands import Routing, is_scattered
from qlora_cli.kernels.experts.products import find_rows, most_tiles

ROWS, COLUMNS, INNER = 64, 128, 64  # of a program


@triton.jit
def _project_rows(
    x,
    matrices,
    ends,
    source,
    out,
    experts,
    inner,
    rank,
    choices,
    scale,
    expert_stride,
    rank_stride,
    inner_stride,
    ROWS: tl.constexpr,
    INNER: tl.constexpr,
    RANK: tl.constexpr,
    EXPERTS: tl.constexpr,
    GATHERED: tl.constexpr,
):
    expert, start, stop = find_rows(ends, experts, 0, experts, tl.program_id(0), ROWS, EXPERTS)
    if expert < 0:
        return
    row = start + tl.arange(0, ROWS)
    inside = row < stop
    given = row
    if GATHERED:
        given = tl.load(source + row, mask=inside, other=0) // choices
    number = tl.arange(0, RANK)
    total = tl.zeros((ROWS, RANK), tl.float32)
    base = matrices + expert.to(tl.int64) * expert_stride
    for at in range(0, inner, INNER):
        step = at + tl.arange(0, INNER)
        seen = inside[:, None] & (step < inner)[None, :]
        a = tl.load(x + given[:, None].to(tl.int64) * inner + step[None, :], mask=seen, other=0.0)
        used = (step < inner)[:, None] & (number < rank)[None, :]
        b = tl.load(base + step[:, None] * inner_stride + number[None, :] * rank_stride, mask=used, other=0.0)
        total = tl.dot(a, b.to(a.dtype), total, input_precision="ieee")
    place = row[:, None].to(tl.int64) * rank + number[None, :]
    tl.store(out + place, (total * scale).to(out.dtype.element_ty), mask=inside[:, None] & (number < rank)[None, :])


@triton.jit
def _add_rows(
    out,
    projected,
    matrices,
    ends,
    experts,
    columns,
    rank,
    expert_stride,
    rank_stride,
    column_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    bands = tl.cdiv(columns, COLUMNS)
    expert, start, stop = find_rows(ends, experts, 0, experts, tl.program_id(0) // bands, ROWS, EXPERTS)
    if expert < 0:
        return
    row = start + tl.arange(0, ROWS)
    inside = (row < stop)[:, None]
    column = (tl.program_id(0) % bands) * COLUMNS + tl.arange(0, COLUMNS)
    used = (column < columns)[None, :]
    number = tl.arange(0, RANK)
    thin = inside & (number < rank)[None, :]
    a = tl.load(projected + row[:, None].to(tl.int64) * rank + number[None, :], mask=thin, other=0.0)
    base = matrices + expert.to(tl.int64) * expert_stride
    flat = used & (number < rank)[:, None]
    b = tl.load(base + number[:, None] * rank_stride + column[None, :] * column_stride, mask=flat, other=0.0)
    place = row[:, None].to(tl.int64) * columns + column[None, :]
    total = tl.load(out + place, mask=inside & used, other=0.0).to(tl.float32)
    total = tl.dot(a, b.to(a.dtype), total, input_precision="ieee")
    tl.store(out + place, total.to(out.dtype.element_ty), mask=inside & used)


@triton.jit
def _outer_rows(
    projected,
    y,
    weights,
    ends,
    source,
    out,
    columns,
    rank,
    choices,
    expert_stride,
    rank_stride,
    column_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
    GATHERED: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    expert = tl.program_id(0)
    start = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    stop = tl.load(ends + expert)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    number = tl.arange(0, RANK)
    total = tl.zeros((RANK, COLUMNS), tl.float32)
    for first in range(start, stop, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = row < stop
        given = row
        thin = (number < rank)[:, None] & inside[None, :]
        a = tl.load(projected + row[None, :].to(tl.int64) * rank + number[:, None], mask=thin, other=0.0)
        if GATHERED or WEIGHTED:
            pair = tl.load(source + row, mask=inside, other=0)
            if WEIGHTED:
                factor = tl.load(weights + pair, mask=inside, other=0.0).to(tl.float32)
                a = (a.to(tl.float32) * factor[None, :]).to(a.dtype)
            if GATHERED:
                given = pair // choices
        used = inside[:, None] & (column < columns)[None, :]
        b = tl.load(y + given[:, None].to(tl.int64) * columns + column[None, :], mask=used, other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
    place = expert.to(tl.int64) * expert_stride + number[:, None] * rank_stride + column[None, :] * column_stride
    tl.store(out + place, total.to(out.dtype.element_ty), mask=(number < rank)[:, None] & (column < columns)[None, :])


@triton.jit
def _turn_matrices(
    matrices,
    out,
    experts,
    columns,
    expert_stride,
    rank_stride,
    column_stride,
    out_expert_stride,
    out_rank_stride,
    out_column_stride,
    COLUMNS: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """Copies (experts, rank, columns) of any strides to others: read along one dimension, written along another."""
    expert = (tl.program_id(2) * EXPERTS + tl.arange(0, EXPERTS))[:, None]
    column = (tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    number = tl.program_id(1)
    inside = (expert < experts) & (column < columns)
    given = expert.to(tl.int64) * expert_stride + number * rank_stride + column * column_stride
    place = expert.to(tl.int64) * out_expert_stride + number * out_rank_stride + column * out_column_stride
    value = tl.load(matrices + given, mask=inside, other=0.0)
    tl.store(out + place, value.to(out.dtype.element_ty), mask=inside)


def _room(rank: int) -> int:
    return max(16, triton.next_power_of_2(rank))


def arrange(matrices: Tensor, dtype: torch.dtype, rows: int) -> Tensor:
    """Matrices as so many rows are quickest multiplied with: as they are, or each expert's rows contiguous in `dtype`.

    Args:
        matrices: (experts, rank, columns), of any strides and dtype.
        dtype: Of the rows.
        rows: That are multiplied.
    """
    experts, rank, columns = matrices.shape
    if not is_scattered(matrices, rows):
        return matrices
    return _turned(matrices, torch.empty(experts, rank, columns, dtype=dtype, device=matrices.device))


def _turned(matrices: Tensor, out: Tensor) -> Tensor:
    """`out`, (experts, rank, columns), with the values of matrices of other strides or another dtype."""
    experts, rank, columns = matrices.shape
    some = min(64, triton.next_power_of_2(experts))
    with torch.cuda.device_of(matrices):
        _turn_matrices[(triton.cdiv(columns, 64), rank, triton.cdiv(experts, some))](
            matrices, out, experts, columns, *matrices.stride(), *out.stride(), COLUMNS=64, EXPERTS=some
        )
    return out


def project(
    x: Tensor, matrices: Tensor, ends: Tensor, scale: float, source: Tensor | None = None, choices: int = 1
) -> Tensor:
    """scale x M^T, (rows, rank), with each row's expert's M.

    Args:
        x: (rows, in), contiguous, sorted by expert; with `source`, (tokens, in), as in `products.multiply_packed`.
        matrices: (experts, rank, in), of any strides and dtype.
        ends: int32 (experts,), the row behind each one's last.
        scale: Factor.
        source: See there.
        choices: See there.
    """
    experts, rank, inner = matrices.shape
    rows = len(x) if source is None else len(source)
    matrices = arrange(matrices, x.dtype, rows)
    out = torch.empty(rows, rank, dtype=x.dtype, device=x.device)
    tiles = most_tiles(rows, experts, ROWS)
    if tiles:
        strides = matrices.stride()
        with torch.cuda.device_of(x):
            _project_rows[(tiles,)](
                x,
                matrices,
                ends,
                source,
                out,
                experts,
                inner,
                rank,
                choices,
                scale,
                *strides,
                ROWS=ROWS,
                INNER=INNER,
                RANK=_room(rank),
                EXPERTS=triton.next_power_of_2(experts),
                GATHERED=source is not None,
            )
    return out


def add_product(out: Tensor, projected: Tensor, matrices: Tensor, ends: Tensor) -> None:
    """out += projected M in place, with each row's expert's M, summed in fp32.

    Args:
        out: (rows, columns), contiguous.
        projected: (rows, rank), contiguous.
        matrices: (experts, rank, columns), of any strides and dtype.
        ends: int32 (experts,), the row behind each one's last.
    """
    experts, rank, columns = matrices.shape
    matrices = arrange(matrices, out.dtype, len(out))
    grid = most_tiles(len(out), experts, ROWS) * triton.cdiv(columns, COLUMNS)
    if grid:
        with torch.cuda.device_of(out):
            _add_rows[(grid,)](
                out,
                projected,
                matrices,
                ends,
                experts,
                columns,
                rank,
                *matrices.stride(),
                ROWS=ROWS,
                COLUMNS=COLUMNS,
                RANK=_room(rank),
                EXPERTS=triton.next_power_of_2(experts),
            )


def outer_products(
    projected: Tensor,
    y: Tensor,
    routing: Routing,
    like: Tensor,
    *,
    gathered: bool = False,
    weights: Tensor | None = None,
) -> Tensor:
    """Of each expert the sum over its rows of projected^T y, (experts, rank, columns) in dtype and strides of `like`.

    Args:
        projected: (rows, rank), contiguous.
        y: (rows, columns), contiguous; (tokens, columns) where it is `gathered`.
        routing: Of the rows.
        like: (experts, rank, columns), a matrix of an adapter, dense in any order of its dimensions.
        gathered: Whether y has the tokens' rows.
        weights: (tokens, choices), contiguous, factors of the rows; None for 1.
    """
    experts, rank, columns = like.shape
    out = torch.empty_like(like)
    wanted = out
    if is_scattered(like, len(projected)):  # written along its columns and then turned: a third of the time
        out = torch.empty(experts, rank, columns, dtype=like.dtype, device=like.device)
    with torch.cuda.device_of(y):
        _outer_rows[(experts, triton.cdiv(columns, COLUMNS))](
            projected,
            y,
            weights,
            routing.ends,
            routing.source,
            out,
            columns,
            rank,
            routing.choices,
            *out.stride(),
            ROWS=ROWS,
            COLUMNS=COLUMNS,
            RANK=_room(rank),
            GATHERED=gathered,
            WEIGHTED=weights is not None,
        )
    return out if out is wanted else _turned(out, wanted)
