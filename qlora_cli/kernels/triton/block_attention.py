"""Packed attention in blocks, forward and backward (Triton): flash attention with what the libraries' kernels lack. Scores
may be capped, cap * tanh(score / cap); windows, and fewer keys than heads, of any length.

Blocks of queries go over the keys they see, and in the backward pass blocks of keys over the queries that see them. The
formulas are those of arXiv:2205.14135; a cap multiplies the gradient of a score by 1 - (capped / cap)².

Without a cap it is for short rows and windows: flash attention's backward pass there is three kernels over an fp32 gradient of the
queries with 128 tokens more for each row, and over a key's gradient for each head.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlora_cli.kernels.weights import shared_bytes

LOG2_E = tl.constexpr(1.4426950408889634)
LARGEST_HEAD = 256
LONGEST_UNCAPPED, LARGEST_UNCAPPED_HEAD = 512, 128
# Blocks that stay in a program, blocks that pass by, and how many of these are under way: the first that fit are taken.
BLOCKS = ((128, 64, 2), (64, 64, 2), (64, 64, 1), (64, 32, 1), (32, 32, 1), (16, 16, 1))
# Of short rows, which larger ones would mostly reach beyond; what passes by takes no more than so many bytes a tensor.
SHORT_BLOCKS, SHORT_BYTES = ((64, 64, 2), (64, 32, 3), (64, 32, 2), *BLOCKS[4:]), 8192
SPARE_BYTES = 24 * 1024  # of shared memory, for what is not a block of rows


@triton.jit
def _places(start, at, length, head, heads, size, SIZE: tl.constexpr):
    """Where rows `at` of one head are in (tokens, heads, size), and which of these lie within the row and the head."""
    column = tl.arange(0, SIZE)
    place = (start + at).to(tl.int64)[:, None] * (heads * size) + head * size + column[None, :]
    return place, (at[:, None] < length) & (column[None, :] < size)


@triton.jit
def _scores(left, right, distance, window, scale, cap, CAPPED: tl.constexpr):
    """Scores fp32, capped or not, of queries and keys or of keys and queries, and where a query sees a key, of its row."""
    scores = tl.dot(left, tl.trans(right), input_precision="ieee")
    if CAPPED:
        scores *= 2.0 * scale / cap
        scores = cap - (2.0 * cap) / (tl.exp2(scores * LOG2_E) + 1.0)  # tanh(x) = 1 - 2 / (exp(2 x) + 1)
    else:
        scores *= scale
    return scores, (distance >= 0) & (distance < window)


@triton.jit
def _attend(
    query,
    key,
    value,
    boundaries,
    out,
    lse,
    tokens,
    heads,
    key_heads,
    size,
    window,
    scale,
    cap,
    CAPPED: tl.constexpr,
    SIZE: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    head = tl.program_id(1)
    key_head = head // (heads // key_heads)
    first = (tl.num_programs(2) - 1 - tl.program_id(2)) * QUERIES  # the longest way first
    start = tl.load(boundaries + tl.program_id(0))
    length = tl.load(boundaries + tl.program_id(0) + 1) - start
    if first < length:
        at = first + tl.arange(0, QUERIES)
        place, inside = _places(start, at, length, head, heads, size, SIZE)
        q = tl.load(query + place, mask=inside, other=0.0)
        highest = tl.full((QUERIES,), float("-inf"), tl.float32)
        total = tl.zeros((QUERIES,), tl.float32)
        mixed = tl.zeros((QUERIES, SIZE), tl.float32)
        since = tl.maximum(first - window + 1, 0) // KEYS * KEYS
        for begin in range(since, tl.minimum(first + QUERIES, length), KEYS):
            other = begin + tl.arange(0, KEYS)
            key_place, there = _places(start, other, length, key_head, key_heads, size, SIZE)
            k = tl.load(key + key_place, mask=there, other=0.0)
            v = tl.load(value + key_place, mask=there, other=0.0)
            scores, seen = _scores(q, k, at[:, None] - other[None, :], window, scale, cap, CAPPED)
            scores = tl.where(seen & (at[:, None] < length), scores * LOG2_E, float("-inf"))
            new_highest = tl.maximum(highest, tl.max(scores, 1))
            shown = tl.where(new_highest == float("-inf"), 0.0, new_highest)  # nothing is seen yet
            weights = tl.exp2(scores - shown[:, None])
            shrink = tl.exp2(highest - shown)
            total = total * shrink + tl.sum(weights, 1)
            mixed = mixed * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
            highest = new_highest
        total = tl.where(at < length, total, 1.0)
        tl.store(out + place, (mixed / total[:, None]).to(out.dtype.element_ty), mask=inside)
        tl.store(lse + head.to(tl.int64) * tokens + start + at, (highest + tl.log2(total)) / LOG2_E, mask=at < length)


@triton.jit
def _slopes(left, right, grads, values, log_sum, delta, distance, window, scale, cap, CAPPED: tl.constexpr):
    """Attention's weights, and the gradient of the scores before the cap and the scale, fp32.

    Of queries and keys; or of keys and queries, and then `grads` are the values and `values` the gradients.
    """
    scores, seen = _scores(left, right, distance, window, scale, cap, CAPPED)
    weights = tl.where(seen, tl.exp2((scores - log_sum) * LOG2_E), 0.0)
    slope = weights * (tl.dot(grads, tl.trans(values), input_precision="ieee") - delta)
    if CAPPED:
        share = scores / cap
        slope *= 1.0 - share * share
    return weights, slope


@triton.jit
def _of_queries(
    grad,
    query,
    key,
    value,
    boundaries,
    out,
    lse,
    delta,
    grad_query,
    tokens,
    heads,
    key_heads,
    size,
    window,
    scale,
    cap,
    CAPPED: tl.constexpr,
    SIZE: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Also, of each token and head, the sum of output times gradient: `delta`, (heads, tokens) fp32."""
    head = tl.program_id(1)
    key_head = head // (heads // key_heads)
    first = (tl.num_programs(2) - 1 - tl.program_id(2)) * QUERIES
    start = tl.load(boundaries + tl.program_id(0))
    length = tl.load(boundaries + tl.program_id(0) + 1) - start
    if first < length:
        at = first + tl.arange(0, QUERIES)
        place, inside = _places(start, at, length, head, heads, size, SIZE)
        q = tl.load(query + place, mask=inside, other=0.0)
        g = tl.load(grad + place, mask=inside, other=0.0)
        line = head.to(tl.int64) * tokens + start + at
        log_sum = tl.load(lse + line, mask=at < length, other=0.0)
        o = tl.load(out + place, mask=inside, other=0.0)
        mean = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
        tl.store(delta + line, mean, mask=at < length)
        total = tl.zeros((QUERIES, SIZE), tl.float32)
        since = tl.maximum(first - window + 1, 0) // KEYS * KEYS
        for begin in range(since, tl.minimum(first + QUERIES, length), KEYS):
            other = begin + tl.arange(0, KEYS)
            key_place, there = _places(start, other, length, key_head, key_heads, size, SIZE)
            k = tl.load(key + key_place, mask=there, other=0.0)
            v = tl.load(value + key_place, mask=there, other=0.0)
            distance = at[:, None] - other[None, :]
            _, slope = _slopes(q, k, g, v, log_sum[:, None], mean[:, None], distance, window, scale, cap, CAPPED)
            total += tl.dot(slope.to(k.dtype), k, input_precision="ieee")
        tl.store(grad_query + place, (total * scale).to(grad_query.dtype.element_ty), mask=inside)


@triton.jit
def _of_keys(
    grad,
    query,
    key,
    value,
    boundaries,
    lse,
    delta,
    grad_key,
    grad_value,
    tokens,
    heads,
    key_heads,
    size,
    window,
    scale,
    cap,
    CAPPED: tl.constexpr,
    SIZE: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    key_head = tl.program_id(1)
    groups = heads // key_heads
    first = tl.program_id(2) * KEYS
    start = tl.load(boundaries + tl.program_id(0))
    length = tl.load(boundaries + tl.program_id(0) + 1) - start
    if first < length:
        other = first + tl.arange(0, KEYS)
        key_place, there = _places(start, other, length, key_head, key_heads, size, SIZE)
        k = tl.load(key + key_place, mask=there, other=0.0)
        v = tl.load(value + key_place, mask=there, other=0.0)
        key_sum = tl.zeros((KEYS, SIZE), tl.float32)
        value_sum = tl.zeros((KEYS, SIZE), tl.float32)
        since = first // QUERIES * QUERIES
        until = tl.minimum(length, first + KEYS + window - 1)
        rounds = tl.cdiv(tl.maximum(until - since, 0), QUERIES)
        for number in range(0, rounds * groups):
            head = key_head * groups + number // rounds
            at = since + (number % rounds) * QUERIES + tl.arange(0, QUERIES)
            place, inside = _places(start, at, length, head, heads, size, SIZE)
            q = tl.load(query + place, mask=inside, other=0.0)
            g = tl.load(grad + place, mask=inside, other=0.0)
            line = head.to(tl.int64) * tokens + start + at
            log_sum = tl.load(lse + line, mask=at < length, other=0.0)
            mean = tl.load(delta + line, mask=at < length, other=0.0)
            # Keys by queries, as products with them read it from registers; what lies beyond the row has gradients of zero.
            distance = at[None, :] - other[:, None]
            weights, slope = _slopes(k, q, v, g, log_sum[None, :], mean[None, :], distance, window, scale, cap, CAPPED)
            value_sum += tl.dot(weights.to(g.dtype), g, input_precision="ieee")
            key_sum += tl.dot(slope.to(q.dtype), q, input_precision="ieee")
        tl.store(grad_value + key_place, value_sum.to(grad_value.dtype.element_ty), mask=there)
        tl.store(grad_key + key_place, (key_sum * scale).to(grad_key.dtype.element_ty), mask=there)


def covers(query: Tensor, value: Tensor, longest: int, window: int | None, cap: float | None) -> bool:
    """Whether it is made for such heads, and for scores capped so, or for rows or windows so short."""
    if value.shape[2] != query.shape[2]:
        return False
    if cap is not None:
        return query.shape[2] <= LARGEST_HEAD
    seen = longest if window is None else min(longest, window)
    return seen <= LONGEST_UNCAPPED and query.shape[2] <= LARGEST_UNCAPPED_HEAD


def _size(query: Tensor) -> int:
    return max(16, triton.next_power_of_2(query.shape[2]))


def _blocks(query: Tensor, stay: int, pass_by: int, cap: float | None) -> tuple[int, int, int]:
    """One of `BLOCKS`, or `SHORT_BLOCKS`, where so many tensors' blocks stay in a program, and so many pass by."""
    row_bytes = _size(query) * query.element_size()
    room = shared_bytes(query.device) - SPARE_BYTES
    blocks = BLOCKS if cap is not None else [b for b in SHORT_BLOCKS if row_bytes * b[1] <= SHORT_BYTES]
    fitting = (b for b in blocks if row_bytes * (stay * b[0] + pass_by * b[1] * b[2]) <= room)
    return next(fitting, BLOCKS[-1])


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    boundaries: Tensor,
    longest: int,
    scale: float,
    window: int | None,
    cap: float | None,
) -> tuple[Tensor, Tensor]:
    """Causal attention within each row.

    Args:
        query: (tokens, heads, size), contiguous.
        key: (tokens, key heads, size), contiguous; heads is a multiple of key heads.
        value: Like `key`.
        boundaries: (rows + 1,) int32 on the same device: where rows start, and the total. Rows may be empty.
        longest: Tokens of the longest row, or more.
        scale: Factor on the scores, before the cap.
        window: A token sees itself and the window - 1 tokens before it; None for all.
        cap: What scores stay below; None for none.

    Returns:
        (tokens, heads, size); the natural logarithm of the sum of exponentiated scores, (heads, tokens) fp32.
    """
    tokens, heads, size = query.shape
    out, lse = torch.empty_like(query), query.new_empty(heads, tokens, dtype=torch.float32)
    queries, keys, stages = _blocks(query, 1, 2, cap)
    with torch.cuda.device_of(query):
        _attend[(boundaries.numel() - 1, heads, triton.cdiv(longest, queries))](
            query,
            key,
            value,
            boundaries,
            out,
            lse,
            tokens,
            heads,
            key.shape[1],
            size,
            min(window or longest, longest),
            scale,
            cap or 0.0,
            CAPPED=cap is not None,
            SIZE=_size(query),
            QUERIES=queries,
            KEYS=keys,
            num_warps=8 if queries > 64 else 4,
            num_stages=stages,
        )
    return out, lse


def attend_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    boundaries: Tensor,
    longest: int,
    scale: float,
    window: int | None,
    cap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attend`'s first result with respect to query, key and value.

    `grad`, contiguous, is the gradient of `out`; all that follows is as `attend` took and returned it.
    """
    tokens, heads, size = query.shape
    rows, key_heads = boundaries.numel() - 1, key.shape[1]
    grad_query, grad_key, grad_value, delta = (torch.empty_like(t) for t in (query, key, value, lse))
    given = (grad, query, key, value, boundaries)
    sizes = (tokens, heads, key_heads, size, min(window or longest, longest), scale, cap or 0.0)
    stay, pass_by, stages = _blocks(query, 2, 2, cap)
    warps = 8 if cap is not None or stay > 64 else 4
    blocks = {"CAPPED": cap is not None, "SIZE": _size(query), "num_warps": warps, "num_stages": stages}
    with torch.cuda.device_of(query):
        grid = (rows, heads, triton.cdiv(longest, stay))
        _of_queries[grid](*given, out, lse, delta, grad_query, *sizes, QUERIES=stay, KEYS=pass_by, **blocks)
        grid, sums = (rows, key_heads, triton.cdiv(longest, stay)), (lse, delta, grad_key, grad_value)
        _of_keys[grid](*given, *sums, *sizes, QUERIES=pass_by, KEYS=stay, **blocks)
    return grad_query, grad_key, grad_value
