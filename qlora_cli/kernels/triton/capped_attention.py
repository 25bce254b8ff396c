"""Packed attention whose scores are capped, cap * tanh(score / cap), forward and backward (Triton): flash attention with
what the libraries' kernels lack. Windows, and fewer keys than heads, of any length.

Blocks of queries go over the keys they see, and in the backward pass blocks of keys over the queries that see them. The
formulas are those of arXiv:2205.14135; a cap multiplies the gradient of a score by 1 - (capped / cap)².
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlora_cli.kernels.weights import shared_bytes

LOG2_E = tl.constexpr(1.4426950408889634)
LARGEST_HEAD = 256
# Blocks that stay in a program, blocks that pass by, and how many of these are under way: the first that fit are taken.
BLOCKS = ((128, 64, 2), (64, 64, 2), (64, 64, 1), (64, 32, 1), (32, 32, 1), (16, 16, 1))
SPARE_BYTES = 24 * 1024  # of shared memory, for what is not a block of rows


@triton.jit
def _places(start, at, length, head, heads, size, SIZE: tl.constexpr):
    """Where rows `at` of one head are in (tokens, heads, size), and which of these lie within the row and the head."""
    column = tl.arange(0, SIZE)
    place = (start + at).to(tl.int64)[:, None] * (heads * size) + head * size + column[None, :]
    return place, (at[:, None] < length) & (column[None, :] < size)


@triton.jit
def _capped(query, key, at_query, at_key, length, window, scale, cap):
    """Capped scores (queries, keys) fp32, and where a query sees a key."""
    scores = tl.dot(query, tl.trans(key), input_precision="ieee") * (2.0 * scale / cap)
    capped = cap - (2.0 * cap) / (tl.exp2(scores * LOG2_E) + 1.0)  # tanh(x) = 1 - 2 / (exp(2 x) + 1)
    distance = at_query[:, None] - at_key[None, :]
    return capped, (distance >= 0) & (distance < window) & (at_query[:, None] < length)


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
            scores, seen = _capped(q, k, at, other, length, window, scale, cap)
            scores = tl.where(seen, scores * LOG2_E, float("-inf"))
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
def _dot(grad, out, delta, tokens, heads, size, SIZE: tl.constexpr, ROWS: tl.constexpr):
    """Of each token and head the sum of output times gradient, (heads, tokens) fp32."""
    at = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    place, inside = _places(0, at, tokens, tl.program_id(1), heads, size, SIZE)
    g = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
    o = tl.load(out + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(delta + tl.program_id(1).to(tl.int64) * tokens + at, tl.sum(g * o, 1), mask=at < tokens)


@triton.jit
def _slopes(q, k, v, g, delta, log_sum, at, other, length, window, scale, cap):
    """Attention's weights, and the gradient of the scores before the cap and the scale: (queries, keys) fp32 each."""
    scores, seen = _capped(q, k, at, other, length, window, scale, cap)
    weights = tl.where(seen, tl.exp2((scores - log_sum[:, None]) * LOG2_E), 0.0)
    slope = tl.dot(g, tl.trans(v), input_precision="ieee") - delta[:, None]
    share = scores / cap
    return weights, weights * slope * (1.0 - share * share)


@triton.jit
def _of_queries(
    grad,
    query,
    key,
    value,
    boundaries,
    delta,
    lse,
    grad_query,
    tokens,
    heads,
    key_heads,
    size,
    window,
    scale,
    cap,
    SIZE: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
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
        mean = tl.load(delta + line, mask=at < length, other=0.0)
        total = tl.zeros((QUERIES, SIZE), tl.float32)
        since = tl.maximum(first - window + 1, 0) // KEYS * KEYS
        for begin in range(since, tl.minimum(first + QUERIES, length), KEYS):
            other = begin + tl.arange(0, KEYS)
            key_place, there = _places(start, other, length, key_head, key_heads, size, SIZE)
            k = tl.load(key + key_place, mask=there, other=0.0)
            v = tl.load(value + key_place, mask=there, other=0.0)
            _, slope = _slopes(q, k, v, g, mean, log_sum, at, other, length, window, scale, cap)
            total += tl.dot(slope.to(k.dtype), k, input_precision="ieee")
        tl.store(grad_query + place, (total * scale).to(grad_query.dtype.element_ty), mask=inside)


@triton.jit
def _of_keys(
    grad,
    query,
    key,
    value,
    boundaries,
    delta,
    lse,
    grad_key,
    grad_value,
    tokens,
    heads,
    key_heads,
    size,
    window,
    scale,
    cap,
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
            weights, slope = _slopes(q, k, v, g, mean, log_sum, at, other, length, window, scale, cap)
            value_sum += tl.dot(tl.trans(weights.to(g.dtype)), g, input_precision="ieee")
            key_sum += tl.dot(tl.trans(slope.to(q.dtype)), q, input_precision="ieee")
        tl.store(grad_value + key_place, value_sum.to(grad_value.dtype.element_ty), mask=there)
        tl.store(grad_key + key_place, (key_sum * scale).to(grad_key.dtype.element_ty), mask=there)


def covers(query: Tensor) -> bool:
    """Whether heads are of a size that blocks are made for."""
    return query.shape[2] <= LARGEST_HEAD


def _size(query: Tensor) -> int:
    return max(16, triton.next_power_of_2(query.shape[2]))


def _blocks(query: Tensor, stay: int, pass_by: int) -> tuple[int, int, int]:
    """One of `BLOCKS` where so many tensors' blocks stay in a program, and so many pass by."""
    row_bytes = _size(query) * query.element_size()
    room = shared_bytes(query.device) - SPARE_BYTES
    fitting = (b for b in BLOCKS if row_bytes * (stay * b[0] + pass_by * b[1] * b[2]) <= room)
    return next(fitting, BLOCKS[-1])


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    boundaries: Tensor,
    longest: int,
    scale: float,
    window: int | None,
    cap: float,
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
        cap: What scores stay below.

    Returns:
        (tokens, heads, size); the natural logarithm of the sum of exponentiated scores, (heads, tokens) fp32.
    """
    tokens, heads, size = query.shape
    out, lse = torch.empty_like(query), query.new_empty(heads, tokens, dtype=torch.float32)
    queries, keys, stages = _blocks(query, 1, 2)
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
            window or longest,
            scale,
            cap,
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
    cap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attend`'s first result with respect to query, key and value.

    `grad`, contiguous, is the gradient of `out`; all that follows is as `attend` took and returned it.
    """
    tokens, heads, size = query.shape
    rows, key_heads = boundaries.numel() - 1, key.shape[1]
    grad_query, grad_key, grad_value = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    delta = torch.empty_like(lse)
    given = (grad, query, key, value, boundaries, delta, lse)
    sizes = (tokens, heads, key_heads, size, window or longest, scale, cap)
    stay, pass_by, stages = _blocks(query, 2, 2)
    blocks = {"SIZE": _size(query), "num_warps": 8, "num_stages": stages}
    with torch.cuda.device_of(query):
        _dot[(triton.cdiv(tokens, 32), heads)](grad, out, delta, tokens, heads, size, SIZE=_size(query), ROWS=32)
        grid = (rows, key_heads, triton.cdiv(longest, stay))
        _of_keys[grid](*given, grad_key, grad_value, *sizes, QUERIES=pass_by, KEYS=stay, **blocks)
        grid = (rows, heads, triton.cdiv(longest, stay))
        _of_queries[grid](*given, grad_query, *sizes, QUERIES=stay, KEYS=pass_by, **blocks)
    return grad_query, grad_key, grad_value
