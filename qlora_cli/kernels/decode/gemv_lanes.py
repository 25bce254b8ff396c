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
    await_group,
    copy_piece,
    end_group,
    expand,
    fill_table_at,
    from_here,
    load_used_activations,
    make_table_and_ring,
    meet,
    multiply_block,
    of_quarter,
    read_words,
)
from qlora_cli.kernels.decode.overlap import follow


@triton.jit
def ask_for_chunk(
    packed, slot, chunk, first_row, rows, row_blocks, lane, live, TILES: tl.constexpr, WHOLE: tl.constexpr
):
    """Weights of 4 blocks a row of 16 TILES rows on their way into a warp's slot, whole lines at a time; one group.

    Block b of row r is to stand where block b xor r mod 4 would: so no two lanes read one bank at once.
    """
    line = lane >> 3
    piece = lane & 7
    target = slot + line * 128 + (piece ^ (line * 2)) * 16
    for step in tl.static_range(4 * TILES):
        row = first_row + step * 4 + line
        used = live
        if not WHOLE:
            used = live & (chunk * 4 + (piece >> 1) < row_blocks) & (row < rows)
        source = packed + (row * row_blocks * 4 + chunk * 16 + piece * 2)
        copy_piece(target + step * 512, source, used.to(tl.int32))
    end_group(lane)


@triton.jit
def read_chunk(slot, g, t, TILES: tl.constexpr):
    """A lane's words of a chunk that has come, row after row."""
    words = ()
    for half in tl.static_range(2 * TILES):
        for block in tl.static_range(4):
            words += (read_words(slot + half * 1024 + g * 128 + ((g & 3) ^ block) * 32 + t * 8),)
    return words


@triton.jit
def load_scale(absmax, nested_absmax, nested_offset, block, used, NESTED_BLOCKSIZE: tl.constexpr):
    """What the scale of a block is made of, see `finish_scale`. Waits for nothing."""
    level = tl.load(absmax + block, mask=used, other=0)
    if NESTED_BLOCKSIZE:
        outer = block // NESTED_BLOCKSIZE
        factor = tl.load(nested_absmax + outer, mask=used, other=0.0)
        offset = tl.load(nested_offset + outer, mask=used, other=0.0)
        parts = (level, factor, offset)
    else:
        parts = (level,)
    return parts


@triton.jit
def load_scales(
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
    """Of 4 blocks a row: what the scale of block t is made of, row after row. Waits for nothing."""
    scales = ()
    for half in tl.static_range(2 * TILES):
        row = first_row + half * 8
        start = row * row_blocks + chunk * 4
        used = live
        if not WHOLE:
            used = live & (chunk * 4 + t < row_blocks) & (row < rows)
        scales += (load_scale(absmax, nested_absmax, nested_offset, start + t, used, NESTED_BLOCKSIZE),)
    return scales


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
        scales += (load_scale(absmax, nested_absmax, nested_offset, start + t, used, NESTED_BLOCKSIZE),)
    return words, scales


@triton.jit
def finish_scale(parts, nested_code, NESTED_BLOCKSIZE: tl.constexpr):
    """fp32 scale of what `load_scale` loaded for one row; 0 for what is not there."""
    if NESTED_BLOCKSIZE:
        scale = tl.load(nested_code + parts[0].to(tl.int32)) * parts[1] + parts[2]
    else:
        scale = parts[0]
    return scale


@triton.jit
def _following(unit, chunk, chunks, WARPS: tl.constexpr):
    """The unit and the first warp's chunk that come after these: chunks of a unit first, then the program's next unit."""
    ends = tl.minimum(tl.maximum(chunk + WARPS - chunks + 1, 0), 1)  # 1 where that was the unit's last
    return unit + ends * tl.num_programs(0), (chunk + WARPS) * (1 - ends)


@triton.jit
def _load_projected(
    projected, first_rank, eight, tokens, ranks, parts, RANK: tl.constexpr, ROOM: tl.constexpr, PARTS: tl.constexpr
):
    """The parts of scaling A x of 8 tokens: (PARTS, 8, ROOM)."""
    part, token, rank = tl.arange(0, PARTS), eight * 8 + tl.arange(0, 8), tl.arange(0, ROOM)
    at = (part[:, None, None] * tokens + token[None, :, None]) * ranks + first_rank + rank[None, None, :]
    used = (part < parts)[:, None, None] & (token < tokens)[None, :, None] & (rank < RANK)[None, None, :]
    return tl.load(projected + at, mask=used, other=0.0)


@triton.jit
def _load_up(b, first_row, rows, first, RANK: tl.constexpr, ROOM: tl.constexpr):
    """B of 16 rows, the ranks from `first` on: (16, ROOM)."""
    row, rank = first_row + tl.arange(0, 16), first + tl.arange(0, ROOM)
    used = (row[:, None] < rows) & (rank[None, :] < RANK)
    return tl.load(b + row[:, None] * RANK + rank[None, :], mask=used, other=0.0)


@triton.jit
def _add_adapter(up, small, whole):
    """B of 16 rows times scaling A x of 8 tokens, (8, ranks), added to (16, 8)."""
    return tl.dot(up, tl.trans(small).to(up.dtype), whole, input_precision="ieee")


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
    STAGES: tl.constexpr,
    LATER: tl.constexpr,
    WHOLE: tl.constexpr,
    OVERLAP: tl.constexpr,
    KIND: tl.constexpr,
):
    """TILES times 16 rows of weights a unit, EIGHTS times 8 tokens; the warps of a program share out the columns.

    STAGES: chunks of a warp that are under way at once, also those of its next unit; LATER: one less, in letters. WHOLE:
    there are no rests, in rows or in blocks of 4. OVERLAP: the launch before may still be running, and nothing of it is read before it has ended.
    """
    THREADS: tl.constexpr = WARPS * 32
    EARLY: tl.constexpr = (EIGHTS * PARTS * ROOM <= WARPS * 64) & (ROOM <= 64)  # at most 16 registers
    UP_EARLY: tl.constexpr = TILES * ROOM <= WARPS * 8  # at most 4
    SLICE: tl.constexpr = ROOM if ROOM < 64 else 64  # ranks at once: more would not find room in shared memory
    thread = tl.arange(0, THREADS)
    g = (thread & 31) >> 2
    t = thread & 3
    warp = thread >> 5
    chunks = (row_blocks + 3) // 4
    unit_rows: tl.constexpr = 16 * TILES
    table = make_table_and_ring(tokens)
    slot_bytes: tl.constexpr = TILES * 2048
    ring = table + (32768 + warp * (STAGES * slot_bytes))
    asked_unit = tl.program_id(0)
    asked_chunk = 0  # of the first warp
    for stage in tl.static_range(STAGES):
        ask_for_chunk(
            packed,
            ring + stage * slot_bytes,
            asked_chunk + warp,
            asked_unit * unit_rows,
            rows,
            row_blocks,
            thread & 31,
            (asked_chunk + warp < chunks) & (asked_unit + warp * 0 < units),
            TILES,
            WHOLE,
        )
        asked_unit, asked_chunk = _following(asked_unit, asked_chunk, chunks, WARPS)
    first = tl.program_id(0) * unit_rows + g
    scales = load_scales(
        absmax,
        nested_absmax,
        nested_offset,
        warp,
        first,
        rows,
        row_blocks,
        t,
        warp < chunks,
        NESTED_BLOCKSIZE,
        TILES,
        WHOLE,
    )
    bank = fill_table_at(x, code, table, thread)
    turn = 0
    if RANK:  # nothing of the launch before
        place = tl.load(first_rank + tl.program_id(0) * unit_rows // ROW_UNIT)
    if OVERLAP:
        follow()
    column = from_here(t * 16)

    for unit in range(tl.program_id(0), units, tl.num_programs(0)):
        first_row = unit * unit_rows
        total = ()
        for _ in tl.static_range(TILES * EIGHTS * 4):
            total += (tl.zeros((THREADS,), tl.float32),)
        if RANK:
            ups = ()  # asked for before the weights, needed after them, like what follows
            if UP_EARLY:
                for tile in tl.static_range(TILES):
                    ups += (_load_up(b, first_row + tile * 16, rows, 0, RANK, ROOM),)
            smalls = ()
            if EARLY:
                for eight in tl.static_range(EIGHTS):
                    smalls += (_load_projected(projected, place, eight, tokens, ranks, parts, RANK, ROOM, PARTS),)
            next_row = (unit + tl.num_programs(0)) * unit_rows
            next_place = tl.load(first_rank + next_row // ROW_UNIT, mask=next_row < rows, other=0)
        for first_chunk in range(0, chunks, WARPS):
            chunk = first_chunk + warp
            next_unit, next_chunk = _following(unit, first_chunk, chunks, WARPS)
            next_chunk += warp
            next_scales = load_scales(
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
            slot = await_group(ring + (turn & (STAGES - 1)) * slot_bytes, LATER)
            words = read_chunk(slot, g, t, TILES)
            ask_for_chunk(
                packed,
                meet(slot),
                asked_chunk + warp,
                asked_unit * unit_rows,
                rows,
                row_blocks,
                thread & 31,
                (asked_chunk + warp < chunks) & (asked_unit + warp * 0 < units),
                TILES,
                WHOLE,
            )
            asked_unit, asked_chunk = _following(asked_unit, asked_chunk, chunks, WARPS)
            turn += 1
            finished = ()
            for half in tl.static_range(2 * TILES):
                finished += (finish_scale(scales[half], nested_code, NESTED_BLOCKSIZE),)
            for block in tl.static_range(4):
                at = tl.minimum(chunk * 4 + block, row_blocks - 1)
                values = ()
                for eight in tl.static_range(EIGHTS):
                    token = tl.minimum(eight * 8 + g, tokens - 1)
                    used = (eight * 8 + g < tokens).to(tl.int32)
                    values += (load_used_activations(x + (token * row_blocks + at) * 64 + column, used),)
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
            scales = next_scales

        for eight in tl.static_range(EIGHTS):
            token = eight * 8 + tl.arange(0, 8)
            small = ()
            if RANK:
                if EARLY:
                    small += (tl.sum(smalls[eight], 0),)  # (8, ROOM)
                else:
                    for number in tl.static_range(ROOM // SLICE):
                        part = _load_projected(
                            projected,
                            place + number * SLICE,
                            eight,
                            tokens,
                            ranks,
                            parts,
                            RANK - number * SLICE,
                            SLICE,
                            PARTS,
                        )
                        small += (tl.sum(part, 0),)
            for tile in tl.static_range(TILES):
                row = first_row + tile * 16 + tl.arange(0, 16)
                even = tl.join(total[(tile * EIGHTS + eight) * 4], total[(tile * EIGHTS + eight) * 4 + 2])
                odd = tl.join(total[(tile * EIGHTS + eight) * 4 + 1], total[(tile * EIGHTS + eight) * 4 + 3])
                whole = tl.sum(tl.reshape(tl.join(even, odd), (WARPS, 8, 4, 2, 2)), 0)  # (g, t, half, odd)
                whole = tl.reshape(tl.permute(whole, (2, 0, 1, 3)), (16, 8))
                for number in tl.static_range(ROOM // SLICE if RANK else 0):
                    if UP_EARLY:
                        whole = _add_adapter(ups[tile], small[number], whole)
                    else:
                        up = _load_up(b, first_row + tile * 16, rows, number * SLICE, RANK, SLICE)
                        whole = _add_adapter(up, small[number], whole)
                if HAS_BIAS:
                    whole += tl.load(bias + row, mask=row < rows, other=0.0).to(tl.float32)[:, None]
                out = y + token[None, :] * rows + row[:, None]
                tl.store(out, whole.to(y.dtype.element_ty), mask=(token[None, :] < tokens) & (row[:, None] < rows))
        if RANK:
            place = next_place
