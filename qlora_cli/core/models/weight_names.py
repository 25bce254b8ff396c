"""Names of weights: in a checkpoint, and in the model that transformers loads it into."""

from collections.abc import Callable, Iterable

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from qlora_cli.errors import ModelError


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
    rename, state = renamer(model), model.state_dict()
    found: dict[str, str] = {}
    for name in names:
        new, converted = rename(name)
        if converted or new not in state:
            continue
        if new in found:
            raise ModelError(
                f"The checkpoint holds {new} twice, as {found[new]} and as {name}.",
                "Remove one of them, or download the model again.",
            )
        found[new] = name
    return found
