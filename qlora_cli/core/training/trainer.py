"""Trainer: the optimizer steps of a run, with its evaluations and checkpoints.

A step waits for the device once, where its loss and gradient norm are read: they decide whether the update is applied.
Whatever can be done while the device computes waits until it does: the next step's rows are read, the step before is
reported. From the end of that wait to the next step's first launch the device has only the update to do.
"""

import contextlib
import math
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass

from torch.optim import Optimizer

from qlora_cli.core.data.dataset import RowSubset
from qlora_cli.core.data.packing import MicroBatch
from qlora_cli.core.data.sampler import BatchSampler, Step
from qlora_cli.core.distributed.signals import StopRequest, stopping_on_signals
from qlora_cli.core.training.accumulation import Accumulation, ModelReplica, StepSums, read_sums, reserve_memory
from qlora_cli.core.training.evaluation import measure_loss
from qlora_cli.core.training.flat_parameters import TrainableParameters
from qlora_cli.core.training.optimizer import set_learning_rate, step_optimizer
from qlora_cli.core.training.progress import TrainerState
from qlora_cli.core.training.reporting import RunReporter, UntrainedAdapters, left_uncompiled
from qlora_cli.core.training.rng_state import (
    RandomState,
    capture_random_state,
    restore_random_state,
    undisturbed_random_state,
)
from qlora_cli.core.training.state import Checkpointing
from qlora_cli.errors import Interrupted, TrainingError, first_line
from qlora_cli.events import Caution, EvaluationLogged, Event, Notice, StepLogged
from qlora_cli.kernels.experts.operands import workspace
from qlora_cli.sizes import format_count

NONFINITE_STEPS_TOLERATED = 2  # in a row; one more ends the run
STRAINED_STEPS = 3  # in a row, in which the allocator ran against its limit: the first ones of a run may well
ROWS_NAMED = 20

Upcoming = tuple[Step, list[MicroBatch]] | None


@dataclass(frozen=True)
class TrainingData:
    """Rows that are trained on and held out, and which of them each step takes."""

    rows: RowSubset
    sampler: BatchSampler
    eval_rows: RowSubset  # may be empty
    eval_sampler: BatchSampler | None  # one epoch over `eval_rows`; None where there are none


@dataclass(frozen=True)
class Optimization:
    """How gradients become updates."""

    parameters: TrainableParameters
    optimizer: Optimizer  # over `parameters`
    unallocated_bytes: int  # of state that the optimizer has yet to allocate on the device
    learning_rate: Callable[[int], float]  # of step 1, 2, …
    max_grad_norm: float  # gradients are clipped to this norm; 0 leaves them
    scaled: bool  # whether the loss is scaled, for float16

    def update(self, rate: float, norm: float, scale: float) -> None:
        """Updates the parameters by their gradients, of `norm`, which were computed with a loss scaled by `scale`."""
        factor = 1 / scale
        if self.max_grad_norm > 0:
            factor *= min(1.0, self.max_grad_norm / (norm + 1e-6))
        if factor != 1:
            self.parameters.scale_gradients(factor)
        set_learning_rate(self.optimizer, rate)
        step_optimizer(self.optimizer)


@dataclass(kw_only=True, eq=False)
class Trainer:
    """The steps of one run."""

    replica: ModelReplica
    data: TrainingData
    optimization: Optimization
    eval_every: int | None  # steps; None for the end of each epoch
    patience: int | None  # evaluations without a lower loss, after which the run stops
    checkpointing: Checkpointing
    reporter: RunReporter
    state: TrainerState  # `TrainerState()` for a new run
    ask_samples: Callable[[int], list[Event]] | None = None  # answers to sample prompts, asked on the main rank
    sample_every: int | None = None  # steps; None for before the first and after the last alone

    def __post_init__(self) -> None:
        self.ranks = self.replica.ranks
        self.sampler = self.data.sampler
        self.device = self.optimization.parameters.device
        self.accumulation = Accumulation(self.replica, self.data.rows, self.optimization.parameters)
        self.stop = StopRequest()
        self.agreed_to_stop = False  # by all ranks, at the end of a step
        self.saved_step = self.state.step
        self.sampled_step = self.state.step or -1  # a run that goes on was asked before it was saved
        self.said_uncompiled = False
        self.untrained = UntrainedAdapters(self.optimization.parameters)
        self.reserved: object = None  # memory of the optimizer's state, until the first update
        self.strained_steps = 0  # in a row, see `_relieve_allocator`
        self.most_retries = math.inf  # a step, that another relief would be worth
        self.streak: list[Step] = []  # steps in a row without finite numbers
        self.before_streak: tuple[TrainerState, RandomState] | None = None
        self.random_state: RandomState = {}  # with which the step after `state.step` begins
        self.between_steps = True  # whether parameters, optimizer and `state` are all those after `state.step`
        self.saving = False

    def run(self) -> None:
        """Trains to the end of the plan, or until patience runs out.

        Raises:
            Interrupted: A signal came; the step was finished and saved.
            TrainingError: Non-finite numbers several steps in a row, or no memory for a single row.
            DiskFull: A checkpoint did not fit.
            Exception: Whatever else ended a step or a report, after the state before that step was saved.
        """
        self.replica.model.train()
        with stopping_on_signals() as self.stop:
            try:
                self._run()
                self.reporter.flush()
            except BaseException as error:
                self._save_last_good(error)
                raise

    def _run(self) -> None:
        upcoming: Upcoming = None
        if self.state.step < self.sampler.total_steps and not self.state.stopped_early:
            self.try_longest()
            upcoming = self._read_step(self.state.step + 1)
            self.random_state = capture_random_state(self.device)
        while True:
            if self._evaluation_due():
                self._evaluate()
            self._ask_samples()
            last = upcoming is None or self.state.stopped_early
            stopping = self._stopping()
            if last or stopping or self.state.step % self.checkpointing.every == 0:
                self._save_once()
            if stopping:
                raise Interrupted(
                    f"Stopped by a signal after step {self.state.step} of {self.sampler.total_steps}, which is saved.",
                    self.ranks.all_reduce_max(self.stop.signal_number or 0, self.device),
                    "Go on with the same command and --resume.",
                )
            if upcoming is None or last:
                return
            upcoming = self.take_step(*upcoming)

    # ------------------------------------------------------------ one step

    def take_step(self, step: Step, batches: list[MicroBatch]) -> Upcoming:
        """Takes one optimizer step; returns the next one, its rows read."""
        started = time.perf_counter()
        scaled, rate = self.optimization.scaled, self.optimization.learning_rate(step.number)
        following: Upcoming = None
        while True:
            scale = self.state.loss_scale.scale if scaled else 1.0
            pending = self.accumulation.accumulate(batches, scale=scale, stopping=self.stop.signal_number is not None)
            self.reporter.flush()  # while the device computes, as what follows
            if following is None and step.number < self.sampler.total_steps:
                following = self._read_step(step.number + 1)
            random_state_after = capture_random_state(self.device)
            sums = read_sums(pending)  # the step's one wait for the device
            loss, norm = sums.loss_sum / max(sums.trained_tokens, 1), sums.gradient_norm / scale
            if sums.out_of_memory:
                if not self.accumulation.reduce_memory():
                    self._set_limit(self.accumulation.halved_limit(f"in step {step.number}"))
                    following = None  # it was read by the old limit
            elif not (scaled and math.isfinite(loss) and not math.isfinite(norm) and self.state.loss_scale.lower()):
                break
            # Once more, with the same rows, order and random numbers.
            restore_random_state(self.random_state, self.device)
            batches = self.accumulation.read_batches(step.micro_batches, self.state.micro_batch_limit_tokens)
        if math.isfinite(loss) and math.isfinite(norm):
            if untrained := self.untrained.look(last=following is None):
                self.reporter.report(Caution(untrained))
            self.between_steps, self.reserved = False, None
            self.optimization.update(rate, norm, scale)
            self.streak = []
            if scaled:
                self.state.loss_scale.accept()
        else:
            self._skip_update(step)
        self.agreed_to_stop = sums.stopping
        self._advance(step, sums, loss, random_state_after)
        self._report_step(step, sums, loss, norm, rate, time.perf_counter() - started)
        self._relieve_allocator(sums.retries)
        if news := workspace.news():
            self.reporter.report(Notice(news))
        asked = self.accumulation.engine.compiled and not self.said_uncompiled
        if asked and (why := left_uncompiled()) is not None:
            self.said_uncompiled = True
            self.reporter.report(Notice(f"Parts of layers are not compiled, and slower than they could be: {why}."))
        if len(self.streak) > NONFINITE_STEPS_TOLERATED:
            self._give_up()
        return following

    def _read_step(self, number: int) -> Upcoming:
        step = self.sampler.step(number)
        return step, self.accumulation.read_batches(step.micro_batches, self.state.micro_batch_limit_tokens)

    def _advance(self, step: Step, sums: StepSums, loss: float, random_state: RandomState) -> None:
        self.state.step = step.number
        self.state.tokens += sums.tokens
        if math.isfinite(loss):
            self.state.last_loss = loss
        self.random_state = random_state
        self.between_steps = True

    def _report_step(self, step: Step, sums: StepSums, loss: float, norm: float, rate: float, seconds: float) -> None:
        event = StepLogged(
            step=step.number,
            total_steps=self.sampler.total_steps,
            epoch=step.epoch,
            loss=loss,
            learning_rate=rate,
            grad_norm=norm,
            tokens=sums.tokens,
            step_seconds=seconds,
            tokens_per_second=sums.tokens / seconds,
            vram=sums.cards[self.ranks.rank] if sums.cards else None,
            cards=sums.cards,
        )
        self.reporter.report(event)

    # ------------------------------------------------------------ memory

    def try_longest(self) -> None:
        """Runs the longest micro-batches before the first step, so that what does not fit shows now."""
        limit = self.state.micro_batch_limit_tokens
        self.reserved = reserve_memory(self.optimization.unallocated_bytes, self.device)
        with undisturbed_random_state(self.device):
            while True:
                longest = self.sampler.longest_micro_batches(limit)
                found = self.accumulation.try_out(longest, limit)
                if found == limit:
                    break
                limit = found  # others than the halves may be the longest now
        if limit is not None and limit != self.state.micro_batch_limit_tokens:
            self._set_limit(limit)

    def _relieve_allocator(self, retries: int) -> None:
        """Has the engine give up memory where PyTorch's allocator ran against its limit, so often, in each of several steps:
        it then gives back all that it held in reserve and asks for it again, which holds steps up without a word."""
        self.strained_steps = self.strained_steps + 1 if retries else 0
        if self.strained_steps < STRAINED_STEPS or not self.most_retries:
            return
        self.strained_steps, helps = 0, retries < self.most_retries
        self.most_retries = retries if helps else 0
        times = "once" if retries == 1 else f"{retries} times"
        slow = f"Steps are held up: in each of the last {STRAINED_STEPS} PyTorch's allocator ran against its limit, {times} in this one"
        if helps and self.accumulation.relieve_allocators():
            self.reporter.report(Notice(f"{slow}. The engine takes less memory from here on."))
            return
        self.most_retries = 0
        why = "there is nothing left to give up" if helps else "giving up more did not help"
        advice = "Give more memory with --vram and go on with --resume, or lower --batch-size or --max-length (--allow-changes)."
        self.reporter.report(Caution(f"{slow}, and {why}. {advice}"))

    def _set_limit(self, tokens: int) -> None:
        self.state.micro_batch_limit_tokens = tokens
        self.reporter.report(
            Notice(
                f"Memory ran out: micro-batches hold at most {tokens:,} tokens from here on, in more accumulation "
                "steps; the batch of an optimizer step stays the same."
            )
        )

    # ------------------------------------------------------------ non-finite numbers

    def _skip_update(self, step: Step) -> None:
        if not self.streak:
            self.before_streak = deepcopy(self.state), self.random_state
        self.streak.append(step)
        self.reporter.report(Caution(f"Step {step.number}: the loss or a gradient is not finite; no update was made."))

    def _give_up(self) -> None:
        """Saves the state before the first of the steps without finite numbers, and ends the run."""
        assert self.before_streak is not None
        self.state, random_state = self.before_streak
        restore_random_state(random_state, self.device)
        self._save_once()
        taken = [i for step in self.streak for batch in step.micro_batches for i in batch]
        rows = sorted(self.data.rows.indices[taken].tolist())
        named = ", ".join(str(row) for row in rows[:ROWS_NAMED]) + (", …" if len(rows) > ROWS_NAMED else "")
        raise TrainingError(
            f"The loss or a gradient was not finite in steps {self.streak[0].number} to {self.streak[-1].number} "
            f"(rows {named}, counted from 0); the state before them is saved.",
            "Look at these rows, lower --learning-rate, or use --compute-dtype bfloat16; "
            "then go on with --resume --allow-changes.",
        )

    # ------------------------------------------------------------ evaluation

    def _evaluation_due(self) -> bool:
        step, every = self.state.step, self.eval_every
        if self.data.eval_sampler is None or step == 0 or self.state.evaluated_step == step:
            return False
        if step == self.sampler.total_steps:
            return True
        return step % every == 0 if every else self.sampler.ends_epoch(step)

    def _evaluate(self) -> None:
        """Measures the held-out loss. A signal breaks it off; then it is made up for after --resume."""
        state, data = self.state, self.data
        assert data.eval_sampler is not None
        self.reporter.flush()
        loss = measure_loss(
            self.replica, data.eval_rows, data.eval_sampler, device=self.device, stopping=self._agree_to_stop
        )
        if loss is None:
            return
        state.evaluated_step = state.step
        state.last_eval_loss = loss if math.isfinite(loss) else None
        better = math.isfinite(loss) and (state.best_loss is None or loss < state.best_loss)
        if better:
            state.best_loss, state.best_step, state.evaluations_since_best = loss, state.step, 0
        else:
            state.evaluations_since_best += 1
            state.stopped_early = state.step < self.sampler.total_steps and state.runs_out_of(self.patience)
        self.reporter.report(EvaluationLogged(state.step, loss, math.exp(loss) if loss < 700 else math.inf))
        if better and self.checkpointing.keep_best:
            self._save_once()
        if state.stopped_early:
            best = f" than that of step {state.best_step}" if state.best_step else ""
            vain = format_count(state.evaluations_since_best, "evaluation")
            self.reporter.report(Notice(f"Stopped at step {state.step}: {vain} without a lower loss{best}."))

    def _ask_samples(self) -> None:
        """Has the sample prompts answered where that is due; a signal comes first. At the end only where this adapter is kept."""
        step, best = self.state.step, self.state.best_step if self.checkpointing.keep_best else None
        at_end = (step == self.sampler.total_steps or self.state.stopped_early) and best in (None, step)
        due = step == 0 or at_end or (self.sample_every is not None and step % self.sample_every == 0)
        if self.ask_samples is None or not due or step == self.sampled_step or self.stop.signal_number is not None:
            return
        self.sampled_step = step
        for event in self.ask_samples(step):
            self.reporter.report(event)

    # ------------------------------------------------------------ saving and stopping

    def _save_once(self) -> None:
        """Writes a checkpoint of this moment unless it stands already, then prunes. Every rank takes part."""
        self.reporter.flush()
        if self.saved_step == self.state.step:
            return
        self._write(self.ranks.all_gather(capture_random_state(self.device), self.device))
        self.ranks.barrier()

    def _write(self, random_states: list[RandomState]) -> None:
        """Writes a checkpoint with the random states of these ranks, on the main rank."""
        if self.ranks.is_main:
            parameters, optimizer = self.optimization.parameters, self.optimization.optimizer
            self.saving = True
            event = self.checkpointing.write(self.state, parameters, optimizer, random_states)
            self.saving = False
        self.saved_step = self.state.step
        if self.ranks.is_main:
            self.reporter.report(event)

    def _save_last_good(self, error: BaseException) -> None:
        """Saves the state before what failed, unless it is saved, was just being saved, or is half updated.

        The main rank does it alone, since the others may be gone: their random states are drawn anew on resuming.
        """
        with contextlib.suppress(Exception):
            self.reporter.flush()  # the step that waits; what failed may be this very report
        unsaved = self.state.step != self.saved_step and self.between_steps and not self.saving
        if isinstance(error, Interrupted) or not (self.ranks.is_main and unsaved and self.random_state):
            return
        try:
            self._write([self.random_state])
            saved = f"The state after step {self.state.step} is saved, before what failed."
            self.reporter.report(Caution(saved))
        except Exception as failure:
            with contextlib.suppress(Exception):
                step = self.state.step
                self.reporter.report(Caution(f"The state after step {step} cannot be saved: {first_line(failure)}."))

    def _stopping(self) -> bool:
        """Whether to stop before the next step: the same answer on all ranks, without an exchange of its own."""
        if self.ranks.world_size == 1:
            return self.stop.signal_number is not None
        return self.agreed_to_stop

    def _agree_to_stop(self) -> bool:
        """As `_stopping`, where the ranks have not just met."""
        self.agreed_to_stop = self.ranks.all_reduce_max(self.stop.signal_number or 0, self.device) > 0
        return self.agreed_to_stop
