"""Rounding of columns to the values of a 4-bit type, one after another: each one's change pulls at those behind it."""

import importlib.util

import torch
from torch import Tensor

if importlib.util.find_spec("triton"):  # not there beside a CPU-only torch
    from qlora_cli.kernels.triton import ordered_rounding as triton_rounding


def borders_between(values: Tensor) -> Tensor:
    """Between values, ascending: a number belongs to the place of those below it."""
    return (values[1:] + values[:-1]) / 2


def round_in_order(
    wanted: Tensor, given: Tensor, steps: Tensor, values: Tensor, places: Tensor, standing: Tensor | None = None
) -> Tensor:
    """Takes for each column the value nearest to what it wants, less the changes before it times what it is given of them.

    Columns lie as rows: each is read and written in one piece.

    Args:
        wanted: (columns, rows) float32, contiguous; overwritten.
        given: (columns, columns) float32, below the diagonal: of which change a column takes how much.
        steps: (columns, rows) float32, contiguous: what values are multiplied by.
        values: Of the 4-bit type, (16,) float32, ascending.
        places: (columns, rows) int64, contiguous; receives which values are taken.
        standing: (columns, rows) float32, contiguous: from where changes are wanted and counted. None: what is wanted is
            the column itself, and its change the error of rounding it.

    Returns:
        (columns, rows) float32: what each column changed by.
    """
    borders = borders_between(values)
    if wanted.is_cuda:
        return triton_rounding.round_block(wanted, given, steps, values, borders, places, standing)
    changes = torch.zeros_like(wanted)
    scaled, taken = torch.empty_like(wanted[0]), torch.empty_like(wanted[0])
    for at in range(len(wanted)):
        column, place = wanted[at], places[at]
        torch.addmv(column, changes.T, given[at], alpha=-1, out=column)
        if standing is not None:
            column.add_(standing[at])
        torch.div(column, steps[at], out=scaled)
        torch.bucketize(scaled, borders, out=place)
        torch.index_select(values, 0, place, out=taken)
        torch.sub(taken.mul_(steps[at]), column if standing is None else standing[at], out=changes[at])
    return changes
