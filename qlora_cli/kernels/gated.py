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
    flat_gate, flat_up = (t.reshape(-1, gate.shape[-1]) for t in (gate, up))
    parts = (flat_gate, flat_up), (gate_projected, up_projected), (gate_lora_b, up_lora_b)
    if gate.is_cuda and gated_tiles.covers(*parts):
        return gated_tiles.gate_products(*parts, kind).view(gate.shape)
    activated = activate(torch.addmm(flat_gate, gate_projected, gate_lora_b.t()), kind)
    return (activated * torch.addmm(flat_up, up_projected, up_lora_b.t())).view(gate.shape)


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
    flat_grad, flat_gate, flat_up = (t.reshape(-1, gate.shape[-1]) for t in (grad, gate, up))
    parts = (flat_gate, flat_up), (gate_projected, up_projected), (gate_lora_b, up_lora_b)
    if gate.is_cuda and gated_tiles.covers(*parts):
        grad_gate, grad_up = gated_tiles.gate_products_backward(flat_grad, *parts, kind)
    else:
        whole = torch.addmm(flat_gate, gate_projected, gate_lora_b.t())
        grad_gate = flat_grad * torch.addmm(flat_up, up_projected, up_lora_b.t())
        grad_gate = _activate_backward(grad_gate, whole, kind)
        grad_up = flat_grad * activate(whole, kind)
    of_gate = adapter_gradients(grad_gate, gate_projected, gate_lora_b, adapter_dtype)
    of_up = adapter_gradients(grad_up, up_projected, up_lora_b, adapter_dtype)
    return grad_gate.view(gate.shape), grad_up.view(up.shape), *of_gate, *of_up


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
