"""Experts in 4 bits: a layer's routed experts with their matrices packed, computed by one forward for every layout."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_cli.core.distributed.weight_shards import WeightShards
from qlora_cli.core.experts.grouped_product import ExpertStack, Routing, dense_product, packed_product, route
from qlora_cli.core.experts.layout import ExpertWeight, expert_weights
from qlora_cli.core.experts.stack import (
    BLOCK_SIZE,
    Packed,
    code_tables,
    empty_stack,
    nested_block_size,
    of_this_pass,
    put_packed,
)
from qlora_cli.kernels.weights import FrozenWeight

PARTS = ("absmax", "nested_absmax", "offset")  # buffers beside the codes: `gate_up_proj_absmax`, …


@dataclass(frozen=True)
class ExpertLora:
    """LoRA matrices of a stack, packed as PEFT packs them for `target_parameters`.

    Attributes:
        a: (experts * rank, in): the rows of expert e are e * rank to (e + 1) * rank.
        b: (out, rank * experts): the columns of expert e are every `experts`-th from e on.
        scaling: On b @ a.

    in and out change places where `ExpertWeight.adapter_swapped`.
    """

    a: Tensor
    b: Tensor
    scaling: float

    def factors(self, weight: ExpertWeight, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(experts, in, rank) and (experts, rank, out), whose product adds to x @ W.T."""
        experts = weight.experts
        a = self.a.view(experts, self.a.shape[0] // experts, -1)  # (experts, rank, in)
        # Contiguous, (experts, rank, out): grouped products take matrices whose experts lie apart.
        b = self.b.view(self.b.shape[0], -1, experts).permute(2, 1, 0).to(dtype).contiguous()
        first, second = (b.transpose(1, 2), a) if weight.adapter_swapped else (a.transpose(1, 2), b)
        return first.to(dtype), second.to(dtype)

    def delta(self, weight: ExpertWeight, expert: int) -> Tensor:
        """What it adds to one expert's W, (out, in)."""
        experts, rank = weight.experts, self.a.shape[0] // weight.experts
        product = self.b[:, expert::experts] @ self.a[expert * rank : (expert + 1) * rank]
        return self.scaling * (product.T if weight.adapter_swapped else product)


class FourBitExperts(nn.Module):
    """A module of routed experts whose stacks are packed in 4 bits. `pack_experts` makes one of a transformers module.

    Its class is one derived from the module's own, so that gate, activation and norms are the model's. Codes are
    parameters under the stack's own name, constants are buffers beside them.

    Attributes:
        expert_weights: The stacks.
        compute_dtype: Of the arithmetic, and of `dequantized`.
        quant_type: nf4 or fp4.
        double_quant: Whether constants are quantised again.
        lora: What gives the adapter in effect of each stack, by its name; an absent name has none.
        scales: `FrozenWeight.stack_scale` of each stack that steps multiply in 8 bits, by its name.
        unpacked: What of a stack stays unpacked (core/experts/unpacked_experts.py), as fields of `FrozenWeight`, by its name.
    """

    expert_weights: tuple[ExpertWeight, ...]
    compute_dtype: torch.dtype
    quant_type: str
    double_quant: bool
    lora: dict[str, Callable[[], ExpertLora | None]]
    scales: dict[str, Tensor]
    unpacked: dict[str, dict[str, Tensor]]

    def lora_of(self, name: str) -> ExpertLora | None:
        """The adapter in effect of a stack."""
        given = self.lora.get(name)
        return None if given is None else given()

    def weight_of(self, name: str) -> ExpertWeight:
        """The shape and layout of a stack."""
        return next(weight for weight in self.expert_weights if weight.name == name)

    @property
    def is_sharded(self) -> bool:
        """Whether ranks share the stacks: then they are whole, and filled up, only while their layer computes."""
        return isinstance(getattr(self, f"{self.expert_weights[0].name}_absmax"), nn.Parameter)

    def packed(self, name: str) -> Packed:
        """The tensors of a stack."""
        codes, absmax, nested_absmax, offset = (getattr(self, n) for n in (name, *(f"{name}_{part}" for part in PARTS)))
        if self.is_sharded:
            total = self.weight_of(name).experts * self.weight_of(name).elements
            dtype = torch.uint8 if self.double_quant else torch.float32
            codes = codes.detach().view(torch.uint8)[: total // 2]
            absmax = absmax.detach().view(dtype)[: total // BLOCK_SIZE]
        return Packed(codes.detach(), absmax, nested_absmax, offset)

    def stack(self, name: str) -> ExpertStack:
        """A stack with what undoes the packing."""
        weight, packed = self.weight_of(name), self.packed(name)
        values = FrozenWeight(
            rows=weight.experts * weight.rows,
            columns=weight.columns,
            packed=packed.codes,
            absmax=packed.absmax,
            code=self.code,  # type: ignore[arg-type]
            nested_absmax=packed.nested_absmax,
            nested_code=self.nested_code if self.double_quant else None,  # type: ignore[arg-type]
            offset=packed.offset,
            blocksize=BLOCK_SIZE,
            nested_blocksize=nested_block_size(weight.elements),
            stack_scale=self.scales.get(name),
            **self.unpacked.get(name, {}),
        )
        return ExpertStack(weight, values, self.quant_type)

    def put_experts(self, name: str, first: int, packed: Packed) -> None:
        """Fills in matrices of experts, from the first of these on."""
        put_packed(self.packed(name), packed, first / self.weight_of(name).experts)

    def keep_shards(self, name: str, shards: WeightShards) -> None:
        """Keeps this rank's share of a stack, and of its constants, only."""
        codes = getattr(self, name)
        codes.data = shards.keep(codes.data)
        setattr(self, f"{name}_absmax", shards.keep(getattr(self, f"{name}_absmax")))

    def shard_names(self) -> list[str]:
        """Names of the tensors that `keep_shards` leaves a share of."""
        return [name for weight in self.expert_weights for name in (weight.name, f"{weight.name}_absmax")]

    def whole(self, leaf: str, tensor: Tensor) -> Tensor:
        """On the meta device, what a tensor of this module of which `keep_shards` left a share was; any other as it is."""
        for weight in self.expert_weights:
            total = weight.experts * weight.elements
            sizes = {weight.name: total // 2, f"{weight.name}_absmax": total // BLOCK_SIZE}
            if leaf in sizes:
                return torch.empty(sizes[leaf], dtype=tensor.dtype, device="meta")
        return tensor

    def dequantized(self, name: str, number: int) -> Tensor:
        """One expert's matrix, (out, in) in the compute dtype."""
        return self.stack(name).matrices(self.compute_dtype, number, number + 1)[0].clone()

    def _apply(self, fn: Any, recurse: bool = True) -> "FourBitExperts":
        """As every module's; a change of dtype is none of the constants'."""
        names = ["code", "nested_code", *(f"{weight.name}_{part}" for weight in self.expert_weights for part in PARTS)]
        before = {name: self._buffers[name] for name in names}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self

    def product(self, name: str, x: Tensor, routing: Routing, expert_ids: Tensor) -> Tensor:
        """Rows (rows, in), sorted by expert, through a stack, its adapter and its bias: (rows, out)."""
        weight = self.weight_of(name)
        stack = self.stack(name)
        result = packed_product(x, stack._replace(values=of_this_pass(stack.values)), routing)
        if (lora := self.lora_of(name)) is not None:
            first, second = lora.factors(weight, x.dtype)
            result = result + lora.scaling * dense_product(dense_product(x, first, routing), second, routing)
        if weight.bias is not None:
            bias = F.pad(getattr(self, weight.bias), (0, 0, 0, 1))  # rows of no expert come last, and have none
            result = result + bias[expert_ids]
        return result

    def forward(
        self, hidden_states: Tensor, top_k_index: Any = None, top_k_weights: Any = None, **named: Any
    ) -> Tensor:
        """The experts' answer.

        Args:
            hidden_states: (tokens, hidden); without an index (experts * tokens, hidden), each expert's rows in turn.
            top_k_index: (tokens, k), the experts of each token.
            top_k_weights: (tokens, k), the weights of their answers.
            named: The two under the names that some classes give them.

        Returns:
            (tokens, hidden), or as `hidden_states` is without an index.
        """
        index = named.get("router_indices", top_k_index)
        weights = named.get("routing_weights", top_k_weights)
        experts = self.expert_weights[-1].experts
        x = hidden_states.to(self.compute_dtype)
        if index is None:
            each = len(x) // experts
            ids = torch.arange(experts, device=x.device).repeat_interleave(each, output_size=len(x))
            ends = torch.arange(each, len(x) + 1, each, device=x.device, dtype=torch.int32)
            return self._answer(x, Routing(ends), ids).to(hidden_states.dtype)
        tokens, choices = index.shape
        ids, source, routing = route(index.reshape(-1), experts)
        answer = self._answer(x[source // choices], routing, ids)
        answer = answer * weights.reshape(-1)[source, None]
        back = torch.empty_like(source)
        back[source] = torch.arange(len(source), device=source.device)
        # A sum over each token's own rows: atomic additions would come in another order each time.
        return answer[back].view(tokens, choices, -1).sum(dim=1).to(hidden_states.dtype)

    def gated(self, hidden: Tensor) -> Tensor:
        """What the second product is given, (rows, in), of what the first one gave."""
        if not self.expert_weights[0].name.startswith("gate"):
            return self.act_fn(hidden)  # type: ignore[operator]
        if hasattr(self, "_apply_gate"):
            return self._apply_gate(hidden)  # type: ignore[operator]
        gate, linear = hidden.chunk(2, dim=-1)
        return self.act_fn(gate) * linear  # type: ignore[operator]

    def _answer(self, x: Tensor, routing: Routing, ids: Tensor) -> Tensor:
        up, down = self.expert_weights
        hidden = self.gated(self.product(up.name, x, routing, ids))
        hidden = self.product(down.name, hidden, routing, ids)
        return self.post_expert_norm(hidden) if getattr(self, "has_post_expert_norm", False) else hidden  # type: ignore[operator]


# The compiler calls it rather than looking inside. `torch.compiler.disable` says the same and imports the compiler.
FourBitExperts.forward._torchdynamo_disable = True  # type: ignore[attr-defined]


def pack_experts(
    module: nn.Module, *, compute_dtype: torch.dtype, quant_type: str, double_quant: bool, device: torch.device
) -> FourBitExperts:
    """Makes a module of experts, on any device, one in 4 bits, in place, with room for its matrices that is not filled."""
    weights = expert_weights(module)
    for weight in weights:
        packed = empty_stack(weight, double_quant=double_quant, device=device)
        module._parameters.pop(weight.name, None)
        module.__dict__.pop(weight.name, None)
        codes = nn.Parameter(packed.codes, requires_grad=False)
        codes.logical_elements = weight.experts * weight.elements  # type: ignore[attr-defined]
        module.register_parameter(weight.name, codes)
        for part in PARTS:
            module.register_buffer(f"{weight.name}_{part}", getattr(packed, part))
    code, nested_code = code_tables(quant_type, device)
    module.register_buffer("code", code, persistent=False)
    module.register_buffer("nested_code", nested_code, persistent=False)
    own: Any = module
    own.expert_weights, own.compute_dtype = weights, compute_dtype
    own.quant_type, own.double_quant, own.lora = quant_type, double_quant, {}
    own.scales, own.unpacked = {}, {}
    own.__class__ = _four_bit_class(type(module))
    return own


_classes: dict[type, type] = {}


def _four_bit_class(kind: type) -> type:
    if kind not in _classes:
        _classes[kind] = type(f"FourBit{kind.__name__}", (FourBitExperts, kind), {})
    return _classes[kind]
