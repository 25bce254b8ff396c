"""Packed (variable-length) attention: causal attention within each of the rows that a pack holds end to end, also with
sinks, and with scores that are capped.

On CUDA, rows of unequal lengths go through one opaque op: torch's variable-length flash attention, or a kernel of our
own where no row is long. Rows of one length go through cuDNN's attention, the fastest on Hopper, which knows no
boundaries inside a row.
"""

import functools
import importlib.util
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_cli.kernels.sink_attention import add_sinks, chunked_attention, sink_gradient

_HAS_TRITON = importlib.util.find_spec("triton") is not None  # not beside a CPU-only torch
if _HAS_TRITON:
    from qlora_cli.kernels.triton import capped_attention, short_attention

_aten = torch.ops.aten
CUDNN_HEAD_SIZES = frozenset({64, 96, 128})
# In longer rows heads go to the libraries' kernels in groups, one after the other. A group of four heads fills a card by
# then; what the backward pass has beside its results, the queries' gradient in fp32 and a key's gradient for each head,
# some 4 tensors like the queries, is there for one group; and no offset in a group comes near 2^31.
LONG_ROW_TOKENS, MOST_GROUPS = 16_384, 8


def takes_caps(size: int) -> bool:
    """Whether scores of heads of this size may be capped on a card."""
    return _HAS_TRITON and size <= capped_attention.LARGEST_HEAD


def is_short(longest: int) -> bool:
    """Whether rows of at most so many tokens may have a kernel of their own."""
    return _HAS_TRITON and longest <= short_attention.LONGEST


def head_groups(key_heads: int, longest: int) -> int:
    """In how many groups of heads rows of at most `longest` tokens are attended to, one after the other."""
    most = MOST_GROUPS if longest > LONG_ROW_TOKENS else 1
    return next(count for count in range(most, 0, -1) if key_heads % count == 0)


@torch.library.custom_op("qlora::packed_attention", mutates_args=())
def _attention_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    boundaries: Tensor,
    longest: int,
    scale: float,
    window: int | None,
    cap: float | None,
) -> tuple[Tensor, Tensor]:
    if cap is not None:
        out, lse = capped_attention.attend(query, key, value, boundaries, longest, scale, window, cap)
        return out, (lse if sinks is None else add_sinks(out, lse, sinks)).flatten()
    if short_attention.covers(query, key, value, longest, window):
        out, lse = short_attention.attend(query, key, value, boundaries, longest, scale)
        return out, (lse if sinks is None else add_sinks(out, lse, sinks)).flatten()
    groups = head_groups(key.shape[1], longest)
    if groups == 1:
        out, lse = _flash(query, key, value, boundaries, longest, scale, window)
    else:
        out, log_sums = query.new_empty(query.shape), []
        given = zip(*(t.chunk(groups, 1) for t in (query, key, value, out)), strict=True)
        for q, k, v, own in given:
            part, lse = _flash(q, k, v, boundaries, longest, scale, window)
            own.copy_(part)
            log_sums.append(lse)
        lse = torch.cat(log_sums)
    return out, (lse if sinks is None else add_sinks(out, lse, sinks)).flatten()


@_attention_op.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    boundaries: Tensor,
    longest: int,
    scale: float,
    window: int | None,
    cap: float | None,
) -> tuple[Tensor, Tensor]:
    out = query.new_empty(query.shape)
    lse = query.new_empty(query.shape[0] * query.shape[1], dtype=torch.float32)
    return out, lse


@torch.library.custom_op("qlora::packed_attention_backward", mutates_args=())
def _attention_backward_op(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    boundaries: Tensor,
    longest: int,
    scale: float,
    window: int | None,
    cap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, heads, _ = query.shape
    if cap is not None:
        saved = (query, key, value, out, lse.view(heads, tokens), boundaries)
        return capped_attention.attend_backward(grad, *saved, longest, scale, window, cap)
    if short_attention.covers(query, key, value, longest, window):
        return short_attention.attend_backward(grad, query, key, value, out, lse, boundaries, longest, scale)
    groups = head_groups(key.shape[1], longest)
    given = (grad, query, key, value, out, lse.view(heads, tokens))
    if groups == 1:
        return _flash_backward(given, boundaries, longest, scale, window)
    results = query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)
    by_heads = [(*t.chunk(groups, 0 if t is given[5] else 1),) for t in (*given, *results)]
    for *part, q, k, v in zip(*by_heads, strict=True):
        for own, found in zip((q, k, v), _flash_backward(tuple(part), boundaries, longest, scale, window), strict=True):
            own.copy_(found)
    return results


def _flash(
    query: Tensor, key: Tensor, value: Tensor, boundaries: Tensor, longest: int, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    """torch's flash attention: the output, and the log-sum-exp of the scores, (heads, tokens)."""
    out, lse, *_ = _aten._flash_attention_forward(
        query,
        key,
        value,
        boundaries,
        boundaries,
        longest,
        longest,
        0.0,
        window is None,
        False,
        scale=scale,
        **_flash_window(window),
    )
    return out.contiguous(), lse.reshape(query.shape[1], query.shape[0])


def _flash_backward(
    given: tuple[Tensor, ...], boundaries: Tensor, longest: int, scale: float, window: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Its gradients; `given` are the output's, the three inputs, the output and the log-sum-exp."""
    query = given[1]
    grads = _aten._flash_attention_backward(
        *given,
        boundaries,
        boundaries,
        longest,
        longest,
        0.0,
        window is None,
        query.new_zeros(2, dtype=torch.uint64),  # dropout's state: there is none
        query.new_empty(0),
        scale=scale,
        **_flash_window(window),
    )
    grad_query, grad_key, grad_value = (g.contiguous() for g in grads)
    return grad_query, grad_key, grad_value


def _flash_window(window: int | None) -> dict[str, int]:
    return {"window_size_left": -1 if window is None else window - 1, "window_size_right": -1 if window is None else 0}


@_attention_backward_op.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: object) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _save(ctx, inputs: tuple, output: tuple) -> None:
    query, key, value, sinks, boundaries, *ctx.constants = inputs
    ctx.save_for_backward(query, key, value, *output, boundaries, sinks)


def _differentiate(ctx, grad: Tensor, *_: Tensor) -> tuple:
    *saved, sinks = ctx.saved_tensors
    grad = grad.contiguous()
    grads = torch.ops.qlora.packed_attention_backward(grad, *saved, *ctx.constants)
    of_sinks = None
    if sinks is not None and ctx.needs_input_grad[3]:
        query, _, _, out, lse, _ = saved
        of_sinks = sink_gradient(grad, out, lse.view(query.shape[1], query.shape[0]), sinks)
    return (*grads, of_sinks, None, None, None, None, None)


_attention_op.register_autograd(_differentiate, setup_context=_save)


# What computes attention on a card, below autograd.
ATTENTION_OPS = frozenset({torch.ops.qlora.packed_attention.default, _aten._scaled_dot_product_cudnn_attention.default})


def equal_rows_attention(query: Tensor, key: Tensor, value: Tensor, rows: int, scale: float) -> Tensor:
    """`packed_attention` for rows of one length on CUDA, where cuDNN takes fewer keys than heads as they are.

    H200, 2 x 2,048 tokens, 32 heads of 128, 4 or 8 keys, both passes: 0.61 ms, flash 1.09.

    Not an op of ours: torch's own backward of this one takes an undefined bias, which Python cannot pass.
    """
    groups = head_groups(key.shape[1], len(query) // rows)
    if groups > 1:
        parts = zip(*(t.chunk(groups, 1) for t in (query, key, value)), strict=True)
        own = [[t.contiguous() for t in part] for part in parts]
        return torch.cat([DenseGradient.apply(_cudnn_attention(q, k, v, rows, scale)) for q, k, v in own], 1)
    return _cudnn_attention(query, key, value, rows, scale)


class DenseGradient(torch.autograd.Function):
    """Hands its input on, whose gradient is contiguous.

    PyTorch keeps cuDNN's plan of a backward pass by the inputs' shapes and strides, not by those of the output's gradient
    (aten/src/ATen/native/cudnn/MHA.cpp, 2.11). Of all heads together a group's gradient is a slice with the strides of their
    number: with another number, as where cards share a row, the plan of the first read other places, and beyond the end.
    """

    @staticmethod
    def forward(ctx: Any, out: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0].contiguous()


def _cudnn_attention(query: Tensor, key: Tensor, value: Tensor, rows: int, scale: float) -> Tensor:
    q, k, v = (t.unflatten(0, (rows, -1)).transpose(1, 2) for t in (query, key, value))  # (rows, heads, length, size)
    out = _aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, True, False, scale=scale)[0]
    return out.transpose(1, 2).reshape(query.shape)


@functools.cache
def groups_fit(heads: int, key_heads: int, size: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether cuDNN on this device takes so many heads a key, tried out: the same as flash attention, both passes."""
    rows, length = 2, 256
    generator = torch.Generator(device).manual_seed(0)
    shapes = [(rows * length, count, size) for count in (heads, key_heads, key_heads, heads)]
    drawn = [torch.randn(shape, generator=generator, dtype=dtype, device=device) for shape in shapes]
    query, key, value = inputs = [t.requires_grad_() for t in drawn[:3]]
    boundaries = length * torch.arange(rows + 1, dtype=torch.int32, device=device)

    def both_passes(out: Tensor) -> list[Tensor]:
        return [out, *torch.autograd.grad(out, inputs, drawn[3])]

    with torch.enable_grad():
        own = both_passes(packed_attention(query, key, value, boundaries, length, size**-0.5, None))
        try:
            found = both_passes(equal_rows_attention(query, key, value, rows, size**-0.5))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # a cuDNN that does not know them
            return False
    return all(bool((f - o).detach().norm() <= 0.02 * o.detach().norm()) for f, o in zip(found, own, strict=True))


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    boundaries: Tensor,
    longest: int,
    scale: float,
    window: int | None,
    sinks: Tensor | None = None,
    cap: float | None = None,
) -> Tensor:
    """Causal attention within each row of a pack, differentiable.

    Args:
        query: (tokens, heads, size); bf16 or fp16 on CUDA, anything on the CPU.
        key: (tokens, key heads, size); heads is a multiple of key heads.
        value: Like `key`.
        boundaries: (rows + 1,) int32 on the same device: where rows start, and the total.
        longest: Tokens of the longest row, or more.
        scale: Factor on the scores.
        window: A token sees itself and the window - 1 tokens before it; None for all.
        sinks: (heads,), a score each head gives to nothing; None for no sinks.
        cap: Scores become cap * tanh(score / cap); None for none.

    Returns:
        (tokens, heads, size).
    """
    if query.is_cuda or torch.compiler.is_compiling():
        # Flash gives its results the layout of its inputs: token by token, what follows needs no copy.
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        return torch.ops.qlora.packed_attention(query, key, value, sinks, boundaries, longest, scale, window, cap)[0]
    groups = query.shape[1] // key.shape[1]
    if sinks is not None or cap is not None:
        parts = []
        for start, end in pairwise(boundaries.tolist()):
            q, k, v = (t[None, start:end].transpose(1, 2) for t in (query, key, value))  # (1, heads, length, size)
            parts.append(chunked_attention(q, k, v, sinks, scale=scale, window=window, cap=cap))
        return torch.cat([part[0].transpose(0, 1) for part in parts])
    if groups > 1:
        key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))  # a key for each head
    rows = []
    for start, end in pairwise(boundaries.tolist()):
        q, k, v = (t[start:end].transpose(0, 1) for t in (query, key, value))  # (heads, length, size)
        mask = None
        if window is not None and end - start > LONG_ROW_TOKENS:  # of which no mask is to hold all pairs
            q, k, v = (t[None, start:end].transpose(1, 2) for t in (query, key, value))
            rows.append(chunked_attention(q, k, v, None, scale=scale, window=window)[0].transpose(0, 1))
            continue
        if window is not None and end - start > window:
            mask = torch.ones(end - start, end - start, dtype=torch.bool).tril().triu(1 - window)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)
        rows.append(out.transpose(0, 1))
    return torch.cat(rows)
