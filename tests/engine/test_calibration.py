"""Steps are planned within the host's memory too, for every number of tokens, and leaner each time memory runs out."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_cli.core.engine.calibration import StepPlanner
from qlora_cli.core.engine.memory_plan import LayerSeconds, StepNeeds
from qlora_cli.settings.groups import StepSettings
from tests.engine.test_engine import adapted, install

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


@pytest.mark.parametrize("architecture", ["opt", "gpt2", "llama"])
def test_trials_of_many_tokens_stay_within_the_positions_a_model_has(load_tiny, architecture):
    engine = install(adapted(load_tiny, architecture))
    lengths = engine.trials.rows_of(1300)
    assert 1300 <= sum(lengths) < 1300 + len(lengths) and max(lengths) <= 512
    engine.trials.run(lengths)
    engine.close()
