"""Products of a large gradient with an adapter's two thin matrices, both in one pass over it (Triton).

Sums go over parts that programs leave in memory, added up in one order: equal runs give equal bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LARGEST_RANK = 32  # from 48 on cuBLAS, which reads twice, is as fast
LEAST_ROWS = 2048
ROWS = 512  # of a program
# (rows of a tile, columns of a program), up to so many columns. 4,096 rows of rank 16, H200: 20 µs for 4,096 columns where
# two products of cuBLAS take 29, 48 instead of 53 for 11,008.
TILES = ((8192, 64, 256), (2**31, 32, 512))
BLOCK, AT_ONCE = 256, 8  # values and parts that a program adds up at once


@triton.jit
def _multiply_both(
    big,
    right,
    left,
    by_right,
    by_left,
    rows,
    columns,
    rank,
    left_row,
    ROWS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inner = tl.arange(0, RANK)
    used = (column[:, None] < columns) & (inner[None, :] < rank)
    b = tl.load(right + column[:, None] * rank + inner[None, :], mask=used, other=0.0)
    total = tl.zeros((COLUMNS, RANK), tl.float32)
    # The last rows first, which whoever wrote them has left in the cache.
    band = tl.num_programs(1) - 1 - tl.program_id(1)
    first = band * ROWS
    for start in range(first, first + ROWS, TILE_ROWS):
        row = start + tl.arange(0, TILE_ROWS)
        inside = row[:, None] < rows
        place = row[:, None].to(tl.int64) * columns + column[None, :]
        tile = tl.load(big + place, mask=inside & (column[None, :] < columns), other=0.0)
        thin = inside & (inner[None, :] < rank)
        part = (tl.program_id(0).to(tl.int64) * rows + row[:, None]) * rank + inner[None, :]
        tl.store(by_right + part, tl.dot(tile, b, input_precision="ieee"), mask=thin)
        a = tl.load(left + row[:, None] * left_row + inner[None, :], mask=thin, other=0.0)
        total = tl.dot(tl.trans(tile), a, total, input_precision="ieee")
    part = (band.to(tl.int64) * columns + column[:, None]) * rank + inner[None, :]
    tl.store(by_left + part, total, mask=used)


@triton.jit
def _add_parts(parts, out, count, elements, scale, block, BLOCK: tl.constexpr, AT_ONCE: tl.constexpr):
    place = block * BLOCK + tl.arange(0, BLOCK)
    inside = place < elements
    part = tl.arange(0, AT_ONCE)[:, None]
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, count, AT_ONCE):
        used = inside[None, :] & (first + part < count)
        total += tl.sum(tl.load(parts + part * elements + place[None, :], mask=used, other=0.0), 0)
        parts += AT_ONCE * elements
    tl.store(out + place, (total * scale).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _add_partial_sums(
    by_right,
    by_left,
    right_out,
    left_out,
    right_parts,
    left_parts,
    right_elements,
    left_elements,
    scale,
    BLOCK: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    blocks = tl.cdiv(right_elements, BLOCK)
    if tl.program_id(0) < blocks:
        _add_parts(by_right, right_out, right_parts, right_elements, scale, tl.program_id(0), BLOCK, AT_ONCE)
    else:
        _add_parts(by_left, left_out, left_parts, left_elements, 1.0, tl.program_id(0) - blocks, BLOCK, AT_ONCE)


def covers(big: Tensor, right: Tensor, left: Tensor) -> bool:
    """Whether `multiply_both` takes these, and is the faster way."""
    alike = big.dtype == right.dtype == left.dtype and big.dtype.itemsize == 2
    contiguous = big.is_contiguous() and right.is_contiguous() and left.stride(1) == 1
    return alike and contiguous and right.shape[1] <= LARGEST_RANK and big.shape[0] >= LEAST_ROWS


def multiply_both(
    big: Tensor,
    right: Tensor,
    left: Tensor,
    scale: float,
    left_dtype: torch.dtype,
    *,
    tile: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """scale big right, and big^T left.

    Args:
        big: (rows, columns), contiguous.
        right: (columns, rank), contiguous, rank at most `LARGEST_RANK`.
        left: (rows, rank), values of a row side by side.
        scale: Of the first product.
        left_dtype: Of the second product.
        tile: Rows of a tile and columns of a program, powers of two from 16 on; None for what is known to be fast.

    Returns:
        (rows, rank) in the dtype of big, (columns, rank) in `left_dtype`; both summed in fp32 and rounded once.
    """
    rows, columns = big.shape
    rank = right.shape[1]
    tile_rows, tile_columns = tile or next((r, c) for most, r, c in TILES if columns <= most)
    across, down = triton.cdiv(columns, tile_columns), triton.cdiv(rows, ROWS)
    by_right = torch.empty(across, rows, rank, dtype=torch.float32, device=big.device)
    by_left = torch.empty(down, columns, rank, dtype=torch.float32, device=big.device)
    right_out = torch.empty(rows, rank, dtype=big.dtype, device=big.device)
    left_out = torch.empty(columns, rank, dtype=left_dtype, device=big.device)
    with torch.cuda.device_of(big):
        _multiply_both[(across, down)](
            big,
            right,
            left,
            by_right,
            by_left,
            rows,
            columns,
            rank,
            left.stride(0),
            ROWS=ROWS,
            TILE_ROWS=tile_rows,
            COLUMNS=tile_columns,
            RANK=max(16, triton.next_power_of_2(rank)),
            num_warps=4,
            num_stages=3,
        )
        _add_partial_sums[(triton.cdiv(rows * rank, BLOCK) + triton.cdiv(columns * rank, BLOCK),)](
            by_right,
            by_left,
            right_out,
            left_out,
            across,
            down,
            rows * rank,
            columns * rank,
            scale,
            BLOCK=BLOCK,
            AT_ONCE=AT_ONCE,
        )
    return right_out, left_out
