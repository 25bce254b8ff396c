"""Rounding of a block of columns one after another, a program for some of the weight's rows, which know nothing of each other
(Triton)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Of the weight, a program, whose block of columns lies in registers. On an H200 a block of 128 columns of 960, 12,288 and
# 22,016 rows takes 103, 141 and 205 us; with 4 warps 98, 169 and 321, with 64 rows 127, 156 and 225.
ROWS, WARPS = 32, 2


@triton.jit
def _round_block(
    wanted,
    given,
    given_row,
    given_column,
    steps,
    standing,
    values,
    borders,
    places,
    changes,
    columns,
    rows,
    STANDING: tl.constexpr,
    BORDERS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = row < rows
    left = tl.load(
        wanted + column[:, None] * rows + row[None, :],
        mask=(column < columns)[:, None] & inside[None, :],
        other=0.0,
    )
    step = tl.load(steps + row, mask=inside, other=1.0)
    was = tl.load(standing + row, mask=inside, other=0.0)
    share = tl.load(given + column * given_row, mask=column < columns, other=0.0)
    for at in range(columns):
        now, of_step, of_was, of_share = at * rows, step, was, share
        # Those of the next column are on their way while this one is rounded.
        later = tl.minimum(at + 1, columns - 1)
        after = later * rows
        step = tl.load(steps + after + row, mask=inside, other=1.0)
        share = tl.load(given + column * given_row + later * given_column, mask=column < columns, other=0.0)
        target = tl.sum(tl.where(column[:, None] == at, left, 0.0), axis=0)  # (ROWS,)
        if STANDING:
            was = tl.load(standing + after + row, mask=inside, other=0.0)
            target += of_was
        scaled = target / of_step
        place = tl.zeros((ROWS,), tl.int32)
        for border in tl.static_range(BORDERS):
            place += (scaled > tl.load(borders + border)).to(tl.int32)
        taken = tl.load(values + place) * of_step
        if STANDING:
            change = taken - of_was
        else:
            change = taken - target
        tl.store(places + now + row, place.to(tl.int64), mask=inside)
        tl.store(changes + now + row, change, mask=inside)
        left -= of_share[:, None] * change[None, :]


def round_block(
    wanted: Tensor,
    given: Tensor,
    steps: Tensor,
    values: Tensor,
    borders: Tensor,
    places: Tensor,
    standing: Tensor | None,
) -> Tensor:
    """As `kernels.ordered_rounding.round_in_order`, where the meaning of each is said; `wanted` stays as it is, and holds fewer than
    2^31 numbers.

    Returns:
        (columns, rows) float32: what each column changed by.
    """
    columns, rows = wanted.shape
    changes = torch.empty_like(wanted)
    with torch.cuda.device_of(wanted):
        _round_block[(triton.cdiv(rows, ROWS),)](
            wanted,
            given,
            given.stride(0),
            given.stride(1),
            steps,
            steps if standing is None else standing,
            values,
            borders,
            places,
            changes,
            columns,
            rows,
            STANDING=standing is not None,
            BORDERS=len(borders),
            COLUMNS=triton.next_power_of_2(columns),
            ROWS=ROWS,
            num_warps=WARPS,
        )
    return changes
