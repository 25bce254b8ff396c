"""Tied embeddings: whether input embeddings and output head stay one tensor after a merge, and are one vocabulary."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedModel

from qlora_cli.core.merge.delta import WeightDelta
from qlora_cli.core.models.structure import embedding_names
from qlora_cli.core.storage.safetensors_file import TensorFile, are_equal
from qlora_cli.errors import AdapterError


@dataclass(frozen=True)
class Tying:
    """How the embeddings of the merged model are stored."""

    deltas: Mapping[str, WeightDelta]  # as given, or with the delta of one embedding applied to both
    borrowed: Mapping[str, str]  # parameters that need a tensor of their own now → the base tensor to start from
    untied: bool  # the base's embeddings are tied and the merged ones are not
    vocabulary: int | None  # new number of embedding rows, None where it stays


def settle_tying(
    model: PreTrainedModel,
    names: Mapping[str, str],
    deltas: Mapping[str, WeightDelta],
    adapter: TensorFile,
    files: Sequence[TensorFile],
    *,
    keep_tied: bool,
) -> Tying:
    """Decides how embeddings are stored that the base ties and the adapter may have changed apart.

    Of a base whose configuration ties them and whose checkpoint holds two that differ, transformers 5 takes both as they
    are, as training does, and other programs the embeddings alone: the merged configuration says that they are two.

    PEFT changes only the module it is attached to, so a tied base's other end keeps the old weights, except for
    trained tokens, which PEFT trains in both.

    Args:
        model: The base's architecture.
        names: Name in the model → name in the checkpoint.
        deltas: By name in the model, of `adapter`.
        files: Of the base.
        keep_tied: PEFT's `ensure_weight_tying`.

    Raises:
        AdapterError: The embeddings it brings are not one vocabulary.
    """
    inputs, head = embedding_names(model)
    deltas = dict(deltas)
    vocabulary = _check_vocabulary(model, deltas, adapter, inputs, head)
    state = model.state_dict(keep_vars=True)
    if head is None or state[inputs] is not state[head]:
        return Tying(deltas, {}, False, vocabulary)
    first, second = deltas.get(inputs), deltas.get(head)
    if first and not second and (keep_tied or first.rows):
        second = deltas[head] = first
    present = [name for name in (inputs, head) if name in names]
    file_of = {name: file for file in files for name in file.entries}
    stored = [(file_of[names[name]], names[name]) for name in present]
    if len(stored) == 2 and not are_equal(*stored):
        return Tying(deltas, {}, True, vocabulary)
    if not present or first == second or _same_replacement(first, second, adapter):
        kept = {name: delta for name, delta in deltas.items() if name in present or name not in (inputs, head)}
        return Tying(kept, {}, False, vocabulary)
    borrowed = {name: names[present[0]] for name in (inputs, head) if name not in present}
    return Tying(deltas, borrowed, True, vocabulary)


def _same_replacement(first: WeightDelta | None, second: WeightDelta | None, adapter: TensorFile) -> bool:
    """Whether both are replaced by equal tensors: PEFT saves both ends of tied embeddings that were resized."""
    if not first or not second or not first.replacement or not second.replacement:
        return False
    if replace(first, replacement=None, embedding=False) != replace(second, replacement=None, embedding=False):
        return False
    return are_equal((adapter, first.replacement), (adapter, second.replacement))


def _check_vocabulary(
    model: PreTrainedModel, deltas: Mapping[str, WeightDelta], adapter: TensorFile, inputs: str, head: str | None
) -> int | None:
    state = model.state_dict(keep_vars=True)

    def rows_of(name: str) -> int:
        delta = deltas.get(name)
        return adapter.entries[delta.replacement].shape[0] if delta and delta.replacement else state[name].shape[0]

    old, new = state[inputs].shape[0], rows_of(inputs)
    last = max(deltas[inputs].token_indices, default=0) if inputs in deltas else 0
    if last >= new:
        raise AdapterError(f"The adapter trains token {last}, but the base has only {new} embedding rows.")
    # As much more as the base has: Llama 3.2 Vision has eight more rows of embeddings than of its head.
    if head is not None and state[head] is not state[inputs] and rows_of(head) - state[head].shape[0] != new - old:
        raise AdapterError(
            f"The adapter makes {new} input embeddings and {rows_of(head)} rows in the output head.",
            "Save it with both: save_embedding_layers=True.",
        )
    return new if new != old else None
