"""Evaluation: the mean loss of held-out rows, measured without a trace on the training that goes on afterwards."""

from collections.abc import Callable

import torch
from torch import Tensor

from qlora_cli.core.data.dataset import RowSubset
from qlora_cli.core.data.packing import split_micro_batch
from qlora_cli.core.data.sampler import BatchSampler
from qlora_cli.core.device import free_memory, memory_error
from qlora_cli.core.training.accumulation import ModelReplica, is_out_of_memory, read_batch
from qlora_cli.core.training.rng_state import undisturbed_random_state
from qlora_cli.errors import TrainingError


def measure_loss(
    replica: ModelReplica,
    rows: RowSubset,
    sampler: BatchSampler,
    *,
    device: torch.device,
    stopping: Callable[[], bool],
) -> float | None:
    """Mean loss in nats per trained token, without dropout and without touching random state.

    Each rank measures its share of the sampler's one epoch. `stopping`, whose answer is the same on all ranks, is asked
    after every step; where it breaks the evaluation off the loss is None.

    Raises:
        TrainingError: A single row does not fit memory.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=device)  # loss in nats, trained tokens
    ranks = replica.ranks
    replica.model.eval()
    try:
        with undisturbed_random_state(device), torch.no_grad():
            for number in range(1, sampler.total_steps + 1):
                batches = sampler.step(number).micro_batches
                for indices in batches:
                    _add_loss(replica, rows, indices, sums)
                idle = ranks.all_reduce_max(len(batches), device) - len(batches) if replica.lockstep else 0
                for _ in range(idle):
                    replica.engine.loss(read_batch(rows, [0], device, ranks))  # counts nothing
                if stopping():
                    return None
    finally:
        replica.model.train()
    loss_sum, trained = ranks.all_reduce_sum(sums).tolist()
    return loss_sum / max(trained, 1)


def _add_loss(replica: ModelReplica, rows: RowSubset, indices: list[int], sums: Tensor) -> None:
    batch = read_batch(rows, indices, sums.device, replica.ranks)
    try:
        sums[0] += replica.engine.loss(batch)
        sums[1] += batch.trained_tokens
        return
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        if len(indices) == 1 or replica.lockstep:
            raise memory_error(
                TrainingError,
                f"There is not enough memory to evaluate {len(indices)} rows of {batch.pack_tokens:,} tokens.",
                "Lower --max-length.",
                sums.device,
            ) from None
    free_memory(sums.device)
    for half in split_micro_batch(indices, rows.lengths):
        _add_loss(replica, rows, half, sums)
