"""Streamed base: decoder layers whose frozen weights wait on the host and come to the device when they are used.

A layer's packed weights, their constants and experts' stacks lie side by side in one buffer. Its tensors become views of
the buffer of a ring into which the layer comes (ring.py), for good. Two hooks say when it is used: one before its
forward pass; one on its output's gradient, before anything of its backward pass. Autograd runs first what was recorded
last (its sequence numbers fall), so that all of a layer's backward pass, a repetition of its forward pass included,
lies between this hook and that of the layer before.

What can be reached from elsewhere too (tied embeddings, layers that share weights) stays on the device, as does what is
small.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qlora_cli.core.experts.four_bit_experts import PARTS, FourBitExperts
from qlora_cli.core.models.quantization import STREAMED, is_4bit
from qlora_cli.core.models.quantized_cache import COPY
from qlora_cli.core.streaming.disk_source import STAGED, DiskSource, Extent
from qlora_cli.core.streaming.host_memory import layer_buffers
from qlora_cli.core.streaming.ring import SLOTS, HostSource, LayerSource, Ring
from qlora_cli.core.weights.mapped_file import MappedFile
from qlora_cli.events import Report, report_nothing
from qlora_cli.sizes import format_bytes

ATTRIBUTE = "_qlora_streamed_base"  # of a model: its `StreamedBase`
ALIGNMENT_BYTES = 256  # of each tensor in a buffer, as PyTorch's allocators align
SMALLEST_BYTES = 2**20  # of a matrix that is not packed


@dataclass(frozen=True)
class StreamedBase:
    """What streams of a base.

    Attributes:
        ring: Through which its layers come.
        streamed: How many decoder layers wait on the host.
        layers: How many there are.
        layer_bytes: Of the largest of those that wait.
        on_disk: Whether they wait on the disk.
    """

    ring: Ring
    streamed: int
    layers: int
    layer_bytes: int
    on_disk: bool

    @property
    def copied_bytes(self) -> int:
        """What a forward pass copies, and a backward pass: the last layers of the one are the first of the other."""
        return (self.streamed - self.ring.slots) * self.layer_bytes

    def needs(self) -> dict[str, Any]:
        """What of `StepNeeds` is about it; how fast the disk is, is known once some passes have read it.

        The first copy of a pass begins with the second of the layers that wait, and the last is done before the last of
        them begins: what computes before and after hides none.
        """
        return {
            "streamed_bytes": self.copied_bytes,
            "source_bytes_per_second": self.ring.source.bytes_per_second,
            "streaming_share": 1 - self.ring.slots / max(1, self.streamed),
        }

    def describe(self) -> str:
        """In words."""
        return f"weights of {self.streamed} of {self.layers} layers on the {'disk' if self.on_disk else 'host'}"


@dataclass(frozen=True)
class _Place:
    """A frozen tensor of a module, and what puts another in its stead."""

    tensor: Tensor
    bind: Callable[[Tensor], None]
    packed: bool

    @property
    def storage(self) -> int:
        """Where it lies: of its bytes the first, for several may be of one file."""
        return self.tensor.data_ptr()

    @property
    def streams(self) -> bool:
        """Whether it is worth a copy."""
        return self.packed or (self.tensor.ndim > 1 and self.tensor.nbytes >= SMALLEST_BYTES)

    @property
    def room(self) -> int:
        """Bytes it takes in a buffer."""
        return -(-self.tensor.nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def evenly(numbers: Sequence[int], count: int) -> list[int]:
    """So many of these numbers, equally far apart."""
    total = len(numbers)
    return [number for i, number in enumerate(numbers) if (i + 1) * count // total > i * count // total]


def stream_base(
    base: Any,
    layers: Sequence[nn.Module],
    device: torch.device,
    *,
    streamed: int,
    slots: int = SLOTS,
    report: Report = report_nothing,
) -> StreamedBase:
    """Has some of a causal language model's decoder layers wait on the host, in place.

    Args:
        base: Frozen. Its packed weights may be on the host, flattened and filled up as `WeightShards` keeps them, or lie
            in the copy of the base on the disk, where they then wait; all else is on the device.
        layers: Its decoder's.
        device: Where it computes.
        streamed: How many wait; evenly among the others, so that copies have the time that these compute.
        slots: Layers on the device at once, of those.
        report: Is told where memory is not page-locked, or the disk is what steps wait for.
    """
    copy: MappedFile | None = base.__dict__.get(COPY)
    places = {module: list(_frozen_tensors(module)) for module in base.modules()}
    owners = Counter(place.storage for found in places.values() for place in found)
    waiting: list[tuple[nn.Module, list[_Place]]] = []
    for number in evenly(range(len(layers)), min(streamed, len(layers))):
        inside = [place for module in layers[number].modules() for place in places[module]]
        own = [place for place in inside if place.streams and owners[place.storage] == 1]
        own = own if copy is None else [place for place in own if copy.start_of(place.tensor) is not None]
        waiting += [(layers[number], own)] if own else []
    stay = {id(place) for _, own in waiting for place in own}
    _move([place for found in places.values() for place in found if place.packed and id(place) not in stay], device)
    places.clear()
    layer_bytes = max((sum(place.room for place in own) for _, own in waiting), default=0)
    held = len(waiting) if copy is None else min(STAGED, len(waiting))
    buffers = layer_buffers(layer_bytes, held, device, report)
    source: LayerSource
    if copy is not None:
        extents = [_extents(own, copy) for _, own in waiting]
        source = DiskSource(copy, extents, list(buffers), min(slots, len(waiting)), report)
    else:
        # Piece by piece, while what was packed before is given back: never is all of it there twice.
        source = HostSource([_pack(own, buffer) for (_, own), buffer in zip(waiting, buffers, strict=True)])
    ring = Ring(source, len(waiting), layer_bytes, device, slots)
    for number, (layer, own) in enumerate(waiting):
        for place, view in zip(own, _views(ring.buffers[ring.slot(number)], own), strict=True):
            place.bind(view)
        _announce(layer, ring, number)
    made = StreamedBase(ring, len(waiting), len(layers), layer_bytes, copy is not None)
    setattr(base, ATTRIBUTE, made)
    return made


def streamed_base_of(model: nn.Module) -> StreamedBase | None:
    """What `stream_base` made of a model, an adapter around it or not; None where it is whole on the device."""
    return next((m.__dict__[ATTRIBUTE] for m in model.modules() if ATTRIBUTE in m.__dict__), None)


def describe_speed(tokens: int, seconds: float, copied_bytes: int, link: float, source: float) -> str:
    """In words, how long a micro-batch of so many tokens will take, and its copies at the rates, in bytes a second, of the
    link and of where they come from."""
    what, rate = ("link", link) if link <= source else ("disk", source)
    return (
        f"A micro-batch of {tokens:,} tokens takes about {seconds:.3g} s by what one layer took, {tokens / seconds:,.0f} "
        f"tokens a second; its {format_bytes(copied_bytes)} of weights alone take the {what} {copied_bytes / rate:.3g} s."
    )


def _frozen_tensors(module: Any) -> Iterator[_Place]:
    """A module's own parameters that are not trained, and what undoes their packing."""
    shapes: dict[str, int] = {}  # elements of packed ones, as they are without filling
    if isinstance(module, FourBitExperts):
        for weight in module.expert_weights:
            total = weight.experts * weight.elements
            shapes |= {weight.name: total // 2}
            for part in PARTS:
                name = f"{weight.name}_{part}"
                if (constants := module._buffers.get(name)) is not None:
                    whole = module.whole(name, constants).numel()
                    yield _Place(constants.flatten()[:whole], partial(module._buffers.__setitem__, name), True)
    elif is_4bit(module):
        state = module.weight.quant_state
        elements = state.shape.numel()
        shapes["weight"] = -(-elements // 2)
        blocks = -(-elements // state.blocksize)
        yield _Place(state.absmax.flatten()[:blocks], partial(setattr, state, "absmax"), True)
        if state.state2 is not None:
            yield _Place(state.state2.absmax, partial(setattr, state.state2, "absmax"), True)
    for name, parameter in module._parameters.items():
        if parameter is None or parameter.requires_grad:
            continue
        data, packed = parameter.detach().as_subclass(Tensor), name in shapes
        if packed:
            data = data.flatten()[: shapes[name]]
            data = data.view(-1, 1) if name == "weight" else data
        yield _Place(data, partial(setattr, parameter, "data"), packed)


def _move(places: Sequence[_Place], device: torch.device) -> None:
    """Puts tensors on a device, in the shapes they have once they are whole; what is shared stays shared."""
    moved: dict[int, Tensor] = {}
    for place in places:
        if place.storage not in moved:
            moved[place.storage] = place.tensor.to(device)
        place.bind(moved[place.storage])


def _pack(places: list[_Place], buffer: Tensor) -> Tensor:
    """Moves tensors into a buffer of the host, of which what they take is returned; the places keep their shapes only, so
    that what they were is given back."""
    for index, (place, view) in enumerate(zip(places, _views(buffer, places), strict=True)):
        view.copy_(place.tensor)
        place.bind(view)
        places[index] = replace(place, tensor=place.tensor.to("meta"))
    return buffer[: sum(place.room for place in places)]


def _extents(places: Sequence[_Place], copy: MappedFile) -> list[Extent]:
    """Where tensors of a layer lie in a file, and where they go in a buffer."""
    extents, room = [], 0
    for place in places:
        start = copy.start_of(place.tensor)
        assert start is not None
        extents.append(Extent(start, place.tensor.nbytes, room))
        room += place.room
    return extents


def _views(buffer: Tensor, places: Sequence[_Place]) -> Iterator[Tensor]:
    """The room of each tensor in a buffer, in its shape and dtype."""
    first = 0
    for place in places:
        tensor = place.tensor
        yield buffer[first : first + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        first += place.room


def _announce(layer: nn.Module, ring: Ring, number: int) -> None:
    """Has a layer brought before it is used: called, differentiated, or its weights read."""

    def before_forward(*_: Any) -> None:
        # A repetition of the forward pass is a part of the backward pass.
        ring.use(number, 1 if torch._C._current_graph_task_id() == -1 else -1)

    def before_backward(_: Tensor) -> None:
        ring.use(number, -1)

    def after_forward(_: nn.Module, __: tuple, output: Any) -> None:
        for value in output if isinstance(output, tuple | list) else (output,):
            if isinstance(value, Tensor) and value.requires_grad:
                value.register_hook(before_backward)

    layer.register_forward_pre_hook(before_forward)
    layer.register_forward_hook(after_forward)
    for module in layer.modules():
        if module is layer or is_4bit(module) or isinstance(module, FourBitExperts):
            module.__dict__[STREAMED] = partial(ring.use, number)
