"""Plain PyTorch truth for every training op: slow, readable, differentiable, exact in whatever dtype it is given."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


def qlora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scaling: float, dropped: Tensor
) -> Tensor:
    """x W^T + b + scaling (dropped A^T) B^T, arXiv:2106.09685 eq. 3.

    Args:
        x: (..., in).
        weight: (out, in), dequantised.
        bias: (out,) or None.
        lora_a: (rank, in).
        lora_b: (out, rank).
        scaling: alpha / rank, or alpha / sqrt(rank).
        dropped: x after dropout; x itself without dropout.
    """
    return F.linear(x, weight, bias) + scaling * F.linear(F.linear(dropped, lora_a), lora_b)


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    boundaries: list[int],
    scale: float,
    window: int | None,
    sinks: Tensor | None = None,
    cap: float | None = None,
) -> Tensor:
    """Causal attention within each row of a pack, by materialised scores.

    Args:
        query: (tokens, heads, size).
        key: (tokens, key heads, size); heads is a multiple of key heads.
        value: Like `key`.
        boundaries: Where rows start, and the total: rows + 1 numbers.
        scale: Factor on the scores.
        window: A token sees itself and the window - 1 tokens before it; None for all.
        sinks: (heads,), one more score of each query, of which nothing comes; None for none.
        cap: Scores become cap * tanh(score / cap); None for none.

    Returns:
        (tokens, heads, size).
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    rows = []
    for start, end in pairwise(boundaries):
        scores = torch.einsum("qhd,khd->hqk", query[start:end], key[start:end]) * scale
        scores = scores if cap is None else cap * torch.tanh(scores / cap)
        distance = torch.arange(end - start)[:, None] - torch.arange(end - start)[None, :]
        seen = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
        scores = scores.masked_fill(~seen.to(scores.device), float("-inf"))
        if sinks is not None:
            scores = torch.cat([scores, sinks[:, None, None].expand(-1, end - start, 1)], dim=-1)
        weights = scores.softmax(dim=-1)[..., : end - start]
        rows.append(torch.einsum("hqk,khd->qhd", weights, value[start:end]))
    return torch.cat(rows)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, logit_scale: float, softcap: float | None
) -> Tensor:
    """Sum over tokens of -log softmax(head(hidden))[target], in nats.

    Args:
        hidden: (tokens, size).
        weight: (vocabulary, size).
        bias: (vocabulary,) or None.
        targets: (tokens,) int64.
        logit_scale: Factor on the logits.
        softcap: Logits become softcap * tanh(logits / softcap); None for none.
    """
    logits = F.linear(hidden, weight, bias) * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, targets, reduction="sum")
