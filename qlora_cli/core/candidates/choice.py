"""Choice of the weights that an adapter is merged into, and of how they are rounded, by the loss on rows of the run."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from qlora_cli.config import MergeConfig
from qlora_cli.core.adapters.adapter_record import AdapterRecord
from qlora_cli.core.adapters.lora import load_adapter
from qlora_cli.core.calibration.low_rank import SecondMoment
from qlora_cli.core.calibration.rows import ROUNDING_BATCH_TOKENS, ROUNDING_TOKENS, batch_rows, choose_calibration_rows
from qlora_cli.core.candidates.compensated_rounding import Round
from qlora_cli.core.candidates.losses import LIVE, UNTUNED, Candidate, MergedWeights, measure_losses
from qlora_cli.core.candidates.rounded_weights import RoundedWeights
from qlora_cli.core.device import free_memory, read_free_bytes
from qlora_cli.core.merge.base import Base
from qlora_cli.core.merge.compare_models import choose_rows, pad_together
from qlora_cli.core.merge.plan import MergeOptions, MergePlan, MergePlanner
from qlora_cli.core.merge.verify import WORKING_BYTES, find_rows, find_trained_rows, trained_bytes, why_not_loaded
from qlora_cli.core.models.loading import load_base
from qlora_cli.core.models.quantization import four_bit_linears, round_trip
from qlora_cli.core.models.structure import linear_names
from qlora_cli.errors import AdapterError, MergeError, ModelError
from qlora_cli.events import Caution, Notice, Report
from qlora_cli.sizes import format_bytes

DEQUANTIZED, ORIGINAL = "dequantized", "original"
WORDS = {
    UNTUNED: "of the 4-bit base alone",
    LIVE: "with the adapter live",
    DEQUANTIZED: "merged into the dequantised weights",
    ORIGINAL: "merged into the original ones",
}
LEAST_GAIN = 0.01  # nats a token: of less, no share is told

MakePlanner = Callable[[MergeOptions], tuple[MergePlanner, MergePlan]]


@dataclass(frozen=True)
class Choice:
    """Which base to merge into, how, and why."""

    base: str  # dequantized or original
    losses: Mapping[str, float] = field(default_factory=dict)  # nats a token, by the names of WORDS; none: not measured
    tokens: int = 0  # measured on
    rows: str = ""  # as `find_rows` describes them
    rounded: RoundedWeights | None = None  # what linear weights are written as

    @property
    def kept(self) -> float | None:
        """Share of the fine-tune's gain that is left after rounding; None where that is not known."""
        if UNTUNED not in self.losses or self.losses[UNTUNED] - self.losses[LIVE] < LEAST_GAIN:
            return None
        return (self.losses[UNTUNED] - self.losses[self.base]) / (self.losses[UNTUNED] - self.losses[LIVE])

    def describe(self) -> str:
        """The figures as one sentence, without its end."""
        figures = ", ".join(f"{loss:.4f} {WORDS[name]}" for name, loss in self.losses.items())
        in_four = " in 4 bits" if UNTUNED in self.losses else ""
        kept = "" if self.kept is None else f"; {100 * self.kept:.1f} % of the gain is kept"
        return f"Loss on {self.tokens:,} tokens {self.rows}{in_four}: {figures}{kept}"

    def card_lines(self) -> list[str]:
        """The figures as a table of a model card; nothing where nothing was measured."""
        if not self.losses:
            return []
        rows = [f"| {WORDS[name]} | {loss:.4f} |" for name, loss in self.losses.items()]
        if self.kept is not None:
            rows.append(f"| kept of the gain in 4 bits | {100 * self.kept:.1f} % |")
        heading = f"Loss, in nats a token, on {self.tokens:,} tokens {self.rows}. This model is "
        return ["## Choice of the base", "", f"{heading}{WORDS[self.base]}.", "", "| | |", "|---|---|", *rows, ""]


def choose_base(
    config: MergeConfig,
    source: AdapterRecord,
    base: Base,
    make_planner: MakePlanner,
    options: MergeOptions,
    scratch: Path,
    report: Report,
) -> Choice:
    """Measures what each base costs on rows of the run, in 4 bits where those are written, and chooses the lower loss.

    Where that cannot be measured the choice is the base that was named, or the weights that were trained against.

    Args:
        config: Names the base, if it is to be one, and the least that rounding may keep.
        source: The adapter.
        base: Of the merge.
        make_planner: The planner of a merge with other options, and its plan.
        options: Of the merge; which base they name does not matter.
        scratch: An empty directory on the disk for rounded weights.
        report: Receives the figures.

    Raises:
        MergeError: Rounding keeps less than `--min-kept`.
    """
    named = (DEQUANTIZED, ORIGINAL) if config.base == "auto" else (config.base,)
    if len(named) == 1 and not options.pack:
        return Choice(named[0])
    plain = Choice(named[0])
    try:
        reason = why_not_measured(source, base, options)
        choice = reason or _measure(named, source, base, make_planner, options, scratch, report)
    except torch.OutOfMemoryError:
        choice = "there is not the memory for the 4-bit base with its adapter"
    except (ModelError, AdapterError) as error:
        choice = error.message.rstrip(".")
    finally:
        free_memory(options.device)
    if isinstance(choice, str):
        report(_unmeasured(plain, choice, packed=options.pack))
        return plain
    if choice.kept is not None and choice.kept < config.min_kept:
        raise MergeError(
            f"{choice.describe()}, less than the {100 * config.min_kept:g} % of --min-kept; nothing was written.",
            "Merge without --quantize, or lower --min-kept.",
        )
    report(Notice(f"{choice.describe()}. The adapter is merged into the {_name(choice.base)} weights."))
    return choice


def _name(base: str) -> str:
    return "dequantised" if base == DEQUANTIZED else "original"


def _unmeasured(choice: Choice, reason: str, *, packed: bool) -> Notice | Caution:
    if packed:
        return Caution(
            f"How much of the fine-tune is left in 4 bits was not measured: {reason}. Rounding to the nearest can lose "
            "nine tenths of it; without --quantize it is kept."
        )
    return Notice(
        f"The adapter is merged into the {_name(choice.base)} weights, those it was trained against; whether the "
        f"original ones would be better was not measured: {reason}."
    )


def why_not_measured(source: AdapterRecord, base: Base, options: MergeOptions) -> str | None:
    """Why the ways to merge cannot be compared here, as a clause; None where they may be."""
    if base.stored is not None or base.trained is not None:
        return "the base is stored quantised" if base.stored else "a quantised copy of the base was trained on"
    needed, free = int(trained_bytes(base, source.facts, options)) + WORKING_BYTES, read_free_bytes(options.device)
    if needed > free:
        return f"it takes about {format_bytes(needed)} of memory, and {format_bytes(free)} are free"
    return why_not_loaded(base, options)


def _measure(
    named: tuple[str, ...],
    source: AdapterRecord,
    base: Base,
    make_planner: MakePlanner,
    options: MergeOptions,
    scratch: Path,
    report: Report,
) -> Choice | str:
    """The choice, or why there is none."""
    rows, described = find_rows(source.directory, base.files.tokenizer)
    chosen = choose_rows(rows, vocabulary=base.vocabulary, device=options.device)
    if "built-in" in described or not chosen:
        return "the rows of its run are not at hand"
    seen = _calibration_batches(source.directory, options.device) if options.pack else []
    model, _ = load_base(base.files, options.quantization, compute_dtype=options.compute_dtype, device=options.device)
    if len(list(four_bit_linears(model))) != len(linear_names(base.model)) or holds_other_weights(model):
        return "part of the base is held in another way than linear layers are"
    candidates, rounded = {}, None
    for name in named:
        planner, plan = make_planner(replace(options, restore=name == DEQUANTIZED, pack=False))
        if planner.rearranged:
            return "its checkpoint is rearranged as it is loaded"
        weights = MergedWeights(plan, planner.names)
        if not options.pack:
            candidates[name] = Candidate(weights)
        elif name == DEQUANTIZED:
            # The update is far smaller than the steps between values: it survives only where errors are passed on.
            rounded = RoundedWeights(scratch, planner.names, options)
            candidates[name] = Candidate(weights, rounded.round, knows_inputs=True)
        else:
            candidates[name] = Candidate(weights, _to_nearest(options))
    adapted = load_adapter(model, source.directory).eval()
    measured = pad_together(chosen, vocabulary=base.vocabulary, device=options.device)
    losses = measure_losses(adapted, base.model, candidates, measured, seen, report)
    best = min(candidates, key=lambda name: losses[name])  # of equal ones the first
    tokens = sum(len(batch.targets) for batch in measured)
    return Choice(best, losses, tokens, described, rounded if best == DEQUANTIZED else None)


def _calibration_batches(adapter: Path, device: torch.device) -> list[Tensor]:
    """Token ids of trained rows that rounding looks at, (rows, length) int64 each."""
    rows = find_trained_rows(adapter)
    if rows is None:
        return []
    chosen = choose_calibration_rows(rows, seed=0, device=device, most_tokens=ROUNDING_TOKENS)
    return batch_rows(rows, chosen, ROUNDING_BATCH_TOKENS[device.type])


def _to_nearest(options: MergeOptions) -> Round:
    held = options.quantization

    def rounded(weights: Mapping[str, Tensor], _: SecondMoment | None) -> Mapping[str, Tensor]:
        return {
            name: round_trip(
                weight.to(options.dtype), quant_type=held.quant_type, double_quant=held.double_quant
            ).float()
            for name, weight in weights.items()
        }

    return rounded


def holds_other_weights(model: torch.nn.Module) -> bool:
    """Whether a loaded base holds packed weights that are no linear layer's, such as experts."""
    packed = {f"{name}.weight" for name, _ in four_bit_linears(model)}
    return any(parameter.dtype == torch.uint8 and name not in packed for name, parameter in model.named_parameters())
