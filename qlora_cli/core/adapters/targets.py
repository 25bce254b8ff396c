"""Targets of an adapter: which modules it is attached to, found by name, suffix or regular expression."""

import re
from collections.abc import Iterable, Mapping, Sequence

import regex
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qlora_cli.core.experts.four_bit_experts import FourBitExperts
from qlora_cli.core.experts.layout import expert_weights, find_experts
from qlora_cli.core.models.account import plan_packing
from qlora_cli.core.models.quantization import is_4bit
from qlora_cli.core.models.raw_weights import read_raw
from qlora_cli.core.models.structure import head_names, is_plain_linear, linear_names, tower_names
from qlora_cli.errors import AdapterError
from qlora_cli.settings.groups import LoraSettings

ALL_LINEAR = "all-linear"
MATCH_SECONDS = 1.0  # for one name: a pattern may backtrack for ever
REGEX_CHARACTERS = set("*+?[](){}|^$\\")
LISTED = 12  # names in an error


def check_settings(model: PreTrainedModel, lora: LoraSettings) -> None:
    """Checks what of an adapter's settings needs no target to be found.

    Raises:
        AdapterError: A module to be trained in full is none or is held in 4 bits.
    """
    for name in lora.modules_to_save or ():
        if not any(n == name or n.endswith("." + name) for n, _ in model.named_modules()):
            raise AdapterError(f"--modules-to-save {name} matches no module.", "Check the name with: qlora inspect")
        # PEFT copies every module whose name ends so, and what lies in it.
        held = next((n for n in _held_in_4_bits(model) if re.search(rf"{re.escape(name)}(\.|$)", n)), None)
        if held is not None:
            raise AdapterError(
                f"--modules-to-save {name} names {held}, which is held in 4 bits and cannot be trained in full.",
                "Name it with --target-modules, and keep norms, embeddings and the head for --modules-to-save.",
            )


def _held_in_4_bits(model: PreTrainedModel) -> list[str]:
    """Names of modules that are held in 4 bits, or on the meta device will be."""
    if next(model.parameters()).device.type == "meta":
        return [name.rpartition(".")[0] for name in plan_packing(model).packed]
    return [n for n, module in model.named_modules() if is_4bit(module) or isinstance(module, FourBitExperts)]


def find_targets(model: PreTrainedModel, lora: LoraSettings) -> list[str]:
    """Full names of the modules to adapt: those asked for, or every linear layer but the head, without those excluded.

    By default a layer is left out whose weight is read without calling it (`read_raw`), that does more than a linear
    layer does, as some routers, or that PEFT refuses.

    Raises:
        AdapterError: A name matches no module that an adapter can be attached to, or nothing is left.
    """
    linears = linear_names(model)
    raw = read_raw(model)
    beside = tuple(f"{name}." for name in tower_names(model))
    default = [name for name in linears if not name.startswith(beside) and _is_linear(model.get_submodule(name))]
    if any(isinstance(module, nn.Conv1d) for module in model.modules()):  # as mixers have, and PEFT refuses no others
        from qlora_cli.core.adapters.peft_names import refuses_target

        default = [name for name in default if not refuses_target(model, name.rpartition(".")[2])]
    if lora.target_modules is None:
        found = default
    else:
        others = [*head_names(model), *(n for n, module in model.named_modules() if isinstance(module, nn.Embedding))]
        found = _find(
            lora.target_modules,
            default,
            [*linears, *others, *raw],
            "--target-modules",
            model,
            adapted=lora.adapt_experts,
        )
        odd = [name for name in found if name not in default and name not in others]
        if odd:
            raise AdapterError(
                f"{odd[0]} takes no adapter: its weight is read without calling it, it does more than a linear layer, or "
                "PEFT refuses it.",
                f"Leave it out, or use --target-modules {ALL_LINEAR}, which does.",
            )
    if lora.exclude_modules:
        excluded = set(_find(lora.exclude_modules, default, found, "--exclude-modules", model, adapted=False))
        found = [name for name in found if name not in excluded]
    if not found and not lora.adapt_experts:
        raise AdapterError("No linear layer is left to adapt.", "Name modules with --target-modules.")
    return found


def _is_linear(module: nn.Module) -> bool:
    return is_plain_linear(module) or is_4bit(module) or isinstance(module, Conv1D)


def _find(
    wanted: Sequence[str],
    default: Sequence[str],
    names: Sequence[str],
    flag: str,
    model: PreTrainedModel,
    *,
    adapted: bool,
) -> list[str]:
    """Those of `names` that a comma-separated setting matches, in their order; each item has to match one.

    The name of a module that holds others, such as `mlp` or `experts`, stands for the linear layers in it. An item may
    also name stacks of experts, on which other settings decide where they are `adapted`.
    """
    matched = {
        item: set(default) if item == ALL_LINEAR else match(item, names, flag) or _below(item, default)
        for item in wanted
    }
    missing = [item for item, found in matched.items() if not found]
    stacks = stack_names(model)
    fused = [item for item in missing if match(item, stacks, flag) or _below(item, stacks)]
    if adapted:
        missing = [item for item in missing if item not in fused]
    if missing and len(wanted) > 1:  # the commas may be a regular expression's
        whole = match(",".join(wanted), names, flag)
        if whole:
            return [name for name in names if name in whole]
    if fused and fused == missing:
        raise AdapterError(
            f"{flag} {', '.join(fused)} names experts, which this {model.config.model_type} model keeps as stacks of "
            "matrices and not as linear layers.",
            f"Leave {'it' if len(fused) == 1 else 'them'} out: experts are adapted by --adapt-experts, and never without.",
        )
    if missing:
        leaves = sorted({name.rsplit(".", 1)[-1] for name in names})
        raise AdapterError(
            f"{flag} {', '.join(missing)} matches no linear layer of this {model.config.model_type} model.",
            f"Its linear layers are: {', '.join(leaves[:LISTED])}{', …' if len(leaves) > LISTED else ''}.",
        )
    chosen = set().union(*matched.values())
    return [name for name in names if name in chosen]


def describe_partial(names: Sequence[str], lora: LoraSettings, model: PreTrainedModel) -> str | None:
    """Which of the modules that were named some layers do not have, as a sentence: layers may be of several kinds, those with
    attention one of eight. None where all have them, or where layers were named too.

    Args:
        names: In full, that are adapted.
        lora: By which they were found.
        model: With all its linear layers.
    """
    wanted, excluded = lora.target_modules or (ALL_LINEAR,), lora.exclude_modules or ()
    if ALL_LINEAR in wanted or any(re.search(r"(?<!\w)\d", item) for item in (*wanted, *excluded)):
        return None
    layer = re.compile(r"(.*?\.)\d+(?=\.)")
    places: dict[str, set[str]] = {}
    for name in names:
        if place := layer.match(name):
            places.setdefault(name.rpartition(".")[2], set()).add(place[0])
    stacks = {place[1] for name in names if (place := layer.match(name))}
    every = {place[0] for name in linear_names(model) if (place := layer.match(name)) and place[1] in stacks}
    partial = [f"{leaf} in {len(found)} of {len(every)}" for leaf, found in places.items() if len(found) < len(every)]
    return f"Not all layers have what --target-modules names: {', '.join(partial)}." if partial else None


def stack_names(model: PreTrainedModel) -> list[str]:
    """Full names of the stacks of experts."""
    return [f"{name}.{weight.name}" for name, module in find_experts(model) for weight in expert_weights(module)]


def _below(item: str, names: Iterable[str]) -> set[str]:
    """Names below a module that `item` is, or whose name ends in it."""
    return {name for name in names if f".{item}." in f".{name}"}


def match(item: str, names: Iterable[str], flag: str) -> set[str]:
    """Names that are `item`, end in it behind a dot, or that it matches as a whole as a regular expression.

    Raises:
        AdapterError: The expression takes too long.
    """
    found = {name for name in names if name == item or name.endswith(f".{item}")}
    if found or not set(item) & REGEX_CHARACTERS:
        return found
    try:
        pattern = regex.compile(item)
        return {name for name in names if pattern.fullmatch(name, timeout=MATCH_SECONDS)}
    except regex.error:
        return set()
    except TimeoutError as error:
        raise AdapterError(
            f"{flag} {item} takes longer than {MATCH_SECONDS:g} s to match a name.", "Write a simpler expression."
        ) from error


def short_names(names: Sequence[str], wanted: Sequence[str] | None, model: PreTrainedModel) -> list[str]:
    """The shortest way to name modules for PEFT, which takes names and suffixes: as asked for, last names, or in full.

    In full beside towers, which are left out here: they have modules of these names too, whoever loads the adapter.
    """
    if tower_names(model):
        return sorted(names)
    every = [name for name, _ in model.named_modules()]
    leaves = sorted({name.rsplit(".", 1)[-1] for name in names})
    for candidate in [list(wanted or ()), leaves]:
        endings = tuple(f".{item}" for item in candidate)
        if candidate and {n for n in every if n in candidate or n.endswith(endings)} == set(names):
            return candidate
    return sorted(names)


def read_patterns(items: Sequence[str] | None, names: Iterable[str], flag: str) -> Mapping[str, str]:
    """Values by module of settings such as `q_proj=8`, whose names are names, suffixes or regular expressions.

    Returns:
        Full name → value as typed; of several items the first that matches a name gives its value, as in PEFT.

    Raises:
        AdapterError: An item has no value, or matches nothing, or nothing that those before it have left.
    """
    values: dict[str, str] = {}
    for number, item in enumerate(items or ()):
        key, equals, value = item.rpartition("=")
        found = match(key, names, flag) if equals else set()
        if not found:
            adapted = sorted({name.rpartition(".")[2] for name in names})
            raise AdapterError(
                f"{flag} {item} matches no adapted module." if equals else f"{flag} {item} has no value.",
                f"Write a name and a value, as {flag} {adapted[0]}=8. The adapted modules are: {', '.join(adapted)}.",
            )
        if found <= values.keys():
            others = [each for each in items or () if each != item]
            raise AdapterError(
                f"{flag} {item} does nothing: {', '.join((items or ())[:number])} gives these modules their values before.",
                f"Leave it out, or put it first: {flag} {','.join([item, *others])}",
            )
        values |= {name: value for name in found if name not in values}
    return values
