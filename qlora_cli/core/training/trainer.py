"""A model in an engine, rows and an optimizer in; trained parameters, metrics and checkpoints out.

A step waits for the device once, where its loss and gradient norm are read: they decide whether the update is applied.
Whatever can be done while the device computes waits until it does: the next step's rows are laid out, the step before is
told. From the end of that wait to the next step's first launch the device has only the update to do.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from qlora_cli.core.data.packing import MicroBatch
from qlora_cli.core.data.sampler import BatchSampler, Step
from qlora_cli.core.data.split import RowSubset
from qlora_cli.core.distributed.process_group import ProcessGroup
from qlora_cli.core.distributed.signals import StopRequest, stopping_on_signals
from qlora_cli.core.engine.engine import Engine
from qlora_cli.core.storage.checkpoint import prune, write_checkpoint
from qlora_cli.core.training.accumulation import Accumulation, StepSums, read_sums
from qlora_cli.core.training.evaluation import measure_loss
from qlora_cli.core.training.flat_parameters import TrainableParameters
from qlora_cli.core.training.optimizer import set_learning_rate, step_optimizer
from qlora_cli.core.training.rng_state import (
    RandomState,
    capture_random_state,
    restore_random_state,
    undisturbed_random_state,
)
from qlora_cli.core.training.state import TrainerState, write_state
from qlora_cli.errors import Interrupted, TrainingError
from qlora_cli.events import Caution, CheckpointSaved, EvaluationLogged, Notice, Report, StepLogged

NONFINITE_STEPS_TOLERATED = 2  # in a row; one more ends the run
ROWS_NAMED = 20

Upcoming = tuple[Step, list[MicroBatch]] | None


@dataclass(frozen=True)
class TrainerSchedule:
    """When a run evaluates, saves and stops."""

    eval_every: int | None  # steps; None for the end of each epoch
    save_every: int
    keep: int
    keep_best: bool
    patience: int | None


@dataclass(frozen=True)
class Checkpointing:
    """Where and how checkpoints are written."""

    root: Path
    identity: dict[str, Any]
    save_adapter: Callable[[Path], None]
    needed_bytes: int


class Trainer:
    """The steps of one run.

    Args:
        model: What the engine computes with; switched between training and evaluation.
        engine: Losses of micro-batches.
        rows: Trained on.
        eval_rows: Held out; may be empty.
        plan: Rows of each step.
        eval_plan: One epoch over `eval_rows`; None when there are none.
        parameters: What is trained.
        optimizer: Over `parameters`.
        optimizer_bytes: Of state that the optimizer has yet to allocate on the device.
        learning_rate: Of step 1, 2, …
        max_grad_norm: Gradients are clipped to this norm; 0 leaves them.
        scaled: Whether the loss is scaled, for float16.
        cadence: When to evaluate, save and stop.
        saving: Where checkpoints go.
        progress: Where the run stands; `TrainerState()` for a new one.
        ranks: This process among those of the run.
        lockstep: Whether all ranks have to run equally many micro-batches.
        report: Receives events, on the main rank only.
        log: Receives each step and evaluation before `report` does, on the main rank only.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        engine: Engine,
        rows: RowSubset,
        eval_rows: RowSubset,
        plan: BatchSampler,
        eval_plan: BatchSampler | None,
        parameters: TrainableParameters,
        optimizer: Optimizer,
        optimizer_bytes: int,
        learning_rate: Callable[[int], float],
        max_grad_norm: float,
        scaled: bool,
        schedule: TrainerSchedule,
        saving: Checkpointing,
        progress: TrainerState,
        ranks: ProcessGroup,
        lockstep: bool,
        report: Report,
        log: Callable[[StepLogged | EvaluationLogged], None],
    ) -> None:
        self.model = model
        self.engine = engine
        self.rows = rows
        self.eval_rows = eval_rows
        self.plan = plan
        self.eval_plan = eval_plan
        self.parameters = parameters
        self.optimizer = optimizer
        self.optimizer_bytes = optimizer_bytes
        self.learning_rate = learning_rate
        self.max_grad_norm = max_grad_norm
        self.scaled = scaled
        self.schedule = schedule
        self.saving = saving
        self.progress = progress
        self.ranks = ranks
        self.lockstep = lockstep
        self.report = report
        self.log = log
        self.device = parameters.device
        self.accumulation = Accumulation(engine, rows, parameters, ranks, lockstep)
        self.stop = StopRequest()
        self.agreed_to_stop = False  # by all ranks, at the end of a step
        self.saved_step = progress.step
        self.streak: list[Step] = []  # steps in a row without finite numbers
        self.before_streak: tuple[TrainerState, RandomState] | None = None
        self.random_state: RandomState = {}  # with which the next step begins
        self.tells_late = self.device.type == "cuda"  # elsewhere launching the next step means computing it
        self.unreported: StepLogged | None = None  # the last step, where it is told late

    def run(self) -> None:
        """Trains to the end of the plan, or until patience runs out.

        Raises:
            Interrupted: A signal came; the step was finished and saved.
            TrainingError: Non-finite numbers several steps in a row, or no memory for a single row.
            DiskFull: A checkpoint did not fit.
        """
        self.model.train()
        with stopping_on_signals() as self.stop:
            try:
                self._run()
            finally:
                self._tell_last()

    def _run(self) -> None:
        upcoming: Upcoming = None
        if self._unfinished():
            self._try_longest()
            upcoming = self._lay_out(self.progress.step + 1)
            self.random_state = capture_random_state(self.device)
        while True:
            if self._evaluation_due():
                self._evaluate()
            last = upcoming is None or self.progress.stopped_early
            stopping = self._stopping()
            if last or stopping or self.progress.step % self.schedule.save_every == 0:
                self._save_once()
            if stopping:
                raise self._interrupted()
            if upcoming is None or last:
                return
            upcoming = self._take(*upcoming)

    # ------------------------------------------------------------ one step

    def _take(self, step: Step, batches: list[MicroBatch]) -> Upcoming:
        """Takes one optimizer step; returns the next one, laid out."""
        started = time.perf_counter()
        rate = self.learning_rate(step.number)
        random_state = self.random_state
        following: Upcoming = None
        while True:
            scale = self.progress.loss_scale.scale if self.scaled else 1.0
            pending = self.accumulation.accumulate(batches, scale=scale, stopping=self.stop.signal_number is not None)
            self._tell_last()  # while the device computes, as what follows
            if following is None and step.number < self.plan.total_steps:
                following = self._lay_out(step.number + 1)
            self.random_state = capture_random_state(self.device)
            sums = read_sums(pending)  # the step's one wait for the device
            loss, norm = sums.loss_sum / max(sums.trained_tokens, 1), sums.gradient_norm / scale
            if sums.out_of_memory:
                if not self.accumulation.reduce_memory():
                    self._set_limit(self.accumulation.halved_limit(f"in step {step.number}"))
                    following = None  # it was laid out by the old limit
            elif not (math.isfinite(loss) and self.scaled and not math.isfinite(norm) and self._lower_scale()):
                break
            # Once more, with the same rows, order and random numbers.
            restore_random_state(random_state, self.device)
            batches = self.accumulation.lay_out(step.micro_batches, self.progress.micro_batch_limit_tokens)
        if math.isfinite(loss) and math.isfinite(norm):
            self._update(rate, norm, scale)
        else:
            self._skip_update(step, random_state)
        self.agreed_to_stop = sums.stopping
        self._advance(step, sums, loss, norm, rate, time.perf_counter() - started)
        if len(self.streak) > NONFINITE_STEPS_TOLERATED:
            self._give_up()
        return following

    def _lay_out(self, number: int) -> Upcoming:
        step = self.plan.step(number)
        return step, self.accumulation.lay_out(step.micro_batches, self.progress.micro_batch_limit_tokens)

    def _update(self, rate: float, norm: float, scale: float) -> None:
        factor = 1 / scale
        if self.max_grad_norm > 0:
            factor *= min(1.0, self.max_grad_norm / (norm + 1e-6))
        if factor != 1:
            self.parameters.scale_gradients(factor)
        set_learning_rate(self.optimizer, rate)
        step_optimizer(self.optimizer)
        self.streak = []
        if self.scaled:
            self.progress.loss_scale.accept()

    def _lower_scale(self) -> bool:
        """Whether a lower loss scale may mend a gradient that is not finite."""
        return self.progress.loss_scale.lower()

    def _advance(self, step: Step, sums: StepSums, loss: float, norm: float, rate: float, seconds: float) -> None:
        self.progress.step = step.number
        self.progress.tokens += sums.tokens
        if math.isfinite(loss):
            self.progress.last_loss = loss
        self.unreported = StepLogged(
            step=step.number,
            total_steps=self.plan.total_steps,
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
        if not self.tells_late:
            self._tell_last()

    # ------------------------------------------------------------ memory

    def _try_longest(self) -> None:
        """Runs the longest micro-batches before the first step, so that what does not fit shows now."""
        limit = self.progress.micro_batch_limit_tokens
        with undisturbed_random_state(self.device):
            while True:
                longest = self.plan.longest_micro_batches(limit)
                found = self.accumulation.try_out(longest, limit, self.optimizer_bytes)
                if found == limit:
                    break
                limit = found  # others than the halves may be the longest now
        if limit is not None and limit != self.progress.micro_batch_limit_tokens:
            self._set_limit(limit)

    def _set_limit(self, tokens: int) -> None:
        self.progress.micro_batch_limit_tokens = tokens
        self._tell(
            Notice(
                f"Memory ran out: micro-batches hold at most {tokens:,} tokens from here on, in more accumulation "
                "steps; the batch of an optimizer step stays the same."
            )
        )

    # ------------------------------------------------------------ non-finite numbers

    def _skip_update(self, step: Step, random_state: RandomState) -> None:
        if not self.streak:
            self.before_streak = replace(self.progress, loss_scale=replace(self.progress.loss_scale)), random_state
        self.streak.append(step)
        self._tell(Caution(f"Step {step.number}: the loss or a gradient is not finite; no update was made."))

    def _give_up(self) -> None:
        """Saves the state before the first of the steps without finite numbers, and ends the run."""
        assert self.before_streak is not None
        self.progress, random_state = self.before_streak
        restore_random_state(random_state, self.device)
        self._save_once()
        rows = sorted(int(self.rows.indices[i]) for step in self.streak for batch in step.micro_batches for i in batch)
        named = ", ".join(str(row) for row in rows[:ROWS_NAMED]) + (", …" if len(rows) > ROWS_NAMED else "")
        raise TrainingError(
            f"The loss or a gradient was not finite in steps {self.streak[0].number} to {self.streak[-1].number} "
            f"(rows {named}, counted from 0); the state before them is saved.",
            "Look at these rows, lower --learning-rate, or use --compute-dtype bfloat16; "
            "then go on with --resume --allow-changes.",
        )

    # ------------------------------------------------------------ evaluation

    def _evaluation_due(self) -> bool:
        step, every = self.progress.step, self.schedule.eval_every
        if self.eval_plan is None or step == 0 or self.progress.evaluated_step == step:
            return False
        if step == self.plan.total_steps:
            return True
        return step % every == 0 if every else self.plan.ends_epoch(step)

    def _evaluate(self) -> None:
        """Measures the held-out loss. A signal breaks it off; then it is made up for after --resume."""
        assert self.eval_plan is not None
        self._tell_last()
        loss = measure_loss(
            self.model,
            self.engine,
            self.eval_rows,
            self.eval_plan,
            device=self.device,
            ranks=self.ranks,
            stopping=self._agree_to_stop,
            lockstep=self.lockstep,
        )
        if loss is None:
            return
        progress = self.progress
        progress.evaluated_step = progress.step
        progress.last_eval_loss = loss if math.isfinite(loss) else None
        self._tell(EvaluationLogged(progress.step, loss, math.exp(loss) if loss < 700 else math.inf))
        if math.isfinite(loss) and (progress.best_loss is None or loss < progress.best_loss):
            progress.best_loss, progress.best_step, progress.evaluations_since_best = loss, progress.step, 0
            if self.schedule.keep_best:
                self._save_once()
            return
        progress.evaluations_since_best += 1
        if self.schedule.patience is not None and progress.evaluations_since_best >= self.schedule.patience:
            progress.stopped_early = True
            best = f" than that of step {progress.best_step}" if progress.best_step else ""
            self._tell(
                Notice(
                    f"Stopped at step {progress.step}: {progress.evaluations_since_best} evaluations without a lower "
                    f"loss{best}."
                )
            )

    # ------------------------------------------------------------ saving and stopping

    def _save_once(self) -> None:
        """Writes a checkpoint of this moment unless it stands already, then prunes. Every rank takes part."""
        self._tell_last()
        if self.saved_step == self.progress.step:
            return
        started = time.perf_counter()
        random_states = self.ranks.all_gather(capture_random_state(self.device), self.device)
        if self.ranks.is_main:
            checkpoint = write_checkpoint(
                self.saving.root,
                self.progress.step,
                identity=self.saving.identity,
                fill=lambda directory: write_state(
                    directory,
                    save_adapter=self.saving.save_adapter,
                    parameters=self.parameters,
                    optimizer=self.optimizer,
                    progress=self.progress,
                    random_states=random_states,
                ),
                needed_bytes=self.saving.needed_bytes,
            )
            best = [self.progress.best_step] if self.schedule.keep_best and self.progress.best_step else []
            prune(self.saving.root, checkpoint, keep=self.schedule.keep, protect=best)
            seconds = time.perf_counter() - started
            self.report(CheckpointSaved(checkpoint.step, str(checkpoint.path), checkpoint.total_bytes, seconds))
        self.ranks.barrier()
        self.saved_step = self.progress.step

    def _unfinished(self) -> bool:
        return self.progress.step < self.plan.total_steps and not self.progress.stopped_early

    def _stopping(self) -> bool:
        """Whether to stop before the next step: the same answer on all ranks, without an exchange of its own."""
        if self.ranks.world_size == 1:
            return self.stop.signal_number is not None
        return self.agreed_to_stop

    def _agree_to_stop(self) -> bool:
        """As `_stopping`, where the ranks have not just met."""
        self.agreed_to_stop = self.ranks.all_reduce_max(self.stop.signal_number or 0, self.device) > 0
        return self.agreed_to_stop

    def _interrupted(self) -> Interrupted:
        return Interrupted(
            f"Stopped by a signal after step {self.progress.step} of {self.plan.total_steps}, which is saved.",
            self.ranks.all_reduce_max(self.stop.signal_number or 0, self.device),
            "Go on with the same command and --resume.",
        )

    def _tell_last(self) -> None:
        """Tells the last step, if that was not done."""
        event, self.unreported = self.unreported, None
        if event is not None:
            self._tell(event)

    def _tell(self, event: StepLogged | EvaluationLogged | Notice | Caution) -> None:
        self._tell_last()
        if self.ranks.is_main:
            if isinstance(event, StepLogged | EvaluationLogged):
                self.log(event)
            self.report(event)
