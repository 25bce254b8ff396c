"""Frozen (4-bit or dense) linear layer with a LoRA adapter, as one differentiable op.

Nothing is kept for the backward pass but the input, its rank-sized projection and the packed weight. The op is opaque
to the compiler: were the dequantisation visible, the compiler would keep its 16-bit result from forward to backward.
"""

from typing import Any

import torch
from torch import Tensor

from qlora_cli.kernels import float8, lora_products
from qlora_cli.kernels.lora_products import Dropout, LinearOptions
from qlora_cli.kernels.weights import FrozenWeight


def tensors_of(weight: FrozenWeight) -> tuple[Tensor | None, ...]:
    """The tensors of one matrix, in the order of its fields."""
    return (*weight[2:9], *weight[11:15])


def numbers_of(weight: FrozenWeight) -> tuple[int, ...]:
    """Rows, columns and both block sizes of a weight."""
    return (*weight[:2], *weight[9:11])


def made_of(tensors: Any, numbers: Any) -> FrozenWeight:
    """The weight with these `tensors_of` and `numbers_of`."""
    return FrozenWeight(*numbers[:2], *tensors[:7], *numbers[2:], *tensors[7:])


class _QloraLinear(torch.autograd.Function):
    """The op for eager mode: `forward` and `backward` of lora_products.py behind autograd, with the least Python in between."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor | None, b: Tensor | None, *rest: Any) -> Tensor:
        weight, bias, lora_a, lora_b, dropout, options = rest
        projected = None if lora_a is None else lora_products.project(x, lora_a, dropout, options.scaling)
        if options.output_needed:
            y = lora_products.forward(x, weight, bias, projected, lora_b, options.workspace_bytes)
        else:
            y = x.new_empty(*x.shape[:-1], weight.rows)
        # Everything, the packed weight too, goes where saved-tensor hooks and checkpointing see it.
        ctx.save_for_backward(
            x if a is not None else None,
            projected,
            lora_a,
            lora_b,
            None if dropout is None else dropout.seed,
            *tensors_of(weight),
        )
        ctx.numbers = numbers_of(weight)
        ctx.dropout, ctx.options = dropout and (dropout.rate, dropout.first_row), options
        ctx.adapter_dtype = x.dtype if a is None else a.dtype
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, projected, lora_a, lora_b, seed, *tensors = ctx.saved_tensors
        dropout = None if seed is None else Dropout(ctx.dropout[0], seed, ctx.dropout[1])
        weight = made_of(tensors, ctx.numbers)
        results = lora_products.backward(
            grads[0],
            x,
            projected,
            weight,
            lora_a,
            lora_b,
            dropout,
            ctx.options,
            ctx.needs_input_grad[0],
            ctx.adapter_dtype,
        )
        return (*results, *(None,) * 6)


_Tensor = Tensor | None


@torch.library.custom_op("qlora::project", mutates_args=())
def _project_op(x: Tensor, lora_a: Tensor, seed: _Tensor, rate: float, scaling: float) -> Tensor:
    return lora_products.project(x, lora_a, None if seed is None else Dropout(rate, seed), scaling)


@_project_op.register_fake
def _(x: Tensor, lora_a: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.numel() // x.shape[-1], lora_a.shape[0])


@torch.library.custom_op("qlora::quantise_rows", mutates_args=())
def _quantise_rows_op(x: Tensor) -> tuple[Tensor, Tensor]:
    return float8.quantise_rows(x.reshape(-1, x.shape[-1]))


@_quantise_rows_op.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = x.numel() // x.shape[-1], x.shape[-1]
    return x.new_empty(rows, columns, dtype=torch.float8_e4m3fn), x.new_empty(rows, 1, dtype=torch.float32)


# Apart from `project`, so that a recomputation whose output is not needed costs the small product alone.
@torch.library.custom_op("qlora::linear", mutates_args=())
def _linear_op(
    x: Tensor,
    a: _Tensor,
    b: _Tensor,
    projected: _Tensor,
    lora_a: _Tensor,
    lora_b: _Tensor,
    bias: _Tensor,
    x_codes: _Tensor,
    x_scale: _Tensor,
    seed: _Tensor,
    dense: _Tensor,
    packed: _Tensor,
    absmax: _Tensor,
    code: _Tensor,
    nested_absmax: _Tensor,
    nested_code: _Tensor,
    offset: _Tensor,
    row_scale: _Tensor,
    column_scale: _Tensor,
    codes: _Tensor,
    turned_codes: _Tensor,
    rows: int,
    columns: int,
    blocksize: int,
    nested_blocksize: int,
    rate: float,
    scaling: float,
    workspace_bytes: int | None,
) -> Tensor:
    held = dense, packed, absmax, code, nested_absmax, nested_code, offset
    tensors = (*held, row_scale, column_scale, codes, turned_codes)
    weight = made_of(tensors, (rows, columns, blocksize, nested_blocksize))
    quantised = None if x_codes is None or x_scale is None else (x_codes, x_scale)
    return lora_products.forward(x, weight, bias, projected, lora_b, workspace_bytes, quantised)


@_linear_op.register_fake
def _(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], rest[20])


@torch.library.custom_op("qlora::linear_backward", mutates_args=())
def _linear_backward_op(
    grad: Tensor,
    x: _Tensor,
    projected: _Tensor,
    lora_a: _Tensor,
    lora_b: _Tensor,
    seed: _Tensor,
    dense: _Tensor,
    packed: _Tensor,
    absmax: _Tensor,
    code: _Tensor,
    nested_absmax: _Tensor,
    nested_code: _Tensor,
    offset: _Tensor,
    row_scale: _Tensor,
    column_scale: _Tensor,
    codes: _Tensor,
    turned_codes: _Tensor,
    rows: int,
    columns: int,
    blocksize: int,
    nested_blocksize: int,
    rate: float,
    scaling: float,
    workspace_bytes: int | None,
    needs_x: bool,
    adapter_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    held = dense, packed, absmax, code, nested_absmax, nested_code, offset
    tensors = (*held, row_scale, column_scale, codes, turned_codes)
    weight = made_of(tensors, (rows, columns, blocksize, nested_blocksize))
    dropout = None if seed is None else Dropout(rate, seed)
    options = LinearOptions(scaling, workspace_bytes)
    results = lora_products.backward(
        grad, x, projected, weight, lora_a, lora_b, dropout, options, needs_x, adapter_dtype
    )
    nothing = grad.new_empty(0)
    return tuple(nothing.clone() if result is None else result for result in results)  # type: ignore[return-value]


@_linear_backward_op.register_fake
def _(grad: Tensor, x: _Tensor, projected: _Tensor, lora_a: _Tensor, lora_b: _Tensor, *rest: Any) -> tuple:
    columns, needs_x, adapter_dtype = rest[13], rest[-2], rest[-1]
    grad_x = grad.new_empty(*grad.shape[:-1], columns) if needs_x else grad.new_empty(0)
    if lora_b is None or projected is None:
        return grad_x, grad.new_empty(0), grad.new_empty(0)
    grad_b = lora_b.new_empty(lora_b.shape, dtype=adapter_dtype)
    if lora_a is None:
        return grad_x, projected.new_empty(projected.shape), grad_b
    return grad_x, lora_a.new_empty(lora_a.shape, dtype=adapter_dtype), grad_b


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, a, b, projected, lora_a, lora_b, _, _, _, seed, *weight = inputs
    ctx.save_for_backward(x if a is not None else None, projected, lora_a, lora_b, seed, *weight[:11])
    ctx.constants = weight[11:]
    ctx.adapter_dtype = x.dtype if b is None else b.dtype


def _differentiate(ctx: Any, grad: Tensor) -> tuple:
    needs_x = ctx.needs_input_grad[0]
    saved = ctx.saved_tensors  # once: recomputation may hand them out a single time
    x_, a_, b_ = torch.ops.qlora.linear_backward(grad.contiguous(), *saved, *ctx.constants, needs_x, ctx.adapter_dtype)
    _, projected, lora_a, lora_b, *_ = saved
    if lora_b is None:
        a_ = b_ = None
    shared = lora_a is None and projected is not None
    return (x_ if needs_x else None, None if shared else a_, b_, a_ if shared else None, *(None,) * 24)


_linear_op.register_autograd(_differentiate, setup_context=_save)


# One projection for several adapted layers with the same input: the input is read once forward, once backward.
@torch.library.custom_op("qlora::project_shared", mutates_args=())
def _project_shared_op(x: Tensor, a: Tensor, lora_a: Tensor, scaling: float) -> Tensor:
    return lora_products.project(x, lora_a, None, scaling)


@_project_shared_op.register_fake
def _(x: Tensor, a: Tensor, lora_a: Tensor, scaling: float) -> Tensor:
    return x.new_empty(x.numel() // x.shape[-1], lora_a.shape[0])


@torch.library.custom_op("qlora::project_shared_backward", mutates_args=())
def _project_shared_backward_op(
    grad: Tensor, x: Tensor, lora_a: Tensor, adapter_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    grad_a = lora_products.wide_product(grad.t(), x.reshape(-1, x.shape[-1]), adapter_dtype)
    return (grad @ lora_a).view(x.shape), grad_a


@_project_shared_backward_op.register_fake
def _(grad: Tensor, x: Tensor, lora_a: Tensor, adapter_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), lora_a.new_empty(lora_a.shape, dtype=adapter_dtype)


def _save_shared(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, a, lora_a, ctx.scaling = inputs
    ctx.save_for_backward(x, lora_a)
    ctx.adapter_dtype = a.dtype


def _differentiate_shared(ctx: Any, grad: Tensor) -> tuple:
    scaled = (grad * ctx.scaling).contiguous()
    x_, a_ = torch.ops.qlora.project_shared_backward(scaled, *ctx.saved_tensors, ctx.adapter_dtype)
    return x_, a_, None, None


_project_shared_op.register_autograd(_differentiate_shared, setup_context=_save_shared)


def project_shared(x: Tensor, a: list[Tensor], scaling: float) -> tuple[Tensor, ...]:
    """scaling x A^T for several A at once, differentiable in x and each A.

    Args:
        x: (..., in) in the compute dtype.
        a: (rank, in) each: the trained parameters.
        scaling: Of these adapters.

    Returns:
        (tokens, rank) each, in the compute dtype: views of one tensor.
    """
    together = torch.cat(a)
    projected = torch.ops.qlora.project_shared(x, together, together.detach().to(x.dtype), scaling)
    return projected.split([part.shape[0] for part in a], dim=1)


def qlora_linear(
    x: Tensor,
    weight: FrozenWeight,
    bias: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    dropout: Dropout | None,
    options: LinearOptions,
    projected: Tensor | None = None,
) -> Tensor:
    """x W^T + b + scaling (drop(x) A^T) B^T, differentiable in x, A and B.

    Args:
        x: (..., in) in the compute dtype.
        weight: (out, in).
        bias: (out,) in the compute dtype, or None.
        a: (rank, in), the trained parameter: it receives the gradient, in its own dtype.
        b: (out, rank), likewise.
        lora_a: The value of `a` in the compute dtype, made once a step rather than once a use.
        lora_b: The value of `b`, likewise.
        dropout: On the adapter's input; None for none.
        options: See `LinearOptions`.
        projected: (tokens, rank) from `project_shared`, in place of `a`, `lora_a` and dropout; compiled code only.

    Returns:
        (..., out).
    """
    if not torch.compiler.is_compiling():
        return _QloraLinear.apply(x, a, b, weight, bias, lora_a, lora_b, dropout, options)
    seed, rate = (None, 0.0) if dropout is None else (dropout.seed, dropout.rate)
    if lora_a is not None:
        projected = torch.ops.qlora.project(x.detach(), lora_a, seed, rate, options.scaling)
    # An op of its own: layers that read the same tensor share what comes of it, as the compiler finds.
    quantised = (None, None) if weight.row_scale is None else torch.ops.qlora.quantise_rows(x.detach())
    return torch.ops.qlora.linear(
        x,
        a,
        b,
        projected,
        lora_a,
        lora_b,
        bias,
        *quantised,
        seed,
        *tensors_of(weight),
        *numbers_of(weight),
        rate,
        options.scaling,
        options.workspace_bytes,
    )
