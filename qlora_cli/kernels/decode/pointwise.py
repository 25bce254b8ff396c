"""Norms, rotary embeddings and gates of a decoder layer, one launch each, for any number of tokens."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlora_cli.kernels.decode.overlap import follow, overlaps
from qlora_cli.kernels.triton.activations import activate


def _warps(size: int) -> int:
    """A power of two, as Triton asks for: one for each 512 values, at most eight."""
    return 1 << max(1, min(8, size // 512)).bit_length() - 1


@triton.jit
def weigh(values, factor, offset, x, ROUND_FIRST: tl.constexpr):
    """fp32 values of a normalised row of x, times its weight."""
    if ROUND_FIRST:
        # As llama has it: rounded to the dtype of x, then multiplied in that dtype.
        result = values.to(x.dtype.element_ty).to(tl.float32) * factor.to(tl.float32)
    else:
        result = values * (factor.to(tl.float32) + offset)
    return result


@triton.jit
def _normalise(
    x,
    weight,
    out,
    x_group,
    x_row,
    group,
    epsilon,
    offset,
    SIZE: tl.constexpr,
    SIZE_ROOM: tl.constexpr,
    ROUND_FIRST: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, SIZE_ROOM)
    used = place < SIZE
    factor = tl.load(weight + place, mask=used, other=0.0)
    if OVERLAP:
        follow()
    start = (row // group) * x_group + (row % group) * x_row
    values = tl.load(x + start + place, mask=used, other=0.0).to(tl.float32)
    values *= tl.rsqrt(tl.sum(values * values, 0) / SIZE + epsilon)
    result = weigh(values, factor, offset, x, ROUND_FIRST)
    tl.store(out + row * SIZE + place, result.to(out.dtype.element_ty), mask=used)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, *, offset: float = 0.0, round_first: bool = True) -> Tensor:
    """x / sqrt(mean(x²) + epsilon), times (weight + offset) (https://arxiv.org/abs/1910.07467).

    Args:
        x: (..., size), a view whose last dimension is contiguous; heads that are a part of a wider row are read in place.
        weight: (size,) in the dtype of x.
        epsilon: Added to the mean square.
        offset: 1 where weights are stored as their distance from 1, as in gemma.
        round_first: Whether the normalised value is rounded to the dtype of x before it is multiplied.

    Returns:
        (..., size), contiguous, in the dtype of x.
    """
    size, out = x.shape[-1], x.new_empty(x.shape)
    x, group = _grouped(x)
    with torch.cuda.device_of(x):
        _normalise[(out.numel() // size,)](
            x,
            weight,
            out,
            x.stride(0),
            x.stride(1),
            group,
            epsilon,
            offset,
            SIZE=size,
            SIZE_ROOM=triton.next_power_of_2(size),
            ROUND_FIRST=round_first,
            OVERLAP=overlaps(x.device),
            num_warps=_warps(size),
            launch_pdl=overlaps(x.device),
        )
    return out


@triton.jit
def _add_and_normalise(
    x,
    y,
    weight,
    total,
    out,
    epsilon,
    offset,
    SIZE: tl.constexpr,
    SIZE_ROOM: tl.constexpr,
    ROUND_FIRST: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, SIZE_ROOM)
    used = place < SIZE
    factor = tl.load(weight + place, mask=used, other=0.0)
    if OVERLAP:
        follow()
    values = tl.load(x + row * SIZE + place, mask=used, other=0.0).to(tl.float32)
    values += tl.load(y + row * SIZE + place, mask=used, other=0.0).to(tl.float32)
    values = values.to(x.dtype.element_ty)
    tl.store(total + row * SIZE + place, values, mask=used)
    values = values.to(tl.float32)
    values *= tl.rsqrt(tl.sum(values * values, 0) / SIZE + epsilon)
    result = weigh(values, factor, offset, x, ROUND_FIRST)
    tl.store(out + row * SIZE + place, result.to(out.dtype.element_ty), mask=used)


def add_and_rms_norm(
    x: Tensor, y: Tensor, weight: Tensor, epsilon: float, *, offset: float = 0.0, round_first: bool = True
) -> tuple[Tensor, Tensor]:
    """x + y, rounded to their dtype, and `rms_norm` of that.

    Args:
        x: (..., size), contiguous.
        y: Like `x`.
        weight: As for `rms_norm`, like what follows.

    Returns:
        Both (..., size), contiguous, in the dtype of x.
    """
    size, total, out = x.shape[-1], torch.empty_like(x), torch.empty_like(x)
    with torch.cuda.device_of(x):
        _add_and_normalise[(out.numel() // size,)](
            x,
            y,
            weight,
            total,
            out,
            epsilon,
            offset,
            SIZE=size,
            SIZE_ROOM=triton.next_power_of_2(size),
            ROUND_FIRST=round_first,
            OVERLAP=overlaps(x.device),
            num_warps=_warps(size),
            launch_pdl=overlaps(x.device),
        )
    return total, out


def _grouped(x: Tensor) -> tuple[Tensor, int]:
    """Rows of x as (groups, rows of a group, size), without a copy where strides allow it, and the rows of a group."""
    size = x.shape[-1]
    for group in (x.numel() // size, x.shape[-2] if x.dim() > 1 else 1):
        try:
            return x.view(-1, group, size), group
        except RuntimeError:  # not with these strides
            continue
    return x.reshape(1, -1, size), x.numel() // size


@triton.jit
def _centre(
    x,
    weight,
    bias,
    out,
    x_row,
    epsilon,
    SIZE: tl.constexpr,
    SIZE_ROOM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, SIZE_ROOM)
    used = place < SIZE
    if OVERLAP:
        follow()
    values = tl.load(x + row * x_row + place, mask=used, other=0.0).to(tl.float32)
    values = tl.where(used, values - tl.sum(values, 0) / SIZE, 0.0)
    values *= tl.rsqrt(tl.sum(values * values, 0) / SIZE + epsilon)
    values *= tl.load(weight + place, mask=used, other=0.0).to(tl.float32)
    if HAS_BIAS:
        values += tl.load(bias + place, mask=used, other=0.0).to(tl.float32)
    tl.store(out + row * SIZE + place, values.to(out.dtype.element_ty), mask=used)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float) -> Tensor:
    """(x - mean) / sqrt(variance + epsilon), times weight, plus bias (https://arxiv.org/abs/1607.06450).

    torch's own takes 11 µs for one row of 6,144 on an H200; the RMS norm above takes 1.8 µs for one of 4,096.

    Args:
        x: (..., size), a view whose last dimension is contiguous and whose others are one row after another.
        weight: (size,).
        bias: (size,) or None.
        epsilon: Added to the variance.

    Returns:
        (..., size), contiguous, in the dtype of x.
    """
    flat, out = x.reshape(-1, x.shape[-1]), x.new_empty(x.shape)
    rows, size = flat.shape
    with torch.cuda.device_of(x):
        _centre[(rows,)](
            flat,
            weight,
            bias,
            out,
            flat.stride(0),
            epsilon,
            SIZE=size,
            SIZE_ROOM=triton.next_power_of_2(size),
            HAS_BIAS=bias is not None,
            OVERLAP=overlaps(flat.device),
            num_warps=_warps(size),
            launch_pdl=overlaps(flat.device),
        )
    return out


@triton.jit
def _rotate(
    x,
    y,
    cos,
    sin,
    out_x,
    out_y,
    x_row,
    x_head,
    x_token,
    y_row,
    y_head,
    y_token,
    cos_row,
    tokens,
    x_heads,
    y_heads,
    SIZE: tl.constexpr,
    ROTATED: tl.constexpr,
    ROOM: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One head of one token, of x or of y: pairs (i, i + ROTATED / 2) turn, what is beyond ROTATED stays."""
    if OVERLAP:
        follow()
    row = (tl.program_id(0) // tokens).to(tl.int64)
    token = (tl.program_id(0) % tokens).to(tl.int64)  # a long prompt's projection has more than 2^31 values
    head = tl.program_id(1)
    half: tl.constexpr = ROTATED // 2
    place = tl.arange(0, ROOM)
    used = place < SIZE
    turned = place < ROTATED
    other = tl.where(place < half, place + half, place - half)
    angle = cos_row * row + token * ROTATED + place
    c = tl.load(cos + angle, mask=turned, other=1.0)
    s = tl.load(sin + angle, mask=turned, other=0.0)
    s = tl.where(place < half, -s, s)
    if head < x_heads:
        source = x + row * x_row + head * x_head + token * x_token
        target = out_x + ((row * x_heads + head) * tokens + token) * SIZE
    else:
        source = y + row * y_row + (head - x_heads) * y_head + token * y_token
        target = out_y + ((row * y_heads + head - x_heads) * tokens + token) * SIZE
    mine = tl.load(source + place, mask=used, other=0.0)
    theirs = tl.load(source + other, mask=turned, other=0.0)
    # Each product is rounded before the sum, as where the steps are launched one by one; on Hopper the compiler leaves
    # that out in bfloat16, which is nearer the exact value.
    first = (mine.to(tl.float32) * c.to(tl.float32)).to(mine.dtype).to(tl.float32)
    second = (theirs.to(tl.float32) * s.to(tl.float32)).to(mine.dtype).to(tl.float32)
    tl.store(target + place, (first + second).to(mine.dtype), mask=used)


def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary position embedding of query and key in halves (https://arxiv.org/abs/2104.09864).

    Args:
        query: (rows, heads, tokens, size), last dimension contiguous.
        key: (rows, key heads, tokens, size), likewise.
        cos: (rows or 1, tokens, rotated), contiguous; rotated is at most size.
        sin: Like `cos`.

    Returns:
        Both, contiguous, in their dtype.

    Raises:
        ValueError: Another layout.
    """
    rows, heads, tokens, size = query.shape
    if cos.shape[-2] != tokens or query.stride(-1) != 1 or key.stride(-1) != 1:
        raise ValueError(f"query {tuple(query.shape)} and angles {tuple(cos.shape)} in a layout that is not known")
    key_heads = key.shape[1]
    out_query, out_key = query.new_empty(query.shape), key.new_empty(key.shape)
    with torch.cuda.device_of(query):
        _rotate[(rows * tokens, heads + key_heads)](
            query,
            key,
            cos.contiguous(),
            sin.contiguous(),
            out_query,
            out_key,
            *query.stride()[:3],
            *key.stride()[:3],
            0 if cos.shape[0] == 1 else tokens * cos.shape[-1],
            tokens,
            heads,
            key_heads,
            SIZE=size,
            ROTATED=cos.shape[-1],
            ROOM=triton.next_power_of_2(size),
            OVERLAP=overlaps(query.device),
            num_warps=1,
            launch_pdl=overlaps(query.device),
        )
    return out_query, out_key


# ---------------------------------------------------------------- gating


@triton.jit
def _gate(x, y, out, x_row, y_row, size, KIND: tl.constexpr, ROOM: tl.constexpr, OVERLAP: tl.constexpr):
    if OVERLAP:
        follow()
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * ROOM + tl.arange(0, ROOM)
    used = place < size
    gate = tl.load(x + row * x_row + place, mask=used, other=0.0)
    value = activate(gate.to(tl.float32), KIND)
    other = tl.load(y + row * y_row + place, mask=used, other=0.0)
    # Rounded before it is multiplied, as where the steps are launched one by one.
    result = value.to(gate.dtype).to(tl.float32) * other.to(tl.float32)
    tl.store(out + row * size + place, result.to(gate.dtype), mask=used)


def gate(x: Tensor, y: Tensor, kind: str) -> Tensor:
    """act(x) y (https://arxiv.org/abs/2002.05202).

    Args:
        x: (..., size), a view whose last dimension is contiguous and whose others are one row after another.
        y: Like `x`.
        kind: One of `gated.GATES`.

    Returns:
        (..., size), contiguous, in their dtype.
    """
    out = x.new_empty(x.shape)
    x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
    rows, size = x.shape
    room = 1024 if rows < 16 else 4096
    with torch.cuda.device_of(x):
        _gate[(rows, triton.cdiv(size, room))](
            x,
            y,
            out,
            x.stride(0),
            y.stride(0),
            size,
            KIND=kind,
            ROOM=room,
            OVERLAP=overlaps(x.device),
            num_warps=4,
            launch_pdl=overlaps(x.device),
        )
    return out
