"""Products of rows sorted by expert with each expert's matrix, packed in 4 bits (Triton).

A grid has room for every way in which rows may fall to experts: as many tiles as the rows fill, and one more for each
expert, whose last tile is seldom full. Programs find their expert by the ends of the experts' rows; those that find
none are done. So nothing waits for the device, and one launch stands for every routing.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlora_cli.kernels.decode.gemv_programs import lane_table, load_scales, look_up


class Tiling(NamedTuple):
    """How a product is divided.

    Attributes:
        rows: Of a tile of the result.
        columns: Of it.
        inner: Of a step of its sum.
        warps: Of a program.
        stages: Loads under way.
        last_rows: Of a tile of no more rows than these, of dequantised matrices; 0 for none.
    """

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int
    last_rows: int = 0


SMALL = Tiling(32, 64, 64, 4, 2)  # under the interpreter, and for dtypes that fill registers
PACKED = {16: Tiling(16, 64, 128, 4, 4), 32: Tiling(32, 128, 64, 4, 4), 64: Tiling(64, 128, 64, 4, 4)}
PACKED_LARGE = Tiling(128, 128, 64, 8, 4)


@triton.jit
def find_rows(ends, experts, first, last, tile, ROWS: tl.constexpr, EXPERTS: tl.constexpr):
    """The expert of a tile of ROWS rows, its first row, and the row behind the expert's last; -1 for no expert.

    Tiles are numbered through those of experts `first` to `last`.
    """
    each = tl.arange(0, EXPERTS)
    inside = (each >= first) & (each < last)
    end = tl.load(ends + each, mask=inside, other=0)
    start = tl.load(ends + each - 1, mask=inside & (each > 0), other=0)
    tiles = tl.where(inside, (end - start + ROWS - 1) // ROWS, 0)
    sums = tl.cumsum(tiles, 0)
    expert = tl.sum((sums <= tile).to(tl.int32), 0)
    own = each == expert
    row = tl.sum(tl.where(own, start + (tile - sums + tiles) * ROWS, 0), 0)
    stop = tl.sum(tl.where(own, end, 0), 0)
    return tl.where(expert < EXPERTS, expert, -1), row, stop


@triton.jit
def _multiply_packed(
    x,
    packed,
    absmax,
    code,
    nested_absmax,
    nested_code,
    offset,
    ends,
    source,
    out,
    experts,
    columns,
    inner,
    choices,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    EXPERTS: tl.constexpr,
    NESTED: tl.constexpr,
    BACKWARD: tl.constexpr,
    GATHERED: tl.constexpr,
    SHUFFLE: tl.constexpr,
):
    """The weights are the left operand, (COLUMNS, INNER), which tensor cores take from registers; blocks are of 64.

    Forward, a row of a matrix is a column of the result; backward it is a step of the sum.
    """
    bands = tl.cdiv(columns, COLUMNS)
    expert, start, stop = find_rows(ends, experts, 0, experts, tl.program_id(0) // bands, ROWS, EXPERTS)
    if expert < 0:
        return
    row = start + tl.arange(0, ROWS)
    inside = row < stop
    if GATHERED:
        given = tl.load(source + row, mask=inside, other=0) // choices
    else:
        given = row
    left = (tl.program_id(0) % bands) * COLUMNS
    column = left + tl.arange(0, COLUMNS)
    step = tl.arange(0, INNER)
    first_row = expert.to(tl.int64) * (inner if BACKWARD else columns)  # of the expert's matrix in the stack
    table = lane_table(code) if SHUFFLE else 0.0
    total = tl.zeros((COLUMNS, ROWS), tl.float32)
    for at in range(0, inner, INNER):
        if BACKWARD:
            tile_row, tile_left, width, height = at + step, left, columns, inner
            half = tl.arange(0, COLUMNS // 2)
            block = tl.arange(0, COLUMNS // 64)
        else:
            tile_row, tile_left, width, height = column, at, inner, columns
            half = tl.arange(0, INNER // 2)
            block = tl.arange(0, INNER // 64)
        used_row = tile_row < height
        base = (first_row + tile_row) * width  # of the values in the stack
        used = used_row[:, None] & (tile_left // 2 + half < width // 2)[None, :]
        byte = tl.load(packed + (base // 2)[:, None] + tile_left // 2 + half[None, :], mask=used, other=0).to(tl.int32)
        used_block = used_row[:, None] & (tile_left // 64 + block < width // 64)[None, :]
        number = (base // 64)[:, None] + tile_left // 64 + block[None, :]
        scale = load_scales(absmax, nested_absmax, nested_code, offset, number, used_block, NESTED)
        weight = tl.interleave(look_up(code, table, byte, 4, SHUFFLE), look_up(code, table, byte, 0, SHUFFLE))
        if BACKWARD:
            weight = tl.reshape(weight, (INNER, COLUMNS // 64, 64)) * scale[:, :, None]
            weight = tl.trans(tl.reshape(weight, (INNER, COLUMNS)).to(x.dtype.element_ty))
        else:
            weight = tl.reshape(weight, (COLUMNS, INNER // 64, 64)) * scale[:, :, None]
            weight = tl.reshape(weight, (COLUMNS, INNER)).to(x.dtype.element_ty)
        seen = inside[None, :] & (step < inner - at)[:, None]
        values = tl.load(x + given[None, :].to(tl.int64) * inner + (at + step)[:, None], mask=seen, other=0.0)
        total = tl.dot(weight, values, total, input_precision="ieee")
    place = row[None, :].to(tl.int64) * columns + column[:, None]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=inside[None, :] & (column < columns)[:, None])


def most_tiles(rows: int, experts: int, tile_rows: int) -> int:
    """Tiles that so many rows may make, whatever experts they fall to: each but the full ones has a row at least."""
    return min(rows, triton.cdiv(rows, tile_rows) + experts - 1) if rows else 0


def takes_packed(weight: Any, columns: int) -> bool:
    """Whether `multiply_packed` takes a stack of matrices with so many columns: each row consists of whole blocks."""
    offsets = weight.offset is None or weight.offset.numel() == weight.nested_absmax.numel()
    return weight.blocksize == 64 and columns % 64 == 0 and offsets


def packed_tiling(x: Tensor, rows_an_expert: float) -> Tiling:
    """How to divide a product of packed matrices, with so many rows for an expert that has any."""
    if not x.is_cuda or x.dtype.itemsize > 2:
        return SMALL
    return next((tiling for most, tiling in PACKED.items() if rows_an_expert <= most), PACKED_LARGE)


def multiply_packed(
    x: Tensor,
    weight: Any,
    columns: int,
    ends: Tensor,
    *,
    backward: bool = False,
    source: Tensor | None = None,
    choices: int = 1,
    tiling: Tiling | None = None,
) -> Tensor:
    """x W^T, or x W, with each row's expert's W, whose 4-bit values are unpacked on the way.

    Values are those of a dequantisation, rounded to the dtype of x.

    Args:
        x: (rows, in), contiguous, sorted by expert; with `source`, (tokens, in).
        weight: A `FrozenWeight`: the matrices one below the other.
        columns: Of a matrix.
        ends: int32 (experts,), the row behind each one's last.
        backward: Whether it is x W.
        source: int32 (rows,), `choices` times the row of x that each row is, or a little more.
        choices: See `source`.
        tiling: None for what is known to be fast.

    Returns:
        (rows, out); rows of no expert are not written.
    """
    experts = len(ends)
    matrix_rows = weight.rows // experts
    inner, wide = (matrix_rows, columns) if backward else (columns, matrix_rows)
    rows = len(x) if source is None else len(source)
    out = torch.empty(rows, wide, dtype=x.dtype, device=x.device)
    tiling = tiling or packed_tiling(x, rows / experts)
    grid = most_tiles(rows, experts, tiling.rows) * triton.cdiv(wide, tiling.columns)
    if not grid:
        return out
    with torch.cuda.device_of(x):
        _multiply_packed[(grid,)](
            x,
            weight.packed,
            weight.absmax,
            weight.code,
            weight.nested_absmax,
            weight.nested_code,
            weight.offset,
            ends,
            source,
            out,
            experts,
            wide,
            inner,
            choices,
            ROWS=tiling.rows,
            COLUMNS=tiling.columns,
            INNER=tiling.inner,
            EXPERTS=triton.next_power_of_2(experts),
            NESTED=weight.nested_blocksize if weight.nested_absmax is not None else 0,
            BACKWARD=backward,
            GATHERED=source is not None,
            SHUFFLE=x.is_cuda and torch.version.hip is None,
            num_warps=tiling.warps,
            num_stages=tiling.stages,
            enable_fp_fusion=False,
        )
    return out
