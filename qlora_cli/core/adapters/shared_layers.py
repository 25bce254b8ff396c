"""Layers that share one weight: blocks that a model repeats have one adapter, as they have one weight.

zamba2 has a module for each place of its shared block, all with the same weights. A pair for each place would be several
updates of one stored weight, which no merged checkpoint can hold.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

import qlora_cli.core.bnb_before_peft  # noqa: F401 - with the compiler otherwise

# isort: split
import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from qlora_cli.core.adapters.vocabulary import ends_of
from qlora_cli.core.storage.safetensors_file import TensorFile
from qlora_cli.errors import AdapterError

Delta = TypeVar("Delta")
PAIR = ("lora_A", "lora_B", "lora_magnitude_vector", "lora_dropout")


def share_pairs(peft_model: nn.Module) -> None:
    """Gives layers of one weight the pair of the first of them."""
    first: dict[tuple[int, type], Any] = {}
    for module in peft_model.modules():
        base: Any = module.get_base_layer() if isinstance(module, LoraLayer) else None
        weight = getattr(base, "weight", None)
        if weight is None or not module.lora_A:  # embeddings, which a head may share
            continue
        other = first.setdefault((id(weight), type(base)), module)
        if other is not module:
            for part in PAIR:
                setattr(module, part, getattr(other, part))


def apart(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors on the host, none of which shares memory with another, as safetensors wants them."""
    seen: set[int] = set()
    made = {}
    for name, tensor in state.items():
        held = tensor.detach().to("cpu").contiguous()
        made[name] = held.clone() if held.data_ptr() in seen else held
        seen.add(held.data_ptr())
    return made


def one_delta_each(deltas: Mapping[str, Delta], model: nn.Module, adapter: TensorFile) -> dict[str, Delta]:
    """Deltas by parameter, those of parameters that share one weight once, under the first of their names.

    Args:
        deltas: By the parameter's name; dataclasses whose fields name tensors of the adapter or are settings.
        model: The base, whose embeddings and head are left as they are.
        adapter: The file that the deltas are from.

    Raises:
        AdapterError: Two of them differ.
    """
    names: dict[int, str] = {}
    left = dict(deltas)
    ends = {id(part.weight) for part in ends_of(model)}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = names.setdefault(id(parameter), name)
        if first == name or id(parameter) in ends or name not in deltas:
            continue
        if first not in deltas or not _are_equal(deltas[first], deltas[name], adapter):
            raise AdapterError(
                f"The adapter changes {name} otherwise than {first}, and the base has one weight for both.",
                "Use the adapter unmerged.",
            )
        del left[name]
    return left


def _are_equal(one: Any, other: Any, adapter: TensorFile) -> bool:
    def same(a: Any, b: Any) -> bool:
        if isinstance(a, str) and isinstance(b, str) and {a, b} <= set(adapter.entries):
            return torch.equal(adapter.read(a), adapter.read(b))
        return bool(a == b)

    return all(same(value, vars(other)[field]) for field, value in vars(one).items())
