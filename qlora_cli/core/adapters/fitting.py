"""Adapters made elsewhere, fitted to a base: names and layouts of other versions become this base's own.

Other names: a wrapper of another class around the same language model (`language_model.model.layers`, `model.layers`), or
from before a module was renamed. Other layouts: a pair for each expert, as transformers 4 had them, and PEFT's pairs on
stacks of experts before 0.19, with A and B exchanged. Adapters of PiSSA and OLoRA, whose start was taken out of the base,
become plain ones of the base as it is. Nothing is fitted in part.
"""

import json
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import qlora_cli.core.bnb_before_peft  # noqa: F401 - with the compiler otherwise

# isort: split
import torch
from peft import LoraConfig
from peft.utils import transformers_weight_conversion as conversion
from safetensors.torch import load_file, save_file
from torch import Tensor

from qlora_cli.artifacts import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from qlora_cli.core.adapters.adapter_facts import PREFIX, AdapterFacts, read_adapter, way_on, way_to_a_place
from qlora_cli.core.adapters.expert_tensors import PAIR, adapter_sizes, stacked_pairs, stacks_of
from qlora_cli.core.adapters.original_weights import OriginalWeights
from qlora_cli.core.experts.layout import ExpertWeight
from qlora_cli.core.models.files import ModelFiles, resolve_model
from qlora_cli.core.models.raw_weights import read_raw
from qlora_cli.core.models.structure import find_decoder, head_names, tower_names, underlying_model
from qlora_cli.core.storage.safetensors_file import TensorFile
from qlora_cli.core.storage.safetensors_header import TensorEntry
from qlora_cli.core.weights.stored_formats import stored_format
from qlora_cli.errors import AdapterError, first_line

# What stands before `layers` in the names of a language model, alone or in a wrapper.
WRAPPER_NAMES = {"model", "language_model", "text_model"}
ADAPTER_PART = re.compile(r"\.(lora_|token_adapter\.|(modules_to_save|original_module|base_layer)\.weight).*$")
SINGLE_EXPERT = re.compile(r"\.experts\.\d+\.")
BASE_LAYER = re.compile(r"\.base_layer(?=\.|$)")
# Initialisations that subtract the initial adapter from the base weights: the saved adapter needs that other base.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
FOLLOWS_FROM_BASE = ("pissa", "olora")  # those of which the weights alone say what was subtracted
CHECKED_ELEMENTS = 2**22  # for NaN, at a time
STACKS_SWAPPED = (0, 19)  # since this version of PEFT, A of (experts, out, in) is of in


@contextmanager
def fitted_adapter(directory: Path, model: Any, files: ModelFiles | None = None) -> Iterator[Path]:
    """A directory that holds the adapter with this base's names and today's layouts: the given one, or a temporary one.

    Args:
        directory: Of the adapter.
        model: The base, on any device, adapted or not.
        files: Of the base; None where the model knows where it came from.

    Raises:
        AdapterError: It does not fit, needs another base than its own, or holds NaN or infinity.
    """
    facts = read_adapter(directory)
    _check_finite(directory)
    start = refuse_changed_base(facts)
    base = underlying_model(model)
    _refuse_unread(facts, base)
    fits = all(_has_place(name, base) for name in facts.tensors) and not _old_stacks(facts, base)
    if fits and start is None:
        yield directory
        return
    tensors = load_file(directory / ADAPTER_WEIGHTS)
    if not fits:
        facts, tensors = _fit(facts, tensors, base)
        _refuse_unread(facts, base)
    if start is not None:
        facts, tensors = _on_own_base(facts, tensors, start, files or _files_of(base), base.device)
    with tempfile.TemporaryDirectory(prefix="qlora-adapter-") as temporary:
        own = Path(temporary)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, own / ADAPTER_WEIGHTS)
        (own / ADAPTER_CONFIG).write_text(json.dumps(dict(facts.config)), encoding="utf-8")
        yield own


def _check_finite(directory: Path) -> None:
    with TensorFile(directory / ADAPTER_WEIGHTS) as adapter:
        bad = [entry.name for entry in adapter.entries.values() if not _is_finite(adapter, entry)]
        if bad:
            raise AdapterError(
                f"{len(bad)} of {len(adapter.entries)} tensors in {adapter.path} hold NaN or infinity, first {bad[0]}.",
                way_on(directory),
            )


def _is_finite(adapter: TensorFile, entry: TensorEntry) -> bool:
    if len(entry.shape) != 2:
        return bool(torch.isfinite(adapter.read(entry.name)).all())
    rows, columns = entry.shape  # embeddings trained in full are larger than memory should hold at once
    step = max(1, CHECKED_ELEMENTS // max(1, columns))
    starts = range(0, rows, step)
    return all(bool(torch.isfinite(adapter.read(entry.name, slice(s, min(s + step, rows)))).all()) for s in starts)


def refuse_changed_base(facts: AdapterFacts) -> str | None:
    """The start of an adapter that was trained on a base that it had changed, in a way that the base's weights tell.

    Returns:
        pissa or olora; None where the base stayed as it is.

    Raises:
        AdapterError: It changed the base in another way.
    """
    initial = facts.config.get("init_lora_weights")
    start = initial.lower() if isinstance(initial, str) else ""
    if not start.startswith(CHANGES_BASE):
        return None
    others = [name for name in facts.tensors if ".lora_embedding_" in name]
    if start in FOLLOWS_FROM_BASE and not others and not facts.config.get("target_parameters"):
        return start
    own_base = (
        "save the base as it was trained, set init_lora_weights to true in adapter_config.json, and give that "
        "base with --model."
    )
    convert = "Convert it where it was made: model.save_pretrained(DIRECTORY, path_initial_model_for_weight_conversion="
    raise AdapterError(
        f"The adapter was trained on a base that {initial} had changed, and its file has only its own half of that.",
        f"Where it was made, {own_base}" if start == "loftq" else f"{convert}INITIAL) with PEFT; or {own_base}",
    )


def _refuse_unread(facts: AdapterFacts, base: Any) -> None:
    """Raises AdapterError where an adapter has a pair on a layer whose weight is read without calling it: unmerged the
    pair does nothing, and merged it would."""
    raw = read_raw(base)
    found = [name for name in facts.tensors if ".lora_A." in name and _module_of(name) in raw]
    if found:
        raise AdapterError(
            f"The adapter has a pair on {len(found)} layers whose weight this model reads without calling them, first "
            f"{_module_of(found[0])}: unmerged they do nothing.",
            f"Train without {_module_of(found[0]).rpartition('.')[2]}.",
        )


def _files_of(base: Any) -> ModelFiles:
    own_code = type(base).__module__.startswith("transformers_modules")
    return resolve_model(base.name_or_path, trust_remote_code=own_code)


def _on_own_base(
    facts: AdapterFacts, tensors: dict[str, Tensor], start: str, files: ModelFiles, device: torch.device
) -> tuple[AdapterFacts, dict[str, Tensor]]:
    """An adapter of W - s B0 A0 as one of W: [A; A0] and [B, -B0], of twice the rank and the same scaling s.

    B0 A0 follows from W: for PiSSA (https://arxiv.org/abs/2404.02948) its `rank` largest singular values, for OLoRA
    (https://arxiv.org/abs/2406.01775) the first `rank` columns of its QR decomposition.

    Raises:
        AdapterError: The base's weights are quantised, or not there as the model has them.
    """
    if stored_format(files.config, files.name) is not None:
        raise AdapterError(
            f"The adapter's start was made of the weights of a 16-bit base ({start}), and {files.name} is quantised.",
            "Give the 16-bit model that it was made from with --model.",
        )
    made = dict(tensors)
    with OriginalWeights(files) as originals:
        for name, a in tensors.items():
            if not name.endswith(".lora_A.weight"):
                continue
            module, other = _module_of(name), name.replace(".lora_A.", ".lora_B.")
            if module not in originals or other not in tensors:
                raise AdapterError(
                    f"The adapter was trained on a base that {start} had changed, which cannot be undone for {module}.",
                    "Use it with PEFT on the 16-bit base.",
                )
            weight = originals.read(module, torch.float32, torch.device("cpu") if device.type == "meta" else device)
            rank = a.shape[0]
            first, second = _start_of(weight, start, rank, facts.scaling_of(module, rank))
            made[name] = torch.cat([a.float(), first.cpu()])
            made[other] = torch.cat([tensors[other].float(), -second.cpu()], dim=1)
    config = dict(facts.config) | {"init_lora_weights": True, "r": 2 * facts.rank}
    ranks = facts.config.get("rank_pattern") or {}
    config["rank_pattern"] = {key: 2 * rank for key, rank in ranks.items()}
    grown = 2**0.5 if facts.rslora else 2
    config["lora_alpha"] = grown * facts.alpha
    config["alpha_pattern"] = {key: grown * a for key, a in (facts.config.get("alpha_pattern") or {}).items()}
    return replace(facts, config=config), made


def _start_of(weight: Tensor, start: str, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """A0 (rank, in) and B0 (out, rank) of a weight (out, in), as PEFT makes them; float32."""
    if start == "olora":
        q, r = torch.linalg.qr(weight)
        return r[:rank], q[:, :rank]
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    root = (s[:rank] / scaling).sqrt()
    return root[:, None] * v[:rank], u[:, :rank] * root


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
    fitted = _rename(tensors, base)
    by_experts = not all(_has_place(name, base) for name in fitted)
    if by_experts:
        fitted = _rename(_as_transformers_renames(_at_one_scaling(facts, tensors), base), base)
    config = dict(facts.config) | _by_new_names(facts, tensors, fitted)
    if by_experts:
        config |= _patterns_of_experts(replace(facts, config=config), fitted, base)
    lost = [name for name in fitted if not _has_place(name, base)]
    if lost:
        raise _without_place(
            lost, next(n for n in (lost[0], *tensors) if n in tensors and not _has_place(n, base)), base
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


def _by_new_names(
    facts: AdapterFacts, tensors: Mapping[str, Tensor], fitted: Mapping[str, Tensor]
) -> dict[str, dict[str, Any]]:
    """Settings given by module, whose names are those of the adapter, also under the names that the modules have in this
    base: else they would have another rank or scaling without a word.

    Args:
        facts: Of the adapter.
        tensors: By the names in its file.
        fitted: The same by the names in this base. What was made of several is none of them.
    """
    names = {tensor.data_ptr(): name for name, tensor in tensors.items()}
    before = {_module_of(n): _module_of(names[t.data_ptr()]) for n, t in fitted.items() if t.data_ptr() in names}
    moved = {new: old for new, old in before.items() if new != old}
    made: dict[str, dict[str, Any]] = {}
    for field in ("rank_pattern", "alpha_pattern", "trainable_token_indices"):
        given = facts.config.get(field)
        if not isinstance(given, Mapping):
            continue
        tokens = field == "trainable_token_indices"  # by the end of a name; the others by an expression, as PEFT has it
        own = {}
        for new, old in moved.items():
            keys = (key for key in given if (old.endswith(key) if tokens else re.match(rf"(.*\.)?({key})$", old)))
            if (key := next(keys, None)) is not None:
                own[new if tokens else f"^{re.escape(new)}"] = given[key]
        made[field] = own if tokens and own else own | dict(given)  # the first that fits counts
    return made


def _without_place(lost: Sequence[str], first: str, base: Any) -> AdapterError:
    towers = {name.rpartition(".")[2] for name in tower_names(base)}
    theirs = [name for name in lost if towers & {*name.split(".")}]
    if theirs:
        found = sorted(towers & {part for name in theirs for part in name.split(".")})
        return AdapterError(
            f"{len(theirs)} of the adapter's tensors change {', '.join(found)} of this {base.config.model_type} model, "
            f"which reads no text and is left out here, first {first}.",
            "Train the adapter on the language model alone (PEFT's target_modules or exclude_modules), or merge this one "
            "by PEFT's merge_and_unload.",
        )
    return AdapterError(
        f"{len(lost)} of the adapter's tensors belong to no module of this {base.config.model_type} base, first {first}.",
        way_to_a_place(first),
    )


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


def _at_one_scaling(facts: AdapterFacts, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors with B of each single expert that has its own alpha or rank made up for it: a stack has one scaling."""
    made = dict(tensors)
    for name, b in tensors.items():
        if name.endswith(".lora_B.weight") and SINGLE_EXPERT.search(name):
            own = facts.scaling_of(_module_of(name), b.shape[1])
            if own != facts.scaling:
                made[name] = b.float() * (own / facts.scaling)
    return made


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
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
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
    given = facts.config  # behind these, as the first that fits counts
    return {
        "target_parameters": listed,
        "rank_pattern": ranks | (given.get("rank_pattern") or {}),
        "alpha_pattern": alphas | (given.get("alpha_pattern") or {}),
    }


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
