"""Attention over chunks of queries, with what SDPA does not know: sinks, a learned score for each head that takes weight
and gives nothing, and scores that are capped.

softmax over the scores s and the sink z is softmax(s) * exp(lse(s) - lse(s, z)), arXiv:2309.17453 and gpt-oss. So any
attention that gives its log-sum-exp becomes one with sinks by a factor a query and head (`add_sinks`); and its backward
pass, given the output and the log-sum-exp with the sink counted in, is the right one as it stands: it computes the
weights as exp(s - lse) and their gradient's mean as the sum of output times gradient.
"""

from typing import Any

import torch
from torch import Tensor

CHUNK_BYTES = 2**26  # of the scores of one chunk, in float32: 128 queries of 64 heads that see 2,048 keys


def add_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """Attention's output becomes, in place, the one with sinks.

    Args:
        out: (tokens, heads, size).
        lse: Log-sum-exp of the scores, (heads, tokens) float32.
        sinks: (heads,).

    Returns:
        The log-sum-exp with the sink counted in, like `lse`.
    """
    with_sinks = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
    out.mul_((lse - with_sinks).exp().t()[..., None])
    return with_sinks


def sink_gradient(grad: Tensor, out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """Gradient of the sinks, (heads,): minus each sink's weight times the sum of output times gradient.

    `grad` and `out` are (tokens, heads, size), `lse` is `add_sinks`' result.
    """
    share = (grad.to(lse.dtype) * out).sum(-1).t()  # (heads, tokens)
    return -((sinks.to(lse.dtype)[:, None] - lse).exp() * share).sum(1).to(sinks.dtype)


def _chunks(ctx: Any, query: Tensor, key: Tensor) -> list[tuple[int, int, int, int]]:
    """(first query, last + 1, first key, last + 1) of each chunk: as many queries as `chunk_bytes` hold the scores of."""
    rows, heads, queries = query.shape[:3]
    keys = key.shape[2]
    before = keys - queries  # keys that stand before the first query
    step = max(1, ctx.chunk_bytes // (rows * heads * max(1, keys) * 4))
    found = []
    for start in range(0, queries, step):
        end = min(start + step, queries)
        until = keys if ctx.window == 0 else before + end
        since = max(0, before + start + 1 - ctx.window) if ctx.window else 0
        found.append((start, end, since, until))
    return found


def _all_scores(ctx: Any, query: Tensor, key: Tensor, chunk: tuple[int, int, int, int]) -> Tensor:
    """Scores of one chunk, (rows, key heads, groups, queries, keys), float32 or wider, capped."""
    start, end, since, until = chunk
    grouped = query[:, :, start:end].unflatten(1, (key.shape[1], -1))  # (rows, key heads, groups, queries, size)
    scores = grouped.flatten(2, 3) @ key[:, :, since:until].transpose(2, 3)
    scores = scores.unflatten(2, grouped.shape[2:4]).to(torch.promote_types(query.dtype, torch.float32)) * ctx.scale
    if ctx.cap is not None:
        scores = scores.div_(ctx.cap).tanh_().mul_(ctx.cap)
    return scores


def _hide(
    ctx: Any, scores: Tensor, query: Tensor, key: Tensor, mask: Tensor | None, chunk: tuple[int, int, int, int]
) -> Tensor:
    """The scores, in place, -inf where nothing is seen."""
    start, end, since, until = chunk
    if mask is not None:
        part = mask[:, :, start:end, since:until]
        part = part.unflatten(1, (key.shape[1], -1)) if part.shape[1] > 1 else part[:, :, None]
        return scores.masked_fill_(~part, float("-inf")) if part.dtype == torch.bool else scores.add_(part)
    if ctx.window == 0:
        return scores
    at = torch.arange(start, end, device=query.device)[:, None] + key.shape[2] - query.shape[2]
    distance = at - torch.arange(since, until, device=query.device)[None, :]
    return scores.masked_fill_((distance < 0) | (distance >= ctx.window), float("-inf"))


class _ChunkedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        mask: Tensor | None,
        scale: float,
        window: int,
        cap: float | None,
        chunk_bytes: int,
    ) -> Tensor:
        ctx.scale, ctx.window, ctx.cap, ctx.chunk_bytes = scale, window, cap, chunk_bytes
        rows, heads, queries = query.shape[:3]
        exact = torch.promote_types(query.dtype, torch.float32)
        out = query.new_empty(rows, heads, queries, value.shape[3])
        lse = query.new_empty(rows, heads, queries, dtype=exact)
        sink = None if sinks is None else sinks.to(exact).view(key.shape[1], -1, 1)  # (key heads, groups, 1)
        for chunk in _chunks(ctx, query, key):
            start, end, since, until = chunk
            scores = _hide(ctx, _all_scores(ctx, query, key, chunk), query, key, mask, chunk)
            sums = scores.logsumexp(-1)
            # A query that sees nothing has no weights: with a sink its sum is never -inf.
            sums = sums.masked_fill_(sums == float("-inf"), 0.0) if sink is None else torch.logaddexp(sums, sink)
            weights = scores.sub_(sums[..., None]).exp_().to(value.dtype)
            mixed = weights.flatten(2, 3) @ value[:, :, since:until]
            out[:, :, start:end] = mixed.unflatten(2, weights.shape[2:4]).flatten(1, 2)
            lse[:, :, start:end] = sums.flatten(1, 2)
        ctx.save_for_backward(query, key, value, sinks, mask, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, sinks, mask, out, lse = ctx.saved_tensors
        (grad,) = grads
        exact, groups = lse.dtype, (key.shape[1], -1)
        share = (grad.to(exact) * out).sum(-1)  # (rows, heads, queries)
        of_query = torch.empty_like(query)
        of_key, of_value = (torch.zeros_like(t, dtype=exact) for t in (key, value))
        for chunk in _chunks(ctx, query, key):
            start, end, since, until = chunk
            sums = lse[:, :, start:end].unflatten(1, groups)[..., None]
            scores = _all_scores(ctx, query, key, chunk)
            slope_of_cap = None if ctx.cap is None else 1 - (scores / ctx.cap).square_()
            weights = _hide(ctx, scores, query, key, mask, chunk).sub_(sums).exp_()
            g = grad[:, :, start:end].unflatten(1, groups)
            slope = (g.flatten(2, 3) @ value[:, :, since:until].transpose(2, 3)).unflatten(2, g.shape[2:4]).to(exact)
            slope.sub_(share[:, :, start:end].unflatten(1, groups)[..., None]).mul_(weights).mul_(ctx.scale)
            if slope_of_cap is not None:
                slope.mul_(slope_of_cap)
            of_value[:, :, since:until] += weights.to(g.dtype).flatten(2, 3).transpose(2, 3) @ g.flatten(2, 3)
            flat = slope.to(query.dtype).flatten(2, 3)
            of_query[:, :, start:end] = (flat @ key[:, :, since:until]).unflatten(2, g.shape[2:4]).flatten(1, 2)
            q = query[:, :, start:end].unflatten(1, groups).flatten(2, 3)
            of_key[:, :, since:until] += flat.transpose(2, 3) @ q
        of_sinks = None
        if sinks is not None and ctx.needs_input_grad[3]:
            of_sinks = -((sinks.to(exact)[:, None] - lse).exp() * share).sum((0, 2)).to(sinks.dtype)
        return of_query, of_key.to(key.dtype), of_value.to(value.dtype), of_sinks, None, None, None, None, None


def chunked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None = None,
    *,
    scale: float,
    mask: Tensor | None = None,
    window: int | None = None,
    cap: float | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> Tensor:
    """Attention, differentiable in its first four arguments; memory grows with one chunk of queries.

    Args:
        query: (rows, heads, queries, size), the last of as many positions as there are keys; any floating type.
        key: (rows, key heads, keys, size); heads is a multiple of key heads.
        value: (rows, key heads, keys, value size).
        sinks: (heads,), or None.
        scale: Factor on the scores, not on the sinks.
        mask: (rows or 1, heads or 1, queries, keys): booleans, True where a key is seen, or numbers to add to the
            scores. None for causal attention. A query that sees nothing gets zeros.
        window: Without a mask, a token sees itself and the window - 1 before it; None for all.
        cap: Scores become cap * tanh(score / cap) before the mask and beside the sinks; None for none.
        chunk_bytes: Of one chunk's scores in float32; a few times as much is in use at once.

    Returns:
        (rows, heads, queries, value size).
    """
    # 0 stands for whatever the mask shows; without a window a causal query sees at most all keys.
    seen = 0 if mask is not None else window or key.shape[2]
    return _ChunkedAttention.apply(query, key, value, sinks, mask, scale, seen, cap, chunk_bytes)
