"""e4m3 codes of a stack of 4-bit matrices, straight or transposed, over one scale for each matrix (Triton, PTX).

The 16 values of a block are 16 codes: four registers, of which a byte permutation fetches four at a time. So a value
costs two instructions, where looking it up and rounding it takes longer than its bytes do on their way.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlora_cli.kernels.triton import float8 as conversion
from qlora_cli.kernels.triton.nf4 import block_scales
from qlora_cli.kernels.weights import FrozenWeight, reserved_room

BLOCKS, WARPS = 128, 4  # of a program that writes them straight
TURNED_ROWS, TURNED_BLOCKS, TURNED_WARPS = 128, 1, 4  # rows, and blocks of a row, of one that writes them transposed

QUAD = tl.constexpr(
    """{
    .reg .b16 low, high;
    cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
    cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
    mov.b32 $0, {low, high};
    }"""
)
# A permutation takes the index of each byte from 4 bits; of the 16 codes it chooses among 8, so two and a choice.
LOOK_UP = tl.constexpr(
    """{
    .reg .b32 odd, number, upper, first, second;
    shl.b32 number, $2, 4;
    and.b32 number, number, 0xf0f0f0f0;
    shr.u32 odd, $2, 4;
    and.b32 odd, odd, 0x0f0f0f0f;
    or.b32 number, number, odd;
    shr.u32 upper, number, 1;
    and.b32 upper, upper, 0x44444444;
    or.b32 upper, upper, 0x32103210;
    and.b32 number, number, 0x77777777;
    prmt.b32 first, $3, $4, number;
    prmt.b32 second, $5, $6, number;
    prmt.b32 $0, first, second, upper;
    shr.u32 number, number, 16;
    shr.u32 upper, upper, 16;
    prmt.b32 first, $3, $4, number;
    prmt.b32 second, $5, $6, number;
    prmt.b32 $1, first, second, upper;
    }"""
)
TURN = tl.constexpr(
    """{
    .reg .b32 upper, lower;
    prmt.b32 upper, $4, $5, 0x5140;
    prmt.b32 lower, $6, $7, 0x5140;
    prmt.b32 $0, upper, lower, 0x5410;
    prmt.b32 $1, upper, lower, 0x7632;
    prmt.b32 upper, $4, $5, 0x7362;
    prmt.b32 lower, $6, $7, 0x7362;
    prmt.b32 $2, upper, lower, 0x5410;
    prmt.b32 $3, upper, lower, 0x7632;
    }"""
)


@triton.jit
def _quad(code, scale, inverse, FIRST: tl.constexpr):
    """Four entries of the tables of blocks, from the FIRST on, as one register."""
    return tl.inline_asm_elementwise(
        QUAD,
        "=r,f,f,f,f",
        [
            tl.load(code + FIRST) * scale * inverse,
            tl.load(code + FIRST + 1) * scale * inverse,
            tl.load(code + FIRST + 2) * scale * inverse,
            tl.load(code + FIRST + 3) * scale * inverse,
        ],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def _look_up(word, a, b, c, d):
    """8 values, high nibble first, in the table of their block: two registers of four codes."""
    return tl.inline_asm_elementwise(
        LOOK_UP, "=&r,=&r,r,r,r,r,r", [word, a, b, c, d], dtype=(tl.int32, tl.int32), is_pure=True, pack=1
    )


@triton.jit
def _turn(a, b, c, d):
    """Four registers of four bytes, transposed."""
    return tl.inline_asm_elementwise(
        TURN, "=&r,=&r,=&r,=&r,r,r,r,r", [a, b, c, d], dtype=(tl.int32,) * 4, is_pure=True, pack=1
    )


@triton.jit
def _codes_of(
    packed,
    absmax,
    code,
    nested_absmax,
    nested_code,
    offset,
    inverse,
    block,
    used,
    NESTED_BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr,
    OFFSETS: tl.constexpr,
):
    """Codes of whole blocks, (..., 8) twice: the first four and the last four of each 8 values."""
    scale = block_scales(absmax, nested_absmax, nested_code, offset, block, used, NESTED_BLOCKSIZE, NESTED, OFFSETS)
    place = tl.expand_dims(block.to(tl.int64) * 8, -1) + tl.arange(0, 8)
    word = tl.load(packed + place, mask=tl.expand_dims(used, -1), other=0)
    return _look_up(
        word,
        tl.expand_dims(_quad(code, scale, inverse, 0), -1),
        tl.expand_dims(_quad(code, scale, inverse, 4), -1),
        tl.expand_dims(_quad(code, scale, inverse, 8), -1),
        tl.expand_dims(_quad(code, scale, inverse, 12), -1),
    )


@triton.jit
def _unpack_straight(
    packed,
    absmax,
    code,
    nested_absmax,
    nested_code,
    offset,
    stack_scale,
    out,
    first_block,
    blocks,
    matrix_blocks,
    NESTED_BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr,
    OFFSETS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    # The last values first, as in nf4.py.
    local = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCKS + tl.arange(0, BLOCKS)
    used = local < blocks
    block = first_block + local
    inverse = tl.div_rn(1.0, tl.load(stack_scale + block // matrix_blocks, mask=used, other=1.0))
    low, high = _codes_of(
        packed,
        absmax,
        code,
        nested_absmax,
        nested_code,
        offset,
        inverse,
        block,
        used,
        NESTED_BLOCKSIZE,
        NESTED,
        OFFSETS,
    )
    both = tl.reshape(tl.join(low, high), (BLOCKS, 16))
    tl.store(out + local.to(tl.int64)[:, None] * 16 + tl.arange(0, 16)[None, :], both, mask=used[:, None])


@triton.jit
def _unpack_turned(
    packed,
    absmax,
    code,
    nested_absmax,
    nested_code,
    offset,
    stack_scale,
    out,
    first_expert,
    rows,
    row_blocks,
    NESTED_BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr,
    OFFSETS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Four rows at a time, whose codes of a column are a register of the result's row."""
    expert = first_expert + tl.program_id(2)
    inverse = tl.div_rn(1.0, tl.load(stack_scale + expert))
    four = tl.program_id(0) * (ROWS // 4) + tl.arange(0, ROWS // 4)
    across = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    used = (four < rows // 4)[:, None] & (across < row_blocks)[None, :]
    block = (expert * rows + 4 * four)[:, None] * row_blocks + across[None, :]
    a0, b0 = _codes_of(
        packed,
        absmax,
        code,
        nested_absmax,
        nested_code,
        offset,
        inverse,
        block,
        used,
        NESTED_BLOCKSIZE,
        NESTED,
        OFFSETS,
    )
    a1, b1 = _codes_of(
        packed, absmax, code, nested_absmax, nested_code, offset, inverse, block + row_blocks, used,
        NESTED_BLOCKSIZE, NESTED, OFFSETS,
    )  # fmt: skip
    a2, b2 = _codes_of(
        packed, absmax, code, nested_absmax, nested_code, offset, inverse, block + 2 * row_blocks, used,
        NESTED_BLOCKSIZE, NESTED, OFFSETS,
    )  # fmt: skip
    a3, b3 = _codes_of(
        packed, absmax, code, nested_absmax, nested_code, offset, inverse, block + 3 * row_blocks, used,
        NESTED_BLOCKSIZE, NESTED, OFFSETS,
    )  # fmt: skip
    c0, c1, c2, c3 = _turn(a0, a1, a2, a3)
    c4, c5, c6, c7 = _turn(b0, b1, b2, b3)
    even = tl.join(tl.join(c0, c4), tl.join(c2, c6))
    odd = tl.join(tl.join(c1, c5), tl.join(c3, c7))
    turned = tl.trans(tl.reshape(tl.join(even, odd), (ROWS // 4, BLOCKS * 64)))
    column = tl.program_id(1) * (BLOCKS * 64) + tl.arange(0, BLOCKS * 64)
    inside = (column < row_blocks * 64)[:, None] & (four < rows // 4)[None, :]
    start = tl.program_id(2).to(tl.int64) * row_blocks * 64 + column
    tl.store(out + start[:, None] * (rows // 4) + four[None, :], turned, mask=inside)


def unpack_stack(
    weight: FrozenWeight,
    experts: int,
    first: int,
    some: int,
    *,
    transposed: bool,
    by_table: bool | None = None,
    tile: tuple[int, ...] | None = None,
    warps: int | None = None,
) -> Tensor:
    """Codes of some experts' matrices, over their `stack_scale`, in the buffer of `reserve_values`.

    Args:
        weight: Of `float8.with_stack_scale`.
        experts: In the stack.
        first: The first of these experts.
        some: Their number.
        transposed: Whether they are (in, out).
        by_table: Whether rows are whole blocks and looked up by PTX; None for wherever that can be.
        tile: Blocks of a program, or, transposed, rows and blocks of a row.
        warps: Of a program.

    Returns:
        e4m3 (some, out, in), or (some, in, out), contiguous.
    """
    assert weight.packed is not None and weight.stack_scale is not None
    device, rows, columns = weight.packed.device, weight.rows // experts, weight.columns
    shape = (columns, rows) if transposed else (rows, columns)
    out = reserved_room(some * shape[0], shape[1], torch.float8_e4m3fn, device)
    if by_table is None:
        by_table = weight.packed.is_cuda and torch.version.hip is None and columns % 64 == 0 and weight.blocksize == 64
    if not by_table:
        conversion.unpack(
            weight, weight.stack_scale[first:], out, first * rows, (first + some) * rows, transposed=transposed,
            matrix_rows=rows,
        )  # fmt: skip
        return out.view(some, *shape)
    tensors = (weight.packed.view(torch.int32), *weight[4:9], weight.stack_scale, out.view(torch.int32))
    constants = {
        "NESTED_BLOCKSIZE": weight.nested_blocksize,
        "NESTED": weight.nested_absmax is not None,
        "OFFSETS": weight.offset is not None and weight.offset.numel() > 1,
        "enable_fp_fusion": False,
    }
    with torch.cuda.device_of(out):
        if transposed:
            height, across = tile or (TURNED_ROWS, TURNED_BLOCKS)
            grid = (triton.cdiv(rows, height), triton.cdiv(columns // 64, across), some)
            _unpack_turned[grid](
                *tensors, first, rows, columns // 64, **constants, ROWS=height, BLOCKS=across,
                num_warps=warps or TURNED_WARPS,
            )  # fmt: skip
        else:
            blocks = rows * columns // 64
            (height,) = tile or (BLOCKS,)
            _unpack_straight[(triton.cdiv(some * blocks, height),)](
                *tensors, first * blocks, some * blocks, blocks, **constants, BLOCKS=height, num_warps=warps or WARPS
            )
    return out.view(some, *shape)
