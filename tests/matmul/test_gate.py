"""The gate of products in 8 bits: what 4 bits do is expected right, and a layer that 8 bits do more to stays in bf16."""

import pytest
import torch
from torch import nn

from qlora_cli.core.bnb import bitsandbytes
from qlora_cli.core.matmul.gate import expected_error, measure_products
from qlora_cli.kernels.weights import FrozenWeight


def quantised(values, quant_type="nf4", *, nested=True):
    packed, state = bitsandbytes.functional.quantize_4bit(values, quant_type=quant_type, compress_statistics=nested)
    return FrozenWeight.of_state(state, packed.flatten()), bitsandbytes.functional.dequantize_4bit(packed, state)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize(
    "draw", [torch.randn, torch.rand, lambda *shape: torch.distributions.Laplace(0, 1).sample(shape)]
)
def test_what_rounding_to_4_bits_does_is_expected_within_a_sixth(draw, quant_type, transposed):
    """For weights of several kinds, and inputs with outlying channels."""
    torch.manual_seed(0)
    values = draw(256, 384) * 0.02
    weight, rounded = quantised(values, quant_type)
    rows = torch.randn(64, 256 if transposed else 384)
    rows[:, ::50] *= 20
    lost = (values - rounded).double()
    error = (rows.double() @ (lost if transposed else lost.t())).norm()
    assert float(expected_error(rows, weight, transposed=transposed)) == pytest.approx(float(error), rel=0.17)


class Layer(nn.Module):
    """x W^T by the packed weight."""

    def __init__(self, values):
        super().__init__()
        self.packed, self.values = quantised(values, nested=False)
        self.offset = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return x @ self.values.t() + self.offset


def errors_of(values, x, grad):
    layer = Layer(values)
    found = measure_products({layer: layer.packed}, lambda: layer(x).backward(grad))
    return found[layer]


def test_an_ordinary_layer_loses_a_third_to_half_of_what_4_bits_took():
    torch.manual_seed(0)
    errors = errors_of(torch.randn(128, 192), torch.randn(700, 192), torch.randn(700, 128))
    assert 0.25 < errors.output < 0.5 and 0.25 < errors.gradient < 0.5


def test_weights_too_small_for_their_rows_scale_are_found():
    """One block of 100,000 times the others' size, at inputs that are zero: all that counts rounds to zero in 8 bits."""
    torch.manual_seed(0)
    values, x = torch.randn(128, 192), torch.randn(40, 192)
    values[:, :64] *= 1e5
    x[:, :64] = 0
    errors = errors_of(values, x, torch.randn(40, 128))
    assert errors.output > 2 > errors.gradient and errors.worst == errors.output


def test_what_is_not_finite_does_not_pass():
    x = torch.randn(40, 192)
    x[3, 4] = float("nan")
    assert errors_of(torch.randn(128, 192), x, torch.randn(40, 128)).worst == float("inf")


def test_rows_without_a_gradient_count_as_exact():
    assert errors_of(torch.randn(128, 192), torch.randn(40, 192), torch.zeros(40, 128)).gradient == 0


def test_a_layer_before_all_that_is_trained_is_judged_by_its_outputs():
    """As the first layer's MLP where attention alone is adapted: no gradient of its input is ever computed."""
    torch.manual_seed(0)
    layer = Layer(torch.randn(128, 192)).requires_grad_(False)
    found = measure_products({layer: layer.packed}, lambda: layer(torch.randn(40, 192)))
    assert 0.25 < found[layer].output < 0.5 and found[layer].gradient == 0
