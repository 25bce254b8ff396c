"""Tensors that autograd saves in, the same tensors back in the backward pass, in pinned host memory in between.

Copies run on a stream of their own: a layer's tensors leave while the next layers compute, and come back one layer
ahead of the backward pass.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakSet

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

SMALLEST_BYTES = 2**20  # below this a copy costs more than the memory is worth


class _Away:
    """One saved tensor: on the device until its copy is done and its layer is past, then on the host, then back."""

    __slots__ = ("__weakref__", "copied", "fetched", "host", "layer", "offload", "on_device", "shape", "strides")

    def __init__(self, offload: "ActivationOffload", tensor: Tensor, layer: int) -> None:
        self.offload, self.layer = offload, layer
        self.on_device: Tensor | None = tensor
        self.shape, self.strides = tensor.shape, tensor.stride()
        self.host = offload.borrow(tensor)
        self.fetched: torch.cuda.Event | None = None
        stream = offload.stream
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.host.as_strided(self.shape, self.strides).copy_(tensor, non_blocking=True)
            self.copied = stream.record_event()

    def leave(self) -> None:
        """Gives up the device's copy: whatever uses its memory next waits for the copy to the host."""
        torch.cuda.current_stream().wait_event(self.copied)
        self.on_device = None

    def fetch(self) -> None:
        """Starts the way back."""
        if self.on_device is not None:
            return
        # Allocated on the computing stream; what used this memory before is done when the copy starts.
        back = torch.empty_strided(self.shape, self.strides, dtype=self.host.dtype, device=self.offload.device)
        stream = self.offload.stream
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            back.copy_(self.host.as_strided(self.shape, self.strides), non_blocking=True)
            self.fetched = stream.record_event()
        self.on_device = back

    def tensor(self) -> Tensor:
        """The tensor, on the device."""
        self.offload.fetch_around(self.layer)
        self.fetch()
        if self.fetched is not None:
            torch.cuda.current_stream().wait_event(self.fetched)
        assert self.on_device is not None
        return self.on_device

    def __del__(self) -> None:
        self.offload.give_back(self.host)


class ActivationOffload:
    """Where the saved tensors of some decoder layers wait.

    Args:
        device: The CUDA device.
        persistent: Storage addresses of tensors that stay anyway: weights and buffers.
    """

    def __init__(self, device: torch.device, persistent: frozenset[int]) -> None:
        self.device, self.persistent = device, persistent
        self.stream = torch.cuda.Stream(device)
        self.pool: dict[tuple[int, torch.dtype], list[Tensor]] = {}
        self.layers: dict[int, WeakSet[_Away]] = {}
        self.previous: int | None = None

    def borrow(self, tensor: Tensor) -> Tensor:
        """A flat pinned buffer for one dense tensor. All copies share one stream, so reuse needs no waiting."""
        free = self.pool.get((tensor.numel(), tensor.dtype))
        return free.pop() if free else torch.empty(tensor.numel(), dtype=tensor.dtype, pin_memory=True)

    def give_back(self, host: Tensor) -> None:
        """Takes a buffer back for the next tensor of its size."""
        self.pool.setdefault((host.numel(), host.dtype), []).append(host)

    @contextmanager
    def layer(self, number: int) -> Iterator[None]:
        """Sends away what is saved inside; what the layer before saved leaves the device."""
        here: WeakSet[_Away] = WeakSet()
        seen: dict[tuple, _Away] = {}

        def pack(tensor: Tensor) -> Tensor | _Away:
            bytes_ = tensor.numel() * tensor.element_size()
            dense = tensor.numel() > 0 and torch.ops.aten.is_non_overlapping_and_dense(tensor)
            storage = tensor.untyped_storage().data_ptr()
            if not tensor.is_cuda or bytes_ < SMALLEST_BYTES or not dense or storage in self.persistent:
                return tensor
            # One tensor saved by several operations travels once. `seen` keeps it alive, so addresses are not reused.
            key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor._version)
            if key not in seen:
                seen[key] = _Away(self, tensor.detach(), number)
                here.add(seen[key])
            return seen[key]

        def unpack(packed: Tensor | _Away) -> Tensor:
            return packed.tensor() if isinstance(packed, _Away) else packed

        with saved_tensors_hooks(pack, unpack):
            yield
        if self.previous is not None:
            for away in self.layers.get(self.previous, ()):
                away.leave()
        self.layers[number], self.previous = here, number

    def start(self) -> None:
        """Begins a forward pass."""
        self.previous = None

    def join(self) -> None:
        """Makes the computing stream wait for all copies so far."""
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)  # a CUDA graph takes in no stream that did not first wait for its own
        current.wait_stream(self.stream)

    def fetch_around(self, layer: int) -> None:
        """Brings back a layer's tensors and starts on those of the layer below."""
        for number in (layer, layer - 1):
            for away in self.layers.get(number, ()):
                away.fetch()
