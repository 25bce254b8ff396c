"""4-bit weights: what is computed with, and what quantising and dequantising gives, are the same bits."""

import pytest
import torch
from safetensors.torch import load_file

from qlora_cli.core.models.quantization import (
    dequantized_weight,
    four_bit_linears,
    round_trip,
)


@pytest.mark.parametrize("architecture", ["falcon", "gpt2", "llama"])
def test_4bit_logits_are_those_of_the_dequantised_weights(load_tiny, tiny_model, architecture):
    from transformers import AutoModelForCausalLM

    base, _ = load_tiny(architecture)
    plain = AutoModelForCausalLM.from_pretrained(tiny_model(architecture), dtype=torch.float32).eval()
    for name, module in four_bit_linears(base):
        weight = dequantized_weight(module)
        target = plain.get_submodule(name)
        transposed = type(target).__name__ == "Conv1D"
        target.weight.data = weight.T.contiguous() if transposed else weight
    ids = torch.arange(5, 25)[None]
    torch.testing.assert_close(base(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_round_trip_is_bitwise_what_the_loaded_base_computes_with(load_tiny, tiny_model, quant_type, double_quant):
    base, _ = load_tiny("gpt_neox", quant_type=quant_type, double_quant=double_quant)
    weights = load_file(tiny_model("gpt_neox") / "model.safetensors")
    for name, module in four_bit_linears(base):
        again = round_trip(weights[f"{name}.weight"], quant_type=quant_type, double_quant=double_quant)
        assert torch.equal(again, dequantized_weight(module))


def test_an_evaluation_in_between_leaves_the_packed_weights_alone(load_tiny):
    base, _ = load_tiny("llama")
    before = {name: dequantized_weight(module).clone() for name, module in four_bit_linears(base)}
    with torch.no_grad():
        base.eval()(torch.arange(5, 15)[None])
    for name, module in four_bit_linears(base):
        assert torch.equal(before[name], dequantized_weight(module))


@pytest.mark.parametrize("width", [48, 50, 64, 96, 4544])
def test_a_round_trip_is_close_at_any_width(width):
    weight = torch.randn(8, width, generator=torch.Generator().manual_seed(0))
    again = round_trip(weight, quant_type="nf4", double_quant=True)
    assert again.shape == weight.shape
    assert (again - weight).abs().mean() < 0.1  # NF4 of a normal weight: 0.073
