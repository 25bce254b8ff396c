"""Checks of the kernels of experts, run by test_triton.py: under Triton's interpreter on a CPU, for real on a GPU."""

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from qlora_cli.core.experts.four_bit_experts import ExpertLora
from qlora_cli.core.experts.fused_experts import find_gate, fuse_experts
from qlora_cli.kernels import float8
from qlora_cli.kernels.experts import grouped, operands, products
from qlora_cli.kernels.experts.lanes import LaneTiling, multiply_lanes, takes_lanes
from qlora_cli.kernels.experts.products import Tiling, multiply_packed
from qlora_cli.kernels.experts.routing import route
from qlora_cli.kernels.weights import FrozenWeight
from tests.experts.expert_modules import make_experts, pack

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.each_choice


@pytest.mark.parametrize(("tokens", "choices", "experts"), [(1, 2, 5), (150, 4, 7)])
def test_pairs_are_sorted_by_expert_stably(tokens, choices, experts):
    ids = torch.randint(experts + 1, (tokens, choices), device=DEVICE)  # one more: of no expert
    found = route(ids, experts)
    ordered, source = torch.sort(ids.flatten(), stable=True)
    assert torch.equal(found.expert.long(), ordered)
    assert torch.equal(found.source.long(), source)
    assert torch.equal(found.source[found.back.long()].long(), torch.arange(ids.numel(), device=DEVICE))
    assert found.ends.tolist() == [int((ids < e + 1).sum()) for e in range(experts)]


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("double_quant", [True, False])
def test_values_unpacked_on_the_way_are_the_dequantised_ones(double_quant, backward):
    experts = pack(make_experts("mixtral").float(), torch.float32, double_quant=double_quant).to(DEVICE)
    weight = experts.expert_weights[0]
    values = torch.stack([experts.dequantized(weight.name, e) for e in range(weight.experts)])  # (experts, out, in)
    width = weight.rows if backward else weight.columns
    rows = torch.eye(width, device=DEVICE).repeat(2, 1)  # products with these are the values themselves
    ends = torch.tensor([0, width, width, width, 2 * width], device=DEVICE, dtype=torch.int32)
    tiling = Tiling(64, 64, 64, 4, 2)
    found = multiply_packed(
        rows, experts.stack(weight.name).values, weight.columns, ends, backward=backward, tiling=tiling
    )
    expected = (values if backward else values.transpose(1, 2))[[1, 4]]
    assert torch.equal(found.view(expected.shape), expected)


@pytest.mark.parametrize("tiling", [LaneTiling(2, 2, 4), LaneTiling(1, 1, 4, ahead=True)])
def test_few_rows_by_lanes_are_the_exact_product(tiling, monkeypatch):
    """More rows of an expert than a unit has, none, and some of no expert."""
    if DEVICE == "cpu":
        from tests.kernels.lane_emulation import emulate

        emulate(monkeypatch)
    experts = pack(make_experts("mixtral").float(), torch.float16).to(DEVICE)
    weight = experts.expert_weights[1]
    ids = torch.tensor([0] * 9 + [2, 3, 5])[torch.randperm(12)].view(4, 3).to(DEVICE)
    routing = route(ids, weight.experts)
    x = torch.randn(4, weight.columns, device=DEVICE).half()
    given = {"source": routing.source, "choices": 3, "tiling": tiling}
    assert takes_lanes(x)
    found = multiply_lanes(x, experts.stack(weight.name).values, weight.columns, routing.ends, **given)
    for place in range(11):
        matrix = experts.dequantized(weight.name, int(routing.expert[place])).double()
        expected = matrix @ x[int(routing.source[place]) // 3].double()
        assert (found[place].double() - expected).norm() < 1e-3 * expected.norm()


def tensors(experts, adapted, dtype):
    """Inputs of a call that want gradients: some of the tokens' experts are none."""
    generator = torch.Generator().manual_seed(1)
    count = experts.expert_weights[0].experts
    x = torch.randn(7, 64, generator=generator, dtype=dtype)
    index = torch.rand(7, count, generator=generator).argsort(dim=1)[:, :2]
    index[3, 1] = count
    weights = torch.rand(7, 2, generator=generator, dtype=dtype)
    weights[3, 1] = 0
    found = [x.to(DEVICE).requires_grad_(), weights.to(DEVICE).requires_grad_()]
    for weight in experts.expert_weights if adapted else ():
        rows, columns = (weight.columns, weight.rows) if weight.adapter_swapped else (weight.rows, weight.columns)
        a = torch.randn(count * 3, columns, generator=generator) * 0.1
        b = torch.randn(rows, 3 * count, generator=generator) * 0.1
        found += [a.to(DEVICE).requires_grad_(), b.to(DEVICE).requires_grad_()]
        experts.lora[weight.name] = partial(ExpertLora, found[-2], found[-1], 0.5)
    return found, index.to(DEVICE)


@pytest.mark.parametrize(
    ("layout", "adapted", "how"),
    [
        ("qwen3_moe", True, "packed"),
        ("gpt_oss", True, "a few at a time"),
        ("gpt_oss", False, "8 bits"),
        pytest.param("qwen3_moe", True, "8 bits", marks=pytest.mark.slow),
        pytest.param("qwen3_moe", False, "a few at a time", marks=pytest.mark.slow),
        pytest.param("gpt_oss", False, "packed", marks=pytest.mark.slow),
        pytest.param("llama4", True, "a few at a time", marks=pytest.mark.slow),
        pytest.param("nemotron_h", True, "packed", marks=pytest.mark.slow),
    ],
)
def test_fused_experts_are_the_plain_ones(layout, adapted, how, monkeypatch):
    if how != "packed":
        monkeypatch.setattr(operands, "FEW_ROWS", -1)
        monkeypatch.setattr(products, "SMALL", Tiling(32, 64, 64, 4, 2, last_rows=16))
        monkeypatch.setattr(grouped.workspace, "limit_bytes", 3 * 64 * 128 * 4)
    experts = pack(make_experts(layout).float(), torch.float32).to(DEVICE)
    for weight in experts.expert_weights if how == "8 bits" else ():
        scaled = float8.with_stack_scale(experts.stack(weight.name).values, weight.experts)
        experts.scales[weight.name] = scaled.stack_scale
    leaves, index = tensors(experts, adapted, torch.float32)
    x, weights = leaves[:2]
    given = (x,) if layout == "llama4" else (x, index, weights)
    if layout == "llama4":  # rows of each expert in turn
        leaves[0] = x = torch.randn(10, 64, device=DEVICE).requires_grad_()
        del leaves[1]
        given = (x,)
    expected = experts(*given)
    slope = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, leaves, slope)
    put_back = fuse_experts(experts)

    def run():
        found = checkpoint(experts, *given, use_reentrant=False)  # as a recomputed layer calls them
        return found.detach(), *torch.autograd.grad(found, leaves, slope)

    found, *got = run()
    if how != "packed":  # as it stays unpacked, to the bit, until it is let go
        experts.fused.stay_unpacked(wanted=True)
        assert set(experts.unpacked) == {weight.name for weight in experts.expert_weights}
        monkeypatch.setattr(grouped, "unpack_stack", None)
        monkeypatch.setattr(FrozenWeight, "_plain_values", None)  # of a CPU
        for mine, own in zip(run(), (found, *got), strict=True):
            assert torch.equal(mine.nan_to_num(0.0), own.nan_to_num(0.0))
        experts.fused.stay_unpacked(wanted=False)
        assert not experts.unpacked
    put_back()
    for mine, own in zip((found, *got), (expected, *wanted), strict=True):
        mine, own = mine.nan_to_num(0.0), own.nan_to_num(0.0)
        apart = 2e-5
        if how == "8 bits":  # whose sums tensor cores keep in fewer bits
            # The gradient of routing weights is <W^T g, h>, not <g, W h>: another product, rounded otherwise.
            apart = 0.1 if own.shape == weights.shape else 5e-3 if DEVICE == "cuda" else apart
        assert (mine - own).norm() <= apart * own.norm()


def test_gates_are_found_by_trying_them_out():
    found = {name: find_gate(pack(make_experts(name).float(), torch.float32)) for name in ("qwen3_moe", "gpt_oss")}
    assert found["qwen3_moe"].kind == "silu" and not found["qwen3_moe"].interleaved
    assert found["gpt_oss"].limit == 7.0 and found["gpt_oss"].interleaved and found["gpt_oss"].shift == 1.0
    assert find_gate(pack(make_experts("nemotron_h").float(), torch.float32)) is None


@pytest.mark.slow
@pytest.mark.skipif(DEVICE != "cpu", reason="two processes under the interpreter")
def test_two_ranks_read_the_stack_that_they_gathered(zygote):
    """Forward and backward, bit for bit: a shard is not there any more when the backward pass begins, and is gathered anew."""
    outcome = zygote.run("tests.experts.test_sharded_experts:run", fused=True)
    assert outcome.code == 0, outcome.said
