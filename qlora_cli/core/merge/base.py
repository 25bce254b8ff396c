"""Base of a merge: found by its recorded or given name, and checked to be the one the adapter was trained on."""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, revert_weight_conversion

from qlora_cli.core.adapters.adapter_facts import AdapterFacts
from qlora_cli.core.adapters.adapter_record import AdapterRecord
from qlora_cli.core.adapters.merged_experts import find_stacks
from qlora_cli.core.adapters.targets import find_targets, stack_names
from qlora_cli.core.device import DTYPES, dtype_name
from qlora_cli.core.merge.delta import biased_module
from qlora_cli.core.models.account import VALUES, FourBitPlan, plan_packing
from qlora_cli.core.models.files import ModelFiles, resolve_model
from qlora_cli.core.models.identity import BaseIdentity, config_digest
from qlora_cli.core.models.structure import build_empty, config_with_biases
from qlora_cli.core.models.weight_names import WeightOrigin, find_origins
from qlora_cli.core.rope_scaling import require_scaled
from qlora_cli.core.storage.safetensors_file import DTYPES as STORED
from qlora_cli.core.storage.safetensors_file import TensorFile
from qlora_cli.core.weights.checkpoint import Checkpoint
from qlora_cli.core.weights.stored_formats import StoredFormat, stored_format
from qlora_cli.errors import AdapterError, MergeError, ModelError, QloraError
from qlora_cli.events import Caution, Notice, Report
from qlora_cli.settings.groups import LoraSettings, ModelSettings, QuantizationSettings

# What is left of a merge that cannot put its weights back.
UNMERGED = "use the adapter unmerged, or merge with --base original where it leaves those weights alone"


@dataclass(frozen=True)
class Base:
    """The base of a merge."""

    files: ModelFiles
    model: PreTrainedModel  # on the meta device
    identity: BaseIdentity  # with how it was quantised in training
    stored_dtype: torch.dtype  # of most of its weights
    stored: StoredFormat | None = None  # how it is stored, if not plain
    # Biases that it lacks and the merged model has, by name in the model, and the settings that the latter needs.
    new_biases: frozenset[str] = frozenset()
    new_settings: Mapping[str, bool] = field(default_factory=dict)
    trained: ModelFiles | None = None  # the quantised copy of it that the adapter was trained on, if it was on one

    @property
    def vocabulary(self) -> int:
        """Tokens that have an input embedding."""
        embeddings: Any = self.model.get_input_embeddings()
        return embeddings.weight.shape[0]

    @property
    def skipped(self) -> tuple[str, ...]:
        """Names or patterns of modules that the base, or the copy that was trained on, leaves in 16 bits by itself."""
        return self._stored_in_training.skipped if self._stored_in_training else ()

    @property
    def rounds_otherwise(self) -> bool:
        """Whether the values of its 4 bits are others than those trained against, which FP8 or MXFP4 had rounded."""
        stored = self._stored_in_training
        return self.trained is not None and stored is not None and not stored.is_four_bit

    @property
    def _stored_in_training(self) -> StoredFormat | None:
        return self.stored if self.trained is None else stored_format(self.trained.config, self.trained.name)

    @property
    def packed(self) -> frozenset[str]:
        """Names of its parameters that are in 4 bits where it is quantised."""
        return self._packing.packed

    @property
    def shared(self) -> dict[str, str]:
        """See `FourBitPlan.shared`."""
        return self._packing.shared

    @property
    def _packing(self) -> FourBitPlan:
        return plan_packing(self.model, self.skipped)


def main_dtype(files: Sequence[TensorFile]) -> torch.dtype:
    """The floating dtype most of a checkpoint's bytes are in.

    Raises:
        ModelError: It is none that values are stored in as they are.
    """
    counts: Counter[str] = Counter()
    for file in files:
        for entry in file.entries.values():
            counts[entry.dtype_name] += entry.total_bytes
    stored = counts.most_common(1)[0][0]
    if stored not in VALUES:
        name = dtype_name(STORED[stored]) if stored in STORED else stored
        raise ModelError(
            f"The base checkpoint's weights are stored as {name}: it is quantised already.",
            "Give the 16-bit model that it was made from with --model.",
        )
    return STORED[stored]


def find_base(source: AdapterRecord, settings: ModelSettings, report: Report) -> Base:
    """The base's files and architecture: of the model named in the settings, else of the recorded one, as is reported.

    Raises:
        ModelError: It cannot be found, or is stored in a format that is not read.
        AdapterError: It is not the one the adapter was trained on.
    """
    model, revision = settings.model, settings.model_revision
    if model is None:
        model, recorded_revision = source.name_base()
        revision = revision or recorded_revision
        report(Notice(f"The base is {model}, as {source.directory} recorded it."))
    rope_scaling = settings.rope_scaling or source.rope_scaling
    files = resolve_model(
        model, revision, trust_remote_code=settings.trust_remote_code, rope_scaling=rope_scaling, report=report
    )
    format_ = stored_format(files.config, model)
    with Checkpoint(files.weights, format_) as checkpoint:
        stored = main_dtype(checkpoint.files)
    if source.base is not None:
        quantization = QuantizationSettings(quant_type=source.base.quant_type, double_quant=source.base.double_quant)
        compute_dtype = DTYPES[source.base.compute_dtype]
    else:
        quantization = QuantizationSettings(quant_type="nf4", double_quant=True)
        compute_dtype = stored if stored.itemsize == 2 else torch.bfloat16
        report(
            Caution(
                f"{source.directory} does not say how its base was held in training: nf4 with double quantisation "
                "is assumed."
            )
        )
    trained = _find_trained(files, source, settings) if format_ is None else None
    if trained is None:
        source.require_base(files)
    else:
        report(
            Caution(
                f"The adapter was trained on a quantised copy of {model}, whose weights differ from what is merged by "
                "their rounding."
            )
        )
    empty = build_empty(files.config, trust_remote_code=settings.trust_remote_code)
    if files.scaled_positions is not None:
        require_scaled(empty, files.name)
    return Base(files, empty, files.identity(quantization, compute_dtype), stored, format_, trained=trained)


def with_biases(base: Base, facts: AdapterFacts, rename: Callable[[str], tuple[str, bool]]) -> Base:
    """The base with biases that an adapter adds to linear layers without any, where its architecture can have them.

    Those that come with them, of layers to which the adapter adds none, are zeros.

    Raises:
        AdapterError: It cannot.
    """
    state = base.model.state_dict()
    added = {name: rename(f"{module}.bias")[0] for name in facts.tensors if (module := biased_module(name))}
    lacking = {parameter: name for name, parameter in added.items() if parameter not in state}
    lacking = {p: n for p, n in lacking.items() if f"{p.removesuffix('.bias')}.weight" in state}
    if not lacking:
        return base
    found = config_with_biases(base.files.config, set(lacking), trust_remote_code=base.files.trust_remote_code)
    if found is None:
        first = next(iter(lacking.values()))
        raise AdapterError(
            f"The adapter adds biases to {len(lacking)} layers that have none in any {base.files.config.model_type} "
            f"model, first {first}.",
            "Use it unmerged, with qlora generate --adapter, or train it anew without lora_bias.",
        )
    settings, model = found
    return replace(base, model=model, new_biases=frozenset(model.state_dict()) - set(state), new_settings=settings)


def _find_trained(files: ModelFiles, source: AdapterRecord, settings: ModelSettings) -> ModelFiles | None:
    """The quantised copy of a plain model that an adapter was trained on, as far as it is here to be looked at; None
    where the plain one has another configuration."""
    if settings.model is None or source.base is None:
        return None
    try:
        name, revision = source.name_base()
        trained = resolve_model(
            name,
            revision,
            trust_remote_code=settings.trust_remote_code,
            rope_scaling=files.rope_scaling,
            report=files.report,
        )
        if getattr(trained.config, "quantization_config", None) is None:
            return None
    except QloraError:
        return None
    left_out = ("quantization_config", "dtype", "torch_dtype")
    alike = config_digest(trained.directory, left_out) == config_digest(files.directory, left_out)
    return trained if alike and trained.config_sha256 == source.base.config_sha256 else None


def find_rearranged(
    weights: Collection[str],
    stacks: Mapping[str, int],
    shapes: Mapping[str, tuple[int, ...]],
    model: PreTrainedModel,
    *,
    by_rows: bool,
    way: str,
) -> dict[str, tuple[WeightOrigin, dict[str, Tensor]]]:
    """Stored tensors of which weights that a merge changes are made by rows, with what `WeightOrigin.rows` says of them.

    Args:
        weights: That are changed, by name in the model; of those that are stored as they are nothing is asked.
        stacks: Of experts that are changed, and how many each has.
        shapes: Of the stored tensors.
        model: On any device.
        by_rows: Whether changed rows can be put back.
        way: What to do where it cannot be done.

    Raises:
        MergeError: A weight is stored so that what is changed of it cannot be put back.
    """
    if not weights and not stacks:
        return {}
    origins = find_origins(shapes, model)
    weights = set(weights) - {name for name, origin in origins.of.items() if origin.converter is None}
    found: dict[str, tuple[WeightOrigin, dict[str, Tensor]]] = {}
    for origin in origins.of.values() if by_rows and weights else ():
        if not set(origin.targets).intersection(weights) or (rows := origin.rows(shapes, model)) is None:
            continue
        found |= dict.fromkeys(origin.names, (origin, rows))
    made = origins.made
    lost = sorted(weights - {target for _, rows in found.values() for target in rows})
    lost += sorted(name for name, experts in stacks.items() if name not in made or not made[name].by_expert(experts))
    if lost:
        raise MergeError(
            f"{len(lost)} weights that were trained against are not in the base checkpoint as they are in the model, "
            f"first {lost[0]}.",
            f"It is rearranged as it loads: {way}.",
        )
    return found


@dataclass(frozen=True)
class RefusedMerge:
    """A merge that will be refused, known before anything is trained."""

    why: str  # as it will say
    original: bool  # whether `--base original` merges the adapter all the same: it leaves alone what cannot be put back

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready entries of a record, by which `artifacts.ways_to_merge` goes."""
        return {"merging_refused": self.why, "merges_original": self.original}


def foresee_refusal(files: ModelFiles, lora: LoraSettings) -> RefusedMerge | None:
    """Asks, before anything is trained, what a merge asks that sends a model's weights through 4 bits: of its files where
    they are here, else of those that transformers would save. None where it will not be refused.

    Args:
        files: Of the model.
        lora: What an adapter is attached to.
    """
    model = build_empty(files.config, trust_remote_code=files.trust_remote_code)
    stored = stored_format(files.config, files.name)
    if not any(isinstance(step, WeightConverter) for step in get_model_conversion_mapping(model)):
        return None
    packed = plan_packing(model, stored.skipped if stored else ()).packed
    stacks = {name: weight.experts for name, weight in find_stacks(model, packed).items()}
    try:
        with Checkpoint(files.directory, stored) as checkpoint:
            shapes = {name: entry.shape for name, entry in checkpoint.entries.items()}
    except ModelError:  # they are not here
        shapes = {
            name: tuple(value.shape) for name, value in revert_weight_conversion(model, model.state_dict()).items()
        }
    four_bit = stored is not None and stored.is_four_bit

    def refuse(changed: Collection[str]) -> str | None:
        experts = {name: count for name, count in stacks.items() if name in changed}
        try:
            find_rearranged(set(changed) - set(stacks), experts, shapes, model, by_rows=not four_bit, way=UNMERGED)
        except MergeError as error:
            return f"{error.message} {error.hint}"
        return None

    why = refuse(packed)
    return RefusedMerge(why, original=refuse(_changed_weights(model, lora)) is None) if why is not None else None


def _changed_weights(model: PreTrainedModel, lora: LoraSettings) -> set[str]:
    """Names of the weights that an adapter with these settings changes."""
    whole = tuple(f".{name}." for name in lora.modules_to_save or ())
    in_full = {name for name in model.state_dict() if any(part in f".{name}" for part in whole)}
    experts = set(stack_names(model)) if lora.adapt_experts else set()
    return in_full | {f"{name}.weight" for name in find_targets(model, lora)} | experts
