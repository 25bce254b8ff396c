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
TURNED_ROWS, TURNED_BLOCKS, TURNED_WARPS = 64, 4, 4  # rows, and blocks of a row, of one that writes them transposed

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
    .reg .b32 number, upper, first, second;
    shr.u32 upper, $2, 1;
    and.b32 upper, upper, 0x44444444;
    or.b32 upper, upper, 0x32103210;
    and.b32 number, $2, 0x77777777;
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
SWAP = tl.constexpr("prmt.b32 $0, $1, 0, 0x2301;")
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
    """8 values in the table of their block: two registers of four codes, of which the second comes before the first and
    the last before the third, as in bytes whose high nibble is the first."""
    return tl.inline_asm_elementwise(
        LOOK_UP, "=&r,=&r,r,r,r,r,r", [word, a, b, c, d], dtype=(tl.int32, tl.int32), is_pure=True, pack=1
    )


@triton.jit
def _swap(codes):
    """Four codes in their order."""
    return tl.inline_asm_elementwise(SWAP, "=r,r", [codes], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def _turn(a, b, c, d):
    """Four registers of four bytes, transposed."""
    return tl.inline_asm_elementwise(
        TURN, "=&r,=&r,=&r,=&r,r,r,r,r", [a, b, c, d], dtype=(tl.int32,) * 4, is_pure=True, pack=1
    )


@triton.jit
def _codes_of(
    words,
    absmax,
    code,
    nested_absmax,
    nested_code,
    offset,
    inverse,
    before,
    block,
    used,
    NESTED_BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr,
    OFFSETS: tl.constexpr,
):
    """Codes of blocks of a matrix at `words`, (..., 8) twice: of the first and of the last four of each 8 values, as
    `_look_up` gives them; so many blocks lie `before` the matrix."""
    scale = block_scales(
        absmax, nested_absmax, nested_code, offset, before + block, used, NESTED_BLOCKSIZE, NESTED, OFFSETS
    )
    word = tl.load(words + tl.expand_dims(block * 8, -1) + tl.arange(0, 8), mask=tl.expand_dims(used, -1), other=0)
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
    first_expert,
    blocks,
    NESTED_BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr,
    OFFSETS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """So many blocks of a matrix; the last ones first, as in nf4.py."""
    number = tl.num_programs(1) - 1 - tl.program_id(1)
    expert = first_expert + number
    inverse = tl.div_rn(1.0, tl.load(stack_scale + expert))
    block = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCKS + tl.arange(0, BLOCKS)
    used = block < blocks
    low, high = _codes_of(
        packed + expert.to(tl.int64) * blocks * 8, absmax, code, nested_absmax, nested_code, offset, inverse,
        expert * blocks, block, used, NESTED_BLOCKSIZE, NESTED, OFFSETS,
    )  # fmt: skip
    both = tl.reshape(tl.join(_swap(low), _swap(high)), (BLOCKS, 16))
    to = out + number.to(tl.int64) * blocks * 16
    tl.store(to + block[:, None] * 16 + tl.arange(0, 16)[None, :], both, mask=used[:, None])


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
    before = expert * rows * row_blocks
    words = packed + expert.to(tl.int64) * rows * row_blocks * 8
    block = four[:, None] * 4 * row_blocks + across[None, :]
    a0, b0 = _codes_of(
        words, absmax, code, nested_absmax, nested_code, offset, inverse, before, block, used,
        NESTED_BLOCKSIZE, NESTED, OFFSETS,
    )  # fmt: skip
    a1, b1 = _codes_of(
        words, absmax, code, nested_absmax, nested_code, offset, inverse, before, block + row_blocks, used,
        NESTED_BLOCKSIZE, NESTED, OFFSETS,
    )  # fmt: skip
    a2, b2 = _codes_of(
        words, absmax, code, nested_absmax, nested_code, offset, inverse, before, block + 2 * row_blocks, used,
        NESTED_BLOCKSIZE, NESTED, OFFSETS,
    )  # fmt: skip
    a3, b3 = _codes_of(
        words, absmax, code, nested_absmax, nested_code, offset, inverse, before, block + 3 * row_blocks, used,
        NESTED_BLOCKSIZE, NESTED, OFFSETS,
    )  # fmt: skip
    c1, c0, c3, c2 = _turn(a0, a1, a2, a3)
    c5, c4, c7, c6 = _turn(b0, b1, b2, b3)
    even = tl.join(tl.join(c0, c4), tl.join(c2, c6))
    odd = tl.join(tl.join(c1, c5), tl.join(c3, c7))
    turned = tl.trans(tl.reshape(tl.join(even, odd), (ROWS // 4, BLOCKS * 64)))
    column = tl.program_id(1) * (BLOCKS * 64) + tl.arange(0, BLOCKS * 64)
    inside = (column < row_blocks * 64)[:, None] & (four < rows // 4)[None, :]
    to = out + tl.program_id(2).to(tl.int64) * row_blocks * 16 * rows
    tl.store(to + column[:, None] * (rows // 4) + four[None, :], turned, mask=inside)


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
            _unpack_straight[(triton.cdiv(blocks, height), some)](
                *tensors, first, blocks, **constants, BLOCKS=height, num_warps=warps or WARPS
            )
    return out.view(some, *shape)
