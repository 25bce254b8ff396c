"""Meta kernels of fused ops, and the bytes of the tensors alive while a model runs on them.

A meta kernel computes shapes alone. It saves for its backward pass, and allocates on the way, what the real op does.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from math import inf
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface

from qlora_cli.kernels.attention import DenseGradient

TRACED_ATTENTION = "qlora_traced"


def storage_key(tensor: Tensor) -> int:
    """The same for all views of one storage, while it lives."""
    return tensor.untyped_storage()._cdata


class LiveBytes(TorchDispatchMode):
    """While active, counts every storage made, on any device, from its making to its end, what autograd holds included."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0  # that ran
        self.now_bytes = 0  # alive at this moment
        # By the bytes of scratch memory in use (see `mark`), the most that was alive beside it.
        self.highest_bytes: dict[int, int] = {0: 0}
        self._sizes: dict[int, int] = {}

    def restart(self) -> dict[int, int]:
        """Starts the highest moments anew from here, and returns what they were."""
        before, self.highest_bytes = self.highest_bytes, {0: self.now_bytes}
        return before

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations += 1
        given = {storage_key(value) for value in args if isinstance(value, Tensor)}
        for value in result if isinstance(result, tuple | list) else (result,):
            # A view of what was there before, such as a transposed weight, is not new.
            if isinstance(value, Tensor) and storage_key(value) not in given:
                self._count(value.untyped_storage())
        self.mark(0)
        return result

    def mark(self, scratch_bytes: int) -> None:
        """Notes the present moment, at which so much scratch memory, not counted here, is in use as well."""
        self.highest_bytes[scratch_bytes] = max(self.highest_bytes.get(scratch_bytes, 0), self.now_bytes)

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.now_bytes += storage.nbytes()
            weakref.finalize(storage, self._discount, key)

    def _discount(self, key: int) -> None:
        self.now_bytes -= self._sizes.pop(key)


class FixedBytes(int):
    """Bytes of scratch memory that no plan makes smaller: of dequantised experts, or of a tile of tokens."""


@dataclass(frozen=True)
class Growth:
    """Bytes that grow with a micro-batch: so many a token, and so many a pair of tokens of one row."""

    per_token: float
    per_pair: float = 0.0  # of the scores of attention that is no fused op

    def bytes(self, tokens: int, row_tokens: int) -> float:
        """Bytes of `tokens` in rows of `row_tokens`."""
        return tokens * (self.per_token + self.per_pair * row_tokens)


@dataclass(frozen=True)
class Peak:
    """Highest moments of a pass: with so many bytes of scratch memory in use, the most that was alive beside it."""

    moments: tuple[tuple[int, Growth], ...]

    def bytes(self, tokens: int, row_tokens: int, most_scratch: float = inf) -> float:
        """Bytes at the highest moment, where no more scratch memory than `most_scratch` is used."""
        return max(
            (scratch if isinstance(scratch, FixedBytes) else min(scratch, most_scratch))
            + growth.bytes(tokens, row_tokens)
            for scratch, growth in self.moments
        )


def fit_growth(traces: Sequence[Any], tokens: Sequence[int], *, pairs: bool) -> Any:
    """One trace from those of two lengths: growth with the tokens, and either growth with their square or what does not
    grow, which is left out."""
    short, long = traces
    if isinstance(short, Growth):
        if not pairs:
            grown = long.per_token * tokens[1] - short.per_token * tokens[0]
            return Growth(max(0.0, grown / (tokens[1] - tokens[0])))
        per_pair = max(0.0, (long.per_token - short.per_token) / (tokens[1] - tokens[0]))
        return Growth(short.per_token - per_pair * tokens[0], per_pair)
    if isinstance(short, tuple):
        return tuple(fit_growth(parts, tokens, pairs=pairs) for parts in zip(short, long, strict=True))
    if is_dataclass(short):
        names = [part.name for part in fields(short)]
        parts = {n: fit_growth((getattr(short, n), getattr(long, n)), tokens, pairs=pairs) for n in names}
        return replace(short, **parts)  # type: ignore[type-var]
    return short


class Tiled(torch.autograd.Function):
    """`tiling.token_tiles`: keeps its input, and has a tile's own memory beside its output or its input's gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, out: Tensor, tile_bytes: tuple[int, int], live: LiveBytes, *parameters: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.parameters, ctx.backward_bytes, ctx.live = parameters, tile_bytes[1], live
        result = x.new_empty(*x.shape[:2], *out.shape[2:], dtype=out.dtype)
        live.mark(FixedBytes(tile_bytes[0]))
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        grad_x = x.new_empty(x.shape) if ctx.needs_input_grad[0] else None
        ctx.live.mark(FixedBytes(ctx.backward_bytes))
        return grad_x, None, None, None, *(p.new_empty(p.shape) for p in ctx.parameters)


class Linear(torch.autograd.Function):
    """`kernels.linear`, or without an adapter bitsandbytes' linear: a dequantised weight is there while it computes."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, out_features: int, dropout: float, live: LiveBytes, a: Tensor | None, b: Tensor | None
    ) -> Tensor:
        ctx.weight_bytes = x.shape[-1] * out_features * x.element_size()
        ctx.dropout, ctx.live, ctx.adapter = dropout, live, None if a is None or b is None else (a, b)
        ctx.in_shape = x.shape
        y = x.new_empty(*x.shape[:-1], out_features)
        live.mark(ctx.weight_bytes)
        if a is not None:
            dropped = x.new_empty(x.shape) if dropout else None
            ctx.save_for_backward(x, x.new_empty(*x.shape[:-1], a.shape[0]))
            del dropped
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient, parts = gradients[0], (None, None)
        if ctx.adapter is not None:
            x, projected = ctx.saved_tensors
            projection = projected.new_empty(projected.shape)  # its gradient
            dropped = x.new_empty(x.shape) if ctx.dropout else None
            parts = tuple(part.new_empty(part.shape) for part in ctx.adapter)
            del dropped, projection
        x = None
        if ctx.needs_input_grad[0]:
            x = gradient.new_empty(ctx.in_shape)
            ctx.live.mark(ctx.weight_bytes)
        return x, None, None, None, *parts


class Attention(torch.autograd.Function):
    """Flash or cuDNN attention: keeps its inputs, its output and one float32 a head and token. In the backward pass it
    goes over the heads in so many groups."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, groups: int = 1) -> Tensor:
        ctx.groups = groups
        rows, heads, tokens, size = query.shape
        # Both lay the output out like the query. Head by head, as where part of each head is rotated and both parts
        # are put together anew, the model copies it for its output projection: both the copy and this are kept.
        output = (
            torch.empty_like(query) if value.shape[3] == size else query.new_empty(*query.shape[:3], value.shape[3])
        )
        ctx.save_for_backward(query, key, value, output, query.new_empty(rows, heads, tokens, dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, _, _ = ctx.saved_tensors
        # Flash's backward pass accumulates the query's gradient in float32; a group's results are copied.
        heads = query.shape[1] // ctx.groups
        accumulator = query.new_empty(query.shape[0], heads, *query.shape[2:], dtype=torch.float32)
        results = tuple(tensor.new_empty(tensor.shape) for tensor in (query, key, value))
        parts = [query.new_empty(accumulator.shape) for _ in range(3)] if ctx.groups > 1 else []
        del accumulator, parts
        return *results, None


def attend_in_groups(query: Tensor, key: Tensor, value: Tensor, groups: int, *, at_once: bool) -> Tensor:
    """Attention as `kernels.attention` does it in long rows: one op (`at_once`), or one of torch's for each group."""
    if at_once or groups == 1:
        return Attention.apply(query, key, value, groups)
    given = zip(*(t.chunk(groups, 1) for t in (query, key, value)), strict=True)
    parts = [Attention.apply(*(t.transpose(1, 2).contiguous().transpose(1, 2) for t in part)) for part in given]
    return torch.cat([DenseGradient.apply(part.transpose(1, 2)) for part in parts], 2).transpose(1, 2)


class Loss(torch.autograd.Function):
    """`kernels.cross_entropy`: the gradient of the hidden states is made chunk by chunk in the forward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, chunk_bytes: int, live: LiveBytes) -> Tensor:
        gradient = hidden.new_empty(hidden.shape)
        live.mark(chunk_bytes)
        ctx.save_for_backward(gradient)
        return hidden.new_empty((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0], None, None


class Source(torch.autograd.Function):
    """What comes before a layer: a tensor that requires a gradient, and whoever drops it frees it."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return anchor.new_empty(shape, dtype=dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return gradients[0].new_empty(()), None, None


class Sink(torch.autograd.Function):
    """What comes after a layer: keeps nothing, and hands a gradient back."""

    @staticmethod
    def forward(ctx: Any, output: Tensor) -> Tensor:
        ctx.shape, ctx.dtype = output.shape, output.dtype
        return output.new_empty(())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return (gradients[0].new_empty(ctx.shape, dtype=ctx.dtype),)


class CatchAttention(TorchFunctionMode):
    """While active, replaces torch's attention by `attend`: architectures outside transformers' interface call it."""

    def __init__(self, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.attend = attend

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is nn.functional.scaled_dot_product_attention:
            query, key, value = (*args, *(kwargs or {}).values())[:3]
            return self.attend(query, key, value)
        return func(*args, **(kwargs or {}))


@contextmanager
def replace_attention(base: Any, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Iterator[bool]:
    """Replaces a model's attention by `attend` where the model asks transformers for it.

    Args:
        attend: (rows, heads, tokens, size) of query, key and value to those of the output.

    Yields:
        Whether a mask has to be given: without one, eager attention looks at positions that have no values here.
    """

    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **_: Any) -> tuple:
        return attend(query, key, value).transpose(1, 2), None

    before = base.config._attn_implementation
    if not base._can_set_attn_implementation():
        yield before == "eager"
        return
    AttentionInterface.register(TRACED_ATTENTION, attention)  # it has no mask function: masks become None
    base.set_attn_implementation(TRACED_ATTENTION)
    try:
        yield False
    finally:
        base.set_attn_implementation(before)


@contextmanager
def replace_methods(forwards: dict[Any, Callable], method: str = "forward") -> Iterator[None]:
    """Replaces the forward, or another method, of module instances."""
    for module, forward in forwards.items():
        vars(module)[method] = forward
    try:
        yield
    finally:
        for module in forwards:
            del vars(module)[method]
