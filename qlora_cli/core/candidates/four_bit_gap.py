"""What 4 bits cost a model on some rows, what an adapter wins back, and what more bits in a few layers would bring.

One 4-bit base is in memory, with its adapter or without. The rows go through it layer by layer, in step for each form of
the model; original weights are read for one layer at a time.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qlora_cli.core.adapters.original_weights import OriginalWeights
from qlora_cli.core.calibration.activation_stream import ActivationStream
from qlora_cli.core.candidates.losses import ReplacedLinears, mean_loss
from qlora_cli.core.data.dataset import RowSubset
from qlora_cli.core.device import free_memory
from qlora_cli.core.engine.decoder_layers import find_layers
from qlora_cli.core.merge.compare_models import RowBatch, choose_rows, pad_together
from qlora_cli.core.models.files import ModelFiles
from qlora_cli.core.models.quantization import four_bit_linears
from qlora_cli.core.models.structure import find_decoder
from qlora_cli.core.weights.stored_formats import stored_format
from qlora_cli.errors import ModelError
from qlora_cli.events import Notice, Progress, Report

FOUR_BITS_OF_WEIGHT = 4.127  # NF4 with double quantisation: 4 + 8/64 + 32/(64 * 256)
HELD_OUT_TOKENS = {"cuda": 2_048, "cpu": 256}  # trained ones, for which a run waits some seconds at its end
WORST_SHARE = 1 / 8  # of the layers, for which more bits are tried
INT8_LARGEST = 127


@dataclass(frozen=True)
class LossGap:
    """Mean losses, nats a trained token, over the same rows; None for what was not measured."""

    tokens: int
    sixteen_bits: float | None
    four_bits: float
    adapter: float | None

    def describe(self) -> str:
        """One sentence, without its end."""
        parts = [] if self.sixteen_bits is None else [f"{self.sixteen_bits:.4f} in 16 bits"]
        parts.append(f"{self.four_bits:.4f} in 4 bits")
        parts += [] if self.adapter is None else [f"{self.adapter:.4f} with the adapter"]
        return f"{', '.join(parts)} (nats a token, on {self.tokens:,} tokens)"


@dataclass(frozen=True)
class LayerError:
    """What 4 bits change in one decoder layer's output, given what the 4-bit layers before it made of the rows."""

    layer: int  # from 0
    error: float  # mean over tokens of ‖change‖² / ‖output‖²
    weights: int  # of its 4-bit linear layers


@dataclass(frozen=True)
class Mixture:
    """The 4-bit model with some layers in more bits."""

    layers: tuple[int, ...]
    bits: int
    loss: float
    more_bytes: int  # than with these layers in 4 bits


def measure_gap(model: Any, originals: OriginalWeights | None, rows: Sequence[RowBatch], report: Report) -> LossGap:
    """Losses in 16 bits, where the original weights are at hand, in 4 bits, and with the adapter.

    Args:
        model: The PeftModel of a 4-bit base, in evaluation mode.
        originals: The base's checkpoint.
        rows: At least one; from `pad_together`.

    Raises:
        ModelError: The rows cannot be sent through layer by layer.
    """
    base = model.get_base_model()
    layers = _linears_of_layers(base)
    batches = [batch.ids for batch in rows]
    forms = {name: ActivationStream(base, batches) for name in ("four_bits", "adapter")}
    if originals is not None:
        forms["sixteen_bits"] = ActivationStream(base, batches)
    for number, names in enumerate(layers, start=1):
        with model.disable_adapter():
            forms["four_bits"].advance()
        if originals is not None:
            # What is replaced lies inside of the adapter's layers, which are switched off besides.
            with (
                model.disable_adapter(),
                ReplacedLinears(base, {name: _original(base, originals, name) for name in names}),
            ):
                forms["sixteen_bits"].advance()
        forms["adapter"].advance()
        report(Progress("Measuring what 4 bits cost", number, len(layers), unit="layers"))
    losses = {}
    for name, stream in forms.items():
        with model.disable_adapter() if name != "adapter" else nullcontext():
            losses[name] = mean_loss(stream, rows)
    return LossGap(_trained(rows), losses.get("sixteen_bits"), losses["four_bits"], losses["adapter"])


def measure_held_out(model: Any, files: ModelFiles, rows: RowSubset, vocabulary: int, report: Report) -> LossGap | None:
    """`measure_gap` of a trained model on rows held out, the figures said; None where there are no such rows, or the base
    cannot be walked layer by layer, which is said too.

    Args:
        model: The PeftModel, whole, as it was loaded, without an engine.
        files: Of the base.
        rows: Held out.
        vocabulary: Tokens that have an input embedding.
        report: Receives progress and figures.
    """
    device = model.device
    held_out = choose_rows(
        (rows[i] for i in range(len(rows))),
        vocabulary=vocabulary,
        device=device,
        most_tokens=HELD_OUT_TOKENS[device.type],
    )
    if not held_out:
        return None
    model.eval()
    together = pad_together(held_out, vocabulary=vocabulary, device=device)
    try:
        if stored_format(files.config, files.name) is not None:
            gap = measure_gap(model, None, together, report)
        else:
            with OriginalWeights(files) as originals:
                gap = measure_gap(model, originals, together, report)
    except torch.OutOfMemoryError:
        reason = "there is no memory left for one layer's original weights beside the base"
    except ModelError as error:
        reason = error.message.rstrip(".")
    else:
        if all(math.isfinite(loss) for loss in (gap.sixteen_bits or 0.0, gap.four_bits, gap.adapter or 0.0)):
            report(Notice(f"On rows held out: {gap.describe()}."))
            return gap
        reason = "a loss is not finite"
    finally:
        free_memory(device)
    report(Notice(f"What 4 bits cost and the adapter won was not measured: {reason}."))
    return None


def measure_layers(
    base: Any, originals: OriginalWeights, rows: Sequence[RowBatch], report: Report
) -> tuple[LossGap, list[LayerError], list[Mixture]]:
    """Losses of a 4-bit base in 16 and 4 bits, each layer's error, the largest first, and mixtures that spare the worst.

    Raises:
        ModelError: The rows cannot be sent through layer by layer.
    """
    layers = _linears_of_layers(base)
    batches = [batch.ids for batch in rows]
    four, sixteen = ActivationStream(base, batches), ActivationStream(base, batches)
    errors = []
    for number, names in enumerate(layers):
        kept = [four.outputs(batch) for batch in range(four.batches)]
        with ReplacedLinears(base, {name: _original(base, originals, name) for name in names}):
            error = np.mean([_change(out, four.outputs(batch)) for batch, out in enumerate(kept)])
            sixteen.advance()
        del kept
        four.advance()
        weights = sum(base.get_submodule(name).weight.quant_state.shape.numel() for name in names)
        errors.append(LayerError(number, float(error), weights))
        report(Progress("Measuring what 4 bits cost", number + 1, len(layers), unit="layers"))
    gap = LossGap(_trained(rows), mean_loss(sixteen, rows), mean_loss(four, rows), None)
    errors.sort(key=lambda layer: -layer.error)
    worst = errors[: max(1, round(WORST_SHARE * len(errors)))]
    return gap, errors, _mix(base, originals, rows, layers, worst, report)


def _mix(
    base: Any,
    originals: OriginalWeights,
    rows: Sequence[RowBatch],
    layers: list[list[str]],
    worst: Sequence[LayerError],
    report: Report,
) -> list[Mixture]:
    chosen = {layer.layer for layer in worst}
    streams = {bits: ActivationStream(base, [batch.ids for batch in rows]) for bits in (8, 16)}
    for number, names in enumerate(layers):
        exact = {name: _original(base, originals, name) for name in names} if number in chosen else {}
        with ReplacedLinears(base, exact):
            streams[16].advance()
        with ReplacedLinears(base, {name: _in_eight_bits(weight) for name, weight in exact.items()}):
            streams[8].advance()
        report(Progress("Trying more bits in the worst layers", number + 1, len(layers), unit="layers"))
    weights = sum(layer.weights for layer in worst)
    return [
        Mixture(tuple(sorted(chosen)), bits, mean_loss(stream, rows), int(weights * (bits - FOUR_BITS_OF_WEIGHT) / 8))
        for bits, stream in streams.items()
    ]


def _linears_of_layers(base: Any) -> list[list[str]]:
    """Names of the 4-bit linear layers in each decoder layer.

    Raises:
        ModelError: Part of the base is in 4 bits in another way, or outside of the decoder's layers.
    """
    names = {id(module): name for name, module in four_bit_linears(base)}
    inside = [
        [names[id(module)] for module in layer.modules() if id(module) in names]
        for layer in find_layers(find_decoder(base))
    ]
    packed = [p for p in base.parameters() if p.dtype == torch.uint8]
    if sum(map(len, inside)) != len(packed):
        raise ModelError("Part of the base is held in another way than the linear layers of its decoder.")
    return inside


def _original(base: Any, originals: OriginalWeights, name: str) -> Tensor:
    linear = base.get_submodule(name)
    linear = getattr(linear, "base_layer", linear)
    name = name.removesuffix(".base_layer")
    if name not in originals:
        raise ModelError(f"The checkpoint holds no {name}.weight.")
    return originals.read(name, base.dtype, linear.weight.device)


def _in_eight_bits(weight: Tensor) -> Tensor:
    """Rounded to 8-bit integers with a scale an output row, as LLM.int8 holds weights (https://arxiv.org/abs/2208.07339)."""
    scale = weight.float().abs().amax(dim=1, keepdim=True).clamp(min=1e-30) / INT8_LARGEST
    return (weight.float() / scale).round_().mul_(scale).to(weight.dtype)


def _change(found: Tensor, wanted: Tensor) -> float:
    change = (found - wanted).float().square().sum(-1)
    return float((change / wanted.float().square().sum(-1).clamp(min=1e-30)).mean())


def _trained(rows: Sequence[RowBatch]) -> int:
    return sum(len(batch.targets) for batch in rows)
