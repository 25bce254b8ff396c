"""Account of a base: what becomes of each of a model's parameters, and of each tensor of its checkpoint.

`plan_packing` needs the model on the meta device alone; `account_for` also the names in the checkpoint.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qlora_cli.core.experts.layout import ExpertWeight, expert_weights
from qlora_cli.core.experts.stack import can_pack
from qlora_cli.core.models.raw_weights import read_raw
from qlora_cli.core.models.structure import build_empty, embedding_names, head_names, is_plain_linear
from qlora_cli.core.models.weight_names import WeightOrigins, find_origins, map_names
from qlora_cli.core.storage.safetensors_file import are_equal
from qlora_cli.core.storage.safetensors_header import TensorEntry
from qlora_cli.core.weights.checkpoint import Checkpoint
from qlora_cli.core.weights.stored_formats import stored_format
from qlora_cli.errors import ModelError

HEAD, EMBEDDING = "output head", "embeddings"
VALUES = ("F64", "F32", "F16", "BF16")  # dtypes of tensors that are their values
BODY_SHARE = 0.95  # of a base's body, below which what is not in 4 bits is said


@dataclass(frozen=True)
class Packing:
    """What becomes of one parameter.

    Attributes:
        name: In the model; a tied one has the name that comes first.
        elements: Weights.
        reason: Why it stays in 16 bits; None in 4 bits.
        others: Further names of one that is tied.
    """

    name: str
    elements: int
    reason: str | None
    others: tuple[str, ...] = ()

    @property
    def is_body(self) -> bool:
        """Whether it is neither of the embeddings nor of the output head."""
        return self.reason not in (HEAD, EMBEDDING)


@dataclass(frozen=True)
class FourBitPlan:
    """What becomes of every parameter of a model."""

    parameters: tuple[Packing, ...]

    @property
    def packed(self) -> frozenset[str]:
        """Names of the parameters in 4 bits."""
        return frozenset(p.name for p in self.parameters if p.reason is None)

    @property
    def shared(self) -> dict[str, str]:
        """Further names of parameters in 4 bits that several layers share, and the name of each in `packed`."""
        return {other: p.name for p in self.parameters if p.reason is None for other in p.others}

    @property
    def share(self) -> float:
        """Share of the body, which is all but embeddings and head, that is in 4 bits."""
        body = sum(p.elements for p in self.parameters if p.is_body)
        return sum(p.elements for p in self.parameters if p.reason is None) / max(1, body)

    def rest(self) -> dict[str, int]:
        """Weights of the body in 16 bits, by the reason, most first."""
        found: dict[str, int] = {}
        for parameter in self.parameters:
            if parameter.reason is not None and parameter.is_body:
                found[parameter.reason] = found.get(parameter.reason, 0) + parameter.elements
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def describe(self) -> str:
        """One line for the user: the share in 4 bits, and below 95 % of the body what is not."""
        text = f"{self.share:.0%} of the base is in 4 bits, embeddings and head apart"
        if self.share >= BODY_SHARE:
            return text + "."
        total = sum(p.elements for p in self.parameters if p.is_body)
        parts = (f"{count / total:.0%} {reason}" for reason, count in list(self.rest().items())[:3])
        return f"{text}; in 16 bits: {', '.join(parts)}."


def plan_packing(model: PreTrainedModel, skipped: Iterable[str] = ()) -> FourBitPlan:
    """Plans which parameters of a model from `build_empty` are held in 4 bits.

    Args:
        model: Without an adapter.
        skipped: Names or patterns of modules that the base, quantised already, has in 16 bits, as transformers reads
            them.
    """
    heads = set(head_names(model))
    patterns = tuple(skipped)
    single = tuple(getattr(model, "_keep_in_fp32_modules", None) or ())
    single += tuple(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    raw = read_raw(model)
    found: dict[int, list[Packing]] = {}
    for module_name, module in model.named_modules():
        stacks = {weight.name: weight for weight in expert_weights(module)}
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if module_name in heads:
                reason: str | None = HEAD
            elif isinstance(module, nn.Embedding):
                reason = EMBEDDING
            elif _matches(module_name, patterns):
                reason = "left in 16 bits by the base itself"
            elif _matches(module_name, single):
                reason = "kept in float32 by the architecture"
            elif module_name in raw:
                holder, _, leaf = module_name.rpartition(".")
                reason = f"read by {type(model.get_submodule(holder)).__name__} as they are ({leaf})"
            else:
                reason = _why_not(module, name, parameter, stacks.get(name))
            packing = Packing(f"{module_name}.{name}" if module_name else name, parameter.numel(), reason)
            found.setdefault(id(parameter), []).append(packing)
    return FourBitPlan(tuple(_one_of(packings) for packings in found.values()))


def _one_of(tied: list[Packing]) -> Packing:
    """Of one parameter under several names."""
    apart = next((packing for packing in tied if not packing.is_body), None)
    if len(tied) == 1 or apart is not None:
        return apart or tied[0]
    reason = next((packing.reason for packing in tied if packing.reason is not None), None)
    if reason is None and not all(packing.name.endswith(".weight") for packing in tied):
        reason = "shared between layers"
    return replace(tied[0], reason=reason, others=tuple(packing.name for packing in tied[1:]))


def _why_not(module: nn.Module, name: str, parameter: Any, stack: ExpertWeight | None) -> str | None:
    if stack is not None:
        return None if can_pack(stack) else f"{name} of {stack.elements} weights, which are no whole blocks"
    if name == "weight" and (is_plain_linear(module) or isinstance(module, Conv1D)):
        return None
    if isinstance(module, nn.Linear) and name == "weight":
        return f"{type(module).__name__}, a linear layer of another kind"
    if parameter.ndim > 2 or (parameter.ndim == 2 and name != "bias"):
        return f"{name} of {type(module).__name__}"
    return "norms, biases and other vectors"


def _matches(module_name: str, patterns: tuple[str, ...]) -> bool:
    """As transformers matches names of modules: a beginning, a regular expression or an ending."""
    boundary = r"(?:(?<=\.)|(?=\.|$))"
    return any(re.match(rf"(?:{p}){boundary}", module_name) or module_name.endswith(p) for p in patterns)


@dataclass(frozen=True)
class Account:
    """What becomes of every parameter of a model and every tensor of its checkpoint.

    Attributes:
        plan: Of the parameters.
        origins: Where each comes from.
        missing: Parameters and buffers that no tensor of the checkpoint gives, nor another one they are tied to.
    """

    plan: FourBitPlan
    origins: WeightOrigins
    missing: tuple[str, ...]

    @property
    def unexpected(self) -> tuple[str, ...]:
        """Tensors of the checkpoint that no part of the model takes: a merge copies them."""
        return self.origins.unexpected

    def require_whole(self, model: str) -> None:
        """Raises ModelError where the checkpoint lacks a tensor: what transformers puts there is random."""
        if self.missing:
            raise ModelError(
                f"{model} lacks {len(self.missing)} of the model's tensors, first {self.missing[0]}.",
                "Download or copy the model again; its configuration and its weights must belong together.",
            )

    def require_values(
        self, model: PreTrainedModel, entries: Mapping[str, TensorEntry], name: str, *, four_bit: bool
    ) -> None:
        """Raises ModelError where a tensor has another shape than its place, or is no floating-point numbers where its
        place is: codes of a quantisation that the configuration does not name, which would be taken for the weights.

        Args:
            model: From `build_empty`.
            entries: Of the checkpoint.
            name: Of the model, as the user gave it.
            four_bit: Whether it is stored in bitsandbytes' 4 bits, in which a Conv1D lies as (out, in).
        """
        state = model.state_dict()
        turned = {f"{place}.weight" for place, m in model.named_modules() if four_bit and isinstance(m, Conv1D)}
        for target, origin in self.origins.of.items():
            for entry in (entries[source] for source in origin.names):
                if state[target].is_floating_point() and entry.dtype_name not in VALUES:
                    raise ModelError(
                        f"{entry.name} of {name} is stored as {entry.dtype_name}, and its config.json names no "
                        "quantisation that would give its values.",
                        "Give --model the 16-bit checkpoint, or mend quantization_config.",
                    )
                shapes = [tuple(state[target].shape)] + [tuple(state[target].shape)[::-1]] * (target in turned)
                if origin.converter is None and entry.shape not in shapes:
                    raise ModelError(
                        f"{entry.name} is {entry.shape} in {name} where its config.json makes it "
                        f"{tuple(state[target].shape)}.",
                        "Download or copy the model again; its configuration and its weights must belong together.",
                    )

    def describe(self) -> str:
        """One line for the user: the share in 4 bits, and what of the checkpoint is not used."""
        text = self.plan.describe()
        if self.unexpected:
            text += f" {len(self.unexpected)} tensors of the checkpoint belong to no part of the model"
            text += f" that is trained, first {self.unexpected[0]}."
        return text


def account_for(model: PreTrainedModel, names: Iterable[str], skipped: Iterable[str] = ()) -> Account:
    """Accounts for a model from `build_empty` and the names of its checkpoint's weights.

    Raises:
        ModelError: Two tensors claim the same place, or an expert is missing.
    """
    origins = find_origins(names, model)
    given = set(origins.made)
    for target, source in dict(getattr(model, "all_tied_weights_keys", None) or {}).items():
        given |= {target, source} if target in given or source in given else set()
    same: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        same.setdefault(id(tensor), []).append(name)
    groups = (tied for tied in same.values() if not given.intersection(tied))
    optional = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_missing", None) or ()]
    missing = (tied[0] for tied in groups if not any(p.search(name) for p in optional for name in tied))
    _require_experts(model, origins)
    return Account(plan_packing(model, skipped), origins, tuple(missing))


def holds_own_head(config: PreTrainedConfig, directory: Path, *, trust_remote_code: bool = False) -> bool:
    """Whether the weights in a directory, if there are any, hold embeddings and a head that differ, where the configuration
    ties them: transformers 5 takes both as they are."""
    model = build_empty(config, trust_remote_code=trust_remote_code)
    inputs, head = embedding_names(model)
    if head is None or model.get_parameter(inputs) is not model.get_parameter(head):
        return False
    try:
        with Checkpoint(directory, stored_format(config, str(directory))) as checkpoint:
            names = map_names(checkpoint.entries, model)
            home = {name: file for file in checkpoint.files for name in file.entries}
            stored = [(home[names[each]], names[each]) for each in (inputs, head) if each in names]
            return len(stored) == 2 and not are_equal(*stored)
    except ModelError:  # they are not here
        return False


def _require_experts(model: nn.Module, origins: WeightOrigins) -> None:
    """Raises ModelError where a stack of experts is to be made of fewer tensors than it has experts."""
    for name, module in model.named_modules():
        for weight in expert_weights(module):
            origin = origins.of.get(f"{name}.{weight.name}")
            if origin is None or origin.converter is None:
                continue
            counts = {pattern: len(names) for pattern, names in origin.sources.items()}
            lists = {pattern for pattern in origin.converter.source_patterns if "*" in pattern}
            short = [p for p in lists if counts.get(p, 0) != max(counts.values()) or counts[p] < weight.experts]
            if short and lists:
                raise ModelError(
                    f"{name} has {weight.experts} experts, and the checkpoint holds {short[0].lstrip('.')} of "
                    f"{counts.get(short[0], 0)} of them.",
                    "Download or copy the model again.",
                )
