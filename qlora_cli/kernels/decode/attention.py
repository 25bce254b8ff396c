"""Decode attention: one new token a row over its KV cache, in which its key and value are stored on the way.

Several new tokens of a single row are computed as if each had a row of its own, by the same program: what comes out for
one does not depend on how many there are, to the bit.

Every row reads exactly its own tokens, however long the cache is: lengths are read on the device, so that one CUDA
graph serves every step. Long rows are divided among programs and joined by a second kernel
(https://crfm.stanford.edu/2023/10/12/flashdecoding.html).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlora_cli.kernels.decode.overlap import follow, overlaps

STEP = 64  # tokens of a row that a program takes at once
PROGRAMS = 256  # enough for every multiprocessor of a large card to have two
UNDIVIDED = 256  # longest cache for which a second kernel costs more than it saves


@triton.jit
def _attend_part(
    q,
    new_key,
    new_value,
    keys,
    values,
    positions,
    out,
    highest,
    weight,
    q_row,
    q_head,
    key_row,
    key_head,
    value_row,
    value_head,
    capacity,
    key_heads,
    scale,
    window,
    softcap,
    GROUP: tl.constexpr,
    GROUP_ROOM: tl.constexpr,
    SIZE: tl.constexpr,
    SIZE_ROOM: tl.constexpr,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
    STEP: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SHARED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One part of one row for one key head and the GROUP query heads that share it."""
    if OVERLAP:
        follow()
    row = tl.program_id(0) // key_heads
    head = tl.program_id(0) % key_heads
    part = tl.program_id(1)
    position = tl.load(positions + row).to(tl.int32)
    lowest = 0
    if WINDOW:
        lowest = tl.maximum(position + 1 - window, 0)
    start = part * PART
    end = tl.minimum(start + PART, position + 1)
    if (start < end) & (end > lowest):
        member = tl.arange(0, GROUP_ROOM)
        size = tl.arange(0, SIZE_ROOM)
        in_size = size < SIZE
        query_head = head * GROUP + member
        in_group = (member[:, None] < GROUP) & in_size[None, :]
        query = tl.load(q + row * q_row + query_head[:, None] * q_head + size[None, :], mask=in_group, other=0.0)
        fresh_key = tl.load(new_key + row * key_row + head * key_head + size, mask=in_size, other=0.0)
        fresh_value = tl.load(new_value + row * value_row + head * value_head + size, mask=in_size, other=0.0)
        line = tl.program_id(0)
        if SHARED:
            line = head
        base = line.to(tl.int64) * capacity * SIZE
        top = tl.full((GROUP_ROOM,), float("-inf"), tl.float32)
        mass = tl.zeros((GROUP_ROOM,), tl.float32)
        total = tl.zeros((GROUP_ROOM, SIZE_ROOM), tl.float32)
        for first in range(start, end, STEP):
            place = first + tl.arange(0, STEP)
            seen = (place <= position) & (place >= lowest)
            stored = (place[:, None] < position) & seen[:, None] & in_size[None, :]
            is_new = (place == position)[:, None]
            key = tl.load(keys + base + place[:, None] * SIZE + size[None, :], mask=stored, other=0.0)
            key = tl.where(is_new, fresh_key[None, :], key)
            scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale  # (GROUP_ROOM, STEP)
            if SOFTCAP:
                # tanh by the exponential, which every Triton has, and by its series where that would cancel
                ratio = scores / softcap
                square = ratio * ratio
                series = ratio * (1 - square * (1 / 3 - square * (2 / 15 - square * (17 / 315))))
                scores = softcap * tl.where(square < 0.04, series, 1 - 2 / (tl.exp(2 * ratio) + 1))
            scores = tl.where(seen[None, :], scores, float("-inf"))
            higher = tl.maximum(top, tl.max(scores, 1))
            safe = tl.where(higher == float("-inf"), 0.0, higher)  # nothing seen yet: below the window
            shrink = tl.exp(top - safe)
            share = tl.exp(scores - safe[:, None])
            value = tl.load(values + base + place[:, None] * SIZE + size[None, :], mask=stored, other=0.0)
            value = tl.where(is_new, fresh_value[None, :], value)
            mass = mass * shrink + tl.sum(share, 1)
            total = tl.dot(share.to(value.dtype), value, total * shrink[:, None], input_precision="ieee")
            top = higher
        if not SHARED:  # noqa: SIM102 - decided while compiling
            if (start <= position) & (position < start + PART):
                tl.store(keys + base + position * SIZE + size, fresh_key, mask=in_size)
                tl.store(values + base + position * SIZE + size, fresh_value, mask=in_size)
        heads = key_heads * GROUP
        if PARTS == 1:
            place_out = (row * heads + query_head[:, None]) * SIZE + size[None, :]
            tl.store(out + place_out, (total / mass[:, None]).to(out.dtype.element_ty), mask=in_group)
        else:
            place_out = (row * heads + query_head) * PARTS + part
            tl.store(out + place_out[:, None] * SIZE + size[None, :], total, mask=in_group)
            tl.store(highest + place_out, top, mask=member < GROUP)
            tl.store(weight + place_out, mass, mask=member < GROUP)


@triton.jit
def _join_parts(
    parts_out,
    highest,
    weight,
    positions,
    out,
    heads,
    window,
    SIZE: tl.constexpr,
    SIZE_ROOM: tl.constexpr,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
    PARTS_ROOM: tl.constexpr,
    WINDOW: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """The parts of one row and head, each weighed by its share of the softmax."""
    if OVERLAP:
        follow()
    line = tl.program_id(0)
    position = tl.load(positions + line // heads).to(tl.int32)
    lowest = 0
    if WINDOW:
        lowest = tl.maximum(position + 1 - window, 0)
    part = tl.arange(0, PARTS_ROOM)
    size = tl.arange(0, SIZE_ROOM)
    there = (part * PART <= position) & ((part + 1) * PART > lowest) & (part < PARTS)
    top = tl.load(highest + line * PARTS + part, mask=there, other=float("-inf"))
    share = tl.exp(top - tl.max(top, 0))
    mass = tl.sum(share * tl.load(weight + line * PARTS + part, mask=there, other=0.0), 0)
    used = there[:, None] & (size[None, :] < SIZE)
    place = (line * PARTS + part[:, None]) * SIZE + size[None, :]
    total = tl.sum(tl.load(parts_out + place, mask=used, other=0.0) * share[:, None], 0)
    tl.store(out + line * SIZE + size, (total / mass).to(out.dtype.element_ty), mask=size < SIZE)


def attend(
    query: Tensor,
    new_key: Tensor,
    new_value: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    undivided: int = UNDIVIDED,
    shared: bool = False,
) -> Tensor:
    """Attention of each row's new token over its own tokens and itself; stores the new key and value.

    Args:
        query: (rows, heads, 1, size); like the next two it may be a view whose last dimension is contiguous.
        new_key: (rows, key heads, 1, size); heads is a multiple of key heads.
        new_value: Like `new_key`.
        keys: (rows or 1, key heads, capacity, size), contiguous; written at each row's position.
        values: Like `keys`.
        positions: (rows,) integer, the new token's place: so many tokens came before it.
        scale: Factor on the scores.
        window: A token sees itself and the window - 1 before it; None for all.
        softcap: Scores become softcap * tanh(scores / softcap); None for none.
        undivided: Longest cache whose rows are not divided among programs.
        shared: Whether all tokens belong to the only row of `keys` and `values`, in which theirs are stored already.

    Returns:
        (rows, 1, heads, size), contiguous, in the dtype of `query`.
    """
    rows, heads, _, size = query.shape
    _, key_heads, capacity, _ = keys.shape
    parts = 1
    if capacity > undivided:
        alone = key_heads * (1 if shared else rows)
        parts = max(1, min(triton.cdiv(PROGRAMS, alone), triton.cdiv(capacity, STEP)))
    part = triton.cdiv(triton.cdiv(capacity, parts), STEP) * STEP
    parts = triton.cdiv(capacity, part)
    out = torch.empty(rows, 1, heads, size, dtype=query.dtype, device=query.device)
    apart = out
    highest = weight = None
    if parts > 1:
        apart = torch.empty(rows, heads, parts, size, dtype=torch.float32, device=query.device)
        highest = torch.empty(rows, heads, parts, dtype=torch.float32, device=query.device)
        weight = torch.empty_like(highest)
    sizes = {"SIZE": size, "SIZE_ROOM": max(16, triton.next_power_of_2(size)), "PART": part, "PARTS": parts}
    overlap = overlaps(query.device)
    with torch.cuda.device_of(query):
        _attend_part[(rows * key_heads, parts)](
            query,
            new_key,
            new_value,
            keys,
            values,
            positions,
            apart,
            highest,
            weight,
            query.stride(0),
            query.stride(1),
            new_key.stride(0),
            new_key.stride(1),
            new_value.stride(0),
            new_value.stride(1),
            capacity,
            key_heads,
            scale,
            window or 0,
            softcap or 0.0,
            GROUP=heads // key_heads,
            GROUP_ROOM=max(16, triton.next_power_of_2(heads // key_heads)),
            STEP=STEP,
            WINDOW=window is not None,
            SOFTCAP=softcap is not None,
            SHARED=shared,
            OVERLAP=overlap,
            num_warps=4,
            launch_pdl=overlap,
            **sizes,
        )
        if parts > 1:
            _join_parts[(rows * heads,)](
                apart,
                highest,
                weight,
                positions,
                out,
                heads,
                window or 0,
                PARTS_ROOM=triton.next_power_of_2(parts),
                WINDOW=window is not None,
                OVERLAP=overlap,
                num_warps=2,
                launch_pdl=overlap,
                **sizes,
            )
    return out
