"""A model on the meta device in; what each decoder layer reads, makes and keeps for its backward pass, per token, out."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface
from transformers.pytorch_utils import Conv1D

from qlora_cli.core.base_model import PLAIN_LINEAR_SUBCLASSES, linear_names
from qlora_cli.core.footprint import base_name
from qlora_cli.errors import ModelError

TRACED_ATTENTION = "qlora_traced"
TRACED_TOKENS = (32, 64)  # two lengths tell what grows with the tokens from what grows with their square


@dataclass(frozen=True)
class LinearUse:
    """One linear layer as the forward pass meets it."""

    name: str
    in_features: int
    out_features: int
    rank: int  # of its adapter, 0 without one


@dataclass(frozen=True)
class Kept:
    """Bytes kept from the forward for the backward pass of one layer: so many a token, and a pair of a row's tokens."""

    per_token: float
    per_pair: float  # where attention is written out: scores of every pair

    def bytes(self, tokens: int, row_tokens: int) -> float:
        """Bytes for `tokens` in rows of `row_tokens`."""
        return tokens * (self.per_token + self.per_pair * row_tokens)


@dataclass(frozen=True)
class LayerTrace:
    """One decoder layer."""

    hidden: int  # elements a token of its input
    linears: tuple[LinearUse, ...]
    keys_and_values: int  # elements a token that a cache holds for it
    kept: Kept  # by the forward as it is written
    compiled: Kept  # under a compiler, which recomputes what is elementwise; meant for fused linears


@dataclass(frozen=True)
class ModelTrace:
    """A forward pass."""

    layers: tuple[LayerTrace, ...]
    hidden: int  # elements a token that the output head reads
    vocabulary: int


@dataclass
class _Record:
    """What was seen of one layer. Storages are kept alive, so that their addresses name one tensor each."""

    hidden: int = 0
    linears: list[LinearUse] = field(default_factory=list)
    keys_and_values: int = 0
    saved: dict[int, Tensor] = field(default_factory=dict)  # by autograd
    required: dict[int, Tensor] = field(default_factory=dict)  # by ops that no compiler looks into, and by norms
    outputs: dict[int, Tensor] = field(default_factory=dict)  # of linears

    def saved_bytes(self) -> int:
        """By autograd, each storage once."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self.saved.values())

    def compiled_bytes(self) -> int:
        """What opaque ops and norms read, and the outputs of linears that an activation's gradient needs.

        Everything else is elementwise on these. Inductor's partitioner does not recompute in the backward pass what an
        opaque op reads there (torch/_functorch/config.py, ban_recompute_materialized_backward).
        """
        kept = self.required | {key: tensor for key, tensor in self.outputs.items() if key in self.saved}
        return sum(tensor.numel() * tensor.element_size() for tensor in kept.values())


def find_decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The decoder layers: the module list that holds most of the parameters.

    Raises:
        ModelError: There is none.
    """
    lists: list[Any] = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    if not lists:
        raise ModelError(
            f"{type(model).__name__} has no list of decoder layers.", "This architecture is not supported."
        )
    largest = max(lists, key=lambda layers: sum(parameter.numel() for parameter in layers.parameters()))
    return list(largest)


def trace_model(model: Any, *, fused: bool) -> ModelTrace:
    """Runs the forward pass on the meta device, without memory or arithmetic, and writes down what it keeps.

    Attention is taken as memory-efficient wherever the model asks PyTorch or transformers for it.

    Args:
        model: A causal language model on the meta device, in the compute dtype, with its adapter attached.
        fused: Whether each linear and its adapter are one op, or computed as PEFT and bitsandbytes do.

    Raises:
        ModelError: The forward pass cannot be followed without real numbers.
    """
    model.train()
    try:
        short, long = (_run(model, tokens, fused=fused) for tokens in TRACED_TOKENS)
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError) as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"The forward pass of {model.config.model_type} cannot be followed without weights: {first_line}.",
            "Its memory cannot be predicted; its parameters can be counted.",
        ) from error
    layers = [
        LayerTrace(
            hidden=a.hidden,
            linears=tuple(a.linears),
            keys_and_values=a.keys_and_values,
            kept=_fit(a.saved_bytes(), b.saved_bytes()),
            compiled=_fit(a.compiled_bytes(), b.compiled_bytes()),
        )
        for a, b in zip(short, long, strict=True)
    ]
    vocabulary, hidden = model.get_output_embeddings().weight.shape
    return ModelTrace(tuple(layers), hidden, vocabulary)


def _fit(short_bytes: int, long_bytes: int) -> Kept:
    """bytes(T) = per_token T + per_pair T², from two lengths."""
    short, long = TRACED_TOKENS
    per_pair = max(0.0, (long_bytes / long - short_bytes / short) / (long - short))
    return Kept(short_bytes / short - per_pair * short, per_pair)


def _run(model: Any, tokens: int, *, fused: bool) -> list[_Record]:
    modules = find_decoder_layers(model)
    records = [_Record() for _ in modules]
    current: list[_Record] = []  # the layer being run, if any
    parameters = {_storage(tensor) for tensor in (*model.parameters(), *model.buffers())}

    def enter(record: _Record) -> Callable:
        def hook(_: nn.Module, arguments: tuple, keywords: dict) -> None:
            record.hidden = (arguments[0] if arguments else keywords["hidden_states"]).shape[-1]
            current[:] = [record]

        return hook

    def require(*tensors: Tensor) -> None:
        if current:
            current[0].required.update({_storage(tensor): tensor for tensor in tensors})

    def see_linear(name: str, rank: int) -> Callable:
        def hook(_: nn.Module, arguments: tuple, output: Any) -> None:
            if current and isinstance(output, Tensor):  # a router's answer is none
                uses, inputs = current[0].linears, arguments[0]
                uses.append(LinearUse(name, inputs.shape[-1], output.shape[-1], rank))
                current[0].outputs[_storage(output)] = output
                if rank:
                    require(inputs)

        return hook

    def keep(tensor: Tensor) -> Tensor:
        if current and _storage(tensor) not in parameters:
            current[0].saved[_storage(tensor)] = tensor
        return tensor

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = _Attention.apply(query, key, value)
        require(query, key, value, output)
        if current:
            current[0].keys_and_values += key.shape[1] * (key.shape[3] + value.shape[3])
        return output

    ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    with _hooks() as handles, _traced_attention(model, attend) as mask:
        linears = [name.removesuffix(".base_layer") for name in linear_names(model)]
        for module, record in zip(modules, records, strict=True):
            handles.append(module.register_forward_pre_hook(enter(record), with_kwargs=True))
            handles.append(module.register_forward_hook(lambda *_: current.clear()))
        for name in linears:
            module = model.get_submodule(name)
            rank = next((part.weight.shape[0] for part in getattr(module, "lora_A", {}).values()), 0)
            if fused and _is_plain(module):
                handles.append(_Fused(module, rank))
            handles.append(module.register_forward_hook(see_linear(base_name(name), rank)))
        for module in _norms(modules, {model.get_submodule(name) for name in linears}):
            handles.append(module.register_forward_pre_hook(lambda _, arguments: require(arguments[0])))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(input_ids=ids, use_cache=False, **mask(ids))
    return records


def _norms(layers: list[nn.Module], linears: set[nn.Module]) -> list[nn.Module]:
    """Modules with parameters of their own that are no linear layers, nor inside one."""
    inside = {part for linear in linears for part in linear.modules()}
    return [
        module
        for layer in layers
        for module in layer.modules()
        if module not in inside and any(True for _ in module.parameters(recurse=False)) and not list(module.children())
    ]


def _is_plain(module: Any) -> bool:
    base = getattr(module, "base_layer", module)
    return type(base) in (nn.Linear, Conv1D) or type(base).__name__ in PLAIN_LINEAR_SUBCLASSES


class _Fused:
    """Gives a linear with its adapter the forward of the fused op, until `remove`."""

    def __init__(self, module: Any, rank: int) -> None:
        base = getattr(module, "base_layer", module)
        out_features = base.out_features if hasattr(base, "out_features") else base.nf  # Conv1D
        parts = [next(iter(getattr(module, name).values())).weight for name in ("lora_A", "lora_B")] if rank else []
        self.module = module
        module.forward = lambda x, *_, **__: _FusedLinear.apply(x, out_features, *parts)

    def remove(self) -> None:
        """Gives the module its own forward back."""
        del self.module.forward


class _FusedLinear(torch.autograd.Function):
    """Shapes of `kernels.linear`: keeps the input and its rank-sized projection where there is an adapter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, out_features: int, *adapter: Tensor) -> Tensor:
        if adapter:
            ctx.save_for_backward(x, x.new_empty(*x.shape[:-1], adapter[0].shape[0]))
        return x.new_empty(*x.shape[:-1], out_features)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        raise NotImplementedError("a trace has no backward pass")


class _Attention(torch.autograd.Function):
    """Shapes of flash attention: keeps its inputs, its output and one float32 a head and token."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        rows, heads, tokens, _ = query.shape
        output = query.new_empty(rows, tokens, heads, value.shape[3]).transpose(1, 2)  # the layout flash attention has
        ctx.save_for_backward(query, key, value, output, query.new_empty(rows, heads, tokens, dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        raise NotImplementedError("a trace has no backward pass")


class _CatchAttention(TorchFunctionMode):
    """Architectures outside the attention interface call torch's attention themselves."""

    def __init__(self, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.attend = attend

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is nn.functional.scaled_dot_product_attention:
            query, key, value = (*args, *(kwargs or {}).values())[:3]
            return self.attend(query, key, value)
        return func(*args, **(kwargs or {}))


@contextmanager
def _traced_attention(model: Any, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Iterator[Callable]:
    """Puts `attend` in the place of attention; yields what to pass beside the token ids."""

    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **_: Any) -> tuple:
        return attend(query, key, value).transpose(1, 2), None

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    before = base.config._attn_implementation
    if base._can_set_attn_implementation():
        AttentionInterface.register(TRACED_ATTENTION, attention)  # it has no mask function: masks become None
        base.set_attn_implementation(TRACED_ATTENTION)
        try:
            yield lambda ids: {}
        finally:
            base.set_attn_implementation(before)
    else:
        with _CatchAttention(attend):
            # A mask that is given keeps transformers from looking at position ids that have no values.
            yield lambda ids: {"attention_mask": torch.ones_like(ids)} if before == "eager" else {}


@contextmanager
def _hooks() -> Iterator[list[Any]]:
    """A list of handles that are all removed at the end."""
    handles: list[Any] = []
    try:
        yield handles
    finally:
        for handle in handles:
            handle.remove()


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
