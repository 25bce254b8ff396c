"""Original weights of a base in 4 bits: what its checkpoint holds of each linear layer, read one at a time."""

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from qlora_cli.core.models.files import ModelFiles
from qlora_cli.core.models.structure import build_empty
from qlora_cli.core.models.weight_names import map_names
from qlora_cli.core.storage.safetensors_file import TensorFile, list_weight_files

SLICE_ROWS = 1024  # sent to the device at once


class OriginalWeights:
    """The checkpoint of a base, open for reading."""

    def __init__(self, files: ModelFiles) -> None:
        """Opens it.

        Raises:
            ModelError: A file is damaged or missing, or the checkpoint is of another structure.
        """
        self._stack = ExitStack()
        try:
            opened = [
                self._stack.enter_context(TensorFile(files.weights / name)) for name in list_weight_files(files.weights)
            ]
            empty = build_empty(files.config, trust_remote_code=files.trust_remote_code)
            self._file_of = {name: file for file in opened for name in file.entries}
            self._names = map_names(self._file_of, empty)
            self._transposed = {name for name, module in empty.named_modules() if isinstance(module, Conv1D)}
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> "OriginalWeights":
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def __contains__(self, module: str) -> bool:
        """Whether the checkpoint holds the weight of a linear layer as the model has it."""
        return f"{module}.weight" in self._names

    def read(
        self, module: str, dtype: torch.dtype, device: torch.device, result_dtype: torch.dtype | None = None
    ) -> Tensor:
        """The weight of a linear layer, (out, in), as it is in the dtype it was quantised from, in `result_dtype`, else
        in that one. On the device there is nothing beside the result but a slice."""
        name = self._names[f"{module}.weight"]
        weight = self._file_of[name].read(name)
        if module in self._transposed:
            weight = weight.T.contiguous()
        result = torch.empty(weight.shape, dtype=result_dtype or dtype, device=device)
        for part, of in zip(result.split(SLICE_ROWS), weight.split(SLICE_ROWS), strict=True):
            part.copy_(of.to(device).to(dtype))
        return result
