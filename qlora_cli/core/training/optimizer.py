"""Optimizers by name, over the parameter buffers, with their state as tensors and plain numbers."""

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from qlora_cli.core.bnb import bitsandbytes as bnb
from qlora_cli.core.training.flat_parameters import TrainableParameters
from qlora_cli.errors import CheckpointError


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


def choose_optimizer(name: str | None, device: torch.device) -> str:
    """The optimizer asked for, or the default of the device."""
    return name or ("paged_adamw_8bit" if device.type == "cuda" else "adamw")


def state_bytes(name: str, parameters: int) -> int:
    """Bytes of optimizer state for so many trained parameters."""
    return int(_OPTIMIZERS[name][1] * parameters)


def allocated_state_bytes(name: str, parameters: int) -> int:
    """Of these, what PyTorch's allocator holds on a CUDA device: nothing for a paged optimizer, whose states are in
    managed memory and leave the device where it is full."""
    return 0 if name.startswith("paged") else state_bytes(name, parameters)


def build_optimizer(name: str, parameters: TrainableParameters, *, weight_decay: float) -> Optimizer:
    """Builds an optimizer over the buffers. Its learning rate is set before every step by the trainer.

    Those of bitsandbytes work on the CPU too, where nothing is paged. Adafactor, which factors matrices, gets the
    separate parameters. Weight decay is decoupled, and for matrices only.
    """
    kinds: dict[tuple[bool, float], list[Tensor]] = {}
    for buffer in sorted(parameters.buffers, key=lambda buffer: (not buffer.decays, buffer.rate)):
        trained = buffer.views if name == "adafactor" else (buffer.values,)
        kinds.setdefault((buffer.decays, buffer.rate), []).extend(trained)
    groups = [
        {"params": trained, "weight_decay": weight_decay if decays else 0.0, "rate": rate}
        for (decays, rate), trained in kinds.items()
    ]
    return _OPTIMIZERS[name][0](groups, lr=0.0)


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
                optimizer.prefetch_state(parameter)
                optimizer.update_step(*place)
        return
    with warnings.catch_warnings():  # what is paged on a card is not on the CPU, and need not be
        warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
        optimizer.step()


def optimizer_state(optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, numbers) of the optimizer by `<parameter's index>.<name>`: all that the next step depends on."""
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
