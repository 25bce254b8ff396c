"""Plans stay within their limit, use what they are given, keep to what was asked for, and name the nearest that fits."""

from dataclasses import fields, replace
from functools import cache

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_cli.core.device import CONTEXT_BYTES
from qlora_cli.core.engine import memory_plan
from qlora_cli.core.engine.cuda_graphs import bucket
from qlora_cli.core.engine.memory_plan import MemoryPlan
from qlora_cli.core.matmul.choice import is_tried
from qlora_cli.core.planning import planner
from qlora_cli.core.planning.memory_estimate import ResolvedStep, estimate_training
from qlora_cli.core.planning.model_profile import ModelProfile, profile_model
from qlora_cli.core.planning.planner import MemoryDecision, RowLengths, plan_training, read_limit_bytes
from qlora_cli.core.planning.suggestions import certainly_too_large, suggest_fit
from qlora_cli.errors import UsageError
from qlora_cli.settings.groups import LoraSettings, QuantizationSettings, StepSettings

GIB = 2**30
LAYERS = 8


@cache
def profile_of(rank: int = 16, engine: str = "fast") -> ModelProfile:
    config = transformers.LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        num_hidden_layers=LAYERS,
        num_attention_heads=16,
        intermediate_size=5632,
        tie_word_embeddings=False,
    )
    lora = LoraSettings(rank=rank, alpha=16)
    return profile_model(config, lora, QuantizationSettings(), compute_dtype=torch.bfloat16, engine=engine)


def plan(vram_bytes: int | None, profile: ModelProfile | None = None, **asked) -> MemoryDecision:
    """The decision for these settings; those of `RowLengths` and of `plan_training` among them."""
    lengths = {part.name: asked.pop(part.name) for part in fields(RowLengths) if part.name in asked}
    where = {name: asked.pop(name) for name in ("on_cuda", "shards", "shard_offload") if name in asked}
    rows = RowLengths(**{"max_length": 2048, **lengths})
    return plan_training(profile or profile_of(), StepSettings(**asked), rows, vram_bytes=vram_bytes, **where)


def suggest(vram_bytes: int, *, rank: int = 16, max_length: int = 2048, **asked):
    return suggest_fit(
        profile_of(),
        StepSettings(**asked),
        RowLengths(max_length),
        vram_bytes=vram_bytes,
        rank=rank,
        profile_with_rank=profile_of,
    )


def leanest_bytes(**asked) -> int:
    leanest = plan(1, **asked)
    assert leanest.fits is False
    return leanest.memory.device_bytes


@settings(max_examples=30, deadline=None)
@given(
    vram_bytes=st.integers(GIB // 2, 60 * GIB),
    batch_size=st.sampled_from((1, 2, 4, 8)),
    max_length=st.sampled_from((256, 1000, 2048, 4096)),
    optimizer=st.sampled_from((None, "adamw")),
)
def test_a_plan_that_says_it_fits_is_predicted_to_stay_within(vram_bytes, batch_size, max_length, optimizer):
    asked = {"batch_size": batch_size, "max_length": max_length, "optimizer": optimizer}
    decision = plan(vram_bytes, **asked)
    step = ResolvedStep(
        bucket(decision.token_budget),
        max_length,
        decision.optimizer,
        decision.measures,
        in_8_bits=is_tried(StepSettings(), batch_size * max_length, on_cuda=True),
    )
    predicted = max(
        estimate_training(profile_of(), replace(step, compiled=compiled)).device_bytes for compiled in (False, True)
    )
    assert decision.memory.device_bytes == predicted
    assert decision.fits == (predicted <= vram_bytes)
    assert decision.fits or vram_bytes < leanest_bytes(**asked)
    most_rows = batch_size * (16 if decision.measures.streamed else 1)
    assert max_length <= decision.token_budget <= most_rows * max_length


def test_more_memory_is_never_slower():
    costs = []
    for vram_bytes in range(2 * GIB, 40 * GIB, 2 * GIB):
        decision = plan(vram_bytes, batch_size=4)
        assert decision.fits
        costs.append(decision.measures.token_cost(LAYERS, decision.token_budget))
    assert costs == sorted(costs, reverse=True)
    assert costs[0] > 1.2 * costs[-1]


def test_plenty_of_memory_recomputes_nothing_and_keeps_weights_resident():
    decision = plan(80 * GIB, batch_size=4)
    assert decision.gradient_checkpointing == "off"
    assert decision.measures == MemoryPlan(resident_weights=True)
    assert decision.token_budget == 4 * 2048


def test_experts_stay_unpacked_where_memory_is_plentiful_and_that_is_predicted():
    config = transformers.Qwen3MoeConfig(
        vocab_size=32000, hidden_size=512, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=2, head_dim=64,
        moe_intermediate_size=256, num_experts=32, num_experts_per_tok=4, intermediate_size=1024, mlp_only_layers=[0],
    )  # fmt: skip
    profile = profile_model(config, LoraSettings(), QuantizationSettings(), compute_dtype=torch.bfloat16)
    layer_bytes = 32 * 3 * 512 * 256 * 2
    assert profile.expert_layers == 2 and profile.unpacked_bytes == layer_bytes
    plenty, without = plan(80 * GIB, profile), plan(80 * GIB, profile, resident_weights=False)
    assert plenty.measures == MemoryPlan(resident_weights=True, unpacked_experts=2)
    assert plenty.memory.resident_bytes == profile.dense_bytes + 2 * layer_bytes
    assert not without.measures.unpacked_experts and not without.memory.resident_bytes
    away = plan(80 * GIB, profile, offload_activations=True)  # of all layers, as the engine takes it
    assert away.measures.resident_weights and not away.measures.unpacked_experts
    assert "experts of 2 unpacked" in plenty.measures.describe(3)


def test_measures_are_taken_one_after_another_as_memory_shrinks():
    plenty, less, least = (
        plan(limit, max_length=4096) for limit in (8 * GIB, 7 * GIB // 2, leanest_bytes(max_length=4096))
    )
    assert plenty.fits and less.fits and least.fits
    assert plenty.measures.recomputed == 0
    assert 0 < less.measures.recomputed < LAYERS
    assert not less.measures.offload_activations
    assert least.gradient_checkpointing == "on"
    assert least.measures.offload_activations and least.measures.offload_embeddings


def test_micro_batches_shrink_before_layers_are_recomputed():
    whole = plan(80 * GIB, batch_size=8)
    tight = plan(whole.memory.device_bytes // 2, batch_size=8)
    assert tight.gradient_checkpointing == "off"
    assert 2048 <= tight.token_budget < whole.token_budget


def test_what_was_asked_for_is_kept():
    asked = {
        "gradient_checkpointing": "3",
        "offload_activations": False,
        "offload_embeddings": True,
        "resident_weights": False,
    }
    for vram_bytes in (GIB, 100 * GIB, None):
        decision = plan(vram_bytes, **asked)
        assert decision.settings == {"optimizer": "paged_adamw_8bit", **asked}


def test_without_a_limit_nothing_is_done_unasked():
    decision = plan(None)
    assert decision.fits is None
    assert decision.gradient_checkpointing == "off" and decision.measures == MemoryPlan()


def test_the_data_s_own_lengths_count_where_they_are_known():
    assumed = plan(None, batch_size=8)
    known = plan(None, batch_size=8, longest_row_tokens=80, largest_batch_tokens=500)
    assert assumed.token_budget == 8 * 2048
    assert known.token_budget == 500
    assert known.memory.peak_bytes < assumed.memory.peak_bytes


@pytest.mark.parametrize("word", ["auto", "3"])
def test_the_plain_engine_recomputes_all_layers_or_none(word):
    for vram_bytes in range(2 * GIB, 20 * GIB, 3 * GIB):
        decision = plan(vram_bytes, profile_of(engine="plain"), engine="plain", gradient_checkpointing=word)
        assert decision.measures in (MemoryPlan(0), MemoryPlan(LAYERS))


def test_nothing_is_offloaded_on_the_cpu():
    decision = plan(2 * GIB, on_cuda=False)
    assert not decision.measures.offload_activations and not decision.measures.offload_embeddings
    assert decision.optimizer == "adamw"
    assert decision.memory.context_bytes == 0


@pytest.mark.parametrize("engine", ["fast", "plain"])
def test_on_the_cpu_weights_are_resident_where_half_of_memory_holds_them(monkeypatch, engine):
    profile = profile_of(engine=engine)
    for free_bytes, resident in ((2 * profile.dense_bytes + 2, engine == "fast"), (2 * profile.dense_bytes, False)):
        monkeypatch.setattr(memory_plan, "read_free_bytes", lambda device, free_bytes=free_bytes: free_bytes)
        decision = plan(None, profile, engine=engine, on_cuda=False)
        assert decision.measures.resident_weights == resident


def test_the_nearest_fit_changes_only_what_it_must():
    asked = {"batch_size": 2, "max_length": 4096, "gradient_checkpointing": "off", "offload_activations": False}
    limit_bytes = plan(None, **asked).memory.device_bytes // 2
    changes, decision = suggest(limit_bytes, **asked)
    assert decision.fits
    assert set(changes) <= {"gradient_checkpointing", "offload_embeddings"}
    assert plan(limit_bytes, **{**asked, **changes}).fits


@pytest.mark.slow
def test_rows_are_shortened_and_then_the_rank_is_lowered():
    just_too_little = leanest_bytes(max_length=8192) - 1
    changes, _ = suggest(just_too_little, max_length=8192)
    assert changes["max_length"] == 4096
    assert "rank" not in changes
    assert plan(just_too_little, max_length=4096).fits

    changes, decision = suggest(leanest_bytes(max_length=128) - 1, max_length=8192)
    assert changes["max_length"] == 128
    assert changes["rank"] < 16
    assert decision.fits


@pytest.mark.parametrize("max_length", [128, 200])
def test_beside_rows_too_short_to_halve_the_rank_is_lowered(max_length):
    changes, decision = suggest(leanest_bytes(max_length=max_length) - 2**20, max_length=max_length)
    assert "max_length" not in changes and changes["rank"] < 16 and decision.fits


def test_where_nothing_fits_nothing_is_suggested():
    assert suggest(GIB // 4, rank=2) is None


def test_only_what_is_certain_to_fail_is_refused():
    assert not certainly_too_large(plan(80 * GIB))
    assert not certainly_too_large(plan(None))
    least_bytes = leanest_bytes()
    nearly = plan(least_bytes - 2**20)
    assert nearly.fits is False and not certainly_too_large(nearly)
    assert certainly_too_large(plan(least_bytes * 9 // 10))


def test_the_allocator_has_the_limit_without_the_context_and_paged_states():
    found = plan(12 * GIB)
    assert found.memory.paged_bytes > 0
    assert found.allocator_bytes == 12 * GIB - CONTEXT_BYTES - found.memory.paged_bytes
    assert plan(None).allocator_bytes is None


def test_a_model_that_cannot_be_followed_is_planned_carefully():
    blind = replace(profile_of(), trace=None, untraced="it needs numbers")
    decision = plan(GIB, blind, batch_size=2)
    assert decision.memory is None and decision.fits is None
    assert decision.gradient_checkpointing == "on"
    assert not certainly_too_large(decision)


@pytest.mark.parametrize("traced", [True, False])
def test_a_wrong_word_for_checkpointing_is_refused(traced):
    profile = profile_of() if traced else replace(profile_of(), trace=None)
    with pytest.raises(UsageError):
        plan(None, profile, gradient_checkpointing="some")


def test_rows_of_uneven_lengths_come_apart_down_to_the_longest():
    data = {"longest_row_tokens": 4000, "largest_batch_tokens": 7000}  # half of which is less than the longest row
    asked = {"batch_size": 2, "max_length": 4096, **data}
    least = plan(1, **asked)
    assert least.token_budget == 4000
    assert plan(least.memory.device_bytes, **asked).fits


def test_what_is_free_counts_half_of_the_context_that_is_still_to_come(monkeypatch):
    monkeypatch.setattr("qlora_cli.core.planning.planner.read_capacity_bytes", lambda device: 10 * GIB)
    assert read_limit_bytes(None, torch.device("cuda", 0)) == 10 * GIB + CONTEXT_BYTES // 2


def test_the_limit_is_what_was_asked_for_or_what_is_free():
    assert read_limit_bytes("12GiB", torch.device("cpu")) == 12 * GIB
    assert read_limit_bytes(None, torch.device("cpu")) > 0


def test_a_card_of_several_holds_its_share_and_what_it_gathers():
    profile, step = profile_of(), ResolvedStep(2048, 2048, "adamw_8bit")
    whole, half, quarter, away = (
        estimate_training(profile, replace(step, shards=shards, shard_offload=offload)).to_dict()
        for shards, offload in ((1, False), (2, False), (4, False), (2, True))
    )
    tables = 2 * profile.embedding_bytes
    norms = whole["base_bytes"] - tables - profile.footprint.quantized_bytes
    assert half["base_bytes"] == pytest.approx(whole["base_bytes"] / 2 + norms / 2, rel=1e-6)
    assert quarter["base_bytes"] == pytest.approx(whole["base_bytes"] / 4 + norms * 3 / 4, rel=1e-6)
    assert whole["gathered_bytes"] == 0 < half["gathered_bytes"] == quarter["gathered_bytes"] < whole["base_bytes"]
    assert away["base_bytes"] == norms and away["host_bytes"] - half["host_bytes"] == half["base_bytes"] - norms
    for memory in (whole, half, quarter, away):
        parts = (
            "base",
            "gathered",
            "resident",
            "adapter",
            "gradient",
            "optimizer",
            "activation",
            "working",
            "allocator",
        )
        assert memory["peak_bytes"] == sum(memory[f"{part}_bytes"] for part in parts)


def test_a_sharded_base_is_planned_without_what_needs_it_whole():
    decision = plan(None, resident_weights=True, offload_embeddings=True, shards=2)
    assert not decision.measures.resident_weights and not decision.measures.offload_embeddings


# ---------------------------------------------------------------- streaming


@settings(max_examples=15, deadline=None)
@given(vram_bytes=st.integers(GIB, 6 * GIB), batch_size=st.sampled_from((1, 4)))
def test_layers_stream_only_where_nothing_else_fits(vram_bytes, batch_size):
    whole = plan(vram_bytes, batch_size=batch_size, stream=False)
    decision = plan(vram_bytes, batch_size=batch_size)
    assert whole.measures.streamed == 0
    if whole.measures == decision.measures:
        assert whole.memory == decision.memory
    else:
        assert decision.measures.streamed and not decision.measures.resident_weights
        assert decision.memory.device_bytes < whole.memory.device_bytes
        assert whole.memory.device_bytes > vram_bytes
        assert decision.memory.host_bytes > sum(profile_of().layer_bytes) * decision.measures.streamed / LAYERS


def test_layers_are_streamed_where_asked_and_where_there_is_no_limit():
    decision = plan(None, stream=True)
    assert decision.measures.streamed == LAYERS and decision.streaming == {"streamed_layers": LAYERS}
    assert plan(80 * GIB).streaming == {} and plan(None, stream=True, engine="plain").streaming == {}
    saved = plan(None, stream=False).memory.base_bytes - decision.memory.base_bytes
    assert saved == sum(profile_of().layer_bytes) - 2 * max(profile_of().layer_bytes)


def test_micro_batches_grow_where_weights_would_take_longer_to_copy_than_to_compute_with():
    vram_bytes = plan(1, stream=True, max_length=256).memory.device_bytes + 2 * GIB
    few = plan(vram_bytes, stream=True, max_length=256, gradient_accumulation_steps=1)
    many = plan(vram_bytes, stream=True, max_length=256)
    assert few.fits and many.fits and few.token_budget == 256 < many.token_budget <= 16 * 256
    assert plan(vram_bytes, stream=False, max_length=256).token_budget == 256
    assert plan(None, stream=True, max_length=256).token_budget == 256
    known = plan(vram_bytes, stream=True, max_length=256, largest_step_tokens=700)
    assert known.token_budget <= 700


def test_an_optimizers_state_waits_on_the_host_before_layers_stream():
    own, trained = profile_of(), 512 * 2**20
    footprint = replace(own.footprint, trainable_parameters=trained, trainable_numels=(trained,))
    large = replace(own, footprint=footprint)  # as adapters of experts
    whole = plan(80 * GIB, large)
    assert not whole.measures.waiting_states and whole.memory.paged_bytes > GIB
    leanest = plan(1, large, stream=False)
    assert leanest.measures.waiting_states and leanest.memory.paged_bytes == 0
    assert leanest.memory.host_bytes - whole.memory.host_bytes >= whole.memory.paged_bytes
    near = plan(leanest.memory.device_bytes + memory_plan.MARGIN_BYTES, large)
    assert near.fits and near.measures.waiting_states == 1 and not near.measures.streamed
    room = leanest.memory.device_bytes + memory_plan.MARGIN_BYTES + GIB // 2
    roomy = plan(room, large, gradient_accumulation_steps=1)
    assert roomy.fits and 0.4 < roomy.measures.waiting_states < 0.7, "half of a GiB stays on the card"
    kept = plan(leanest.memory.device_bytes + memory_plan.MARGIN_BYTES, large, optimizer="adamw_8bit")
    assert not kept.measures.waiting_states


@pytest.mark.parametrize(("host_gib", "kept"), [(6, 0), (9, 4), (40, LAYERS)])
def test_of_long_rows_attentions_results_wait_on_the_host_for_as_many_layers_as_it_takes(monkeypatch, host_gib, kept):
    monkeypatch.setattr(planner, "waiting_room_bytes", lambda: host_gib * GIB)
    asked = {"gradient_checkpointing": "on", "offload_activations": True, "tile_tokens": 8192, "batch_size": 1}
    decision = plan(24 * GIB, max_length=131_072, **asked)  # rows whose hidden states are 0.5 GiB
    assert decision.measures.attention_kept == kept
    assert decision.memory.host_bytes <= host_gib * GIB or not kept
