"""Choice of the arithmetic that frozen linear layers and stacks of experts are multiplied in: bf16, or 8 bits for those that
pass the gate."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qlora_cli.core.data.packing import MicroBatch, collate
from qlora_cli.core.matmul.expert_stacks import ExpertStacks
from qlora_cli.core.matmul.gate import ProductErrors, measure_products
from qlora_cli.errors import UsageError, first_line
from qlora_cli.events import Notice, Report
from qlora_cli.kernels import float8
from qlora_cli.kernels.weights import FrozenWeight
from qlora_cli.settings.groups import StepSettings

MOST_ERROR = 1.0  # as a multiple of what 4 bits do, above which a layer stays in bf16
TRIAL_TOKENS = 512
NAMED = 8  # layers that stay in bf16, in a message
# Tokens of a micro-batch from which `auto` multiplies in 8 bits: llama-7b's step of so many took 0.68 of bf16's time
# (benchmarks/matmul.md).
AUTO_TOKENS = 4096


@dataclass(frozen=True)
class ProductRecord:
    """What was chosen for a run, which keeps it when it goes on."""

    asked: str  # the setting
    matmul: str  # fp8, or bf16 where nothing passed
    kept: tuple[str, ...] = ()  # linear layers in bf16 all the same
    stacks: tuple[str, ...] = ()  # of experts, in 8 bits: in runs begun before there was that, none
    tokens: int = 0  # that were tried
    worst_output: float = 0.0  # of the layers in 8 bits, as a multiple of what 4 bits do
    worst_gradient: float = 0.0


@dataclass(frozen=True)
class ProductTrial:
    """What a run gives to choose by.

    Attributes:
        batch: Rows of the first step, at most `TRIAL_TOKENS`; None for random ones.
        recorded: `ProductRecord` of the run that goes on, as JSON has it; None for none.
        resumed: Whether the run goes on.
        pays: Whether `auto` may take 8 bits, as far as tokens and card allow.
        largest: Makes numbers the largest of all ranks', so that these choose alike.
    """

    batch: MicroBatch | None = None
    recorded: Mapping[str, Any] | None = None
    resumed: bool = False
    pays: bool = False
    largest: Callable[[Tensor], Tensor] = lambda found: found


def trial_batch(rows: Sequence[tuple[np.ndarray, np.ndarray]]) -> MicroBatch:
    """Rows, (input_ids, trained) each, cut to `TRIAL_TOKENS` in all; all trained where no token of these is."""
    taken: list[tuple[np.ndarray, np.ndarray]] = []
    left = TRIAL_TOKENS
    for ids, trained in rows:
        if left < 2 and taken:
            break
        taken.append((ids[:left], np.array(trained[:left])))
        left -= len(taken[-1][0])
    if not any(trained[1:].any() for _, trained in taken):
        taken = [(ids, np.ones(len(ids), dtype=bool)) for ids, _ in taken]
    return collate(taken, range(len(taken)))


def has_float8(device: torch.device) -> bool:
    """Whether a device multiplies e4m3: Ada, Hopper and later cards do. On the CPU it is emulated."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)


def is_tried(settings: StepSettings, tokens: int, *, on_cuda: bool) -> bool:
    """Whether a run that begins with micro-batches of so many tokens tries 8 bits, where the card has them and, with
    `auto`, the run is long."""
    if settings.matmul == "auto":
        return on_cuda and tokens >= AUTO_TOKENS and settings.engine == "fast"
    return settings.matmul == "fp8"


def has_products(device: torch.device, compute_dtype: torch.dtype) -> bool:
    """Whether a device multiplies in 8 bits what is computed in this dtype."""
    return has_float8(device) and (device.type == "cpu" or compute_dtype == torch.bfloat16)


def is_wanted(
    settings: StepSettings,
    trial: ProductTrial,
    device: torch.device,
    compute_dtype: torch.dtype,
    tokens: int,
    sharded: bool,
    report: Report,
) -> bool:
    """Whether layers are to be multiplied in 8 bits, as far as the gate lets them.

    Args:
        tokens: Of the largest micro-batch.
        sharded: Whether the base is, of whose weights no card sees whole rows and columns.

    Raises:
        UsageError: It was asked for and cannot be.
    """
    asked, recorded = settings.matmul, recorded_choice(settings, trial)
    fits = has_products(device, compute_dtype)
    wanted = is_tried(settings, tokens, on_cuda=device.type == "cuda")
    if asked == "auto":
        # A run that goes on is computed as it was so far.
        may = wanted and fits and trial.pays and not sharded
        wanted = recorded is not None and recorded.matmul == "fp8" if trial.resumed else may
    if not wanted:
        return False
    if not fits:
        what = f"compute dtype {str(compute_dtype).removeprefix('torch.')}" if has_float8(device) else "this card"
        raise UsageError(
            f"--matmul {asked}: this run multiplies in fp8, which {what} does not.",
            "It takes an Ada, Hopper or later card and bfloat16. Use --matmul bf16 (with --resume: --allow-changes).",
        )
    if sharded:
        report(Notice("Layers are multiplied in bf16, without --matmul fp8: the base is sharded."))
        return False
    if device.type == "cpu":
        report(Notice("There is no fp8 on a CPU: it is emulated, which is slower than bf16."))
    return True


def recorded_choice(settings: StepSettings, trial: ProductTrial) -> ProductRecord | None:
    """What was chosen when the run began, where the same is asked for."""
    recorded = trial.recorded
    if recorded is None or recorded.get("asked") != settings.matmul:
        return None
    return ProductRecord(**{**recorded, "kept": tuple(recorded["kept"]), "stacks": tuple(recorded.get("stacks", ()))})


def choose_products(
    settings: StepSettings,
    trial: ProductTrial,
    layers: Mapping[str, tuple[nn.Module, FrozenWeight]],
    stacks: ExpertStacks,
    tokens: int,
    run: Callable[[], Any],
    report: Report,
) -> tuple[frozenset[str], ProductRecord]:
    """Names of the linear layers and stacks of experts that are multiplied in 8 bits: those that the run had so, else those
    that pass the gate.

    Args:
        layers: By name, with their packed weights.
        tokens: Of the largest micro-batch, or of a tile of it.
        run: Passes the trial's rows through all of them, forward and backward.

    Raises:
        RuntimeError: There is no room for that, or it fails, and 8 bits were asked for.
    """
    uncovered = {name: "sides or dtype" for name, (_, weight) in layers.items() if not float8.covers(weight)}
    uncovered |= {name: reason for name in stacks.found if (reason := stacks.why_not(name, tokens))}
    covered = [name for name in (*layers, *stacks.found) if name not in uncovered]
    recorded = recorded_choice(settings, trial)
    if recorded is not None:
        if stacks.found and not recorded.stacks:
            report(Notice("Routed experts are multiplied in bf16, as when this run began."))
        chosen = {name for name in covered if name in layers and name not in recorded.kept}
        return frozenset(chosen.union(name for name in recorded.stacks if name in stacks.found)), recorded
    errors = dict.fromkeys(covered, ProductErrors(float("inf"), float("inf")))
    failure, failed = "", dict[str, str]()
    try:
        with stacks.measuring(name for name in covered if name in stacks.found) as read_stacks:
            of_layers = measure_products(dict(layers[name] for name in covered if name in layers), run)
        errors |= {name: of_layers[module] for name, (module, _) in layers.items() if module in of_layers}
        errors |= (of_stacks := read_stacks())
        failed = stacks.failures(name for name, each in of_stacks.items() if each.worst <= MOST_ERROR)
        errors |= dict.fromkeys(failed, ProductErrors(float("inf"), float("inf")))
    except RuntimeError as error:  # of memory too, or a card or library without these products
        if settings.matmul != "auto":
            raise
        room = isinstance(error, torch.OutOfMemoryError)
        failure = "there is no room to try them" if room else f"a trial failed ({first_line(error)})"
    if errors:
        table = torch.tensor([[e.output, e.gradient] for e in errors.values()], dtype=torch.float64).nan_to_num(
            nan=torch.inf, posinf=torch.inf
        )
        errors = {n: ProductErrors(*e) for n, e in zip(errors, trial.largest(table).tolist(), strict=True)}
    passed = {name: each for name, each in errors.items() if each.worst <= MOST_ERROR}
    record = ProductRecord(
        asked=settings.matmul,
        matmul="fp8" if passed else "bf16",
        kept=tuple(name for name in layers if name not in passed),
        stacks=tuple(name for name in stacks.found if name in passed),
        tokens=trial.batch.tokens if trial.batch else TRIAL_TOKENS,
        worst_output=max((e.output for e in passed.values()), default=0.0),
        worst_gradient=max((e.gradient for e in passed.values()), default=0.0),
    )
    why = uncovered | {name: _in_words(each) for name, each in errors.items() if name not in passed} | failed
    why = {name: why[name] for name in (*layers, *stacks.found) if name in why}
    if failure:
        report(Notice(f"Layers are multiplied in bf16, not in fp8 as --matmul auto would: {failure}."))
    else:
        report(Notice(describe_choice(record, len(layers), len(stacks.found), why)))
    return frozenset(passed), record


def describe_choice(record: ProductRecord, layers: int, stacks: int, why: Mapping[str, str]) -> str:
    """What the gate found, in words.

    Args:
        layers: How many linear layers there are.
        stacks: How many stacks of experts.
        why: Each that is not multiplied in 8 bits stays as it is.
    """
    of_experts = f", and of {stacks} stacks of experts {len(record.stacks)}" if stacks else ""
    text = (
        f"Of {layers} frozen linear layers {layers - len(record.kept)} are multiplied in fp8{of_experts}. On "
        f"{record.tokens} tokens that changed their outputs by at most {record.worst_output:.2f}, and the gradients of their inputs by at most "
        f"{record.worst_gradient:.2f} of what rounding to 4 bits did."
    )
    if record.asked == "auto" and record.matmul == "fp8":
        text += " --matmul bf16 turns it off."
    if why:
        named = [f"{name} ({reason})" for name, reason in why.items()]
        text += f" In bf16 stay {', '.join(named[:NAMED])}{', …' if len(named) > NAMED else ''}."
    return text


def _in_words(errors: ProductErrors) -> str:
    return f"{errors.worst:.2f}" if math.isfinite(errors.worst) else "not measured"


def record_of(record: ProductRecord | None) -> dict[str, Any]:
    """What a run's record keeps of the choice: nothing where there was none."""
    return {} if record is None else {"matmul": asdict(record)}
