"""Stacks of experts with their adapter, expert by expert, as the checkpoint holds them: fused, or a tensor an expert."""

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qlora_cli.core.adapters.expert_tensors import ExpertPair
from qlora_cli.core.experts.four_bit_experts import ExpertLora
from qlora_cli.core.experts.layout import ExpertWeight, expert_weights
from qlora_cli.core.models.quantization import round_trip
from qlora_cli.core.models.weight_names import WeightOrigin, find_origins
from qlora_cli.core.storage.safetensors_file import TensorFile
from qlora_cli.settings.groups import QuantizationSettings

BYTES_A_WEIGHT = 16  # of one expert while it is worked on


def find_stacks(model: PreTrainedModel, packed: frozenset[str]) -> dict[str, ExpertWeight]:
    """Each stack of experts in 4 bits with its shape, by its name in a model on any device; `packed` are all that are in
    4 bits."""
    stacks = {
        f"{of}.{weight.name}": weight for of, module in model.named_modules() for weight in expert_weights(module)
    }
    return {name: weight for name, weight in stacks.items() if name in packed}


class MergedExperts:
    """What becomes of each tensor of a checkpoint that belongs to a stack of experts.

    Attributes:
        stacks: Each stack in 4 bits with its shape, by its name in the model.
    """

    def __init__(self, files: Sequence[TensorFile], model: PreTrainedModel, packed: frozenset[str]) -> None:
        """Finds where each expert lies.

        Args:
            files: Of the base.
            model: Its architecture on the meta device.
            packed: Names of the parameters that are in 4 bits in training.
        """
        self.model, self.file_of = model, {name: file for file in files for name in file.entries}
        self.stacks = find_stacks(model, packed)
        self.places: dict[str, tuple[str, WeightOrigin, int | None, int]] = {}  # by the name in the checkpoint
        made = find_origins(self.file_of, model).made if self.stacks else {}
        for name, weight in self.stacks.items():
            origin = made.get(name)
            if origin is not None and origin.by_expert(weight.experts):
                for source, (number, piece) in origin.expert_parts().items():
                    self.places[source] = (name, origin, number, piece)

    def held_bytes(self, source: str) -> int:
        """Host memory that the work on one tensor of the checkpoint takes, about."""
        return BYTES_A_WEIGHT * self.stacks[self.places[source][0]].elements

    def merged(
        self,
        source: str,
        pairs: Mapping[str, ExpertPair],
        adapter: TensorFile,
        restore: QuantizationSettings | None,
        compute_dtype: torch.dtype,
        device: torch.device,
    ) -> Iterator[Tensor]:
        """One tensor of the checkpoint with the adapter, fp32, an expert at a time, one behind the other.

        Args:
            source: Its name in the checkpoint.
            pairs: Of the adapter, by the stack's name in the model.
            adapter: Its file.
            restore: How the base was held in training, to send each expert through the 4-bit round trip; None not to.
            compute_dtype: It was quantised from.
            device: To work on.
        """
        name, origin, number, piece = self.places[source]
        weight, pair = self.stacks[name], pairs.get(name)
        lora = None if pair is None else _read_pair(adapter, pair, device)
        shape = self.file_of[source].entries[source].shape
        for expert in range(weight.experts) if number is None else (number,):
            made = origin.read_expert(self._read, self.model, expert)[0]
            matrix = weight.as_matrix(made.to(device))
            if restore is not None:
                settled = matrix.to(compute_dtype).contiguous()
                held = {"quant_type": restore.quant_type, "double_quant": restore.double_quant}
                matrix = round_trip(settled, **held)  # type: ignore[arg-type]
            matrix = matrix.float()
            if lora is not None:
                matrix = matrix + lora.delta(weight, expert)
            yield origin.stored_piece(weight.as_matrix(matrix), piece, shape).contiguous()

    def _read(self, name: str, rows: slice | None) -> Tensor:
        return self.file_of[name].read(name, rows)


@lru_cache(maxsize=8)  # the tensors of a checkpoint with one an expert ask for it again and again
def _read_pair(adapter: TensorFile, pair: ExpertPair, device: torch.device) -> ExpertLora:
    a, b = (adapter.read(name).to(device).float() for name in (pair.a, pair.b))
    return ExpertLora(a, b, pair.scaling)
