"""Products of a few rows with the experts they go to, in one pass over those experts' 4-bit values (Triton).

The program of gemv_lanes.py, a lane at a time on tensor cores, for rows sorted by expert: a program has up to 8 of the
rows that go to an expert, and some bands of its matrix, so that each value is read once for 8 rows.
"""
# mypy: disable-error-code="assignment"

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlora_cli.kernels.decode import gemv
from qlora_cli.kernels.decode.gemv_lanes import finish_scale, load_chunk
from qlora_cli.kernels.decode.lane_instructions import (
    expand,
    fill_table,
    load_activations,
    multiply_block,
    of_quarter,
)
from qlora_cli.kernels.experts.products import find_rows, most_tiles

TOKENS = 8  # rows of a program


class LaneTiling(NamedTuple):
    """How the work is divided.

    Attributes:
        tiles: 16 rows of a matrix each, of a band.
        warps: Of a program; they share out the columns.
        resident: Programs that a multiprocessor has at once.
        registers: Most a thread may have.
        ahead: Whether the next chunk of values is under way while one is multiplied.
    """

    tiles: int
    warps: int
    resident: int
    registers: int | None = 128
    ahead: bool = False


# Two tiles share what they read of the rows; one spreads the little work of a token or two over more programs.
LANES, WIDE_LANES = LaneTiling(1, 4, 6, 80), LaneTiling(2, 2, 6, 168, ahead=True)
FEWEST = 16  # rows up to which the former is the faster one


@triton.jit
def _multiply_lanes(
    x,
    packed,
    absmax,
    code,
    nested_absmax,
    nested_code,
    nested_offset,
    ends,
    source,
    y,
    experts,
    matrix_rows,
    row_blocks,
    choices,
    bands,
    NESTED_BLOCKSIZE: tl.constexpr,
    EXPERTS: tl.constexpr,
    TILES: tl.constexpr,
    WARPS: tl.constexpr,
    AHEAD: tl.constexpr,
    WHOLE: tl.constexpr,
    GATHERED: tl.constexpr,
    KIND: tl.constexpr,
):
    """Up to 8 rows of one expert, times every so many-th band of its matrix. WHOLE: no rests, in its rows or blocks of 4.
    AHEAD: while a chunk is multiplied the next one is under way, also across bands."""
    THREADS: tl.constexpr = WARPS * 32
    thread = tl.arange(0, THREADS)
    g = (thread & 31) >> 2
    t = thread & 3
    warp = thread >> 5
    chunks = (row_blocks + 3) // 4
    expert, start, stop = find_rows(ends, experts, 0, experts, tl.program_id(0), 8, EXPERTS)
    if expert < 0:
        return
    place = tl.minimum(start + g, stop - 1)
    if GATHERED:
        given = tl.load(source + place) // choices
    else:
        given = place
    if AHEAD:
        words, scales = load_chunk(
            packed,
            absmax,
            nested_absmax,
            nested_offset,
            warp,
            expert * matrix_rows + tl.program_id(1) * (16 * TILES) + g,
            (expert + 1) * matrix_rows,
            row_blocks,
            t,
            warp < chunks,
            NESTED_BLOCKSIZE,
            TILES,
            WHOLE,
        )
    bank = fill_table(x, code, experts, thread)
    for band in range(tl.program_id(1), bands, tl.num_programs(1)):
        first_row = band * (16 * TILES)
        total = ()
        for _ in tl.static_range(TILES * 4):
            total += (tl.zeros((THREADS,), tl.float32),)
        for first_chunk in range(0, chunks, WARPS):
            chunk = first_chunk + warp
            if AHEAD:
                last = tl.minimum(tl.maximum(first_chunk + WARPS - chunks + 1, 0), 1)  # 1 where it was the band's last
                next_band = band + last * tl.num_programs(1)
                next_chunk = (first_chunk + WARPS) * (1 - last) + warp
                next_words, next_scales = load_chunk(
                    packed,
                    absmax,
                    nested_absmax,
                    nested_offset,
                    next_chunk,
                    expert * matrix_rows + next_band * (16 * TILES) + g,
                    (expert + 1) * matrix_rows,
                    row_blocks,
                    t,
                    (next_chunk < chunks) & (next_band + warp * 0 < bands),
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
                    expert * matrix_rows + first_row + g,
                    (expert + 1) * matrix_rows,
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
                values = load_activations(x + (given * row_blocks + at) * 64 + t * 16)
                new = ()
                for tile in tl.static_range(TILES):
                    low = expand(words[tile * 8 + block], bank)
                    high = expand(words[tile * 8 + 4 + block], bank)
                    low_scale = of_quarter(finished[tile * 2], t * 0 + block)
                    high_scale = of_quarter(finished[tile * 2 + 1], t * 0 + block)
                    d = multiply_block(low, high, values, KIND)
                    new += (
                        total[tile * 4] + d[0] * low_scale,
                        total[tile * 4 + 1] + d[1] * low_scale,
                        total[tile * 4 + 2] + d[2] * high_scale,
                        total[tile * 4 + 3] + d[3] * high_scale,
                    )
                total = new
            if AHEAD:
                words, scales = next_words, next_scales
        token = start + tl.arange(0, 8)
        for tile in tl.static_range(TILES):
            row = first_row + tile * 16 + tl.arange(0, 16)
            even = tl.join(total[tile * 4], total[tile * 4 + 2])
            odd = tl.join(total[tile * 4 + 1], total[tile * 4 + 3])
            whole = tl.sum(tl.reshape(tl.join(even, odd), (WARPS, 8, 4, 2, 2)), 0)  # (g, t, half, odd)
            whole = tl.reshape(tl.permute(whole, (2, 0, 1, 3)), (16, 8))
            out = y + token[None, :] * matrix_rows + row[:, None]
            used = (token[None, :] < stop) & (row[:, None] < matrix_rows)
            tl.store(out, whole.to(y.dtype.element_ty), mask=used)


def takes_lanes(x: Tensor) -> bool:
    """Whether `multiply_lanes` can compute with such rows where they are."""
    return x.dtype in gemv.KINDS and gemv.multiprocessors(x.device) > 0


def multiply_lanes(
    x: Tensor,
    weight: Any,
    columns: int,
    ends: Tensor,
    *,
    source: Tensor | None = None,
    choices: int = 1,
    tiling: LaneTiling | None = None,
) -> Tensor:
    """x W^T with each row's expert's W: the 16 values rounded to the dtype of x, their sums scaled in fp32.

    Arguments and result are those of `products.multiply_packed`; x is of 16 bits, and `tiling` one of lanes.
    """
    experts = len(ends)
    matrix_rows = weight.rows // experts
    rows = len(x) if source is None else len(source)
    y = torch.empty(rows, matrix_rows, dtype=x.dtype, device=x.device)
    if x.data_ptr() % 16:
        x = x.clone()  # loads are of 16 bytes
    tiling = tiling or (LANES if rows <= FEWEST else WIDE_LANES)
    bands = triton.cdiv(matrix_rows, 16 * tiling.tiles)
    tiles = most_tiles(rows, experts, TOKENS)
    if not tiles:
        return y
    row_blocks = columns // 64
    together = triton.cdiv(gemv.multiprocessors(x.device) * tiling.resident, tiles)  # programs of a tile at once
    each = triton.cdiv(bands, together)  # bands of a program
    with torch.cuda.device_of(x):
        _multiply_lanes[(tiles, triton.cdiv(bands, each))](
            x,
            weight.packed.view(torch.int64),
            weight.absmax,
            weight.code,
            weight.nested_absmax,
            weight.nested_code,
            weight.offset,
            ends,
            source,
            y,
            experts,
            matrix_rows,
            row_blocks,
            choices,
            bands,
            NESTED_BLOCKSIZE=weight.nested_blocksize if weight.nested_absmax is not None else 0,
            EXPERTS=triton.next_power_of_2(experts),
            TILES=tiling.tiles,
            WARPS=tiling.warps,
            AHEAD=tiling.ahead,
            WHOLE=row_blocks % 4 == 0 and matrix_rows % (16 * tiling.tiles) == 0,
            GATHERED=source is not None,
            KIND=gemv.KINDS[x.dtype],
            num_warps=tiling.warps,
            maxnreg=tiling.registers,
        )
    return y
