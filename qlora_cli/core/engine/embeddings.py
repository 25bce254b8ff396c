"""Token ids in, embeddings on the device out, whether the table is there or waits on the host to leave it room."""

from typing import Any

import torch
from torch import Tensor, nn

from qlora_cli.events import Notice, Report


class InputEmbeddings:
    """The input embeddings of a model that an engine runs.

    Args:
        base: The causal language model.
        device: Where it computes.
        report: Told when there is no room any more to put the table back.

    Attributes:
        on_host: Whether the table waits on the host.
    """

    def __init__(self, base: Any, device: torch.device, report: Report) -> None:
        self.module = base.get_input_embeddings()
        self.head = base.get_output_embeddings()
        self.device, self.report = device, report
        plain = type(self.module) is nn.Embedding
        self.on_host = plain and self.module.weight.device.type == "cpu" and device.type != "cpu"

    @property
    def frozen(self) -> bool:
        """Whether nothing in them is trained, nor adapted."""
        return not any(parameter.requires_grad for parameter in self.module.parameters())

    def movable_bytes(self) -> int:
        """Of the table on the device; 0 where it must stay: tied to the head, adapted or trained."""
        weight = getattr(self.module, "weight", None)
        if type(self.module) is not nn.Embedding or weight is None or weight.requires_grad or self.on_host:
            return 0
        if self.head is not None and getattr(self.head, "weight", None) is weight:
            return 0
        return weight.numel() * weight.element_size()

    def leave(self) -> None:
        """Has the table wait on the host, where it may."""
        if self.movable_bytes():
            self.on_host = True
            self.module.to("cpu")

    def come_back(self) -> None:
        """Puts the table where it was, if it left."""
        if not self.on_host:
            return
        torch.cuda.empty_cache()
        try:
            self.module.to(self.device)
        except torch.OutOfMemoryError:
            self.report(Notice("The input embeddings stay on the host: there is no memory for them on the device."))
            return
        self.on_host = False

    def embed(self, ids: Tensor, looked_up: Tensor | None = None) -> Tensor:
        """Token ids (rows, length) to embeddings (rows, length, size) on the device.

        Args:
            ids: On the host or the device.
            looked_up: From `look_up`, where that was done before.
        """
        if looked_up is None and self.on_host:
            looked_up = self.look_up(ids)
        if looked_up is None:
            return self.module(ids.to(self.device, non_blocking=True))
        return looked_up.to(self.device, non_blocking=True)

    def look_up(self, ids: Tensor) -> Tensor:
        """Token ids (rows, length) to embeddings (rows, length, size) in memory of the host, pinned for a CUDA device."""
        weight = self.module.weight
        rows = torch.empty(ids.numel(), weight.shape[1], dtype=weight.dtype, pin_memory=self.device.type == "cuda")
        torch.index_select(weight.detach(), 0, ids.flatten().cpu(), out=rows)
        return rows.view(*ids.shape, -1)
