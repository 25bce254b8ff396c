"""Base of a generation session, on the card, or streaming from host memory where the card cannot hold it."""

import math
from typing import Any

import torch

from qlora_cli.core.device import read_free_bytes
from qlora_cli.core.distributed.process_group import ProcessGroup
from qlora_cli.core.distributed.weight_shards import WeightShards
from qlora_cli.core.engine.decoder_layers import find_layers
from qlora_cli.core.models.files import ModelFiles
from qlora_cli.core.models.loading import load_base
from qlora_cli.core.models.structure import find_decoder
from qlora_cli.core.streaming.host_memory import locked_bytes, why_on_disk
from qlora_cli.core.streaming.ring import SLOTS
from qlora_cli.core.streaming.streamed_base import stream_base
from qlora_cli.errors import ModelError
from qlora_cli.events import Notice, Report
from qlora_cli.settings.groups import LoraSettings, QuantizationSettings
from qlora_cli.sizes import format_bytes

RESERVE_BYTES = 2**30  # beside the base: an adapter, keys and values, what a pass works with


def load_answering_base(
    files: ModelFiles,
    quantization: QuantizationSettings,
    *,
    compute_dtype: torch.dtype,
    device: torch.device,
    report: Report,
) -> tuple[Any, bool]:
    """A base in 4 bits that answers on `device`, and whether layers of it stream, which is said with what that costs.

    Raises:
        ModelError: As `load_base`.
    """
    streamed, layer_bytes = count_streamed_layers(files, quantization, compute_dtype, device)
    on_disk = streamed > 0 and why_on_disk(locked_bytes(layer_bytes, streamed)) is not None
    shards = WeightShards(ProcessGroup(), on_host=True, in_copy=on_disk) if streamed else None
    base, _ = load_base(files, quantization, compute_dtype=compute_dtype, device=device, weight_shards=shards)
    if streamed:
        made = stream_base(base, find_layers(find_decoder(base)), device, streamed=streamed, report=report)
        report(
            Notice(
                f"The card cannot hold the base: the {made.describe()}, and {format_bytes(made.copied_bytes)} are copied "
                "for each token of an answer, or of --batch-size answers at once."
            )
        )
    return base, streamed > 0


def count_streamed_layers(
    files: ModelFiles, quantization: QuantizationSettings, compute_dtype: torch.dtype, device: torch.device
) -> tuple[int, int]:
    """How many layers have to wait on the host, so that the others and what answering takes have room, and the bytes of
    the largest."""
    if device.type != "cuda":
        return 0, 0
    free_bytes = read_free_bytes(device) - RESERVE_BYTES
    if sum(path.stat().st_size for path in files.directory.glob("*.safetensors")) <= free_bytes:
        return 0, 0  # nor is it larger in 4 bits
    from qlora_cli.core.planning.model_profile import profile_model  # half a second, which most answers do without

    try:
        profile = profile_model(
            files.held_config,
            LoraSettings(),
            quantization,
            compute_dtype=compute_dtype,
            trust_remote_code=files.trust_remote_code,
            traced=False,
        )
    except ModelError:
        return 0, 0
    missing_bytes = profile.footprint.base_bytes - free_bytes
    if missing_bytes <= 0 or not any(profile.layer_bytes):
        return 0, 0
    each_bytes = sum(profile.layer_bytes) / len(profile.layer_bytes)
    return min(len(profile.layer_bytes), math.ceil(missing_bytes / each_bytes) + SLOTS), max(profile.layer_bytes)
