"""Checkpoint as it means: its weights under their names with their values, however they are stored."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from qlora_cli.core.storage.safetensors_file import DTYPE_NAMES, TensorFile, list_weight_files
from qlora_cli.core.storage.safetensors_header import TensorEntry
from qlora_cli.core.weights.four_bit_parts import (
    CONSTANT_PARTS,
    STATES,
    four_bit_values_of,
    in_bytes,
    read_layout,
    require_values,
)
from qlora_cli.core.weights.stored_formats import (
    StoredFormat,
    fp8_values,
    mxfp4_values,
    require_fp8_fit,
    require_mxfp4_fit,
)
from qlora_cli.errors import ModelError

HOST = torch.device("cpu")
BLOCKS, SCALES = "_blocks", "_scales"  # MXFP4
SCALE_ENDINGS = ("_scale_inv", "_scale")  # FP8; the scale is multiplied, whatever it is called
IGNORED_ENDINGS = ("activation_scale", "input_scale")  # of FP8: activations are not quantised here
FP8_DTYPES = ("F8_E4M3", "F8_E5M2")


class WeightFile(TensorFile):
    """One file of a checkpoint, whose `entries` are the weights it holds: name, shape, and the dtype of their values.

    A weight whose constants lie beside it is one entry, in the place of its main tensor.
    """

    def __init__(self, path: Path, checkpoint: "Checkpoint") -> None:
        """As `TensorFile`."""
        super().__init__(path)
        self.checkpoint = checkpoint
        self.stored = self.header.entries  # as they lie in the file

    def is_plain(self, name: str) -> bool:
        """As `TensorFile.is_plain`: not for a weight that is stored quantised."""
        return name in self.stored and name not in self.checkpoint.parts

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """A weight's values, or rows `rows.start` to `rows.stop` of them, in memory of its own.

        Raises:
            ModelError: The file ends too early, or what is stored does not fit together.
        """
        if self.is_plain(name):
            return super().read(name, rows)
        return self.checkpoint.decode(name, rows)

    def read_stored(self, name: str, rows: slice | None = None) -> Tensor:
        """A tensor of the file as it is."""
        return self.read_entry(self.stored[name], rows)


class Checkpoint:
    """All weights of a model directory, open for reading.

    Attributes:
        files: In order.
        entries: Every weight, by its name in the checkpoint.
        parts: Of those stored quantised, the names of the tensors they are made of, by the ending behind their name.
    """

    def __init__(self, directory: Path, stored: StoredFormat | None = None, device: torch.device = HOST) -> None:
        """Opens every file and reads its header.

        Args:
            directory: Of the model.
            stored: How it is stored, of `stored_format`.
            device: On which weights that are stored quantised become values; all others are read to the host.

        Raises:
            ModelError: A file is missing or damaged, or a quantised weight lacks a part.
        """
        self.stored, self.device, self.parts = stored, device, dict[str, dict[str, str]]()
        self.entries: dict[str, TensorEntry] = {}
        with ExitStack() as stack:
            self.files = [WeightFile(directory / name, self) for name in list_weight_files(directory)]
            for file in self.files:
                stack.enter_context(file)
            self._home = dict[str, WeightFile]()
            for file in self.files:
                for name in file.stored:
                    if name in self._home:
                        _require_equal(name, self._home[name], file)
                    self._home[name] = file  # of several the last, as transformers reads them
            for file in self.files:
                file.entries = dict(self._weights_of(file))
                self.entries |= file.entries
            self._file_of = {name: file for file in self.files for name in file.entries}
            self._stack = stack.pop_all()

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """As `WeightFile.read`."""
        return self._file_of[name].read(name, rows)

    def plain_file(self, name: str) -> WeightFile | None:
        """The file that holds the values of a weight as they are; None for one that is stored quantised."""
        file = self._file_of[name]
        return file if file.is_plain(name) else None

    def is_packed(self, name: str) -> bool:
        """Whether a weight is stored in bitsandbytes' 4 bits."""
        return self.stored is not None and self.stored.is_four_bit and name in self.parts

    def packed(self, name: str) -> dict[str, Tensor] | None:
        """The tensors of a weight in bitsandbytes' 4 bits, codes in bytes, by their endings; None for another.

        Raises:
            ModelError: Their numbers cannot be such a weight's.
        """
        if not self.is_packed(name):
            return None
        tensors = {ending: self._home[part].read_stored(part) for ending, part in self.parts[name].items()}
        require_values(name, tensors)
        return tensors | {"": in_bytes(tensors[""])}

    def decode(self, name: str, rows: slice | None = None) -> Tensor:
        """The values of a weight that is stored quantised; `rows` of its first dimension."""
        parts = self.parts[name]
        tensors = {ending: self._home[part] for ending, part in parts.items()}
        if BLOCKS in parts:
            blocks, scales = (tensors[ending].read_stored(parts[ending], rows) for ending in (BLOCKS, SCALES))
            return mxfp4_values(blocks.to(self.device), scales.to(self.device))
        if "" in parts and len(parts) == 2:
            ending = next(ending for ending in parts if ending)
            return self._decode_fp8(tensors[""], tensors[ending], parts, ending, rows)
        packed = self.packed(name)
        assert packed is not None
        values = four_bit_values_of({ending: part.to(self.device) for ending, part in packed.items()})
        return values if rows is None else values[rows]

    def _decode_fp8(
        self,
        file: WeightFile,
        scale_file: WeightFile,
        parts: dict[str, str],
        ending: str,
        rows: slice | None,
    ) -> Tensor:
        assert self.stored is not None
        codes = file.read_stored(parts[""], rows).to(self.device)
        scales = scale_file.read_stored(parts[ending]).to(self.device)
        stacked = codes.ndim == 3
        if stacked and rows is not None and scales.numel() > 1:
            scales = scales[rows]
        first = 0 if rows is None or stacked else rows.start
        return fp8_values(codes, scales, self.stored.block, first)

    def _weights_of(self, file: WeightFile) -> Iterator[tuple[str, TensorEntry]]:
        method = self.stored.method if self.stored else None
        for entry in file.stored.values():
            if self._home[entry.name] is not file:
                continue
            name, kind, shape = entry.name, entry.dtype_name, entry.shape
            if method == "mxfp4" and name.endswith(BLOCKS):
                name, kind = name.removesuffix(BLOCKS), "BF16"
                self.parts[name] = self._found(name, {BLOCKS: entry.name, SCALES: name + SCALES})
                require_mxfp4_fit(entry, self._stored(name + SCALES))
                shape = (*shape[:-3], shape[-2] * 32, shape[-3])
            elif method == "fp8" and kind in FP8_DTYPES:
                scale = next((name + end for end in SCALE_ENDINGS if name + end in self._home), name + SCALE_ENDINGS[0])
                self.parts[name] = self._found(name, {"": name, scale.removeprefix(name): scale})
                require_fp8_fit(entry, self._stored(scale), self.stored.block if self.stored else None)
                kind = "F32"  # a product of an FP8 number and a float32 one
            elif method == "bitsandbytes" and (ending := next((e for e in STATES if name + e in self._home), None)):
                state = name + ending
                layout = read_layout(name, ending, self._home[state].read_stored(state))
                self.parts[name] = self._found(name, layout.parts)
                layout.require_fit({end: self._stored(part) for end, part in layout.parts.items()})
                kind, shape = DTYPE_NAMES[layout.dtype], layout.shape
            elif self._is_part(method, name):
                continue
            yield name, TensorEntry(name, kind, shape, entry.start)

    def _stored(self, part: str) -> TensorEntry:
        return self._home[part].stored[part]

    def _is_part(self, method: str | None, name: str) -> bool:
        if method == "mxfp4":
            return name.endswith(SCALES) and name.removesuffix(SCALES) + BLOCKS in self._home
        if method == "fp8":
            mains = (name.removesuffix(ending) for ending in SCALE_ENDINGS if name.endswith(ending))
            return name.endswith(IGNORED_ENDINGS) or any(main in self._home for main in mains)
        if method == "bitsandbytes":
            mains = (name.removesuffix(ending) for ending in (*CONSTANT_PARTS, *STATES) if name.endswith(ending))
            return any(main in self._home for main in mains)
        return False

    def _found(self, name: str, parts: dict[str, str]) -> dict[str, str]:
        missing = [part for part in parts.values() if part not in self._home]
        if missing:
            raise ModelError(f"{name} is stored quantised, and {missing[0]} is missing.", "Download the model again.")
        return parts


def _require_equal(name: str, first: WeightFile, second: WeightFile) -> None:
    """Raises ModelError where a tensor that stands in two files of a checkpoint has not the same values in both."""
    entries = [file.stored[name] for file in (first, second)]
    same = entries[0].dtype_name == entries[1].dtype_name and entries[0].shape == entries[1].shape
    if not same or not torch.equal(*(file.read_stored(name).flatten().view(torch.uint8) for file in (first, second))):
        raise ModelError(
            f"{name} stands in {first.path.name} and in {second.path.name} of {first.path.parent}, with other values.",
            "Download the model again into an empty directory: files of two models lie in this one.",
        )
