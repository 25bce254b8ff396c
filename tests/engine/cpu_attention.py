"""Packed attention's op on the CPU, for compiled layers there: for cards it is flash attention's, which no CPU has.

Like that it gives the log-sum-exp, from which sinks follow, and its backward pass makes the weights from it.
"""

from itertools import pairwise

import torch

from qlora_cli.kernels.sink_attention import add_sinks


def _scores(query, key, scale, window, cap):
    """Attention's scores of one row, (heads, length, length), for (length, heads, size)."""
    distance = torch.arange(len(query))[:, None] - torch.arange(len(query))[None, :]
    seen = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    return (scores if cap is None else cap * torch.tanh(scores / cap)).masked_fill(~seen, float("-inf"))


def _rows(boundaries, *tensors):
    for start, end in pairwise(boundaries.tolist()):
        yield tuple(tensor[start:end] for tensor in tensors)


def attend(query, key, value, sinks, boundaries, longest, scale, window, cap, equal_rows):
    groups = query.shape[1] // key.shape[1]
    rows = _rows(boundaries, query, key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1))
    scores = [(_scores(q, k, scale, window, cap), v) for q, k, v in rows]
    out = torch.cat([torch.einsum("hqk,khd->qhd", s.softmax(dim=-1), v) for s, v in scores])
    lse = torch.cat([s.logsumexp(dim=-1).float() for s, _ in scores], dim=1)
    return out, (lse if sinks is None else add_sinks(out, lse, sinks)).flatten()


def attend_backward(grad, query, key, value, out, lse, boundaries, longest, scale, window, cap, equal_rows):
    groups = query.shape[1] // key.shape[1]
    found = []
    keys, values = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    sums = lse.view(query.shape[1], query.shape[0]).t()  # (tokens, heads)
    for g, q, k, v, o, total in _rows(boundaries, grad, query, keys, values, out, sums):
        scores = _scores(q, k, scale, window, cap)
        weights = (scores - total.t()[..., None]).exp().to(q.dtype)
        slope = torch.einsum("qhd,khd->hqk", g, v)
        slope = weights * (slope - (g * o).sum(-1).t()[..., None]) * scale
        if cap is not None:
            slope = torch.where(weights > 0, slope * (1 - (scores / cap) ** 2), 0.0)
        of_key, of_value = torch.einsum("hqk,qhd->khd", slope, q), torch.einsum("hqk,qhd->khd", weights, g)
        shared = [t.unflatten(1, (-1, groups)).sum(2) for t in (of_key, of_value)]
        found.append((torch.einsum("hqk,khd->qhd", slope, k), *shared))
    return tuple(torch.cat(parts) for parts in zip(*found, strict=True))


torch.library.register_kernel("qlora::packed_attention", "cpu", attend)
torch.library.register_kernel("qlora::packed_attention_backward", "cpu", attend_backward)
