"""Choice of experts by a router's logits, and their weights, in one launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _choose(logits, scores, indices, experts, CHOICES: tl.constexpr, ROOM: tl.constexpr, NORMALISED: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    each = tl.arange(0, ROOM)
    value = tl.load(logits + token * experts + each, mask=each < experts, other=float("-inf")).to(tl.float32)
    share = tl.exp(value - tl.max(value, 0))
    total = tl.sum(share, 0)
    rank = tl.zeros((ROOM,), tl.int32) + CHOICES  # of those not chosen
    for number in tl.static_range(CHOICES):
        best = tl.argmax(value, 0, tie_break_left=True)
        rank = tl.where(each == best, number, rank)
        value = tl.where(each == best, float("-inf"), value)
    chosen = rank < CHOICES
    if NORMALISED:
        total = tl.sum(tl.where(chosen, share, 0.0), 0)
    place = token * CHOICES + rank
    tl.store(scores + place, (share / total).to(scores.dtype.element_ty), mask=chosen)
    tl.store(indices + place, each.to(tl.int64), mask=chosen)


def choose_experts(logits: Tensor, choices: int, *, normalised: bool) -> tuple[Tensor, Tensor]:
    """The experts with the highest logits, in order, and their shares of a softmax in fp32.

    Args:
        logits: (tokens, experts), contiguous.
        choices: Experts of a token.
        normalised: Whether the shares of those chosen sum to 1, rather than those of all experts.

    Returns:
        (tokens, choices) in the dtype of the logits, and int64 (tokens, choices).
    """
    tokens, experts = logits.shape
    scores = torch.empty(tokens, choices, dtype=logits.dtype, device=logits.device)
    indices = torch.empty(tokens, choices, dtype=torch.int64, device=logits.device)
    with torch.cuda.device_of(logits):
        _choose[(tokens,)](
            logits,
            scores,
            indices,
            experts,
            CHOICES=choices,
            ROOM=triton.next_power_of_2(experts),
            NORMALISED=normalised,
            num_warps=1,
        )
    return scores, indices
