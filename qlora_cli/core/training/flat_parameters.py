"""Trainable parameters in a few contiguous buffers of values and gradients, the parameters views of them.

An adapter is hundreds of small matrices. As views of one buffer they are zeroed, reduced over ranks, measured, scaled
and updated in one launch each: bitsandbytes takes 27 ms to step 448 separate tensors on an H200.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

# Of each parameter's offset in its buffer. bitsandbytes scales 8-bit states by blocks of 256 elements, so no block
# spans two parameters, and the update equals that of separate tensors.
ALIGNMENT_ELEMENTS = 256
LARGEST_BUFFER_ELEMENTS = 2**30  # bitsandbytes' kernels index with 32 bits


@dataclass(frozen=True)
class Buffer:
    """Parameters of one dtype, device and learning rate that decay alike, end to end."""

    values: nn.Parameter  # (elements,), `values.grad` of the same shape stands always
    names: tuple[str, ...]
    views: tuple[nn.Parameter, ...]  # the model's own parameters, each sharing `values`' and `values.grad`'s storage
    decays: bool  # whether weight decay applies: matrices, not magnitudes, norms or biases
    rate: float  # its learning rate over the run's


class TrainableParameters:
    """The parameters of `model` that require gradients, moved into buffers. Their objects stay the model's own.

    Args:
        model: Adapted.
        b_rate: Learning rate of the adapters' B over that of A and all else: LoRA+ (https://arxiv.org/abs/2402.12354).

    Raises:
        ValueError: The model has no trainable parameter.
    """

    def __init__(self, model: nn.Module, b_rate: float = 1.0) -> None:
        groups: dict[tuple, list[list[tuple[str, nn.Parameter]]]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                rate = b_rate if ".lora_B." in name else 1.0
                batches = groups.setdefault((parameter.device, parameter.dtype, parameter.ndim >= 2, rate), [[]])
                if _elements([*batches[-1], (name, parameter)]) > LARGEST_BUFFER_ELEMENTS and batches[-1]:
                    batches.append([])
                batches[-1].append((name, parameter))
        if not groups:
            raise ValueError("the model has no trainable parameter")
        self.buffers = [
            _move_into_buffer(batch, decays, rate)
            for (_, _, decays, rate), batches in groups.items()
            for batch in batches
        ]

    @property
    def device(self) -> torch.device:
        """Device of the first buffer."""
        return self.buffers[0].values.device

    @property
    def elements(self) -> int:
        """Elements of all buffers, alignment included."""
        return sum(buffer.values.numel() for buffer in self.buffers)

    def gradients(self) -> list[Tensor]:
        """The gradient buffers, (elements,) each."""
        return [buffer.values.grad for buffer in self.buffers if buffer.values.grad is not None]

    def zero_gradients(self) -> None:
        """Sets every gradient to zero, in place: `zero_grad(set_to_none=True)` would cut the views off."""
        for gradient in self.gradients():
            gradient.zero_()

    def scale_gradients(self, factor: float | Tensor) -> None:
        """Multiplies every gradient, in place."""
        for gradient in self.gradients():
            gradient.mul_(factor)

    def gradient_norm(self) -> Tensor:
        """Euclidean norm of all gradients: an fp32 scalar on the device, not finite when any gradient is not."""
        norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in self.gradients()]
        return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))

    def without_gradient(self) -> list[str]:
        """Names of the parameters whose gradient is zero throughout; waits for the device. Gradients have to be finite."""
        found = []
        for buffer in self.buffers:
            assert buffer.values.grad is not None
            blocks = buffer.values.grad.view(-1, ALIGNMENT_ELEMENTS)  # none of which spans two parameters
            peaks = torch.linalg.vector_norm(blocks, torch.inf, dim=1).cpu()
            places = (int(view.storage_offset()) // ALIGNMENT_ELEMENTS for view in buffer.views)
            sizes = (_aligned(view.numel()) // ALIGNMENT_ELEMENTS for view in buffer.views)
            each = zip(buffer.names, places, sizes, strict=True)
            found += [name for name, place, size in each if not peaks[place : place + size].any()]
        return found

    def layout(self) -> list[list[str]]:
        """Parameter names by buffer: two models with equal layouts and shapes have interchangeable buffers."""
        return [list(buffer.names) for buffer in self.buffers]


def _aligned(elements: int) -> int:
    return -(-elements // ALIGNMENT_ELEMENTS) * ALIGNMENT_ELEMENTS


def _elements(named: list[tuple[str, nn.Parameter]]) -> int:
    return sum(_aligned(parameter.numel()) for _, parameter in named)


def _move_into_buffer(named: list[tuple[str, nn.Parameter]], decays: bool, rate: float) -> Buffer:
    first = named[0][1]
    values = nn.Parameter(torch.zeros(_elements(named), dtype=first.dtype, device=first.device))
    offset = 0
    places = []
    for _, parameter in named:
        end = offset + parameter.numel()
        view = values.data[offset:end].view(parameter.shape)
        view.copy_(parameter.data)
        parameter.data = view
        places.append(slice(offset, end))
        offset = _aligned(end)
    values.grad = torch.zeros_like(values)  # in the place of what was copied: adapters of experts may be several GB
    for (_, parameter), place in zip(named, places, strict=True):
        parameter.grad = values.grad[place].view(parameter.shape)
    return Buffer(values, tuple(name for name, _ in named), tuple(parameter for _, parameter in named), decays, rate)
