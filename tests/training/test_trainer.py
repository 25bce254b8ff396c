"""The trainer: it continues bit for bit, never updates with what is not finite, and gives memory back by halving."""

import math
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch._dynamo.utils

from qlora_cli.core.storage.checkpoint import list_checkpoints, newest_valid
from qlora_cli.core.training import accumulation
from qlora_cli.core.training import trainer as trainer_module
from qlora_cli.core.training.state import REQUIRED_FILES
from qlora_cli.errors import Interrupted, TrainingError
from qlora_cli.events import Caution, CheckpointSaved, EvaluationLogged, Notice, StepLogged
from qlora_cli.settings.groups import OPTIMIZERS
from tests.conftest import most_slow

from .training_case import FaultyEngine, make_case


@pytest.fixture(scope="module")
def base(tiny_model):
    return tiny_model("llama", num_hidden_layers=1)


def same(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def interrupt_at(step: int):
    """An engine that is signalled while it computes the step after `step`."""

    def wrap(engine):
        seen = []

        def fault(call, batch, loss):
            seen.append(batch)
            if len(seen) == step:
                os.kill(os.getpid(), signal.SIGTERM)
            return loss

        return FaultyEngine(engine, fault)

    return wrap


# ---------------------------------------------------------------- what a step is


def test_loss_falls_and_every_number_is_reported(base, tmp_path):
    case = make_case(base, tmp_path, epochs=6, learning_rate=2e-2, dropout=0.0, target_modules=None)
    case.run()
    steps = case.reported(StepLogged)
    assert [s.step for s in steps] == list(range(1, 37))
    assert sum(s.loss for s in steps[-6:]) < 0.8 * sum(s.loss for s in steps[:6])
    lengths = case.trainer.data.rows.lengths
    assert sum(s.tokens for s in steps[:6]) == lengths.sum()  # one epoch, no padding counted
    assert all(s.vram is None and s.step_seconds > 0 and s.learning_rate > 0 for s in steps)


@pytest.mark.parametrize("stops", most_slow([False, True], [True]))
def test_steps_that_are_reported_late_are_reported_before_what_follows_them(base, tmp_path, stops):
    reported = []
    for late in (False, True):
        wrap = interrupt_at(14) if stops else (lambda engine: engine)
        case = make_case(
            base, tmp_path / str(late), eval_rows=3, eval_every=3, keep_best=True, wrap_engine=wrap, deferred=late
        )
        if stops:
            with pytest.raises(Interrupted):
                case.run()
        else:
            case.run()
        reported.append(
            [(type(event), getattr(event, "step", None), getattr(event, "loss", None)) for event in case.events]
        )
    assert reported[0] == reported[1]
    assert {StepLogged, CheckpointSaved, EvaluationLogged} <= {kind for kind, *_ in reported[0]}


def test_a_step_that_was_to_be_reported_late_is_reported_when_the_next_one_breaks(base, tmp_path):
    def fault(call, batch, loss):
        if call > 8:  # two of which were tried out before the first step
            raise RuntimeError("broken")
        return loss

    case = make_case(base, tmp_path, wrap_engine=lambda engine: FaultyEngine(engine, fault), deferred=True)
    with pytest.raises(RuntimeError, match="broken"):
        case.run()
    assert [event.step for event in case.reported(StepLogged)] == [1, 2, 3]


def test_the_loss_is_the_mean_over_the_trained_tokens_of_the_whole_step(base, tmp_path):
    """However its rows lie in micro-batches: same losses, norms and adapter within rounding."""
    whole = make_case(base, tmp_path / "a", dropout=0.0)
    cut = make_case(base, tmp_path / "b", dropout=0.0)
    cut.trainer.state.micro_batch_limit_tokens = 1  # single rows
    whole.run()
    cut.run()
    for a, b in zip(whole.reported(StepLogged), cut.reported(StepLogged), strict=True):
        assert (a.loss, a.grad_norm, a.tokens) == pytest.approx((b.loss, b.grad_norm, b.tokens), rel=2e-4)


def test_gradients_are_clipped_to_the_norm_and_0_turns_it_off(base, tmp_path):
    for limit, expected in ((1e-3, 1e-3), (0.0, None)):
        case = make_case(base, tmp_path / str(limit), max_grad_norm=limit, max_steps=1)
        case.run()
        norm = float(case.trainer.optimization.parameters.gradient_norm())
        reported = case.reported(StepLogged)[0].grad_norm
        assert norm == pytest.approx(expected if expected else reported, rel=1e-3) and reported > 1e-3


# ---------------------------------------------------------------- exact resume


@pytest.mark.parametrize("optimizer", most_slow(["adamw", "paged_adamw_8bit", "adafactor"], ["paged_adamw_8bit"]))
def test_an_interrupted_run_continues_bit_for_bit(base, tmp_path, optimizer):
    more = {"b_rate": 4.0, "noise_alpha": 5.0} if optimizer == "paged_adamw_8bit" else {}
    options = {"optimizer": optimizer, "eval_rows": 4, "eval_every": 3, "keep_best": True, **more}
    straight = make_case(base, tmp_path / "straight", **options)
    straight.run()
    stopped = make_case(base, tmp_path / "stopped", wrap_engine=interrupt_at(6), **options)
    with pytest.raises(Interrupted) as caught:
        stopped.run()
    assert caught.value.exit_code == 143
    resumed = make_case(base, tmp_path / "stopped", resume=True, **options)
    assert 0 < resumed.trainer.state.step < straight.trainer.state.step
    resumed.run()
    assert stopped.lines() + resumed.lines() == straight.lines()
    assert same(resumed.adapter, straight.adapter)
    assert resumed.trainer.state == straight.trainer.state


def test_every_optimizer_is_named_in_the_exact_resume_of_its_state():
    """The other optimizers' states are compared bit for bit in test_optimizer.py; none is left out."""
    from . import test_optimizer

    marks = test_optimizer.test_a_state_saved_and_loaded_continues_bit_for_bit.pytestmark
    assert any(mark.args[:2] == ("name", OPTIMIZERS) for mark in marks)


def test_a_finished_run_resumes_to_itself(base, tmp_path):
    case = make_case(base, tmp_path)
    case.run()
    again = make_case(base, tmp_path, resume=True)
    again.run()
    assert again.events == [] and same(again.adapter, case.adapter)


def test_evaluating_in_between_changes_nothing(base, tmp_path):
    often = make_case(base, tmp_path / "often", eval_rows=4, eval_every=1)
    never = make_case(base, tmp_path / "never", eval_rows=4, eval_every=1000)
    never.trainer.data = replace(never.trainer.data, eval_sampler=None)
    often.run()
    never.run()
    assert len(often.reported(EvaluationLogged)) == often.trainer.sampler.total_steps
    assert same(often.adapter, never.adapter)
    assert [s.loss for s in often.reported(StepLogged)] == [s.loss for s in never.reported(StepLogged)]


def test_saving_in_between_changes_nothing(base, tmp_path):
    often, seldom = make_case(base, tmp_path / "a", save_every=1), make_case(base, tmp_path / "b", save_every=100)
    often.run()
    seldom.run()
    assert same(often.adapter, seldom.adapter)
    assert len(list_checkpoints(tmp_path / "a")) == 2 and len(list_checkpoints(tmp_path / "b")) == 1


# ---------------------------------------------------------------- evaluation


def test_evaluation_loss_is_the_mean_over_held_out_tokens_without_dropout(base, tmp_path):
    case = make_case(base, tmp_path, eval_rows=5, max_steps=3, dropout=0.5)
    case.run()
    (reported,) = case.reported(EvaluationLogged)
    case.model.eval()
    total, trained = 0.0, 0
    with torch.no_grad():
        for ids, flags in (case.trainer.data.eval_rows[i] for i in range(5)):
            logits = case.model(input_ids=torch.from_numpy(ids.astype("int64"))[None]).logits[0].double()
            picked = logits.log_softmax(-1)[:-1].gather(1, torch.from_numpy(ids[1:].astype("int64"))[:, None])[:, 0]
            total -= picked[torch.from_numpy(flags[1:])].sum().item()
            trained += int(flags[1:].sum())
    assert reported.eval_loss == pytest.approx(total / trained, rel=1e-5)
    assert reported.perplexity == pytest.approx(math.exp(reported.eval_loss))


def test_patience_ends_the_run_and_the_best_checkpoint_is_kept(base, tmp_path):
    case = make_case(
        base, tmp_path, eval_rows=4, eval_every=1, patience=2, keep_best=True, keep=1, epochs=40, learning_rate=0.2
    )
    case.run()
    state = case.trainer.state
    evaluations = [e.eval_loss for e in case.reported(EvaluationLogged)]
    assert state.stopped_early and state.step < case.trainer.sampler.total_steps
    assert min(evaluations) == evaluations[state.best_step - 1] == state.best_loss
    assert state.step == state.best_step + 2
    steps = [int(path.name[5:]) for path in list_checkpoints(tmp_path)]
    assert steps == [state.best_step, state.step]
    resumed = make_case(
        base, tmp_path, eval_rows=4, eval_every=1, patience=2, keep_best=True, keep=1, epochs=40, resume=True
    )
    resumed.run()
    assert resumed.events == []


def test_an_evaluation_that_is_not_finite_is_never_the_best(base, tmp_path):
    def fault(call, batch, loss):
        return loss if loss.requires_grad else loss * torch.nan

    options = {"eval_rows": 4, "eval_every": 1, "keep_best": True, "patience": 3}
    case = make_case(base, tmp_path, wrap_engine=lambda e: FaultyEngine(e, fault), **options).run()
    assert case.trainer.state.best_step is None and case.trainer.state.step == 3
    assert all(math.isnan(e.eval_loss) for e in case.reported(EvaluationLogged))
    assert make_case(base, tmp_path, resume=True, **options).run().events == []


# ---------------------------------------------------------------- numbers that are not finite


def nan_in_steps(base, root, steps: range, *, gradient_only: bool = False):
    """An engine whose numbers are not finite for the rows of these steps of the first epoch."""
    plan = make_case(base, root).trainer.sampler
    rows = {row for number in steps for batch in plan.step(number).micro_batches for row in batch}

    def fault(call, batch, loss):
        return poison(loss, gradient_only) if rows & set(batch.row_indices) else loss

    return lambda engine: FaultyEngine(engine, fault)


def poison(loss: torch.Tensor, gradient_only: bool) -> torch.Tensor:
    if not gradient_only:
        return loss * torch.nan
    loss.register_hook(lambda gradient: gradient * torch.nan)
    return loss


@pytest.mark.parametrize("gradient_only", [False, True])
def test_what_is_not_finite_makes_no_update_and_training_goes_on(base, tmp_path, gradient_only):
    wrap = nan_in_steps(base, tmp_path, range(3, 5), gradient_only=gradient_only)
    after = {}
    case = make_case(
        base,
        tmp_path,
        wrap_engine=wrap,
        max_steps=6,
        on_step=lambda event: after.update({event.step: case.adapter}),
    )
    case.run()
    assert same(after[2], after[3]) and same(after[3], after[4])
    assert not same(after[1], after[2]) and not same(after[4], after[5])
    steps = case.reported(StepLogged)
    assert [math.isnan(s.grad_norm) for s in steps] == [s.step in (3, 4) for s in steps]
    assert [math.isnan(s.loss) for s in steps] == [s.step in (3, 4) and not gradient_only for s in steps]
    assert '"grad_norm": null' in case.lines()[2]
    assert [caution.text for caution in case.reported(Caution)] == [
        f"Step {step}: the loss or a gradient is not finite; no update was made." for step in (3, 4)
    ]
    assert case.trainer.state.step == 6


def test_several_in_a_row_end_the_run_with_the_last_finite_state_saved(base, tmp_path):
    options = {"save_every": 1, "keep": 100, "max_steps": 6}
    straight = make_case(base, tmp_path / "straight", **options).run()
    wrap = nan_in_steps(base, tmp_path, range(3, 7))
    case = make_case(base, tmp_path / "bad", wrap_engine=wrap, **options)
    with pytest.raises(TrainingError, match="steps 3 to 5") as caught:
        case.run()
    assert "--resume" in caught.value.hint
    rows = [row for number in (3, 4, 5) for batch in case.trainer.sampler.step(number).micro_batches for row in batch]
    named = ", ".join(str(row) for row in sorted(case.trainer.data.rows.indices[rows].tolist()))
    assert f"rows {named}," in caught.value.message
    found, skipped = newest_valid(tmp_path / "bad", REQUIRED_FILES)
    assert found.step == 2 and not skipped
    resumed = make_case(base, tmp_path / "bad", resume=True, **options).run()  # the fault is mended
    assert same(resumed.adapter, straight.adapter)


# ---------------------------------------------------------------- loss scaling


class OverflowingEngine(FaultyEngine):
    """Gradients overflow, as in float16, while the loss is scaled by more than `limit`."""

    def __init__(self, engine, limit: float) -> None:
        super().__init__(engine, self.overflow)
        self.limit = limit

    def overflow(self, call, batch, loss):
        loss.register_hook(lambda g: g * torch.inf if float(g) * batch.trained_tokens > self.limit else g)
        return loss


def test_a_loss_scale_that_overflows_is_lowered_and_the_step_repeated(base, tmp_path):
    case = make_case(base, tmp_path / "scaled", scaled=True, wrap_engine=lambda e: OverflowingEngine(e, 5000.0))
    case.run()
    assert case.trainer.state.loss_scale.scale == 4096.0
    assert 0 < case.trainer.state.loss_scale.good_steps <= case.trainer.sampler.total_steps
    assert not case.reported(Caution)
    unscaled = make_case(base, tmp_path / "unscaled")
    unscaled.run()
    assert case.lines() == unscaled.lines() and same(case.adapter, unscaled.adapter)  # scales are powers of two


def test_with_a_scale_of_one_an_overflow_is_a_fault(base, tmp_path):
    case = make_case(base, tmp_path, scaled=True, wrap_engine=lambda e: OverflowingEngine(e, 0.0))
    with pytest.raises(TrainingError, match="not finite"):
        case.run()


def test_float16_arithmetic_trains_on_the_cpu(base, tmp_path):
    case = make_case(base, tmp_path, scaled=True, compute_dtype=torch.float16, max_steps=4)
    case.run()
    assert all(math.isfinite(s.loss) and math.isfinite(s.grad_norm) for s in case.reported(StepLogged))


# ---------------------------------------------------------------- memory


CUBLAS = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")


def out_of_memory_above(tokens: int, seen: list[int], *, from_call: int = 0, in_backward: bool = False):
    def fault(call, batch, loss):
        if batch.tokens <= tokens or call < from_call:
            seen.append(batch.tokens)
            return loss
        if not in_backward:
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")

        def fail(gradient):
            raise CUBLAS

        loss.register_hook(fail)
        return loss

    return lambda engine: FaultyEngine(engine, fault)


@pytest.mark.parametrize("in_backward", most_slow([False, True], [True]))
def test_memory_that_runs_out_midway_halves_the_micro_batch_and_nothing_else(base, tmp_path, in_backward):
    straight = make_case(base, tmp_path / "a", dropout=0.0)
    straight.run()
    seen: list[int] = []
    wrap = out_of_memory_above(50, seen, from_call=6, in_backward=in_backward)
    case = make_case(base, tmp_path / "b", dropout=0.0, wrap_engine=wrap)
    case.run()
    assert [s.step for s in case.reported(StepLogged)] == [s.step for s in straight.reported(StepLogged)]
    for a, b in zip(case.reported(StepLogged), straight.reported(StepLogged), strict=True):
        assert (a.loss, a.tokens) == pytest.approx((b.loss, b.tokens), rel=1e-3)
    assert max(seen[6:]) <= 50 < max(seen[:6])
    notices = [n.text for n in case.reported(Notice)]
    assert len(notices) == 1 and "Memory ran out" in notices[0] and "stays the same" in notices[0]


def test_what_the_compiler_leaves_of_layers_is_said_once(base, tmp_path, monkeypatch):
    reason = "HOP: Unsafe side effect\n  Explanation: Mutating a variable from outside"
    monkeypatch.setitem(torch._dynamo.utils.counters, "graph_break", {reason: 2})
    case = make_case(base, tmp_path)
    case.run()
    assert not case.reported(Notice)  # on a CPU none are compiled
    case = make_case(base, tmp_path / "compiled")
    case.trainer.accumulation.engine.compiled = True
    case.run()
    assert ["HOP: Unsafe side effect." in notice.text for notice in case.reported(Notice)] == [True]


@pytest.mark.parametrize(("steps", "until", "said"), [(1, 9, "1 step"), (4, 9, "3 steps"), (4, 2, None)])
def test_adapters_that_no_gradient_reaches_are_named_once(base, tmp_path, steps, until, said):
    name = "base_model.model.model.layers.0.self_attn.q_proj"

    def cut(engine):
        module = engine.model.get_submodule(name)
        module.register_forward_hook(lambda _, __, out: out.detach() if case.trainer.state.step < until else out)
        return engine

    case = make_case(base, tmp_path, wrap_engine=cut, max_steps=steps)
    cautions = [event.text for event in case.run().reported(Caution)]
    told = f"1 adapter (self_attn.q_proj) got no gradient in {said}: it is not trained. "
    assert cautions == ([f"{told}--exclude-modules leaves it out."] if said else [])
    assert case.adapter[f"{name}.lora_B.weight"].any() == (said is None)


def test_the_longest_rows_are_tried_before_the_first_step_and_leave_no_trace(base, tmp_path):
    seen: list[int] = []
    case = make_case(base, tmp_path / "a", wrap_engine=out_of_memory_above(45, seen))
    case.run()
    first_step = next(i for i, event in enumerate(case.events) if isinstance(event, StepLogged))
    assert any(isinstance(event, Notice) for event in case.events[:first_step])
    assert not any(isinstance(event, Notice) for event in case.events[first_step:])
    assert max(seen) <= 45
    untried = make_case(base, tmp_path / "b")
    untried.trainer.state.micro_batch_limit_tokens = case.trainer.state.micro_batch_limit_tokens
    untried.trainer.try_longest = lambda: None
    untried.run()
    assert case.lines() == untried.lines() and same(case.adapter, untried.adapter)


def test_memory_of_the_optimizers_state_is_held_until_its_first_update(base, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(trainer_module, "reserve_memory", lambda *given: asked.append(given) or "memory")
    case, held = make_case(base, tmp_path / "a"), []
    case.trainer.optimization = replace(case.trainer.optimization, unallocated_bytes=1234)
    accumulate = case.trainer.accumulation.accumulate
    case.trainer.accumulation.accumulate = lambda *given, **named: (
        held.append(case.trainer.reserved),
        accumulate(*given, **named),
    )[1]
    case.run()
    steps = len(case.reported(StepLogged))
    assert asked == [(1234, case.trainer.device)] and steps > 2
    assert held[-steps:] == ["memory"] + [None] * (steps - 1) and set(held[:-steps]) == {"memory"}


def test_memory_that_the_optimizers_state_does_not_find_is_said_before_the_first_step(monkeypatch):
    def full(bytes_, **where):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch, "empty", full)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 8 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda index: 1.0)
    with pytest.raises(TrainingError, match=r"optimizer's state, 3.00 GiB. Other processes hold some 70.0 GiB"):
        accumulation.reserve_memory(3 * 2**30, torch.device("cuda", 0))


def test_a_resumed_run_keeps_the_smaller_micro_batches(base, tmp_path):
    wrap = out_of_memory_above(45, [])
    case = make_case(base, tmp_path / "a", wrap_engine=wrap)
    case.run()
    part = make_case(base, tmp_path / "b", wrap_engine=lambda e: interrupt_at(12)(wrap(e)))
    with pytest.raises(Interrupted):
        part.run()
    rest = make_case(base, tmp_path / "b", resume=True, wrap_engine=wrap)
    rest.run()
    assert not rest.reported(Notice) and same(rest.adapter, case.adapter)


def test_a_single_row_that_does_not_fit_ends_the_run_with_what_to_do(base, tmp_path):
    case = make_case(base, tmp_path, wrap_engine=out_of_memory_above(10, []))
    with pytest.raises(TrainingError, match="for a single row of") as caught:
        case.run()
    assert "--max-length" in caught.value.hint


@pytest.mark.parametrize(
    ("retries", "left", "asked", "said"),
    [([5, 2, 0], 9, 2, [Notice, Notice]), ([3, 3], 9, 1, [Notice, Caution]), ([4], 0, 1, [Caution])],
    ids=["helps", "in vain", "none left"],
)
def test_an_allocator_that_runs_against_its_limit_step_after_step_has_memory_given_up(
    base, tmp_path, monkeypatch, retries, left, asked, said
):
    """`retries`: a step, after so many reliefs; `left`: reliefs that the engine has."""
    total, reliefs = 0, 0

    def count(_):
        nonlocal total
        total += retries[min(reliefs, len(retries) - 1)]
        return total

    class Relieved(FaultyEngine):
        def reduce_memory(self):
            nonlocal reliefs
            reliefs += 1
            return reliefs <= left

    straight = make_case(base, tmp_path / "a")
    straight.run()
    monkeypatch.setattr(accumulation, "count_retries", count)
    case = make_case(base, tmp_path / "b", wrap_engine=lambda e: Relieved(e, lambda call, batch, loss: loss))
    case.run()
    assert case.lines() == straight.lines() and same(case.adapter, straight.adapter)
    told = [type(event) for event in case.events if isinstance(event, Notice | Caution) and "held up" in event.text]
    assert (reliefs, told) == (asked, said)


def test_any_other_failure_of_the_device_is_raised_as_it_is(base, tmp_path):
    def fault(call, batch, loss):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        make_case(base, tmp_path, wrap_engine=lambda e: FaultyEngine(e, fault)).run()


def test_evaluation_that_runs_out_of_memory_goes_on_in_halves(base, tmp_path):
    def fault(call, batch, loss):
        if not loss.requires_grad and len(batch.row_indices) > 1:
            raise torch.OutOfMemoryError("injected")
        return loss

    options = {"eval_rows": 6, "max_steps": 2, "batch_size": 3}
    case = make_case(base, tmp_path / "a", wrap_engine=lambda e: FaultyEngine(e, fault), **options)
    whole = make_case(base, tmp_path / "b", **options)
    case.run()
    whole.run()
    a, b = (c.reported(EvaluationLogged)[0].eval_loss for c in (case, whole))
    assert a == pytest.approx(b, rel=1e-5)


# ---------------------------------------------------------------- signals


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_in_hand_and_saves_it(base, tmp_path, number, code):
    case = make_case(
        base, tmp_path, save_every=100, on_step=lambda event: event.step == 3 and os.kill(os.getpid(), number)
    )
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(Interrupted) as caught:
        case.run()
    assert caught.value.exit_code == code and "--resume" in caught.value.hint
    assert [c.step for c in case.reported(CheckpointSaved)] == [3] and case.reported(StepLogged)[-1].step == 3
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_signal_in_an_evaluation_breaks_it_off_and_it_is_made_up_for(base, tmp_path):
    options = {"eval_rows": 6, "eval_every": 3, "patience": 50}
    straight = make_case(base, tmp_path / "a", **options)
    straight.run()

    def fault(call, batch, loss):
        if not loss.requires_grad:
            os.kill(os.getpid(), signal.SIGINT)
        return loss

    case = make_case(base, tmp_path / "b", wrap_engine=lambda e: FaultyEngine(e, fault), **options)
    with pytest.raises(Interrupted):
        case.run()
    assert case.reported(StepLogged)[-1].step == 3 and not case.reported(EvaluationLogged)
    rest = make_case(base, tmp_path / "b", resume=True, **options)
    rest.run()
    assert case.lines() + rest.lines() == straight.lines() and same(rest.adapter, straight.adapter)


SIGNALS = """
import os, signal, sys
from qlora_cli.core.distributed.signals import stopping_on_signals
first, second, seconds = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
with stopping_on_signals(again_seconds=seconds) as request:
    os.kill(os.getpid(), first)
    os.kill(os.getpid(), second)
    print(request.signal_number)
"""
ONCE = 100.0  # seconds within which a second SIGINT is the same request


@pytest.mark.parametrize(
    ("first", "second", "seconds", "code"),
    [
        (signal.SIGINT, signal.SIGINT, 0.0, 130),  # typed again
        (signal.SIGINT, signal.SIGINT, ONCE, 0),  # sent to the group and passed on
        (signal.SIGTERM, signal.SIGTERM, 0.0, 0),
        (signal.SIGTERM, signal.SIGINT, 0.0, 0),
        (signal.SIGUSR1, signal.SIGHUP, 0.0, 0),
    ],
)
def test_only_a_second_ctrl_c_ends_the_process_at_once(first, second, seconds, code):
    done = subprocess.run([sys.executable, "-c", SIGNALS, *map(str, (int(first), int(second), seconds))], stdout=-1)
    assert (done.returncode, done.stdout.decode().split()) == (code, [] if code else [str(int(first))])


CAUGHT = """
import os, signal
from qlora_cli.core.distributed.signals import stopping_on_signals
signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
signal.signal(signal.SIGQUIT, signal.SIG_DFL)  # which a shell in the background ignores
for number in sorted(signal.valid_signals()):
    with stopping_on_signals() as request:
        if number not in (signal.SIGKILL, signal.SIGSTOP):
            if signal.getsignal(number) not in (signal.SIG_DFL, signal.SIG_IGN):
                os.kill(os.getpid(), number)
                assert request.signal_number == number
                print(signal.Signals(number).name if number < 34 else "real-time", end=" ")
"""


def test_every_signal_that_would_end_a_run_stops_it_and_what_was_ignored_stays_so():
    done = subprocess.run([sys.executable, "-c", CAUGHT], stdout=-1, text=True, check=True)
    names = done.stdout.split()
    assert {"SIGINT", "SIGTERM", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGALRM", "SIGPROF", "SIGPWR"} <= {*names}
    assert not {"SIGHUP", "SIGCHLD", "SIGTSTP", "SIGSEGV", "SIGWINCH"} & {*names} and names.count("real-time") > 20


# ---------------------------------------------------------------- what fails in the middle


class ReportFailed(Exception):
    """Whatever a report may raise."""


@pytest.mark.parametrize(
    ("where", "deferred"),
    most_slow([("forward", True), ("evaluation", False), ("step report", True), ("rows", False)], [("forward", True)]),
)
def test_what_fails_in_a_step_is_raised_after_the_state_before_it_is_saved(base, tmp_path, where, deferred):
    options = {"eval_rows": 6, "eval_every": 3, "save_every": 100, "deferred": deferred}
    straight = make_case(base, tmp_path / "a", **options).run()

    def fault(call, batch, loss):
        if where == ("forward" if loss.requires_grad else "evaluation") and case.trainer.state.step == 3:
            raise ReportFailed
        return loss

    def fail_at_three(event):
        if where == "step report" and event.step == 3:
            raise ReportFailed

    case = make_case(
        base, tmp_path / "b", wrap_engine=lambda e: FaultyEngine(e, fault), on_step=fail_at_three, **options
    )
    if where == "rows":
        read = case.trainer.accumulation.read_batches
        case.trainer.accumulation.read_batches = lambda *a: fail() if case.trainer.state.step == 3 else read(*a)

    def fail():
        raise ReportFailed

    with pytest.raises(ReportFailed):
        case.run()
    (saved,) = case.reported(CheckpointSaved)
    assert "is saved" in case.reported(Caution)[-1].text
    rest = make_case(base, tmp_path / "b", resume=True, **options).run()
    assert rest.reported(StepLogged)[0].step == saved.step + 1 and saved.step in (3, 4)
    assert same(rest.adapter, straight.adapter)
    both = [line for line in case.lines() + rest.lines() if "eval" not in line or where != "evaluation"]
    assert set(rest.lines()) <= set(straight.lines()) and len(both) == len(set(both))


def test_what_fails_in_a_save_or_in_an_update_is_not_saved_as_if_it_were_whole(base, tmp_path):
    case = make_case(base, tmp_path / "update", save_every=100)
    case.trainer.optimization.optimizer.step = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        case.run()
    assert not list_checkpoints(tmp_path / "update")
    case = make_case(base, tmp_path / "save", save_every=2)
    tried = []
    case.trainer.checkpointing = replace(case.trainer.checkpointing, save_adapter=lambda path: tried.append(1) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        case.run()
    assert len(tried) == 1
