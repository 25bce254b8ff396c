"""The fused QLoRA linear computes what its formula says, forward and backward, and keeps nothing it need not."""

import pytest
import torch

from qlora_cli.core.bnb import bitsandbytes
from qlora_cli.kernels import linear, lora_products
from qlora_cli.kernels.weights import FrozenWeight
from tests.kernels import reference

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def quantise(shape, *, nested=True, quant_type="nf4", dtype=torch.float32, device="cpu"):
    values = torch.randn(shape, dtype=dtype, device=device)
    packed, state = bitsandbytes.functional.quantize_4bit(values, quant_type=quant_type, compress_statistics=nested)
    weight = FrozenWeight.of_state(state, packed.flatten())
    state.shape = torch.Size([1, values.numel()])  # on some processors rows of other than whole blocks begin new ones
    return weight, bitsandbytes.functional.dequantize_4bit(packed, state).view(shape)


def relative(got, truth):
    return ((got.double() - truth).norm() / truth.norm()).item()


@pytest.mark.each_choice
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize("workspace_bytes", [None, 128 * 64 * 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_against_float64_is_within_twice_eager_own(dtype, workspace_bytes, rate, compiled, device):
    torch.manual_seed(0)
    weight, dense = quantise((384, 64), device=device)
    x = torch.randn(2, 21, 64, dtype=dtype, device=device, requires_grad=True)
    a = torch.randn(8, 64, device=device, requires_grad=True)
    b = torch.randn(384, 8, device=device, requires_grad=True)
    bias = torch.randn(384, dtype=dtype, device=device)
    dropout = linear.Dropout(rate, torch.tensor(5, device=device)) if rate else None
    mask = lora_products.drop(torch.ones(42, 64, device=device), dropout).view(2, 21, 64) if dropout else 1.0
    options = linear.LinearOptions(0.5, workspace_bytes)

    def op():
        lora = a.detach().to(dtype), b.detach().to(dtype)
        return linear.qlora_linear(x, weight, bias, a, b, *lora, dropout, options)

    y = torch.compile(op, backend="aot_eager", fullgraph=True)() if compiled else op()
    grad = torch.randn_like(y)
    y.backward(grad)

    def formula(kind):
        leaves = [t.detach().to(kind).requires_grad_() for t in (x, a, b)]
        dropped = leaves[0] * (mask.to(kind) if dropout else 1)
        out = reference.qlora_linear(leaves[0], dense.to(kind), bias.to(kind), *leaves[1:], 0.5, dropped)
        out.backward(grad.to(kind))
        return out, *(leaf.grad for leaf in leaves)

    truth, eager = formula(torch.float64), formula(dtype)
    for got, by_eager, exact in zip((y, x.grad, a.grad, b.grad), eager, truth, strict=True):
        assert relative(got, exact) <= 2 * relative(by_eager, exact) + 1e-7
    assert a.grad.dtype == b.grad.dtype == torch.float32


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_reference_dequantise_is_bit_equal_to_bitsandbytes(quant_type, nested, dtype):
    weight, expected = quantise((33, 50), nested=nested, quant_type=quant_type, dtype=dtype)
    assert torch.equal(weight.values(dtype), expected)


@pytest.mark.parametrize("compiled", [False, True])
def test_nothing_is_saved_but_input_projection_and_packed_weight(compiled):
    weight, _ = quantise((1024, 64))
    x = torch.randn(16, 64, requires_grad=True)
    a, b = torch.randn(4, 64, requires_grad=True), torch.randn(1024, 4, requires_grad=True)
    saved = []

    def op(x):
        return linear.qlora_linear(x, weight, None, a, b, a.detach(), b.detach(), None, linear.LinearOptions(1.0))

    call = torch.compile(op, backend="aot_eager") if compiled else op
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        call(x)
    assert any(t.dtype == torch.uint8 and t.numel() == 1024 * 32 for t in saved), "the packed weight has to be saved"
    floats = [t for t in saved if t.is_floating_point()]
    assert max(t.numel() for t in floats) <= b.numel(), "an output or a dequantised weight was kept"


def test_a_layer_without_an_adapter_saves_no_activation():
    weight, dense = quantise((32, 64))
    x = torch.randn(5, 64, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = linear.qlora_linear(x, weight, None, None, None, None, None, None, linear.LinearOptions())
    y.sum().backward()
    assert not any(t.shape == x.shape for t in saved)
    assert torch.allclose(x.grad, dense.sum(0).expand_as(x), atol=1e-5)
