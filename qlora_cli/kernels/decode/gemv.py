"""GEMV of stacked 4-bit weights with LoRA adapters, for a few rows of activations, in one pass over memory.

Decoding reads every weight once a token, so that these kernels are as fast as the weights stream in. Weights that share
their input (query, key and value; gate and up) are stacked and read by one launch, and the adapter costs one small
launch before it: `project` gives scaling A x, and the big kernel adds B times that to what it writes.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from qlora_cli.kernels.decode import gemv_lanes, gemv_programs
from qlora_cli.kernels.decode.overlap import multiprocessors, overlaps
from qlora_cli.kernels.decode.shared_memory import allow_beside_static
from qlora_cli.kernels.weights import FrozenWeight

MAX_TOKENS = 64  # rows of activations; more are better dequantised once and multiplied as usual
LANE_TOKENS = 16  # up to which `multiply_lanes` is the quicker program
KINDS = {torch.bfloat16: "bf16", torch.float16: "f16"}  # what tensor cores call them
APART_TOKENS = 8  # up to which a token's product is what it is alone, to the bit: guesses of an answer are checked so
PROJECT_COLUMNS = 512  # columns of A a program of `project` sums over, at least
MOST_PARTS = 16  # of a row of A: the product that follows adds them up


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


WIDE_ROWS = 12288  # from which on every multiprocessor of a large card gets several units of 32 rows
NARROW_ROWS = 4224  # up to which no multiprocessor of 132 gets more than two units of 16 rows
RING_BYTES = 16384  # of shared memory beside the table, for weights on their way
ROW_UNIT = 64  # a weight in a stack has a multiple of so many rows


class Tiling(NamedTuple):
    """How `multiply_lanes` divides its work.

    Attributes:
        tiles: 16 weight rows each, of a program's unit of work; at most ROW_UNIT rows.
        warps: Of a program; they share out the columns. Powers of two, this and `tiles`, whose product is at most 8.
        resident: Programs a multiprocessor, at most; each takes one unit after another.
        registers: Most a thread may have; None for what the compiler takes.
    """

    tiles: int
    warps: int
    resident: int
    registers: int | None = None


def choose_tiling(tokens: int, rows: int, columns: int) -> Tiling:
    """How to divide a product: the order of benchmarks/decode.md's sweep on an H200; other shapes follow from it.

    The same for one token and for eight, so that sums have one order.
    """
    if rows >= WIDE_ROWS and tokens <= 8:
        return Tiling(tiles=2, warps=2, resident=4, registers=224)
    if rows <= NARROW_ROWS and tokens <= 8:
        return Tiling(tiles=1, warps=8, resident=2, registers=128)
    return Tiling(tiles=1, warps=4, resident=4, registers=128)


allow_beside_static(gemv_lanes.multiply_lanes.fn.__name__)


def takes_lanes(x: Tensor, weight: FrozenWeight) -> bool:
    """Whether a product is computed by `multiply_lanes`, and not by the portable program."""
    fit = x.shape[0] <= LANE_TOKENS and x.dtype in KINDS and weight.blocksize == 64
    return fit and multiprocessors(x.device) > 0


def span_of(columns: int) -> int:
    """Columns of A that a program sums over."""
    return max(PROJECT_COLUMNS, triton.next_power_of_2(triton.cdiv(columns, MOST_PARTS)))


def project(x: Tensor, adapter: StackedAdapter) -> Tensor:
    """scaling A x, in parts that have yet to be summed.

    Args:
        x: (tokens, columns), contiguous.
        adapter: `a` in the dtype of x.

    Returns:
        fp32 (parts, tokens, ranks).
    """
    tokens, columns = x.shape
    ranks = adapter.a.shape[0]
    span = span_of(columns)
    parts = triton.cdiv(columns, span)
    out = torch.empty(parts, tokens, ranks, dtype=torch.float32, device=x.device)
    apart = tokens <= APART_TOKENS
    rows = 2 if apart else 16
    with torch.cuda.device_of(x):
        gemv_programs.project[(triton.cdiv(ranks, rows), parts, tokens if apart else 1)](
            x,
            adapter.a,
            adapter.scaling,
            out,
            tokens,
            columns,
            ranks,
            SPAN=span,
            TOKENS=1 if apart else max(16, triton.next_power_of_2(tokens)),
            RANKS=rows,
            OVERLAP=overlaps(x.device),
            num_warps=4,
            launch_pdl=overlaps(x.device),
        )
    return out


def multiply(
    x: Tensor,
    weight: FrozenWeight,
    adapter: StackedAdapter | None = None,
    bias: Tensor | None = None,
    *,
    projected: Tensor | None = None,
    tiling: Tiling | None = None,
    shuffle: bool | None = None,
) -> Tensor:
    """x W^T + scaling (x A^T) B^T + bias for every weight in the stack.

    In 16 bits on tensor cores the 16 values are rounded to the dtype of x, and their sums multiplied by the scales in
    fp32; elsewhere the values are rounded after they were scaled, bit for bit as by a dequantisation.

    Args:
        x: (tokens, columns), contiguous, at most MAX_TOKENS tokens.
        weight: 4-bit weights, one below the other, each starting with a nested scale and with an offset for each of its
            nested scales; columns are a multiple of the blocksize.
        adapter: Of the stack; `a` and `b` in the dtype of x.
        bias: (rows,) or None.
        projected: What `project` would give, where that is known; None to compute it.
        tiling: How `multiply_lanes` divides its work; None for what is known to be fast.
        shuffle: Whether the portable program looks values up by warp shuffles, which the interpreter lacks; None for
            on CUDA only.

    Returns:
        (tokens, rows) in the dtype of x.

    Raises:
        ValueError: The shapes do not fit, or there are too many tokens.
    """
    tokens, columns = x.shape
    if columns != weight.columns or columns % weight.blocksize or tokens > MAX_TOKENS or not x.is_contiguous():
        raise ValueError(f"{tuple(x.shape)} activations do not suit a ({weight.rows}, {weight.columns}) stack")
    assert weight.packed is not None
    y = torch.empty(tokens, weight.rows, dtype=x.dtype, device=x.device)
    lanes = takes_lanes(x, weight)
    if lanes and x.data_ptr() % 16:
        x = x.clone()  # loads are of 16 bytes
    b = first_rank = None
    ranks = parts = rank = 0
    if adapter is not None:
        projected = project(x, adapter) if projected is None else projected
        b, first_rank = adapter.b, adapter.first_rank
        ranks, parts, rank = adapter.a.shape[0], projected.shape[0], b.shape[1]
    packed = weight.packed.view(torch.int64 if lanes else torch.int32)
    statistics = (weight.absmax, weight.code, weight.nested_absmax, weight.nested_code, weight.offset)
    operands = (x, packed, *statistics, projected, b, first_rank, bias, y, tokens, weight.rows)
    constants = {
        "NESTED_BLOCKSIZE": weight.nested_blocksize if weight.nested_absmax is not None else 0,
        "RANK": rank,
        "ROOM": max(16, triton.next_power_of_2(rank)),
        "HAS_BIAS": bias is not None,
        "ROW_UNIT": ROW_UNIT,
    }
    with torch.cuda.device_of(x):
        if lanes:
            tiling = tiling or choose_tiling(tokens, weight.rows, columns)
            _multiply_lanes(x, weight, operands, ranks, parts, constants, tiling)
        else:
            shuffle = x.is_cuda if shuffle is None else shuffle
            _multiply_portably(x, weight, operands, ranks, parts, constants, shuffle)
    return y


def _multiply_lanes(
    x: Tensor, weight: FrozenWeight, operands: tuple, ranks: int, parts: int, constants: dict[str, int], tiling: Tiling
) -> None:
    tokens, columns = x.shape
    units = triton.cdiv(weight.rows, 16 * tiling.tiles)
    programs = min(units, multiprocessors(x.device) * tiling.resident)
    row_blocks = columns // weight.blocksize
    overlap = overlaps(x.device)
    stages = max(1, RING_BYTES // (2048 * tiling.tiles * tiling.warps))
    gemv_lanes.multiply_lanes[(programs,)](
        *operands,
        row_blocks,
        ranks,
        parts,
        units,
        **constants,
        PARTS=triton.next_power_of_2(parts),
        TILES=tiling.tiles,
        EIGHTS=triton.next_power_of_2(triton.cdiv(tokens, 8)),
        WARPS=tiling.warps,
        STAGES=stages,
        LATER=str(stages - 1),
        WHOLE=row_blocks % 4 == 0 and weight.rows % (16 * tiling.tiles) == 0,
        OVERLAP=overlap,
        KIND=KINDS[x.dtype],
        num_warps=tiling.warps,
        maxnreg=tiling.registers,
        launch_pdl=overlap,
    )


def _multiply_portably(
    x: Tensor, weight: FrozenWeight, operands: tuple, ranks: int, parts: int, constants: dict[str, int], shuffle: bool
) -> None:
    tokens, columns = x.shape
    rows = (
        32 if tokens <= 16 and x.is_cuda else 64
    )  # the interpreter takes as long for a small program as for a large one
    # Rounding is that of a dequantisation only when no product of it is fused into a sum.
    gemv_programs.multiply_few[(triton.cdiv(weight.rows, rows),)](
        *operands,
        columns // 8,
        ranks,
        parts,
        **constants,
        BLOCKSIZE=weight.blocksize,
        TOKENS=max(16, triton.next_power_of_2(tokens)),
        ROWS=rows,
        BLOCKS=2,
        SHUFFLE=shuffle,
        num_warps=4,
        enable_fp_fusion=False,
    )
