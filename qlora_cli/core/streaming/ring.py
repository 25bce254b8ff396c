"""Ring of buffers on the device, through which layers that wait on the host pass in the order of their use.

A layer always comes into the same buffer, so that what computes with it holds tensors at fixed addresses. It is there
from `use` until `use` of a layer that comes into the same buffer: copies are made on a stream of their own, each after
all that the computing stream had been given by then, and the computing stream waits for the copy it needs.
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

SLOTS = 2  # one to compute with and one to fill


class LayerSource(Protocol):
    """Where the bytes of layers wait.

    Attributes:
        bytes_per_second: That come from there at most, the link to the device apart; infinite from memory.
    """

    @property
    def bytes_per_second(self) -> float: ...

    def copy(self, number: int, into: Tensor, *, around: bool = False) -> None:
        """Copies a layer to the front of a uint8 buffer on the device, on the current stream, if it has any.

        Args:
            around: Whether the first layer follows the last, as where no backward pass does.
        """


class HostSource:
    """Layers in host memory.

    Args:
        layers: uint8 each, page-locked for a CUDA device.
    """

    bytes_per_second = math.inf

    def __init__(self, layers: Sequence[Tensor]) -> None:
        self.layers = layers

    def copy(self, number: int, into: Tensor, *, around: bool = False) -> None:
        """See `LayerSource`."""
        layer = self.layers[number]
        into[: layer.numel()].copy_(layer, non_blocking=True)


class Ring:
    """The buffers, and what each of them holds.

    Args:
        source: Where layers wait.
        layers: How many there are, in the order of their use in a forward pass.
        slot_bytes: Of the largest layer.
        device: A CUDA device; on any other, copies are made at once.
        slots: How many buffers.
    """

    def __init__(
        self, source: LayerSource, layers: int, slot_bytes: int, device: torch.device, slots: int = SLOTS
    ) -> None:
        self.source, self.layers, self.device = source, layers, device
        self.slots = min(slots, layers)
        self.buffers = [torch.empty(slot_bytes, dtype=torch.uint8, device=device) for _ in range(self.slots)]
        # The same memory under version counters of its own: a copy changes no tensor that autograd has saved, which is
        # the layer's again by the time it is used.
        self.inlets = [
            torch.empty(0, dtype=torch.uint8, device=device).set_(buffer.untyped_storage()) for buffer in self.buffers
        ]
        self.held: list[int | None] = [None] * self.slots
        self.copies = 0  # made so far
        on_cuda = device.type == "cuda"
        self.stream = torch.cuda.Stream(device) if on_cuda else None
        self.copied = [torch.cuda.Event() if on_cuda else None for _ in range(self.slots)]

    def slot(self, number: int) -> int:
        """Which buffer a layer comes into."""
        return number % self.slots

    def use(self, number: int, step: int = 1) -> None:
        """Has a layer in its buffer for all that the current stream is given next, and starts on those behind it.

        Args:
            number: Which.
            step: 1 where layers follow upward, -1 where downward, as in a backward pass.
        """
        claimed: set[int] = set()
        around = (
            step > 0 and not torch.is_grad_enabled()
        )  # no backward pass follows: the next one begins with the first
        for ahead in range(self.slots):
            wanted = number + ahead * step
            if around:
                wanted %= self.layers
            if not 0 <= wanted < self.layers or self.slot(wanted) in claimed:
                break
            claimed.add(self.slot(wanted))
            self._bring(wanted, around)
        copied = self.copied[self.slot(number)]
        if copied is not None:
            torch.cuda.current_stream(self.device).wait_event(copied)

    def _bring(self, number: int, around: bool) -> None:
        slot = self.slot(number)
        if self.held[slot] == number:
            return
        self.held[slot] = None  # whatever a copy that fails leaves there
        computing = torch.cuda.current_stream(self.device) if self.stream is not None else None
        if self.stream is not None and computing is not None:
            self.stream.wait_stream(computing)  # what read the buffer last has been given to it before
        beside: AbstractContextManager[Any] = torch.cuda.stream(self.stream)
        with beside, torch.no_grad():
            self.source.copy(number, self.inlets[slot], around=around)
            if (copied := self.copied[slot]) is not None:
                copied.record(self.stream)
        self.held[slot] = number
        self.copies += 1
