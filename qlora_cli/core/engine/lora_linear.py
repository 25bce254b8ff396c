"""Fused forward of a model's frozen and adapted linear layers, set on the module instances."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qlora_cli.core.engine.fsdp import ShardedWeight, sharded_weight_of
from qlora_cli.core.matmul.frozen_weights import frozen_weight
from qlora_cli.kernels.linear import qlora_linear
from qlora_cli.kernels.lora_products import Dropout, LinearOptions
from qlora_cli.kernels.weights import FrozenWeight

if TYPE_CHECKING:
    from qlora_cli.core.engine.gated_mlp import SharedProjection

# What a module instance computes with whose `forward` the engine has replaced: a linear's `FastLinear`, a gated MLP's
# `GatedUnit`, a decoder layer's `LayerPlan`. On the instance, so that layers of one class share compiled code.
ATTRIBUTE = "_qlora_engine"
APART_ELEMENTS = 4096  # up to which copying what lies between two parameters costs less than another launch


def replace_forward(modules: Mapping[nn.Module, Any], forward: Callable) -> Callable[[], None]:
    """Gives module instances another `forward`, which finds what belongs to each under `ATTRIBUTE`.

    Returns:
        What puts them back; a second call does nothing.
    """
    replaced: list[Any] = list(modules)
    for module, state in modules.items():
        setattr(module, ATTRIBUTE, state)
        module.forward = MethodType(forward, module)

    def put_back() -> None:
        for module in replaced:
            delattr(module, ATTRIBUTE)
            del module.forward
        replaced.clear()

    return put_back


class StepState:
    """What the layers of one engine share: dropout seeds of the micro-batch, one for each of its linears on the device,
    whether a pass is a repetition, and which tokens it is of."""

    def __init__(self, device: torch.device, linears: int) -> None:
        # At one place for good, where compiled code and CUDA graphs read them.
        self.seeds = torch.arange(linears, dtype=torch.int64, device=device)
        self.steps_apart = torch.arange(linears, dtype=torch.int64)
        self.recomputing = False
        self.first_token = 0  # of those that linears are given, where they are given a tile

    def draw_seeds(self) -> None:
        """New seeds from torch's host generator, so that seeding torch decides them and no one waits for the device."""
        seeds = self.steps_apart + torch.randint(2**62, (), dtype=torch.int64)
        self.seeds.copy_(seeds.pin_memory() if self.seeds.is_cuda else seeds, non_blocking=True)

    def recompute(self) -> AbstractContextManager[None]:
        """Marks the repetition of a forward pass inside the backward pass."""
        return self.tile(0, repeated=True)

    @contextmanager
    def tile(self, first_token: int, *, repeated: bool) -> Iterator[None]:
        """Marks a run on the tokens from `first_token` on, `repeated` in the backward pass or not."""
        before, self.first_token, self.recomputing = self.recomputing, first_token, repeated
        try:
            yield
        finally:
            self.first_token, self.recomputing = 0, before


class AdapterValues:
    """The adapters' parameters in the compute dtype, refreshed once a micro-batch: one launch where they lie together."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.linears: list[FastLinear] = []
        self.sources: list[Tensor] = []
        self.copies: list[Tensor] = []
        self.addresses: tuple[int, ...] = ()

    def take(self, linears: Iterable["FastLinear"]) -> None:
        """Whose values are kept from the next `refresh` on."""
        self.linears, self.addresses = list(linears), ()

    def _build(self) -> None:
        """Copies of parameters that lie side by side in one piece; what lies between, as adapters of experts, is not of
        linears, and left out."""
        own = {p: p.detach() for linear in self.linears for p in (linear.a, linear.b)}
        moved = sorted((p for p in own if p.dtype != self.dtype), key=lambda p: p.data_ptr())
        apart = [i for i, pair in enumerate(pairwise(moved), start=1) if not _lie_together(*pair)]
        self.sources, self.copies = [], []
        for first, stop in pairwise(dict.fromkeys((0, *apart, len(moved)))):
            start, end = moved[first].storage_offset(), _end(moved[stop - 1])
            source = moved[first].detach().as_strided((end - start,), (1,), start)
            copy = source.to(self.dtype)
            for p in moved[first:stop]:
                own[p] = copy.as_strided(p.shape, p.stride(), p.storage_offset() - start)
            self.sources.append(source)
            self.copies.append(copy)
        for linear in self.linears:
            linear.lora_a, linear.lora_b = own[linear.a], own[linear.b]

    @torch.no_grad()
    def refresh(self) -> None:
        """Brings the copies up to date; rebuilds them when parameters have moved."""
        addresses = tuple(p.data_ptr() for linear in self.linears for p in (linear.a, linear.b))
        if addresses != self.addresses:
            self._build()
            self.addresses = addresses
        elif self.copies:
            # A graph waiting for its backward pass holds these copies; the values change only with an optimizer step,
            # which no such graph survives in a training loop.
            with torch.autograd._unsafe_preserve_version_counter(tuple(self.copies)):
                torch._foreach_copy_(self.copies, self.sources)


def _end(parameter: Tensor) -> int:
    """The place behind its last element in its storage."""
    reach = sum((size - 1) * stride for size, stride in zip(parameter.shape, parameter.stride(), strict=True))
    return int(parameter.storage_offset()) + reach + 1


def _lie_together(one: Tensor, next_one: Tensor) -> bool:
    """Whether two parameters are of one storage with less between them than a launch is worth."""
    same = one.untyped_storage().data_ptr() == next_one.untyped_storage().data_ptr()
    return same and next_one.storage_offset() - _end(one) < APART_ELEMENTS


@dataclass(eq=False)
class FastLinear:
    """Everything one layer's forward needs.

    Attributes:
        weight: The frozen weight, or what gives it while it is gathered from all ranks.
        bias: (out,) in the compute dtype `dtype`, or None.
        seed: int64 scalar of the layer's own, so that layers drop different places.
        adapter: Name of the covered adapter; None for a layer without one.
        a: (rank, in) parameter.
        b: (out, rank) parameter.
        lora_a: `a` in the compute dtype.
        lora_b: `b` in the compute dtype.
        rate: Dropout on the adapter's input.
        output_unused_in_recompute: Whether a repetition of the forward pass can do without its output.
        shared: What it has in common with layers that read the same tensor; None for nothing.
        place: Its place among these.
    """

    weight: FrozenWeight | ShardedWeight
    bias: Tensor | None
    dtype: torch.dtype
    step: StepState
    options: LinearOptions
    seed: Tensor
    adapter: str | None = None
    a: Any = None
    b: Any = None
    lora_a: Tensor | None = None
    lora_b: Tensor | None = None
    rate: float = 0.0
    output_unused_in_recompute: bool = False
    shared: "SharedProjection | None" = None
    place: int = 0

    def frozen(self) -> FrozenWeight:
        """The weight; whole for the time being, where ranks share it. Evaluation is not in 8 bits, as answers are not."""
        weight = self.weight if isinstance(self.weight, FrozenWeight) else self.weight.gathered()
        return weight if weight.row_scale is None or torch.is_grad_enabled() else weight.plain()

    def __call__(self, x: Tensor, training: bool) -> Tensor:
        weight = self.frozen()
        if self.shared is not None and self.shared.enabled and x.dtype == self.dtype and torch.compiler.is_compiling():
            part = self.shared.part(x, self.place)
            if self.shared.joined is not None:
                return part
            return qlora_linear(x, weight, self.bias, None, self.b, None, self.lora_b, None, self.options, part)
        dropout = Dropout(self.rate, self.seed, self.step.first_token) if training and self.rate > 0 else None
        options = self.options
        if self.output_unused_in_recompute and self.step.recomputing:
            options = options._replace(output_needed=False)
        y = qlora_linear(
            x.to(self.dtype), weight, self.bias, self.a, self.b, self.lora_a, self.lora_b, dropout, options
        )
        return y.to(x.dtype)


def _forward(self: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Replaces `forward` on one instance; anything the op does not cover goes to the class's own forward."""
    fast: FastLinear = getattr(self, ATTRIBUTE)
    if args or kwargs or (fast.adapter is not None and not adapter_is_active(self, fast.adapter)):
        return type(self).forward(self, x, *args, **kwargs)
    return fast(x, self.training)


def adapter_is_active(module: Any, name: str | None) -> bool:
    """Whether the adapter of that name, and no other, is in effect in a wrapped layer."""
    active = module.active_adapters
    return not module.disable_adapters and not module.merged and len(active) == 1 and active[0] == name


def is_adapted(module: nn.Module) -> bool:
    """Whether PEFT has wrapped this module with LoRA matrices."""
    return hasattr(module, "lora_A") and hasattr(module, "base_layer")


def is_plain_lora(module: Any, name: str) -> bool:
    """Whether an adapter of a wrapped layer adds scaled B A and nothing else: no DoRA, no biases, nothing transposed."""
    a, b = module.lora_A[name], module.lora_B[name]
    plain = type(a) is nn.Linear and type(b) is nn.Linear and a.bias is None and b.bias is None
    return plain and name not in module.lora_variant and not getattr(module, "fan_in_fan_out", False)


def _covered_adapter(module: Any) -> str | None:
    """The one plain LoRA adapter of a wrapped layer; None where PEFT's own forward has to do it."""
    active = [name for name in module.active_adapters if name in module.lora_A]
    if len(active) != 1 or not adapter_is_active(module, active[0]):
        return None
    known_dropout = isinstance(module.lora_dropout[active[0]], nn.Identity | nn.Dropout)
    return active[0] if known_dropout and is_plain_lora(module, active[0]) else None


def fast_linear(
    module: Any,
    dtype: torch.dtype,
    step: StepState,
    *,
    resident: bool,
    workspace_bytes: int | None,
    seed: Tensor,
    in_8_bits: bool = False,
) -> FastLinear | None:
    """The fused form of one layer, adapted or not; None where its own forward stays."""
    adapted = is_adapted(module)
    base = module.base_layer if adapted else module
    if base.__class__.__module__.startswith("peft.") or (base.bias is not None and base.bias.requires_grad):
        return None
    name = _covered_adapter(module) if adapted else None
    if adapted and name is None:
        return None
    weight = sharded_weight_of(base) or frozen_weight(base, dtype, resident=resident, in_8_bits=in_8_bits)
    if weight is None:
        return None
    bias = None if base.bias is None else base.bias.detach().to(dtype)
    fast = FastLinear(weight, bias, dtype, step, LinearOptions(1.0, workspace_bytes), seed)
    if name is not None:
        fast.adapter = name
        fast.a, fast.b = module.lora_A[name].weight, module.lora_B[name].weight
        fast.options = LinearOptions(float(module.scaling[name]), workspace_bytes)
        fast.rate = float(getattr(module.lora_dropout[name], "p", 0.0))
    return fast


def linear_candidates(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """Linear layers, adapted ones as a whole, except the head and whatever is inside an adapted one."""
    head = model.get_output_embeddings()
    inside = {id(child) for child in head.modules()} if head is not None else set()
    for name, module in model.named_modules():
        if id(module) in inside:
            continue
        if is_adapted(module):
            inside.update(id(child) for child in module.modules())
            if isinstance(module.base_layer, nn.Linear):  # not an embedding, nor experts in one tensor
                yield name, module
        elif isinstance(module, nn.Linear):
            yield name, module


class FusedLinears:
    """The linear layers of one model instance, as far as they compute through the fused op.

    Attributes:
        step: What the layers share while a step runs.
        fused: The layers that do.
        kept: Names of layers that keep their own forward.
        resident: Whether the fused ones hold dequantised weights.
        dense_bytes: Of all weights, dequantised.
        largest_dense_bytes: Of the largest.
    """

    def __init__(self, model: Any, values: AdapterValues, device: torch.device) -> None:
        self.values = values
        self.candidates = list(linear_candidates(model))
        self.step = StepState(device, len(self.candidates))
        self.fused: list[FastLinear] = []
        self.kept: list[str] = []
        self.resident = False
        self.in_8_bits: frozenset[nn.Module] = frozenset()  # those that `fuse` has multiplied in 8 bits
        sizes = [logical_elements(module) * values.dtype.itemsize for _, module in self.candidates]
        self.dense_bytes, self.largest_dense_bytes = sum(sizes), max(sizes, default=0)
        self.put_back: Callable[[], None] = lambda: None  # gives the instances their own forward back

    def fuse(self, *, resident: bool, workspace_bytes: int | None) -> None:
        """Gives each layer that is covered the fused forward, on packed or on dequantised weights."""
        self.put_back()
        found: dict[nn.Module, FastLinear] = {}
        self.kept = []
        for (name, module), seed in zip(self.candidates, self.step.seeds, strict=True):
            fast = fast_linear(
                module,
                self.values.dtype,
                self.step,
                resident=resident,
                workspace_bytes=workspace_bytes,
                seed=seed,
                in_8_bits=module in self.in_8_bits,
            )
            if fast is None:
                self.kept.append(name)
            else:
                found[module] = fast
        self.fused, self.resident = list(found.values()), resident
        self.values.take(fast for fast in self.fused if fast.adapter is not None)
        self.put_back = replace_forward(found, _forward)

    def packed(self) -> dict[str, tuple[nn.Module, FrozenWeight]]:
        """Fused layers by name, with their 4-bit weights."""
        found: dict[str, tuple[nn.Module, FrozenWeight]] = {}
        for name, module in self.candidates:
            base: Any = module.base_layer if is_adapted(module) else module
            weight = frozen_weight(base, self.values.dtype, resident=False) if fast_linear_of(module) else None
            if weight is not None and weight.packed is not None:
                found[name] = module, weight
        return found

    def set_workspace(self, bytes_: int | None) -> None:
        """Most bytes of dequantised values at once, from now on; None for a whole weight."""
        for fast in self.fused:
            fast.options = fast.options._replace(workspace_bytes=bytes_)

    def tensors(self) -> Iterator[Tensor]:
        """What the frozen weights consist of, but those that ranks share, and the adapters' copies."""
        yield from self.values.copies
        for fast in self.fused:
            if isinstance(fast.weight, FrozenWeight):
                yield from (part for part in fast.weight if isinstance(part, Tensor))


@contextmanager
def noted_calls(modules: Iterable[nn.Module], note: Callable[[nn.Module, tuple, dict], None]) -> Iterator[None]:
    """Has each call of these modules inside the block noted, with its arguments, before it runs."""
    hooks = [module.register_forward_pre_hook(note, with_kwargs=True) for module in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def group_by_input(modules: Iterable[nn.Module], run: Callable[[], Any]) -> list[list[nn.Module]]:
    """Modules that are given the very same tensor, unchanged in between, while `run` runs, in the order of their calls.

    A module that reads a tensor of its own is a group of one; one that is called twice (a shared one) is left out.
    """
    calls: list[tuple[nn.Module, Tensor, int]] = []  # holding the tensors keeps their identities apart

    def note(module: nn.Module, args: tuple, _: dict) -> None:
        if args:
            calls.append((module, args[0], args[0]._version))

    with noted_calls(modules, note):
        run()
    counts = Counter(id(module) for module, _, _ in calls)
    groups: dict[tuple[int, int], list[nn.Module]] = {}
    for module, tensor, version in calls:
        if counts[id(module)] == 1:
            groups.setdefault((id(tensor), version), []).append(module)
    return list(groups.values())


def fast_linear_of(module: nn.Module) -> FastLinear | None:
    """The fused form a swapped instance computes with; None for any other module."""
    state = getattr(module, ATTRIBUTE, None)
    return state if isinstance(state, FastLinear) else None


def logical_elements(module: Any) -> int:
    """Values of a linear layer's weight, packed or not."""
    linear = module.base_layer if hasattr(module, "base_layer") else module
    if (sharded := sharded_weight_of(linear)) is not None:
        return sharded.elements
    weight = linear.weight
    state = getattr(weight, "quant_state", None)
    return weight.numel() if state is None else math.prod(state.shape)
