"""AdamW with moments in 8 bits, a scale for every 256, in one pass over memory (Triton).

The update and the format are bitsandbytes' (https://arxiv.org/abs/2110.02861), whose kernel searches the nearest of 256
values in eight steps and takes 28 ps for an element on an H200, this one 6.7, and its bytes 4. Here the upper bits of a
value say which two codes it lies between, and one comparison which of them is nearer.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 256  # elements that share a scale
BLOCKS = 4  # of a program
# A value's key is its sign, its exponent from 2^-24 on, and seven bits of its fraction: between the borders of two
# neighbouring codes lies always more than what share a key.
LEAST_EXPONENT, FRACTION_BITS = 103, 7
KEYS = (127 - LEAST_EXPONENT + 1) << FRACTION_BITS  # of a sign; 1.0 is the largest value but for what shares its key


class Moments(NamedTuple):
    """What is kept of the gradients of a parameter.

    Attributes:
        first: uint8, codes of the running mean, one for each element.
        second: uint8, of that of the squares.
        first_scales: fp32, the largest magnitude of each block of 256.
        second_scales: Likewise.
        first_values: fp32 (256,), ascending, what the codes stand for.
        second_values: Likewise; none is negative.
    """

    first: Tensor
    second: Tensor
    first_scales: Tensor
    second_scales: Tensor
    first_values: Tensor
    second_values: Tensor


class Rule(NamedTuple):
    """AdamW's numbers.

    Attributes:
        rate: Learning rate.
        betas: Of the two means.
        eps: Beside the root of the second mean.
        decay: Decoupled weight decay.
    """

    rate: float
    betas: tuple[float, float]
    eps: float
    decay: float


@triton.jit
def _nearest(value, lowest, borders, LEAST: tl.constexpr, BITS: tl.constexpr, KEYS: tl.constexpr):
    """The code of each value: the lowest that its key may have, or the next one from its border on."""
    bits = value.to(tl.int32, bitcast=True)
    key = ((bits & 0x7FFFFFFF) >> (23 - BITS)) - (LEAST << BITS)
    key = tl.minimum(tl.maximum(key, 0), KEYS - 1) + tl.where(bits < 0, KEYS, 0)
    code = tl.load(lowest + key).to(tl.int32)
    return code + (value >= tl.load(borders + code)).to(tl.int32)


@triton.jit
def _update(
    values,
    gradient,
    first,
    second,
    first_scales,
    second_scales,
    first_values,
    second_values,
    first_lowest,
    second_lowest,
    first_borders,
    second_borders,
    elements,
    step_size,
    beta1,
    beta2,
    eps,
    shrink,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    LEAST: tl.constexpr,
    BITS: tl.constexpr,
    KEYS: tl.constexpr,
):
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    at = block.to(tl.int64)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    used = at < elements
    some = block < tl.cdiv(elements, BLOCK)
    g = tl.load(gradient + at, mask=used, other=0.0)
    scale1 = tl.load(first_scales + block, mask=some, other=0.0)
    scale2 = tl.load(second_scales + block, mask=some, other=0.0)
    mean = tl.load(first_values + tl.load(first + at, mask=used, other=0).to(tl.int32)) * scale1[:, None]
    square = tl.load(second_values + tl.load(second + at, mask=used, other=0).to(tl.int32)) * scale2[:, None]
    mean = tl.where(used, mean * beta1 + (1.0 - beta1) * g, 0.0)
    square = tl.where(used, square * beta2 + (1.0 - beta2) * g * g, 0.0)
    value = tl.load(values + at, mask=used, other=0.0)
    value = (value + step_size * (mean / (tl.sqrt(square) + eps))) * shrink
    tl.store(values + at, value, mask=used)
    most1, most2 = tl.max(tl.abs(mean), 1), tl.max(tl.abs(square), 1)
    tl.store(first_scales + block, most1, mask=some)
    tl.store(second_scales + block, most2, mask=some)
    mean = mean / tl.where(most1 > 0, most1, 1.0)[:, None]
    square = square / tl.where(most2 > 0, most2, 1.0)[:, None]
    tl.store(first + at, _nearest(mean, first_lowest, first_borders, LEAST, BITS, KEYS).to(tl.uint8), mask=used)
    tl.store(second + at, _nearest(square, second_lowest, second_borders, LEAST, BITS, KEYS).to(tl.uint8), mask=used)


def tables(values: Tensor) -> tuple[Tensor, Tensor]:
    """What `_nearest` looks up: for each key the lowest code, uint8, and from where on a value has the next code, fp32.

    A value below zero has never the code of zero: its sign would be lost.

    Args:
        values: fp32 (256,), ascending.
    """
    values = values.double().cpu()
    borders = torch.cat([(values[:-1] + values[1:]) / 2, torch.tensor([math.inf], dtype=torch.float64)])
    zero = int((values == 0).nonzero()[0])
    if zero:
        borders[zero - 1] = 0.0
    borders = borders.float()
    ends = (
        ((torch.arange(KEYS + 1) + (LEAST_EXPONENT << FRACTION_BITS)) << (23 - FRACTION_BITS)).int().view(torch.float32)
    )
    ends[0] = 0.0
    positive = torch.searchsorted(borders, ends[:-1].contiguous())  # borders below the lowest value of a key
    negative = torch.searchsorted(borders, -ends[1:].contiguous())
    return torch.cat([positive, negative]).to(torch.uint8), borders


_tables: dict[tuple[int, torch.device], tuple[Tensor, ...]] = {}


def _tables_of(moments: Moments, device: torch.device) -> tuple[Tensor, ...]:
    key = (moments.first_values.data_ptr(), device)
    if key not in _tables:
        lowest, borders = zip(*(tables(v) for v in (moments.first_values, moments.second_values)), strict=True)
        kept = (moments.first_values, moments.second_values)
        _tables[key] = tuple(t.to(device) for t in (*kept, *lowest, *borders))
    return _tables[key]


def update(values: Tensor, gradient: Tensor, moments: Moments, rule: Rule, step: int) -> None:
    """Updates a parameter and its moments, in place.

    Args:
        values: fp32, contiguous.
        gradient: Like it.
        moments: Of it; codes and scales may be in managed memory.
        rule: AdamW's numbers.
        step: Of the update, from 1 on.
    """
    beta1, beta2 = rule.betas
    root = math.sqrt(1.0 - beta2**step)
    elements = values.numel()
    with torch.cuda.device_of(values):
        _update[(triton.cdiv(elements, BLOCK * BLOCKS),)](
            values,
            gradient,
            *moments[:4],
            *_tables_of(moments, values.device),
            elements,
            -rule.rate * root / (1.0 - beta1**step),
            beta1,
            beta2,
            root * rule.eps,
            1.0 - rule.rate * rule.decay,
            BLOCKS=BLOCKS,
            BLOCK=BLOCK,
            LEAST=LEAST_EXPONENT,
            BITS=FRACTION_BITS,
            KEYS=KEYS,
        )
