"""The random generators of this process in, tensors out, and back: torch on CPU and CUDA, Python's and NumPy's."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import numpy as np
import torch
from torch import Tensor

RandomState = dict[str, Tensor]  # on the CPU, so that safetensors can hold them


def seed_everything(seed: int) -> None:
    """Seeds all generators, each rank with a seed of its own."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def capture_random_state(device: torch.device) -> RandomState:
    """The state of all generators. Does not synchronise the device."""
    _, words, python_gauss = random.getstate()
    _, keys, position, has_gauss, gauss = cast(tuple, np.random.get_state())
    state = {
        "cpu": torch.get_rng_state(),
        "python": torch.tensor(words, dtype=torch.int64),
        "python_gauss": torch.tensor([] if python_gauss is None else [python_gauss], dtype=torch.float64),
        "numpy": torch.from_numpy(keys.astype(np.int64)),
        "numpy_position": torch.tensor([position, has_gauss], dtype=torch.int64),
        "numpy_gauss": torch.tensor([gauss], dtype=torch.float64),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(state: RandomState, device: torch.device) -> None:
    """Puts all generators back; a state saved on CPU leaves CUDA's as it is, and the other way round."""
    torch.set_rng_state(state["cpu"])
    gauss = state["python_gauss"].tolist()
    random.setstate((3, tuple(state["python"].tolist()), gauss[0] if gauss else None))
    position, has_gauss = state["numpy_position"].tolist()
    keys = state["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, position, has_gauss, state["numpy_gauss"].item()))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


@contextmanager
def undisturbed_random_state(device: torch.device) -> Iterator[None]:
    """What is drawn inside the block is as if it had never been drawn."""
    state = capture_random_state(device)
    try:
        yield
    finally:
        restore_random_state(state, device)
