"""Activations of gated units by name, and their derivatives, in fp32, for Triton kernels."""

import triton
import triton.language as tl


@triton.jit
def activate(value, KIND: tl.constexpr):
    """act(value), of one of `gated.GATES`."""
    if KIND == "silu":
        result = value / (1 + tl.exp(-value))
    elif KIND == "gelu_tanh":
        inner = 0.7978845608028654 * (value + 0.044715 * value * value * value)
        result = value / (1 + tl.exp(-2 * inner))  # (1 + tanh z) / 2 = 1 / (1 + exp(-2 z))
    else:
        result = 0.5 * value * (1 + tl.erf(value * 0.7071067811865476))
    return result


@triton.jit
def slope(value, KIND: tl.constexpr):
    """The derivative of `activate`."""
    if KIND == "silu":
        share = 1 / (1 + tl.exp(-value))
        result = share * (1 + value * (1 - share))
    elif KIND == "gelu_tanh":
        square = value * value
        share = 1 / (1 + tl.exp(-1.5957691216057308 * value * (1 + 0.044715 * square)))
        result = share + value * share * (1 - share) * 1.5957691216057308 * (1 + 0.134145 * square)
    else:
        share = 0.5 * (1 + tl.erf(value * 0.7071067811865476))
        result = share + value * 0.3989422804014327 * tl.exp(-0.5 * value * value)
    return result
