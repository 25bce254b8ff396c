"""Adapters made elsewhere, fitted to a base: names and layouts of other versions become this base's own.

Other names: a wrapper of another class around the same language model (`language_model.model.layers`, `model.layers`), or
from before a module was renamed. Other layouts: a pair for each expert, as transformers 4 had them, and PEFT's pairs on
stacks of experts before 0.19, with A and B exchanged. Nothing is fitted in part.
"""

import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import qlora_cli.core.bnb  # noqa: F401 - before peft, which imports bitsandbytes with the compiler

# isort: split
from peft import LoraConfig
from peft.utils import transformers_weight_conversion as conversion
from safetensors.torch import load_file, save_file
from torch import Tensor

from qlora_cli.artifacts import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from qlora_cli.core.adapters.adapter_facts import AdapterFacts, read_adapter
from qlora_cli.core.adapters.expert_tensors import PAIR, PREFIX, adapter_sizes, stacked_pairs, stacks_of
from qlora_cli.core.experts.layout import ExpertWeight
from qlora_cli.core.models.structure import find_decoder, head_names, underlying_model
from qlora_cli.errors import AdapterError, first_line

# What stands before `layers` in the names of a language model, alone or in a wrapper.
WRAPPER_NAMES = {"model", "language_model", "text_model"}
ADAPTER_PART = re.compile(r"\.(lora_|token_adapter\.|(modules_to_save|original_module|base_layer)\.weight).*$")
BASE_LAYER = re.compile(r"\.base_layer(?=\.|$)")
# Initialisations that subtract the initial adapter from the base weights: the saved adapter needs that other base.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
STACKS_SWAPPED = (0, 19)  # since this version of PEFT, A of (experts, out, in) is of in


@contextmanager
def fitted_adapter(directory: Path, model: Any) -> Iterator[Path]:
    """A directory that holds the adapter with this base's names and today's layouts: the given one, or a temporary one.

    Args:
        directory: Of the adapter.
        model: The base, on any device, adapted or not.

    Raises:
        AdapterError: It does not fit, or needs another base than its own.
    """
    facts = read_adapter(directory)
    refuse_changed_base(facts)
    base = underlying_model(model)
    if all(_has_place(name, base) for name in facts.tensors) and not _old_stacks(facts, base):
        yield directory
        return
    facts, tensors = _fit(facts, load_file(directory / ADAPTER_WEIGHTS), base)
    with tempfile.TemporaryDirectory(prefix="qlora-adapter-") as temporary:
        own = Path(temporary)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, own / ADAPTER_WEIGHTS)
        (own / ADAPTER_CONFIG).write_text(json.dumps(dict(facts.config)), encoding="utf-8")
        yield own


def refuse_changed_base(facts: AdapterFacts) -> None:
    """Raises AdapterError where an adapter was trained on a base that its initialisation had changed."""
    initial = facts.config.get("init_lora_weights")
    if isinstance(initial, str) and initial.lower().startswith(CHANGES_BASE):
        raise AdapterError(
            f"The adapter was trained on a base that {initial} had changed, and its file has only its own half of that.",
            "Convert it where it was made: model.save_pretrained(DIRECTORY, path_initial_model_for_weight_conversion="
            "INITIAL) with PEFT; or save that base, set init_lora_weights to true, and give the base with --model.",
        )


def _module_of(name: str) -> str:
    """The module that a tensor of an adapter is of."""
    stem = name.removeprefix(PREFIX)
    module = ADAPTER_PART.sub("", stem)
    return BASE_LAYER.sub("", module if module != stem else stem.rpartition(".")[0])


def _has_place(name: str, base: Any) -> bool:
    if not name.startswith(PREFIX):
        return False
    try:
        base.get_submodule(_module_of(name))
    except AttributeError:
        return False
    return True


def _fit(facts: AdapterFacts, tensors: dict[str, Tensor], base: Any) -> tuple[AdapterFacts, dict[str, Tensor]]:
    config = dict(facts.config)
    fitted = _rename(tensors, base)
    if not all(_has_place(name, base) for name in fitted):
        fitted = _rename(_as_transformers_renames(tensors, base), base)
        config |= _patterns_of_experts(facts, fitted, base)
    lost = [name for name in fitted if not _has_place(name, base)]
    if lost:
        first = lost[0] if lost[0] in tensors else next(n for n in tensors if not _has_place(n, base))
        raise AdapterError(
            f"{len(lost)} of the adapter's tensors belong to no module of this {base.config.model_type} base, first "
            f"{first}.",
            "Give the base it was trained on with --model.",
        )
    adapted = {_module_of(name) for name in fitted if ".lora_" in name}
    config["target_modules"] = sorted(name for name in adapted if not stacks_of(base.get_submodule(name)))
    config |= dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern"))
    shapes = {name: (tuple(tensor.shape), "F32") for name, tensor in fitted.items()}
    facts = replace(facts, config=config, tensors=shapes)
    for halves, weight in _old_stacks(facts, base):
        fitted |= _exchanged(fitted, halves, weight)
        config["peft_version"] = ".".join(map(str, STACKS_SWAPPED))
    return replace(facts, config=config), fitted


def _rename(tensors: Mapping[str, Tensor], base: Any) -> dict[str, Tensor]:
    """Tensors without a place under the name that the same part of the language model has in this base."""
    if all(_has_place(name, base) for name in tensors):
        return dict(tensors)
    decoder = next(name for name, module in base.named_modules() if module is find_decoder(base))
    heads = {name.rpartition(".")[2]: name for name in head_names(base)}

    def renamed(name: str) -> str:
        parts = name.removeprefix(PREFIX).split(".")
        place = next((i for i, part in enumerate(parts) if part not in WRAPPER_NAMES), 0)
        own = heads.get(parts[place])
        start = [own] if own else [decoder, parts[place]] if decoder else [parts[place]]
        return PREFIX + ".".join([*start, *parts[place + 1 :]])

    return {
        renamed(name) if name.startswith(PREFIX) and not _has_place(name, base) else name: tensor
        for name, tensor in tensors.items()
    }


def _as_transformers_renames(tensors: dict[str, Tensor], base: Any) -> dict[str, Tensor]:
    """As PEFT reads files of transformers 4: modules renamed, a pair for each expert to pairs on their stacks."""
    try:
        made = conversion.convert_peft_adapter_state_dict_for_transformers(
            model=base, peft_config=LoraConfig(), adapter_state_dict=dict(tensors)
        )
    except Exception as error:  # whatever an operation raises on tensors that it was not made for
        raise AdapterError(
            f"The adapter's tensors are not what this {base.config.model_type} base has: {first_line(error)}",
            "Give the base it was trained on with --model.",
        ) from error
    # One stack alone is wrapped once, whichever it is.
    pairs = [match for name in made if (match := PAIR.fullmatch(name.removeprefix(PREFIX)))]
    outer = {match["module"] for match in pairs if not match["depth"]}
    alone = {match["module"] for match in pairs if match["depth"]} - outer
    return {
        name.replace(".base_layer.", ".") if _module_of(name) in alone else name: tensor
        for name, tensor in made.items()
    }


def _patterns_of_experts(facts: AdapterFacts, tensors: Mapping[str, Tensor], base: Any) -> dict[str, Any]:
    """Settings with which pairs on stacks, made of pairs of single experts, have the rank that came of it and their
    scaling: a stack of gates and ups has the ranks of both."""
    depths: dict[str, dict[int, Tensor]] = {}
    for name, tensor in tensors.items():
        match = PAIR.fullmatch(name.removeprefix(PREFIX))
        if match and match["half"] == "A" and _has_place(name, base):
            module = base.get_submodule(match["module"])
            if stacks_of(module):
                depths.setdefault(match["module"], {})[match["depth"].count(".")] = tensor
    parameters: list[str] = []
    ranks, alphas = dict(facts.config.get("rank_pattern") or {}), dict(facts.config.get("alpha_pattern") or {})
    for module, stacks in depths.items():
        weights = stacks_of(base.get_submodule(module))
        if len(stacks) == 1:  # whose is told by A's width
            weights = [weight for weight in weights if adapter_sizes(weight)[0] == stacks[0].shape[1]][:1]
        for depth, weight in zip(sorted(stacks, reverse=True), weights, strict=True):
            rank = stacks[depth].shape[0] // weight.experts
            key = f"^{re.escape(f'{module}.{weight.name}')}"
            parameters.append(f"{module}.{weight.name}")
            ranks[key], alphas[key] = rank, facts.scaling * (rank**0.5 if facts.rslora else rank)
    if not parameters:
        return {}
    listed = sorted({*(facts.config.get("target_parameters") or ()), *parameters})
    return {"target_parameters": listed, "rank_pattern": ranks, "alpha_pattern": alphas}


def _old_stacks(facts: AdapterFacts, base: Any) -> list[tuple[dict[str, str], ExpertWeight]]:
    """Pairs on stacks of experts in the layout that PEFT had before 0.19: the names of A and B, and the stack."""
    if not facts.config.get("target_parameters"):
        return []
    version = re.match(r"(\d+)\.(\d+)", str(facts.config.get("peft_version") or "0.0"))
    before = version is None or (int(version[1]), int(version[2])) < STACKS_SWAPPED
    found = []
    for _, halves, weight in stacked_pairs(facts, base):
        if weight.transposed and not weight.adapter_swapped:
            continue  # was always so
        inner, outer = adapter_sizes(weight)
        widths = facts.tensors[halves["A"]][0][1], facts.tensors[halves["B"]][0][0]
        if widths == (outer, inner) and (before or inner != outer):
            found.append((halves, weight))
    return found


def _exchanged(tensors: Mapping[str, Tensor], halves: Mapping[str, str], weight: ExpertWeight) -> dict[str, Tensor]:
    """A pair with A for B: what B A adds to each expert is its transpose, A^T B^T."""
    a, b = tensors[halves["A"]], tensors[halves["B"]]
    rank = a.shape[0] // weight.experts
    first = b.view(b.shape[0], rank, weight.experts).permute(2, 1, 0).reshape(rank * weight.experts, -1)
    second = a.view(weight.experts, rank, -1).permute(2, 1, 0).reshape(a.shape[1], -1)
    return {halves["A"]: first.contiguous(), halves["B"]: second.contiguous()}
