"""Products of rows sorted by expert with each expert's matrix: packed ones that stay frozen, and dense ones that train.

The packed op keeps nothing for its backward pass but the packed tensors, which stay anyway; values are dequantised
anew, as many experts at a time as `operands.workspace` holds.
"""

from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlora_cli.core.experts.layout import ExpertWeight
from qlora_cli.core.experts.stack import expert_values
from qlora_cli.kernels import float8
from qlora_cli.kernels.experts.operands import are_few, workspace
from qlora_cli.kernels.grouped_mm import grouped_mm, takes_grouped_mm
from qlora_cli.kernels.weights import FrozenWeight


class Routing(NamedTuple):
    """Rows sorted by expert.

    Attributes:
        ends: (experts,) int32, the row behind each expert's last one.
    """

    ends: Tensor

    def bounds(self) -> list[int]:
        """Where each expert's rows begin, and the end of the last one's, on the host: a GPU is waited for."""
        return [0, *self.ends.tolist()]


def route(expert_ids: Tensor, experts: int) -> tuple[Tensor, Tensor, Routing]:
    """Sorts (rows,) ids of experts, without waiting for the device.

    Returns:
        The ids in order, the row each comes from, and where each expert's rows end. Rows of ids past the last expert
        come last and belong to none.
    """
    ordered, source = torch.sort(expert_ids, stable=True)
    numbers = torch.arange(experts, device=expert_ids.device, dtype=ordered.dtype)
    return ordered, source, Routing(torch.searchsorted(ordered, numbers, right=True).to(torch.int32))


class ExpertStack(NamedTuple):
    """Packed matrices of all experts.

    Attributes:
        layout: Their number and shape.
        values: One behind the other, as one weight (experts * out, in).
        quant_type: nf4 or fp4.
    """

    layout: ExpertWeight
    values: FrozenWeight
    quant_type: str

    def matrices(self, dtype: torch.dtype, first: int, end: int) -> Tensor:
        """As `expert_values`."""
        return expert_values(self.values, self.layout, self.quant_type, dtype, first, end)


def packed_product(x: Tensor, stack: ExpertStack, routing: Routing) -> Tensor:
    """Rows (rows, in), sorted by expert, times their expert's matrix: (rows, out), differentiable in `x`.

    In 8 bits, emulated, where the stack has scales for that and rows are so many that the fused op does it, too.
    """
    facts = (stack.layout, stack.quant_type, stack.values[:2], stack.values[9:])
    result: Tensor = _PackedProduct.apply(x, routing.ends, facts, *stack.values[3:9])
    return result


class _PackedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ends: Tensor, facts: Any, *tensors: Any) -> Any:
        ctx.save_for_backward(ends, *tensors)  # where saved-tensor hooks and checkpointing see them
        ctx.facts = facts
        return _multiply(x, _stack_of(facts, tensors), Routing(ends), backward=False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        ends, *tensors = ctx.saved_tensors
        given = _multiply(grads[0], _stack_of(ctx.facts, tensors), Routing(ends), backward=True)
        return given, *(None,) * (2 + len(tensors))


def _stack_of(facts: Any, tensors: Any) -> ExpertStack:
    layout, quant_type, shape, blocks = facts
    return ExpertStack(layout, FrozenWeight._make((*shape, None, *tensors, *blocks)), quant_type)


def _multiply(x: Tensor, stack: ExpertStack, routing: Routing, *, backward: bool) -> Tensor:
    """x W^T, or x W for the gradient of its input, each row with its expert's W."""
    if stack.values.stack_scale is not None and not are_few(len(x), stack.layout.experts):
        return _multiply_in_8_bits(x, stack, routing, backward=backward)
    layout = stack.layout
    grouped = takes_grouped_mm(x, layout.rows, layout.columns)
    call = partial(_multiply_groups, x, stack, routing, grouped=grouped, backward=backward)
    return workspace.multiply(call, layout.experts, layout.elements * x.element_size()) if grouped else call(at_once=1)


def _multiply_groups(
    x: Tensor, stack: ExpertStack, routing: Routing, *, at_once: int, grouped: bool, backward: bool
) -> Tensor:
    layout = stack.layout
    experts, width = layout.experts, layout.columns if backward else layout.rows
    if at_once >= experts:
        values = stack.matrices(x.dtype, 0, experts)
        return grouped_mm(x, values if backward else values.transpose(-2, -1), routing.ends)
    result, bounds = x.new_zeros(x.shape[0], width), routing.bounds()
    for first in range(0, experts, at_once):
        end = min(first + at_once, experts)
        rows = slice(bounds[first], bounds[end])
        if rows.start == rows.stop:
            continue
        values = stack.matrices(x.dtype, first, end)
        matrices = values if backward else values.transpose(-2, -1)
        if grouped:
            result[rows] = grouped_mm(x[rows], matrices, routing.ends[first:end] - bounds[first])
        else:
            torch.mm(x[rows], matrices[0], out=result[rows])
    return result


def codes_of(matrices: Tensor, stack_scale: Tensor) -> Tensor:
    """Matrices (experts, out, in), fp32, which are overwritten, in e4m3 over a scale for each: codes, of the same shape."""
    return matrices.mul_(stack_scale.reciprocal()[:, None, None]).to(torch.float8_e4m3fn)


def _multiply_in_8_bits(x: Tensor, stack: ExpertStack, routing: Routing, *, backward: bool) -> Tensor:
    """The reference of products in 8 bits: rows with a scale each, matrices with one each, sums in fp32."""
    assert stack.values.stack_scale is not None
    codes, row_scales = float8.quantise_rows(x)
    result = x.new_zeros(x.shape[0], stack.layout.columns if backward else stack.layout.rows)
    for expert, (start, end) in enumerate(pairwise(routing.bounds())):
        if start == end:
            continue
        scale = stack.values.stack_scale[expert : expert + 1]
        matrix = codes_of(stack.matrices(torch.float32, expert, expert + 1), scale)[0].float()
        product = codes[start:end].float() @ (matrix if backward else matrix.t())
        result[start:end] = product * row_scales[start:end] * scale
    return result


def dense_product(x: Tensor, matrices: Tensor, routing: Routing) -> Tensor:
    """Rows (rows, in), sorted by expert, times (experts, in, out): (rows, out), differentiable in both."""
    if takes_grouped_mm(x, *matrices.shape[1:]):
        return grouped_mm(x, matrices, routing.ends)
    bounds = routing.bounds()
    pieces = [x[start:end] @ matrix for start, end, matrix in zip(bounds, bounds[1:], matrices, strict=False)]
    pieces.append(x.new_zeros(x.shape[0] - bounds[-1], matrices.shape[2]))
    return torch.cat(pieces)
