"""Process group: the ranks of a run, which one this is, and the few collectives between them."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from qlora_cli.errors import RunError, first_line
from qlora_cli.events import Notice, Report

LAUNCH = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # variables by which ranks find one another
WAITED_SECONDS = 10.0  # for the other ranks, until that is said


@dataclass(frozen=True)
class ProcessGroup:
    """This process among `world_size`, of which each `context` in a row share the tokens of every micro-batch."""

    rank: int = 0
    world_size: int = 1
    context: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this one reports and writes."""
        return self.rank == 0

    @property
    def of_rows(self) -> "ProcessGroup":
        """Those that share the rows of a step: each group of ranks that share tokens counts as one."""
        return replace(self, rank=self.rank // self.context, world_size=self.world_size // self.context, context=1)

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Replaces `tensor` by its sum over all ranks, in place, without waiting for the device."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def start_all_reduce_sum(self, tensor: Tensor) -> Any:
        """Starts replacing `tensor` by its sum over all ranks; its `wait()` makes the device wait, on the CPU this thread."""
        return dist.all_reduce(tensor, async_op=True)

    def all_reduce_max(self, value: int, device: torch.device) -> int:
        """The highest of the ranks' values. Waits for the device."""
        if self.world_size == 1:
            return value
        tensor = torch.tensor(value, device=device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return int(tensor.item())

    def all_gather(self, state: dict[str, Tensor], device: torch.device) -> list[dict[str, Tensor]]:
        """Every rank's tensors (on the CPU, of equal names, shapes and dtypes), by rank."""
        if self.world_size == 1:
            return [state]
        collected: list[dict[str, Tensor]] = [{} for _ in range(self.world_size)]
        for name, tensor in state.items():
            raw = tensor.contiguous().view(-1).view(torch.uint8).to(device)
            parts = [torch.empty_like(raw) for _ in range(self.world_size)]
            dist.all_gather(parts, raw)
            for rank, part in enumerate(parts):
                collected[rank][name] = part.cpu().view(tensor.dtype).view(tensor.shape)
        return collected

    def barrier(self) -> None:
        """Returns when every rank has come here."""
        if self.world_size > 1:
            dist.barrier()


@contextmanager
def joining(report: Report, waited_seconds: float = WAITED_SECONDS) -> Iterator[None]:
    """Says in a block that joins the ranks of a launch what it waits for.

    Raises:
        RunError: They cannot be joined by what the environment says, as where another launch has left some of it.
    """
    found = {name: os.environ[name] for name in LAUNCH if name in os.environ}  # before anybody adds to it
    said = " ".join(f"{name}={value}" for name, value in found.items())
    text = f"Waiting for the other processes of a launch, as the environment says {said}."
    waiting = threading.Timer(waited_seconds, report, [Notice(text)])
    waiting.daemon = True
    if said:
        waiting.start()
    try:
        yield
    except (ValueError, RuntimeError) as error:
        if not said:
            raise
        raise RunError(
            f"The processes of a launch cannot be joined as the environment says {said}: {first_line(error).rstrip('.')}.",
            f"Where no launcher started this one, type: unset {' '.join(found)}",
        ) from error
    finally:
        waiting.cancel()
