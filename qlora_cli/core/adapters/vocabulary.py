"""Embeddings and head that lie beside an adapter: PEFT saves those of a vocabulary that grew, and those it wraps."""

import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from qlora_cli.artifacts import ADAPTER_WEIGHTS
from qlora_cli.core.adapters.adapter_facts import PREFIX, AdapterFacts
from qlora_cli.core.models.structure import underlying_model
from qlora_cli.errors import AdapterError

WRAPPER = re.compile(r"\.(base_layer|original_module|modules_to_save)(?=\.|$)")
OWN = "_replaced_by_an_adapter"  # attribute of a base whose embeddings or head are no longer its own


def ends_of(model: Any) -> list[Any]:
    """Input embeddings and head of a model, as far as it has them."""
    return [part for part in (model.get_input_embeddings(), model.get_output_embeddings()) if part is not None]


def replaced_weights(facts: AdapterFacts, base: Any) -> dict[str, str]:
    """Tensors of an adapter that are embeddings or the head whole, with the parameter of the base that each is."""
    ends = set(map(id, ends_of(base)))
    names = {WRAPPER.sub("", name) for name, module in base.named_modules() if id(module) in ends}
    found = {}
    for name in facts.tensors:
        parameter = WRAPPER.sub("", name.removeprefix(PREFIX))
        if parameter.endswith(".weight") and parameter.removesuffix(".weight") in names:
            found[name] = parameter
    return found


def has_replaced_vocabulary(base: Any) -> bool:
    """Whether an adapter put its own embeddings or head in place of the base's."""
    return getattr(base, OWN, False)


def take_vocabulary(model: Any, directory: Path, facts: AdapterFacts, replaced: dict[str, str]) -> None:
    """Makes a base's vocabulary as large as an adapter's, whose embeddings and head are then loaded with it.

    Args:
        model: The base, or the model with adapters.
        directory: Of the adapter.
        facts: Of it.
        replaced: Of `replaced_weights`.

    Raises:
        AdapterError: The model has adapters on other embeddings than this one's.
    """
    base = underlying_model(model)
    sizes = {facts.tensors[name][0][0] for name in replaced}
    if len(sizes) > 1:
        raise AdapterError(
            f"The adapter in {directory} brings a vocabulary of {min(sizes)} and one of {max(sizes)} tokens.",
            "Save it with both embeddings and head: save_embedding_layers=True.",
        )
    embeddings, head = base.get_input_embeddings(), base.get_output_embeddings()
    rows = embeddings.weight.shape[0]
    tied = head is None or head.weight is embeddings.weight
    if sizes not in (set(), {rows}) and not tied and len(set(replaced.values())) < 2:
        raise AdapterError(
            f"The adapter in {directory} brings {sizes.pop()} rows of embeddings or of the head, and the base has {rows} "
            "of the other.",
            "Save it with both: save_embedding_layers=True.",
        )
    saved_whole = set(facts.modules_to_save)
    own = {n: p for n, p in replaced.items() if p.removesuffix(".weight").rpartition(".")[2] not in saved_whole}
    changes = sizes not in (set(), {rows}) or not _are_equal(directory, own, base)
    if model is not base and (changes or (getattr(base, OWN, False) and not own)):
        raise AdapterError(
            f"The adapter in {directory} and one that is loaded already have different embeddings.",
            "Use each of them alone.",
        )
    setattr(base, OWN, getattr(base, OWN, False) or changes)
    if sizes not in (set(), {rows}):
        base.resize_token_embeddings(sizes.pop(), mean_resizing=False)
        base.requires_grad_(False)


def _are_equal(directory: Path, replaced: dict[str, str], base: Any) -> bool:
    """Whether tensors of an adapter are what the base has under these names, in its dtype."""
    state = {WRAPPER.sub("", name): value for name, value in base.named_parameters(remove_duplicate=False)}
    with safe_open(directory / ADAPTER_WEIGHTS, framework="pt") as reader:
        for name, parameter in replaced.items():
            held = state[parameter]
            if held.device.type == "meta" or tuple(held.shape) != tuple(reader.get_slice(name).get_shape()):
                return False
            if not torch.equal(reader.get_tensor(name).to(held.device, held.dtype), held.data):
                return False
    return True
