"""Losses of ways to merge, measured before anything is written: layer by layer beside the base in training and its adapter.

One 4-bit base with its adapter is in memory. The rows go through it as many times as there are models to compare, in
step: at each layer the model as it was trained, then with the layer's linears replaced by merged weights of each kind,
which are computed by the tasks that would write them. So no merged model is ever whole.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qlora_cli.core.calibration.activation_stream import ActivationStream
from qlora_cli.core.candidates.compensated_rounding import Round, round_layer
from qlora_cli.core.merge.compare_models import RowBatch
from qlora_cli.core.merge.plan import MergePlan, MergeTask
from qlora_cli.core.models.structure import linear_names
from qlora_cli.core.storage.safetensors_header import TensorEntry
from qlora_cli.events import Progress, Report

UNTUNED = "untuned"  # the 4-bit base without its adapter
LIVE = "live"  # the model as it was trained: the 4-bit base, the adapter beside it


class MergedWeights:
    """The weights of one plan, each computed when it is asked for."""

    def __init__(self, plan: MergePlan, names: Mapping[str, str]) -> None:
        """`names` are those of the parameters of the model in the checkpoint (`MergePlanner.names`)."""
        self._tasks: dict[str, tuple[TensorEntry, MergeTask]] = {}
        for file in plan.files:
            for (name, entry), task in zip(file.header.entries.items(), file.tasks, strict=True):
                self._tasks[name] = entry, task
        self._names = names

    def __contains__(self, parameter: str) -> bool:
        return self._names.get(parameter, "") in self._tasks

    def read(self, parameter: str) -> Tensor:
        """A merged parameter as it would be written, on the host."""
        entry, task = self._tasks[self._names[parameter]]
        chunks = [chunk.flatten().view(torch.uint8) for _, chunk in task.run()]
        return torch.cat(chunks).view(entry.dtype).view(entry.shape)


@dataclass(frozen=True)
class Candidate:
    """One way to merge.

    Attributes:
        weights: Merged, in 16 or 32 bits.
        rounded: Receives merged weights (out, in) float32 of linear layers that read the same inputs, by the layers'
            names, and the second moment of those inputs, and gives what is computed with instead; None where weights
            stay as they are.
        knows_inputs: Whether that moment is gathered, and weights make up for what was lost in front of them; else it is
            None.
    """

    weights: MergedWeights
    rounded: Round | None = None
    knows_inputs: bool = False


def measure_losses(
    adapted: Any,
    structure: nn.Module,
    candidates: Mapping[str, Candidate],
    measured: Sequence[RowBatch],
    seen: Sequence[Tensor],
    report: Report,
) -> dict[str, float]:
    """Mean loss, in nats a trained token, of the model as it was trained ("live") and of each way to merge it; where one
    of them rounds, of the base without its adapter too ("untuned").

    Args:
        adapted: The PEFT model of the 4-bit base, its adapter live, in evaluation mode.
        structure: The base's architecture on the meta device.
        candidates: By name.
        measured: At least one; from `pad_together`.
        seen: Token ids of others, (rows, length) int64, of which moments of inputs are gathered where a candidate knows
            its inputs.
        report: Receives the progress.

    Raises:
        ModelError: The rows cannot be sent through layer by layer.
    """
    base = adapted.get_base_model()
    batches = [batch.ids for batch in measured]
    plain = (UNTUNED,) if any(candidate.rounded for candidate in candidates.values()) else ()
    knowing = [name for name, candidate in candidates.items() if candidate.knows_inputs]
    streams = {}
    for name in (*plain, LIVE, *candidates):
        others = seen if name in knowing or (name == LIVE and knowing) else ()
        streams[name] = ActivationStream(base, [*others, *batches], may_stay=True)
        streams[name].counted = len(others)
    linears = {id(base.get_submodule(name)): name for name in linear_names(structure)}
    transposed = {name for name in linears.values() if isinstance(structure.get_submodule(name), Conv1D)}
    for number, layer in enumerate(streams[LIVE].layers, start=1):
        inside = [linears[id(module)] for module in layer.modules() if id(module) in linears]
        for name, candidate in candidates.items():
            weights, biases = _read_merged(base, inside, candidate.weights, transposed)
            if candidate.knows_inputs:
                weights = _round_knowing(base, weights, biases, candidate, streams[LIVE], streams[name])
            elif candidate.rounded:
                weights = {n: candidate.rounded({n: w.float()}, None)[n].to(w.dtype) for n, w in weights.items()}
            with ReplacedLinears(base, weights, biases):
                streams[name].advance()
        streams[LIVE].advance()
        if plain:
            with adapted.disable_adapter():
                streams[UNTUNED].advance()
        report(Progress("Measuring ways to merge", number, len(streams[LIVE].layers), unit="layers"))
    return {name: mean_loss(stream, measured) for name, stream in streams.items()}


def _round_knowing(
    base: Any,
    weights: Mapping[str, Tensor],
    biases: Mapping[str, Tensor],
    candidate: Candidate,
    live: ActivationStream,
    stream: ActivationStream,
) -> dict[str, Tensor]:
    assert candidate.rounded is not None

    def replaced(now: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        return ReplacedLinears(base, now, biases)

    def linears() -> dict[str, Any]:
        return {name: base.get_submodule(name) for name in weights}

    return round_layer(live, stream, linears, weights, replaced, candidate.rounded)


def _read_merged(
    base: Any, names: Sequence[str], weights: MergedWeights, transposed: set[str]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Merged weights of linear layers, (out, in) in the base's dtype on their device, and biases, as far as there are."""
    values, biases = {}, {}
    for name in names:
        module = base.get_submodule(name)
        device = getattr(module, "base_layer", module).weight.device
        weight = weights.read(f"{name}.weight").to(device).to(base.dtype)
        values[name] = weight.T.contiguous() if name in transposed else weight
        if f"{name}.bias" in weights:
            biases[name] = weights.read(f"{name}.bias").to(device)
    return values, biases


class ReplacedLinears:
    """Inside of a block, as often as it is entered, linear layers compute with other weights and without their adapters."""

    def __init__(
        self, base: Any, weights: Mapping[str, Tensor], biases: Mapping[str, Tensor] = MappingProxyType({})
    ) -> None:
        """Makes the layers.

        Args:
            base: The model that they are in.
            weights: (out, in) by the layers' names, on their device, in the base's dtype.
            biases: Where they are others than the layers' own.
        """
        self._places: list[
            tuple[dict[str, Any], str, nn.Module, nn.Module]
        ] = []  # what holds each, its name, it, the new
        for name, weight in weights.items():
            parent, _, child = name.rpartition(".")
            held = base.get_submodule(parent)._modules
            own = getattr(held[child], "base_layer", held[child]).bias
            dense = nn.Linear(1, 1, bias=False, device="meta")
            dense.weight = nn.Parameter(weight, requires_grad=False)
            dense.out_features, dense.in_features = weight.shape
            if own is not None:
                dense.bias = nn.Parameter(biases.get(name, own.detach()).to(base.dtype), requires_grad=False)
            self._places.append((held, child, held[child], dense))

    def __enter__(self) -> None:
        for held, child, _, other in self._places:
            held[child] = other

    def __exit__(self, *error: object) -> None:
        for held, child, own, _ in self._places:
            held[child] = own


def mean_loss(stream: ActivationStream, measured: Sequence[RowBatch]) -> float:
    """Mean loss, nats a trained token, of the last batches of a stream with every layer behind it."""
    total, tokens = 0.0, 0
    for number, batch in enumerate(measured, start=stream.batches - len(measured)):
        logits, targets = batch.predictions(stream.logits(number))
        total += float(F.cross_entropy(logits, targets, reduction="sum"))
        tokens += len(targets)
    return total / tokens
