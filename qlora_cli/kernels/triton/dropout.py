"""Dropout by a seed that lies on the device: the same seed drops the same places again (Triton)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

GROUPS = 512  # of 4 values a program


@triton.jit
def keeps(seed, group, rate):
    """Which of the 4 values of each group stay: (..., 2, 2). One draw of the generator gives four numbers."""
    first, second, third, fourth = tl.rand4x(seed, group)
    return tl.join(tl.join(first, third), tl.join(second, fourth)) >= rate


@triton.jit
def _drop(x, seed, out, elements, first_group, rate, GROUPS: tl.constexpr):
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    kept = tl.reshape(keeps(tl.load(seed), (first_group + group).to(tl.uint32), rate), (GROUPS, 4))
    place = group[:, None] * 4 + tl.arange(0, 4)[None, :]
    inside = place < elements
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    value = tl.where(kept, value / (1.0 - rate), 0.0)
    tl.store(out + place, value.to(out.dtype.element_ty), mask=inside)


def drop(x: Tensor, seed: Tensor, rate: float, first_row: int = 0) -> Tensor:
    """Zeroes each value with probability `rate` and divides the others by 1 - rate.

    Args:
        x: Contiguous, any shape, fewer than 2^34 values.
        seed: int64 scalar on x's device; never read by the host.
        rate: In [0, 1).
        first_row: Of x within what the places are numbered in; times the values of a row, a multiple of 4.

    Returns:
        A new tensor like x.
    """
    out = torch.empty_like(x)
    elements = x.numel()
    grid = (triton.cdiv(elements, 4 * GROUPS),)
    with torch.cuda.device_of(x):
        _drop[grid](x, seed, out, elements, first_row * x.shape[-1] // 4, rate, GROUPS=GROUPS)
    return out
