"""Checks of the Triton kernels, run by test_triton.py: under Triton's interpreter on a CPU, for real on a GPU."""

import bitsandbytes.functional as bnb
import pytest
import torch

from qlora_cli.kernels import dropout, nf4, softmax
from qlora_cli.kernels.weights import FrozenWeight

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def quantise(shape, quant_type="nf4", nested=True, dtype=torch.float32):
    packed, state = bnb.quantize_4bit(
        torch.randn(shape, dtype=dtype, device=DEVICE), quant_type=quant_type, compress_statistics=nested
    )
    second = state.state2
    statistics = (second.absmax, second.code, state.offset) if nested else (None, None, None)
    weight = FrozenWeight(*shape, None, packed.flatten(), state.absmax, state.code, *statistics)
    return weight, bnb.dequantize_4bit(packed, state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(96, 128), (7, 33), (3, 4544)])
def test_dequantise_is_bit_equal_to_bitsandbytes(shape, quant_type, nested, dtype):
    weight, expected = quantise(shape, quant_type, nested, dtype)
    out = torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)
    nf4.dequantize_4bit(*weight[3:9], 64, 256, out, tile=256)
    if DEVICE == "cpu" and dtype == torch.bfloat16:  # the interpreter cuts to bfloat16 where the GPU rounds
        assert ((out.view(torch.int16).int() - expected.view(torch.int16).int()).abs() <= 1).all()
    else:
        assert torch.equal(out, expected)


def test_a_part_equals_the_same_part_of_the_whole():
    # 48 columns, so that rows begin inside blocks. (bitsandbytes' AVX512 code, 0.50.2, is wrong at such widths.)
    weight, _ = quantise((256, 48))
    whole, part = (torch.full((rows, 48), float("nan"), device=DEVICE) for rows in (256, 128))
    nf4.dequantize_4bit(*weight[3:9], 64, 256, whole)
    nf4.dequantize_4bit(*weight[3:9], 64, 256, part, first_element=128 * 48)
    assert torch.equal(part, whole[128:])


def test_a_part_inside_a_block_is_refused():
    weight, _ = quantise((4, 33))
    with pytest.raises(ValueError, match="inside a block"):
        nf4.dequantize_4bit(*weight[3:9], 64, 256, torch.empty(2, 33, device=DEVICE), first_element=33)


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
    x = torch.ones(40_000, device=DEVICE)
    seed = torch.tensor(2**40 + 1, device=DEVICE)
    dropped = dropout.drop(x, seed, 0.3)
    share = (dropped == 0).float().mean().item()
    assert abs(share - 0.3) < 4 * (0.3 * 0.7 / 40_000) ** 0.5
    assert torch.allclose(dropped[dropped != 0], torch.tensor(1 / 0.7, device=DEVICE))
    assert torch.equal(dropped, dropout.drop(x, seed, 0.3))
    assert not torch.equal(dropped, dropout.drop(x, seed + 1, 0.3))
    total = torch.full_like(x, 2.0)
    assert torch.allclose(dropout.drop(x, seed, 0.3, add_to=total), dropped + 2)
