"""PTX instructions for single lanes, where Triton has none: on tensors of one element a thread.

Used by gemv_lanes.py; tests run the same text in numpy. Fragments are those of `mma.m16n8k16` (PTX ISA, "Matrix
Fragments"): lane 4 g + t has rows g and g + 8 of 16, token g of 8, and of the columns those that belong to t.
"""

import triton
import triton.language as tl

# ---------------------------------------------------------------- the table


@triton.jit
def make_table(seed):
    """Address of 32 KiB of shared memory. To be called once in a program."""
    return tl.inline_asm_elementwise(
        """{
        .shared .align 128 .b8 pairs[32768];
        mov.u32 $0, pairs;
        }""",
        "=r,r",
        [seed],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def make_table_and_ring(seed):
    """Address of 48 KiB of shared memory, a table and after it 16 KiB. To be called once in a program."""
    return tl.inline_asm_elementwise(
        """{
        .shared .align 128 .b8 pairs[49152];
        mov.u32 $0, pairs;
        }""",
        "=r,r",
        [seed],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


# An entry takes 128 bytes, 16 at a time: lanes next to each other start at different ones, and `xor` leads through all 8.
STORE_PAIR = tl.constexpr(
    """{
    .reg .b32 row, at;
    shl.b32 row, $2, 7;
    add.u32 row, row, $1;
    shl.b32 at, $2, 4;
    and.b32 at, at, 112;
    add.u32 at, at, row;
    st.shared.v4.b32 [at], {$3, $3, $3, $3};
    """
    + "".join(
        f"xor.b32 at, at, {apart};\nst.shared.v4.b32 [at], {{$3, $3, $3, $3}};\n"
        for apart in (16, 48, 16, 112, 16, 48, 16)
    )
    + "mov.u32 $0, $1;\n}"
)


@triton.jit
def store_pair(table, entry, pair):
    """Writes an entry into all banks."""
    return tl.inline_asm_elementwise(
        STORE_PAIR,
        "=r,r,r,r",
        [table, entry, pair],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def own_bank(table):
    """Where the table stands for this lane. Volatile, so that no look-up moves above the barrier before it."""
    return tl.inline_asm_elementwise(
        """{
        .reg .u32 lane;
        mov.u32 lane, %laneid;
        shl.b32 lane, lane, 2;
        add.u32 $0, lane, $1;
        }""",
        "=r,r",
        [table],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def fill_table_at(x, code, table, thread):
    """All pairs of `code`'s 16 values in the dtype of x's elements; returns where they stand for each lane.

    To be called once in a program, by all of its threads.
    """
    entry = tl.arange(0, 256)
    first = tl.load(code + (entry >> 4)).to(x.dtype.element_ty).to(tl.int16, bitcast=True).to(tl.int32)
    second = tl.load(code + (entry & 15)).to(x.dtype.element_ty).to(tl.int16, bitcast=True).to(tl.int32)
    store_pair(table, entry, (first & 0xFFFF) | (second << 16))
    tl.debug_barrier()
    return own_bank(table + thread * 0)


@triton.jit
def fill_table(x, code, seed, thread):
    """`fill_table_at` in a table of its own."""
    return fill_table_at(x, code, make_table(seed), thread)


# ---------------------------------------------------------------- the ring


@triton.jit
def copy_piece(target, source, used):
    """Asks for 16 bytes of global memory in shared memory, where `used` is not 0."""
    return tl.inline_asm_elementwise(
        """{
        .reg .pred used;
        setp.ne.u32 used, $3, 0;
        @used cp.async.cg.shared.global [$1], [$2], 16;
        mov.u32 $0, $3;
        }""",
        "=r,r,l,r",
        [target, source, used],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def end_group(value):
    """What was asked for since the last call is one group."""
    return tl.inline_asm_elementwise(
        "cp.async.commit_group;\nmov.u32 $0, $1;", "=r,r", [value], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def await_group(value, LATER: tl.constexpr):
    """The value, once all groups of the warp are there but so many later ones (a string)."""
    return tl.inline_asm_elementwise(
        "cp.async.wait_group " + LATER + ";\nbar.warp.sync 0xffffffff;\nmov.u32 $0, $1;",
        "=r,r",
        [value],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def meet(value):
    """The value, once the whole warp has read what it asked for."""
    return tl.inline_asm_elementwise(
        "bar.warp.sync 0xffffffff;\nmov.u32 $0, $1;", "=r,r", [value], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def read_words(place):
    """64 bits of shared memory."""
    return tl.inline_asm_elementwise("ld.shared.b64 $0, [$1];", "=l,r", [place], dtype=tl.int64, is_pure=False, pack=1)


EXPAND = tl.constexpr(
    "{\n.reg .b32 low, high, a;\nmov.b64 {low, high}, $8;\n"
    + "".join(
        f"prmt.b32 a, {'high' if byte > 3 else 'low'}, 0, 0x444{byte % 4};\n"
        f"mad.lo.u32 a, a, 128, $9;\nld.shared.b32 ${byte}, [a];\n"
        for byte in range(8)
    )
    + "}"
)


@triton.jit
def expand(words, bank):
    """16 packed weights (64 bits) to 8 registers of two, in order: each byte is an entry of the table."""
    return tl.inline_asm_elementwise(
        EXPAND,
        "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,l,r",
        [words, bank],
        dtype=(tl.int32,) * 8,
        is_pure=True,
        pack=1,
    )


# ---------------------------------------------------------------- fragments


@triton.jit
def load_activations(pointer):
    """16 values of 16 bits as 8 registers of two."""
    return tl.inline_asm_elementwise(
        """
        ld.global.nc.v4.b32 {$0, $1, $2, $3}, [$8];
        ld.global.nc.v4.b32 {$4, $5, $6, $7}, [$8 + 16];
        """,
        "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,l",
        [pointer],
        dtype=(tl.int32,) * 8,
        is_pure=True,
        pack=1,
    )


ACTIVATIONS = tl.constexpr(
    "{\n.reg .pred used;\nsetp.ne.u32 used, $9, 0;\n"
    + "".join(f"mov.b32 ${number}, 0;\n" for number in range(8))
    + "@used ld.global.v4.b32 {$0, $1, $2, $3}, [$8];\n@used ld.global.v4.b32 {$4, $5, $6, $7}, [$8 + 16];\n}"
)


@triton.jit
def load_used_activations(pointer, used):
    """16 values of 16 bits as 8 registers of two; zeros where `used` is 0, which takes no part of the memory's time."""
    return tl.inline_asm_elementwise(
        ACTIVATIONS,
        "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,l,r",
        [pointer, used],
        dtype=(tl.int32,) * 8,
        is_pure=True,
        pack=1,
    )


@triton.jit
def from_here(value):
    """The value. Volatile: nothing that is made of it moves above what was waited for before."""
    return tl.inline_asm_elementwise("mov.u32 $0, $1;", "=r,r", [value], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def multiply_block(a, b, x, KIND: tl.constexpr):
    """(16 rows, 64 columns) times (64 columns, 8 tokens): rows g, rows g + 8 and token g of each lane."""
    zero = tl.zeros(a[0].shape, tl.float32)
    mma: tl.constexpr = "mma.sync.aligned.m16n8k16.row.col.f32." + KIND + "." + KIND + ".f32 "
    return tl.inline_asm_elementwise(
        "{\n.reg .f32 d<4>;\n"
        + mma
        + "{d0, d1, d2, d3}, {$4, $12, $5, $13}, {$20, $21}, {$28, $28, $28, $28};\n"
        + mma
        + "{d0, d1, d2, d3}, {$6, $14, $7, $15}, {$22, $23}, {d0, d1, d2, d3};\n"
        + mma
        + "{d0, d1, d2, d3}, {$8, $16, $9, $17}, {$24, $25}, {d0, d1, d2, d3};\n"
        + mma
        + "{$0, $1, $2, $3}, {$10, $18, $11, $19}, {$26, $27}, {d0, d1, d2, d3};\n}",
        "=f,=f,=f,=f,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,f",
        a + b + x + (zero,),
        dtype=(tl.float32,) * 4,
        is_pure=True,
        pack=1,
    )


@triton.jit
def of_quarter(value, number):
    """The value of lane 4 g + number."""
    return tl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, $2, 0x1c1f, 0xffffffff;",
        "=f,f,r",
        [value, number],
        dtype=tl.float32,
        is_pure=True,
        pack=1,
    )
