"""Weight deltas: what an adapter changes in each parameter of its base, read from PEFT's names and settings."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qlora_cli.core.adapters.adapter_facts import PREFIX, AdapterFacts, way_to_a_place
from qlora_cli.core.adapters.expert_tensors import ExpertPair, expert_pairs
from qlora_cli.errors import AdapterError

PART = re.compile(
    r"(?P<module>.+)\.(?:(?P<a>lora_A\.weight|lora_embedding_A)|(?P<b>lora_B\.weight|lora_embedding_B)"
    r"|(?P<magnitude>lora_magnitude_vector(?:\.weight)?)|(?P<bias>lora_B\.bias)"
    r"|(?P<rows>token_adapter\.trainable_tokens_delta))"
)
WRAPPERS = re.compile(r"\.(base_layer|modules_to_save)(?=\.)")
# Settings under which the saved tensors are not a plain scaling * B @ A on the base: leaving one out would merge
# something else than was trained.
NOT_MERGEABLE = (
    "kasa_config",
    "layer_replication",
    "monteclora_config",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)


@dataclass(frozen=True)
class WeightDelta:
    """What an adapter does to one weight or bias; the fields name tensors of the adapter.

    A weight W (out, in) becomes, in this order: `replacement`; W + scaling * B @ A; for DoRA, its rows scaled to
    `magnitude` (https://arxiv.org/abs/2402.09353, equation 5). A bias b becomes `replacement`; b + scaling * added.
    """

    scaling: float = 1.0
    replacement: str | None = None
    a: str | None = None  # (r, in); of an embedding (r, vocabulary)
    b: str | None = None  # (out, r); of an embedding (hidden, r)
    magnitude: str | None = None  # (out,); of an embedding (hidden,)
    added: str | None = None  # (out,)
    rows: str | None = None  # (tokens, hidden): take the place of these rows
    token_indices: tuple[int, ...] = ()
    embedding: bool = False
    experts: ExpertPair | None = None  # of a stack of experts, and then nothing else


def read_deltas(
    facts: AdapterFacts, model: PreTrainedModel, rename: Callable[[str], tuple[str, bool]]
) -> dict[str, WeightDelta]:
    """What an adapter changes, by the parameter's name in the model.

    Args:
        facts: Of the adapter.
        model: The base's architecture, as `build_empty` makes it.
        rename: As `weight_names.renamer`: adapters made before a module was renamed carry its older name.

    Raises:
        AdapterError: A tensor belongs to no module, has another shape than its module, or the adapter is of a kind
            that is more than scaling * B @ A.
    """
    _refuse_other_kinds(facts.config)
    experts = expert_pairs(facts, model)
    state = model.state_dict()
    deltas = {parameter: WeightDelta(experts=pair) for parameter, pair in experts.items()}
    of_experts = {name for pair in experts.values() for name in (pair.a, pair.b)}
    unknown = []
    for name in facts.tensors:
        if ".original_module." in name or name in of_experts:  # the former was, its copy takes its place
            continue
        match = PART.fullmatch(name.removeprefix(PREFIX))
        kind = match.lastgroup if match else None
        if match is None or kind is None:
            parameter = WRAPPERS.sub("", name.removeprefix(PREFIX))
            update: dict[str, Any] = {"replacement": name}
        elif kind == "bias":
            parameter, update = f"{match['module']}.bias", {"added": name}
        else:
            parameter, update = f"{match['module']}.weight", {kind: name}
        if parameter not in state:
            parameter = rename(parameter)[0]
        if parameter not in state:
            unknown.append(name)
            continue
        module = parameter.rpartition(".")[0]
        if kind in ("a", "b", "bias"):
            update["scaling"] = _scaling(facts, module, name)
        if kind == "rows":
            update["token_indices"] = _token_indices(facts.config, module)
        embedding = isinstance(model.get_submodule(module), nn.Embedding)
        deltas[parameter] = replace(deltas.get(parameter, WeightDelta(embedding=embedding)), **update)
    if unknown:
        raise AdapterError(
            f"{len(unknown)} of the adapter's tensors belong to no module of this {model.config.model_type} base, "
            f"first {unknown[0]}.",
            way_to_a_place(unknown[0]),
        )
    _check_shapes(facts, model, deltas)
    return deltas


def biased_module(name: str) -> str | None:
    """The module to whose output a tensor of an adapter adds a bias; None for any other tensor."""
    match = PART.fullmatch(name.removeprefix(PREFIX))
    return match["module"] if match and match.lastgroup == "bias" else None


def _refuse_other_kinds(config: Mapping[str, Any]) -> None:
    found = [name for name in NOT_MERGEABLE if config.get(name)]
    if found:
        raise AdapterError(
            f"The adapter was made with {', '.join(found)}, which a merge into its base cannot express.",
            "Use the adapter unmerged, or train a plain LoRA or DoRA adapter.",
        )


def _scaling(facts: AdapterFacts, module: str, name: str) -> float:
    """The factor on B @ A of the pair a tensor belongs to; rank_pattern and alpha_pattern give modules their own."""
    pair = re.sub(r"lora_(embedding_)?[AB](\.\w+)?$", lambda m: f"lora_{m[1] or ''}A{'' if m[1] else '.weight'}", name)
    rank = facts.tensors[pair][0][0] if pair in facts.tensors else facts.rank
    return facts.scaling_of(module, rank)


def _token_indices(config: Mapping[str, Any], module: str) -> tuple[int, ...]:
    indices = config.get("trainable_token_indices") or ()
    if isinstance(indices, Mapping):
        indices = next((value for key, value in indices.items() if module.endswith(key)), ())
    return tuple(indices)


def _check_shapes(facts: AdapterFacts, model: PreTrainedModel, deltas: Mapping[str, WeightDelta]) -> None:
    """Collects every tensor of a wrong shape, then raises once."""
    state = model.state_dict()
    wrong: list[tuple[str | None, object, tuple[int, ...]]] = []
    for parameter, delta in deltas.items():
        if delta.experts is not None:  # looked at as it was read
            continue
        shape = tuple(state[parameter].shape)
        module = model.get_submodule(parameter.rpartition(".")[0])
        vocabulary = module in (model.get_input_embeddings(), model.get_output_embeddings())
        if delta.replacement:
            found = facts.tensors[delta.replacement][0]
            if found[1:] != shape[1:] or (found[0] != shape[0] and not vocabulary):  # a vocabulary may have grown
                wrong.append((delta.replacement, found, shape))
            shape = found
        if (delta.a is None) != (delta.b is None) or (delta.magnitude and not delta.a):
            wrong.append((delta.a or delta.b or delta.magnitude, "half of a pair", shape))
            continue
        expected: list[tuple[str | None, tuple[int, ...]]] = []
        if delta.a and delta.b:
            if delta.embedding or isinstance(module, Conv1D):
                shape = shape[::-1]  # (out, in), as the adapter sees it
            rank = facts.tensors[delta.a][0][0]
            expected = [(delta.a, (rank, shape[1])), (delta.b, (shape[0], rank)), (delta.magnitude, shape[:1])]
        expected += [(delta.added, shape), (delta.rows, (len(delta.token_indices), *shape[1:]))]
        wrong += [
            (name, facts.tensors[name][0], want) for name, want in expected if name and facts.tensors[name][0] != want
        ]
    if wrong:
        first, size, needed = wrong[0]
        raise AdapterError(
            f"The adapter does not fit this base: {first} is {size} where {needed} is needed, and {len(wrong) - 1} more.",
            "Give the base it was trained on with --model.",
        )
