"""Experts in 4 bits on a GPU: grouped products against float64, by all experts at once and by groups of a few."""

from functools import partial

import pytest
import torch

from qlora_cli.core.adapters.lora import attach_adapter
from qlora_cli.core.bnb import bitsandbytes as bnb
from qlora_cli.core.engine.engine import install_engine
from qlora_cli.core.experts import grouped_product
from qlora_cli.core.experts.four_bit_experts import ExpertLora, FourBitExperts, pack_experts
from qlora_cli.core.experts.layout import expert_weights
from qlora_cli.core.experts.stack import pack_matrices, pack_matrix
from qlora_cli.core.matmul.choice import ProductTrial
from qlora_cli.core.models.files import resolve_model
from qlora_cli.core.models.loading import load_base
from qlora_cli.settings.groups import LoraSettings, QuantizationSettings, StepSettings
from tests.engine.test_engine import batch_of
from tests.engine.test_engine_gpu import CUDA, steps
from tests.experts.expert_modules import make_experts, write_expert_model

pytestmark = pytest.mark.gpu
TOKENS = 300
LENGTHS = (40, 33, 57)  # of rows: more than 24 for each of 5 experts, of which a token meets 2


@pytest.mark.parametrize("shape", [(5, 96, 64), (5, 128, 128), (3, 1536, 2048)])
@pytest.mark.parametrize("double_quant", [True, False])
def test_matrices_packed_together_have_the_bits_of_each_by_itself(shape, double_quant):
    matrices, held = torch.randn(shape).bfloat16().cuda(), {"quant_type": "nf4", "double_quant": double_quant}
    alone = zip(*(pack_matrix(matrix, **held) for matrix in matrices), strict=True)
    for found, parts in zip(pack_matrices(matrices, **held), alone, strict=True):
        assert parts[0] is None if found is None else torch.equal(found, torch.cat(parts))


@pytest.mark.parametrize("matmul", ["bf16", "fp8"])
def test_experts_that_stay_unpacked_give_the_same_step(tmp_path, matmul):
    write_expert_model("qwen3_moe", tmp_path / "model", num_hidden_layers=2)
    held = {"compute_dtype": torch.bfloat16, "device": CUDA}
    base, *_ = load_base(resolve_model(str(tmp_path / "model")), QuantizationSettings(base_cache=False), **held)
    lora = LoraSettings(rank=4, alpha=8, adapt_experts=True, target_modules=("q_proj",))
    model, found = attach_adapter(base, lora, seed=0).train(), []
    options = {"gradient_checkpointing": "off", "compile": False, "matmul": matmul}
    for resident in (False, True):
        engine = install_engine(
            model,
            StepSettings(**options, resident_weights=resident),
            **held,
            max_tokens=sum(LENGTHS),
            total_steps=100,
            trial=ProductTrial(batch=batch_of(LENGTHS)),
            report=lambda event: None,
        )
        assert engine.plan.unpacked_experts == 2 * resident
        assert len(engine.stacks.in_8_bits) == (4 if matmul == "fp8" else 0)
        found.append(steps(model, engine, [batch_of(LENGTHS)] * 3))
        engine.close()
        assert not any(module.unpacked for module in model.modules() if isinstance(module, FourBitExperts))
    (losses, gradients), (own_losses, own_gradients) = found
    assert torch.equal(losses, own_losses)
    assert (gradients - own_gradients).norm() <= 3e-2 * own_gradients.norm()  # as two equal passes: sums of attention


@pytest.mark.parametrize("workspace_bytes", [2**31, 3 * 96 * 64 * 2, 1])
@pytest.mark.parametrize("layout", ["qwen3_moe", "gpt_oss"])
def test_grouped_products_are_as_exact_as_eager_ones(layout, workspace_bytes, monkeypatch):
    monkeypatch.setattr(grouped_product.workspace, "limit_bytes", workspace_bytes)
    reference = make_experts(layout)
    packed = make_experts(layout).bfloat16().cuda()
    stacks = {w.name: w.as_matrix(getattr(packed, w.name).data) for w in expert_weights(packed)}
    held = {"quant_type": "nf4", "double_quant": True}
    packed = pack_experts(packed, compute_dtype=torch.bfloat16, device=torch.device("cuda"), **held)
    generator = torch.Generator().manual_seed(0)
    for weight in packed.expert_weights:
        for number, matrix in enumerate(stacks[weight.name]):
            packed.put_experts(weight.name, number, pack_matrix(matrix, **held))
            codes, state = bnb.functional.quantize_4bit(
                matrix.contiguous(), **{"quant_type": "nf4", "compress_statistics": True}
            )
            assert torch.equal(packed.dequantized(weight.name, number), bnb.functional.dequantize_4bit(codes, state))
        a = torch.randn(weight.experts * 8, weight.columns, generator=generator) * 0.1
        b = torch.randn(weight.rows, 8 * weight.experts, generator=generator) * 0.1
        packed.lora[weight.name] = partial(ExpertLora, a.cuda().requires_grad_(), b.cuda().requires_grad_(), 0.5)
        exact = ExpertLora(a.double(), b.double(), 0.5)
        values = [
            packed.dequantized(weight.name, e).cpu().double() + exact.delta(weight, e) for e in range(weight.experts)
        ]
        getattr(reference, weight.name).data = weight.as_matrix(torch.stack(values)).contiguous()
        if weight.bias:
            getattr(reference, weight.bias).data = getattr(packed, weight.bias).data.cpu().double()
    index = torch.rand(TOKENS, 4, generator=generator).argsort(dim=1)[:, :2]
    weights = torch.rand(TOKENS, 2, generator=generator)
    x = torch.randn(TOKENS, 64, generator=generator).bfloat16()
    exact_x = x.double().requires_grad_()
    x = x.cuda().requires_grad_()
    expected = reference(exact_x, index, weights.double())
    found = packed(x, index.cuda(), weights.cuda())
    expected.sum().backward()
    found.float().sum().backward()
    for got, wanted in ((found, expected), (x.grad, exact_x.grad)):
        difference = (got.detach().cpu().double() - wanted.detach()).norm() / wanted.detach().norm()
        assert difference < 0.02
