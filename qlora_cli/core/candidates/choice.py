"""Choice of the weights that an adapter is merged into: those it was trained against, or the original ones, as measured."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from qlora_cli.core.adapters.adapter_record import AdapterRecord
from qlora_cli.core.adapters.lora import load_adapter
from qlora_cli.core.candidates.losses import LIVE, MergedWeights, measure_losses
from qlora_cli.core.device import free_memory, read_free_bytes
from qlora_cli.core.merge.base import Base
from qlora_cli.core.merge.compare_models import choose_rows
from qlora_cli.core.merge.plan import MergeOptions, MergePlan, MergePlanner
from qlora_cli.core.merge.verify import WORKING_BYTES, find_rows, trained_bytes, why_not_loaded
from qlora_cli.core.merge.weight_tying import embedding_names
from qlora_cli.core.models.loading import load_base
from qlora_cli.core.models.quantization import four_bit_linears
from qlora_cli.core.models.structure import linear_names
from qlora_cli.errors import AdapterError, ModelError
from qlora_cli.events import Notice, Report
from qlora_cli.sizes import format_bytes

DEQUANTIZED, ORIGINAL = "dequantized", "original"
WORDS = {
    LIVE: "with the adapter live",
    DEQUANTIZED: "merged into the dequantised weights",
    ORIGINAL: "into the original",
}


@dataclass(frozen=True)
class Choice:
    """Which base to merge into, and why."""

    base: str  # dequantized or original
    losses: Mapping[str, float]  # nats a token: live, dequantized, original; empty where nothing was measured
    tokens: int  # measured on
    rows: str  # as `find_rows` describes them

    def describe(self) -> str:
        """The figures as one sentence."""
        figures = ", ".join(f"{loss:.4f} {WORDS[name]}" for name, loss in self.losses.items())
        return f"Loss on {self.tokens:,} tokens {self.rows}: {figures}"

    def card_lines(self) -> list[str]:
        """The figures as a table of a model card; nothing where nothing was measured."""
        if not self.losses:
            return []
        rows = [f"| {WORDS[name]} | {loss:.4f} |" for name, loss in self.losses.items()]
        heading = (
            f"Loss, in nats a token, on {self.tokens:,} tokens {self.rows}; the lower of the last two is this model."
        )
        return ["## Choice of the base", "", heading, "", "| | |", "|---|---|", *rows, ""]


def choose_base(
    source: AdapterRecord,
    base: Base,
    make_planner: Callable[[MergeOptions], tuple[MergePlanner, MergePlan]],
    options: MergeOptions,
    report: Report,
) -> Choice:
    """Measures what each base costs on rows of the run, and chooses the lower loss.

    Where that cannot be measured the choice is the weights that were trained against, and why is reported.

    Args:
        source: The adapter.
        base: Of the merge.
        make_planner: The planner of a merge with other options, and its plan.
        options: Of the merge; which base they name does not matter.
        report: Receives the figures.
    """
    try:
        if base.stored is not None:
            return _unmeasured("the base is stored quantised", report)
        candidates = {}
        for name in (DEQUANTIZED, ORIGINAL):
            planner, plan = make_planner(replace(options, restore=name == DEQUANTIZED, pack=False))
            candidates[name] = MergedWeights(plan, planner.names)
        choice = _measure(source, base, candidates, options, report)
    except torch.OutOfMemoryError:
        return _unmeasured("there is not the memory for the 4-bit base with its adapter", report)
    except (ModelError, AdapterError) as error:
        return _unmeasured(error.message.rstrip("."), report)
    finally:
        free_memory(options.device)
    if choice.losses:
        report(Notice(f"{choice.describe()}. The adapter is merged into the {_name(choice.base)} weights."))
    return choice


def _name(base: str) -> str:
    return "dequantised" if base == DEQUANTIZED else "original"


def _unmeasured(reason: str, report: Report) -> Choice:
    report(
        Notice(
            f"The adapter is merged into the dequantised weights, those it was trained against; whether the original "
            f"ones would be better was not measured: {reason}."
        )
    )
    return Choice(DEQUANTIZED, {}, 0, "")


def _measure(
    source: AdapterRecord,
    base: Base,
    candidates: Mapping[str, MergedWeights],
    options: MergeOptions,
    report: Report,
) -> Choice:
    needed, free = int(trained_bytes(base, source.facts, options)) + WORKING_BYTES, read_free_bytes(options.device)
    if needed > free:
        return _unmeasured(
            f"it takes about {format_bytes(needed)} of memory, and {format_bytes(free)} are free", report
        )
    if reason := why_not_loaded(base, options):
        return _unmeasured(reason, report)
    rows, described = find_rows(source.directory, base.files.tokenizer)
    if "built-in" in described:
        return _unmeasured("the rows of its run are not at hand", report)
    names = embedding_names(base.model)
    chosen = choose_rows(rows, vocabulary=base.model.get_parameter(names[0]).shape[0], device=options.device)
    if not chosen:
        return _unmeasured("there is no row to measure on", report)
    model, _ = load_base(base.files, options.quantization, compute_dtype=options.compute_dtype, device=options.device)
    if len(list(four_bit_linears(model))) != len(linear_names(base.model)) or holds_other_weights(model):
        return _unmeasured("part of the base is held in another way than linear layers are", report)
    adapted = load_adapter(model, source.directory).eval()
    losses = measure_losses(adapted.get_base_model(), base.model, candidates, chosen, report)
    best = min(candidates, key=lambda name: losses[name])  # of equal ones the first
    return Choice(best, losses, sum(int(trained[1:].sum()) for _, trained in chosen), described)


def holds_other_weights(model: torch.nn.Module) -> bool:
    """Whether a loaded base holds packed weights that are no linear layer's, such as experts."""
    packed = {f"{name}.weight" for name, _ in four_bit_linears(model)}
    return any(parameter.dtype == torch.uint8 and name not in packed for name, parameter in model.named_parameters())
