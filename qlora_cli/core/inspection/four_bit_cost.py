"""Cost of 4 bits on the user's rows: the loss in 16 and in 4 bits, the layers that cost most, and what more bits there bring."""

import tempfile
from pathlib import Path
from typing import Any

import torch

from qlora_cli.config import InspectConfig
from qlora_cli.core.adapters.original_weights import OriginalWeights
from qlora_cli.core.candidates.four_bit_gap import measure_layers
from qlora_cli.core.data.dataset import PreparedRows
from qlora_cli.core.data.prepare import prepare_cached_rows
from qlora_cli.core.device import free_memory, resolve_compute_dtype
from qlora_cli.core.inspection.weight_stats import table
from qlora_cli.core.merge.compare_models import choose_rows, pad_together
from qlora_cli.core.models.files import ModelFiles
from qlora_cli.core.models.loading import load_base
from qlora_cli.core.weights.stored_formats import stored_format
from qlora_cli.errors import DataError, UsageError
from qlora_cli.events import Report

LAYERS_SHOWN = 10


def measure_four_bit_cost(
    config: InspectConfig, files: ModelFiles, *, vocabulary: int, device: torch.device, report: Report
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Facts and tables: losses in nats a trained token on the first rows of `--data`, at most 8,192 tokens (1,024 on a CPU).

    Raises:
        QloraError: The rows or the weights cannot be read.
        UsageError: The base is quantised already, and has no 16-bit weights to compare with.
        ModelError: Its layers cannot be walked one by one.
    """
    stored = stored_format(files.config, files.name)
    if stored is not None:
        raise UsageError(
            f"{files.name} is quantised already, by {stored.method}: there are no 16-bit weights to compare with.",
            "Leave out --data, or give --model the checkpoint that it was made from.",
        )
    with tempfile.TemporaryDirectory(prefix="qlora-inspect-") as spare:
        prepared = prepare_cached_rows(config, files.tokenizer, files.config, Path(spare), report)
        held = PreparedRows(prepared.directory)
        rows = choose_rows((held[i] for i in range(len(held))), vocabulary=vocabulary, device=device)
    if not rows:
        raise DataError("No row of --data has a token that is trained.", "See: qlora prepare --show 3")
    dtype = resolve_compute_dtype(config.compute_dtype, device)
    # Each by itself: of what a layer loses, a mean over all tokens, none may be padding.
    batches = pad_together(rows, vocabulary=vocabulary, device=device, most_tokens=1)
    base, _ = load_base(files, config, compute_dtype=dtype, device=device)
    with OriginalWeights(files) as originals:
        gap, layers, mixtures = measure_layers(base, originals, batches, report)
    del base
    free_memory(device)
    assert gap.sixteen_bits is not None
    facts = {
        "rows": len(rows),
        "tokens": gap.tokens,
        "loss_in_16_bits": gap.sixteen_bits,
        "loss_in_4_bits": gap.four_bits,
    }
    shown = [
        {"layer": layer.layer, "error_percent": 100 * layer.error, "weights": layer.weights}
        for layer in layers[:LAYERS_SHOWN]
    ]
    tried = [
        {
            "layers": ", ".join(map(str, mixture.layers)),
            "bits": mixture.bits,
            "loss": mixture.loss,
            "won": gap.four_bits - mixture.loss,
            "more_bytes": mixture.more_bytes,
        }
        for mixture in mixtures
    ]
    return {"four_bit_cost": facts}, [
        table("Layers by what 4 bits change in their output", shown),
        table("These layers in more bits", tried),
    ]
