"""Weight shards: the share of each tensor of a base that one rank keeps while the base is loaded."""

import tempfile
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_cli.artifacts import cache_root
from qlora_cli.core.distributed.process_group import ProcessGroup

ALIGNED_ELEMENTS = 16  # so that a share of bytes is one of wider numbers too


@dataclass(frozen=True)
class WeightShards:
    """How a base is sharded while it is loaded: no rank ever holds more than its share and the weight being loaded."""

    ranks: ProcessGroup
    on_host: bool = False  # shares are kept in host memory
    in_copy: bool = False  # of one rank: what is kept is read where it lies in the copy of the base on the disk

    def keep(self, tensor: Tensor) -> Tensor:
        """This rank's share of a tensor, flattened: one of equal parts, the last ones filled up with zeros."""
        flat = tensor.reshape(-1)
        share = share_size(flat.numel(), self.ranks.world_size)
        mine = flat[slice(*self.bounds(flat.numel()))]
        mine = F.pad(mine, (0, share - mine.numel())) if mine.numel() < share else mine.clone()
        if self.in_copy:
            return _on_disk(mine.cpu())
        return mine.cpu() if self.on_host else mine

    def bounds(self, elements: int) -> tuple[int, int]:
        """The first of a tensor's elements that this rank keeps, and the one behind the last."""
        share = share_size(elements, self.ranks.world_size)
        return min(share * self.ranks.rank, elements), min(share * (self.ranks.rank + 1), elements)

    def blank(self, elements: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A share of zeros, where this rank's share of a tensor of so many elements is kept, to be filled up to `bounds`."""
        share = share_size(elements, self.ranks.world_size)
        return torch.zeros(share, dtype=dtype, device="cpu" if self.on_host else device)

    def gather(self, share: Tensor, whole: Tensor, device: torch.device) -> Tensor:
        """The whole tensor on the host, of the shape and dtype of `whole`. Every rank takes part.

        Args:
            share: What `keep` gave here.
            whole: May be on the meta device.
            device: On which the ranks meet.
        """
        parts = self.ranks.all_gather({"share": share}, device)
        flat = torch.cat([part["share"].flatten().cpu() for part in parts])
        return flat[: whole.numel()].view(whole.shape)


def _on_disk(tensor: Tensor) -> Tensor:
    """A tensor whose memory is a file without a name beside the copies, so that the system may put it there."""
    (cache_root() / "base").mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=cache_root() / "base") as file:
        stored = torch.from_file(file.name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
    return stored.copy_(tensor)


def share_size(elements: int, world_size: int) -> int:
    """Elements of every rank's share, the last ones filled up."""
    return -(-elements // (world_size * ALIGNED_ELEMENTS)) * ALIGNED_ELEMENTS
