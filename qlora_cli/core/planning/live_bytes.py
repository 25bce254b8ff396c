"""Tensor operations in, bytes of the tensors alive at their highest moments out; on any device, the meta device too."""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class LiveBytes(TorchDispatchMode):
    """While active, counts every storage from its making to its end, what autograd holds included.

    Tensors made before are not counted. On the meta device nothing is allocated, so that a training step of any size
    can be followed.

    Attributes:
        now_bytes: Alive at this moment.
        highest_bytes: By the bytes of scratch memory in use (see `mark`), the most that was alive beside it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        self.now_bytes = 0
        self.highest_bytes: dict[int, int] = {0: 0}
        self._sizes: dict[int, int] = {}

    def restart(self) -> dict[int, int]:
        """Starts the highest moments anew from here, and returns what they were."""
        before, self.highest_bytes = self.highest_bytes, {0: self.now_bytes}
        return before

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                # A view of what was there before, such as a transposed weight, is not new.
                if not any(isinstance(given, Tensor) and _address(given) == storage._cdata for given in args):
                    self._count(storage)
        self.mark(0)
        return result

    def mark(self, scratch_bytes: int) -> None:
        """Notes the present moment, at which so much scratch memory, not counted here, is in use as well."""
        self.highest_bytes[scratch_bytes] = max(self.highest_bytes.get(scratch_bytes, 0), self.now_bytes)

    @property
    def peak_bytes(self) -> int:
        """The most that was alive at once, scratch memory included."""
        return max(scratch + alive for scratch, alive in self.highest_bytes.items())

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.now_bytes += storage.nbytes()
            weakref.finalize(storage, self._discount, self._sizes, key)

    def _discount(self, sizes: dict[int, int], key: int) -> None:
        if sizes is self._sizes:  # not from before a reset
            self.now_bytes -= sizes.pop(key)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
