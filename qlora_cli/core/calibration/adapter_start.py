"""Start of an adapter: A and B that answer the error of the 4-bit base, as the user's own rows see it.

Layer by layer: some training rows, which came through the layers before as those are now, 4 bits and adapter, go through
a layer, and the second moment of what its linear layers read is gathered; then the layer's original weights are read,
A and B become the best answer of their rank to W - Q(W) under that moment, and the rows go on through the layer with
them. The base stays as it is and the adapter plain LoRA. `loftq` is the same without rows, all directions being equal
(https://arxiv.org/abs/2310.08659 with its one step on a base that stays); `eva` takes A from the rows and leaves B zero
(https://arxiv.org/abs/2410.07170).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlora_cli.core.adapters.original_weights import OriginalWeights
from qlora_cli.core.calibration.activation_stream import ActivationStream
from qlora_cli.core.calibration.low_rank import SecondMoment, answer_error, leading_directions
from qlora_cli.core.engine.lora_linear import group_by_input
from qlora_cli.core.models.quantization import dequantized_weight, is_4bit
from qlora_cli.events import Progress, Report

ADAPTER = "default"  # PEFT's name of the one that is trained
TRACE_VECTORS = 64  # a layer's share is then right to some percent, the model's to a few thousandths
MOST_EVA_WIDTH = 16_384  # of inputs, whose second moment is then at most 1 GiB


@dataclass(frozen=True)
class StartFacts:
    """What the start came to. Errors are squared, of the linear layers' outputs over the rows."""

    init: str
    rows: int
    tokens: int
    adapted: int  # linear layers whose A and B were set
    left: int  # linear layers that start plainly: not in 4 bits, not in a decoder layer, or not in the checkpoint
    answered: float | None  # share of the 4-bit error that A and B answer, 0 to 1


def adapted_linears(base: nn.Module) -> dict[str, Any]:
    """The adapted linear layers in 4 bits by their names in the base."""
    return {
        name: module
        for name, module in base.named_modules()
        if ADAPTER in getattr(module, "lora_A", ()) and hasattr(module, "base_layer") and is_4bit(module.base_layer)
    }


def calibrate_adapter(
    base: Any, originals: OriginalWeights, batches: Sequence[Tensor], init: str, report: Report
) -> StartFacts:
    """Sets A and B of a fresh adapter, layer by layer, from the rows.

    Args:
        base: The adapted base, in evaluation mode.
        originals: Its checkpoint.
        batches: Token ids, (rows, length) int64 each.
        init: calibrated or eva.
        report: Receives the progress.

    Raises:
        ModelError: The rows cannot be sent through layer by layer.
    """
    stream = ActivationStream(base, batches)
    targets = {id(module): name for name, module in adapted_linears(base).items() if name in originals}
    whole = answered = 0.0
    adapted = 0
    for number, layer in enumerate(stream.layers, start=1):
        inside = [module for module in layer.modules() if id(module) in targets]
        for total, part in _start_layer(stream, inside, targets, originals, init):
            adapted, whole, answered = adapted + 1, whole + total, answered + part
        if number < len(stream.layers):
            stream.advance()
        report(Progress("Calibrating the adapter", number, len(stream.layers), unit="layers"))
    return StartFacts(
        init=init,
        rows=sum(len(batch) for batch in batches),
        tokens=sum(batch.numel() for batch in batches),
        adapted=adapted,
        left=len(adapted_linears(base)) - adapted,
        answered=answered / whole if whole else None,
    )


def answer_weight_errors(base: nn.Module, originals: OriginalWeights, report: Report) -> StartFacts:
    """Sets A and B to the best answer to W - Q(W) with all directions equal: `loftq`."""
    linears = {name: module for name, module in adapted_linears(base).items() if name in originals}
    whole = answered = 0.0
    for number, (name, module) in enumerate(linears.items(), start=1):
        total, part = _answer(module, _error_of(module, name, originals), SecondMoment())
        whole, answered = whole + total, answered + part
        report(Progress("Answering the 4-bit error", number, len(linears), unit="weights"))
    left = len(adapted_linears(base)) - len(linears)
    return StartFacts("loftq", 0, 0, len(linears), left, answered / whole if whole else None)


def _start_layer(
    stream: ActivationStream, linears: list[Any], names: Mapping[int, str], originals: OriginalWeights, init: str
) -> list[tuple[float, float]]:
    """Sets A and B of the next layer's linears; for each, as `_answer` says, zeros with `eva`.

    What was gathered is dropped with its last reader, and nothing of it outlives the layer: a layer of 11,008 inputs
    holds 600 MB of moments and errors.
    """
    if not linears:
        return []
    moments, errors = _gather(stream, linears, names, originals, narrow_errors=init != "eva")
    answers = []
    for module in linears:
        moment, error = moments.pop(id(module), None), errors.pop(id(module), None)
        if moment is None or not moment.tokens:
            continue  # no token came to it
        if init == "eva":
            _start_from_inputs(module, moment)
            answers.append((0.0, 0.0))
            continue
        exact = _error_of(module, names[id(module)], originals) if error is None else error.float()
        del error
        answers.append(_answer(module, exact, moment))
        del exact
    return answers


def _gather(
    stream: ActivationStream,
    linears: list[Any],
    names: Mapping[int, str],
    originals: OriginalWeights,
    *,
    narrow_errors: bool,
) -> tuple[dict[int, SecondMoment], dict[int, Tensor]]:
    """Second moments of the next layer's linears by id; those that read the same tensor share one.

    With `narrow_errors` a linear that is much wider than high has the moment of its output's errors gathered instead;
    its error, (out, in) in the compute dtype, comes back too.
    """
    groups: list[list[Any]] = [*group_by_input(linears, stream.probe)]
    grouped = {id(module) for group in groups for module in group}
    groups += [[module] for module in linears if id(module) not in grouped]
    moments: dict[int, SecondMoment] = {}
    leaders: dict[int, SecondMoment] = {}
    errors: dict[int, Tensor] = {}
    for group in groups:
        moment = SecondMoment()
        if narrow_errors and len(group) == 1 and _is_wide(group[0]):
            module = group[0]
            dtype = module.base_layer.compute_dtype or torch.float32
            errors[id(module)] = _error_of(module, names[id(module)], originals).to(dtype)
        if not narrow_errors and group[0].in_features > MOST_EVA_WIDTH:
            continue
        leaders[id(group[0])] = moment
        moments |= {id(module): moment for module in group}

    def note(module: nn.Module, args: tuple, _: dict) -> None:
        moment, x = leaders[id(module)], args[0].detach().reshape(-1, args[0].shape[-1])
        if id(module) in errors:
            moment.add_errors(x.to(errors[id(module)].dtype), errors[id(module)])
        else:
            moment.add_inputs(x)

    stream.watch(note, [module for module in linears if id(module) in leaders])
    return moments, errors


def _is_wide(module: Any) -> bool:
    """Whether the output's errors are gathered in less arithmetic than the inputs."""
    columns, rows = module.in_features, module.out_features
    return rows * (columns + rows) < columns * columns


def _error_of(module: Any, name: str, originals: OriginalWeights) -> Tensor:
    """W - Q(W), (out, in) float32."""
    quantised = dequantized_weight(module.base_layer)
    return originals.read(name, quantised.dtype, quantised.device, torch.float32).sub_(quantised)


def _answer(module: Any, error: Tensor, moment: SecondMoment) -> tuple[float, float]:
    """Sets A and B; the squared error of the output over the rows, and how much of it they answer."""
    scaling = module.scaling[ADAPTER]
    a, b = answer_error(error, moment, module.r[ADAPTER], scaling)
    _put(module, a, b)
    singular = b.square().sum(dim=0) * scaling**2  # as `answer_error` shares them out
    squares = 1.0 if moment.squares is None else float(moment.squares)  # in whose units the moments are damped
    return squares * float(_trace(moment.of_errors(error), error)), squares * float(singular.square().sum())


def _trace(multiply: Callable[[Tensor], Tensor], error: Tensor) -> Tensor:
    """Trace of the moment of the output's errors: Hutchinson's estimate by fixed vectors of signs."""
    generator = torch.Generator().manual_seed(1)
    signs = torch.randint(0, 2, (len(error), TRACE_VECTORS), generator=generator).to(error) * 2 - 1
    return (signs * multiply(signs)).sum() / TRACE_VECTORS


def _start_from_inputs(module: Any, moment: SecondMoment) -> None:
    assert moment.inputs is not None
    inputs = moment.inputs
    _, directions = leading_directions(inputs, lambda z: inputs @ (inputs @ z), module.r[ADAPTER])
    _put(module, directions.T, None)


def _put(module: Any, a: Tensor, b: Tensor | None) -> None:
    """Sets the first rows of A and columns of B; what is beyond the rank of the error stays as it started."""
    weights = module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight
    with torch.no_grad():
        weights[0][: len(a)] = a.to(weights[0])
        if b is not None:
            weights[1][:, : len(a)] = b.to(weights[1])
        magnitudes = getattr(module, "lora_magnitude_vector", None)
        if b is not None and magnitudes is not None and ADAPTER in magnitudes:  # DoRA starts where plain LoRA does
            started = dequantized_weight(module.base_layer).float() + module.scaling[ADAPTER] * (b @ a)
            magnitude = magnitudes[ADAPTER].weight
            magnitude.copy_(torch.linalg.vector_norm(started, dim=1).to(magnitude))
