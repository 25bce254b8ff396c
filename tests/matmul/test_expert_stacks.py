"""Stacks of experts in 8 bits: measured expert by expert, chosen, kept by a run, and near what the compute dtype gives."""

import json
import math
from dataclasses import asdict

import pytest
import torch

from qlora_cli.core.adapters.lora import attach_adapter
from qlora_cli.core.engine.decoder_layers import find_layers
from qlora_cli.core.experts.four_bit_experts import FourBitExperts
from qlora_cli.core.experts.fused_experts import FusedExperts, fuse_experts
from qlora_cli.core.experts.grouped_product import Routing
from qlora_cli.core.experts.stack import bytes_at_once, part_of
from qlora_cli.core.matmul.choice import ProductTrial
from qlora_cli.core.matmul.expert_stacks import ExpertStacks, _relative, stack_error
from qlora_cli.core.matmul.gate import expected_error
from qlora_cli.core.models.files import resolve_model
from qlora_cli.core.models.loading import load_base
from qlora_cli.core.models.structure import find_decoder, underlying_model
from qlora_cli.core.streaming.streamed_base import stream_base
from qlora_cli.kernels import float8
from qlora_cli.settings.groups import LoraSettings, QuantizationSettings
from tests.adapted import draw_b
from tests.engine.test_engine import CPU, batch_of, install, step
from tests.experts.expert_modules import make_experts, pack, write_expert_model

LENGTHS = (40, 33, 57)  # of rows: more than 24 for each of 5 experts, of which a token meets 2
FEW = ProductTrial(batch=batch_of(LENGTHS))
DOWN = "model.layers.1.mlp.experts.down_proj"


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """A model of a layout, its experts adapted."""

    def build(layout, *, double_quant=True, adapt_experts=True, **changes):
        directory = tmp_path_factory.mktemp(layout) / "model"
        write_expert_model(layout, directory, num_hidden_layers=2, **changes)
        files = resolve_model(str(directory), report=lambda event: None)
        held = QuantizationSettings(base_cache=False, double_quant=double_quant)
        base, *_ = load_base(files, held, compute_dtype=torch.float32, device=CPU)
        lora = LoraSettings(rank=4, alpha=8, adapt_experts=adapt_experts, target_modules=("q_proj",))
        return draw_b(attach_adapter(base, lora, seed=0)).train()

    return build


@pytest.fixture(scope="module")
def qwen(adapted):
    return adapted("qwen3_moe")


def texts(events):
    return " ".join(event.text for event in events)


def check_step(model):
    """A step in 8 bits is near the one in the compute dtype, and experts are a part of what differs."""
    batch, events = batch_of(LENGTHS), []
    plain_loss, plain, _ = step(model, batch, matmul="bf16")
    loss, found, engine = step(model, batch, trial=FEW, matmul="fp8", events=events)
    assert len(engine.products.stacks) == 4 and engine.products.worst_output < 0.7 and not engine.products.kept
    assert "of 4 stacks of experts 4. On 130 tokens" in texts(events)
    assert 0 < abs(loss - plain_loss) < 0.01 * plain_loss
    assert 1e-3 < (found - plain).norm() / plain.norm() < 0.3
    recorded = {**asdict(engine.products), "stacks": []}
    of_linears = step(model, batch, trial=ProductTrial(recorded=recorded), matmul="fp8")[1]
    assert (found - of_linears).norm() / plain.norm() > 1e-3


def test_a_step_is_near_the_one_in_the_compute_dtype(qwen):
    check_step(qwen)


@pytest.mark.slow
def test_so_is_one_of_matrices_that_lie_the_other_way_round(adapted):
    check_step(adapted("gpt_oss"))


def test_evaluation_is_in_the_compute_dtype(qwen):
    losses = []
    for matmul in ("bf16", "fp8"):
        engine = install(qwen, trial=FEW, matmul=matmul)
        assert ("4 stacks of experts in fp8" in engine.describe()) == (matmul == "fp8")
        with torch.no_grad():
            losses.append(engine.loss(batch_of(LENGTHS)))
        engine.close()
    assert torch.equal(*losses)


def test_a_run_goes_on_with_the_stacks_that_it_had(qwen):
    recorded = {"asked": "fp8", "matmul": "fp8", "kept": [], "stacks": [DOWN]}
    engine, events = install(qwen, matmul="fp8", trial=ProductTrial(recorded=recorded, resumed=True)), []
    assert engine.products.stacks == (DOWN,) and "1 stacks of experts in fp8" in engine.describe()
    assert json.loads(json.dumps(asdict(engine.products)))["stacks"] == [DOWN]
    engine.close()
    del recorded["stacks"]  # a run that began when experts were in bf16
    trial = ProductTrial(recorded=recorded, resumed=True)
    engine = install(qwen, matmul="fp8", trial=trial, events=events)
    assert engine.products.stacks == () and "experts" not in engine.describe()
    assert "Routed experts are multiplied in bf16, as when this run began" in texts(events)
    engine.close()


@pytest.mark.parametrize("few", [{"max_tokens": 60}, {"max_tokens": 512, "tile_tokens": 60}])
def test_few_rows_for_each_expert_stay_in_the_compute_dtype_and_that_is_said(qwen, few):
    events: list = []
    engine = install(qwen, events=events, matmul="fp8", trial=FEW, **few)
    assert engine.products.stacks == () and engine.products.matmul == "fp8"
    assert "down_proj (few rows for each expert)" in texts(events)
    engine.close()


def test_a_stack_that_streams_is_multiplied_to_the_same_bits(adapted):
    model, found = adapted("qwen3_moe"), []
    options = {"matmul": "fp8", "resident_weights": False, "gradient_checkpointing": "on", "trial": FEW}
    for streams in (False, True):
        if streams:  # through one buffer: nothing of another layer is ever there
            layers = find_layers(find_decoder(underlying_model(model)))
            stream_base(underlying_model(model), layers, CPU, streamed=len(layers), slots=1)
        found.append(step(model, batch_of(LENGTHS), **options))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    assert found[0][2].products == found[1][2].products and len(found[0][2].products.stacks) == 4


def test_a_matrix_with_one_block_of_outliers_keeps_its_stack_in_the_compute_dtype(adapted):
    """100,000 times the others' size, at inputs that are zero: all else of one expert in five rounds to zero."""
    model, events = adapted("qwen3_moe", double_quant=False, adapt_experts=False, moe_intermediate_size=128), []
    stacks = ExpertStacks(underlying_model(model)).found
    experts = stacks[DOWN].module
    experts.gate_up_proj_absmax.view(5, 256)[2, :64] = 0  # the third expert's gates of half of what goes down
    experts.down_proj_absmax.view(5, 64, 2)[2, 0, 0] *= 1e5
    engine = install(model, events=events, trial=FEW, matmul="fp8")
    assert len(engine.products.stacks) == 3 and f"In bf16 stay {DOWN} (" in texts(events)
    first, second = find_layers(find_decoder(underlying_model(model)))
    sizes = bytes_at_once(stacks[DOWN].weight, 4), bytes_at_once(experts.weight_of("gate_up_proj"), 1)
    assert engine.stacks.bytes_beyond(first, 4) == sizes[0] - sizes[1] > engine.stacks.bytes_beyond(second, 4) == 0
    assert list(experts.scales) == ["gate_up_proj"]
    engine.close()
    assert not experts.scales


@pytest.mark.parametrize("broken", [None, "raises", "is wrong", "has no gradient"])
def test_kernels_that_fail_or_are_wrong_leave_their_stacks_in_the_compute_dtype(qwen, broken):
    class Experts(FusedExperts):
        def __call__(self, hidden_states, index, weights):
            answer = FourBitExperts.forward(self.module, hidden_states, index, weights)
            if self.up[1].stack_scale is None or not torch.is_grad_enabled() or broken is None:
                return answer
            if broken == "raises":
                raise Exception("out of resource")  # as Triton's, of no kind that PyTorch has
            if broken == "has no gradient":
                answer.register_hook(lambda gradient: gradient * math.nan)
                return answer
            return answer.flip(0)

    model = underlying_model(qwen)
    stacks, put_back = ExpertStacks(model), fuse_experts(model, kind=Experts)
    failed = stacks.failures(stacks.found)
    assert set(failed) == (set(stacks.found) if broken else set()) and not stacks.in_8_bits
    said = {"raises": "its kernels fail: out of resource", "is wrong": "its kernels are off by 1."}
    said["has no gradient"] = "its kernels are off by nan"
    assert all(said[broken] in reason for reason in failed.values())
    engine, events = install(qwen, trial=FEW, matmul="fp8", events=(events := [])), events
    assert len(engine.products.stacks) == (0 if broken else 4) and (not broken or said[broken] in texts(events))
    engine.close()
    put_back()


def test_experts_of_zeros_are_what_they_were_in_8_bits():
    found, exact = torch.zeros(2, 3), torch.zeros(2, 3)
    assert _relative(found, exact) == 0 and _relative(found + 1, exact) == math.inf
    assert _relative(exact, found + 2) == 1 and math.isnan(_relative(found * math.nan, found + 2))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("layout", ["qwen3_moe", "gpt_oss"])
def test_the_error_of_a_stack_is_that_of_its_worst_expert(layout, transposed):
    experts = pack(make_experts(layout).float(), torch.float32)
    weight = experts.expert_weights[0]
    values = float8.with_stack_scale(experts.stack(weight.name).values, weight.experts)
    routing = Routing(torch.tensor([20, 20, 33, 40, 61], dtype=torch.int32))
    rows = torch.randn(64, weight.rows if transposed else weight.columns)  # the last 3 are of no expert
    found, errors, bounds = stack_error(rows, routing, values, weight, transposed=transposed), [], routing.bounds()
    for expert in (0, 2, 3, 4):
        own = rows[bounds[expert] : bounds[expert + 1]]
        matrix = experts.dequantized(weight.name, expert).double()
        codes, scales = float8.quantise_rows(own)
        scale = values.stack_scale[expert].double()
        rounded = (matrix / scale).to(torch.float8_e4m3fn).double() * scale
        exact, eight = own.double(), codes.double() * scales.double()
        error = eight @ rounded - exact @ matrix if transposed else eight @ rounded.T - exact @ matrix.T
        expected = expected_error(own, part_of(values, weight, expert, expert + 1), transposed=transposed)
        errors.append(float(error.norm() / expected))
    assert float(found) == pytest.approx(max(errors), rel=1e-3)
    assert 0.25 < max(errors) < 0.6


def test_a_model_without_experts_has_no_stacks(load_tiny):
    stacks = ExpertStacks(load_tiny("llama")[0])
    assert not stacks.found and stacks.bytes_beyond(torch.nn.Identity(), 2) == 0


def test_tiles_of_a_long_row_are_in_8_bits_in_both_passes(qwen):
    batch, losses = batch_of((64,) * 8), []
    for matmul, tile_tokens in (("bf16", 0), ("fp8", 0), ("fp8", 128)):
        losses.append(step(qwen, batch, trial=FEW, matmul=matmul, tile_tokens=tile_tokens)[0])
    plain, whole, tiled = losses
    assert abs(tiled - whole) < 0.1 * abs(plain - whole)
