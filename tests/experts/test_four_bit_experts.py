"""Experts in 4 bits: their values are bitsandbytes' own, their answers and gradients those of the model's own class."""

from functools import partial

import pytest
import torch

from qlora_cli.core.bnb import bitsandbytes as bnb
from qlora_cli.core.experts import grouped_product
from qlora_cli.core.experts.four_bit_experts import ExpertLora
from qlora_cli.core.experts.layout import expert_weights
from qlora_cli.kernels.experts import operands
from tests.experts.expert_modules import make_experts, pack

TOKENS, CHOICES, RANK = 13, 2, 3


def call(experts, x):
    """An answer for x (tokens, 64), whatever the class takes; tokens choose experts 0 to 3, none the last."""
    generator = torch.Generator().manual_seed(5)
    if type(experts).__name__.endswith("Llama4TextExperts"):
        return experts(x.repeat(5, 1))
    index = torch.rand(TOKENS, 4, generator=generator).argsort(dim=1)[:, :CHOICES]
    weights = torch.rand(TOKENS, CHOICES, generator=generator).to(x.dtype)
    return experts(x, index, weights)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("layout", "quant_type"), [("qwen3_moe", "nf4"), ("gpt_oss", "fp4")])
def test_values_of_each_expert_are_bitsandbytes_own(layout, quant_type, dtype, double_quant):
    experts = make_experts(layout)
    original = {w.name: w.as_matrix(getattr(experts, w.name).data).to(dtype) for w in expert_weights(experts)}
    packed = pack(experts, dtype, quant_type=quant_type, double_quant=double_quant)
    for name, stack in original.items():
        for number, matrix in enumerate(stack):
            codes, state = bnb.functional.quantize_4bit(
                matrix.reshape(1, -1), quant_type=quant_type, compress_statistics=double_quant, blocksize=64
            )
            expected = bnb.functional.dequantize_4bit(codes, state).view(matrix.shape)
            assert torch.equal(packed.dequantized(name, number), expected)


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("layout", ["qwen3_moe", "gpt_oss", "llama4", "nemotron_h"])
def test_answer_and_gradients_are_those_of_the_models_own_class(layout, adapted):
    packed, reference = pack(make_experts(layout), torch.float32), make_experts(layout)
    generator = torch.Generator().manual_seed(3)
    lora, loras = {}, []
    for weight in packed.expert_weights:
        matrices = torch.stack([packed.dequantized(weight.name, e) for e in range(weight.experts)]).double()
        if adapted:
            out, into = (weight.columns, weight.rows) if weight.adapter_swapped else (weight.rows, weight.columns)
            a = torch.randn(weight.experts * RANK, into, generator=generator, dtype=torch.float64) * 0.1
            b = torch.randn(out, RANK * weight.experts, generator=generator, dtype=torch.float64) * 0.1
            lora[weight.name] = ExpertLora(a.requires_grad_(), b.requires_grad_(), 0.5)
            leaves = [t.detach().float().requires_grad_() for t in (a, b)]
            packed.lora[weight.name] = partial(ExpertLora, *leaves, 0.5)
            loras.append(((a, b), leaves))
            matrices = matrices + torch.stack([lora[weight.name].delta(weight, e) for e in range(weight.experts)])
        del reference._parameters[weight.name]
        setattr(reference, weight.name, weight.as_matrix(matrices))
        if weight.bias:
            getattr(reference, weight.bias).data = getattr(packed, weight.bias).data.double()
    x64 = torch.randn(TOKENS, 64, generator=generator, dtype=torch.float64).requires_grad_()
    x32 = x64.detach().float().requires_grad_()
    expected, found = call(reference, x64), call(packed, x32)
    upstream = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    expected.backward(upstream)
    found.backward(upstream.float())
    torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(x32.grad.double(), x64.grad, rtol=2e-5, atol=2e-5)
    for exact, single in loras:
        for wanted, got in zip(exact, single, strict=True):
            torch.testing.assert_close(got.grad.double(), wanted.grad, rtol=2e-5, atol=5e-5)


def test_adapter_is_packed_as_peft_packs_it():
    from peft import LoraConfig, get_peft_model

    for layout in ("qwen3_moe", "gpt_oss", "llama4"):
        experts = make_experts(layout)
        holder = torch.nn.Module()
        holder.experts = experts
        names = [weight.name for weight in expert_weights(experts)]
        before = {name: getattr(experts, name).detach().clone() for name in names}
        weights = {weight.name: weight for weight in expert_weights(experts)}
        config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_parameters=[f"experts.{n}" for n in names])
        config.target_modules = []
        config.init_lora_weights = False
        model = get_peft_model(holder, config)
        wrappers = [module for module in model.modules() if hasattr(module, "parameter_name")]
        found = {w.parameter_name: (w.lora_A["default"].weight, w.lora_B["default"].weight) for w in wrappers}
        merged = model.merge_and_unload()
        for name, (a, b) in found.items():
            lora = ExpertLora(a.detach().double(), b.detach().double(), 2.0)
            for number in range(5):
                delta = weights[name].as_matrix(getattr(merged.experts, name).data - before[name])[number]
                torch.testing.assert_close(delta, lora.delta(weights[name], number), rtol=1e-5, atol=1e-6)


def test_a_packed_module_keeps_nothing_in_16_bits_for_the_backward_pass():
    packed = pack(make_experts("qwen3_moe"), torch.bfloat16)
    saved = []

    def note(tensor):
        saved.append((tensor.dtype, tuple(tensor.shape)))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        call(packed, torch.randn(TOKENS, 64, dtype=torch.bfloat16, requires_grad=True))
    largest = max(torch.Size(shape).numel() for dtype, shape in saved if dtype == torch.bfloat16)
    assert largest <= TOKENS * CHOICES * 96  # activations; one expert alone has 96 * 64 weights


def test_where_the_device_holds_no_more_fewer_experts_are_dequantised_at_once(monkeypatch):
    experts = pack(make_experts("qwen3_moe"), torch.float32)
    stack = experts.stack("down_proj")
    x = torch.randn(40, stack.layout.columns, generator=torch.Generator().manual_seed(0))
    _, _, routing = grouped_product.route(torch.arange(40) % 5, 5)
    plain = grouped_product.packed_product(x, stack, routing)
    asked = []

    def grouped(x, matrices, ends):
        asked.append(len(matrices))
        if len(matrices) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        starts = [0, *ends.tolist()]
        return torch.cat([x[a:b] @ m for a, b, m in zip(starts, starts[1:], matrices, strict=False)])

    monkeypatch.setattr(grouped_product, "takes_grouped_mm", lambda x, *sizes: True)
    monkeypatch.setattr(grouped_product, "grouped_mm", grouped)
    workspace = operands.Workspace()
    monkeypatch.setattr(grouped_product, "workspace", workspace)
    assert workspace.news() is None
    for _ in range(2):
        torch.testing.assert_close(grouped_product.packed_product(x, stack, routing), plain)
    assert asked == [5, 2, 2, 1, 2, 2, 1]  # found out once
    assert "Memory ran out while experts were unpacked" in workspace.news()
    assert workspace.news() is None  # and said once


def test_a_module_of_three_stacks_computes_otherwise_and_stays_as_it_is():
    """As inkling's shared experts, to which all tokens go."""
    experts = make_experts("qwen3_moe")
    assert len(expert_weights(experts)) == 2
    experts.gate_proj = torch.nn.Parameter(torch.zeros_like(experts.down_proj))
    assert expert_weights(experts) == ()
