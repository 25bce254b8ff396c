"""Rounded weights of a merge: kept on the disk layer by layer as they are found, and put into the plan of what is written."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from qlora_cli.core.calibration.low_rank import SecondMoment
from qlora_cli.core.calibration.rounding import round_to_four_bits
from qlora_cli.core.device import dtype_name
from qlora_cli.core.merge.plan import MergeOptions, MergePlan, MergeTask, OutputFile, TensorChunk
from qlora_cli.core.models.quantization import QUANT_STATE_BYTES
from qlora_cli.core.storage.safetensors_file import TensorFile


class RoundedWeights:
    """Linear weights in 4 bits, a file each in a directory of this merge's own."""

    def __init__(self, directory: Path, names: Mapping[str, str], options: MergeOptions) -> None:
        """`names` are those of the parameters of the model in the checkpoint."""
        self._directory, self._names, self._options = directory, names, options
        self._paths: dict[str, Path] = {}  # by the weight's name in the checkpoint
        self._digest = hashlib.sha256()

    @property
    def digest(self) -> str:
        """SHA-256 of every code, in the order of rounding."""
        return self._digest.hexdigest()

    def round(self, weights: Mapping[str, Tensor], moment: SecondMoment | None) -> dict[str, Tensor]:
        """Rounds merged weights, (out, in) float32, of linear layers that read the same inputs, and keeps them; what they
        stand for, likewise."""
        rounded = round_to_four_bits([*weights.values()], moment, self._options.quantization)
        for name, (packed, _) in zip(weights, rounded, strict=True):
            self._keep(name, packed)
        return {name: value for name, (_, value) in zip(weights, rounded, strict=True)}

    def _keep(self, name: str, packed: Mapping[str, Tensor]) -> None:
        output = self._names[f"{name}.weight"]
        tensors = {output + ending: self._as_stored(ending, part).contiguous() for ending, part in packed.items()}
        path = self._directory / f"{len(self._paths):05d}.safetensors"
        save_file(tensors, path)
        self._digest.update(tensors[output].numpy().tobytes())
        self._paths[output] = path

    def _as_stored(self, ending: str, part: Tensor) -> Tensor:
        content = part.cpu()
        if "quant_state" not in ending:
            return content
        state = json.loads(bytes(content.tolist()))
        state["dtype"] = dtype_name(self._options.dtype)  # of what it is dequantised to
        text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        return F.pad(text, (0, QUANT_STATE_BYTES - len(text)), value=ord(" "))

    def put_into(self, plan: MergePlan) -> MergePlan:
        """A plan of a 4-bit checkpoint that takes these weights as they are."""
        return replace(plan, files=tuple(self._put_into(file) for file in plan.files))

    def _put_into(self, file: OutputFile) -> OutputFile:
        groups: list[list[str]] = []
        for name in file.header.entries:  # a task makes a weight and what undoes its packing
            if groups and name.startswith(f"{groups[-1][0]}."):
                groups[-1].append(name)
            else:
                groups.append([name])
        tasks = []
        for group, task in zip(groups, file.tasks, strict=True):
            rounded = group[0] in self._paths
            tasks.append(MergeTask(task.held_bytes, partial(self._read, group)) if rounded else task)
        return replace(file, tasks=tuple(tasks))

    def _read(self, names: list[str]) -> Iterator[TensorChunk]:
        with TensorFile(self._paths[names[0]]) as file:
            for name in names:
                yield name, file.read(name)
