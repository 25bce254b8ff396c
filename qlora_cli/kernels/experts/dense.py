"""Products of rows sorted by expert with each expert's dequantised matrix, and what an adapter adds to them (Triton).

Rows may be read through their tokens, so that none are expanded, and an adapter's update is one more step of the sum.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlora_cli.kernels.experts import products
from qlora_cli.kernels.experts.operands import Routing, Update
from qlora_cli.kernels.experts.products import Tiling, find_rows, most_tiles
from qlora_cli.kernels.weights import shared_bytes

# Shared bytes a program needs, and the tiling; the first that the card has room for.
# Tiles of 64 rows for an expert's last ones: 3 to 5 % of a product of Qwen3-30B-A3B, nothing of gpt-oss, on an H200.
DENSE = ((192 * 1024, Tiling(128, 256, 64, 8, 4, 64)), (144 * 1024, Tiling(128, 256, 64, 8, 3, 64)))
DENSE_LEAST = Tiling(128, 128, 64, 8, 2)


@triton.jit
def _dense_tile(
    x,
    right,
    source,
    projected,
    second,
    out,
    start,
    stop,
    left,
    columns,
    inner,
    choices,
    rank,
    inner_stride,
    column_stride,
    rank_stride,
    second_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    RANK: tl.constexpr,
    WHOLE: tl.constexpr,
    GATHERED: tl.constexpr,
):
    """Rows times an expert's matrix at `right`, and, with a RANK, their projections times the expert's `second` too."""
    row = start + tl.arange(0, ROWS)
    column = left + tl.arange(0, COLUMNS)
    step = tl.arange(0, INNER)
    inside = row < stop
    used = column < columns
    given = row
    if GATHERED:
        given = tl.load(source + row, mask=inside, other=0) // choices
    rows = x + given[:, None].to(tl.int64) * inner + step[None, :]
    right += step[:, None] * inner_stride + column[None, :] * column_stride
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    if RANK:
        number = tl.arange(0, RANK)
        ranked = number < rank
        thin = row[:, None].to(tl.int64) * rank + number[None, :]
        # Before the loop: behind it ptxas (CUDA 13) may wait for each product of the loop (C7515), half its speed.
        low = tl.load(projected + thin, mask=inside[:, None] & ranked[None, :], other=0.0)
        flat = number[:, None] * rank_stride + column[None, :] * second_stride
        high = tl.load(second + flat, mask=ranked[:, None] & used[None, :], other=0.0)
        total = tl.dot(low, high.to(low.dtype), total, input_precision="ieee")
    for at in range(0, inner, INNER):
        if WHOLE:
            a = tl.load(rows, mask=inside[:, None], other=0.0)
            b = tl.load(right, mask=used[None, :], other=0.0)
        else:
            rest = step < inner - at
            a = tl.load(rows, mask=inside[:, None] & rest[None, :], other=0.0)
            b = tl.load(right, mask=used[None, :] & rest[:, None], other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
        rows += INNER
        right += INNER * inner_stride
    place = row[:, None].to(tl.int64) * columns + column[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=inside[:, None] & used[None, :])


@triton.jit
def _multiply_dense(
    x,
    values,
    ends,
    source,
    projected,
    second,
    out,
    experts,
    first,
    last,
    columns,
    inner,
    choices,
    rank,
    expert_stride,
    inner_stride,
    column_stride,
    second_expert_stride,
    rank_stride,
    second_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    EXPERTS: tl.constexpr,
    RANK: tl.constexpr,
    WHOLE: tl.constexpr,
    GATHERED: tl.constexpr,
    LAST_ROWS: tl.constexpr,
):
    bands = tl.cdiv(columns, COLUMNS)
    expert, start, stop = find_rows(ends, experts, first, last, tl.program_id(0) // bands, ROWS, EXPERTS)
    if expert < 0:
        return
    left = (tl.program_id(0) % bands) * COLUMNS
    right = values + (expert - first).to(tl.int64) * expert_stride
    own = second
    if RANK:
        own = second + expert.to(tl.int64) * second_expert_stride
    if LAST_ROWS == 0:
        _dense_tile(
            x, right, source, projected, own, out, start, stop, left, columns, inner, choices, rank, inner_stride,
            column_stride, rank_stride, second_stride, ROWS, COLUMNS, INNER, RANK, WHOLE, GATHERED,
        )  # fmt: skip
    elif stop - start <= LAST_ROWS:  # an expert's last rows seldom fill a tile
        _dense_tile(
            x, right, source, projected, own, out, start, stop, left, columns, inner, choices, rank, inner_stride,
            column_stride, rank_stride, second_stride, LAST_ROWS, COLUMNS, INNER, RANK, WHOLE, GATHERED,
        )  # fmt: skip
    else:
        _dense_tile(
            x, right, source, projected, own, out, start, stop, left, columns, inner, choices, rank, inner_stride,
            column_stride, rank_stride, second_stride, ROWS, COLUMNS, INNER, RANK, WHOLE, GATHERED,
        )  # fmt: skip


@functools.cache
def _dense_tiling(device: torch.device) -> Tiling:
    return next((tiling for bytes_, tiling in DENSE if bytes_ <= shared_bytes(device)), DENSE_LEAST)


def multiply_dense(
    x: Tensor,
    matrices: Tensor,
    ends: Tensor,
    out: Tensor,
    *,
    first: int = 0,
    gathered: Routing | None = None,
    update: Update | None = None,
    tiling: Tiling | None = None,
) -> None:
    """Fills the rows of some experts: x M with each row's expert's matrix M, and what an adapter adds to it.

    Args:
        x: (rows, in), contiguous, sorted by expert; with `gathered`, (tokens, in).
        matrices: (some experts, in, out), of any strides, of the experts from `first` on.
        ends: int32 (experts,), the row behind each one's last.
        out: (rows, out), contiguous; rows of other experts stay as they are.
        first: The first of these experts.
        gathered: Whose places the rows are, where x has those of the tokens.
        update: Added before the sum is rounded.
        tiling: None for what is known to be fast.
    """
    some, inner, columns = matrices.shape
    tiling = tiling or (_dense_tiling(x.device) if x.is_cuda and x.dtype.itemsize == 2 else products.SMALL)
    grid = most_tiles(len(out), some, tiling.rows) * triton.cdiv(columns, tiling.columns)
    if not grid:
        return
    projected, second = (None, None) if update is None else update
    rank, strides = (0, (0, 0, 0)) if second is None else (second.shape[1], second.stride())
    with torch.cuda.device_of(x):
        _multiply_dense[(grid,)](
            x,
            matrices,
            ends,
            None if gathered is None else gathered.source,
            projected,
            second,
            out,
            len(ends),
            first,
            first + some,
            columns,
            inner,
            1 if gathered is None else gathered.choices,
            rank,
            *matrices.stride(),
            *strides,
            ROWS=tiling.rows,
            COLUMNS=tiling.columns,
            INNER=tiling.inner,
            EXPERTS=triton.next_power_of_2(len(ends)),
            RANK=max(16, triton.next_power_of_2(rank)) if rank else 0,
            WHOLE=inner % tiling.inner == 0,
            GATHERED=gathered is not None,
            LAST_ROWS=tiling.last_rows,
            num_warps=tiling.warps,
            num_stages=tiling.stages,
        )
