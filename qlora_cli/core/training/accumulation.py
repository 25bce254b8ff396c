"""Gradient accumulation over the micro-batches of an optimizer step and over all ranks."""

from collections.abc import Iterable
from dataclasses import astuple, dataclass, replace

import torch
from torch import Tensor, nn

from qlora_cli.core.data.dataset import RowSubset
from qlora_cli.core.data.packing import MicroBatch, collate
from qlora_cli.core.data.sampler import split_to_fit
from qlora_cli.core.device import count_retries, free_memory, memory_error, read_vram
from qlora_cli.core.distributed.process_group import ProcessGroup
from qlora_cli.core.engine.engine import Engine
from qlora_cli.core.training.flat_parameters import TrainableParameters
from qlora_cli.core.training.gradient_reduction import GradientReduction
from qlora_cli.errors import TrainingError
from qlora_cli.events import Vram
from qlora_cli.sizes import format_bytes


@dataclass(frozen=True)
class ModelReplica:
    """The model as this rank computes with it."""

    model: nn.Module  # switched between training and evaluation
    engine: Engine  # losses of micro-batches
    ranks: ProcessGroup  # this process among those that share each step
    lockstep: str = ""  # the flag by which ranks compute a pass together, and all run equally many micro-batches


@dataclass(frozen=True)
class StepSums:
    """What one step came to, over all ranks."""

    loss_sum: float  # nats, summed over the trained tokens
    trained_tokens: int
    tokens: int
    gradient_norm: float  # of the mean loss times the loss scale
    out_of_memory: bool  # on some rank: the other numbers then mean nothing
    stopping: bool  # a signal came to some rank
    retries: int  # of allocators that ran against their limit
    cards: tuple[Vram, ...]  # memory of every rank's card, by rank; () on the CPU


class Accumulation:
    """Forward and backward over the micro-batches of a step."""

    def __init__(self, replica: ModelReplica, rows: RowSubset, parameters: TrainableParameters) -> None:
        self.engine = replica.engine
        self.rows = rows
        self.parameters = parameters
        self.ranks = replica.ranks
        self.lockstep = replica.lockstep
        self.reduction = GradientReduction(parameters, self.ranks)
        self.device = parameters.device
        self.retries = 0  # of this rank's allocator since the `accumulate` before the last
        self._all_retries = count_retries(self.device)  # up to the last; asked while the device computes
        self.failed: MicroBatch | None = None  # did not fit this rank's memory in the last `accumulate`

    def read_batches(self, micro_batches: list[list[int]], limit_tokens: int | None) -> list[MicroBatch]:
        """Reads the rows of a step into tensors, in micro-batches of at most `limit_tokens` (rows are never cut)."""
        split = split_to_fit(micro_batches, self.rows.lengths, limit_tokens)
        batches = [read_batch(self.rows, indices, self.device, self.ranks) for indices in split]
        batches[:1] = [replace(batch, opens_step=True) for batch in batches[:1]]  # `accumulate` zeroes gradients first
        # The others are prepared while the device computes the ones before them.
        return [self.engine.prepare(batches[0]), *batches[1:]] if batches else batches

    def accumulate(self, batches: list[MicroBatch], *, scale: float = 1.0, stopping: bool = False) -> Tensor:
        """Gradients of `scale` times the mean loss over the trained tokens of all ranks' batches.

        What it returns, (7 + 3 * ranks,) float64 on the device, is for `read_sums`: that waits for the device, this not.
        """
        self.parameters.zero_gradients()
        trained = sum(batch.trained_tokens for batch in batches)
        factor: Tensor | float = scale / max(trained, 1)
        if self.ranks.world_size > 1:
            factor = scale / self.ranks.all_reduce_sum(torch.tensor(float(trained), device=self.device)).clamp_min(1)
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        self.failed = None
        idle = self.ranks.all_reduce_max(len(batches), self.device) - len(batches) if self.lockstep else 0
        passes: list[MicroBatch | None] = [*batches, *[None] * idle]
        for number, batch in enumerate(passes, start=1):
            if number == len(passes):  # the same on all ranks: sums of gradients and gathered weights go in one order
                self.reduction.arm()
            if batch is None:
                self._run_idle(self.engine.loss(read_batch(self.rows, [0], self.device, self.ranks)))
            elif not self._runs(batch, factor, loss_sum):
                self.failed = batch
                break
        self.reduction.finish()
        tokens = sum(batch.tokens for batch in batches)
        before, self._all_retries = self._all_retries, count_retries(self.device)
        self.retries = self._all_retries - before
        found = trained, tokens, self.failed is not None, stopping, self.retries, *self._card()
        counts = torch.tensor(found, dtype=torch.float64)
        sums = self.ranks.all_reduce_sum(torch.cat([loss_sum[None], counts.to(self.device, non_blocking=True)]))
        return torch.cat([self.parameters.gradient_norm().double()[None], sums])

    def _run_idle(self, loss: Tensor) -> None:
        """Runs a row that counts nothing, where other ranks have one micro-batch more."""
        torch.autograd.backward(loss, torch.zeros_like(loss))

    def _card(self) -> list[int]:
        """This card's memory at its rank's place, zeros at all others: their sum over the ranks is that of every card."""
        numbers, place = [0] * (3 * self.ranks.world_size), 3 * self.ranks.rank
        if vram := read_vram(self.device):
            numbers[place : place + 3] = astuple(vram)
        return numbers

    def _runs(self, batch: MicroBatch, factor: Tensor | float, loss_sum: Tensor) -> bool:
        """Adds one micro-batch's gradients and loss; whether there was the memory for it, else the step is repeated."""
        try:
            loss = self.engine.loss(batch)
            (loss * factor).backward()
            loss_sum += loss.detach()
            return True
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if self.lockstep:
                raise memory_error(
                    TrainingError,
                    f"There is not enough memory for a micro-batch of {batch.pack_tokens:,} tokens, and with "
                    f"{self.lockstep} the other cards wait for it.",
                    "Lower --max-length or --batch-size, or add --gradient-checkpointing on.",
                    self.device,
                ) from error
        # Outside the handler, where the traceback no longer holds the activations.
        free_memory(self.device)
        return False

    def reduce_memory(self) -> bool:
        """Has the engine give up speed for memory where that ran out; whether every rank had speed to give up."""
        stuck = self.failed is not None and not self.engine.reduce_memory()
        return not self.ranks.all_reduce_max(int(stuck), self.device)

    def relieve_allocators(self) -> bool:
        """Has the engine give up speed for memory where the allocator ran against its limit in the last step; whether every
        such rank had speed to give up."""
        stuck = self.retries > 0 and not self.engine.reduce_memory()
        return not self.ranks.all_reduce_max(int(stuck), self.device)

    def halved_limit(self, where: str) -> int:
        """Tokens that a micro-batch may hold after memory ran out, on all ranks.

        Raises:
            TrainingError: What did not fit was a single row.
        """
        failed_tokens = self.failed.tokens if self.failed else 0
        single_tokens = failed_tokens if self.failed and len(self.failed.row_indices) == 1 else 0
        if tokens := self.ranks.all_reduce_max(single_tokens, self.device):
            raise memory_error(
                TrainingError,
                f"There is not enough memory {where}, for a single row of {tokens:,} tokens.",
                "Lower --max-length, or use --gradient-checkpointing on, or --stream, with which the base leaves the card.",
                self.device,
            )
        return self.ranks.all_reduce_max(failed_tokens, self.device) // 2

    def try_out(self, micro_batches: Iterable[list[int]], limit_tokens: int | None) -> int | None:
        """The limit on a micro-batch's tokens with which all of these fit.

        They are run forward and backward and forgotten.

        Raises:
            TrainingError: A single row does not fit.
        """
        for indices in micro_batches:
            while True:
                batches = self.read_batches([indices], limit_tokens)
                sums = read_sums(self.accumulate(batches))
                if not sums.out_of_memory:
                    break
                if not self.reduce_memory():
                    limit_tokens = self.halved_limit("for the longest rows")
        self.parameters.zero_gradients()
        return limit_tokens


def reserve_memory(bytes_: int, device: torch.device) -> Tensor:
    """Memory that the optimizer's state will take with the first update, to be held until then: a captured step takes what
    is free, and gives nothing back.

    Raises:
        TrainingError: There is not that much.
    """
    try:
        return torch.empty(bytes_ if device.type == "cuda" else 0, device=device, dtype=torch.uint8)
    except torch.OutOfMemoryError as error:
        raise memory_error(
            TrainingError,
            f"There is no memory for the optimizer's state, {format_bytes(bytes_)}.",
            "Lower --rank, or choose --optimizer paged_adamw_8bit, whose state may lie in the host's memory.",
            device,
        ) from error


def read_sums(sums: Tensor) -> StepSums:
    """Brings `accumulate`'s result to the host: waits for the device."""
    norm, loss_sum, trained, tokens, failures, stops, retries, *memory = sums.tolist()
    cards = tuple(Vram(*map(int, memory[i : i + 3])) for i in range(0, len(memory), 3) if memory[i + 2])
    return StepSums(loss_sum, int(trained), int(tokens), norm, failures > 0, stops > 0, int(retries), cards)


def read_batch(
    rows: RowSubset, indices: list[int], device: torch.device, ranks: ProcessGroup | None = None
) -> MicroBatch:
    """Rows as one micro-batch, of which these ranks may share the tokens; in pinned memory where it will be copied to a
    card."""
    batch = collate([rows[i] for i in indices], indices)
    if ranks is not None:
        batch = batch.part_of(ranks.rank % ranks.context, ranks.context)
    return batch.pin() if device.type == "cuda" else batch


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a failure means that the device has no room; libraries below PyTorch say so in their own words."""
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError) or any(
        sign in text for sign in ("CUBLAS_STATUS_ALLOC_FAILED", "CUDA error: out of memory", "CUDA out of memory")
    )
