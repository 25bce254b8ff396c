"""Checks of products of experts in e4m3, run by test_triton.py: under Triton's interpreter on a CPU, for real on a GPU."""

import pytest
import torch

from qlora_cli.kernels import float8
from qlora_cli.kernels.experts import codes, grouped, layer, operands, products, rows
from qlora_cli.kernels.experts import float8 as tiles
from qlora_cli.kernels.experts.operands import Gate, Lora, Update
from qlora_cli.kernels.experts.products import Tiling
from qlora_cli.kernels.experts.routing import route
from tests.kernels.test_linear import quantise, relative

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
# On a card sums keep 14 bits in the tensor core and are rounded to bfloat16.
ROUNDED = 5e-3 if DEVICE == "cuda" else 1e-5
EXPERTS, ROWS, COLUMNS = 5, 80, 128
pytestmark = pytest.mark.each_choice


def make_stack(**how):
    """A stack in which an expert's values are a thousand times another's, and what its codes are, (experts, out, in)."""
    weight, _ = quantise((EXPERTS * ROWS, COLUMNS), nested=False, device=DEVICE, **how)
    factors = torch.tensor([1.0, 1e-3, 1.0, 3.0, 1.0], device=DEVICE)
    weight = weight._replace(absmax=weight.absmax * factors.repeat_interleave(len(weight.absmax) // EXPERTS))
    scaled = float8.with_stack_scale(weight, EXPERTS)
    exact = scaled.values(torch.float32).view(EXPERTS, ROWS, COLUMNS)
    return scaled, exact, (exact * scaled.stack_scale.reciprocal()[:, None, None]).to(torch.float8_e4m3fn)


def make_routing(tokens=60):
    """One expert has most rows, one has none, and one of the tokens' choices is no expert."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, EXPERTS, (tokens, 2), generator=generator)
    ids[:50, 0], ids[3, 1] = 2, EXPERTS
    return route(ids.to(DEVICE), EXPERTS)


@pytest.mark.parametrize("by_table", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_codes_of_a_stack_are_the_nearest_ones(quant_type, transposed, by_table, monkeypatch):
    """Of all experts and of some, in tiles that reach over the edges."""
    if by_table and DEVICE == "cpu":
        from tests.kernels.lane_emulation import emulate

        emulate(monkeypatch)
    weight, _, wanted = make_stack(quant_type=quant_type)
    for first, some, tile in ((0, EXPERTS, (64, 2) if transposed else (128,)), (1, 2, None)):
        found = codes.unpack_stack(
            weight, EXPERTS, first, some, transposed=transposed, by_table=by_table, tile=tile if by_table else None
        )
        expected = wanted[first : first + some]
        assert torch.equal(found.float(), (expected.transpose(1, 2) if transposed else expected).float())


@pytest.mark.parametrize("transposed", [True, False])
def test_scales_in_8_bits_are_read_as_they_are_elsewhere(transposed, monkeypatch):
    if DEVICE == "cpu":
        from tests.kernels.lane_emulation import emulate

        emulate(monkeypatch)
    weight, dense = quantise((2 * 64, 256), nested=True, device=DEVICE)
    scaled = float8.with_stack_scale(weight, 2)
    exact = dense.view(2, 64, 256)
    assert torch.equal(scaled.stack_scale, exact.abs().amax((1, 2)) / 448)
    expected = (exact * scaled.stack_scale.reciprocal()[:, None, None]).to(torch.float8_e4m3fn)
    found = codes.unpack_stack(scaled, 2, 0, 2, transposed=transposed, by_table=True)
    assert torch.equal(found.float(), (expected.transpose(1, 2) if transposed else expected).float())


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("adapted", [True, False])
@pytest.mark.parametrize("at_once", [EXPERTS, 2])
def test_product_is_that_of_the_codes(backward, gathered, adapted, at_once, monkeypatch):
    """Tiles of an expert's last rows, a row of zeros, small rows beside large ones, and what is left in the last step."""
    monkeypatch.setattr(operands, "FEW_ROWS", -1)
    monkeypatch.setattr(grouped.workspace, "limit_bytes", at_once * ROWS * COLUMNS)
    monkeypatch.setattr(tiles, "SMALL", Tiling(32, 64, 64, 4, 2, last_rows=16))
    torch.manual_seed(1)
    weight, exact, wanted = make_stack()
    routing = make_routing()
    pairs, used = len(routing.source), int(routing.ends[-1])
    inner, wide = (ROWS, COLUMNS) if backward else (COLUMNS, ROWS)
    x = torch.randn(pairs // 2 if gathered else pairs, inner, device=DEVICE, dtype=DTYPE)
    x[4], x[5] = 0, x[5] * 1e-6
    update = None
    if adapted:
        second = torch.randn(EXPERTS, 3, wide, device=DEVICE)
        update = Update(torch.randn(pairs, 3, device=DEVICE, dtype=DTYPE), second)
    given = {"backward": backward, "gathered": routing if gathered else None, "update": update}
    found = grouped.multiply(x, weight, routing.ends, **given)[:used]
    places = routing.source[:used].long() // 2 if gathered else torch.arange(used, device=DEVICE)
    expert = routing.expert[:used].long()
    whole = float8.quantise_rows(x)
    own = (whole[0].double() * whole[1])[places], wanted.double() * weight.stack_scale[:, None, None]
    for (left, right), limit in ((own, ROUNDED), ((x.double()[places], exact.double()), 0.05)):
        truth = torch.einsum("ri,rio->ro", left, (right if backward else right.transpose(1, 2))[expert])
        if update is not None:
            truth += torch.einsum("rk,rko->ro", update.projected[:used].double(), second.double()[expert])
        error = (found.double() - truth).norm(dim=1)
        assert (error <= 2 * limit * truth.norm(dim=1)).all() and error.norm() <= limit * truth.norm()


def test_a_row_that_is_not_finite_spoils_its_own_alone(monkeypatch):
    monkeypatch.setattr(operands, "FEW_ROWS", -1)
    weight, _, _ = make_stack()
    routing = make_routing()
    x = torch.ones(60, COLUMNS, device=DEVICE, dtype=DTYPE)
    x[7, 3] = float("nan")
    update = Update(torch.ones(120, 3, device=DEVICE, dtype=DTYPE), torch.ones(EXPERTS, 3, ROWS, device=DEVICE))
    found = grouped.multiply(x, weight, routing.ends, gathered=routing, update=update)[: int(routing.ends[-1])]
    spoilt = routing.source[: len(found)] // 2 == 7
    assert found[spoilt].isnan().all() and found[~spoilt].isfinite().all()


@pytest.mark.parametrize("size", [48, 80])
@pytest.mark.parametrize("keep", [True, False])
def test_gated_rows_are_rounded_as_by_themselves(keep, size, monkeypatch):
    monkeypatch.setattr(rows, "LARGEST_ROUNDED", 64)
    routing = make_routing(5)
    given = torch.randn(len(routing.source), 2 * size, device=DEVICE, dtype=DTYPE)
    expected, _ = rows.gate(given, routing, Gate("silu"))
    gated, (found, scale) = rows.gate(given, routing, Gate("silu"), keep=keep, rounded=True)
    wanted, wanted_scale = float8.quantise_rows(expected)
    assert torch.equal(found.float(), wanted.float()) and torch.equal(scale, wanted_scale)
    assert torch.equal(gated, expected) if keep or size > 64 else gated is None


def test_few_rows_are_multiplied_in_their_own_dtype():
    weight, _, _ = make_stack()
    routing = route(torch.tensor([[2, 1]], device=DEVICE), EXPERTS)
    x = torch.randn(1, COLUMNS, device=DEVICE, dtype=DTYPE)
    both = (grouped.multiply(x, each, routing.ends, gathered=routing) for each in (weight, weight.plain()))
    assert torch.equal(*both)


def test_a_layer_in_8_bits_is_near_the_one_in_its_own_dtype(monkeypatch):
    """Forward and backward, with what is gated between; the ops' fakes say the same shapes."""
    monkeypatch.setattr(operands, "FEW_ROWS", -1)
    monkeypatch.setattr(products, "SMALL", Tiling(32, 64, 64, 4, 2))
    torch.manual_seed(2)
    up, down = (quantise(shape, device=DEVICE)[0] for shape in ((3 * 64, 64), (3 * 64, 32)))
    routing = route(torch.randint(0, 3, (20, 2), device=DEVICE), 3)
    leaves = [torch.randn(20, 64, device=DEVICE, dtype=DTYPE), torch.rand(20, 2, device=DEVICE, dtype=DTYPE)]
    for shape in ((3, 4, 64), (3, 4, 64), (3, 4, 32), (3, 4, 64)):
        leaves.append(0.1 * torch.randn(shape, device=DEVICE, dtype=DTYPE))
    leaves = [leaf.requires_grad_() for leaf in leaves]
    x, weights, *lora = leaves

    def run(first, second):
        given = layer.up(x, routing, first, Lora(lora[0], lora[1], 0.5))
        y = layer.down(given, weights, routing, second, Lora(lora[2], lora[3], 0.5), how=Gate("silu"))
        return y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y))

    scaled = [float8.with_stack_scale(each, 3) for each in (up, down)]
    for mine, own in zip(run(*scaled), run(up, down), strict=True):
        assert 1e-3 < relative(mine, own.double()) < 0.08
    parts = layer._parts(scaled[0], 3)
    given = (x.detach(), *routing, lora[0].detach(), lora[1].detach(), 0.5, *parts)
    torch.library.opcheck(torch.ops.qlora.experts_up.default, given, test_utils="test_faketensor")
