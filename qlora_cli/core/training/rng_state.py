"""State of the random generators that training draws from: torch's, on the CPU and on the device.

Nothing draws from Python's and NumPy's global generators: rows are ordered and held out by generators of their own.
"""

from contextlib import AbstractContextManager

import torch
from torch import Tensor

RandomState = dict[str, Tensor]  # on the CPU, so that safetensors can hold them


def capture_random_state(device: torch.device) -> RandomState:
    """The state of the generators. Does not synchronise the device."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(state: RandomState, device: torch.device) -> None:
    """Puts the generators back; a state saved on the CPU leaves CUDA's as it is, and the other way round.

    Other entries, such as the Python and NumPy generators in checkpoints of earlier versions, are ignored.
    """
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def undisturbed_random_state(device: torch.device) -> AbstractContextManager[None]:
    """What is drawn inside the block is as if it had never been drawn."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])
