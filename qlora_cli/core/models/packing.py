"""Packing a base's weights in 4 bits while they are read: one matrix at a time is in 16 bits, on a card some together."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qlora_cli.core.distributed.weight_shards import WeightShards
from qlora_cli.core.experts.four_bit_experts import FourBitExperts, pack_experts
from qlora_cli.core.experts.layout import ExpertWeight, expert_weights
from qlora_cli.core.experts.stack import Packed, join_packed, pack_matrices, packed_of
from qlora_cli.core.models.account import Account
from qlora_cli.core.models.quantization import (
    BLOCK_SIZE,
    NESTED_BLOCK_SIZE,
    finite_and_zero,
    pack_weight,
    restored_linear,
    twin_of,
)
from qlora_cli.core.models.weight_names import WeightOrigin
from qlora_cli.core.weights.checkpoint import Checkpoint
from qlora_cli.core.weights.four_bit_parts import four_bit_state
from qlora_cli.core.weights.read_ahead import PIECE_BYTES, ReadAhead, Request, pays
from qlora_cli.errors import ModelError
from qlora_cli.settings.groups import QuantizationSettings


class Withdrawn(nn.Module):
    """The place of a linear layer whose weight is not there yet; its bias is loaded like all that is not packed."""

    bias: nn.Parameter | None

    def __init__(self, linear: Any) -> None:
        """Takes the place of a linear layer on the meta device."""
        super().__init__()
        self.transposed = isinstance(linear, Conv1D)  # (in, out) in the model and in the checkpoint
        self.shape = tuple(linear.weight.shape)
        self.weight = _place(linear.weight)
        self.register_parameter("bias", linear.bias)
        self._is_hf_initialized = True


def withdraw(model: nn.Module, account: Account) -> None:
    """Takes what will be packed out of a model on the meta device, so that transformers loads the rest alone."""
    shared = account.plan.shared
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    for name in tied.keys() & (shared.keys() | account.plan.packed):
        del tied[name]  # `share_weights` ties what is packed
    for name in [*account.plan.packed, *shared]:
        owner_name, _, leaf = name.rpartition(".")
        owner = model.get_submodule(owner_name)
        stacks = expert_weights(owner)
        if any(weight.name == leaf for weight in stacks):
            cast(Any, owner).expert_weights = stacks
            owner._is_hf_initialized = True  # type: ignore[assignment]
            place = _place(getattr(owner, leaf))
            delattr(owner, leaf)
            setattr(owner, leaf, place)
        else:
            model.set_submodule(owner_name, Withdrawn(owner))


def share_weights(model: nn.Module, shared: Mapping[str, str]) -> None:
    """Gives layers that share a weight with one in 4 bits that weight: one in memory, and a module for each place.

    Args:
        model: Filled.
        shared: See `FourBitPlan.shared`.
    """
    for other, name in shared.items():
        first: Any = model.get_submodule(name.rpartition(".")[0])
        place: Any = model.get_submodule(other.rpartition(".")[0])
        model.set_submodule(other.rpartition(".")[0], twin_of(first, place.bias))


def _place(parameter: Any) -> Tensor:
    """No parameter, without memory: some models initialise what lies in modules below, and look for it there."""
    place = torch.empty_like(parameter, device="meta", requires_grad=False)
    place._is_hf_initialized = True  # type: ignore[attr-defined]
    return place


class LazyWeight:
    """A weight of a checkpoint that is read when it is indexed, as transformers takes the slices of safetensors."""

    def __init__(self, checkpoint: Checkpoint, name: str) -> None:
        """`name` is the checkpoint's."""
        self.checkpoint, self.name = checkpoint, name

    def __getitem__(self, index: Any) -> Tensor:
        return self.checkpoint.read(self.name)[index]


class Packer:
    """Fills a model that `withdraw` was applied to with packed weights.

    Attributes:
        quantization: How they are held.
        compute_dtype: Of the arithmetic, and what they are packed from.
        device: Where they go.
        finite: Whether each weight, by its name, was finite before it was packed.
        zero: Whether each was all zeros.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        quantization: QuantizationSettings,
        compute_dtype: torch.dtype,
        device: torch.device,
        weight_shards: WeightShards | None = None,
    ) -> None:
        """The arguments are those of `load_base`."""
        self.checkpoint, self.device, self.shards = checkpoint, device, weight_shards
        self.quantization, self.compute_dtype = quantization, compute_dtype
        self.model = self.structure = cast(Any, None)
        held: dict[str, Any] = {"quant_type": quantization.quant_type, "double_quant": quantization.double_quant}
        self._held = held
        self.finite: dict[str, Tensor] = {}
        self.zero: dict[str, Tensor] = {}
        self._read: Callable[..., Tensor] = checkpoint.read

    def fill(self, model: Any, account: Account, structure: Any) -> None:
        """Packs every weight of the plan into its place in the model.

        Args:
            model: Whose packed layers are withdrawn.
            account: Of it.
            structure: The model on the meta device with every layer in its place, by which stored tensors are split.

        Raises:
            ModelError: A tensor has another shape than its place.
        """
        self.model, self.structure = model, structure
        origins = [
            (origin, wanted)
            for origin in account.origins.of.values()
            if (wanted := [target for target in origin.targets if target in account.plan.packed])
        ]
        for name in account.plan.packed:
            owner = model.get_submodule(name.rpartition(".")[0])
            if isinstance(owner, Withdrawn):
                continue
            if not isinstance(owner, FourBitExperts):
                pack_experts(owner, compute_dtype=self.compute_dtype, device=self.device, **self._held)
        with ExitStack() as stack:
            if pays(self.device):
                order = (request for origin, wanted in origins for request in self._requests(origin, wanted[0]))
                self._read = stack.enter_context(ReadAhead(self.checkpoint, order, self.device))
            for origin, wanted in origins:
                self._fill_from(origin, wanted)
        share_weights(model, account.plan.shared)

    def _requests(self, origin: WeightOrigin, name: str) -> Iterator[Request]:
        """What filling these targets reads, in order."""
        owner, leaf = self.model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        experts = owner.weight_of(leaf).experts if isinstance(owner, FourBitExperts) else 0
        if not (experts and origin.by_expert(experts)):
            yield from ((source, None) for source in origin.names)
            return
        for number in range(experts):
            yield from origin.expert_requests(number)

    def _fill_from(self, origin: WeightOrigin, wanted: list[str]) -> None:
        owner = self.model.get_submodule(wanted[0].rpartition(".")[0])
        if isinstance(owner, FourBitExperts):
            name = wanted[0].rpartition(".")[2]
            first = 0
            for count, packed in self._packed_experts(origin, owner.weight_of(name), wanted[0]):
                owner.put_experts(name, first, packed)
                first += count
            if self.shards:
                owner.keep_shards(name, self.shards)
            return
        packed_parts = self.checkpoint.packed(origin.names[0]) if origin.converter is None else None
        values = {} if packed_parts else origin.read(self._read, self.structure)
        for target in origin.targets:
            if target in wanted:
                self._put_linear(target, packed_parts, values.get(target))
            elif target in values:  # of a tensor that is split into packed and other parts
                place = self.model.get_parameter(target)
                place.data.copy_(values[target])

    def _put_linear(self, name: str, packed: dict[str, Tensor] | None, value: Tensor | None) -> None:
        place = self.model.get_submodule(name.rpartition(".")[0])
        if packed is None:
            assert value is not None
            self._require_shape(name, value, place.shape)
            matrix = self._settled(name, value.T if place.transposed else value)
            packed = pack_weight(matrix, **self._held)
        bias = None if place.bias is None else place.bias.data
        linear = restored_linear(self.compute_dtype, self.device, packed, bias)
        if self.shards:
            weight: Any = linear.weight
            weight.data = self.shards.keep(weight.data)
            weight.quant_state.absmax = self.shards.keep(weight.quant_state.absmax)
        self.model.set_submodule(name.rpartition(".")[0], linear)

    def _packed_experts(self, origin: WeightOrigin, weight: ExpertWeight, name: str) -> Iterator[tuple[int, Packed]]:
        """Experts' matrices in turn, and how many; on a card as many at once as a piece of what is read ahead."""
        if origin.by_expert(weight.experts) and all(map(self.checkpoint.is_packed, origin.names)):
            yield from ((1, packed) for packed in self._stored_experts(origin, weight))
            return
        at_once = 1
        if pays(self.device):
            at_once = min(weight.experts, max(1, PIECE_BYTES // (weight.elements * self.compute_dtype.itemsize)))
        matrices = torch.empty(at_once, weight.rows, weight.columns, dtype=self.compute_dtype, device=self.device)
        found = self._matrices(origin, weight, name)
        for first in range(0, weight.experts, at_once):
            some = matrices[: weight.experts - first]
            for place, matrix in zip(some, found, strict=False):
                place.copy_(matrix.to(self.device))
            for number, (finite, zero) in enumerate(zip(*finite_and_zero(some), strict=True), first):
                self.finite[f"{name}.{number}"], self.zero[f"{name}.{number}"] = finite, zero
            yield len(some), pack_matrices(some, **self._held)

    def _matrices(self, origin: WeightOrigin, weight: ExpertWeight, name: str) -> Iterator[Tensor]:
        """Each expert's matrix (out, in) as it is stored."""
        if origin.by_expert(weight.experts):
            for number in range(weight.experts):
                made = origin.read_expert(self._read, self.structure, number)
                self._require_shape(name, made, (1, *weight.shape[1:]))
                yield weight.as_matrix(made[0])
            return
        stack = origin.read(self._read, self.structure)[name]
        self._require_shape(name, stack, weight.shape)
        yield from map(weight.as_matrix, stack)

    def _stored_experts(self, origin: WeightOrigin, weight: ExpertWeight) -> Iterator[Packed]:
        """Experts that the checkpoint holds in 4 bits, one tensor or two each, as they are: no bit changes."""
        for number in range(weight.experts):
            pieces = []
            for names in (origin.sources[pattern] for pattern in origin.patterns):
                parts = self.checkpoint.packed(names[number])
                assert parts is not None
                moved = {ending: part.to(self.device) for ending, part in parts.items()}
                state = four_bit_state(moved, self.device)
                self._require_same_layout(names[number], state)
                pieces.append(packed_of(moved[""], state, weight.elements))
            yield join_packed(pieces)

    def _require_same_layout(self, name: str, state: Any) -> None:
        """Raises ModelError where a stored expert is in another layout than its stack, whose experts share one."""
        nested = state.state2.blocksize if state.nested else NESTED_BLOCK_SIZE
        found = state.quant_type, state.nested, state.blocksize, nested
        if found != (self.quantization.quant_type, self.quantization.double_quant, BLOCK_SIZE, NESTED_BLOCK_SIZE):
            doubly = "doubly" if state.nested else "singly"
            raise ModelError(
                f"{name} is stored in {state.quant_type}, {doubly} quantised in blocks of {state.blocksize} weights and "
                f"{nested} constants, which is not what its config.json says, or not read of experts.",
                "Mend quantization_config, or give --model the 16-bit checkpoint it was made from.",
            )

    def _settled(self, name: str, matrix: Tensor) -> Tensor:
        """On the device in the compute dtype, (out, in) contiguous; whether it is finite, which packing hides, and zero is
        noted."""
        matrix = matrix.to(self.device).to(self.compute_dtype).contiguous()
        (self.finite[name],), (self.zero[name],) = finite_and_zero(matrix[None])
        return matrix

    def _require_shape(self, name: str, value: Tensor, shape: tuple[int, ...]) -> None:
        if tuple(value.shape) != tuple(shape):
            raise ModelError(
                f"{name} is {tuple(value.shape)} in the checkpoint where its config.json makes it {tuple(shape)}.",
                "Download or copy the model again; its configuration and its weights must belong together.",
            )
