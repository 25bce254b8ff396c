"""Rounding of a weight to 4 bits that knows its inputs: each column's error is passed on to the columns not yet rounded.

The method is that of GPTQ (https://arxiv.org/abs/2210.17323, algorithm 1), under the damped second moment of the layer's
inputs, and after it coordinate descent on the same error (https://arxiv.org/abs/2309.01885), which takes another sixth of
it away. A block's constant is searched before, and sent through double quantisation before anything is rounded by it, so
that what is written dequantises to exactly what was weighed here.
"""

import torch
from torch import Tensor

from qlora_cli.core.calibration.low_rank import DAMPING, SecondMoment
from qlora_cli.core.models.quantization import BLOCK_SIZE, four_bit_values, pack_weight, round_trip_constants
from qlora_cli.settings.groups import QuantizationSettings

SHRINKING = (1.0, 0.97, 0.94, 0.91, 0.88, 0.85)  # of a block's largest magnitude, tried as its constant
COLUMNS = 128  # rounded before the others learn of their errors
SWEEPS = 2  # of the descent; a third one takes 2 % more
MOST_COLUMNS = 16_384  # whose second moment is inverted at once; wider weights are rounded in such parts


def round_to_four_bits(
    weight: Tensor, moment: SecondMoment | None, quantization: QuantizationSettings
) -> tuple[dict[str, Tensor], Tensor]:
    """A weight in 4 bits, nearest where its inputs look.

    Args:
        weight: (out, in) float32, `in` a multiple of the block size.
        moment: Of the inputs; None for rounding to nearest.
        quantization: The 4-bit type, and whether constants are quantised too.

    Returns:
        What a 4-bit checkpoint holds, as `pack_weight` gives it, and what that stands for, (out, in) float32.
    """
    rows, columns = weight.shape
    values, order = four_bit_values(quantization.quant_type).to(weight.device).sort()
    importance = torch.ones(columns, device=weight.device)
    if moment is not None and moment.inputs is None:  # no token came to it
        moment = None
    if moment is not None and moment.inputs is not None and moment.squares is not None:
        importance = moment.inputs.diagonal() / moment.squares.clamp(min=1e-30) + DAMPING
    constants = _search_constants(weight, values, importance)
    template = torch.zeros_like(weight).view(rows, -1, BLOCK_SIZE)
    template[..., 0] = constants
    packed = pack_weight(
        template.view(rows, columns), quant_type=quantization.quant_type, double_quant=quantization.double_quant
    )
    if quantization.double_quant:
        constants = round_trip_constants(constants.flatten()).view(rows, -1)
    step = constants.clamp(min=1e-30).repeat_interleave(BLOCK_SIZE, dim=1)  # (out, in)
    places = torch.empty(rows, columns, dtype=torch.int64, device=weight.device)
    for start in range(0, columns, MOST_COLUMNS):
        part = slice(start, min(start + MOST_COLUMNS, columns))
        if moment is None:
            places[:, part] = _nearest(weight[:, part] / step[:, part], values)
            continue
        square = _damped(moment, part)
        found = _round_columns(weight[:, part], step[:, part], values, square)
        places[:, part] = _descend(weight[:, part], step[:, part], values, square, found)
    codes = order[places].to(torch.uint8).view(-1, 2)
    packed[""] = (codes[:, 0] << 4 | codes[:, 1]).view(packed[""].shape)
    return packed, values[places] * constants.repeat_interleave(BLOCK_SIZE, dim=1)


def _nearest(scaled: Tensor, values: Tensor) -> Tensor:
    return torch.bucketize(scaled.contiguous(), (values[1:] + values[:-1]) / 2)


def _search_constants(weight: Tensor, values: Tensor, importance: Tensor) -> Tensor:
    """(out, blocks): of the constants tried, the one that leaves the least weighted error in its block."""
    blocked = weight.view(len(weight), -1, BLOCK_SIZE)
    weights = importance.view(-1, BLOCK_SIZE)
    largest = blocked.abs().amax(dim=-1)
    best, least = largest, torch.full_like(largest, torch.inf)
    for factor in SHRINKING:
        constants = (factor * largest).clamp(min=1e-30)[..., None]
        error = ((values[_nearest(blocked / constants, values)] * constants - blocked).square() * weights).sum(-1)
        better = error < least
        best, least = torch.where(better, factor * largest, best), torch.where(better, error, least)
    return best


def _damped(moment: SecondMoment, part: slice) -> Tensor:
    """The damped second moment of some columns, in units of the mean square of an input."""
    assert moment.inputs is not None and moment.squares is not None
    square = moment.inputs[part, part] / moment.squares.clamp(min=1e-30)
    return square + DAMPING * torch.eye(len(square), device=square.device)


def _round_columns(weight: Tensor, step: Tensor, values: Tensor, square: Tensor) -> Tensor:
    """Places of the values taken, (out, in), each column's error passed on by the moment."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(square))
    inverse = torch.linalg.cholesky(inverse, upper=True)
    left = weight.clone()
    places = torch.empty(weight.shape, dtype=torch.int64, device=weight.device)
    for start in range(0, weight.shape[1], COLUMNS):
        stop = min(start + COLUMNS, weight.shape[1])
        errors = torch.empty(len(weight), stop - start, device=weight.device)
        for column in range(start, stop):
            places[:, column] = _nearest(left[:, column] / step[:, column], values)
            taken = values[places[:, column]] * step[:, column]
            error = (left[:, column] - taken) / inverse[column, column]
            left[:, column:stop] -= error[:, None] * inverse[column, column:stop]
            errors[:, column - start] = error
        left[:, stop:] -= errors @ inverse[start:stop, stop:]
    return places


def _descend(weight: Tensor, step: Tensor, values: Tensor, square: Tensor, places: Tensor) -> Tensor:
    """Places after some sweeps in which each column takes what is best beside all others as they are."""
    taken = values[places] * step
    for _ in range(SWEEPS):
        pull = (
            weight - taken
        ) @ square  # half the negative gradient; of a sweep only columns still to come are kept up
        for start in range(0, weight.shape[1], COLUMNS):
            stop = min(start + COLUMNS, weight.shape[1])
            changes = torch.empty(len(weight), stop - start, device=weight.device)
            for column in range(start, stop):
                wanted = taken[:, column] + pull[:, column] / square[column, column]
                places[:, column] = _nearest(wanted / step[:, column], values)
                change = values[places[:, column]] * step[:, column] - taken[:, column]
                taken[:, column] += change
                pull[:, column:stop] -= change[:, None] * square[column, column:stop]
                changes[:, column - start] = change
            pull[:, stop:] -= changes @ square[start:stop, stop:]
    return places
