"""Statistics of stored weights: dtypes and bytes by module; norms of an adapter's updates and 4-bit errors by layer."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qlora_cli.artifacts import ADAPTER_WEIGHTS
from qlora_cli.core.models.quantization import round_trip
from qlora_cli.core.models.structure import linear_names
from qlora_cli.core.models.weight_names import map_names
from qlora_cli.core.planning.model_size import base_name
from qlora_cli.core.storage.safetensors_file import TensorEntry, TensorFile
from qlora_cli.errors import ModelError
from qlora_cli.events import Progress, Report
from qlora_cli.setting_groups import QuantizationSettings

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
        with TensorFile(path) as file:
            found |= {name: (path, entry) for name, entry in file.entries.items()}
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


def measure_updates(directory: Path, scaling: float) -> list[LayerValue]:
    """Frobenius norm of scaling * B @ A for each adapted module.

    ‖BA‖² = trace(BᵀB · AAᵀ), so the (out, in) product is never made.

    Args:
        directory: A PEFT adapter.
        scaling: alpha / rank, or alpha / sqrt(rank).
    """
    values = []
    with TensorFile(directory / ADAPTER_WEIGHTS) as file:
        for down in sorted(name for name in file.entries if re.search(r"\.lora_(embedding_)?A\b", name)):
            up = re.sub(r"\.lora_(embedding_)?A\b", r".lora_\1B", down)
            a, b = file.read(down).double(), file.read(up).double()  # (r, in), (out, r)
            squared = float(torch.sum((b.T @ b) * (a @ a.T)))
            module = base_name(down)
            values.append(LayerValue(layer_of(module), module.rsplit(".", 1)[-1], scaling * math.sqrt(max(0, squared))))
    return values


def measure_quantization_error(
    model: PreTrainedModel,
    directory: Path,
    quantization: QuantizationSettings,
    *,
    compute_dtype: torch.dtype,
    device: torch.device,
    report: Report,
) -> list[LayerValue]:
    """Relative error ‖W − Q(W)‖ / ‖W‖ (Frobenius) of every linear layer, one weight in memory at a time.

    Args:
        model: The architecture on the meta device.
        directory: Its checkpoint.
        compute_dtype: From which a run quantises.

    Raises:
        ModelError: A linear layer's weight is not in the checkpoint, or cannot be read.
    """
    stored_in = list_tensors(directory)
    stored_names = map_names(stored_in, model)
    linears = linear_names(model)
    values = []
    for done, name in enumerate(linears, start=1):
        stored = stored_names.get(f"{name}.weight")
        if stored is None:
            raise ModelError(
                f"{directory} holds no {name}.weight.", "It belongs to another architecture, or a file is missing."
            )
        with TensorFile(stored_in[stored][0]) as file:
            weight = file.read(stored)
        weight = weight.T if isinstance(model.get_submodule(name), Conv1D) else weight  # (out, in)
        weight = weight.to(device, compute_dtype)
        restored = round_trip(weight, quant_type=quantization.quant_type, double_quant=quantization.double_quant)
        lost = restored.float() - weight.float()
        value = float(lost.norm() / weight.float().norm().clamp_min(torch.finfo(torch.float32).tiny))
        values.append(LayerValue(layer_of(name), name.rsplit(".", 1)[-1], value))
        report(Progress("Measuring the 4-bit error", done, len(linears), "weights"))
    return values


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
