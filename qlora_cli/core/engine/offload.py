"""Offload to pinned host memory: activations saved for the backward pass, and the table of input embeddings.

Activations are copied on a stream of their own: a layer's tensors leave while the next layers compute, and come back
while the backward pass is in the layers before them. Those of the last layers may wait in memory of idle gradients.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import ReferenceType, WeakSet, ref

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor

from qlora_cli.core.engine.memory_plan import ROOM
from qlora_cli.core.streaming.host_memory import lock_pages
from qlora_cli.events import Notice, Report

SMALLEST_BYTES = 2**20  # of a saved tensor: below, a copy costs more than the memory is worth
TRIAL_BYTES = 2**25  # of the link
CHUNK_BYTES = 2**28  # of pinned memory taken at once


def storages_of(tensors: Iterable[Tensor]) -> frozenset[int]:
    """Addresses of what tensors are stored in, without those that are sharded."""
    return frozenset(t.untyped_storage().data_ptr() for t in tensors if not isinstance(t, DTensor))


def trained_bytes(modules: Iterable[nn.Module]) -> int:
    """Of their trained parameters, and so of the gradients."""
    return sum(p.nbytes for module in modules for p in module.parameters() if p.requires_grad)


class _Stretch:
    """Bytes of one storage, in which saved tensors lie: on the device until their copy is done and their layer is past, then
    on the host, then back."""

    def __init__(self, offload: "ActivationOffload", bytes_: Tensor, buffer: Tensor, layer: int) -> None:
        self.offload, self.layer = offload, layer
        self.on_device: Tensor | None = bytes_
        self.bytes = bytes_.numel()
        self.buffer = buffer
        self.host = buffer[: self.bytes]
        self.fetched: Any = None
        with offload.beside():
            self.host.copy_(bytes_, non_blocking=True)
            self.copied = offload.event()

    def leave(self) -> None:
        """Gives up the device's copy: whatever uses its memory next waits for the copy to the host."""
        _wait(self.copied)
        self.on_device = None

    def fetch(self) -> None:
        """Starts the way back."""
        if self.on_device is not None:
            return
        # Allocated on the computing stream; what used this memory before is done when the copy starts.
        back = torch.empty(self.bytes, dtype=torch.uint8, device=self.offload.device)
        with self.offload.beside():
            back.copy_(self.host, non_blocking=True)
            self.fetched = self.offload.event()
        self.on_device = back

    def whole(self) -> Tensor:
        """The bytes, on the device."""
        self.offload.fetch_around(self.layer)
        self.fetch()
        _wait(self.fetched)
        assert self.on_device is not None
        return self.on_device

    def __del__(self) -> None:
        self.offload.free.append(self.buffer)


class _Saved:
    """One saved tensor: itself until its layer ends, then its place in a stretch that travels, where it does."""

    def __init__(self, tensor: Tensor) -> None:
        self.own: Tensor | None = tensor
        self.version = tensor._version
        # Compiled code relies on the strides.
        self.shape, self.strides, self.dtype = tensor.shape, tensor.stride(), tensor.dtype
        # Bytes of the storage before the first that it uses.
        self.begin = int(tensor.storage_offset()) * tensor.itemsize
        reach = sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        self.end = self.begin + (int(reach) + 1) * tensor.itemsize
        self.stretch: _Stretch | None = None

    def travel_in(self, stretch: _Stretch, begin: int) -> None:
        """From here on it is a part of a stretch that begins so many bytes after the storage does."""
        self.own, self.stretch, self.begin = None, stretch, self.begin - begin

    def tensor(self) -> Tensor:
        """The tensor, on the device."""
        if self.stretch is None:
            assert self.own is not None
            return self.own
        values = self.stretch.whole().view(self.dtype)
        return values.as_strided(self.shape, self.strides, values.storage_offset() + self.begin // self.dtype.itemsize)


def tensor_of(packed: Any) -> Any:
    """A saved tensor, on the device, wherever it waited; anything else as it is."""
    return packed.tensor() if isinstance(packed, _Saved) else packed


def _wait(event: Any) -> None:
    """Makes the computing stream wait for an event of the copying one; None is past."""
    if event is not None:
        torch.cuda.current_stream().wait_event(event)


class ActivationOffload:
    """Where the saved tensors of some decoder layers wait.

    Args:
        device: A CUDA device; on any other, copies are made at once.
        persistent: Storage addresses of tensors that stay anyway: weights and buffers.
        smallest_bytes: Saved tensors below stay on the device.
    """

    def __init__(self, device: torch.device, persistent: frozenset[int], smallest_bytes: int = SMALLEST_BYTES) -> None:
        self.device, self.persistent, self.smallest_bytes = device, persistent, smallest_bytes
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.free: list[Tensor] = []  # uint8 buffers not in use
        self.chunk: Tensor | None = None
        self.chunk_used = 0
        self.layers: dict[int, WeakSet[_Stretch]] = {}
        self.bytes: dict[int, int] = {}  # that each of them sends
        self.staying: list[int] = []  # layers whose tensors have not left the device, in order
        self.loan: GradientLoan | None = None  # where tensors of the last layers wait instead
        self.lenders: list[nn.Parameter] = []  # whose gradients these are

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Runs copies on their own stream, after what the computing one has been given so far."""
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            yield

    def event(self) -> Any:
        """When what the copying stream has been given so far is done."""
        return None if self.stream is None else self.stream.record_event()

    def borrow(self, bytes_: int, layer: int) -> Tensor | None:
        """A pinned uint8 buffer of so many bytes or more for a layer. All copies share one stream, so reuse needs no waiting.

        Micro-batches differ in size: the smallest that is large enough is taken, so that those of the largest serve all.
        """
        fitting = [i for i, buffer in enumerate(self.free) if buffer.numel() >= bytes_]
        return self.free.pop(min(fitting, key=lambda i: self.free[i].numel())) if fitting else self._carve(bytes_)

    def _carve(self, bytes_: int) -> Tensor:
        room = -(-bytes_ // 512) * 512
        if self.chunk is None or self.chunk_used + room > self.chunk.numel():
            taken = max(CHUNK_BYTES, room)
            self.chunk = torch.empty(taken, dtype=torch.uint8) if self.stream is None else lock_pages(taken)
            self.chunk_used = 0
        first, self.chunk_used = self.chunk_used, self.chunk_used + room
        return self.chunk[first : self.chunk_used]

    @contextmanager
    def layer(self, number: int) -> Iterator[Callable[[Tensor], Any]]:
        """Sends away what is saved inside; what layers before saved leaves the device as far as there is no room.

        Yields:
            What sends another tensor along, and returns what `tensor_of` brings back.
        """
        saved: list[ReferenceType[_Saved]] = []

        def pack(tensor: Tensor) -> Tensor | _Saved:
            storage = tensor.untyped_storage().data_ptr()
            # A gathered weight has no fixed address, and is gone before a copy of it would be done: its bytes, and the
            # constants in a row of their own, which no activation is.
            weight = storage in self.persistent or tensor.dtype == torch.uint8 or tensor.dim() == 1
            elsewhere = tensor.device.type != self.device.type
            repeated = any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            if elsewhere or tensor.nbytes < self.smallest_bytes or repeated or weight:
                return tensor
            packed = _Saved(tensor.detach())
            saved.append(ref(packed))
            return packed

        with saved_tensors_hooks(pack, tensor_of):
            yield pack
        here = self._send([each for reference in saved if (each := reference()) is not None], number)
        self.layers[number], self.bytes[number] = here, sum(stretch.bytes for stretch in here)
        self.staying.append(number)
        while self.staying and not self._have_room(self.staying):
            for stretch in self.layers[self.staying.pop(0)]:
                stretch.leave()

    def _send(self, saved: list[_Saved], layer: int) -> "WeakSet[_Stretch]":
        """Starts the copies of what a layer saved: of a storage's bytes once, however many tensors see them."""
        storages: dict[int, list[_Saved]] = {}
        for each in saved:
            assert each.own is not None
            if each.own._version != each.version:
                raise RuntimeError("a tensor that is saved for the backward pass was changed in place")
            storages.setdefault(each.own.untyped_storage().data_ptr(), []).append(each)
        sent: WeakSet[_Stretch] = WeakSet()
        for tensors in (sorted(found, key=lambda each: each.begin) for found in storages.values()):
            while tensors:
                begin, end, count = tensors[0].begin // 512 * 512, tensors[0].end, 1
                while count < len(tensors) and tensors[count].begin < end:
                    end, count = max(end, tensors[count].end), count + 1
                together, tensors = tensors[:count], tensors[count:]
                if (buffer := self.borrow(end - begin, layer)) is not None:
                    stretch = _Stretch(self, _bytes_of(together[0].own, begin, end), buffer, layer)
                    sent.add(stretch)
                    for each in together:
                        each.travel_in(stretch, begin)
        return sent

    def _have_room(self, numbers: list[int]) -> bool:
        return sum(self.bytes[number] for number in numbers) <= ROOM * max(self.bytes.values())

    def start(self) -> None:
        """Begins a forward pass."""
        self.layers.clear()
        self.bytes.clear()
        self.staying.clear()
        if self.loan is not None:
            self.loan.start()

    def borrow_from(self, layers: list[nn.Module]) -> bool:
        """Has `loan` be of the memory of these layers' gradients, always the same ones; whether there is any yet."""
        self.lenders = self.lenders or [p for layer in layers for p in layer.parameters() if p.requires_grad]
        gradients = sorted((p.grad for p in self.lenders if p.grad is not None), key=lambda g: g.data_ptr())
        if not layers or len(gradients) < len(self.lenders):
            return False
        places = tuple(gradient.data_ptr() for gradient in gradients)
        if self.loan is None or self.loan.places != places:
            self.loan = GradientLoan(self, gradients)
        return True

    def join(self) -> None:
        """Makes the computing stream wait for all copies so far."""
        if self.stream is None:
            return
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)  # a CUDA graph takes in no stream that did not first wait for its own
        current.wait_stream(self.stream)

    def fetch_around(self, layer: int) -> None:
        """Brings back a layer's tensors and starts on those of the next layers that were sent, as far as there is
        room for them."""
        ahead: list[int] = []
        for number in sorted((n for n in self.layers if n < layer), reverse=True):
            if ahead and not self._have_room([*ahead, number]):
                break
            ahead.append(number)
        for number in (layer, *ahead):
            for stretch in self.layers.get(number, ()):
                stretch.fetch()


class GradientLoan(ActivationOffload):
    """Where saved tensors of the last layers wait in memory of the gradients of layers below them, which are zero until the
    backward pass comes there: the first of a layer's tensors that it asks for brings back all of them, and leaves zeros.

    Copies are made on the computing stream, in order with all else.

    Args:
        offload: Of the other layers.
        gradients: Zero before each forward pass, by address.
    """

    def __init__(self, offload: ActivationOffload, gradients: list[Tensor]) -> None:
        super().__init__(offload.device, offload.persistent, offload.smallest_bytes)
        self.stream = None
        self.places = tuple(gradient.data_ptr() for gradient in gradients)
        self.pieces: list[Tensor] = []  # uint8, each as long as gradients lie side by side
        first = 0
        for last, gradient in enumerate(gradients):
            end = gradient.data_ptr() + gradient.nbytes
            if last + 1 == len(gradients) or gradients[last + 1].data_ptr() != end:
                start = gradients[first].untyped_storage().data_ptr()
                self.pieces.append(_bytes_of(gradients[first], gradients[first].data_ptr() - start, end - start))
                first = last + 1
        self.used: list[int] = []  # bytes of each piece
        self.rooms: dict[int, list[Tensor]] = {}  # by layer

    def borrow(self, bytes_: int, layer: int) -> Tensor | None:
        room = -(-bytes_ // 512) * 512
        for number, piece in enumerate(self.pieces):
            begin, end = self.used[number], self.used[number] + room
            if end <= piece.numel():
                self.used[number] = end
                self.rooms.setdefault(layer, []).append(piece[begin:end])
                return self.rooms[layer][-1]
        return None

    def _have_room(self, numbers: list[int]) -> bool:
        return False  # they leave at once, and come back when they are needed

    def start(self) -> None:
        super().start()
        self.free.clear()
        self.rooms.clear()
        self.used = [0] * len(self.pieces)

    def fetch_around(self, layer: int) -> None:
        for stretch in self.layers.get(layer, ()):
            stretch.fetch()
        for room in self.rooms.pop(layer, ()):  # also those of tensors that nobody needed
            room.zero_()


def _bytes_of(tensor: Tensor | None, begin: int, end: int) -> Tensor:
    """uint8, of a tensor's storage."""
    assert tensor is not None
    whole = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
    return whole[begin:end]


def link_bytes_per_second(device: torch.device) -> float:
    """How fast a CUDA device and pinned host memory exchange data, by the slower direction."""
    there = torch.empty(TRIAL_BYTES, dtype=torch.uint8, device=device)
    here = torch.empty(TRIAL_BYTES, dtype=torch.uint8, pin_memory=True)
    slowest = 0.0
    for target, source in ((here, there), (there, here)):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        target.copy_(source, non_blocking=True)
        begin.record()
        target.copy_(source, non_blocking=True)
        end.record()
        end.synchronize()
        slowest = max(slowest, begin.elapsed_time(end) / 1000)
    return TRIAL_BYTES / slowest


class InputEmbeddings:
    """The input embeddings of a causal language model that computes on `device`.

    Attributes:
        on_host: Whether the table waits on the host.
    """

    def __init__(self, base: Any, device: torch.device, report: Report) -> None:
        self.module = base.get_input_embeddings()
        self.head = base.get_output_embeddings()
        self.device, self.report = device, report
        plain = type(self.module) is nn.Embedding
        self.on_host = plain and self.module.weight.device.type == "cpu" and device.type != "cpu"

    @property
    def frozen(self) -> bool:
        """Whether nothing in them is trained, nor adapted."""
        return not any(parameter.requires_grad for parameter in self.module.parameters())

    def movable_bytes(self) -> int:
        """Of the table on the device; 0 where it must stay: tied to the head, adapted or trained."""
        if type(self.module) is not nn.Embedding or self.on_host:
            return 0
        weight = self.module.weight
        tied = getattr(self.head, "weight", None) is weight
        return 0 if tied or weight.requires_grad else weight.nbytes

    def move_to_host(self) -> None:
        """Moves the table to the host, where it may."""
        if self.movable_bytes():
            self.on_host = True
            self.module.to("cpu")

    def move_back(self) -> None:
        """Puts the table where it was, if it left."""
        if not self.on_host:
            return
        torch.cuda.empty_cache()
        try:
            self.module.to(self.device)
        except torch.OutOfMemoryError:
            self.report(Notice("The input embeddings stay on the host: there is no memory for them on the device."))
            return
        self.on_host = False

    def embed(self, ids: Tensor, looked_up: Tensor | None = None) -> Tensor:
        """Token ids (rows, length) to embeddings (rows, length, size) on the device.

        Args:
            ids: On the host or the device.
            looked_up: From `look_up`, where that was done before.
        """
        if looked_up is None and not self.on_host:
            return self.module(ids.to(self.device, non_blocking=True))
        return (self.look_up(ids) if looked_up is None else looked_up).to(self.device, non_blocking=True)

    def look_up(self, ids: Tensor) -> Tensor:
        """Token ids (rows, length) to embeddings (rows, length, size) in memory of the host, pinned for a CUDA device."""
        weight = self.module.weight
        rows = torch.empty(ids.numel(), weight.shape[1], dtype=weight.dtype, pin_memory=self.device.type == "cuda")
        torch.index_select(weight.detach(), 0, ids.flatten().cpu(), out=rows)
        return rows.view(*ids.shape, -1)
