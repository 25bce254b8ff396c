"""4-bit GEMV and the adapters' first product, as portable Triton programs behind gemv.py."""

import triton
import triton.language as tl

from qlora_cli.kernels.decode.overlap import follow


@triton.jit
def lane_table(code):
    """The entry of a table of 16 that belongs to this lane: lane mod 16. Not the same number in every thread."""
    return tl.inline_asm_elementwise(
        """{
        .reg .u32 lane;
        .reg .u64 place;
        mov.u32 lane, %laneid;
        and.b32 lane, lane, 15;
        mul.wide.u32 place, lane, 4;
        add.u64 place, place, $1;
        ld.global.nc.f32 $0, [place];
        }""",
        "=f,l",
        [code],
        dtype=tl.float32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def look_up(code, table, word, SHIFT: tl.constexpr, SHUFFLE: tl.constexpr):
    """code[nibble of `word` at SHIFT].

    A shuffle reads another lane's register by the five lowest bits of its index. The table stands twice in a warp, so
    that four bits decide and the fifth is free: no mask, no address; a load needs both and keeps the integer units
    busy for longer than the memory takes.
    """
    if SHUFFLE:
        value = tl.inline_asm_elementwise(
            "shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;",
            "=f,f,r",
            [table, word >> SHIFT],
            dtype=tl.float32,
            is_pure=False,
            pack=1,
        )
    else:
        value = tl.load(code + ((word >> SHIFT) & 15))
    return value


@triton.jit
def load_scales(absmax, nested_absmax, nested_code, nested_offset, block, used, NESTED_BLOCKSIZE: tl.constexpr):
    """fp32 scales of blocks, from their 8-bit codes, each step rounded as bitsandbytes rounds it, or as they are."""
    if NESTED_BLOCKSIZE:
        level = tl.load(absmax + block, mask=used, other=0).to(tl.int32)
        outer = block // NESTED_BLOCKSIZE
        scale = tl.load(nested_code + level) * tl.load(nested_absmax + outer, mask=used, other=0.0)
        scale += tl.load(nested_offset + outer, mask=used, other=0.0)
    else:
        scale = tl.load(absmax + block, mask=used, other=0.0)
    return scale


@triton.jit
def project(
    x,
    a,
    scaling,
    out,
    tokens,
    columns,
    ranks,
    SPAN: tl.constexpr,
    TOKENS: tl.constexpr,
    RANKS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One span of columns of scaling A x, for RANKS rows of A and TOKENS tokens. OVERLAP: the next launch may get ready.

    A program of one token computes it as it would alone, whatever the others do.
    """
    rank = tl.program_id(0) * RANKS + tl.arange(0, RANKS)
    token = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    column = tl.program_id(1) * SPAN + tl.arange(0, SPAN)
    used = (rank[:, None] < ranks) & (column[None, :] < columns)
    down = tl.load(a + rank[:, None] * columns + column[None, :], mask=used, other=0.0)
    if OVERLAP:
        follow()
    if TOKENS == 1:
        values = tl.load(x + tl.program_id(2) * columns + column, mask=column < columns, other=0.0)
        total = tl.sum(down.to(tl.float32) * values.to(tl.float32)[None, :], 1)[:, None]
    else:
        seen = (token[None, :] < tokens) & (column[:, None] < columns)
        values = tl.load(x + token[None, :] * columns + column[:, None], mask=seen, other=0.0)
        total = tl.dot(down, values, input_precision="ieee")
    total *= tl.load(scaling + rank, mask=rank < ranks, other=0.0)[:, None]
    place = (tl.program_id(1) * tokens + token[None, :]) * ranks + rank[:, None]
    tl.store(out + place, total, mask=(token[None, :] < tokens) & (rank[:, None] < ranks))


@triton.jit
def multiply_few(
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
    row_words,
    ranks,
    parts,
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    RANK: tl.constexpr,
    ROOM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROW_UNIT: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    SHUFFLE: tl.constexpr,
):
    """Up to 64 tokens, in any dtype: weights rounded to the activations' dtype as a dequantisation does, then multiplied."""
    WORDS: tl.constexpr = BLOCKSIZE // 8
    row_words = tl.multiple_of(row_words, WORDS)
    row_blocks = row_words // WORDS
    columns = row_words * 8
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.arange(0, TOKENS)
    table = lane_table(code) if SHUFFLE else 0.0
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    for first in range(0, row_words, BLOCKS * WORDS):
        place = first + tl.arange(0, BLOCKS * WORDS)
        used = (row[:, None] < rows) & (place[None, :] < row_words)
        word = tl.load(packed + row[:, None] * row_words + place[None, :], mask=used, other=0)
        column_block = first // WORDS + tl.arange(0, BLOCKS)
        used_block = (row[:, None] < rows) & (column_block[None, :] < row_blocks)
        block = row[:, None] * row_blocks + column_block[None, :]
        scale = load_scales(absmax, nested_absmax, nested_code, nested_offset, block, used_block, NESTED_BLOCKSIZE)
        scale = scale[:, :, None]
        column = first * 8 + tl.arange(0, BLOCKS * BLOCKSIZE)
        seen = (token[None, :] < tokens) & (column[:, None] < columns)
        values = tl.load(x + token[None, :] * columns + column[:, None], mask=seen, other=0.0)  # (tile, TOKENS)
        word = tl.reshape(word, (ROWS, BLOCKS, WORDS))
        w0 = (look_up(code, table, word, 4, SHUFFLE) * scale).to(x.dtype.element_ty)
        w1 = (look_up(code, table, word, 0, SHUFFLE) * scale).to(x.dtype.element_ty)
        w2 = (look_up(code, table, word, 12, SHUFFLE) * scale).to(x.dtype.element_ty)
        w3 = (look_up(code, table, word, 8, SHUFFLE) * scale).to(x.dtype.element_ty)
        w4 = (look_up(code, table, word, 20, SHUFFLE) * scale).to(x.dtype.element_ty)
        w5 = (look_up(code, table, word, 16, SHUFFLE) * scale).to(x.dtype.element_ty)
        w6 = (look_up(code, table, word, 28, SHUFFLE) * scale).to(x.dtype.element_ty)
        w7 = (look_up(code, table, word, 24, SHUFFLE) * scale).to(x.dtype.element_ty)
        even = tl.join(tl.join(w0, w4), tl.join(w2, w6))
        odd = tl.join(tl.join(w1, w5), tl.join(w3, w7))
        weight = tl.reshape(tl.join(even, odd), (ROWS, BLOCKS * BLOCKSIZE))
        total = tl.dot(weight, values, total, input_precision="ieee")
    if RANK:
        rank = tl.arange(0, ROOM)
        start = tl.load(first_rank + tl.program_id(0) * ROWS // ROW_UNIT)
        small = tl.zeros((TOKENS, ROOM), tl.float32)
        for part in range(0, parts):
            at = (part * tokens + token[:, None]) * ranks + start + rank[None, :]
            small += tl.load(projected + at, mask=(token[:, None] < tokens) & (rank[None, :] < RANK), other=0.0)
        used_b = (row[:, None] < rows) & (rank[None, :] < RANK)
        up = tl.load(b + row[:, None] * RANK + rank[None, :], mask=used_b, other=0.0)
        total = tl.dot(up, tl.trans(small).to(up.dtype), total, input_precision="ieee")
    if HAS_BIAS:
        total += tl.load(bias + row, mask=row < rows, other=0.0).to(tl.float32)[:, None]
    out = y + token[None, :] * rows + row[:, None]
    tl.store(out, total.to(y.dtype.element_ty), mask=(token[None, :] < tokens) & (row[:, None] < rows))
