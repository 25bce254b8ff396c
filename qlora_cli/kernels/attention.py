"""Packed (variable-length) attention: causal attention within each of the rows that a pack holds end to end, also with
sinks, and with scores that are capped.

On CUDA, rows of unequal lengths go through one opaque op: torch's variable-length flash attention, or a kernel of our
own where no row or window is long. Rows of one length go through cuDNN's attention, the fastest on Hopper, which knows no
boundaries inside a row: by that op where there are sinks, which it brings in afterwards.
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
    from qlora_cli.kernels.triton import block_attention, short_attention

_aten = torch.ops.aten
CUDNN_HEAD_SIZES = frozenset({64, 96, 128})
# In longer rows heads go to the libraries' kernels in groups, one after the other. A group of four heads fills a card by
# then; what the backward pass has beside its results, the queries' gradient in fp32 and a key's gradient for each head,
# some 4 tensors like the queries, is there for one group; and no offset in a group comes near 2^31.
LONG_ROW_TOKENS, MOST_GROUPS = 16_384, 8
TRIAL_TOKENS = 256


def takes_caps(size: int) -> bool:
    """Whether scores of heads of this size may be capped on a card."""
    return _HAS_TRITON and size <= block_attention.LARGEST_HEAD


def kernels_of(longest: int) -> int:
    """Which kernels rows of at most so many tokens may have: a number for each that there are."""
    return (
        sum(longest > most for most in (short_attention.LONGEST, block_attention.LONGEST_UNCAPPED))
        if _HAS_TRITON
        else 0
    )


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
    equal_rows: bool,
) -> tuple[Tensor, Tensor]:
    groups = head_groups(key.shape[1], longest)
    if short_attention.covers(query, key, value, longest, window) and cap is None:
        out, lse = short_attention.attend(query, key, value, boundaries, longest, scale)
    elif block_attention.covers(query, value, longest, window, cap):
        out, lse = block_attention.attend(query, key, value, boundaries, longest, scale, window, cap)
    elif cap is not None:
        raise ValueError("no kernel caps the scores of such heads")
    elif equal_rows and _sees_all(longest, window):
        out, lse = _cudnn(query, key, value, longest, scale)
    elif groups == 1:
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
def _(query: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
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
    equal_rows: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, heads, _ = query.shape
    groups = head_groups(key.shape[1], longest)
    given = (grad, query, key, value, out, lse.view(heads, tokens))
    if short_attention.covers(query, key, value, longest, window) and cap is None:
        return short_attention.attend_backward(*given, boundaries, longest, scale)
    if block_attention.covers(query, value, longest, window, cap):
        return block_attention.attend_backward(*given, boundaries, longest, scale, window, cap)
    if equal_rows and _sees_all(longest, window):
        return _cudnn_backward(given, longest, scale)
    if groups == 1:
        return _flash_backward(given, boundaries, longest, scale, window)
    results = query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)
    by_heads = [(*t.chunk(groups, 0 if t is given[5] else 1),) for t in (*given, *results)]
    for *part, q, k, v in zip(*by_heads, strict=True):
        for own, found in zip((q, k, v), _flash_backward(tuple(part), boundaries, longest, scale, window), strict=True):
            own.copy_(found)
    return results


def _sees_all(longest: int, window: int | None) -> bool:
    """Whether cuDNN attends to rows of one length whose heads it takes: all at once, and no window ends inside them."""
    return longest <= LONG_ROW_TOKENS and (window is None or window >= longest)


def _in_rows(longest: int, *tensors: Tensor) -> list[Tensor]:
    """(tokens, heads, size) as (rows, heads, longest, size), views."""
    return [t.unflatten(0, (-1, longest)).transpose(1, 2) for t in tensors]


def _cudnn(query: Tensor, key: Tensor, value: Tensor, longest: int, scale: float) -> tuple[Tensor, Tensor]:
    """cuDNN's attention to rows of one length: the output, and the log-sum-exp of the scores, (heads, tokens)."""
    inputs = _in_rows(longest, query, key, value)
    out, lse, *_ = _aten._scaled_dot_product_cudnn_attention(*inputs, None, True, 0.0, True, False, scale=scale)
    lse = lse.view(-1, query.shape[1], longest).transpose(0, 1).reshape(query.shape[1], -1)
    return out.transpose(1, 2).reshape(query.shape), lse


def _cudnn_backward(given: tuple[Tensor, ...], longest: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Its gradients; `given` are the output's, the three inputs, the output and the log-sum-exp."""
    grad, query, key, value, out, lse = given
    sums = lse.unflatten(1, (-1, longest)).transpose(0, 1).contiguous()[..., None]  # (rows, heads, longest, 1)
    state = query.new_zeros((), dtype=torch.int64)  # dropout's: there is none
    # A bias or boundaries that there are none of are undefined tensors, which autograd's own layer takes from no one.
    with torch._C._AutoDispatchBelowAutograd():
        grads = _aten._scaled_dot_product_cudnn_attention_backward(
            *_in_rows(longest, grad, query, key, value, out),
            sums,
            state,
            state,
            None,
            None,
            None,
            longest,
            longest,
            0.0,
            True,
            scale=scale,
        )
    of_query, of_key, of_value = (g.transpose(1, 2).flatten(0, 1).contiguous() for g in grads)
    return of_query, of_key, of_value


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
    return (*grads, of_sinks, None, None, None, None, None, None)


_attention_op.register_autograd(_differentiate, setup_context=_save)


# What computes attention on a card, below autograd.
ATTENTION_OPS = frozenset({torch.ops.qlora.packed_attention.default, _aten._scaled_dot_product_cudnn_attention.default})


def equal_rows_attention(query: Tensor, key: Tensor, value: Tensor, rows: int, scale: float) -> Tensor:
    """`packed_attention` for rows of one length on CUDA, where cuDNN takes fewer keys than heads as they are.

    H200, 2 x 2,048 tokens, 32 heads of 128, 4 or 8 keys, both passes: 0.61 ms, flash 1.09.

    Differentiated by torch: without sinks, what its backward pass is given is what its forward pass gave.
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
    """Whether cuDNN on this device takes so many heads a key, tried out: the same as by boundaries, both passes."""
    (query, key, value), grad, boundaries = _trial(heads, key_heads, size, dtype, device)
    inputs = [t.requires_grad_() for t in (query, key, value)]

    def both_passes(out: Tensor) -> list[Tensor]:
        return [out, *torch.autograd.grad(out, inputs, grad)]

    with torch.enable_grad():
        own = both_passes(packed_attention(query, key, value, boundaries, TRIAL_TOKENS, size**-0.5, None))
        try:
            found = both_passes(equal_rows_attention(query, key, value, boundaries.numel() - 1, size**-0.5))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # a cuDNN that does not know them
            return False
    return _are_alike(found, own)


@functools.cache
def sinks_fit(heads: int, key_heads: int, size: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether cuDNN on this device does with sinks what attention over chunks does, tried out, both passes."""
    if device.type != "cuda" or size not in CUDNN_HEAD_SIZES:
        return False
    inputs, grad, _ = _trial(heads, key_heads, size, dtype, device)
    sinks = torch.linspace(-4.0, 4.0, heads, dtype=dtype, device=device)
    try:
        out, lse = _cudnn(*inputs, TRIAL_TOKENS, size**-0.5)
        given = (grad, *inputs, out, add_sinks(out, lse, sinks))
        found = [out, *_cudnn_backward(given, TRIAL_TOKENS, size**-0.5)]
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, AttributeError):  # a PyTorch or a cuDNN that does not take them so
        return False
    with torch.enable_grad():
        leaves = [t.requires_grad_() for t in inputs]
        query, key, value = _in_rows(TRIAL_TOKENS, *leaves)
        own = chunked_attention(query, key, value, sinks, scale=size**-0.5).transpose(1, 2).flatten(0, 1)
        return _are_alike(found, [own, *torch.autograd.grad(own, leaves, grad)])


def _trial(
    heads: int, key_heads: int, size: int, dtype: torch.dtype, device: torch.device
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor, Tensor]:
    """Query, key and value of two rows of `TRIAL_TOKENS` each, a gradient of the output, and the rows' boundaries."""
    rows, generator = 2, torch.Generator(device).manual_seed(0)
    shapes = [(rows * TRIAL_TOKENS, count, size) for count in (heads, key_heads, key_heads, heads)]
    drawn = (torch.randn(shape, generator=generator, dtype=dtype, device=device) for shape in shapes)
    query, key, value, grad = drawn
    return (query, key, value), grad, TRIAL_TOKENS * torch.arange(rows + 1, dtype=torch.int32, device=device)


def _are_alike(found: list[Tensor], own: list[Tensor]) -> bool:
    pairs = zip(found, own, strict=True)
    return all(bool((f - o).detach().norm() <= 0.02 * o.detach().norm()) for f, o in pairs)


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
    *,
    equal_rows: bool = False,
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
        equal_rows: All rows are of `longest` tokens, and others of their number and length are to come: with sinks, and
            heads that `sinks_fit`, they then go to cuDNN, which makes a plan of each shape.

    Returns:
        (tokens, heads, size).
    """
    if query.is_cuda or torch.compiler.is_compiling():
        # Flash gives its results the layout of its inputs: token by token, what follows needs no copy.
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        given = query, key, value, sinks, boundaries, longest, scale, window, cap, equal_rows and sinks is not None
        return torch.ops.qlora.packed_attention(*given)[0]
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
