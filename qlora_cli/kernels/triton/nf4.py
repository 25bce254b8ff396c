"""Dequantisation of NF4 and FP4 weights to 16 or 32 bits, in one pass over memory (Triton).

Bit-equal to bitsandbytes: the same fp32 products in the same order, no fused multiply-add, one rounding at the store.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# A program takes TILE values, 8 a thread: a 4-byte load and a 16-byte store each. H200, six layers of GPT-NeoX-20B:
# 1.76 ms with 4,096 values and 4 warps, 1.94 with 8, 2.03 with 8,192; tiles of whole blocks, 32 values a thread, 2.20.
TILE = 4096
WARPS = 4


@triton.jit
def block_scales(
    absmax,
    nested_absmax,
    nested_code,
    offset,
    block,
    used,
    NESTED_BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr,
    OFFSETS: tl.constexpr,
):
    """Scales, fp32, of blocks of 4-bit values: plain, or from their own 8-bit blocks."""
    if NESTED:
        level = tl.load(absmax + block, mask=used, other=0).to(tl.int32)
        scale = tl.load(nested_code + level) * tl.load(nested_absmax + block // NESTED_BLOCKSIZE, mask=used, other=0.0)
        if OFFSETS:
            scale = scale + tl.load(offset + block // NESTED_BLOCKSIZE, mask=used, other=0.0)
        else:
            scale = scale + tl.load(offset)
    else:
        scale = tl.load(absmax + block, mask=used, other=0.0)
    return scale


@triton.jit
def group_values(packed, code, scale, first_byte, used):
    """Values, fp32 (groups, 8), of groups of 8 that begin with `first_byte` of `packed`: code[nibble] scale, high nibble
    first; `used` is the mask, (groups, 4), of their bytes."""
    byte_at = packed + first_byte[:, None] + tl.arange(0, 4)[None, :]
    byte = tl.load(byte_at, mask=used, other=0).to(tl.int32)
    return tl.interleave(tl.load(code + (byte >> 4)), tl.load(code + (byte & 15))) * scale[:, None]


@triton.jit
def _dequantize(
    packed,
    absmax,
    code,
    nested_absmax,
    nested_code,
    offset,
    out,
    first_block,
    elements,
    bytes_,
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr,
    OFFSETS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    # The last values first: the product that follows begins with the first ones, which are then still in the cache.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    group = program.to(tl.int64) * GROUPS + tl.arange(0, GROUPS)  # of 8 values; a large embedding has more than 2^31
    used = group * 8 < elements
    block = first_block + group * 8 // BLOCKSIZE
    scale = block_scales(absmax, nested_absmax, nested_code, offset, block, used, NESTED_BLOCKSIZE, NESTED, OFFSETS)
    local_byte = group[:, None] * 4 + tl.arange(0, 4)[None, :]
    values = group_values(packed + first_block * (BLOCKSIZE // 2), code, scale, group * 4, local_byte < bytes_)
    local = group[:, None] * 8 + tl.arange(0, 8)[None, :]
    tl.store(out + local, values.to(out.dtype.element_ty), mask=local < elements)


def dequantize_4bit(
    weight: Any, out: Tensor, first_element: int = 0, *, tile: int = TILE, warps: int = WARPS
) -> Tensor:
    """Writes a packed weight's values from `first_element` on that fill `out`, and returns `out`.

    Args:
        weight: A `FrozenWeight` (kernels/weights.py, which imports this module); its blocksize is a power of two from 8 on.
        out: Contiguous bf16, fp16 or fp32 of any shape.
        first_element: Multiple of the blocksize.
        tile: Values a program writes, a power of two from 8 on.
        warps: Warps a program has.

    Raises:
        ValueError: `first_element` is inside a block, or a tensor is not contiguous.
    """
    packed, absmax, code, nested_absmax, nested_code, offset, blocksize, nested_blocksize = weight[3:11]
    assert packed is not None and absmax is not None
    if first_element % blocksize or not (packed.is_contiguous() and absmax.is_contiguous() and out.is_contiguous()):
        raise ValueError(f"element {first_element} is inside a block of {blocksize}, or a tensor is not contiguous")
    elements = out.numel()
    with torch.cuda.device_of(out):
        _dequantize[(triton.cdiv(elements, tile),)](
            packed,
            absmax,
            code,
            nested_absmax,
            nested_code,
            offset,
            out,
            first_element // blocksize,
            elements,
            (elements + 1) // 2,
            BLOCKSIZE=blocksize,
            NESTED_BLOCKSIZE=nested_blocksize,
            NESTED=nested_absmax is not None,
            OFFSETS=offset is not None and offset.numel() > 1,
            GROUPS=tile // 8,
            num_warps=warps,
            enable_fp_fusion=False,
        )
    return out
