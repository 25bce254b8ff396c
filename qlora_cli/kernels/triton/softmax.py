"""Cross-entropy of a chunk of logits, which are overwritten by their gradient (Triton)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
WARPS = 16


@triton.jit
def _cap(x, softcap, SOFTCAP: tl.constexpr):
    if SOFTCAP:
        # tanh(z) = 1 - 2 / (exp(2 z) + 1): exact at both ends, and every Triton has exp.
        x = softcap * (1.0 - 2.0 / (tl.exp(2.0 * x / softcap) + 1.0))
    return x


@triton.jit
def _loss_and_gradient(
    logits, row_stride, targets, losses, vocabulary, scale, softcap, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    row = logits + token * row_stride
    target = tl.load(targets + token)
    highest = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    for first in range(0, vocabulary, BLOCK):
        place = first + tl.arange(0, BLOCK)
        x = tl.load(row + place, mask=place < vocabulary, other=float("-inf")).to(tl.float32)
        x = tl.where(place < vocabulary, _cap(x * scale, softcap, SOFTCAP), float("-inf"))
        new_highest = tl.maximum(highest, tl.max(x, axis=0))
        total = total * tl.exp(highest - new_highest) + tl.sum(tl.exp(x - new_highest), axis=0)
        highest = new_highest
    logsumexp = highest + tl.log(total)
    counts = target >= 0
    wanted = _cap(tl.load(row + tl.maximum(target, 0)).to(tl.float32) * scale, softcap, SOFTCAP)
    tl.store(losses + token, tl.where(counts, logsumexp - wanted, 0.0))
    tl.debug_barrier()  # every thread has read the target's logit before any overwrites it
    for first in range(0, vocabulary, BLOCK):
        place = first + tl.arange(0, BLOCK)
        x = tl.load(row + place, mask=place < vocabulary, other=0.0).to(tl.float32)
        x = _cap(x * scale, softcap, SOFTCAP)
        gradient = (tl.exp(x - logsumexp) - tl.where(place == target, 1.0, 0.0)) * scale
        if SOFTCAP:
            gradient *= 1.0 - (x / softcap) * (x / softcap)
        gradient = tl.where(counts, gradient, 0.0)
        tl.store(row + place, gradient.to(logits.dtype.element_ty), mask=place < vocabulary)


def loss_and_gradient_(logits: Tensor, targets: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Cross-entropy of each token; `logits` become the gradient of the sum with respect to them.

    Args:
        logits: (tokens, vocabulary), rows contiguous; raw, before scale and cap.
        targets: (tokens,) int64; a negative one counts nothing.
        scale: Factor on the logits.
        softcap: Logits become softcap * tanh(logits / softcap); None for none.

    Returns:
        fp32 (tokens,).
    """
    tokens, vocabulary = logits.shape
    losses = torch.empty(tokens, dtype=torch.float32, device=logits.device)
    with torch.cuda.device_of(logits):
        _loss_and_gradient[(tokens,)](
            logits,
            logits.stride(0),
            targets,
            losses,
            vocabulary,
            scale,
            softcap or 0.0,
            SOFTCAP=softcap is not None,
            BLOCK=min(BLOCK, triton.next_power_of_2(vocabulary)),
            num_warps=WARPS,
        )
    return losses
