"""Batch sampler: the rows of any optimizer step, as a pure function of the step's number."""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count, takewhile

import numpy as np

from qlora_cli.core.data.packing import plan_epoch, split_micro_batch
from qlora_cli.core.distributed.process_group import ProcessGroup
from qlora_cli.errors import UsageError


@dataclass(frozen=True)
class Step:
    """What one rank computes in one optimizer step."""

    number: int  # from 1
    epoch: float  # passes over the rows when it is done
    micro_batches: list[list[int]]  # row indices


class BatchSampler:
    """The steps of a run. An epoch is planned when it is reached and only the latest plan is kept.

    Args:
        lengths: (rows,) tokens of each row.
        batch_size: Rows (packs) of a micro-batch.
        accumulation: Micro-batches of a step, on all ranks together.
        packing: Whether rows are packed to `max_length`.
        max_length: Tokens in a pack, and in the longest row.
        seed: Of the order.
        epochs: Passes over the rows, where `max_steps` is None; a fraction of the last pass is allowed.
        max_steps: Optimizer steps.
        ranks: This process among those that share each step.

    Raises:
        UsageError: Its steps cannot be shared evenly.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        *,
        batch_size: int,
        accumulation: int,
        packing: bool,
        max_length: int,
        seed: int,
        epochs: float,
        max_steps: int | None,
        ranks: ProcessGroup,
    ) -> None:
        if batch_size * accumulation % ranks.world_size:
            even = next(n for n in count(accumulation) if batch_size * n % ranks.world_size == 0)
            raise UsageError(
                f"A step of {batch_size * accumulation} rows (--batch-size {batch_size} times "
                f"--gradient-accumulation-steps {accumulation}) cannot be dealt out evenly to {ranks.world_size} cards.",
                f"Use --gradient-accumulation-steps {even}.",
            )
        self.lengths = lengths
        self.rank = ranks.rank
        self.joined_tokens: int | None = None  # up to which a step's micro-batches are joined; None for not at all
        self._plan_epoch = partial(
            plan_epoch,
            lengths,
            batch_size=batch_size,
            accumulation=accumulation,
            packing=packing,
            max_length=max_length,
            seed=seed,
            world_size=ranks.world_size,
        )
        self._ends: list[int] = []  # steps taken when each epoch ends
        self._planned: tuple[int, list[list[list[list[int]]]]] = (-1, [])
        if max_steps is not None:
            self.total_steps = max_steps
        else:
            whole = math.floor(epochs)
            self.total_steps = self.epoch_end(whole - 1) if whole else 0
            if epochs > whole:
                self.total_steps += max(1, round((epochs - whole) * len(self._plan(whole))))

    def step(self, number: int) -> Step:
        """Step `number`, from 1."""
        epoch = self._epoch_of(number)
        plan = self._plan(epoch)
        index = number - 1 - (self.epoch_end(epoch - 1) if epoch else 0)
        micro_batches = join_to_fill(plan[index][self.rank], self.lengths, self.joined_tokens)
        return Step(number, epoch + (index + 1) / len(plan), micro_batches)

    def ends_epoch(self, number: int) -> bool:
        """Whether step `number` is the last of its epoch."""
        return number > 0 and self.epoch_end(self._epoch_of(number)) == number

    def epoch_end(self, epoch: int) -> int:
        """Steps taken when epoch `epoch`, from 0, ends."""
        while len(self._ends) <= epoch:
            start = self._ends[-1] if self._ends else 0
            self._ends.append(start + len(self._plan(len(self._ends))))
        return self._ends[epoch]

    def evaluated_steps(self, every: int | None) -> Iterator[int]:
        """Steps before the last one after which rows held out are evaluated: each of so many, or the last of each epoch."""
        steps = count(every, every) if every else map(self.epoch_end, count())
        return takewhile(lambda number: number < self.total_steps, steps)

    def digest(self) -> str:
        """SHA-256 of which rows each step of the first epoch takes, in hexadecimal: the same however they are shared."""
        digest = hashlib.sha256()
        for step in self._plan(0):
            rows = np.sort(np.array([row for share in step for batch in share for row in batch], dtype="<i8"))
            digest.update(np.array([len(rows), *rows], dtype="<i8").tobytes())
        return digest.hexdigest()

    def longest_micro_batches(self, limit_tokens: int | None = None) -> list[list[int]]:
        """Of the first epoch and all ranks, split where a limit asks for it: the micro-batch with most tokens, and the
        one with most once padded."""
        shares = [share for step in self._plan(0)[: self.total_steps] for share in step]
        batches = [batch for share in shares for batch in join_to_fill(share, self.lengths, self.joined_tokens)]
        batches = split_to_fit(batches, self.lengths, limit_tokens)
        most = max(batches, key=lambda batch: int(self.lengths[batch].sum()))
        widest = max(batches, key=lambda batch: len(batch) * int(self.lengths[batch].max()))
        return [most] if most == widest else [most, widest]

    def largest_step_tokens(self) -> int:
        """Of the first epoch and all ranks, the most tokens of a rank's share of a step."""
        shares = [share for step in self._plan(0)[: self.total_steps] for share in step]
        return max(sum(int(self.lengths[batch].sum()) for batch in share) for share in shares)

    def _epoch_of(self, number: int) -> int:
        return next(epoch for epoch in count() if self.epoch_end(epoch) >= number)

    def _plan(self, epoch: int) -> list[list[list[list[int]]]]:
        if self._planned[0] != epoch:
            self._planned = (epoch, self._plan_epoch(epoch=epoch))
        return self._planned[1]


def join_to_fill(micro_batches: list[list[int]], lengths: np.ndarray, most_tokens: int | None) -> list[list[int]]:
    """Joins micro-batches that follow one another as long as they hold `most_tokens` together."""
    if most_tokens is None:
        return micro_batches
    joined: list[list[int]] = []
    room = 0
    for batch in micro_batches:
        tokens = int(lengths[batch].sum())
        if tokens <= room:
            joined[-1] += batch
        else:
            joined.append(list(batch))
            room = most_tokens
        room -= tokens
    return joined


def split_to_fit(micro_batches: list[list[int]], lengths: np.ndarray, limit_tokens: int | None) -> list[list[int]]:
    """Splits micro-batches over `limit_tokens` until each is within it or is a single row."""
    fitting: list[list[int]] = []
    for batch in micro_batches:
        if limit_tokens is None or len(batch) < 2 or int(lengths[batch].sum()) <= limit_tokens:
            fitting.append(batch)
        else:
            fitting += split_to_fit(list(split_micro_batch(batch, lengths)), lengths, limit_tokens)
    return fitting
