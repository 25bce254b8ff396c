"""Optimizers by name, over the parameter buffers, with their state as tensors and plain numbers.

The state of a paged optimizer is in managed memory, and leaves the card where that is full; or, where that is planned, a
share of it is in page-locked host memory from the start, from which it passes through the card in pieces with each update.
"""

import functools
import importlib.util
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from qlora_cli.core.bnb import bitsandbytes as bnb
from qlora_cli.core.streaming.host_memory import allocate_locked
from qlora_cli.core.training.flat_parameters import ALIGNMENT_ELEMENTS, TrainableParameters
from qlora_cli.errors import CheckpointError
from qlora_cli.events import Report

_HAS_TRITON = importlib.util.find_spec("triton") is not None  # not beside a CPU-only torch
if _HAS_TRITON:
    from qlora_cli.kernels.triton import adam_8bit


def _of_bitsandbytes(name: str) -> Callable[..., Optimizer]:
    return lambda *given, **named: getattr(bnb.optim, name)(*given, **named)


# How each is made, and its bytes of state for each trained parameter; 8-bit states add one fp32 scale for every 256.
# Adafactor keeps a row and a column of a matrix: 4 / rank bytes, here for the smallest ranks in use.
_OPTIMIZERS: dict[str, tuple[Callable[..., Optimizer], float]] = {
    "adamw": (partial(torch.optim.AdamW, fused=True), 8),
    "lion": (_of_bitsandbytes("Lion32bit"), 4),
    "sgd": (torch.optim.SGD, 0),
    "adafactor": (torch.optim.Adafactor, 1),
    "paged_adamw_32bit": (_of_bitsandbytes("PagedAdamW32bit"), 8),
    "paged_lion_32bit": (_of_bitsandbytes("PagedLion32bit"), 4),
    "paged_adamw_8bit": (_of_bitsandbytes("PagedAdamW8bit"), 2 + 8 / 256),
    "adamw_8bit": (_of_bitsandbytes("AdamW8bit"), 2 + 8 / 256),
    "paged_lion_8bit": (_of_bitsandbytes("PagedLion8bit"), 1 + 4 / 256),
    "lion_8bit": (_of_bitsandbytes("Lion8bit"), 1 + 4 / 256),
}
_CONSTANTS = {"qmap1", "qmap2"}  # bitsandbytes' quantisation maps, equal in every run
# What of bitsandbytes' state has an element for each of the parameter, and what one for each block of 256.
_STATES, _SCALES = ("state1", "state2"), ("absmax1", "absmax2")
# Of waiting state on the card at once: as much as hides a launch behind its copy, once each coming, in use and going.
PIECE_BYTES, PIECES = 2**25, 3
# Of an update of random values by our own kernel: how far values may lie from bitsandbytes', as a share of the rate, and
# which share of codes may be others. A value halfway between two codes is rounded either way.
MOST_APART, MOST_OTHER_CODES, TRIED_ELEMENTS = 0.02, 0.01, 65_636


def choose_optimizer(name: str | None, device: torch.device) -> str:
    """The optimizer asked for, or the default of the device."""
    return name or ("paged_adamw_8bit" if device.type == "cuda" else "adamw")


def state_bytes(name: str, parameters: int) -> int:
    """Bytes of optimizer state for so many trained parameters."""
    return int(_OPTIMIZERS[name][1] * parameters)


def allocated_state_bytes(name: str, parameters: int, waiting_share: float = 0.0) -> int:
    """Of these, what PyTorch's allocator holds on a CUDA device: nothing for a paged optimizer, whose states are in
    managed memory and leave the device where it is full, unless a share of them waits on the host."""
    if name.startswith("paged") and not waiting_share:
        return 0
    bytes_ = state_bytes(name, parameters)
    return int((1 - waiting_share) * bytes_) + min(PIECES * PIECE_BYTES, int(waiting_share * bytes_))


def waiting_bytes(name: str, parameters: int) -> int:
    """What a paged optimizer's state that waits there takes of the host at the most, in powers of two; 0 for one that cannot."""
    per_state = int(_OPTIMIZERS[name][1] * parameters) // (2 if "adamw" in name else 1)
    if not (name.startswith("paged") and per_state):
        return 0
    return 2 ** (per_state - 1).bit_length() * (2 if "adamw" in name else 1)


def build_optimizer(
    name: str,
    parameters: TrainableParameters,
    *,
    weight_decay: float,
    own_kernel: bool = True,
    on_host: Report | None = None,
    waiting_share: float = 1.0,
    piece_bytes: int = PIECE_BYTES,
) -> Optimizer:
    """Builds an optimizer over the buffers. Its learning rate is set before every step by the trainer.

    Those of bitsandbytes work on the CPU too, where nothing is paged. Adafactor, which factors matrices, gets the
    separate parameters. Weight decay is decoupled, and for matrices only.

    Args:
        own_kernel: Whether 8-bit AdamW may update by a kernel of our own.
        on_host: Where the state of a paged optimizer is to wait in host memory: told if that cannot be page-locked.
        waiting_share: Of that state, what waits there; the rest stays on the device from the first update on.
        piece_bytes: Of what waits, on the device at a time, in each of three places.
    """
    kinds: dict[tuple[bool, float], list[Tensor]] = {}
    for buffer in sorted(parameters.buffers, key=lambda buffer: (not buffer.decays, buffer.rate)):
        trained = buffer.views if name == "adafactor" else (buffer.values,)
        kinds.setdefault((buffer.decays, buffer.rate), []).extend(trained)
    groups = [
        {"params": trained, "weight_decay": weight_decay if decays else 0.0, "rate": rate}
        for (decays, rate), trained in kinds.items()
    ]
    optimizer = _OPTIMIZERS[name][0](groups, lr=0.0)
    if own_kernel and name in ("adamw_8bit", "paged_adamw_8bit"):
        _use_kernel(optimizer)
    if on_host is not None:
        _keep_state_on_host(optimizer, on_host, waiting_share, piece_bytes)
    return optimizer


def _keep_state_on_host(optimizer: Any, report: Report, share: float, piece_bytes: int) -> None:
    def buffer(parameter: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        bytes_ = parameter.numel() * dtype.itemsize
        if parameter.device.type != "cuda":
            return torch.zeros(parameter.shape, dtype=dtype)
        state, _ = allocate_locked(bytes_, "states of the optimizer", report)
        return state.zero_().view(dtype).view(parameter.shape)

    optimizer.get_state_buffer = buffer
    # Pieces of state that stay on the device, by place (what the host has is of before their first update), and rooms of the
    # others, which a captured step would take.
    optimizer.on_device, optimizer.rooms, optimizer.waiting_share, optimizer.piece_bytes = {}, {}, share, piece_bytes
    optimizer.initialized = True  # its own first step would take what it finds on the host to the card


def set_learning_rate(optimizer: Optimizer, learning_rate: float) -> None:
    """Sets the rate of the next step, for each group as a multiple of the run's."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["rate"]


def step_optimizer(optimizer: Optimizer) -> None:
    """Updates the parameters, without waiting for the device from the second step on.

    After the first step, which prepares its state, this is bitsandbytes' own `step` without its waits: that synchronises
    after each parameter, for the sake of paged states. Nothing here needs it: what follows is queued behind the update,
    and `optimizer_state` waits before a paged state is read.
    """
    if isinstance(optimizer, bnb.optim.optimizer.Optimizer8bit) and optimizer.initialized:
        for place in _places(optimizer):
            parameter = place[1]
            if parameter.grad is not None:
                if not optimizer.state[parameter]:
                    optimizer.init_state(*place)
                if hasattr(optimizer, "on_device"):
                    _update_in_pieces(optimizer, *place)
                    continue
                optimizer.prefetch_state(parameter)
                optimizer.update_step(*place)
        return
    with warnings.catch_warnings():  # what is paged on a card is not on the CPU, and need not be
        warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
        optimizer.step()


def _use_kernel(optimizer: Any) -> None:
    """Has AdamW of 8-bit states update by a kernel of our own where that agrees with bitsandbytes', from the first step on."""
    plain = optimizer.update_step

    def update(group: dict[str, Any], parameter: Tensor, group_index: int, index: int) -> None:
        state = optimizer.state[parameter]
        if state["state1"].dtype != torch.uint8 or not (parameter.is_cuda and kernel_agrees(parameter.device)):
            plain(group, parameter, group_index, index)
            return
        state["step"] += 1
        _update_by_kernel(parameter, state, optimizer.get_config(group_index, index, group))

    optimizer.update_step = update


def _update_by_kernel(parameter: Tensor, state: dict[str, Any], config: dict[str, Any]) -> None:
    """Updates a parameter and bitsandbytes' state of it, in place.

    Args:
        parameter: fp32 with a gradient.
        state: Its "step" is the update's.
        config: betas, eps, lr and weight_decay.
    """
    assert parameter.grad is not None
    rule = adam_8bit.Rule(config["lr"], tuple(config["betas"])[:2], config["eps"], config["weight_decay"])
    moments = adam_8bit.Moments(*(state[name] for name in (*_STATES, *_SCALES, "qmap1", "qmap2")))
    adam_8bit.update(parameter.data, parameter.grad, moments, rule, state["step"])


@functools.cache
def kernel_agrees(device: torch.device) -> bool:
    """Whether the kernel is there, and does what bitsandbytes does on a CUDA device."""
    if not _HAS_TRITON or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    try:
        return _kernel_is_like_theirs(device)
    except Exception:  # Triton has errors of its own: no compiler here, or a card that it does not know
        return False


def _kernel_is_like_theirs(device: torch.device) -> bool:
    generator = torch.Generator(device).manual_seed(0)

    def random() -> Tensor:
        return torch.randn(TRIED_ELEMENTS, generator=generator, device=device)

    theirs = torch.nn.Parameter(random())
    optimizer = bnb.optim.AdamW8bit([theirs], lr=1e-3, weight_decay=0.1)
    theirs.grad = random()
    optimizer.step()
    ours = theirs.detach().clone()
    own = {k: v.clone() if isinstance(v, Tensor) else v for k, v in optimizer.state[theirs].items()}
    own["step"] += 1
    ours.grad = theirs.grad = random()
    optimizer.step()
    _update_by_kernel(ours, own, optimizer.get_config(0, 0, optimizer.param_groups[0]))
    state = optimizer.state[theirs]
    apart = (ours - theirs).abs().quantile(0.99) / 1e-3
    other = [(own[name] != state[name]).float().mean() for name in _STATES]
    scales = [(own[name] / state[name] - 1).abs().max() for name in _SCALES]
    return bool(
        torch.stack([apart / MOST_APART, *(o / MOST_OTHER_CODES for o in other), *(s / 1e-5 for s in scales)]).max() < 1
    )


@torch.no_grad()
def _update_in_pieces(optimizer: Any, group: dict[str, Any], parameter: Tensor, group_index: int, index: int) -> None:
    """bitsandbytes' update of one buffer, bit for bit, whose state comes from the host and returns there piece by piece:
    the next one comes while one is in use and the one before goes. Pieces that stay on the device are updated while the
    first ones come."""
    state, gradient = optimizer.state[parameter], parameter.grad
    assert gradient is not None
    waiting = {key: state[key] for key in _STATES if key in state}
    elements = optimizer.piece_bytes // sum(tensor.itemsize for tensor in waiting.values())
    elements = min(max(1, elements // ALIGNMENT_ELEMENTS) * ALIGNMENT_ELEMENTS, parameter.numel())
    starts = range(0, parameter.numel(), elements)
    going = math.ceil(len(starts) * optimizer.waiting_share)
    rooms = optimizer.rooms
    for which in ((turn, key, t.dtype) for turn in range(min(going, PIECES)) for key, t in waiting.items()):
        if which not in rooms or rooms[which].numel() < elements:
            rooms[which] = torch.empty(elements, dtype=which[2], device=parameter.device)
    copies = _CopyStreams(parameter.device)

    def update(part: slice, room: dict[str, Tensor]) -> int:
        blocks = slice(part.start // ALIGNMENT_ELEMENTS, -(-part.stop // ALIGNMENT_ELEMENTS))
        piece = torch.nn.Parameter(parameter[part])
        piece.grad = gradient[part]
        scales = {key: state[key][blocks] for key in _SCALES if key in state}
        optimizer.state[piece] = {**state, **room, **scales}
        optimizer.update_step(group, piece, group_index, index)
        return optimizer.state.pop(piece)["step"]

    for start in starts[going:]:
        part = slice(start, start + elements)
        place = group_index, index, start
        if place not in optimizer.on_device:
            optimizer.on_device[place] = {
                key: tensor[part].to(parameter.device, copy=True) for key, tensor in waiting.items()
            }
        step = update(part, optimizer.on_device[place])
    for number, start in enumerate(starts[:going]):
        part = slice(start, start + elements)
        length, turn = parameter[part].numel(), number % PIECES
        room = {key: rooms[turn, key, tensor.dtype][:length] for key, tensor in waiting.items()}
        with copies.coming(number):
            for key, tensor in room.items():
                tensor.copy_(waiting[key][part], non_blocking=True)
        copies.wait_for_what_comes()
        step = update(part, room)
        with copies.going(number):
            for key, tensor in room.items():
                waiting[key][part].copy_(tensor, non_blocking=True)
    state["step"] = step
    copies.finish()


def _bring_to_host(optimizer: Any) -> None:
    """Gives what waits on the host the values of the pieces that stay on the device."""
    places = {(group_index, index): parameter for _, parameter, group_index, index in _places(optimizer)}
    for (group_index, index, start), room in getattr(optimizer, "on_device", {}).items():
        state = optimizer.state[places[group_index, index]]
        for key, tensor in room.items():
            state[key][start : start + tensor.numel()].copy_(tensor)


class _CopyStreams:
    """Streams of copies to a CUDA device and back beside the one that computes; nothing on the CPU."""

    def __init__(self, device: torch.device) -> None:
        self.on_cuda = device.type == "cuda"
        self.left: dict[int, Any] = {}  # by room, when it was last free
        if self.on_cuda:
            self.computing = torch.cuda.current_stream(device)
            self.to_card, self.to_host = torch.cuda.Stream(device), torch.cuda.Stream(device)
            self.to_card.wait_stream(self.computing)

    def coming(self, number: int) -> Any:
        """Copies of a piece to the card are made inside, once its room is free."""
        if not self.on_cuda:
            return nullcontext()
        if number % PIECES in self.left:
            self.to_card.wait_event(self.left[number % PIECES])
        return torch.cuda.stream(self.to_card)

    def wait_for_what_comes(self) -> None:
        """What is computed from here on follows these copies."""
        if self.on_cuda:
            self.computing.wait_stream(self.to_card)

    @contextmanager
    def going(self, number: int) -> Iterator[None]:
        """Copies of a piece to the host are made inside, after what was computed up to here."""
        if not self.on_cuda:
            yield
            return
        self.to_host.wait_stream(self.computing)
        with torch.cuda.stream(self.to_host):
            yield
            self.left[number % PIECES] = self.to_host.record_event()

    def finish(self) -> None:
        """What is computed from here on, and takes the memory of the rooms, follows all copies."""
        if self.on_cuda:
            self.computing.wait_stream(self.to_host)


def optimizer_state(optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, numbers) of the optimizer by `<parameter's index>.<name>`: all that the next step depends on."""
    _bring_to_host(optimizer)
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for index, (_, parameter, *_) in enumerate(_places(optimizer)):
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and key not in _CONSTANTS:
                if value.device.type == "cpu" and parameter.device.type == "cuda":
                    torch.cuda.synchronize(parameter.device)  # a paged state: memory the card may still be writing
                tensors[f"{index}.{key}"] = value
            elif not isinstance(value, Tensor):
                numbers[f"{index}.{key}"] = value
    return tensors, numbers


def load_optimizer_state(optimizer: Optimizer, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
    """Puts a saved state back, bit for bit, paged states into paged memory.

    Raises:
        CheckpointError: The state is another optimizer's, or of parameters of other sizes.
    """
    saved: list[dict[str, Any]] = [{} for _ in _places(optimizer)]
    for name, value in {**tensors, **numbers}.items():
        index, _, key = name.partition(".")
        if int(index) >= len(saved):
            raise CheckpointError(f"The saved optimizer has more parameters than the {len(saved)} trained now.")
        saved[int(index)][key] = value
    if isinstance(optimizer, bnb.optim.optimizer.Optimizer8bit):
        _load_bitsandbytes_state(optimizer, saved)
    else:
        # torch casts each tensor to its parameter's dtype and device; both equal the saved ones.
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict(
            {"state": {i: state for i, state in enumerate(saved) if state}, "param_groups": groups}
        )


def _load_bitsandbytes_state(optimizer: Any, saved: list[dict[str, Any]]) -> None:
    # Its own load_state_dict would move paged states into plain device memory.
    getattr(optimizer, "on_device", {}).clear()
    for place, wanted in zip(_places(optimizer), saved, strict=True):
        if not wanted:
            continue
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
            optimizer.init_state(*place)
        state = optimizer.state[place[1]]
        if wrong := {key for key, _ in _shapes(wanted).items() ^ _shapes(state).items()}:
            raise CheckpointError(f"The saved optimizer state does not fit: {', '.join(sorted(wrong))}.")
        for key, value in wanted.items():
            if isinstance(value, Tensor):
                state[key].copy_(value)
            else:
                state[key] = value


def _shapes(state: dict[str, Any]) -> dict[str, torch.Size | None]:
    return {k: v.shape if isinstance(v, Tensor) else None for k, v in state.items() if k not in _CONSTANTS}


def _places(optimizer: Optimizer) -> Iterator[tuple[dict[str, Any], Tensor, int, int]]:
    """(group, parameter, index of the group, index in it) of every parameter, as bitsandbytes' methods take them."""
    for group_index, group in enumerate(optimizer.param_groups):
        for index, parameter in enumerate(group["params"]):
            yield group, parameter, group_index, index
