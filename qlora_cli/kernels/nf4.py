"""Packed 4-bit weights with their raw statistics in, 16- or 32-bit values out: one Triton pass over memory.

Bit-equal to bitsandbytes: the same fp32 products in the same order, no fused multiply-add, one rounding at the store.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# A program takes TILE values, 8 a thread: 4-byte loads, 16-byte stores, no layout change between them.
TILE = 4096
WARPS = 4  # H200, 11008 x 4096: 40.5 us with 4, 50.5 with 16


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
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    half: tl.constexpr = BLOCKSIZE // 2
    local_block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    block = first_block + local_block  # (BLOCKS,) int64: a large embedding has more than 2^31 values
    used = local_block * BLOCKSIZE < elements
    if NESTED:
        level = tl.load(absmax + block, mask=used, other=0).to(tl.int32)
        scale = tl.load(nested_code + level) * tl.load(nested_absmax + block // NESTED_BLOCKSIZE, mask=used, other=0.0)
        scale = scale + tl.load(offset)
    else:
        scale = tl.load(absmax + block, mask=used, other=0.0)
    local_byte = local_block[:, None] * half + tl.arange(0, half)[None, :]
    byte = tl.load(packed + first_block * half + local_byte, mask=local_byte * 2 < elements, other=0).to(tl.int32)
    high = tl.load(code + (byte >> 4))
    low = tl.load(code + (byte & 15))
    values = tl.interleave(high, low) * scale[:, None]  # (BLOCKS, BLOCKSIZE) fp32
    local = local_block[:, None] * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]
    tl.store(out + local, values.to(out.dtype.element_ty), mask=local < elements)


def dequantize_4bit(
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    offset: Tensor | None,
    blocksize: int,
    nested_blocksize: int,
    out: Tensor,
    first_element: int = 0,
    *,
    tile: int = TILE,
    warps: int = WARPS,
) -> Tensor:
    """Writes the values from `first_element` on that fill `out`, and returns `out`.

    Args:
        packed: uint8, contiguous, two values a byte, the high nibble first.
        absmax: fp32 scale of each block, or uint8 codes of the scales.
        code: fp32 (16,).
        nested_absmax: fp32 scale of each `nested_blocksize` scales; None for plain statistics.
        nested_code: fp32 (256,); None for plain statistics.
        offset: fp32 scalar, the mean that was taken off the scales; None for plain statistics.
        blocksize: Values that share a scale, a power of two.
        nested_blocksize: Scales that share a nested scale.
        out: Contiguous bf16, fp16 or fp32 of any shape.
        first_element: Multiple of `blocksize`.
        tile: Values a program writes.
        warps: Warps a program has.

    Raises:
        ValueError: `first_element` is inside a block, or a tensor is not contiguous.
    """
    if first_element % blocksize or not (packed.is_contiguous() and absmax.is_contiguous() and out.is_contiguous()):
        raise ValueError(f"element {first_element} is inside a block of {blocksize}, or a tensor is not contiguous")
    elements = out.numel()
    blocks = max(1, tile // blocksize)
    grid = (triton.cdiv(elements, blocks * blocksize),)
    with torch.cuda.device_of(out):
        _dequantize[grid](
            packed,
            absmax,
            code,
            nested_absmax,
            nested_code,
            offset,
            out,
            first_element // blocksize,
            elements,
            BLOCKSIZE=blocksize,
            NESTED_BLOCKSIZE=nested_blocksize,
            NESTED=nested_absmax is not None,
            BLOCKS=blocks,
            num_warps=warps,
            enable_fp_fusion=False,
        )
    return out
