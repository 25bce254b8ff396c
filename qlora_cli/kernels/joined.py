"""Query, key and value: three adapted linear layers with one input, in 8 bits as one product each way.

Of llama3-8b, 8,192 tokens, H200: 264 µs forward where three products take 283, 290 for the gradient where they take 319,
of which the sum is then one tensor. For compiled code, with codes that are resident.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qlora_cli.kernels import float8, lora_products
from qlora_cli.kernels.weights import FrozenWeight

MEMBERS = 3
MOST_ROWS = 12288  # of all: gate and up of llama3-8b, 28,672, take 1.32 ms as one and 1.24 apart


def covers(weights: Sequence[FrozenWeight]) -> bool:
    """Whether layers with these weights are the faster as one."""
    few = len(weights) == MEMBERS and sum(weight.rows for weight in weights) <= MOST_ROWS
    return few and all(weight.codes is not None for weight in weights)


@torch.library.custom_op("qlora::joined", mutates_args=())
def _joined_op(
    x: Tensor,
    projected: Sequence[Tensor],
    b: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    x_codes: Tensor,
    x_scale: Tensor,
    row_scale: Tensor,
    column_scale: Tensor,
    codes: Tensor,
    turned_codes: Tensor,
) -> list[Tensor]:
    y = x.new_empty(x_codes.shape[0], codes.shape[0])
    float8.scaled_product(x_codes, x_scale, codes, row_scale, y)
    parts = zip(y.split([each.shape[0] for each in lora_b], 1), projected, lora_b, strict=True)
    return [lora_products.with_product(part, left, each.t()).view(*x.shape[:-1], -1) for part, left, each in parts]


@_joined_op.register_fake
def _(x: Tensor, projected: Sequence[Tensor], b: Sequence[Tensor], *_: Any) -> list[Tensor]:
    return [x.new_empty(*x.shape[:-1], each.shape[0]) for each in b]


@torch.library.custom_op("qlora::joined_backward", mutates_args=())
def _joined_backward_op(
    grads: Sequence[Tensor],
    projected: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    column_scale: Tensor,
    turned_codes: Tensor,
    adapter_dtype: torch.dtype,
) -> list[Tensor]:
    first, *more = flat = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
    given = zip(flat, projected, lora_b, strict=True)
    of_projected, of_b = zip(*(lora_products.adapter_gradients(*each, adapter_dtype) for each in given), strict=True)
    grad_x = first.new_empty(first.shape[0], turned_codes.shape[0])
    float8.scaled_product(*float8.quantise_rows(first, more), turned_codes, column_scale, grad_x)
    return [grad_x.view(*grads[0].shape[:-1], -1), *of_projected, *of_b]


@_joined_backward_op.register_fake
def _(grads: Any, projected: Any, lora_b: Any, _: Tensor, turned_codes: Tensor, adapter_dtype: Any) -> list[Tensor]:
    of_b = [each.new_empty(each.shape, dtype=adapter_dtype) for each in lora_b]
    grad_x = grads[0].new_empty(*grads[0].shape[:-1], turned_codes.shape[0])
    return [grad_x, *(left.new_empty(left.shape) for left in projected), *of_b]


def _save(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    _, projected, b, lora_b, _, _, _, column_scale, _, turned_codes = inputs
    ctx.save_for_backward(*projected, *lora_b, column_scale, turned_codes)
    ctx.adapter_dtype = b[0].dtype


def _differentiate(ctx: Any, grads: list[Tensor]) -> tuple:
    saved = ctx.saved_tensors
    projected, lora_b, scaled = saved[:MEMBERS], saved[MEMBERS:-2], saved[-2:]
    found = torch.ops.qlora.joined_backward(
        [grad.contiguous() for grad in grads], projected, lora_b, *scaled, ctx.adapter_dtype
    )
    return found[0], found[1 : MEMBERS + 1], found[MEMBERS + 1 :], [None] * MEMBERS, *(None,) * 6


_joined_op.register_autograd(_differentiate, setup_context=_save)


def joined_linears(
    x: Tensor, weight: FrozenWeight, projected: Sequence[Tensor], b: Sequence[Tensor], lora_b: Sequence[Tensor]
) -> list[Tensor]:
    """x W^T + projected B^T of each of three layers, differentiable in x, projected and b.

    Args:
        x: (..., in) in the compute dtype.
        weight: Of all of them: `float8.join`.
        projected: (tokens, rank) each, from `linear.project_shared`.
        b: (out, rank) each, the trained parameters, of one dtype: they receive the gradients in it.
        lora_b: The values of `b` in the compute dtype.

    Returns:
        (..., out) each.
    """
    quantised = torch.ops.qlora.quantise_rows(x.detach())
    held = weight.row_scale, weight.column_scale, weight.codes, weight.turned_codes
    return torch.ops.qlora.joined(x, list(projected), list(b), list(lora_b), *quantised, *held)
