"""Learning-rate schedules: no wasted step, transformers' shapes, no state."""

import pytest
import torch
from transformers import get_scheduler

from qlora_cli.config import SCHEDULERS
from qlora_cli.core.training.lr_schedule import advise_on_rate, count_warmup_steps, learning_rate_schedule


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("warmup_steps", [0, 5])
def test_no_step_is_wasted_and_the_peak_is_reached(name, warmup_steps):
    rate = learning_rate_schedule(name, peak=2e-4, warmup_steps=warmup_steps, total_steps=40)
    rates = [rate(step) for step in range(1, 41)]
    assert min(rates) > 0 and max(rates) == pytest.approx(2e-4)
    if name != "constant":
        assert rates[: max(1, warmup_steps)] == pytest.approx(
            [2e-4 * (step + 1) / warmup_steps for step in range(warmup_steps)] or [2e-4]
        )
    assert [rate(step) for step in (7, 3, 40)] == [rates[6], rates[2], rates[39]]  # whatever is asked first


@pytest.mark.parametrize("name", SCHEDULERS)
def test_without_warm_up_it_is_transformers_schedule(name):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-3)
    specific = {"min_lr_rate": 0.1} if name == "cosine_with_min_lr" else None
    theirs = get_scheduler(name, optimizer, 0, 30, specific)
    ours = learning_rate_schedule(name, peak=1e-3, warmup_steps=0, total_steps=30)
    for step in range(1, 31):
        assert ours(step) == pytest.approx(theirs.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        theirs.step()


def test_warm_up_steps_come_from_the_number_or_the_share():
    assert count_warmup_steps(None, 0.03, 1000) == 30
    assert count_warmup_steps(None, 0.03, 20) == 1
    assert count_warmup_steps(2, 0.5, 20) == 2
    assert count_warmup_steps(0, 0.5, 20) == 0
    assert count_warmup_steps(50, 0.0, 20) == 20


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_lowest_rate_that_is_taken_has_every_schedule(name):
    assert learning_rate_schedule(name, peak=1e-9, warmup_steps=0, total_steps=4)(1) == pytest.approx(1e-9)


@pytest.mark.parametrize(
    ("rate", "optimizer", "said"),
    [
        (2e-4, None, None),
        (5e-3, "adamw", None),
        (1e-5, None, None),
        (2e-2, None, "mostly diverges"),
        (2e-9, "lion", "next to nothing"),
        (0.5, "sgd", None),
    ],
)
def test_a_rate_with_a_wrong_exponent_is_said(rate, optimizer, said):
    advice = advise_on_rate(rate, 2e-4, optimizer)
    assert said in advice if said else advice is None
