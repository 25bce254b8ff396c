"""Products of rows sorted by expert with each expert's matrix, both in e4m3, and what an adapter adds to them (Triton).

As dense.py, of half the bytes; matrices come by the card's tensor memory accelerator. A sum starts at the adapter's update, over both scales, and is multiplied by them at its
end.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from qlora_cli.kernels.experts.operands import Routing, Update
from qlora_cli.kernels.experts.products import Tiling, find_rows, most_tiles
from qlora_cli.kernels.weights import shared_bytes

# Shared bytes a program needs, and the tiling; the first that the card has room for. Qwen3-30B-A3B's gate and up on an
# H200: 230 us; 251 without tiles of 64 rows for an expert's last ones, 331 of 128 columns (benchmarks/experts.md).
CODES = ((192 * 1024, Tiling(128, 256, 128, 8, 4, 64)), (144 * 1024, Tiling(128, 256, 128, 8, 3, 64)))
CODES_LEAST = Tiling(128, 128, 128, 8, 2)
SMALL = Tiling(32, 64, 64, 4, 2, 16)  # under the interpreter


@triton.jit
def _code_tile(
    x,
    x_scale,
    codes,
    matrix_row,
    matrix_scale,
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
    rank_stride,
    second_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    RANK: tl.constexpr,
    WHOLE: tl.constexpr,
    GATHERED: tl.constexpr,
    EMULATED: tl.constexpr,
):
    """Rows times the matrix that begins with row `matrix_row` of `codes`, and, with a RANK, projections times `second`."""
    row = start + tl.arange(0, ROWS)
    column = left + tl.arange(0, COLUMNS)
    step = tl.arange(0, INNER)
    inside = row < stop
    used = column < columns
    # A row outside is read as the last one is, a column as the next matrix or zeros are, and neither is written.
    given = tl.minimum(row, stop - 1)
    if GATHERED:
        given = tl.load(source + given) // choices
    row_scale = tl.load(x_scale + given)
    rows = x + given[:, None].to(tl.int64) * inner + step[None, :]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    if RANK:
        number = tl.arange(0, RANK)
        ranked = number < rank
        thin = row[:, None].to(tl.int64) * rank + number[None, :]
        # Before the loop, as in dense.py.
        low = tl.load(projected + thin, mask=inside[:, None] & ranked[None, :], other=0.0)
        flat = number[:, None] * rank_stride + column[None, :] * second_stride
        high = tl.load(second + flat, mask=ranked[:, None] & used[None, :], other=0.0)
        total = tl.dot(low, high.to(low.dtype), total, input_precision="ieee")
        total = total / row_scale[:, None] / matrix_scale
    for at in range(0, inner, INNER):
        if WHOLE:
            a = tl.load(rows)
        else:
            a = tl.load(rows, mask=(step < inner - at)[None, :], other=0.0)
        b = codes.load([matrix_row + left, at]).T
        if EMULATED:  # the interpreter has no products of e4m3
            total = tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
        else:
            total = tl.dot(a, b, total)
        rows += INNER
    total = total * row_scale[:, None] * matrix_scale
    place = row[:, None].to(tl.int64) * columns + column[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=inside[:, None] & used[None, :])


@triton.jit
def _multiply_codes(
    x,
    x_scale,
    codes,
    stack_scale,
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
    EMULATED: tl.constexpr,
):
    bands = tl.cdiv(columns, COLUMNS)
    expert, start, stop = find_rows(ends, experts, first, last, tl.program_id(0) // bands, ROWS, EXPERTS)
    if expert < 0:
        return
    left = (tl.program_id(0) % bands) * COLUMNS
    matrix_row = (expert - first) * columns
    matrix_scale = tl.load(stack_scale + expert)
    own = second
    if RANK:
        own = second + expert.to(tl.int64) * second_expert_stride
    if LAST_ROWS == 0:
        _code_tile(
            x, x_scale, codes, matrix_row, matrix_scale, source, projected, own, out, start, stop, left, columns, inner, choices,
            rank, rank_stride, second_stride, ROWS, COLUMNS, INNER, RANK, WHOLE, GATHERED, EMULATED,
        )  # fmt: skip
    elif stop - start <= LAST_ROWS:  # an expert's last rows seldom fill a tile
        _code_tile(
            x, x_scale, codes, matrix_row, matrix_scale, source, projected, own, out, start, stop, left, columns, inner, choices,
            rank, rank_stride, second_stride, LAST_ROWS, COLUMNS, INNER, RANK, WHOLE, GATHERED, EMULATED,
        )  # fmt: skip
    else:
        _code_tile(
            x, x_scale, codes, matrix_row, matrix_scale, source, projected, own, out, start, stop, left, columns, inner, choices,
            rank, rank_stride, second_stride, ROWS, COLUMNS, INNER, RANK, WHOLE, GATHERED, EMULATED,
        )  # fmt: skip


@functools.cache
def _tiling(device: torch.device) -> Tiling:
    if device.type != "cuda":
        return SMALL
    return next((tiling for bytes_, tiling in CODES if bytes_ <= shared_bytes(device)), CODES_LEAST)


def multiply_codes(
    x: Tensor,
    x_scale: Tensor,
    codes: Tensor,
    stack_scale: Tensor,
    ends: Tensor,
    out: Tensor,
    *,
    first: int = 0,
    gathered: Routing | None = None,
    update: Update | None = None,
    tiling: Tiling | None = None,
) -> None:
    """Fills the rows of some experts: x M^T over their scales with each row's expert's M, and what an adapter adds to it.

    Args:
        x: e4m3 (rows, in), contiguous, sorted by expert; with `gathered`, (tokens, in).
        x_scale: fp32, one for each row of x.
        codes: e4m3 (some experts, out, in), contiguous, of the experts from `first` on.
        stack_scale: fp32 (experts,).
        ends: int32 (experts,), the row behind each one's last.
        out: (rows, out), contiguous; rows of other experts stay as they are.
        first: The first of these experts.
        gathered: Whose places the rows are, where x has those of the tokens.
        update: Added before the sum is rounded.
        tiling: None for what is known to be fast.
    """
    some, columns, inner = codes.shape
    tiling = tiling or _tiling(x.device)
    grid = most_tiles(len(out), some, tiling.rows) * triton.cdiv(columns, tiling.columns)
    if not grid:
        return
    projected, second = (None, None) if update is None else update
    rank, strides = (0, (0, 0, 0)) if second is None else (second.shape[1], second.stride())
    with torch.cuda.device_of(x):
        _multiply_codes[(grid,)](
            x,
            x_scale,
            TensorDescriptor.from_tensor(codes.view(-1, inner), [tiling.columns, tiling.inner]),
            stack_scale,
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
            *strides,
            ROWS=tiling.rows,
            COLUMNS=tiling.columns,
            INNER=tiling.inner,
            EXPERTS=triton.next_power_of_2(len(ends)),
            RANK=max(16, triton.next_power_of_2(rank)) if rank else 0,
            WHOLE=inner % tiling.inner == 0,
            GATHERED=gathered is not None,
            LAST_ROWS=tiling.last_rows,
            EMULATED=not x.is_cuda,
            num_warps=tiling.warps,
            num_stages=tiling.stages,
        )
