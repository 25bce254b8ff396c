"""Checks of the Triton kernels, run by test_triton.py: under Triton's interpreter on a CPU, for real on a GPU."""

from functools import partial
from itertools import accumulate

import pytest
import torch

from qlora_cli.kernels import gated, ordered_rounding
from qlora_cli.kernels.triton import (
    block_attention,
    dropout,
    gated_tiles,
    low_rank,
    nf4,
    short_attention,
    softmax,
    thin_products,
)
from qlora_cli.kernels.triton import ordered_rounding as triton_rounding
from qlora_cli.kernels.weights import FrozenWeight
from tests.kernels import reference, test_linear

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.each_choice
quantise = partial(test_linear.quantise, device=DEVICE)

# The interpreter multiplies bfloat16's bits as if they were integers.
PRODUCT_DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize(("shape", "tile"), [((130, 128), 2048), ((7, 33), 256), ((3, 1088), 256)])
def test_dequantise_is_bit_equal_to_bitsandbytes(shape, tile, quant_type, nested, dtype):
    """260 blocks, two nested ones; an odd number of values; rows of 17 blocks, and no whole number of tiles."""
    weight, expected = quantise(shape, quant_type=quant_type, nested=nested, dtype=dtype)
    out = torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)
    nf4.dequantize_4bit(weight, out, tile=tile)
    if DEVICE == "cpu" and dtype == torch.bfloat16:  # the interpreter cuts to bfloat16 where the GPU rounds
        bits = [(values + 0.0).view(torch.int16).int() for values in (out, expected)]  # with one zero: fp4 has two
        assert ((bits[0] - bits[1]).abs() <= 1).all()
    else:
        assert torch.equal(out, expected)


def test_a_part_equals_the_same_part_of_the_whole():
    # 48 columns, so that rows begin inside blocks. (bitsandbytes' AVX512 code, 0.50.2, is wrong at such widths.)
    weight, _ = quantise((256, 48))
    whole, part = (torch.full((rows, 48), float("nan"), device=DEVICE) for rows in (256, 128))
    nf4.dequantize_4bit(weight, whole)
    nf4.dequantize_4bit(weight, part, first_element=128 * 48)
    assert torch.equal(part, whole[128:])


def test_stacked_weights_keep_offsets_of_their_own():
    weights = [quantise((64, 256)) for _ in range(2)]
    parts = [weight for weight, _ in weights]
    offsets = torch.cat([part.offset.expand(part.nested_absmax.numel()) for part in parts])
    assert offsets.unique().numel() == 2
    together = [torch.cat([getattr(part, name) for part in parts]) for name in ("packed", "absmax", "nested_absmax")]
    packed, absmax, nested_absmax = together
    stacked = FrozenWeight(128, 256, None, packed, absmax, parts[0].code, nested_absmax, parts[0].nested_code, offsets)
    out = torch.full((128, 256), float("nan"), device=DEVICE)
    nf4.dequantize_4bit(stacked, out)
    assert torch.equal(out, torch.cat([expected for _, expected in weights]))
    assert torch.equal(stacked.values(torch.float32), out)


def test_a_part_inside_a_block_is_refused():
    weight, _ = quantise((4, 33))
    with pytest.raises(ValueError, match="inside a block"):
        nf4.dequantize_4bit(weight, torch.empty(2, 33, device=DEVICE), first_element=33)


@pytest.mark.parametrize(("vocabulary", "scale", "softcap"), [(100, 1.0, None), (5000, 0.25, None), (300, 1.5, 5.0)])
def test_loss_and_gradient_match_float64(vocabulary, scale, softcap):
    logits = torch.randn(9, vocabulary, device=DEVICE) * 4
    targets = torch.randint(vocabulary, (9,), device=DEVICE)
    targets[4] = -100  # counts nothing
    gradient = logits.clone()
    losses = softmax.loss_and_gradient_(gradient, targets, scale, softcap)
    exact = logits.double().requires_grad_()
    final = exact * scale if softcap is None else softcap * torch.tanh(exact * scale / softcap)
    true_losses = torch.nn.functional.cross_entropy(final, targets, reduction="none")
    (true_gradient,) = torch.autograd.grad(true_losses.sum(), exact)
    assert torch.allclose(losses.double(), true_losses, atol=1e-5, rtol=1e-5)
    assert torch.allclose(gradient.double(), true_gradient, atol=1e-6, rtol=1e-5)


def test_dropout_drops_its_share_repeats_with_the_seed_and_differs_by_layer():
    x = torch.ones(40_001, device=DEVICE)
    seed = torch.tensor(2**40 + 1, device=DEVICE)
    dropped = dropout.drop(x, seed, 0.3)
    share = (dropped == 0).float().mean().item()
    assert abs(share - 0.3) < 4 * (0.3 * 0.7 / 40_001) ** 0.5
    assert torch.allclose(dropped[dropped != 0], torch.tensor(1 / 0.7, device=DEVICE))
    assert torch.equal(dropped, dropout.drop(x, seed, 0.3))
    assert not torch.equal(dropped, dropout.drop(x, seed + 1, 0.3))
    one, other = (dropped[:-1].view(-1, 4)[:, place] == 0 for place in (0, 3))  # of one draw
    assert abs((one & other).float().mean().item() - 0.09) < 0.02


def test_a_tile_of_the_rows_drops_what_the_whole_drops():
    x, seed = torch.randn(200, 36, device=DEVICE), torch.tensor(2**40 + 1, device=DEVICE)
    left, right = torch.randn(200, 8, device=DEVICE), torch.randn(8, 36, device=DEVICE)
    whole, product = dropout.drop(x, seed, 0.3), low_rank.add_product(x.clone(), left, right, seed, 0.3)
    for rows in (slice(0, 128), slice(128, 200)):
        assert torch.equal(dropout.drop(x[rows], seed, 0.3, rows.start), whole[rows])
        found = low_rank.add_product(x[rows].clone(), left[rows], right, seed, 0.3, first_row=rows.start)
        assert torch.equal(found, product[rows])


@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize("rank", [1, 20, 64])
@pytest.mark.parametrize("dtype", PRODUCT_DTYPES)
def test_a_low_rank_product_is_added_with_one_rounding_where_dropout_keeps_it(dtype, rank, rate):
    rows, columns = 70, 132
    out, left = (torch.randn(rows, n, device=DEVICE).to(dtype) for n in (columns, rank))
    seed = torch.tensor(2**40 + 1, device=DEVICE) if rate else None
    kept = dropout.drop(torch.ones_like(out), seed, rate).ne(0) if rate else torch.ones_like(out).bool()
    for right in (torch.randn(rank, columns, device=DEVICE), torch.randn(columns, rank, device=DEVICE).t()):
        right = right.to(dtype)
        assert low_rank.covers(out, left, right, rate)
        exact = out.double() + torch.where(kept, left.double() @ right.double() / (1 - rate), 0)
        found = low_rank.add_product(out.clone(), left, right, seed, rate)
        rounding = torch.finfo(dtype).eps / 2 * exact.abs()
        assert ((found.double() - exact).abs() <= rounding + 2e-6 * (1 + rank)).all()


@pytest.mark.parametrize("dtype", PRODUCT_DTYPES)
def test_a_low_rank_product_is_scaled_and_added_to_some_columns(dtype):
    whole, left, right = (torch.randn(shape, device=DEVICE).to(dtype) for shape in ((70, 300), (70, 24), (132, 8)))
    scaling = torch.tensor([0.25, 0.7], device=DEVICE)
    found = whole.clone()
    low_rank.add_product(found[:, 64:196], left[:, 8:16], right.t(), scale=scaling[1])
    exact = whole.double()
    exact[:, 64:196] += scaling[1].double() * (left[:, 8:16].double() @ right.double().t())
    rounding = torch.finfo(dtype).eps / 2 * exact.abs()
    assert ((found.double() - exact).abs() <= rounding + 2e-5).all()
    apart = whole.new_empty(70, 132)  # the sum by itself
    low_rank.add_product(apart, left[:, 8:16], right.t(), scale=scaling[1], base=whole[:, 64:196])
    assert torch.equal(apart, found[:, 64:196])


def test_a_low_rank_product_leaves_to_others_what_it_does_not_cover():
    out, left, right = (torch.zeros(shape, device=DEVICE) for shape in ((6, 30), (6, 4), (4, 30)))
    assert low_rank.covers(out, left, right)
    assert not low_rank.covers(out, left, right, 0.1)  # groups of 4 values would span two rows
    assert not low_rank.covers(out, left.half(), right)
    assert not low_rank.covers(out[:, ::2], left, right[:, ::2])
    assert not low_rank.covers(out, left.new_zeros(6, 65), right.new_zeros(65, 30))


@pytest.mark.parametrize("lengths", [(1, 40, 0, 33), (100, 64, 128, 0)])
@pytest.mark.parametrize("size", [8, 24])
def test_short_rows_attend_as_in_float64(lengths, size):
    boundaries, scale = [0, *accumulate(lengths)], 0.3
    exact = [torch.randn(sum(lengths), 2, size, device=DEVICE, dtype=torch.float64) for _ in range(4)]
    query, key, value = (t.requires_grad_() for t in exact[:3])
    expected = reference.packed_attention(query, key, value, boundaries, scale, None)
    gradients = torch.autograd.grad(expected, (query, key, value), exact[3])
    inputs, grad = [t.detach().float() for t in exact[:3]], exact[3].float()
    ends = torch.tensor(boundaries, dtype=torch.int32, device=DEVICE)
    assert short_attention.covers(*inputs, 128, None)
    out, lse = short_attention.attend(*inputs, ends, 128, scale)
    found = short_attention.attend_backward(grad, *inputs, out, lse, ends, 128, scale)
    for got, true in zip((out, *found), (expected, *gradients), strict=True):
        assert (got - true).norm() <= 2e-6 * true.norm()


@pytest.mark.parametrize(
    ("lengths", "heads", "key_heads", "size", "window"), [((40, 0, 35, 9), 8, 2, 24, None), ((50, 33), 3, 1, 64, 20)]
)
@pytest.mark.parametrize("cap", [3.0, None])
def test_rows_in_blocks_attend_as_in_float64(lengths, heads, key_heads, size, window, cap, monkeypatch):
    if DEVICE == "cpu":  # blocks that a small case has several of
        monkeypatch.setattr(block_attention, "BLOCKS" if cap else "SHORT_BLOCKS", ((32, 16, 1),))
    dtype = torch.float32 if DEVICE == "cpu" else torch.bfloat16
    torch.manual_seed(0)
    boundaries = [0, *accumulate(lengths)]
    shapes = [(sum(lengths), count, size) for count in (heads, key_heads, key_heads, heads)]
    *inputs, grad = (torch.randn(shape, device=DEVICE).to(dtype) for shape in shapes)
    ends = torch.tensor(boundaries, dtype=torch.int32, device=DEVICE)
    given = (ends, max(lengths), 0.5, window, cap)
    out, lse = block_attention.attend(*inputs, *given)
    found = block_attention.attend_backward(grad, *inputs, out, lse, *given)
    leaves = [t.double().requires_grad_() for t in inputs]
    exact = reference.packed_attention(*leaves, boundaries, 0.5, window, cap=cap)
    wanted = torch.autograd.grad(exact, leaves, grad.double())
    for ours, right in zip((out, *found), (exact, *wanted), strict=True):
        assert (ours.double() - right).norm() <= (1e-5 if DEVICE == "cpu" else 1e-2) * right.norm()


def test_short_attention_leaves_to_others_what_it_does_not_cover():
    query, fewer, narrow = torch.zeros(300, 4, 64), torch.zeros(300, 2, 64), torch.zeros(300, 4, 32)
    wide, strided = torch.zeros(9, 4, 256), torch.zeros(4, 300, 64).transpose(0, 1)
    assert short_attention.covers(query, query, query, 128, None)
    assert short_attention.covers(query, query, query, 100, 100)
    for tensors, longest, window in (
        ((query, fewer, fewer), 128, None),
        ((query, query, narrow), 128, None),
        ((query, query, strided), 128, None),
        ((wide, wide, wide), 128, None),
        ((query, query, query), 129, None),
        ((query, query, query), 128, 50),
    ):
        assert not short_attention.covers(*tensors, longest, window)


@pytest.mark.parametrize("kind", gated.GATES)
@pytest.mark.parametrize(("tokens", "size", "rank"), [(5, 40, 1), (70, 132, 20), (33, 128, 64)])
@pytest.mark.parametrize("dtype", PRODUCT_DTYPES)
def test_gated_products_are_those_of_float64_rounded_once(dtype, tokens, size, rank, kind):
    gate, up, grad = (torch.randn(tokens, size, device=DEVICE).to(dtype) for _ in range(3))
    lefts = torch.randn(tokens, 2 * rank, device=DEVICE).to(dtype).split(rank, dim=1)
    rights = [torch.randn(size, rank, device=DEVICE).to(dtype) for _ in range(2)]
    arguments = (gate, up), lefts, rights
    assert gated_tiles.covers(*arguments)
    products = [t.double().requires_grad_() for t in (gate, up)]
    sums = [p + left.double() @ right.double().t() for p, left, right in zip(products, lefts, rights, strict=True)]
    exact = gated.activate(sums[0], kind) * sums[1]
    expected = exact, *torch.autograd.grad(exact, products, grad.double())
    found = gated_tiles.gate_products(*arguments, kind), *gated_tiles.gate_products_backward(grad, *arguments, kind)
    for got, true in zip(found, expected, strict=True):
        rounding = torch.finfo(dtype).eps / 2 * true.abs()
        assert ((got.double() - true).abs() <= rounding + 4e-6 * (1 + rank) * (1 + true.abs())).all()


def test_the_fused_gate_leaves_to_others_what_it_does_not_cover():
    gate, left, right = (torch.zeros(shape, device=DEVICE) for shape in ((6, 30), (6, 4), (30, 4)))

    def covers(product, left, right):
        return gated_tiles.covers((product, product), (left, left), (right, right))

    assert covers(gate, left, right)
    assert not covers(gate[:, ::2], left, right[::2])
    assert not gated_tiles.covers((gate, gate), (left.half(), left), (right, right))
    assert not gated_tiles.covers((gate, gate), (left, left), (right, right.t().contiguous().t()))
    assert not covers(gate, left.new_zeros(6, 65), torch.zeros(30, 65, device=DEVICE))


# Rows of two programs and no whole number of tiles; 10 parts, more than are added up at once; on a card its own tiles.
THIN = [
    (512, 70, 1, (64, 256)),
    (600, 300, 20, (256, 32)),
    pytest.param(530, 520, 32, (32, 512), marks=pytest.mark.slow),
]
THIN += [(2048, 70, 1, None), (2100, 300, 20, None), (2050, 8200, 32, None)] * (DEVICE == "cuda")


@pytest.mark.parametrize(("rows", "columns", "rank", "tile"), THIN)
@pytest.mark.parametrize("dtype", PRODUCT_DTYPES[1:])
def test_both_thin_products_of_one_pass_are_those_of_float64(dtype, rows, columns, rank, tile):
    big, right = (torch.randn(shape, device=DEVICE).to(dtype) for shape in ((rows, columns), (columns, rank)))
    left = torch.randn(rows, 2 * rank, device=DEVICE).to(dtype)[:, rank:]
    assert tile or thin_products.covers(big, right, left)
    found = thin_products.multiply_both(big, right, left, 0.5, torch.float32, tile=tile)
    again = thin_products.multiply_both(big, right, left, 0.5, torch.float32, tile=tile)
    exact = 0.5 * big.double() @ right.double(), big.double().t() @ left.double()
    assert (found[0].dtype, found[1].dtype) == (dtype, torch.float32)
    for got, repeated, true, error in zip(found, again, exact, (torch.finfo(dtype).eps / 2, 2e-6), strict=True):
        assert torch.equal(got, repeated)
        assert (got.double() - true).norm() <= error * true.norm()
        assert torch.allclose(got.double(), true, rtol=torch.finfo(got.dtype).eps, atol=2e-4 * columns**0.5)


def test_thin_products_leave_to_others_what_they_do_not_cover():
    big, right, left = (torch.zeros(shape, dtype=torch.bfloat16) for shape in ((2048, 64), (64, 8), (2048, 8)))
    assert thin_products.covers(big, right, left)
    assert not thin_products.covers(big[:2047], right, left[:2047])
    assert not thin_products.covers(big.float(), right.float(), left.float())
    assert not thin_products.covers(big, right.t().contiguous().t(), left)
    assert not thin_products.covers(big, right.new_zeros(64, 33), left.new_zeros(2048, 33))


@pytest.mark.parametrize(("columns", "rows"), [(20, 40), (7, 3), pytest.param(128, 100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("standing", [False, True])
def test_each_column_takes_the_value_nearest_to_what_it_wants_after_those_before_it(columns, rows, standing):
    """Of both forms, against what they say of themselves, in float64: a rounding apart, later columns may differ."""
    values = (torch.linspace(-1, 1, 16) ** 3).to(DEVICE)
    wanted, steps = torch.randn(columns, rows, device=DEVICE), torch.rand(columns, rows, device=DEVICE) + 0.5
    given = (0.2 * torch.randn(columns, columns, device=DEVICE)).tril(-1)
    before = values[torch.randint(16, (columns, rows), device=DEVICE)] * steps if standing else None
    for fused in (True, False):
        parts = [part if fused or part is None else part.cpu() for part in (wanted, given, steps, values, before)]
        places = torch.full((columns, rows), -1, device=parts[0].device)
        borders = ordered_rounding.borders_between(parts[3])
        if fused:
            changes = triton_rounding.round_block(*parts[:4], borders, places, parts[4])
        else:
            changes = ordered_rounding.round_in_order(parts[0].clone(), *parts[1:4], places, parts[4])
        change, exact = changes.double(), [None if part is None else part.double() for part in parts]
        left, taken = exact[0] - exact[1] @ change, exact[3][places]
        was = left if exact[4] is None else exact[4]
        wish = (left if exact[4] is None else left + was) / exact[2]
        assert ((wish - taken).abs() <= (wish[..., None] - exact[3]).abs().amin(-1) + 1e-5).all()
        torch.testing.assert_close(change, taken * exact[2] - was, rtol=0, atol=1e-5)
