"""Products of a frozen linear layer and its LoRA adapter, and their gradients: plain functions, without autograd."""

import importlib.util
from typing import NamedTuple

import torch
from torch import Tensor

from qlora_cli.kernels import float8
from qlora_cli.kernels.weights import FrozenWeight

if importlib.util.find_spec("triton"):  # not there beside a CPU-only torch
    from qlora_cli.kernels.triton import dropout as triton_dropout
    from qlora_cli.kernels.triton import low_rank, thin_products


class Dropout(NamedTuple):
    """Dropout on the adapter's input: `rate` in [0, 1), an int64 scalar `seed` on the device, and which row of the whole
    input the first one is, where a tile of it is given: a multiple of 4, as places have their numbers by the whole."""

    rate: float
    seed: Tensor
    first_row: int = 0


class LinearOptions(NamedTuple):
    """What is not a tensor.

    Attributes:
        scaling: Of the adapter.
        workspace_bytes: Most bytes of dequantised values at once; None for a whole weight.
        output_needed: False where a recomputation needs only what the backward pass saves: the output is then not
            written at all.
    """

    scaling: float = 1.0
    workspace_bytes: int | None = None
    output_needed: bool = True


def drop(x: Tensor, dropout: Dropout) -> Tensor:
    """x with the places of this seed zeroed and the others divided by 1 - rate; on CUDA, x is contiguous."""
    if x.is_cuda:
        return triton_dropout.drop(x, dropout.seed, dropout.rate, dropout.first_row)
    generator = torch.Generator().manual_seed(int(dropout.seed))
    drawn = torch.rand(dropout.first_row + x.shape[0], *x.shape[1:], generator=generator)[dropout.first_row :]
    return torch.where(drawn >= dropout.rate, x / (1 - dropout.rate), 0)


def add_product(
    out: Tensor, left: Tensor, right: Tensor, dropout: Dropout | None = None, scale: Tensor | None = None
) -> None:
    """out += drop(scale left @ right): (rows, columns) += (rows, rank) @ (rank, columns), in place.

    `scale` is an fp32 scalar on the device, without dropout only: a CUDA graph goes on with what it then holds.
    """
    rate = 0.0 if dropout is None else dropout.rate
    seed, first_row = (None, 0) if dropout is None else (dropout.seed, dropout.first_row)
    if out.is_cuda and low_rank.covers(out, left, right, rate):
        low_rank.add_product(out, left, right, seed, rate, scale, first_row=first_row)
    elif dropout is None:
        out.addmm_(left if scale is None else left * scale.to(left.dtype), right)
    else:
        out.add_(drop(left @ right, dropout))


def with_product(base: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """base + left @ right, contiguous: `add_product` to a part of a larger tensor, which need not be kept for it."""
    if base.is_cuda and low_rank.covers(base, left, right):
        return low_rank.add_product(base.new_empty(base.shape), left, right, base=base)
    return torch.addmm(base, left, right)


def scaled_product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """scale * left @ right in one launch: with beta = 0 the first argument is never read."""
    return torch.addmm(left.new_empty(1), left, right, beta=0, alpha=scale)


def wide_product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left @ right with the fp32 accumulator itself as the result where `dtype` asks for it and the device can."""
    if left.is_cuda and dtype == torch.float32 and left.dtype != dtype:
        return torch.mm(left, right, out_dtype=dtype)
    return torch.mm(left, right).to(dtype)


def project(x: Tensor, lora_a: Tensor, dropout: Dropout | None, scaling: float) -> Tensor:
    """scaling drop(x) A^T: (..., in) and (rank, in) to (tokens, rank)."""
    flat = x.reshape(-1, x.shape[-1])
    return scaled_product(flat if dropout is None else drop(flat.contiguous(), dropout), lora_a.t(), scaling)


def adapter_gradients(
    grad: Tensor, projected: Tensor, lora_b: Tensor, adapter_dtype: torch.dtype, scaling: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Gradients of projected lora_b^T, (tokens, rank) and (out, rank), for `grad` of (tokens, out).

    The first is multiplied by `scaling` and in the compute dtype, the second in `adapter_dtype`.
    """
    if grad.is_cuda and thin_products.covers(grad, lora_b, projected):
        return thin_products.multiply_both(grad, lora_b, projected, scaling, adapter_dtype)
    return scaled_product(grad, lora_b, scaling), wide_product(grad.t(), projected, adapter_dtype)


def forward(
    x: Tensor,
    weight: FrozenWeight,
    bias: Tensor | None,
    projected: Tensor | None,
    lora_b: Tensor | None,
    workspace_bytes: int | None,
    quantised: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """x W^T + b + projected B^T, the first product in 8 bits where the weight is scaled for that.

    Args:
        x: (..., in) in the compute dtype.
        weight: (out, in).
        bias: (out,) in the compute dtype, or None.
        projected: (tokens, rank) from `project`, or None for a layer without an adapter.
        lora_b: (out, rank) in the compute dtype, or None.
        workspace_bytes: See `LinearOptions`.
        quantised: Of `float8.quantise_rows(x)`, where that is there already.

    Returns:
        (..., out), not a view: a model may add to its layer's output in place, which autograd forbids on views.
    """
    y = x.new_empty(*x.shape[:-1], weight.rows)
    flat, flat_y = x.reshape(-1, weight.columns), y.view(-1, weight.rows)
    row_slices = weight.row_slices(workspace_bytes, x.element_size())
    if weight.row_scale is not None:
        float8.multiply(flat, weight, flat_y, workspace_bytes, quantised, bias)
    elif len(row_slices) == 1 and bias is not None:
        torch.addmm(bias, flat, weight.values(x.dtype).t(), out=flat_y)  # the bias joins inside the GEMM
    else:
        for first, end in row_slices:
            torch.mm(flat, weight.values(x.dtype, first, end).t(), out=flat_y[:, first:end])
        if bias is not None:
            flat_y += bias
    if projected is not None and lora_b is not None:
        add_product(flat_y, projected, lora_b.t())
    return y


def input_gradient(grad: Tensor, weight: FrozenWeight, workspace_bytes: int | None) -> Tensor:
    """grad W, (tokens, out) to (tokens, in): the gradient of the input of x W^T."""
    if weight.row_scale is not None:
        return float8.multiply_transposed(grad, weight, workspace_bytes)
    grad_x: Tensor | None = None
    for first, end in weight.row_slices(workspace_bytes, grad.element_size()):
        values = weight.values(grad.dtype, first, end)
        if grad_x is None:
            grad_x = grad[:, first:end] @ values
        else:
            grad_x.addmm_(grad[:, first:end], values)
        del values
    assert grad_x is not None
    return grad_x


def backward(
    grad: Tensor,
    x: Tensor | None,
    projected: Tensor | None,
    weight: FrozenWeight,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    dropout: Dropout | None,
    options: LinearOptions,
    needs_x: bool,
    adapter_dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `forward` after `project` with respect to x, A and B, or x, `projected` and B.

    What is not described is as it was given to these two, dropout with the same seed.

    Args:
        grad: (..., out), the gradient of the output.
        x: Their input; None for a layer without an adapter, or with one whose projection is an input of its own.
        lora_a: None where x is.
        needs_x: Whether the gradient of x is wanted.
        adapter_dtype: Dtype of the gradients of A and B.

    Returns:
        (..., in) or None; (rank, in), or (tokens, rank) where the projection is an input, or None; (out, rank) or None.
    """
    flat_grad = grad.reshape(-1, weight.rows)
    grad_x = grad_a = grad_b = grad_projected = None
    if lora_b is not None and projected is not None:
        scaling = 1.0 if lora_a is None else options.scaling
        grad_projected, grad_b = adapter_gradients(flat_grad, projected, lora_b, adapter_dtype, scaling)
        grad_a = grad_projected
    if lora_a is not None and x is not None and grad_projected is not None:
        flat = x.reshape(-1, weight.columns)
        dropped = flat if dropout is None else drop(flat.contiguous(), dropout)
        grad_a = wide_product(grad_projected.t(), dropped, adapter_dtype)
        del dropped
    if needs_x:
        grad_x = input_gradient(flat_grad, weight, options.workspace_bytes)
        if grad_projected is not None and lora_a is not None:
            add_product(grad_x, grad_projected, lora_a, dropout)
        grad_x = grad_x.view(*grad.shape[:-1], weight.columns)
    return grad_x, grad_a, grad_b
