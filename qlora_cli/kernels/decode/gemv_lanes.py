"""4-bit GEMV for tensor cores, written a lane at a time.

The Triton program behind gemv.py for tensor cores of compute capability 8.0 and later, written a lane at a time: every
tensor has one element a thread, so that Triton's layouts have no say and nothing is rearranged on the way from the
memory to the tensor cores. What a lane holds is what `mma.m16n8k16` wants of it (PTX ISA, "Matrix Fragments"): lane
4 g + t has rows g and g + 8 of 16 weight rows and token g of 8; its 16 columns of a block of 64 are 16 t to 16 t + 15
of the weights and of the activations alike, since a sum over columns may be taken in any order.

Two weights are looked up at once, a byte of the packed words in a table of 256 pairs. The table stands in shared memory
32 times, once a bank, so that no two lanes wait for each other: a look-up and 2 integer instructions for 2 weights.
Scales multiply the sums of each block in float32.
"""
# mypy: disable-error-code="assignment"

import triton
import triton.language as tl

from qlora_cli.kernels.decode.lane_instructions import (
    expand,
    fill_table,
    load_activations,
    multiply_block,
    of_quarter,
)
from qlora_cli.kernels.decode.overlap import follow


@triton.jit
def load_chunk(
    packed,
    absmax,
    nested_absmax,
    nested_offset,
    chunk,
    first_row,
    rows,
    row_blocks,
    t,
    live,
    NESTED_BLOCKSIZE: tl.constexpr,
    TILES: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Of 4 blocks a row: a lane's words, row after row, and what the scale of block t is made of. Waits for nothing."""
    words = ()
    scales = ()
    for half in tl.static_range(2 * TILES):
        row = first_row + half * 8
        start = row * row_blocks + chunk * 4
        word = packed + (start * 4 + t)
        for block in tl.static_range(4):
            used = live
            if not WHOLE:
                used = live & (chunk * 4 + block < row_blocks) & (row < rows)
            words += (tl.load(word + block * 4, mask=used, other=0, eviction_policy="evict_first"),)
        used = live
        if not WHOLE:
            used = live & (chunk * 4 + t < row_blocks) & (row < rows)
        level = tl.load(absmax + (start + t), mask=used, other=0)
        if NESTED_BLOCKSIZE:
            outer = (start + t) // NESTED_BLOCKSIZE
            factor = tl.load(nested_absmax + outer, mask=used, other=0.0)
            offset = tl.load(nested_offset + outer, mask=used, other=0.0)
            scales += ((level, factor, offset),)
        else:
            scales += ((level,),)
    return words, scales


@triton.jit
def finish_scale(parts, nested_code, NESTED_BLOCKSIZE: tl.constexpr):
    """fp32 scale of what `load_chunk` loaded for one row; 0 for what is not there."""
    if NESTED_BLOCKSIZE:
        scale = tl.load(nested_code + parts[0].to(tl.int32)) * parts[1] + parts[2]
    else:
        scale = parts[0]
    return scale


@triton.jit
def _load_projected(
    projected, first_rank, eight, tokens, ranks, parts, RANK: tl.constexpr, ROOM: tl.constexpr, PARTS: tl.constexpr
):
    """The parts of scaling A x of 8 tokens: (PARTS, 8, ROOM)."""
    part, token, rank = tl.arange(0, PARTS), eight * 8 + tl.arange(0, 8), tl.arange(0, ROOM)
    at = (part[:, None, None] * tokens + token[None, :, None]) * ranks + first_rank + rank[None, None, :]
    used = (part < parts)[:, None, None] & (token < tokens)[None, :, None] & (rank < RANK)[None, None, :]
    return tl.load(projected + at, mask=used, other=0.0)


# ---------------------------------------------------------------- the program


@triton.jit
def multiply_lanes(
    x,
    packed,
    absmax,
    code,
    nested_absmax,
    nested_code,
    nested_offset,
    projected,
    b,
    first_rank,
    bias,
    y,
    tokens,
    rows,
    row_blocks,
    ranks,
    parts,
    units,
    NESTED_BLOCKSIZE: tl.constexpr,
    RANK: tl.constexpr,
    ROOM: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROW_UNIT: tl.constexpr,
    TILES: tl.constexpr,
    EIGHTS: tl.constexpr,
    WARPS: tl.constexpr,
    AHEAD: tl.constexpr,
    WHOLE: tl.constexpr,
    OVERLAP: tl.constexpr,
    KIND: tl.constexpr,
):
    """TILES times 16 rows of weights a unit, EIGHTS times 8 tokens; the warps of a program share out the columns.

    AHEAD: while a chunk is multiplied the next one is under way, also across units. WHOLE: there are no rests, in rows or in
    blocks of 4. OVERLAP: the launch before may still be running, and nothing of it is read before it has ended.
    """
    THREADS: tl.constexpr = WARPS * 32
    EARLY: tl.constexpr = EIGHTS * PARTS * ROOM <= WARPS * 64  # at most 16 registers
    thread = tl.arange(0, THREADS)
    g = (thread & 31) >> 2
    t = thread & 3
    warp = thread >> 5
    chunks = (row_blocks + 3) // 4
    unit_rows: tl.constexpr = 16 * TILES
    if AHEAD:
        words, scales = load_chunk(
            packed,
            absmax,
            nested_absmax,
            nested_offset,
            warp,
            tl.program_id(0) * unit_rows + g,
            rows,
            row_blocks,
            t,
            warp < chunks,
            NESTED_BLOCKSIZE,
            TILES,
            WHOLE,
        )
    bank = fill_table(x, code, tokens, thread)
    if OVERLAP:
        follow()

    for unit in range(tl.program_id(0), units, tl.num_programs(0)):
        first_row = unit * unit_rows
        total = ()
        for _ in tl.static_range(TILES * EIGHTS * 4):
            total += (tl.zeros((THREADS,), tl.float32),)
        if RANK:
            place = tl.load(first_rank + first_row // ROW_UNIT)
            if EARLY:  # asked for before the weights, needed after them
                smalls = ()
                for eight in tl.static_range(EIGHTS):
                    smalls += (_load_projected(projected, place, eight, tokens, ranks, parts, RANK, ROOM, PARTS),)
        for first_chunk in range(0, chunks, WARPS):
            chunk = first_chunk + warp
            if AHEAD:
                last = tl.maximum(first_chunk + WARPS - chunks + 1, 0)  # above 0 where this was the unit's last chunk
                last = tl.minimum(last, 1)
                next_unit = unit + last * tl.num_programs(0)
                next_chunk = (first_chunk + WARPS) * (1 - last) + warp
                next_words, next_scales = load_chunk(
                    packed,
                    absmax,
                    nested_absmax,
                    nested_offset,
                    next_chunk,
                    next_unit * unit_rows + g,
                    rows,
                    row_blocks,
                    t,
                    (next_chunk < chunks) & (next_unit + warp * 0 < units),
                    NESTED_BLOCKSIZE,
                    TILES,
                    WHOLE,
                )
            else:
                words, scales = load_chunk(
                    packed,
                    absmax,
                    nested_absmax,
                    nested_offset,
                    chunk,
                    first_row + g,
                    rows,
                    row_blocks,
                    t,
                    chunk < chunks,
                    NESTED_BLOCKSIZE,
                    TILES,
                    WHOLE,
                )
            finished = ()
            for half in tl.static_range(2 * TILES):
                finished += (finish_scale(scales[half], nested_code, NESTED_BLOCKSIZE),)
            for block in tl.static_range(4):
                at = tl.minimum(chunk * 4 + block, row_blocks - 1)
                values = ()
                for eight in tl.static_range(EIGHTS):
                    token = tl.minimum(eight * 8 + g, tokens - 1)
                    values += (load_activations(x + (token * row_blocks + at) * 64 + t * 16),)
                new = ()
                for tile in tl.static_range(TILES):
                    low = expand(words[tile * 8 + block], bank)
                    high = expand(words[tile * 8 + 4 + block], bank)
                    low_scale = of_quarter(finished[tile * 2], t * 0 + block)
                    high_scale = of_quarter(finished[tile * 2 + 1], t * 0 + block)
                    for eight in tl.static_range(EIGHTS):
                        d = multiply_block(low, high, values[eight], KIND)
                        new += (
                            total[(tile * EIGHTS + eight) * 4] + d[0] * low_scale,
                            total[(tile * EIGHTS + eight) * 4 + 1] + d[1] * low_scale,
                            total[(tile * EIGHTS + eight) * 4 + 2] + d[2] * high_scale,
                            total[(tile * EIGHTS + eight) * 4 + 3] + d[3] * high_scale,
                        )
                total = new
            if AHEAD:
                words, scales = next_words, next_scales

        for eight in tl.static_range(EIGHTS):
            token = eight * 8 + tl.arange(0, 8)
            if RANK:
                if EARLY:
                    small = tl.sum(smalls[eight], 0)  # (8, ROOM)
                else:
                    small = tl.sum(_load_projected(projected, place, eight, tokens, ranks, parts, RANK, ROOM, PARTS), 0)
            for tile in tl.static_range(TILES):
                row = first_row + tile * 16 + tl.arange(0, 16)
                even = tl.join(total[(tile * EIGHTS + eight) * 4], total[(tile * EIGHTS + eight) * 4 + 2])
                odd = tl.join(total[(tile * EIGHTS + eight) * 4 + 1], total[(tile * EIGHTS + eight) * 4 + 3])
                whole = tl.sum(tl.reshape(tl.join(even, odd), (WARPS, 8, 4, 2, 2)), 0)  # (g, t, half, odd)
                whole = tl.reshape(tl.permute(whole, (2, 0, 1, 3)), (16, 8))
                if RANK:
                    rank = tl.arange(0, ROOM)
                    used = (row[:, None] < rows) & (rank[None, :] < RANK)
                    up = tl.load(b + row[:, None] * RANK + rank[None, :], mask=used, other=0.0)
                    whole = tl.dot(up, tl.trans(small).to(up.dtype), whole, input_precision="ieee")
                if HAS_BIAS:
                    whole += tl.load(bias + row, mask=row < rows, other=0.0).to(tl.float32)[:, None]
                out = y + token[None, :] * rows + row[:, None]
                tl.store(out, whole.to(y.dtype.element_ty), mask=(token[None, :] < tokens) & (row[:, None] < rows))
