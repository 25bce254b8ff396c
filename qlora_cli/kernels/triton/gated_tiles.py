"""Gated unit and its gradients, tile by tile, with both adapters' low-rank products added on the way (Triton).

The adapters' parts are added where the products are read anyway: added on their own, they read and write both once more.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlora_cli.kernels.triton.activations import activate, slope

LARGEST_RANK = 64  # above, the low-rank products are arithmetic, which cuBLAS does better
# Of a program. 4,096 x 11,008, rank 16, H200: 78 and 132 µs; 64 x 128 takes 101 and 165.
ROWS, COLUMNS, WARPS = 32, 64, 4


@triton.jit
def _with_adapter(product, left, right, row, column, inside, columns, rank, left_row, RANK: tl.constexpr):
    """A tile of product + left right^T in fp32: (rows, columns), (rows, rank), (columns, rank)."""
    inner = tl.arange(0, RANK)
    a = tl.load(left + row[:, None] * left_row + inner[None, :], mask=inside & (inner[None, :] < rank), other=0.0)
    b = tl.load(
        right + column[None, :] * rank + inner[:, None],
        mask=(inner[:, None] < rank) & (column[None, :] < columns),
        other=0.0,
    )
    place = row[:, None].to(tl.int64) * columns + column[None, :]
    values = tl.load(product + place, mask=inside & (column[None, :] < columns), other=0.0)
    return values.to(tl.float32) + tl.dot(a, b, input_precision="ieee")


@triton.jit
def _gate_tile(
    grad,
    out,
    up_out,
    gate,
    up,
    gate_left,
    up_left,
    gate_right,
    up_right,
    rows,
    columns,
    rank,
    left_row,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
):
    """A tile of the unit to `out`; with the unit's gradient `grad`, those of gate and up to `out` and `up_out`."""
    if grad is None:  # the last rows first, which the product before has left in the cache
        band = tl.num_programs(1) - 1 - tl.program_id(1)
    else:
        band = tl.program_id(1)
    row = band * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = row[:, None] < rows
    g = _with_adapter(gate, gate_left, gate_right, row, column, inside, columns, rank, left_row, RANK)
    u = _with_adapter(up, up_left, up_right, row, column, inside, columns, rank, left_row, RANK)
    place = row[:, None].to(tl.int64) * columns + column[None, :]
    used = inside & (column[None, :] < columns)
    if grad is None:
        result = activate(g, KIND) * u
        tl.store(out + place, result.to(out.dtype.element_ty), mask=used)
    else:
        d = tl.load(grad + place, mask=used, other=0.0).to(tl.float32)
        tl.store(out + place, (d * u * slope(g, KIND)).to(out.dtype.element_ty), mask=used)
        tl.store(up_out + place, (d * activate(g, KIND)).to(up_out.dtype.element_ty), mask=used)


Pair = tuple[Tensor, Tensor]  # of the gate, and of what it gates


def covers(products: Pair, lefts: Pair, rights: Pair) -> bool:
    """Whether the functions below take these."""
    contiguous = all(t.is_contiguous() for t in (*products, *rights))
    alike = products[0].shape == products[1].shape and rights[0].shape == rights[1].shape
    alike = alike and lefts[0].stride() == lefts[1].stride() and lefts[0].stride(1) == 1
    one_dtype = len({t.dtype for t in (*products, *lefts, *rights)}) == 1
    return contiguous and alike and one_dtype and rights[0].shape[1] <= LARGEST_RANK


def gate_products(products: Pair, lefts: Pair, rights: Pair, kind: str) -> Tensor:
    """act(product_0 + left_0 right_0^T) (product_1 + left_1 right_1^T), in fp32, rounded once.

    Args:
        products: (rows, columns), contiguous.
        lefts: (rows, rank), values of a row side by side, both of the same strides.
        rights: (columns, rank), contiguous.
        kind: One of `gated.GATES`.

    Returns:
        (rows, columns).
    """
    out = torch.empty_like(products[0])
    _launch((None, out, None), products, lefts, rights, kind)
    return out


def gate_products_backward(grad: Tensor, products: Pair, lefts: Pair, rights: Pair, kind: str) -> Pair:
    """Gradients of `gate_products` with respect to both products, each (rows, columns), for `grad` of that shape."""
    found = torch.empty_like(products[0]), torch.empty_like(products[1])
    _launch((grad, *found), products, lefts, rights, kind)
    return found


def _launch(first: tuple[Tensor | None, ...], products: Pair, lefts: Pair, rights: Pair, kind: str) -> None:
    rows, columns = products[0].shape
    rank = rights[0].shape[1]
    with torch.cuda.device_of(products[0]):
        _gate_tile[(triton.cdiv(columns, COLUMNS), triton.cdiv(rows, ROWS))](
            *first,
            *products,
            *lefts,
            *rights,
            rows,
            columns,
            rank,
            lefts[0].stride(0),
            KIND=kind,
            ROWS=ROWS,
            COLUMNS=COLUMNS,
            RANK=max(16, triton.next_power_of_2(rank)),
            num_warps=WARPS,
        )
