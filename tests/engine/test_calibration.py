"""Steps are planned within the host's memory too, for every number of tokens, and leaner each time memory runs out."""

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import Gemma2Config, Gemma2ForCausalLM

from qlora_cli.core.adapters.lora import attach_adapter
from qlora_cli.core.device import LayerSeconds
from qlora_cli.core.engine import packed_attention
from qlora_cli.core.engine.calibration import Calibration, StepPlanner
from qlora_cli.core.engine.decoder_layers import usual_seconds
from qlora_cli.core.engine.engine import install_engine
from qlora_cli.core.engine.lora_linear import ATTRIBUTE
from qlora_cli.core.engine.memory_plan import MemoryPlan, StepNeeds
from qlora_cli.core.experts.held_routing import HeldRouting
from qlora_cli.core.models.files import resolve_model
from qlora_cli.core.models.loading import load_base
from qlora_cli.core.models.structure import find_decoder, underlying_model
from qlora_cli.settings.groups import LoraSettings, QuantizationSettings, StepSettings
from tests.engine.test_engine import adapted, install
from tests.experts.expert_modules import write_expert_model

GIB = 2**30
TOKENS = 4096


def planner(available_bytes: int, host_bytes: int) -> StepPlanner:
    made = StepPlanner(StepSettings(), TOKENS)
    made.needs = StepNeeds(
        layers=32,
        kept_bytes=GIB,
        peak_bytes=2 * GIB,
        hidden_bytes=GIB // 16,
        optimizer_bytes=GIB // 8,
        dense_bytes=13 * GIB,
        largest_dense_bytes=GIB // 8,
        embedding_bytes=0,
        seconds=LayerSeconds(0.05, 0.1),
        fixed_seconds=LayerSeconds(0.01, 0.02),
        link_bytes_per_second=50e9,
        host_bytes=host_bytes,
    )
    made.available_bytes = available_bytes
    return made


@given(st.integers(5, 30), st.integers(0, 40), st.integers(1, TOKENS))
def test_no_number_of_tokens_sends_more_than_the_host_has_room_for(gib, host_gib, tokens):
    made = planner(gib * GIB, host_gib * GIB)
    plan = made.plan()
    needs = made.needs.for_share(tokens / TOKENS)
    found = made.for_tokens(plan, tokens)
    assert found.sent_bytes(needs) <= max(host_gib * GIB, plan.sent_bytes(needs))
    assert found.step_bytes(needs) <= max(made.available_bytes, plan.step_bytes(needs))


def test_each_relief_is_leaner_until_nothing_is_left_to_give_up():
    made = planner(12 * GIB, 64 * GIB)
    plans = [made.plan()]
    while (leaner := made.reduce_memory(plans[-1])) is not None:
        plans.append(leaner)
    sizes = [plan.step_bytes(made.needs) for plan in plans]
    assert len(plans) > 2 and sizes == sorted(sizes, reverse=True) and len(set(plans)) == len(plans)


def test_where_memory_runs_out_experts_are_packed_again_before_anything_else_is_given_up():
    made = planner(200 * GIB, 64 * GIB)
    made.needs = replace(made.needs, expert_layers=10, unpacked_bytes=GIB)
    plans = [made.plan()]
    while plans[-1].unpacked_experts:
        plans.append(made.reduce_memory(plans[-1]))
    assert [plan.unpacked_experts for plan in plans] == [10, 5, 2, 1, 0]
    assert {replace(plan, unpacked_experts=0) for plan in plans} == {plans[-1]}


@given(st.sampled_from([1, 2, 4, 8]), st.floats(1e-4, 1e-2), st.floats(1e-7, 1e-5), st.floats(0, 1), st.integers(1, 32))
def test_speed_that_is_said_is_that_of_the_layer_whatever_tokens_there_was_room_to_time(
    share, still, token, repeated, recomputed
):
    """A layer's time here is a fixed one and one for each token; of more tokens than a share of them there is no room."""
    made, layer_plan = planner(64 * GIB, 0), SimpleNamespace(offload=None, recompute=False)

    def time(_, tokens):
        if tokens > TOKENS // share:
            return None
        forward = still + token * tokens
        return LayerSeconds(forward, (2 + repeated * layer_plan.recompute) * forward)

    plan = MemoryPlan(recomputed=recomputed)
    layers = ["first", SimpleNamespace(**{ATTRIBUTE: layer_plan})]
    said = made.time_step(SimpleNamespace(time=time), layers, None, plan)
    forward = still + token * TOKENS
    assert plan.micro_batch_seconds(made.needs) == pytest.approx((3 * 32 + repeated * recomputed) * forward, rel=1e-6)
    assert f"A micro-batch of {TOKENS:,} tokens takes about" in said


def test_a_layers_time_is_the_devices_own_and_a_micro_batch_takes_no_less_than_the_host_takes_to_launch_it():
    first = LayerSeconds(0.003, 0.006, launching=0.004)  # on a card that was idle
    busy = usual_seconds(
        [first, *[LayerSeconds(0.0032, 0.0066, launching=0.005)] * 4, *[LayerSeconds(0.003, 0.007, 0.01)] * 9]
    )
    assert busy == LayerSeconds(0.003, 0.007, 0.005), "the queue of launches is full later, and holds up the host"
    late = usual_seconds([first, *[LayerSeconds(0.006, 0.008, launching=0.014)] * 20])
    assert late == LayerSeconds(0.003, 0.006, 0.014), "passes that wait for the host say nothing of the device"
    jittering = usual_seconds([first, *[LayerSeconds(0.005, 0.007, launching=0.01)] * 20])
    assert jittering == LayerSeconds(0.003, 0.006, 0.01), "nor do those that wait for some of its launches"
    slow = [LayerSeconds(0.006, 0.013, launching=0.019)] * 6
    warm = usual_seconds([first, *slow, *[LayerSeconds(0.006, 0.008, launching=0.014)] * 8])
    assert warm == late, "what the host does for the first time takes it longer than in steps"
    needs = StepNeeds(layers=10, seconds=late, repeated_share=1.0, repeated_launching=0.002)
    assert MemoryPlan(4).micro_batch_seconds(needs) == pytest.approx(10 * 0.014 + 4 * 0.002)
    assert MemoryPlan(4).micro_batch_seconds(replace(needs, seconds=busy)) == pytest.approx(10 * 0.010 + 4 * 0.003)


@pytest.mark.parametrize("layers", [3, 8, 80])
def test_copies_that_outlast_arithmetic_hide_behind_the_layers_between_them_alone(layers):
    """A ring of two: a pass takes its copies, and the layer before the first and after the last of them."""
    needs = StepNeeds(
        layers=layers,
        seconds=LayerSeconds(0.004, 0.01),
        link_bytes_per_second=50e9,
        streamed_bytes=(layers - 2) * GIB,
        streaming_share=1 - 2 / layers,
    )
    copying = 2 * (layers - 2) * GIB / 50e9
    assert MemoryPlan(streamed=layers).micro_batch_seconds(needs) == pytest.approx(copying + 2 * 0.014)


@pytest.mark.parametrize("architecture", ["opt", "gpt2", "llama"])
def test_trials_of_many_tokens_stay_within_the_positions_a_model_has(load_tiny, architecture):
    engine = install(adapted(load_tiny, architecture))
    lengths = engine.trials.rows_of(1300)
    assert 1300 <= sum(lengths) < 1300 + len(lengths) and max(lengths) <= 512
    engine.trials.run(lengths)
    engine.close()


@pytest.fixture(scope="module")
def whimsical_routers(tmp_path_factory):
    """A model in 4 bits whose routers choose otherwise in a call of other size, as rounding makes those that waver."""
    directory = tmp_path_factory.mktemp("routers") / "model"
    write_expert_model("qwen3_moe", directory)
    files = resolve_model(str(directory), report=lambda event: None)
    held = QuantizationSettings(base_cache=False)
    base, *_ = load_base(files, held, compute_dtype=torch.float32, device=torch.device("cpu"))

    def waver(module, given, answer):
        logits, weights, index = answer
        return logits, weights, (index + given[0].numel() // given[0].shape[-1]) % logits.shape[-1]

    for layer in find_decoder(base).layers:
        layer.mlp.gate.register_forward_hook(waver)
    return attach_adapter(base, LoraSettings(rank=4, target_modules=("q_proj",))).train()


def test_a_router_that_wavers_keeps_no_rows_from_being_packed(whimsical_routers, monkeypatch):
    def packs():
        run = {"max_tokens": 128, "total_steps": 3, "report": lambda event: None}
        settings = StepSettings(gradient_checkpointing="off")
        cpu = torch.device("cpu")
        engine = install_engine(whimsical_routers, settings, device=cpu, compute_dtype=torch.float32, **run)
        engine.close()
        return engine.packed

    assert packs()
    monkeypatch.setattr(HeldRouting, "replayed", lambda routing: nullcontext())
    assert not packs(), "routers do not waver: this test shows nothing"


@pytest.mark.parametrize("others", [10, 0])
def test_held_routing_gives_the_last_tokens_what_was_chosen_and_others_their_own(whimsical_routers, others):
    decoder = find_decoder(underlying_model(whimsical_routers))
    routing, ids, seen = HeldRouting(decoder), torch.arange(5, 35)[None], []
    with torch.no_grad():
        with routing.recorded():
            decoder(ids[:, others:])
        index, weights = routing.chosen[routing.experts[0]]
        for held in (routing.replayed(), nullcontext()):
            with held:
                handle = routing.experts[0].register_forward_pre_hook(lambda module, given: seen.append(given[1:3]))
                decoder(ids.flip(1))
                handle.remove()
    (chosen, weighed), (own, _) = seen
    assert torch.equal(chosen[others:], index) and torch.equal(weighed[others:], weights)
    assert torch.equal(chosen[:others], own[:others]) and not torch.equal(chosen, own)
    assert len(chosen) == 30 and not any(module._forward_pre_hooks for module in routing.experts)


@pytest.fixture(scope="module")
def peaked_attention(tmp_path_factory):
    """A model in bfloat16 whose rounding grows from layer to layer: scores of attention are far apart."""
    config = Gemma2Config(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=24,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=32,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(config).to(torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0) if "norm" in name else parameter.normal_(0, 0.18)
    return attach_adapter(model.requires_grad_(False), LoraSettings(rank=4, target_modules=("q_proj",))).train()


def packs(model, report=lambda event: None):
    run = {"max_tokens": 128, "total_steps": 3, "report": report}
    settings = StepSettings(gradient_checkpointing="off", engine="fast")
    engine = install_engine(model, settings, device=torch.device("cpu"), compute_dtype=torch.bfloat16, **run)
    engine.close()
    return engine.packed


def test_rounding_that_grows_with_depth_keeps_no_rows_from_being_packed(peaked_attention, monkeypatch):
    assert packs(peaked_attention)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in peaked_attention.modules())
    monkeypatch.setattr(Calibration, "_like_by_layer", lambda trials, ids: False)
    assert not packs(peaked_attention), "hidden states came out alike as a whole: this test shows nothing"


@pytest.mark.parametrize("wrong", ["scale", "window"])
def test_other_attention_is_told_from_rounding_that_grows_with_depth(peaked_attention, monkeypatch, wrong):
    own = packed_attention._attend_pack

    def attend(module, query, key, value, mask, scale, window=None, sinks=None, cap=None):
        if wrong == "scale":
            scale *= 1.2
        else:
            window = None
        return own(module, query, key, value, mask, scale, window, sinks, cap)

    monkeypatch.setattr(packed_attention, "_attend_pack", attend)
    assert not packs(peaked_attention)


@pytest.mark.parametrize("seen", ["rounding", "a token"])
def test_rows_that_differ_by_rounding_are_packed_and_rows_that_see_a_token_are_not(load_tiny, monkeypatch, seen):
    own = packed_attention._attend_pack

    def attend(module, query, key, value, mask, *rest):
        if seen == "a token":
            mask = mask - (mask == 24).int()  # the second row begins with the last token of the first
            return own(module, query, key, value, mask, *rest)
        return own(module, query, key, value, mask, *rest) * (1 + 2e-6 * query[0].sign().mean())

    monkeypatch.setattr(packed_attention, "_attend_pack", attend)
    engine = install(adapted(load_tiny, "llama"))
    engine.close()
    assert engine.packed == (seen == "rounding")
