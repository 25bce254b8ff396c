"""Learning-rate schedule: the rate of any step as a pure function, with no state to save."""

import math
from collections.abc import Callable

import torch
from transformers import get_scheduler

LOWEST_SHARE = 0.1  # of the peak, where cosine_with_min_lr ends
FAR_OFF = 50  # times a usual rate, or as small a share of it: a wrong exponent, rather than a choice


def count_warmup_steps(warmup_steps: int | None, warmup_ratio: float, total_steps: int) -> int:
    """Warm-up steps: `warmup_steps` where given, else the share `warmup_ratio` of `total_steps`, rounded up."""
    wanted = math.ceil(warmup_ratio * total_steps) if warmup_steps is None else warmup_steps
    return min(wanted, total_steps)


def advise_on_rate(rate: float, usual: float, optimizer: str | None) -> str | None:
    """What to say of a peak learning rate that is far from the `usual` one; None where it is near, or where the steps of the
    optimizer are as large as the gradients."""
    if optimizer == "sgd" or usual / FAR_OFF <= rate <= usual * FAR_OFF:
        return None
    fault = "at it training mostly diverges" if rate > usual else "it changes next to nothing"
    return f"--learning-rate {rate:g} is far from the {usual:g} that is usual for this base: {fault}."


def learning_rate_schedule(name: str, *, peak: float, warmup_steps: int, total_steps: int) -> Callable[[int], float]:
    """The learning rate of optimizer step 1, 2, … `total_steps`, shaped as transformers' schedule of that name.

    transformers gives the first step of a warm-up a rate of 0, which trains nothing. Here step k of the warm-up has
    k / warmup_steps of the peak, and the decay begins after it: no step is wasted at either end.
    `name` is one of `config.SCHEDULERS`; "constant" has no warm-up.
    """
    # Only the shape is wanted, a function of the step; the optimizer that transformers asks for carries the peak.
    carrier = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak)
    specific = {"cosine_with_min_lr": {"min_lr_rate": LOWEST_SHARE}, "polynomial": {"lr_end": min(1e-7, peak / 10)}}
    shape = get_scheduler(name, carrier, warmup_steps, total_steps, specific.get(name)).lr_lambdas[0]
    return lambda step: peak * shape(step if step <= warmup_steps else step - 1)
