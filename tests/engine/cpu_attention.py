"""Packed attention's op on the CPU, for compiled layers there: for cards it is flash attention's, which no CPU has."""

from itertools import pairwise

import torch


def _weights(query, key, scale, window):
    """Attention's weights of one row, (heads, length, length), for (length, heads, size)."""
    distance = torch.arange(len(query))[:, None] - torch.arange(len(query))[None, :]
    seen = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    return scores.masked_fill(~seen, float("-inf")).softmax(dim=-1)


def _rows(boundaries, *tensors):
    for start, end in pairwise(boundaries.tolist()):
        yield tuple(tensor[start:end] for tensor in tensors)


def attend(query, key, value, boundaries, longest, scale, window):
    groups = query.shape[1] // key.shape[1]
    rows = _rows(boundaries, query, key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1))
    out = [torch.einsum("hqk,khd->qhd", _weights(q, k, scale, window), v) for q, k, v in rows]
    return torch.cat(out), query.new_zeros(query.shape[0] * query.shape[1], dtype=torch.float32)


def attend_backward(grad, query, key, value, out, lse, boundaries, longest, scale, window):
    groups = query.shape[1] // key.shape[1]
    found = []
    for g, q, k, v in _rows(boundaries, grad, query, *(t.repeat_interleave(groups, dim=1) for t in (key, value))):
        weights = _weights(q, k, scale, window)
        slope = torch.einsum("qhd,khd->hqk", g, v)
        slope = weights * (slope - (slope * weights).sum(-1, keepdim=True)) * scale
        of_key, of_value = torch.einsum("hqk,qhd->khd", slope, q), torch.einsum("hqk,qhd->khd", weights, g)
        shared = [t.unflatten(1, (-1, groups)).sum(2) for t in (of_key, of_value)]
        found.append((torch.einsum("hqk,khd->qhd", slope, k), *shared))
    return tuple(torch.cat(parts) for parts in zip(*found, strict=True))


torch.library.register_kernel("qlora::packed_attention", "cpu", attend)
torch.library.register_kernel("qlora::packed_attention_backward", "cpu", attend_backward)
