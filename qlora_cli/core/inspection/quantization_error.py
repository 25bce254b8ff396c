"""Error of 4 bits: what rounding costs each layer of a model."""

from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qlora_cli.core.inspection.weight_stats import LayerValue, layer_of, list_tensors
from qlora_cli.core.models.quantization import round_trip
from qlora_cli.core.models.structure import linear_names
from qlora_cli.core.models.weight_names import map_names
from qlora_cli.core.storage.safetensors_file import TensorFile
from qlora_cli.errors import ModelError
from qlora_cli.events import Progress, Report
from qlora_cli.settings.groups import QuantizationSettings


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
