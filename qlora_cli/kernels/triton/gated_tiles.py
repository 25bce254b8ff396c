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
    out,
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
    # The last rows first, which the product before has left in the cache.
    row = (tl.num_programs(1) - 1 - tl.program_id(1)) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = row[:, None] < rows
    g = _with_adapter(gate, gate_left, gate_right, row, column, inside, columns, rank, left_row, RANK)
    u = _with_adapter(up, up_left, up_right, row, column, inside, columns, rank, left_row, RANK)
    place = row[:, None].to(tl.int64) * columns + column[None, :]
    result = activate(g, KIND) * u
    tl.store(out + place, result.to(out.dtype.element_ty), mask=inside & (column[None, :] < columns))


@triton.jit
def _gate_tile_backward(
    grad,
    grad_gate,
    grad_up,
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
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = row[:, None] < rows
    g = _with_adapter(gate, gate_left, gate_right, row, column, inside, columns, rank, left_row, RANK)
    u = _with_adapter(up, up_left, up_right, row, column, inside, columns, rank, left_row, RANK)
    place = row[:, None].to(tl.int64) * columns + column[None, :]
    used = inside & (column[None, :] < columns)
    d = tl.load(grad + place, mask=used, other=0.0).to(tl.float32)
    tl.store(grad_gate + place, (d * u * slope(g, KIND)).to(grad_gate.dtype.element_ty), mask=used)
    tl.store(grad_up + place, (d * activate(g, KIND)).to(grad_up.dtype.element_ty), mask=used)


def covers(gate: Tensor, up: Tensor, gate_left: Tensor, up_left: Tensor, gate_right: Tensor, up_right: Tensor) -> bool:
    """Whether the functions below take these."""
    products = gate.is_contiguous() and up.is_contiguous() and gate.shape == up.shape
    rights = gate_right.is_contiguous() and up_right.is_contiguous() and gate_right.shape == up_right.shape
    lefts = gate_left.stride() == up_left.stride() and gate_left.stride(1) == 1
    tensors = (gate, up, gate_left, up_left, gate_right, up_right)
    return (
        products and rights and lefts and gate_right.shape[1] <= LARGEST_RANK and len({t.dtype for t in tensors}) == 1
    )


def gate_products(
    gate: Tensor,
    up: Tensor,
    gate_left: Tensor,
    up_left: Tensor,
    gate_right: Tensor,
    up_right: Tensor,
    kind: str,
) -> Tensor:
    """act(gate + gate_left gate_right^T) (up + up_left up_right^T), in fp32, rounded once.

    Args:
        gate: (rows, columns), contiguous.
        up: The same.
        gate_left: (rows, rank), values of a row side by side.
        up_left: The same, of the same strides.
        gate_right: (columns, rank), contiguous.
        up_right: The same.
        kind: One of `gated.GATES`.

    Returns:
        (rows, columns).
    """
    out = torch.empty_like(gate)
    _launch(_gate_tile, (out,), gate, up, gate_left, up_left, gate_right, up_right, kind)
    return out


def gate_products_backward(
    grad: Tensor,
    gate: Tensor,
    up: Tensor,
    gate_left: Tensor,
    up_left: Tensor,
    gate_right: Tensor,
    up_right: Tensor,
    kind: str,
) -> tuple[Tensor, Tensor]:
    """Gradients of `gate_products` with respect to gate and up, each (rows, columns), for `grad` of that shape."""
    found = torch.empty_like(gate), torch.empty_like(up)
    _launch(_gate_tile_backward, (grad, *found), gate, up, gate_left, up_left, gate_right, up_right, kind)
    return found


def _launch(kernel, first: tuple[Tensor, ...], gate: Tensor, up: Tensor, *rest) -> None:
    gate_left, up_left, gate_right, up_right, kind = rest
    rows, columns = gate.shape
    rank = gate_right.shape[1]
    with torch.cuda.device_of(gate):
        kernel[(triton.cdiv(columns, COLUMNS), triton.cdiv(rows, ROWS))](
            *first,
            gate,
            up,
            gate_left,
            up_left,
            gate_right,
            up_right,
            rows,
            columns,
            rank,
            gate_left.stride(0),
            KIND=kind,
            ROWS=ROWS,
            COLUMNS=COLUMNS,
            RANK=max(16, triton.next_power_of_2(rank)),
            num_warps=WARPS,
        )
