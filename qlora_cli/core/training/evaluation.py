"""Held-out rows in, their mean loss out; the training that goes on afterwards cannot tell."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from qlora_cli.core.data.packing import split_micro_batch
from qlora_cli.core.data.sampler import BatchSampler
from qlora_cli.core.data.split import RowSubset
from qlora_cli.core.distributed.process_group import ProcessGroup
from qlora_cli.core.engine.engine import Engine
from qlora_cli.core.training.accumulation import free_memory, is_out_of_memory, read_batch
from qlora_cli.core.training.rng_state import undisturbed_random_state
from qlora_cli.errors import TrainingError


def measure_loss(
    model: nn.Module,
    engine: Engine,
    rows: RowSubset,
    plan: BatchSampler,
    *,
    device: torch.device,
    ranks: ProcessGroup,
    stopping: Callable[[], bool],
    lockstep: bool = False,
) -> float | None:
    """Mean loss in nats per trained token, without dropout and without touching random state.

    Args:
        model: Put into evaluation mode and back into training.
        engine: Losses of micro-batches.
        rows: Held-out rows.
        plan: One epoch over them.
        device: Where the engine computes.
        ranks: Each measures its share.
        stopping: Asked after every step of the plan; the answer is the same on all ranks.
        lockstep: Whether all ranks have to run equally many micro-batches.

    Returns:
        The loss, or None when `stopping` broke it off.

    Raises:
        TrainingError: A single row does not fit memory.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=device)  # loss in nats, trained tokens
    model.eval()
    try:
        with undisturbed_random_state(device), torch.no_grad():
            for number in range(1, plan.total_steps + 1):
                batches = plan.step(number).micro_batches
                for indices in batches:
                    _add_loss(engine, rows, indices, sums, lockstep)
                for _ in range(ranks.all_reduce_max(len(batches), device) - len(batches) if lockstep else 0):
                    engine.loss(read_batch(rows, [0], device))  # counts nothing
                if stopping():
                    return None
    finally:
        model.train()
    loss_sum, trained = ranks.all_reduce_sum(sums).tolist()
    return loss_sum / max(trained, 1)


def _add_loss(engine: Engine, rows: RowSubset, indices: list[int], sums: Tensor, lockstep: bool) -> None:
    batch = read_batch(rows, indices, sums.device)
    try:
        sums[0] += engine.loss(batch)
        sums[1] += batch.trained_tokens
        return
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        if len(indices) == 1 or lockstep:
            raise TrainingError(
                f"There is not enough memory to evaluate {len(indices)} rows of {batch.tokens:,} tokens.",
                "Lower --max-length.",
            ) from None
    free_memory(sums.device)
    for half in split_micro_batch(indices, rows.lengths):
        _add_loss(engine, rows, half, sums, lockstep)
