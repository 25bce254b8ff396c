"""Rounding of a weight to 4 bits that knows its inputs: each column's error is passed on to the columns not yet rounded.

The method is that of GPTQ (https://arxiv.org/abs/2210.17323, algorithm 1), under the damped second moment of the layer's
inputs, and after it coordinate descent on the same error (https://arxiv.org/abs/2309.01885), which takes another sixth of
it away. A block's constant is searched before, and sent through double quantisation before anything is rounded by it, so
that what is written dequantises to exactly what was weighed here.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from qlora_cli.core.calibration.low_rank import DAMPING, SecondMoment
from qlora_cli.core.models.quantization import BLOCK_SIZE, four_bit_values, pack_weight, round_trip_constants
from qlora_cli.kernels.ordered_rounding import borders_between, round_in_order
from qlora_cli.settings.groups import QuantizationSettings

SHRINKING = (1.0, 0.97, 0.94, 0.91, 0.88, 0.85)  # of a block's largest magnitude, tried as its constant
COLUMNS = 128  # rounded before the others learn of their errors
SWEEPS = 2  # of the descent; a third one takes 2 % more
MOST_COLUMNS = 16_384  # whose second moment is inverted at once; wider weights are rounded in such parts


def round_to_four_bits(
    weights: Sequence[Tensor], moment: SecondMoment | None, quantization: QuantizationSettings
) -> list[tuple[dict[str, Tensor], Tensor]]:
    """Weights that read the same inputs in 4 bits, nearest where those look.

    Args:
        weights: (out, in) float32 each, `in` a multiple of the block size.
        moment: Of the inputs; None for rounding to nearest.
        quantization: The 4-bit type, and whether constants are quantised too.

    Returns:
        For each what a 4-bit checkpoint holds, as `pack_weight` gives it, and what that stands for, (out, in) float32.
    """
    weight = torch.cat(list(weights))
    columns = weight.shape[1]
    values, order = four_bit_values(quantization.quant_type).to(weight.device).sort()
    importance = torch.ones(columns, device=weight.device)
    if moment is not None and moment.inputs is None:  # no token came to it
        moment = None
    if moment is not None and moment.inputs is not None and moment.squares is not None:
        importance = moment.inputs.diagonal() / moment.squares.clamp(min=1e-30) + DAMPING
    searched = _search_constants(weight, values, importance).split([len(part) for part in weights])
    packed = [_pack_constants(found, columns, quantization) for found in searched]
    if quantization.double_quant:
        searched = tuple(round_trip_constants(found.flatten()).view_as(found) for found in searched)
    constants = torch.cat(list(searched))
    step = constants.clamp(min=1e-30).repeat_interleave(BLOCK_SIZE, dim=1)  # (out, in)
    places = torch.empty(columns, len(weight), dtype=torch.int64, device=weight.device)
    for start in range(0, columns, MOST_COLUMNS):
        part = slice(start, min(start + MOST_COLUMNS, columns))
        # Columns as rows: each is read and written in one piece.
        values_wanted, steps = weight[:, part].T.contiguous(), step[:, part].T.contiguous()
        if moment is None:
            places[part] = torch.bucketize(values_wanted / steps, borders_between(values))
            continue
        square = damped_moment(moment, part)
        found = _round_columns(values_wanted, steps, values, square)
        places[part] = _descend(values_wanted, steps, values, square, found)
    codes, taken = order[places.T].to(torch.uint8), values[places.T] * constants.repeat_interleave(BLOCK_SIZE, dim=1)
    rounded = []
    for tensors, own, value in zip(
        packed, codes.split([*map(len, weights)]), taken.split([*map(len, weights)]), strict=True
    ):
        pairs = own.reshape(-1, 2)
        tensors[""] = (pairs[:, 0] << 4 | pairs[:, 1]).view(tensors[""].shape)
        rounded.append((tensors, value))
    return rounded


def _pack_constants(constants: Tensor, columns: int, quantization: QuantizationSettings) -> dict[str, Tensor]:
    """What `pack_weight` gives for a weight (out, columns) whose blocks have these constants, codes aside."""
    template = torch.zeros(len(constants), columns, device=constants.device)
    template[:, ::BLOCK_SIZE] = constants
    return pack_weight(template, quant_type=quantization.quant_type, double_quant=quantization.double_quant)


def _search_constants(weight: Tensor, values: Tensor, importance: Tensor) -> Tensor:
    """(out, blocks): of the constants tried, the one that leaves the least weighted error in its block."""
    blocked = weight.view(len(weight), -1, BLOCK_SIZE)
    weights, borders = importance.view(-1, BLOCK_SIZE), borders_between(values)
    largest = blocked.abs().amax(dim=-1)
    best, least = largest, torch.full_like(largest, torch.inf)
    for factor in SHRINKING:
        constants = (factor * largest).clamp(min=1e-30)[..., None]
        places = torch.bucketize(blocked / constants, borders)
        error = ((values[places] * constants - blocked).square() * weights).sum(-1)
        better = error < least
        best, least = torch.where(better, factor * largest, best), torch.where(better, error, least)
    return best


def damped_moment(moment: SecondMoment, part: slice = slice(None)) -> Tensor:
    """The damped second moment of some columns, (columns, columns), in units of the mean square of an input."""
    assert moment.inputs is not None and moment.squares is not None
    square = moment.inputs[part, part] / moment.squares.clamp(min=1e-30)
    square.diagonal().add_(DAMPING)
    return square


def _round_columns(weight: Tensor, step: Tensor, values: Tensor, square: Tensor) -> Tensor:
    """Places of the values taken, (in, out), each column's error passed on by the moment.

    Args:
        weight: (in, out) float32.
        step: What values are multiplied by, likewise.
        values: Of the 4-bit type, ascending.
        square: The damped moment, (in, in).
    """
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(square))
    inverse = torch.linalg.cholesky(inverse, upper=True)
    shares = -inverse / inverse.diagonal()[:, None]  # of a column's change, what each later one takes
    left, places = weight.clone(), torch.empty(weight.shape, dtype=torch.int64, device=weight.device)
    for start in range(0, len(weight), COLUMNS):
        part = slice(start, start + COLUMNS)
        given = shares[part, part].triu(1).T.contiguous()  # a row: what a column takes of those before it in the block
        changes = round_in_order(left[part], given, step[part], values, places[part])
        left[part.stop :] -= shares[part, part.stop :].T @ changes
    return places


def _descend(weight: Tensor, step: Tensor, values: Tensor, square: Tensor, places: Tensor) -> Tensor:
    """Places, (in, out), after some sweeps in which each column takes what is best beside all others as they are."""
    taken, whole = values[places] * step, square.diagonal()[:, None]
    for _ in range(SWEEPS):
        pull = square @ (weight - taken)  # half the negative gradient; of a sweep only columns to come are kept up
        for start in range(0, len(weight), COLUMNS):
            part = slice(start, start + COLUMNS)
            # In units of a column's own square, so that a column's pull is the step that it wants.
            given = square[part, part].tril(-1) / whole[part]
            changes = round_in_order(pull[part] / whole[part], given, step[part], values, places[part], taken[part])
            taken[part] += changes
            pull[part.stop :] -= square[part, part.stop :].T @ changes
    return places
