"""Low-rank product, dropped out or scaled, added to a large matrix in place (Triton).

cuBLAS takes 22 µs for what here takes 6 (320 x 18,432, rank 8, H200): it clears a counter before each such product.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlora_cli.kernels.triton.dropout import keeps

LARGEST_RANK = 64  # above, the product is arithmetic, which cuBLAS does better
ROWS, COLUMNS = 64, 128  # of a program


@triton.jit
def _add_product(
    out,
    base,
    left,
    right,
    seed,
    scale,
    rows,
    columns,
    rank,
    out_row,
    base_row,
    left_row,
    right_rank,
    right_column,
    first_row,
    rate,
    DROPS: tl.constexpr,
    SCALES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
):
    # The last rows first, which the product before has left in the cache.
    row = (tl.num_programs(1) - 1 - tl.program_id(1)) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inner = tl.arange(0, RANK)
    a = tl.load(
        left + row[:, None] * left_row + inner[None, :],
        mask=(row[:, None] < rows) & (inner[None, :] < rank),
        other=0.0,
    )
    b = tl.load(
        right + inner[:, None] * right_rank + column[None, :] * right_column,
        mask=(inner[:, None] < rank) & (column[None, :] < columns),
        other=0.0,
    )
    product = tl.dot(a, b, input_precision="ieee")
    if SCALES:
        product *= tl.load(scale)
    tall = row[:, None].to(tl.int64)
    if DROPS:
        first = (row + first_row)[:, None].to(tl.int64) * (columns // 4)
        group = first + (tl.program_id(0) * (COLUMNS // 4) + tl.arange(0, COLUMNS // 4))[None, :]
        kept = tl.reshape(keeps(tl.load(seed), group.to(tl.uint32), rate), (ROWS, COLUMNS))
        product = tl.where(kept, product / (1.0 - rate), 0.0)
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    total = tl.load(base + tall * base_row + column[None, :], mask=inside, other=0.0).to(tl.float32) + product
    tl.store(out + tall * out_row + column[None, :], total.to(out.dtype.element_ty), mask=inside)


def covers(out: Tensor, left: Tensor, right: Tensor, rate: float = 0.0) -> bool:
    """Whether `add_product` takes these."""
    rank, columns = right.shape
    plain = out.stride(1) == left.stride(1) == 1 and left.dtype == right.dtype == out.dtype
    return plain and rank <= LARGEST_RANK and (rate == 0 or columns % 4 == 0)


def add_product(
    out: Tensor,
    left: Tensor,
    right: Tensor,
    seed: Tensor | None = None,
    rate: float = 0.0,
    scale: Tensor | None = None,
    *,
    first_row: int = 0,
    base: Tensor | None = None,
) -> Tensor:
    """out += scale left @ right in place, summed in fp32 and rounded once; places of `drop` with this seed are left out.

    Args:
        out: (rows, columns), values of a row side by side.
        left: (rows, rank), rank at most `LARGEST_RANK`, values of a row side by side.
        right: (rank, columns), of any strides.
        seed: int64 scalar on the device; None for no dropout.
        rate: In [0, 1); with it, columns is a multiple of 4.
        scale: fp32 scalar on the device, read there; None for 1.
        first_row: As `drop`'s.
        base: Like `out`, what is added to in its place; None for `out` itself.

    Returns:
        `out`.
    """
    rank, columns = right.shape
    grid = (triton.cdiv(columns, COLUMNS), triton.cdiv(out.shape[0], ROWS))
    base = out if base is None else base
    with torch.cuda.device_of(out):
        _add_product[grid](
            out,
            base,
            left,
            right,
            seed,
            scale,
            out.shape[0],
            columns,
            rank,
            out.stride(0),
            base.stride(0),
            left.stride(0),
            right.stride(0),
            right.stride(1),
            first_row,
            rate,
            DROPS=seed is not None,
            SCALES=scale is not None,
            ROWS=ROWS,
            COLUMNS=COLUMNS,
            RANK=max(16, triton.next_power_of_2(rank)),
        )
    return out
