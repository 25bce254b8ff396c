"""Checks of the e4m3 kernels, run by test_triton.py: under Triton's interpreter on a CPU, for real on a GPU."""

import pytest
import torch

from qlora_cli.kernels import float8
from qlora_cli.kernels.triton import float8 as kernels
from tests.kernels.test_linear import quantise

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.each_choice


def relative(got, truth):
    return ((got.double() - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "chunk", "rows"), [((5, 96), 128, 1), ((3, 272), 64, 2), ((1, 16), 16, 4)])
def test_rows_are_the_nearest_codes(shape, chunk, rows, dtype):
    """Of every size, zero and subnormal in e4m3; held whole and read twice."""
    torch.manual_seed(0)
    x = (torch.randn(shape) * 10.0 ** torch.randint(-5, 5, shape)).to(DEVICE, dtype)
    x[0, :7] = 0
    x[-1] *= 0 if shape[0] > 3 else 1
    codes, scale = kernels.quantise_rows(x, float8.LEAST_ROW, rows=rows, chunk=chunk)
    expected, expected_scale = float8.quantise_rows(x.float().cpu())
    assert torch.equal(codes.cpu().float(), expected.float())
    assert torch.equal(scale.cpu(), expected_scale)
    # half a step, of a number with four bits or of the smallest ones, 2^-9 each
    exact = x.double()
    assert ((codes.double() * scale - exact).abs() <= exact.abs() / 16 + scale / 1000).all()


@pytest.mark.parametrize("widths", [(96, 32, 16), (40, 130, 7)])
def test_tensors_side_by_side_are_rounded_as_one(widths):
    """Of unlike sizes, the first within a larger one; rows of zeros in part, and not finite."""
    parts = [torch.randn(5, 2 * n, device=DEVICE)[:, n:] * 10.0**-i for i, n in enumerate(widths)]
    parts[0][1] = parts[1][2] = 0
    parts[2][3, 4] = float("nan")
    first, *more = parts[0], *(part.contiguous() for part in parts[1:])
    codes, scale = kernels.quantise_rows(first, float8.LEAST_ROW, beside=more)
    expected, expected_scale = kernels.quantise_rows(torch.cat(parts, 1), float8.LEAST_ROW)
    assert torch.equal(codes.view(torch.uint8), expected.view(torch.uint8)) and torch.equal(scale, expected_scale)


def test_what_is_not_finite_stays_so():
    x = torch.ones(3, 32, device=DEVICE)
    x[0, 3], x[1, 4] = float("nan"), float("inf")
    codes, scale = kernels.quantise_rows(x, float8.LEAST_ROW)
    values = codes.float() * scale
    assert values[:2].isnan().any(1).all() and torch.equal(values[2], x[2])


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize(("shape", "rows", "tile"), [((80, 128), (16, 80), (32, 64)), ((48, 208), (0, 48), None)])
def test_a_weight_is_unpacked_to_the_nearest_codes(shape, rows, tile, quant_type, nested, transposed):
    """Blocks that end inside a row; a part of the rows; tiles that reach over the edges."""
    weight, dense = quantise(shape, quant_type=quant_type, nested=nested, device=DEVICE)
    scale = float8.side_scales(weight)[transposed]
    size = (shape[1], rows[1] - rows[0]) if transposed else (rows[1] - rows[0], shape[1])
    out = torch.full(size, 0x7F, dtype=torch.uint8, device=DEVICE).view(torch.float8_e4m3fn)
    kernels.unpack(weight, scale, out, *rows, transposed=transposed, tile=tile)
    exact = dense[slice(*rows)]
    scale = scale[None] if transposed else scale[slice(*rows), None]
    found = out.t() if transposed else out
    assert ((found.double() * scale - exact.double()).abs() <= exact.double().abs() / 16 + scale / 1000).all()
    assert torch.equal(found.float(), (exact * scale.reciprocal()).to(torch.float8_e4m3fn).float())


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter has no products in 8 bits")
@pytest.mark.parametrize("tokens", [1, 17, 100, 4096])
def test_products_on_the_card_match_the_emulated_ones(tokens):
    weight, _ = quantise((1536, 1024), device=DEVICE)
    x = torch.randn(tokens, 1024, device=DEVICE, dtype=torch.bfloat16)
    grad = torch.randn(tokens, 1536, device=DEVICE, dtype=torch.bfloat16)
    for resident in (True, False):
        scaled = float8.with_codes(weight, resident=resident)
        here = float8.with_codes(
            weight._replace(**{k: v.cpu() for k, v in weight._asdict().items() if torch.is_tensor(v)}), resident=False
        )
        y, expected = x.new_empty(tokens, 1536), torch.empty(tokens, 1536)
        float8.multiply(x, scaled, y, None)
        float8.multiply(x.cpu(), here, expected, None)
        assert relative(y.cpu(), expected.double()) < 5e-3
        got = float8.multiply_transposed(grad, scaled, 2**19)
        truth = float8.multiply_transposed(grad.cpu().float(), here, None)
        assert relative(got.cpu(), truth.double()) < 8e-3


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter has no products in 8 bits")
@pytest.mark.parametrize("tokens", [1, 17, 67, 600])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_bias_on_the_card_is_added_to_the_product(tokens, dtype):
    """Of sums so long that the library has no kernel with a bias for few rows; of resident codes, and of parts of the rows."""
    weight, _ = quantise((1536, 9216), device=DEVICE)
    x, bias = torch.randn(tokens, 9216, device=DEVICE, dtype=dtype), torch.randn(1536, device=DEVICE, dtype=dtype) * 5
    for resident in (True, False):
        scaled, expected, out = float8.with_codes(weight, resident=resident), *x.new_empty(2, tokens, 1536).unbind()
        float8.multiply(x, scaled, expected, None)
        float8.multiply(x, scaled, out, 2**22, bias=bias)
        assert relative(out, expected.double() + bias) < 4e-3


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter has no products in 8 bits")
def test_products_on_the_card_of_joined_weights_and_their_parts():
    """Whose codes for the gradient lie within larger rows."""
    weights = [float8.with_codes(quantise((n, 512), device=DEVICE)[0], resident=True) for n in (1024, 256, 256)]
    whole, parts = float8.join(weights)
    first, *more = grads = [torch.randn(100, part.rows, device=DEVICE, dtype=torch.bfloat16) for part in parts]
    exact = [grad.double() @ part.values(torch.float32).double() for grad, part in zip(grads, parts, strict=True)]
    for grad, part, truth in zip(grads, parts, exact, strict=True):
        assert relative(float8.multiply_transposed(grad, part, None), truth) < 0.045
    together = first.new_empty(100, 512)
    float8.scaled_product(*float8.quantise_rows(first, more), whole.turned_codes, whole.column_scale, together)
    assert relative(together, sum(exact)) < 0.045
