"""Gate of products in 8 bits: what rounding to e4m3 does to a linear layer's output and to its input's gradient, on real
rows, beside what rounding its weight to 4 bits did already.

The weight before its rounding is not there any more. What that rounding did is expected by the codes: a value is taken
to lie anywhere between the midpoints to the neighbouring codes (Bennett's model of quantisation noise, Bell System
Technical Journal 27, 1948), errors to be independent of each other and of what they are multiplied by. For normal weights that is right within a few
per cent, for the cubes of normal ones a third too much.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlora_cli.kernels import float8
from qlora_cli.kernels.weights import FrozenWeight

MOST_ROWS = 512  # tokens of a layer that are compared
SLICE_BYTES = 2**26  # of fp32 values at once


@dataclass(frozen=True)
class ProductErrors:
    """Error of a linear layer in 8 bits, as a multiple of the one expected of its 4 bits."""

    output: float
    gradient: float  # of its input

    @property
    def worst(self) -> float:
        """The larger one; infinite where one is NaN."""
        return max(math.inf if math.isnan(each) else each for each in (self.output, self.gradient))


def code_noise(code: Tensor) -> Tensor:
    """Standard deviation of values around each code of a 4-bit type, (16,), where the largest value of a block is 1.

    Evenly spread between the midpoints a and b to its neighbours, around a code c: ((b - c)^3 + (c - a)^3) / (3 (b - a)).
    The outermost codes have values on their inner side only.
    """
    levels = code.double().unique()  # sorted; fp4 has two zeros
    middles = (levels[1:] + levels[:-1]) / 2
    low, high = torch.cat([levels[:1], middles]), torch.cat([middles, levels[-1:]])
    variance = ((high - levels) ** 3 + (levels - low) ** 3) / (3 * (high - low))
    return variance.sqrt()[torch.searchsorted(levels, code.double())].to(code.dtype)


def expected_error(rows: Tensor, weight: FrozenWeight, *, transposed: bool = False) -> Tensor:
    """Norm of what rounding a packed weight W to 4 bits is expected to have changed in rows W^T, or in rows W.

    Args:
        rows: (count, in), or (count, out) where `transposed`.
    """
    assert weight.code is not None
    energy = rows.float().square().sum(0)
    noise = weight._replace(code=code_noise(weight.code))
    total = energy.new_zeros(())
    for first, end in weight.row_slices(SLICE_BYTES, 4):
        variance = noise.values(torch.float32, first, end).square()  # (slice, in)
        total += energy[first:end] @ variance.sum(1) if transposed else variance.sum(0) @ energy
    return total.sqrt()


def _error(rows: Tensor, weight: FrozenWeight, *, transposed: bool) -> Tensor:
    """Norm of the error of rows W^T, or of rows W, in 8 bits, over `expected_error`."""
    scaled = float8.with_codes(weight, resident=False)
    if transposed:
        found = float8.multiply_transposed(rows, scaled, SLICE_BYTES).float()
    else:
        found = rows.new_empty(len(rows), weight.rows)
        float8.multiply(rows, scaled, found, SLICE_BYTES)
        found = found.float()
    for first, end in weight.row_slices(SLICE_BYTES, 4):
        values = weight.values(torch.float32, first, end)
        if transposed:
            found.addmm_(rows[:, first:end].float(), values, alpha=-1)
        else:
            found[:, first:end].addmm_(rows.float(), values.t(), alpha=-1)
    return over_expected(found.norm(), expected_error(rows, weight, transposed=transposed))


def over_expected(error: Tensor, expected: Tensor) -> Tensor:
    """Errors as multiples of what was to be expected; where both are 0, 0."""
    return torch.where((error == 0) & (expected == 0), 0.0, error / expected)


def _sample(values: Tensor) -> Tensor:
    """Some rows of (..., size), evenly from all."""
    flat = values.detach().reshape(-1, values.shape[-1])
    return flat[:: -(-len(flat) // MOST_ROWS)].contiguous()


def measure_products(
    weights: Mapping[nn.Module, FrozenWeight], run: Callable[[], Any]
) -> dict[nn.Module, ProductErrors]:
    """Errors of linear layers in 8 bits while `run` runs them forward and backward, in whatever arithmetic.

    Args:
        weights: The packed weight of each.

    Returns:
        Those that `run` called, and brought a gradient to if their outputs need one; else that of the gradient is 0.
    """
    outputs: dict[nn.Module, Tensor] = {}
    gradients: dict[nn.Module, Tensor] = {}

    def note(module: nn.Module, args: tuple, output: Tensor) -> None:
        with torch.no_grad():
            outputs[module] = _error(_sample(args[0]), weights[module], transposed=False)

        def note_gradient(gradient: Tensor) -> None:
            with torch.no_grad():
                gradients[module] = _error(_sample(gradient), weights[module], transposed=True)

        if output.requires_grad:
            output.register_hook(note_gradient)
        else:  # as the first layer's MLP where only attention is adapted: nothing before it is trained
            gradients.setdefault(module, outputs[module].new_zeros(()))

    hooks = [module.register_forward_hook(note) for module in weights]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return read_errors(outputs, gradients)


def read_errors(outputs: Mapping[Any, Tensor], gradients: Mapping[Any, Tensor]) -> dict[Any, ProductErrors]:
    """The errors of what has both, waiting for the device once."""
    measured = [key for key in outputs if key in gradients]
    found = torch.stack([torch.stack([outputs[k], gradients[k]]) for k in measured]).tolist() if measured else []
    return {key: ProductErrors(*errors) for key, errors in zip(measured, found, strict=True)}
