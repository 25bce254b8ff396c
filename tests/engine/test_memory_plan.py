"""Memory measures are taken in order of what they cost, only as far as needed, and never against what was asked for."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_cli.core.device import LayerSeconds
from qlora_cli.core.engine.memory_plan import ROOM, TOP_LAYERS, UNPACKED_SHARE, MemoryPlan, StepNeeds, plan_memory
from qlora_cli.settings.groups import StepSettings

GIB = 2**30
NEEDS = StepNeeds(
    layers=32,
    kept_bytes=GIB // 2,
    peak_bytes=GIB,
    hidden_bytes=32 * 2**20,
    optimizer_bytes=GIB // 2,
    dense_bytes=13 * GIB,
    largest_dense_bytes=90 * 2**20,
    embedding_bytes=GIB // 4,
)
UNDECIDED = StepSettings()


def test_measures_come_one_after_another_as_memory_shrinks():
    plenty, some, little, least = (plan_memory(NEEDS, n * GIB, UNDECIDED) for n in (100, 17, 6, 1))
    assert (plenty.recomputed, plenty.resident_weights, plenty.workspace_bytes) == (0, True, None)
    assert 0 < some.recomputed < 10 and not some.resident_weights and not some.offload_activations
    assert little.recomputed > some.recomputed and not little.resident_weights
    assert least.recomputed >= 31 and least.offload_activations and least.offload_embeddings and least.workspace_bytes


@given(st.integers(2, 120))
def test_a_plan_keeps_within_memory_or_nothing_does(gib):
    plan = plan_memory(NEEDS, gib * GIB, UNDECIDED)
    leanest = plan_memory(NEEDS, 0, UNDECIDED)
    assert plan.step_bytes(NEEDS) <= max(gib * GIB, leanest.step_bytes(NEEDS))


@given(st.integers(2, 120), st.integers(1, 8), st.sampled_from([None, True, False]))
def test_experts_stay_unpacked_in_memory_that_nothing_else_needs(gib, layer_gib, resident):
    settings = StepSettings(resident_weights=resident)
    needs = replace(NEEDS, expert_layers=24, unpacked_bytes=layer_gib * GIB)
    plan, without = plan_memory(needs, gib * GIB, settings), plan_memory(NEEDS, gib * GIB, settings)
    assert replace(plan, unpacked_experts=0) == without
    if plan.unpacked_experts:
        assert plan.resident_weights and not plan.frees_activations
        assert plan.step_bytes(needs) <= gib * GIB
    elif without.resident_weights and not without.frees_activations:
        assert UNPACKED_SHARE * (gib * GIB - without.step_bytes(NEEDS)) < layer_gib * GIB


@given(st.integers(2, 40), st.floats(0.05, 1.0))
def test_smaller_micro_batches_never_need_more(gib, share):
    plan = plan_memory(NEEDS, gib * GIB, UNDECIDED)
    assert plan.step_bytes(NEEDS.for_share(share)) <= plan.step_bytes(NEEDS)


@given(st.integers(1, 120), st.integers(1, 120))
def test_more_memory_never_recomputes_more_where_weights_stay_packed(one, other):
    packed = StepSettings(resident_weights=False)  # keeping them dequantised may be worth a few layers
    low, high = (plan_memory(NEEDS, gib * GIB, packed) for gib in sorted((one, other)))
    assert high.recomputed <= low.recomputed


@given(st.integers(1, 120), st.integers(0, 32), st.booleans(), st.booleans(), st.booleans())
def test_what_was_asked_for_stands(gib, layers, activations, embeddings, resident):
    asked = StepSettings(
        gradient_checkpointing=str(layers),
        offload_activations=activations,
        offload_embeddings=embeddings,
        resident_weights=resident,
    )
    plan = plan_memory(NEEDS, gib * GIB, asked)
    assert (plan.recomputed, plan.offload_activations, plan.offload_embeddings, plan.resident_weights) == (
        layers,
        activations,
        embeddings,
        resident,
    )


def test_embeddings_that_cannot_move_buy_nothing():
    fixed = replace(NEEDS, embedding_bytes=0)
    assert plan_memory(fixed, 5 * GIB, UNDECIDED).recomputed >= plan_memory(NEEDS, 5 * GIB, UNDECIDED).recomputed


LINKED = replace(
    NEEDS, seconds=LayerSeconds(0.03, 0.03), link_bytes_per_second=50e9, host_bytes=100 * GIB, kept_bytes=GIB // 8
)


def test_layers_wait_on_the_host_while_copies_hide_behind_the_others_and_are_recomputed_beyond():
    quick = plan_memory(LINKED, 5 * GIB, UNDECIDED)
    assert quick.sent > 0 and quick.recomputed == 0
    slow = plan_memory(replace(LINKED, link_bytes_per_second=2e8), 5 * GIB, UNDECIDED)
    assert 0 <= slow.sent < quick.sent and slow.recomputed > 0
    nothing = plan_memory(replace(LINKED, host_bytes=0), 5 * GIB, UNDECIDED)
    assert nothing.sent == 0 and nothing.recomputed > 0


def test_hidden_states_on_their_way_beside_a_sent_layer_are_counted():
    needs = replace(LINKED, kept_bytes=32 * NEEDS.hidden_bytes)
    plan = MemoryPlan(16, True, False, False, sent=16)
    less = replace(plan, offload_activations=False, recomputed=2).step_bytes(replace(needs, layers=18))
    assert plan.step_bytes(needs) - less == int((ROOM - 1) * needs.kept_bytes) - needs.hidden_bytes


def test_weights_that_a_larger_layer_unpacks_take_the_same_of_fewer_tokens():
    beyond = replace(NEEDS, peak_bytes=NEEDS.peak_bytes + GIB // 4, beyond_bytes=GIB // 4)
    assert beyond.for_share(0.25).peak_bytes - NEEDS.for_share(0.25).peak_bytes == GIB // 4


@pytest.mark.parametrize(("attended", "host", "kept"), [(2**25, 100, 32), (0, 100, 0), (2**25, 0, 0), (2**28, 3, 8)])
def test_attentions_results_are_kept_of_as_many_layers_as_the_host_has_room_for(attended, host, kept):
    needs = replace(NEEDS, attended_bytes=attended, host_bytes=host * GIB)
    settings = replace(UNDECIDED, tile_tokens=8192, offload_activations=True, gradient_checkpointing="on")
    plan = plan_memory(needs, 4 * GIB, settings)
    assert plan.recomputed == NEEDS.layers and plan.attention_kept == kept
    assert plan.sent_bytes(needs) <= needs.host_bytes or not kept
    assert ("attention's results" in ", ".join(plan.describe(32))) == (kept > 0)
    assert ("attention's results of 8 on" in ", ".join(plan.describe(32))) == (kept == 8)


def test_no_layer_waits_on_the_host_against_the_users_word():
    refused = plan_memory(LINKED, 5 * GIB, StepSettings(offload_activations=False))
    assert (refused.sent, refused.offload_activations) == (0, False)
    asked = plan_memory(LINKED, 5 * GIB, StepSettings(gradient_checkpointing="off", offload_activations=True))
    assert asked.sent == LINKED.layers


@given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 40))
def test_layers_that_keep_nothing_lie_evenly_below_the_last_and_the_sent_evenly_among_them(recomputed, sent, layers):
    recomputed = min(recomputed, layers)
    sent = min(sent, layers - recomputed)
    plan = MemoryPlan(recomputed, False, False, False, sent=sent)
    first, others = plan.numbers(layers)
    assert (len(first), len(others)) == (recomputed, sent) and not first & others
    away = sorted(first | others)
    whole = layers - len(away)
    assert not away or away[-1] < layers - min(whole, TOP_LAYERS)
    for places in (away, [away.index(number) for number in sorted(others)]):
        gaps = {b - a for a, b in pairwise(places)}
        assert not gaps or max(gaps) - min(gaps) <= 1


@given(st.integers(3, 40), st.integers(0, 2**31))
def test_gradients_lend_memory_to_the_last_layers_and_have_it_back_before_they_are_written(gib, gradient_bytes):
    needs = replace(NEEDS, gradient_bytes=gradient_bytes)
    plan = plan_memory(needs, gib * GIB, UNDECIDED)
    assert plan.cost(needs) <= plan_memory(NEEDS, gib * GIB, UNDECIDED).cost(NEEDS)
    lent, lenders = plan.lent_numbers(needs.layers), plan.lenders(list(range(needs.layers)))
    assert plan.lent * needs.kept_bytes <= len(lenders) * gradient_bytes
    if plan.step_bytes(needs) <= gib * GIB:
        assert plan.without_loan().step_bytes(needs) <= gib * GIB
    if plan.lent:
        away = set().union(*plan.numbers(needs.layers))
        assert max(lenders) < lent.start and len(lent) == plan.lent
        assert len(away | set(lent)) == plan.freed and lent.stop >= needs.layers - TOP_LAYERS


@given(st.floats(0.1, 1.0))
def test_time_of_smaller_micro_batches_keeps_what_does_not_grow(share):
    needs = replace(LINKED, fixed_seconds=LayerSeconds(0.01, 0.02)).for_share(share)
    assert needs.seconds.forward == pytest.approx(0.01 + share * 0.02)
    assert needs.seconds.backward == pytest.approx(0.02 + share * 0.01)
