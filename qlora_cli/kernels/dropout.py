"""Values, a seed and a rate in, dropped and rescaled values out; the same seed drops the same places again (Triton)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048


@triton.jit
def _drop(x, seed, out, elements, rate, ADD: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < elements
    kept = tl.rand(tl.load(seed), place.to(tl.uint32)) >= rate
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    value = tl.where(kept, value / (1.0 - rate), 0.0)
    if ADD:
        value += tl.load(out + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, value.to(out.dtype.element_ty), mask=inside)


def drop(x: Tensor, seed: Tensor, rate: float, add_to: Tensor | None = None) -> Tensor:
    """Zeroes each value with probability `rate` and divides the others by 1 - rate.

    Args:
        x: Contiguous, any shape, fewer than 2^32 values.
        seed: int64 scalar on x's device; never read by the host.
        rate: In [0, 1).
        add_to: Contiguous, like x; receives the sum in place when given.

    Returns:
        A new tensor like x, or `add_to`.
    """
    out = torch.empty_like(x) if add_to is None else add_to
    elements = x.numel()
    grid = (triton.cdiv(elements, BLOCK),)
    with torch.cuda.device_of(x):
        _drop[grid](x, seed, out, elements, rate, ADD=add_to is not None, BLOCK=BLOCK)
    return out
