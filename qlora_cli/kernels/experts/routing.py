"""Sorting of (token, expert) pairs by expert, without waiting for the device (Triton).

A counting sort: pairs are counted block by block, a running sum over the counts says where each block's pairs of an
expert begin, and each pair goes to its place. Equal runs give equal places.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlora_cli.kernels.experts.operands import Routing

BLOCK = 128  # pairs of a program; no more are sorted by one launch


@triton.jit
def _bins(ids, pair, pairs, experts):
    """The expert of each pair; `experts` for one that is none; past all bins for no pair."""
    used = pair < pairs
    found = tl.load(ids + pair, mask=used, other=0).to(tl.int32)
    found = tl.where((found < 0) | (found > experts), experts, found)
    return tl.where(used, found, experts + 1)


@triton.jit
def _count(ids, counts, pairs, experts, blocks, BLOCK: tl.constexpr, BINS: tl.constexpr):
    block = tl.program_id(0)
    bins = tl.arange(0, BINS)
    found = _bins(ids, block * BLOCK + tl.arange(0, BLOCK), pairs, experts)
    count = tl.sum((found[:, None] == bins[None, :]).to(tl.int32), 0)
    tl.store(counts + bins * blocks + block, count, mask=bins <= experts)


@triton.jit
def _place(
    ids,
    counts,
    sums,
    source,
    back,
    expert,
    ends,
    pairs,
    experts,
    blocks,
    BLOCK: tl.constexpr,
    BINS: tl.constexpr,
):
    block = tl.program_id(0)
    bins = tl.arange(0, BINS)
    pair = block * BLOCK + tl.arange(0, BLOCK)
    found = _bins(ids, pair, pairs, experts)
    hit = (found[:, None] == bins[None, :]).to(tl.int32)
    before = tl.sum(tl.cumsum(hit, 0) * hit, 1) - 1  # pairs of the same expert earlier in the block
    used = pair < pairs
    at = found * blocks + block
    start = tl.load(sums + at, mask=used, other=0) - tl.load(counts + at, mask=used, other=0)
    place = start + before
    tl.store(source + place, pair, mask=used)
    tl.store(expert + place, found, mask=used)
    tl.store(back + pair, place, mask=used)
    if block == 0:
        end = tl.load(sums + bins * blocks + blocks - 1, mask=bins < experts, other=0)
        tl.store(ends + bins, end, mask=bins < experts)


@triton.jit
def _sort_few(ids, source, back, expert, ends, pairs, experts, BLOCK: tl.constexpr, BINS: tl.constexpr):
    bins = tl.arange(0, BINS)
    pair = tl.arange(0, BLOCK)
    found = _bins(ids, pair, pairs, experts)
    # Pairs against pairs: fewer comparisons than a running sum over bins takes.
    first = (found[None, :] < found[:, None]) | ((found[None, :] == found[:, None]) & (pair[None, :] < pair[:, None]))
    place = tl.sum(first.to(tl.int32), 1)
    sums = tl.sum((found[None, :] <= bins[:, None]).to(tl.int32), 1)
    used = pair < pairs
    tl.store(source + place, pair, mask=used)
    tl.store(expert + place, found, mask=used)
    tl.store(back + pair, place, mask=used)
    tl.store(ends + bins, sums, mask=bins < experts)


def route(ids: Tensor, experts: int) -> Routing:
    """Sorts pairs by expert, stably.

    Args:
        ids: (tokens, choices) of any integer type; an id that is none of the experts' belongs to none.
        experts: Their number.
    """
    pairs = ids.numel()
    ids = ids.contiguous()
    blocks = triton.cdiv(pairs, BLOCK)
    source, back, expert = (torch.empty(pairs, dtype=torch.int32, device=ids.device) for _ in range(3))
    ends = torch.empty(experts, dtype=torch.int32, device=ids.device)
    bins = triton.next_power_of_2(experts + 1)
    if pairs <= BLOCK:
        room = max(16, triton.next_power_of_2(pairs))
        with torch.cuda.device_of(ids):
            _sort_few[(1,)](ids, source, back, expert, ends, pairs, experts, BLOCK=room, BINS=bins)
        return Routing(source, back, expert, ends, ids.shape[1])
    counts = torch.empty((experts + 1) * blocks, dtype=torch.int32, device=ids.device)
    with torch.cuda.device_of(ids):
        _count[(blocks,)](ids, counts, pairs, experts, blocks, BLOCK=BLOCK, BINS=bins)
        sums = counts.cumsum(0, dtype=torch.int32)
        _place[(blocks,)](ids, counts, sums, source, back, expert, ends, pairs, experts, blocks, BLOCK=BLOCK, BINS=bins)
    return Routing(source, back, expert, ends, ids.shape[1])
