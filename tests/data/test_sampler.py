"""The rows of each step: a pure function of its number, whatever was asked before."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_cli.core.data.sampler import BatchSampler, split_to_fit
from qlora_cli.core.distributed.process_group import ProcessGroup
from qlora_cli.errors import UsageError

LENGTHS = np.random.default_rng(0).integers(3, 50, 37).astype(np.int32)


def make(**changes) -> BatchSampler:
    arguments = {"batch_size": 2, "accumulation": 2, "packing": False, "max_length": 50, "seed": 3, "epochs": 1.0}
    return BatchSampler(LENGTHS, **({**arguments, "max_steps": None, "ranks": ProcessGroup()} | changes))


def rows_of(plan: BatchSampler, numbers) -> list[int]:
    return [row for number in numbers for batch in plan.step(number).micro_batches for row in batch]


@pytest.mark.parametrize("packing", [False, True])
def test_an_epoch_holds_every_row_once_and_the_next_in_another_order(packing):
    plan = make(epochs=2.0, packing=packing)
    end = plan.epoch_end(0)
    first, second = rows_of(plan, range(1, end + 1)), rows_of(plan, range(end + 1, plan.total_steps + 1))
    assert sorted(first) == sorted(second) == list(range(37)) and first != second


def test_a_step_is_the_same_when_asked_in_any_order():
    plan = make(epochs=3.0)
    forwards = [plan.step(number) for number in range(1, plan.total_steps + 1)]
    assert [make(epochs=3.0).step(number) for number in (29, 1, 15)] == [forwards[i - 1] for i in (29, 1, 15)]
    assert forwards[-1].epoch == 3.0 and forwards[0].epoch == pytest.approx(1 / plan.epoch_end(0))


def test_epochs_may_be_a_fraction_and_max_steps_go_beyond_them():
    whole = make().total_steps
    assert make(epochs=0.5).total_steps == round(whole / 2)
    assert make(epochs=2.25).total_steps == 2 * whole + round(whole / 4)
    assert make(epochs=0.001).total_steps == 1
    long = make(max_steps=3 * whole + 1)
    assert long.total_steps == 3 * whole + 1 and long.step(long.total_steps).micro_batches
    assert [n for n in range(3 * whole + 1) if long.ends_epoch(n)] == [whole, 2 * whole, 3 * whole]


def test_evaluated_steps_are_those_before_the_last():
    plan = make(epochs=2.5)
    ends = [plan.epoch_end(0), plan.epoch_end(1)]
    assert list(plan.evaluated_steps(None)) == ends and list(plan.evaluated_steps(7)) == [7, 14, 21]
    assert list(make(epochs=1.0).evaluated_steps(None)) == list(make(max_steps=7).evaluated_steps(7)) == []


def test_the_longest_micro_batches_are_of_the_steps_that_will_be_taken():
    plan = make()
    batches = [batch for number in range(1, plan.total_steps + 1) for batch in plan.step(number).micro_batches]
    longest = plan.longest_micro_batches()
    assert LENGTHS[longest[0]].sum() == max(LENGTHS[batch].sum() for batch in batches)
    assert len(longest[-1]) * LENGTHS[longest[-1]].max() == max(len(b) * LENGTHS[b].max() for b in batches)
    assert all(batch in make(max_steps=1).step(1).micro_batches for batch in make(max_steps=1).longest_micro_batches())


@given(st.integers(1, 200), st.integers(1, 37))
@settings(max_examples=30, deadline=None)
def test_splitting_keeps_every_row_and_the_limit(limit, rows):
    split = split_to_fit([list(range(rows))], LENGTHS, limit)
    assert sorted(row for batch in split for row in batch) == list(range(rows))
    assert all(len(batch) == 1 or LENGTHS[batch].sum() <= limit for batch in split)


@pytest.mark.parametrize("most_tokens", [1, 150, 10_000])
def test_joined_micro_batches_hold_a_steps_rows_in_their_order_and_no_more_tokens(most_tokens):
    plan, joined = make(accumulation=4), make(accumulation=4)
    joined.joined_tokens = most_tokens
    assert joined.digest() == plan.digest() and joined.largest_step_tokens() == plan.largest_step_tokens()
    for number in range(1, plan.total_steps + 1):
        whole, found = plan.step(number).micro_batches, joined.step(number).micro_batches
        assert [row for batch in found for row in batch] == [row for batch in whole for row in batch]
        assert all(batch in whole or LENGTHS[batch].sum() <= most_tokens for batch in found)
        assert len(found) == (1 if most_tokens == 10_000 else len(whole) if most_tokens == 1 else len(found))
    assert LENGTHS[joined.longest_micro_batches()[0]].sum() >= LENGTHS[plan.longest_micro_batches()[0]].sum()


def test_a_step_that_cannot_be_shared_evenly_is_refused_with_the_setting_that_can():
    with pytest.raises(UsageError) as refused:
        make(ranks=ProcessGroup(0, 3))
    assert refused.value.hint == "Use --gradient-accumulation-steps 3."


def test_all_ranks_try_the_same_longest_micro_batches():
    assert (
        make(ranks=ProcessGroup(0, 2)).longest_micro_batches() == make(ranks=ProcessGroup(1, 2)).longest_micro_batches()
    )
