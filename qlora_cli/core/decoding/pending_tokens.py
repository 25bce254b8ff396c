"""Tokens on their way from the device to the host, and tensors on theirs to it: the host waits for neither."""

from collections.abc import Callable

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device; a GPU copies it in stream order, and the host goes on."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class PendingTokens:
    """Tokens on their way from the device; `wait` gives one id a row."""

    def __init__(self, chosen: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if chosen.device.type == "cuda":
            self._host = torch.empty(chosen.shape, dtype=chosen.dtype, pin_memory=True)
            self._host.copy_(chosen, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._host = chosen.clone()

    def wait(self) -> list[int]:
        """Blocks until the tokens are there."""
        if self._event is not None:
            self._event.synchronize()
        return self._host.tolist()

    def by_row(self) -> list[list[int]]:
        """The same, as the tokens that each row has got."""
        return [[token] for token in self.wait()]


class PendingRun(PendingTokens):
    """Tokens of a step with guesses, of one row.

    Args:
        report: See `PromptLookUp`.
        learn: Told once how many tokens the row has got, and whether the first guess was right.
    """

    def __init__(self, report: Tensor, learn: Callable[[int, bool], None]) -> None:
        super().__init__(report)
        self._learn = learn

    def by_row(self) -> list[list[int]]:
        right, first, *chosen = super().wait()
        self._learn(right + 1, bool(first))
        return [chosen[: right + 1]]

    def wait(self) -> list[int]:
        """The first of them."""
        return self.by_row()[0][:1]
