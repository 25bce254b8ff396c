"""Names of weights: in a checkpoint, and in the model that transformers loads it into."""

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from qlora_cli.errors import ModelError


class _OneExpert:
    """A model each of whose stacks of experts is one of its experts: transformers looks at shapes (Qwen3-VL's experts lie in
    two ways, and are transposed in one of them)."""

    def __init__(self, model: Any) -> None:
        self.config, self._model = model.config, model

    def get_parameter(self, name: str) -> Tensor:
        """The parameter's first expert, (1, …)."""
        return self._model.get_parameter(name)[:1]


@dataclass(frozen=True)
class WeightOrigin:
    """Where one or more of a model's tensors come from.

    Attributes:
        targets: Their names in the model.
        sources: Names in the checkpoint, by the pattern each matches, in order; one name where nothing is converted.
        converter: How transformers makes the targets of the sources; None where they are as they are stored.
    """

    targets: tuple[str, ...]
    sources: dict[str, list[str]] = field(default_factory=dict)
    converter: Any = None

    @property
    def names(self) -> list[str]:
        """Every tensor of the checkpoint that is used."""
        return [name for names in self.sources.values() for name in names]

    def by_expert(self, experts: int) -> bool:
        """Whether the slice of one expert can be made of its own tensors, or of its slice of each, alone."""
        if self.converter is None:
            return True
        operations = self.converter.operations
        stacks = isinstance(operations[0], MergeModulelist) and operations[0].dim == 0
        inside = all(
            (isinstance(step, Concatenate) and step.dim > 0)
            or (isinstance(step, Transpose) and min(step.dim0, step.dim1) > 0)
            for step in operations[stacks:]
        )
        return inside and all(len(names) == (experts if stacks else 1) for names in self.sources.values())

    def read(self, read: Callable[[str], Tensor], model: Any) -> dict[str, Tensor]:
        """The targets, made of whole tensors that `read` gives by their name in the checkpoint."""
        return self._make({pattern: [read(name) for name in names] for pattern, names in self.sources.items()}, model)

    def read_expert(self, read: Callable[[str, slice | None], Tensor], model: Any, number: int) -> Tensor:
        """One expert's slice (1, …) of the only target; `by_expert` must hold. `read` also reads rows alone."""
        tensors = [read(*request) for request in self.expert_requests(number)]
        by_pattern = {p: [tensor] for p, tensor in zip(self.sources, tensors, strict=True)}
        return self._make(by_pattern, _OneExpert(model))[self.targets[0]]

    def expert_requests(self, number: int) -> list[tuple[str, slice | None]]:
        """What `read_expert` reads, in order: names and rows."""
        if self.converter is not None and isinstance(self.converter.operations[0], MergeModulelist):
            return [(names[number], None) for names in self.sources.values()]
        return [(names[0], slice(number, number + 1)) for names in self.sources.values()]

    @property
    def patterns(self) -> list[str]:
        """Those of `sources`, in the order in which the targets are made of them."""
        if self.converter is None:
            return list(self.sources)
        return [pattern for pattern in self.converter.source_patterns if pattern in self.sources]

    def expert_parts(self) -> dict[str, tuple[int | None, int]]:
        """What each of the tensors is of a stack for which `by_expert` holds: which expert's, None for all of them, and
        which piece of its matrix, counted in the order of `patterns`."""
        stacked = self.converter is not None and isinstance(self.converter.operations[0], MergeModulelist)
        return {
            name: (number if stacked else None, piece)
            for piece, pattern in enumerate(self.patterns)
            for number, name in enumerate(self.sources[pattern])
        }

    def stored_piece(self, matrix: Tensor, piece: int, shape: tuple[int, ...]) -> Tensor:
        """One piece of an expert's matrix as it lies in the checkpoint: the inverse of `read_expert`.

        Args:
            matrix: One expert's slice of the target, without its first dimension.
            piece: Of `expert_parts`.
            shape: Of the stored tensor.
        """
        for step in reversed(self.converter.operations if self.converter is not None else ()):
            if isinstance(step, Transpose):
                if not (step.check_dims and matrix.shape == shape[-2:]):  # then it was not transposed as it was read
                    matrix = matrix.transpose(step.dim0 - 1, step.dim1 - 1)
            elif isinstance(step, Concatenate):
                matrix = matrix.chunk(len(self.patterns), dim=step.dim - 1)[piece]
        return matrix

    def rows(self, shapes: Mapping[str, tuple[int, ...]], model: Any) -> dict[str, Tensor] | None:
        """Which rows of the stored tensors each target is made of: int64, counted through all of them in the order of
        `names`. None where its rows are not stored whole, each of them once.

        Args:
            shapes: Of the stored tensors, by their names.
            model: On any device.
        """
        wanted = {name: tuple(value.shape) for name, value in model.state_dict().items() if name in self.targets}
        widths = {shapes[name][1:] for name in self.names} | {shape[1:] for shape in wanted.values()}
        if len(widths) != 1:
            return None
        one_column = (-1, *(1 for _ in widths.pop()))  # what goes by rows takes them for the whole
        tensors: dict[str, list[Tensor]] = {}
        total = 0
        for pattern, names in self.sources.items():
            for name in names:
                numbers = torch.arange(total, total + shapes[name][0])
                tensors.setdefault(pattern, []).append(numbers.view(one_column))
                total += shapes[name][0]
        try:
            made = {name: numbers for name, numbers in self._make(tensors, model).items() if name in wanted}
        except ModelError:
            return None
        rows = {name: numbers.flatten() for name, numbers in made.items()}
        fit = all(made[name].shape == (wanted[name][0], *one_column[1:]) for name in made) and set(made) == set(wanted)
        if not fit or not torch.equal(torch.cat([*rows.values()]).sort().values, torch.arange(total)):
            return None
        return rows

    def _make(self, tensors: dict[str, list[Tensor]], model: Any) -> dict[str, Tensor]:
        if self.converter is None:
            return {self.targets[0]: next(iter(tensors.values()))[0]}
        step = copy.deepcopy(self.converter)
        for pattern, values in tensors.items():
            for value in values:
                step.add_tensor(self.targets[0], self.targets[0], pattern, value)
        try:
            made = step.convert(self.targets[0], model=model, config=model.config)
        except Exception as error:  # whatever an operation of transformers raises on tensors it was not made for
            raise ModelError(
                f"{self.targets[0]} cannot be made of {len(self.names)} tensors, first {self.names[0]}: {error}",
                "Download the model again.",
            ) from error
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


@dataclass(frozen=True)
class WeightOrigins:
    """Where all of a model's tensors come from.

    Attributes:
        of: By the first target's name.
        unexpected: Tensors of the checkpoint that no part of the model takes.
    """

    of: Mapping[str, WeightOrigin]
    unexpected: tuple[str, ...]

    @property
    def made(self) -> dict[str, WeightOrigin]:
        """Each tensor of the model that the checkpoint gives, with its origin."""
        return {target: origin for origin in self.of.values() for target in origin.targets}


def find_origins(names: Iterable[str], model: PreTrainedModel) -> WeightOrigins:
    """Where a model's tensors, on any device, come from in a checkpoint of these names: as transformers loads it.

    Raises:
        ModelError: Two tensors claim the same place.
    """
    state = model.state_dict()
    mapping = get_model_conversion_mapping(model)
    renamings = [step for step in mapping if isinstance(step, WeightRenaming)]
    converters = [step for step in mapping if isinstance(step, WeightConverter)]
    by_pattern = {pattern: step for step in converters for pattern in step.source_patterns}
    origins: dict[str, WeightOrigin] = {}
    unexpected = []
    for name in sorted(names, key=dot_natural_key):
        new, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if new not in state and name in state:  # as transformers: a name that fits already is not renamed
            new, pattern = rename_source_key(name, [], [], model.base_model_prefix, state)
        if new not in state:
            unexpected.append(name)
        elif pattern is None:
            if new in origins:
                raise ModelError(
                    f"The checkpoint holds {new} twice, as {origins[new].names[0]} and as {name}.",
                    "Remove one of them, or download the model again.",
                )
            origins[new] = WeightOrigin((new,), {name: [name]})
        else:
            step = by_pattern[pattern]
            if new not in origins:
                targets = (new.replace(step.target_patterns[0], target, 1) for target in step.target_patterns)
                origins[new] = WeightOrigin(tuple(targets), {}, step)
            origins[new].sources.setdefault(pattern, []).append(name)
    return WeightOrigins(origins, tuple(unexpected))


def renamer(model: PreTrainedModel) -> Callable[[str], tuple[str, bool]]:
    """The renaming of one model's checkpoints.

    Returns:
        A function from a name in a checkpoint to the name in the model, and whether the tensor also changes on its
        way (is split, stacked, permuted), so that it is no weight of the model by itself.
    """
    state = model.state_dict()
    mapping = get_model_conversion_mapping(model)
    renamings = [step for step in mapping if isinstance(step, WeightRenaming)]
    converters = [step for step in mapping if isinstance(step, WeightConverter)]
    prefix = model.base_model_prefix

    def rename(name: str) -> tuple[str, bool]:
        new, converted = rename_source_key(name, renamings, converters, prefix, state)
        if new not in state and name in state:  # as transformers: a name that fits already is not renamed
            new, converted = rename_source_key(name, [], [], prefix, state)
        return new, converted is not None

    return rename


def map_names(names: Iterable[str], model: PreTrainedModel) -> dict[str, str]:
    """Which of a checkpoint's tensors each parameter and buffer of the model, on any device, is read from.

    Returns:
        Name in the model → name in the checkpoint. Tensors that no part of the model takes as they are (extra ones,
        those that are split or stacked) are left out.

    Raises:
        ModelError: Two tensors claim the same place.
    """
    origins = find_origins(names, model).of
    return {target: origin.names[0] for target, origin in origins.items() if origin.converter is None}
