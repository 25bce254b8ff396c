"""Plans stay within their limit, use what they are given, keep to what was asked for, and name the nearest that fits."""

from dataclasses import replace
from functools import cache

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_cli.core.engine.cuda_graphs import bucket
from qlora_cli.core.planning.memory_estimate import CONTEXT_BYTES, ResolvedStep, estimate_training
from qlora_cli.core.planning.model_profile import ModelProfile, gather_facts
from qlora_cli.core.planning.planner import StepRequest, _cost, plan_training, read_limit_bytes
from qlora_cli.core.planning.suggestions import certainly_too_large, refuse, suggest_fit
from qlora_cli.errors import UsageError
from qlora_cli.sizes import format_bytes

GIB = 2**30
LAYERS = 8


@cache
def facts_of(rank: int = 16, engine: str = "fast") -> ModelProfile:
    config = transformers.LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        num_hidden_layers=LAYERS,
        num_attention_heads=16,
        intermediate_size=5632,
        tie_word_embeddings=False,
    )
    return gather_facts(
        config,
        rank=rank,
        alpha=16,
        dropout=0.0,
        target_modules=None,
        rslora=False,
        dora=False,
        modules_to_save=None,
        quant_type="nf4",
        double_quant=True,
        compute_dtype=torch.bfloat16,
        engine=engine,
    )


def leanest_bytes(request: StepRequest) -> int:
    plan = plan_training(facts_of(), request, vram_bytes=1)
    assert plan.fits is False
    return plan.memory.device_bytes


@settings(max_examples=30, deadline=None)
@given(
    vram_bytes=st.integers(GIB // 2, 60 * GIB),
    batch_size=st.sampled_from((1, 2, 4, 8)),
    max_length=st.sampled_from((256, 1000, 2048, 4096)),
    optimizer=st.sampled_from((None, "adamw")),
)
def test_a_plan_that_says_it_fits_is_predicted_to_stay_within(vram_bytes, batch_size, max_length, optimizer):
    request = StepRequest(batch_size=batch_size, max_length=max_length, optimizer=optimizer)
    plan = plan_training(facts_of(), request, vram_bytes=vram_bytes)
    step = ResolvedStep(
        tokens=bucket(plan.token_budget),
        row_tokens=max_length,
        engine="fast",
        optimizer=plan.optimizer,
        recomputed_layers=plan.recomputed_layers,
        offload_activations=plan.offload_activations,
        offload_embeddings=plan.offload_embeddings,
        resident_weights=plan.resident_weights,
        compiled=False,
        workspace_bytes=plan.workspace_bytes,
    )
    predicted = max(
        estimate_training(facts_of(), replace(step, compiled=compiled)).device_bytes for compiled in (False, True)
    )
    assert plan.memory.device_bytes == predicted
    assert plan.fits == (predicted <= vram_bytes)
    assert plan.fits or vram_bytes < leanest_bytes(request)
    assert max_length <= plan.token_budget <= batch_size * max_length


def test_more_memory_is_never_slower():
    costs = []
    for vram_bytes in range(2 * GIB, 40 * GIB, 2 * GIB):
        plan = plan_training(facts_of(), StepRequest(batch_size=4), vram_bytes=vram_bytes)
        assert plan.fits
        step = ResolvedStep(
            plan.token_budget,
            2048,
            "fast",
            plan.optimizer,
            plan.recomputed_layers,
            plan.offload_activations,
            plan.offload_embeddings,
            plan.resident_weights,
            False,
            plan.workspace_bytes,
        )
        costs.append(_cost(step, LAYERS))
    assert costs == sorted(costs, reverse=True)
    assert costs[0] > 1.2 * costs[-1]


def test_plenty_of_memory_recomputes_nothing_and_keeps_weights_resident():
    plan = plan_training(facts_of(), StepRequest(batch_size=4), vram_bytes=80 * GIB)
    assert (plan.gradient_checkpointing, plan.offload_activations, plan.offload_embeddings) == ("off", False, False)
    assert plan.resident_weights
    assert plan.token_budget == 4 * 2048


def test_measures_are_taken_one_after_another_as_memory_shrinks():
    request = StepRequest(batch_size=1, max_length=4096)
    limits = [8 * GIB, 7 * GIB // 2, leanest_bytes(request)]
    plans = [plan_training(facts_of(), request, vram_bytes=limit) for limit in limits]
    assert [plan.fits for plan in plans] == [True, True, True]
    assert plans[0].recomputed_layers == 0
    assert 0 < plans[1].recomputed_layers < LAYERS
    assert not plans[1].offload_activations
    assert plans[2].gradient_checkpointing == "on"
    assert plans[2].offload_activations and plans[2].offload_embeddings


def test_micro_batches_shrink_before_layers_are_recomputed():
    whole = plan_training(facts_of(), StepRequest(batch_size=8), vram_bytes=80 * GIB)
    tight = plan_training(facts_of(), StepRequest(batch_size=8), vram_bytes=whole.memory.device_bytes // 2)
    assert tight.gradient_checkpointing == "off"
    assert 2048 <= tight.token_budget < whole.token_budget


def test_what_was_asked_for_is_kept():
    request = StepRequest(
        gradient_checkpointing="3", offload_activations=False, offload_embeddings=True, resident_weights=False
    )
    for vram_bytes in (GIB, 100 * GIB, None):
        plan = plan_training(facts_of(), request, vram_bytes=vram_bytes)
        assert plan.gradient_checkpointing == "3"
        assert (plan.offload_activations, plan.offload_embeddings, plan.resident_weights) == (False, True, False)


def test_without_a_limit_nothing_is_done_unasked():
    plan = plan_training(facts_of(), StepRequest(), vram_bytes=None)
    assert plan.fits is None
    assert (plan.gradient_checkpointing, plan.offload_activations, plan.resident_weights) == ("off", False, False)


def test_the_data_s_own_lengths_count_where_they_are_known():
    request = StepRequest(batch_size=8, max_length=2048)
    assumed = plan_training(facts_of(), request, vram_bytes=None)
    known = plan_training(facts_of(), request, vram_bytes=None, longest_row_tokens=80, largest_batch_tokens=500)
    assert assumed.token_budget == 8 * 2048
    assert known.token_budget == 500
    assert known.memory.peak_bytes < assumed.memory.peak_bytes


def test_the_plain_engine_recomputes_all_layers_or_none():
    facts = facts_of(engine="plain")
    for vram_bytes in range(2 * GIB, 20 * GIB, 3 * GIB):
        plan = plan_training(facts, StepRequest(engine="plain"), vram_bytes=vram_bytes)
        assert plan.recomputed_layers in (0, LAYERS)
        assert not (plan.offload_activations or plan.offload_embeddings or plan.resident_weights)


def test_nothing_is_offloaded_on_the_cpu():
    plan = plan_training(facts_of(), StepRequest(), vram_bytes=2 * GIB, on_cuda=False)
    assert not plan.offload_activations and not plan.offload_embeddings
    assert plan.optimizer == "adamw"
    assert plan.memory.context_bytes == 0


def test_the_nearest_fit_changes_only_what_it_must():
    request = StepRequest(batch_size=2, max_length=4096, gradient_checkpointing="off", offload_activations=False)
    need_bytes = plan_training(facts_of(), request, vram_bytes=None).memory.device_bytes
    found = suggest_fit(facts_of(), request, vram_bytes=need_bytes // 2, rank=16, regather=facts_of)
    assert found.plan.fits
    assert set(found.changes) <= {"gradient_checkpointing", "offload_embeddings"}
    again = plan_training(facts_of(), replace(request, **found.changes), vram_bytes=need_bytes // 2)
    assert again.fits


def test_rows_are_shortened_and_then_the_rank_is_lowered():
    request = StepRequest(batch_size=1, max_length=8192)
    just_too_little = leanest_bytes(request) - 1
    found = suggest_fit(facts_of(), request, vram_bytes=just_too_little, rank=16, regather=facts_of)
    assert found.changes["max_length"] == 4096
    assert "rank" not in found.changes
    assert plan_training(facts_of(), replace(request, max_length=4096), vram_bytes=just_too_little).fits

    shortest = leanest_bytes(replace(request, max_length=128))
    found = suggest_fit(facts_of(), request, vram_bytes=shortest - 1, rank=16, regather=facts_of)
    assert found.changes["max_length"] == 128
    assert found.changes["rank"] < 16
    assert found.plan.fits


def test_where_nothing_fits_nothing_is_suggested():
    assert suggest_fit(facts_of(), StepRequest(), vram_bytes=GIB // 4, rank=2, regather=facts_of) is None


def test_only_what_is_certain_to_fail_is_refused_and_with_exit_code_3():
    plan = plan_training(facts_of(), StepRequest(), vram_bytes=80 * GIB)
    assert not certainly_too_large(plan)
    assert not certainly_too_large(plan_training(facts_of(), StepRequest(), vram_bytes=None))
    least_bytes = leanest_bytes(StepRequest())
    nearly = plan_training(facts_of(), StepRequest(), vram_bytes=least_bytes - 2**20)
    assert nearly.fits is False and not certainly_too_large(nearly)
    much_too_large = plan_training(facts_of(), StepRequest(), vram_bytes=least_bytes * 9 // 10)
    assert certainly_too_large(much_too_large)
    error = refuse(much_too_large, ("qlora train --max-length 512",))
    assert error.exit_code == 3
    assert format_bytes(least_bytes) in error.message and "--max-length 512" in error.hint
    assert "Nothing fits" in refuse(much_too_large, ()).hint


def test_a_plan_is_ready_for_json_and_the_allocator():
    import json

    plan = plan_training(facts_of(), StepRequest(), vram_bytes=12 * GIB)
    assert json.loads(json.dumps(plan.to_dict()))["memory"]["peak_bytes"] == plan.memory.peak_bytes
    assert plan.allocator_bytes == 12 * GIB - CONTEXT_BYTES


def test_a_model_that_cannot_be_followed_is_planned_carefully():
    blind = replace(facts_of(), trace=None, untraced="it needs numbers")
    plan = plan_training(blind, StepRequest(batch_size=2), vram_bytes=GIB)
    assert plan.memory is None and plan.fits is None
    assert plan.gradient_checkpointing == "on"
    assert not certainly_too_large(plan)


def test_a_wrong_word_for_checkpointing_is_refused():
    with pytest.raises(UsageError):
        plan_training(facts_of(), StepRequest(gradient_checkpointing="some"), vram_bytes=None)


def test_rows_of_uneven_lengths_come_apart_down_to_the_longest():
    data = {"longest_row_tokens": 4000, "largest_batch_tokens": 7000}  # half of which is less than the longest row
    request = StepRequest(batch_size=2, max_length=4096)
    least = plan_training(facts_of(), request, vram_bytes=1, **data)
    assert least.token_budget == 4000
    assert plan_training(facts_of(), request, vram_bytes=least.memory.device_bytes, **data).fits


def test_what_is_free_counts_half_of_the_context_that_is_still_to_come(monkeypatch):
    monkeypatch.setattr("qlora_cli.core.planning.planner.read_free_bytes", lambda device: 10 * GIB)
    assert read_limit_bytes(None, torch.device("cuda", 0)) == 10 * GIB + CONTEXT_BYTES // 2


def test_the_limit_is_what_was_asked_for_or_what_is_free():
    assert read_limit_bytes("12GiB", torch.device("cpu")) == 12 * GIB
    assert read_limit_bytes(None, torch.device("cpu")) > 0


def test_a_card_of_several_holds_its_share_and_what_it_gathers():
    facts, step = facts_of(), ResolvedStep(2048, 2048, "fast", "adamw_8bit", 0, False, False, False, False)
    whole, half, quarter, away = (
        estimate_training(facts, replace(step, shards=shards, shard_offload=offload)).to_dict()
        for shards, offload in ((1, False), (2, False), (4, False), (2, True))
    )
    tables = 2 * facts.embedding_bytes
    norms = whole["base_bytes"] - tables - facts.footprint.quantized_bytes
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


def test_a_spread_base_is_planned_without_what_needs_it_whole():
    plan = plan_training(
        facts_of(), StepRequest(resident_weights=True, offload_embeddings=True), vram_bytes=None, shards=2
    )
    assert not plan.resident_weights and not plan.offload_embeddings
