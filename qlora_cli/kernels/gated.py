"""Gated unit (SwiGLU, GeGLU) with the low-rank products of both adapters added inside it, as one op.

Opaque to the compiler and for compiled code: the adapters' products join where the activation reads the large ones.
"""

import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_cli.kernels.lora_products import adapter_gradients

if importlib.util.find_spec("triton"):  # not there beside a CPU-only torch
    from qlora_cli.kernels.triton import gated_tiles

GATES = ("silu", "gelu_tanh", "gelu")


def activate(value: Tensor, kind: str) -> Tensor:
    """act(value), of one of GATES."""
    return F.silu(value) if kind == "silu" else F.gelu(value, approximate=_approximation(kind))


def _approximation(kind: str) -> str:
    return "tanh" if kind == "gelu_tanh" else "none"


def _activate_backward(grad: Tensor, value: Tensor, kind: str) -> Tensor:
    if kind == "silu":
        return torch.ops.aten.silu_backward(grad, value)
    return torch.ops.aten.gelu_backward(grad, value, approximate=_approximation(kind))


def forward(
    gate: Tensor,
    up: Tensor,
    gate_projected: Tensor,
    up_projected: Tensor,
    gate_lora_b: Tensor,
    up_lora_b: Tensor,
    kind: str,
) -> Tensor:
    """act(gate + gate_projected gate_lora_b^T) (up + up_projected up_lora_b^T).

    Args:
        gate: (tokens, size) in the compute dtype, what the frozen weight gives.
        up: The same.
        gate_projected: (tokens, rank) from `linear.project_shared`.
        up_projected: The same.
        gate_lora_b: (size, rank) in the compute dtype.
        up_lora_b: The same.
        kind: One of GATES.

    Returns:
        (tokens, size).
    """
    parts = gate, up, gate_projected, up_projected, gate_lora_b, up_lora_b
    if gate.is_cuda and gated_tiles.covers(*parts):
        return gated_tiles.gate_products(*parts, kind)
    return activate(torch.addmm(gate, gate_projected, gate_lora_b.t()), kind) * torch.addmm(
        up, up_projected, up_lora_b.t()
    )


def backward(
    grad: Tensor,
    gate: Tensor,
    up: Tensor,
    gate_projected: Tensor,
    up_projected: Tensor,
    gate_lora_b: Tensor,
    up_lora_b: Tensor,
    kind: str,
) -> tuple[Tensor, Tensor]:
    """Gradients of `forward` with respect to gate and up, for `grad` of (tokens, size)."""
    parts = gate, up, gate_projected, up_projected, gate_lora_b, up_lora_b
    if gate.is_cuda and gated_tiles.covers(*parts):
        return gated_tiles.gate_products_backward(grad, *parts, kind)
    whole = torch.addmm(gate, gate_projected, gate_lora_b.t())
    grad_gate = _activate_backward(grad * torch.addmm(up, up_projected, up_lora_b.t()), whole, kind)
    return grad_gate, grad * activate(whole, kind)


@torch.library.custom_op("qlora::gated", mutates_args=())
def _gated_op(
    gate: Tensor,
    up: Tensor,
    gate_projected: Tensor,
    up_projected: Tensor,
    gate_b: Tensor,
    up_b: Tensor,
    gate_lora_b: Tensor,
    up_lora_b: Tensor,
    kind: str,
) -> Tensor:
    size = gate.shape[-1]
    return forward(
        gate.reshape(-1, size), up.reshape(-1, size), gate_projected, up_projected, gate_lora_b, up_lora_b, kind
    ).view(gate.shape)


@_gated_op.register_fake
def _(gate: Tensor, *_: Any) -> Tensor:
    return gate.new_empty(gate.shape)


@torch.library.custom_op("qlora::gated_backward", mutates_args=())
def _gated_backward_op(
    grad: Tensor,
    gate: Tensor,
    up: Tensor,
    gate_projected: Tensor,
    up_projected: Tensor,
    gate_lora_b: Tensor,
    up_lora_b: Tensor,
    kind: str,
    adapter_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    size = gate.shape[-1]
    flat = [t.reshape(-1, size) for t in (grad, gate, up)]
    found = backward(flat[0], flat[1], flat[2], gate_projected, up_projected, gate_lora_b, up_lora_b, kind)
    of_gate = adapter_gradients(found[0], gate_projected, gate_lora_b, adapter_dtype)
    of_up = adapter_gradients(found[1], up_projected, up_lora_b, adapter_dtype)
    return found[0].view(gate.shape), found[1].view(up.shape), *of_gate, *of_up


@_gated_backward_op.register_fake
def _(grad: Tensor, gate: Tensor, up: Tensor, gate_projected: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    lora_b, adapter_dtype = rest[1], rest[-1]
    large = [gate.new_empty(gate.shape) for _ in range(2)]
    small = [gate_projected.new_empty(gate_projected.shape) for _ in range(2)]
    weights = [lora_b.new_empty(lora_b.shape, dtype=adapter_dtype) for _ in range(2)]
    return large[0], large[1], small[0], weights[0], small[1], weights[1]


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    gate, up, gate_projected, up_projected, gate_b, _, gate_lora_b, up_lora_b, ctx.kind = inputs
    ctx.save_for_backward(gate, up, gate_projected, up_projected, gate_lora_b, up_lora_b)
    ctx.adapter_dtype = gate_b.dtype


def _differentiate(ctx: Any, grad: Tensor) -> tuple:
    gate, up, gate_p, gate_b, up_p, up_b = torch.ops.qlora.gated_backward(
        grad.contiguous(), *ctx.saved_tensors, ctx.kind, ctx.adapter_dtype
    )
    return gate, up, gate_p, up_p, gate_b, up_b, None, None, None


_gated_op.register_autograd(_differentiate, setup_context=_save)


def gated_product(
    gate: Tensor,
    up: Tensor,
    projected: tuple[Tensor, Tensor],
    b: tuple[Tensor, Tensor],
    lora_b: tuple[Tensor, Tensor],
    kind: str,
) -> Tensor:
    """act(gate + projected_0 b_0^T) (up + projected_1 b_1^T), differentiable in all but `lora_b`.

    Args:
        gate: (..., size) in the compute dtype: x W^T of the gate's frozen weight, its bias included.
        up: The same of the other linear.
        projected: (tokens, rank) of both from `linear.project_shared`.
        b: (size, rank) of both, the trained parameters: they receive the gradients, in their own dtype.
        lora_b: The values of `b` in the compute dtype.
        kind: One of GATES.

    Returns:
        (..., size).
    """
    return torch.ops.qlora.gated(gate, up, *projected, *b, *lora_b, kind)
