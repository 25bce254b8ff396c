"""What the kernels of experts are given beside rows: who goes where, a stack's adapter, and the gate between products."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# Of dequantised experts at once on a GPU, where a group costs a launch or a wait for the device when there are several.
WORKSPACE_BYTES = 2**30
# Rows an expert gets on average, up to which its values are unpacked in the product rather than dequantised before.
FEW_ROWS = 24


class Workspace:
    """How many bytes of experts are unpacked at once, for the process: less once the device had no room for it.

    Attributes:
        limit_bytes: At most so many.
    """

    def __init__(self) -> None:
        self.limit_bytes = self._known_bytes = WORKSPACE_BYTES

    def multiply(self, groups: Callable[..., Tensor], experts: int, expert_bytes: int) -> Tensor:
        """What a product gives that takes so many experts `at_once`: as many as there is room for."""
        while True:
            at_once = min(experts, max(1, self.limit_bytes // expert_bytes))
            try:
                return groups(at_once=at_once)
            except torch.OutOfMemoryError:
                if at_once == 1:
                    raise
            self.limit_bytes = at_once * expert_bytes // 2

    def news(self) -> str | None:
        """What has changed since this was last asked."""
        if self.limit_bytes == self._known_bytes:
            return None
        self._known_bytes = self.limit_bytes
        return (
            f"Memory ran out while experts were unpacked: at most {self.limit_bytes / 2**20:.0f} MiB of them are at once "
            "from now on, which is slower."
        )


workspace = Workspace()


class Routing(NamedTuple):
    """Pairs of a token and one of its experts, sorted by expert; those of no expert come last.

    Attributes:
        source: int32 (pairs,), the pair, token * choices + choice, in each place.
        back: int32 (pairs,), the place of each pair.
        expert: int32 (pairs,), the expert of each place; the number of experts for none.
        ends: int32 (experts,), the place behind each expert's last one.
        choices: Experts that a token goes to.
    """

    source: Tensor
    back: Tensor
    expert: Tensor
    ends: Tensor
    choices: int


class Lora(NamedTuple):
    """LoRA matrices of a stack, as views of the trained parameters.

    Attributes:
        first: (experts, rank, in), of any strides.
        second: (experts, rank, out), likewise.
        scaling: On their product.
    """

    first: Tensor
    second: Tensor
    scaling: float


def are_few(rows: float, experts: float) -> bool:
    """Whether so many rows go to so many experts that their values are unpacked in the product: none is rounded to 8 bits."""
    return rows <= FEW_ROWS * experts


def is_scattered(matrices: Tensor, rows: int) -> bool:
    """Whether matrices of an adapter, (experts, rank, columns), are laid out anew before so many rows meet them.

    PEFT lays B out as (columns, rank * experts), so that each value of an expert's lies in a sector of its own, which
    tiles of rows would fetch again and again. Few rows are not worth a pass.
    """
    return matrices.stride(2) != 1 and not are_few(rows, len(matrices))


class Update(NamedTuple):
    """What a stack's adapter adds to the product of rows with their experts' matrices.

    Attributes:
        projected: (rows, rank), contiguous, in the compute dtype; the scaling is in it.
        second: (experts, rank, columns), of any strides and dtype.
    """

    projected: Tensor
    second: Tensor


class Gate(NamedTuple):
    """What stands between an expert's two products, of a row (2 * size) of which one half gates the other.

        g = min(gate, limit); u = min(max(up, -limit), limit); act(g) (u + shift)

    Attributes:
        kind: One of `gated.GATES`, "sigmoid" for g sigmoid(slope g), or "none" for a row that is taken as it is.
        limit: None for none.
        shift: Of what is gated.
        slope: Of "sigmoid".
        interleaved: Whether gate and up alternate, rather than one following the other.
    """

    kind: str
    limit: float | None = None
    shift: float = 0.0
    slope: float = 1.0
    interleaved: bool = False


NO_GATE = Gate("none")
