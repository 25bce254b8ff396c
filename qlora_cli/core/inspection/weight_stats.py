"""Statistics of stored weights, without torch: dtypes and bytes by module, norms of an adapter's updates by layer."""

import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qlora_cli.artifacts import ADAPTER_WEIGHTS
from qlora_cli.core.adapters.adapter_facts import AdapterFacts, base_name, way_on
from qlora_cli.core.storage.safetensors_header import TensorEntry, read_header
from qlora_cli.errors import AdapterError

LAYER_NUMBER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class LayerValue:
    """One number on one module of one layer."""

    layer: int | None  # None outside the decoder layers
    module: str  # last name, such as q_proj
    value: float


def list_tensors(directory: Path) -> dict[str, tuple[Path, TensorEntry]]:
    """Every tensor of a checkpoint, with the file it is in.

    Raises:
        ModelError: A file is damaged or is not safetensors.
    """
    found: dict[str, tuple[Path, TensorEntry]] = {}
    for path in sorted(directory.glob("*.safetensors")):
        if path.name.startswith("consolidated"):  # the same weights again, in their author's own layout
            continue
        descriptor, header = read_header(path)
        os.close(descriptor)
        found |= {name: (path, entry) for name, entry in header.entries.items()}
    return found


def group_tensors(entries: Iterable[TensorEntry]) -> list[dict[str, Any]]:
    """Tensors by module (their last name) and dtype, in the order given."""
    groups: dict[tuple[str, str], list[int]] = {}
    for entry in entries:
        module = entry.name.rsplit(".", 2)[-2] if "." in entry.name else entry.name
        group = groups.setdefault((module, entry.dtype_name), [0, 0, 0])
        for position, amount in enumerate((1, entry.elements, entry.total_bytes)):
            group[position] += amount
    names = ("module", "dtype", "tensors", "elements", "stored_bytes")
    return [dict(zip(names, (*key, *amounts), strict=True)) for key, amounts in groups.items()]


def layer_of(name: str) -> int | None:
    """The decoder layer in a module's name, None outside them."""
    match = LAYER_NUMBER.search(name)
    return int(match[1]) if match else None


def measure_updates(directory: Path, adapter: AdapterFacts) -> list[LayerValue]:
    """Frobenius norm of scaling * B @ A for each adapted module, but for stacks of experts, where which rows and columns
    are of one expert is not to be seen without the model, and for halves of which blocks alone are stored (BD-LoRA).

    ‖BA‖² = trace(BᵀB · AAᵀ), so the (out, in) product is never made.

    Args:
        directory: A PEFT adapter.
        adapter: Its facts.

    Raises:
        ModelError: The file is damaged.
        AdapterError: It holds NaN or infinity.
    """
    values: list[LayerValue] = []
    if adapter.config.get("use_bdlora"):
        return values
    stacks = tuple(f".{name}".rpartition(".")[0] for name in adapter.config.get("target_parameters") or ())
    descriptor, header = read_header(directory / ADAPTER_WEIGHTS)
    with os.fdopen(descriptor, "rb") as stream:

        def read(name: str) -> np.ndarray:
            entry = header.entries[name]
            stream.seek(entry.start)
            return _as_float64(entry, stream.read(entry.total_bytes))

        for down in sorted(name for name in header.entries if re.search(r"\.lora_(embedding_)?A\b", name)):
            module = base_name(down)
            if stacks and f".{module}".endswith(stacks):
                continue
            a, b = read(down), read(re.sub(r"\.lora_(embedding_)?A\b", r".lora_\1B", down))  # (r, in), (out, r)
            square = float(np.sum((b.T @ b) * (a @ a.T)))
            if not math.isfinite(square):
                raise AdapterError(f"The pair of {module} in {directory} holds NaN or infinity.", way_on(directory))
            norm = math.sqrt(max(0, square))
            scaling = adapter.scaling_of(module, len(a))
            values.append(LayerValue(layer_of(module), module.rsplit(".", 1)[-1], scaling * norm))
    return values


def _as_float64(entry: TensorEntry, content: bytes) -> np.ndarray:
    """Numbers of a tensor; bfloat16, which numpy lacks, is the upper half of a float32."""
    if entry.dtype_name == "BF16":
        values = (np.frombuffer(content, np.uint16).astype(np.uint32) << 16).view(np.float32)
    else:
        values = np.frombuffer(content, f"<f{len(content) // max(1, entry.elements)}")
    return values.astype(np.float64).reshape(entry.shape)


def tabulate_layers(title: str, values: list[LayerValue]) -> dict[str, Any]:
    """A table with a row a layer and a column a module; `rows` hold numbers, None where a layer lacks the module."""
    modules = list(dict.fromkeys(value.module for value in values))
    rows: dict[int | None, dict[str, float]] = {}
    for value in values:
        rows.setdefault(value.layer, {})[value.module] = float(f"{value.value:.3g}")
    ordered = sorted(rows.items(), key=lambda item: (item[0] is None, item[0] or 0))
    return {
        "title": title,
        "columns": ["layer", *modules],
        "rows": [[layer, *(row.get(module) for module in modules)] for layer, row in ordered],
    }


def table(title: str, entries: list[dict[str, Any]]) -> dict[str, Any]:
    """A table of entries that have the same keys."""
    return {"title": title, "columns": list(entries[0]), "rows": [list(entry.values()) for entry in entries]}
