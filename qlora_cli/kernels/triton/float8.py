"""Conversion to e4m3 for products in 8 bits: rows of activations, and 4-bit weights, straight or transposed (Triton).

A weight goes from its 4 bits to its codes in one pass: 0.5 bytes a value read, 1 written, where bf16 takes 2.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlora_cli.kernels.triton.nf4 import block_scales, group_values

LARGEST_CHUNK = 16384  # values of a row that a program holds in registers; longer rows are read twice
TILE_ROWS, TILE_COLUMNS = 64, 128  # of a weight, for a program that writes it transposed


@triton.jit
def _to_e4m3(value, ROUNDS: tl.constexpr):
    """fp32 to the nearest e4m3; `ROUNDS` does that first, for Triton's interpreter, whose conversion loses a carry."""
    if ROUNDS:
        bits = value.to(tl.int32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)  # four bits are left
        small = (value + 24576.0) - 24576.0  # a multiple of 2^-9, what subnormal numbers are
        value = tl.where(tl.abs(value) < 0.015625, small, normal)
    return value.to(tl.float8e4nv)


@triton.jit
def _size(value):
    """|value|, infinite for NaN, which a maximum would pass over: the row's scale is then infinite, its product NaN."""
    return tl.where(value == value, tl.abs(value), float("inf"))


@triton.jit
def row_codes(value, least, ROUNDS: tl.constexpr):
    """A row's codes, and the scale that they are over."""
    largest = tl.maximum(tl.max(_size(value)), least)
    return _to_e4m3(value * tl.div_rn(448.0, largest), ROUNDS), tl.div_rn(largest, 448.0)


@triton.jit
def _quantise_rows(
    x,
    second,
    third,
    codes,
    scales,
    rows,
    columns,
    x_row,
    second_columns,
    third_columns,
    least,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    WHOLE: tl.constexpr,
    ROUNDS: tl.constexpr,
):
    column = tl.arange(0, CHUNK)
    for i in tl.static_range(ROWS):
        # The last rows first, which what came before has left in the cache. Beyond the last one it is written again.
        row = tl.minimum((tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS + i, rows - 1).to(tl.int64)
        if WHOLE:
            used = column < columns
            place = x + row * x_row + column
            if second is not None:
                of_third = column - (columns - third_columns)
                of_second = of_third + second_columns
                beyond = tl.where(
                    of_third < 0, second + row * second_columns + of_second, third + row * third_columns + of_third
                )
                place = tl.where(of_second < 0, place, beyond)
            value = tl.load(place, mask=used, other=0.0).to(tl.float32)
            result, scale = row_codes(value, least, ROUNDS)
            tl.store(codes + row * columns + column, result, mask=used)
        else:
            found = tl.zeros((CHUNK,), dtype=tl.float32)
            for first in range(0, columns, CHUNK):
                used = first + column < columns
                value = tl.load(x + row * x_row + first + column, mask=used, other=0.0).to(tl.float32)
                found = tl.maximum(found, _size(value))
            largest = tl.maximum(tl.max(found), least)
            inverse = tl.div_rn(448.0, largest)
            for first in range(0, columns, CHUNK):
                used = first + column < columns
                value = tl.load(x + row * x_row + first + column, mask=used, other=0.0).to(tl.float32)
                tl.store(codes + row * columns + first + column, _to_e4m3(value * inverse, ROUNDS), mask=used)
            scale = tl.div_rn(largest, 448.0)
        tl.store(scales + row, scale)


def quantise_rows(
    x: Tensor,
    least: float,
    *,
    beside: Sequence[Tensor] = (),
    rows: int = 1,
    warps: int | None = None,
    chunk: int = LARGEST_CHUNK,
) -> tuple[Tensor, Tensor]:
    """x in e4m3 with a scale for each row: that of its largest value, 448.

    Args:
        x: (rows, columns), values of a row side by side.
        least: What the largest value of a row is taken for at the least, so that rows of zeros have a scale.
        beside: Nothing, or two contiguous tensors, (rows, any columns) each, whose rows go on those of x.
        rows: That a program takes.
        warps: Of a program.
        chunk: Values held at once, a power of two; longer rows are read twice, but those with others beside them.

    Returns:
        e4m3 (rows, all columns) and fp32 (rows, 1), whose product is x, rounded.
    """
    count, columns = x.shape
    widths = [part.shape[1] for part in beside] or [0, 0]
    columns += sum(widths)
    codes = torch.empty(count, columns, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(count, 1, dtype=torch.float32, device=x.device)
    held = triton.next_power_of_2(columns) if beside else min(triton.next_power_of_2(columns), chunk)
    with torch.cuda.device_of(x):
        _quantise_rows[(triton.cdiv(count, rows),)](
            x,
            *(beside or (None, None)),
            codes,
            scales,
            count,
            columns,
            x.stride(0),
            *widths,
            least,
            ROWS=rows,
            CHUNK=held,
            WHOLE=columns <= held,
            ROUNDS=not x.is_cuda,
            num_warps=warps or max(4, min(8, held // 512)),
            enable_fp_fusion=False,
        )
    return codes, scales


@triton.jit
def _unpack(
    packed,
    absmax,
    code,
    nested_absmax,
    nested_code,
    offset,
    side_scale,
    out,
    first_row,
    end_row,
    columns,
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr,
    OFFSETS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    STACKED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROUNDS: tl.constexpr,
):
    if STACKED:  # one of several matrices, first_row to end_row the first of them
        before = tl.program_id(2) * (end_row - first_row)
        first_row, end_row = first_row + before, end_row + before
        out += before.to(tl.int64) * columns
        side_scale += tl.program_id(2)
    # Groups of 8 values, of one row and one block: a 4-byte load each.
    group = tl.arange(0, ROWS * COLUMNS // 8)
    row = first_row + tl.program_id(1) * ROWS + group // (COLUMNS // 8)
    column = tl.program_id(0) * COLUMNS + group % (COLUMNS // 8) * 8
    used = (row < end_row) & (column < columns)
    element = row.to(tl.int64) * columns + column
    scale = block_scales(
        absmax, nested_absmax, nested_code, offset, element // BLOCKSIZE, used, NESTED_BLOCKSIZE, NESTED, OFFSETS
    )
    values = group_values(packed, code, scale, element // 2, used[:, None])
    if STACKED:
        inverse = tl.div_rn(1.0, tl.load(side_scale))
    elif TRANSPOSED:
        each = column[:, None] + tl.arange(0, 8)[None, :]
        inverse = tl.div_rn(1.0, tl.load(side_scale + each, mask=used[:, None], other=1.0))
    else:
        inverse = tl.div_rn(1.0, tl.load(side_scale + row, mask=used, other=1.0))[:, None]
    result = _to_e4m3(values * inverse, ROUNDS)  # (groups, 8)
    if TRANSPOSED:
        turned = tl.trans(tl.reshape(result, (ROWS, COLUMNS)))
        to_row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
        to_column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        height = end_row - first_row
        inside = (to_column[:, None] < columns) & (to_row[None, :] < height)
        tl.store(out + to_column[:, None].to(tl.int64) * height + to_row[None, :], turned, mask=inside)
    else:
        local = (row - first_row).to(tl.int64) * columns + column
        tl.store(out + local[:, None] + tl.arange(0, 8)[None, :], result, mask=used[:, None])


def unpack(
    weight: Any,
    side_scale: Tensor,
    out: Tensor,
    first_row: int,
    end_row: int,
    *,
    transposed: bool,
    matrix_rows: int | None = None,
    tile: tuple[int, int] | None = None,
    warps: int = 4,
) -> Tensor:
    """Writes rows of a packed weight as e4m3 codes, over scales of its rows or, transposed, of its columns; returns `out`.

    Args:
        weight: A `FrozenWeight` (kernels/weights.py); columns and blocksize are multiples of 8.
        side_scale: fp32 (weight rows,), or (weight columns,) where `transposed`; with `matrix_rows` (matrices,).
        out: Contiguous e4m3, (end_row - first_row, columns), or the other way round where `transposed`.
        matrix_rows: Rows of each matrix that has a scale of its own and is transposed by itself; None for one.
        tile: Rows and columns of a program, powers of two.
        warps: Of a program.
    """
    packed, absmax, code, nested_absmax, nested_code, offset, blocksize, nested_blocksize = weight[3:11]
    rows, columns = tile or ((TILE_ROWS, TILE_COLUMNS) if transposed else (8, 512))
    height = matrix_rows or end_row - first_row
    grid = (triton.cdiv(weight.columns, columns), triton.cdiv(height, rows), (end_row - first_row) // height)
    with torch.cuda.device_of(out):
        _unpack[grid](
            packed,
            absmax,
            code,
            nested_absmax,
            nested_code,
            offset,
            side_scale,
            out,
            first_row,
            first_row + height,
            weight.columns,
            BLOCKSIZE=blocksize,
            NESTED_BLOCKSIZE=nested_blocksize,
            NESTED=nested_absmax is not None,
            OFFSETS=offset is not None and offset.numel() > 1,
            TRANSPOSED=transposed,
            STACKED=matrix_rows is not None,
            ROWS=rows,
            COLUMNS=columns,
            ROUNDS=not out.is_cuda,
            num_warps=warps,
            enable_fp_fusion=False,
        )
    return out
