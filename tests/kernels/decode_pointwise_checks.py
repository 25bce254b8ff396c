"""Checks of the small decoding kernels, run by test_triton.py: by the interpreter on a CPU, for real on a GPU."""

import pytest
import torch
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.gpt_neox import modeling_gpt_neox
from transformers.models.llama import modeling_llama

from qlora_cli.kernels.decode.pointwise import add_and_rms_norm, gate, layer_norm, rms_norm, rotate
from qlora_cli.kernels.decode.routing import choose_experts
from qlora_cli.kernels.gated import GATES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.each_choice
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
MANY = [(1, 37), (5, 8), pytest.param(3, 24, marks=pytest.mark.slow)] + (
    [(1, 8192), (64, 128), (7, 1001)] if DEVICE == "cuda" else []
)  # rows, tokens


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [modeling_llama.LlamaRMSNorm, Gemma2RMSNorm])
def test_normalises_as_the_module_does(kind, dtype):
    module = kind(200, eps=1e-5).to(DEVICE, dtype)
    module.weight.data.normal_(1, 0.3)
    x = (3 * torch.randn(3, 2, 200, device=DEVICE)).to(dtype)
    gemma = kind is Gemma2RMSNorm
    found = rms_norm(x, module.weight.data, 1e-5, offset=float(gemma), round_first=not gemma)
    torch.testing.assert_close(found, module(x), atol=1e-6 if dtype == torch.float32 else 1e-3, rtol=2e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("offset", "round_first"), [(0.0, True), (1.0, False)])
def test_a_sum_and_its_norm_are_those_of_two_launches(offset, round_first, dtype):
    x, y = torch.randn(2, 3, 200, device=DEVICE).to(dtype)
    weight = torch.randn(200, device=DEVICE).to(dtype)
    total, normed = add_and_rms_norm(x, y, weight, 1e-5, offset=offset, round_first=round_first)
    assert torch.equal(total, x + y)
    assert torch.equal(normed, rms_norm(total, weight, 1e-5, offset=offset, round_first=round_first))


def test_norms_of_heads_read_them_where_they_are_in_wider_rows():
    wide = torch.randn(3, 500, device=DEVICE)
    heads = wide[:, 60:260].reshape(3, 1, 200).view(3, 1, 4, 50)
    assert heads.untyped_storage().data_ptr() == wide.untyped_storage().data_ptr()
    weight = torch.rand(50, device=DEVICE)
    expected = torch.nn.functional.rms_norm(heads, (50,), weight, 1e-5)
    for x in (heads, heads.transpose(0, 2)):  # the latter has no two strides
        found = rms_norm(x, weight, 1e-5)
        torch.testing.assert_close(found, expected if x is heads else expected.transpose(0, 2), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_centres_as_the_module_does(bias, dtype):
    module = torch.nn.LayerNorm(200, eps=1e-5, bias=bias).to(DEVICE, dtype)
    for parameter in module.parameters():
        parameter.data.normal_(1, 0.3)
    x = (3 * torch.randn(3, 2, 200, device=DEVICE) + 20).to(dtype)  # far from 0, where a one-pass variance cancels
    found = layer_norm(x, module.weight.data, module.bias if bias else None, 1e-5)
    torch.testing.assert_close(found, module(x), atol=5e-6 if dtype == torch.float32 else 5e-3, rtol=2e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("module", [modeling_llama, modeling_gpt_neox])
def test_rotates_as_the_function_does(module, dtype):
    whole = torch.randn(3, 2, 6, 40, device=DEVICE).to(dtype)  # (rows, tokens, heads, size), as a projection leaves it
    query, key = whole[:, :, :4].transpose(1, 2), whole[:, :, 4:].transpose(1, 2)
    rotated = 40 if module is modeling_llama else 16
    angles = torch.randn(3, 2, rotated // 2, device=DEVICE).repeat(1, 1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    expected = module.apply_rotary_pos_emb(query, key, cos, sin)
    exact = module.apply_rotary_pos_emb(*(t.double() for t in (query, key, cos, sin)))
    for found, wanted, truth in zip(rotate(query, key, cos, sin), expected, exact, strict=True):
        assert (found - truth).norm() <= 1.5 * (wanted - truth).norm() + 1e-7 * truth.norm()
    one = rotate(query[:1], key[:1], cos[:1], sin[:1])
    same = rotate(query[:1].expand(2, -1, -1, -1), key[:1].expand(2, -1, -1, -1), cos[:1], sin[:1])
    assert torch.equal(same[0][1:], one[0]) and torch.equal(same[1][:1], one[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", GATES)
def test_gates_as_torch_does(kind, dtype):
    whole = (3 * torch.randn(3, 1, 2600, device=DEVICE)).to(dtype)
    x, y = whole[..., :1300], whole[..., 1300:]
    functional = torch.nn.functional
    own = {
        "silu": functional.silu,
        "gelu": functional.gelu,
        "gelu_tanh": lambda value: functional.gelu(value, approximate="tanh"),
    }
    found = gate(x, y, kind)
    assert found.is_contiguous()
    torch.testing.assert_close(found, own[kind](x) * y, atol=2e-6 if dtype == torch.float32 else 2e-3, rtol=2e-3)


# ---------------------------------------------------------------- prompts


@pytest.mark.parametrize(("rows", "tokens"), MANY)
def test_norms_hold_for_prompts(rows, tokens):
    x = 3 * torch.randn(rows, tokens, 6, 40, device=DEVICE)  # as heads that are normalised one by one
    weight, bias = torch.randn(2, 40, device=DEVICE)
    plain = torch.nn.functional.rms_norm(x, (40,), weight, 1e-5)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), plain, atol=5e-6, rtol=1e-5)
    part = x.flatten(2)[..., 80:200]  # of a stacked product
    weight, bias = torch.randn(2, 120, device=DEVICE)
    plain = torch.nn.functional.layer_norm(part, (120,), weight, bias, 1e-5)
    torch.testing.assert_close(layer_norm(part, weight, bias, 1e-5), plain, atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("own_angles", [True, False])
@pytest.mark.parametrize(("rows", "tokens"), MANY)
def test_rotation_holds_for_prompts(rows, tokens, own_angles):
    whole = torch.randn(rows, tokens, 5, 24, device=DEVICE)
    query, key = whole[:, :, 1:4].transpose(1, 2), whole[:, :, 4:].transpose(1, 2)
    angles = torch.randn(rows if own_angles else 1, tokens, 12, device=DEVICE).repeat(1, 1, 2)
    expected = modeling_llama.apply_rotary_pos_emb(query, key, angles.cos(), angles.sin())
    for found, wanted in zip(rotate(query, key, angles.cos(), angles.sin()), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(("rows", "tokens"), MANY)
def test_gates_hold_for_prompts(rows, tokens):
    whole = 3 * torch.randn(rows, tokens, 300, device=DEVICE)
    x, y = whole[..., :150], whole[..., 150:]
    torch.testing.assert_close(gate(x, y, "silu"), torch.nn.functional.silu(x) * y, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize(("tokens", "experts", "choices"), [(3, 128, 8), (2, 5, 2)])
def test_experts_are_chosen_as_torch_chooses_them(tokens, experts, choices, normalised):
    logits = torch.randn(tokens, experts, device=DEVICE)
    scores, indices = choose_experts(logits, choices, normalised=normalised)
    shares = logits.double().softmax(1)
    expected, own = shares.topk(choices, dim=1)
    expected = expected / expected.sum(1, keepdim=True) if normalised else expected
    assert torch.equal(indices, own)
    assert (scores - expected).abs().max() < 1e-6
