"""Base of a merge: found by its recorded or given name, and checked to be the one the adapter was trained on."""

from contextlib import ExitStack
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from qlora_cli.config import ModelSettings, QuantizationSettings
from qlora_cli.core.adapters.adapter_record import AdapterRecord
from qlora_cli.core.device import DTYPES
from qlora_cli.core.merge.plan import main_dtype
from qlora_cli.core.models.files import ModelFiles, resolve_model
from qlora_cli.core.models.identity import BaseIdentity
from qlora_cli.core.models.structure import build_empty
from qlora_cli.core.storage.safetensors_file import TensorFile, list_weight_files
from qlora_cli.errors import ModelError
from qlora_cli.events import Caution, Notice, Report


@dataclass(frozen=True)
class Base:
    """The base of a merge."""

    files: ModelFiles
    model: PreTrainedModel  # on the meta device
    identity: BaseIdentity  # with how it was quantised in training
    stored_dtype: torch.dtype  # of most of its weights


def find_base(source: AdapterRecord, settings: ModelSettings, report: Report) -> Base:
    """The base's files and architecture: of the model named in the settings, else of the recorded one, as is reported.

    Raises:
        ModelError: It cannot be found, or is stored quantised already.
        AdapterError: It is not the one the adapter was trained on.
    """
    model, revision = settings.model, settings.model_revision
    if model is None:
        model, recorded_revision = source.name_base()
        revision = revision or recorded_revision
        report(Notice(f"The base is {model}, as {source.directory} recorded it."))
    files = resolve_model(model, revision, trust_remote_code=settings.trust_remote_code, report=report)
    if getattr(files.config, "quantization_config", None) is not None:
        raise ModelError(
            f"{model} is stored quantised already, and its 16-bit weights are gone.",
            "Give the 16-bit model that it was made from with --model.",
        )
    with ExitStack() as stack:
        names = list_weight_files(files.weights)
        stored = main_dtype([stack.enter_context(TensorFile(files.weights / name)) for name in names])
    if source.base is not None:
        quantization = QuantizationSettings(quant_type=source.base.quant_type, double_quant=source.base.double_quant)
        compute_dtype = DTYPES[source.base.compute_dtype]
    else:
        quantization = QuantizationSettings(quant_type="nf4", double_quant=True)
        compute_dtype = torch.bfloat16 if stored == torch.float32 else stored
        report(
            Caution(
                f"{source.directory} does not say how its base was held in training: nf4 with double quantisation "
                "is assumed."
            )
        )
    source.require_base(files)
    empty = build_empty(files.config, trust_remote_code=settings.trust_remote_code)
    return Base(files, empty, files.identity(quantization, compute_dtype), stored)
