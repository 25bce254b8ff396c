"""A few rows of activations and stacked 4-bit weights in; their products, an adapter's added, out: one pass over memory.

Decoding reads every weight once a token, so that these kernels are as fast as the weights stream in. Weights that share
their input (query, key and value; gate and up) are stacked and read by one launch, and the adapter costs one small
launch before it: `project` gives scaling A x, and the big kernel adds B times that to what it writes.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from qlora_cli.kernels import gemv_programs

MAX_TOKENS = 64  # rows of activations that one launch takes; more are better dequantised once and multiplied as usual
PROJECT_COLUMNS = 1024  # columns of A a program of `project` sums over


class StackedWeight(NamedTuple):
    """Weights of the same input, one below the other, in bitsandbytes' 4-bit format.

    Attributes:
        rows: out features, all together.
        columns: in features, a multiple of the blocksize.
        packed: uint8 (rows * columns / 2,), the high nibble first.
        absmax: fp32 (blocks,), or uint8 codes when nested.
        code: fp32 (16,).
        nested_absmax: fp32 (blocks / nested_blocksize,), or None.
        nested_code: fp32 (256,), or None.
        nested_offset: fp32, like `nested_absmax`: each weight has an offset of its own; or None.
        blocksize: Values that share a scale.
        nested_blocksize: Scales that share a nested scale.
    """

    rows: int
    columns: int
    packed: Tensor
    absmax: Tensor
    code: Tensor
    nested_absmax: Tensor | None = None
    nested_code: Tensor | None = None
    nested_offset: Tensor | None = None
    blocksize: int = 64
    nested_blocksize: int = 256


class StackedAdapter(NamedTuple):
    """Adapters of stacked weights.

    Attributes:
        a: (ranks, columns), the A of every weight, one below the other, each filled with zeros to the same rank.
        scaling: fp32 (ranks,); 0 turns an adapter off.
        b: (rows, rank), the B of every weight, one below the other.
        first_rank: int32 (rows / ROW_UNIT,), the row of `a` that belongs to the first column of `b`.
    """

    a: Tensor
    scaling: Tensor
    b: Tensor
    first_rank: Tensor


ROW_UNIT = 64  # a weight in a stack has a multiple of so many rows


class Tiling(NamedTuple):
    """How a kernel divides its work.

    Attributes:
        rows: Weight rows a program takes, at most ROW_UNIT.
        blocks: Quantisation blocks of each row taken at once.
        warps: Of a program.
    """

    rows: int
    blocks: int
    warps: int


def choose_tiling(tokens: int, rows: int, columns: int) -> Tiling:
    """How to divide a product; measured by benchmarks/decode_gemv.py."""
    if tokens == 1:
        return Tiling(rows=4, blocks=64, warps=4)
    return Tiling(rows=32 if tokens <= 16 else 64, blocks=2, warps=4)


def project(x: Tensor, adapter: StackedAdapter | None) -> tuple[Tensor, Tensor | None]:
    """scaling A x, in parts that have yet to be summed; and what `gemv_programs.multiply_one` wants to read of x.

    Args:
        x: (tokens, columns), contiguous.
        adapter: `a` in the dtype of x; None where there is nothing to project.

    Returns:
        fp32 (parts, tokens, ranks); and of one token its values in fp32, (8, columns / 8): every 8th, from each of
        the first 8 on. None for more tokens.
    """
    tokens, columns = x.shape
    ranks = adapter.a.shape[0] if adapter is not None else 0
    parts = triton.cdiv(columns, PROJECT_COLUMNS)
    out = torch.empty(parts, tokens, ranks, dtype=torch.float32, device=x.device)
    spread = torch.empty(8, columns // 8, dtype=torch.float32, device=x.device) if tokens == 1 else None
    rows = 2 if tokens == 1 else 16
    with torch.cuda.device_of(x):
        gemv_programs.project[(max(1, triton.cdiv(ranks, rows)), parts)](
            x,
            adapter.a if adapter is not None else x,
            adapter.scaling if adapter is not None else out,
            out,
            spread,
            tokens,
            columns,
            ranks,
            SPAN=PROJECT_COLUMNS,
            STEP=PROJECT_COLUMNS if tokens == 1 else 256,
            TOKENS=1 if tokens == 1 else max(16, triton.next_power_of_2(tokens)),
            RANKS=rows,
            num_warps=4,
        )
    return out, spread


def multiply(
    x: Tensor,
    weight: StackedWeight,
    adapter: StackedAdapter | None = None,
    bias: Tensor | None = None,
    *,
    tiling: Tiling | None = None,
    shuffle: bool | None = None,
) -> Tensor:
    """x W^T + scaling (x A^T) B^T + bias for every weight in the stack.

    One token is computed in fp32 from the exact 4-bit values. More tokens take the values rounded to the dtype of x,
    bit for bit those of a dequantisation.

    Args:
        x: (tokens, columns), contiguous, at most MAX_TOKENS tokens.
        weight: The stack.
        adapter: Of the stack; `a` and `b` in the dtype of x.
        bias: (rows,) or None.
        tiling: How to divide the work; None for what is known to be fast.
        shuffle: Whether table look-ups go through warp shuffles, which the interpreter lacks; None for on CUDA only.

    Returns:
        (tokens, rows) in the dtype of x.

    Raises:
        ValueError: The shapes do not fit, or there are too many tokens.
    """
    tokens, columns = x.shape
    if columns != weight.columns or columns % weight.blocksize or tokens > MAX_TOKENS or not x.is_contiguous():
        raise ValueError(f"{tuple(x.shape)} activations do not suit a ({weight.rows}, {weight.columns}) stack")
    y = torch.empty(tokens, weight.rows, dtype=x.dtype, device=x.device)
    tiling = tiling or choose_tiling(tokens, weight.rows, columns)
    projected = spread = None
    if adapter is not None or tokens == 1:
        projected, spread = project(x, adapter)
    rank, ranks = (adapter.b.shape[1], adapter.a.shape[0]) if adapter is not None else (0, 0)
    parts = projected.shape[0] if projected is not None else 0
    arguments = {
        "BLOCKSIZE": weight.blocksize,
        "NESTED_BLOCKSIZE": weight.nested_blocksize if weight.nested_absmax is not None else 0,
        "RANK": rank,
        "RANK_ROOM": max(16, triton.next_power_of_2(rank)),
        "HAS_BIAS": bias is not None,
        "ROW_UNIT": ROW_UNIT,
        "ROWS": tiling.rows,
        "BLOCKS": tiling.blocks,
        "SHUFFLE": x.is_cuda if shuffle is None else shuffle,
        "num_warps": tiling.warps,
    }
    tensors = (
        weight.packed.view(torch.int32),
        weight.absmax,
        weight.code,
        weight.nested_absmax,
        weight.nested_code,
        weight.nested_offset,
        projected,
        adapter.b if adapter is not None else None,
        adapter.first_rank if adapter is not None else None,
        bias,
        y,
    )
    sizes = (weight.rows, columns // 8, ranks, parts)
    grid = (triton.cdiv(weight.rows, tiling.rows),)
    with torch.cuda.device_of(x):
        if tokens == 1:
            gemv_programs.multiply_one[grid](
                spread, *tensors, *sizes, PART_ROOM=triton.next_power_of_2(parts), **arguments
            )
        else:
            room = max(16, triton.next_power_of_2(tokens))
            # Rounding is that of a dequantisation only when no product of it is fused into a sum.
            gemv_programs.multiply_few[grid](
                x, *tensors, tokens, *sizes, TOKENS=room, enable_fp_fusion=False, **arguments
            )
    return y
