"""Products of rows sorted by expert with 4-bit matrices: unpacked on the way, or dequantised a group of experts at a time."""

import torch
from torch import Tensor

from qlora_cli.kernels.experts import lanes, products, rows
from qlora_cli.kernels.experts.operands import FEW_ROWS, WORKSPACE_BYTES, Routing
from qlora_cli.kernels.grouped_mm import grouped_mm, takes_grouped_mm
from qlora_cli.kernels.weights import FrozenWeight

LANE_ROWS = 8  # up to which the product's program is the one of lanes


class Workspace:
    """How many bytes of experts are dequantised at once, for the process: less once the device had no room for it."""

    limit_bytes = WORKSPACE_BYTES


workspace = Workspace()


def multiply(
    x: Tensor, weight: FrozenWeight, ends: Tensor, *, backward: bool = False, how: str | None = None
) -> Tensor:
    """x W^T, or x W, with each row's expert's W.

    Args:
        x: (rows, in), contiguous, sorted by expert.
        weight: The experts' matrices, one below the other.
        ends: int32 (experts,), the row behind each one's last.
        backward: Whether it is x W.
        how: "packed", "tiles" or "library"; None for what is known to be fast, by lanes too.

    Returns:
        (rows, out); rows of no expert are undefined.
    """
    experts = len(ends)
    if how == "packed" or (how is None and _are_few(len(x), weight, experts)):
        if how is None and not backward and len(x) <= LANE_ROWS * experts and lanes.takes_lanes(x):
            return lanes.multiply_lanes(x, weight, weight.columns, ends)
        return products.multiply_packed(x, weight, weight.columns, ends, backward=backward)
    expert_bytes = weight.rows // experts * weight.columns * x.element_size()
    while True:
        at_once = min(experts, max(1, workspace.limit_bytes // expert_bytes))
        try:
            return _multiply_dequantised(x, weight, ends, at_once, backward=backward, how=how)
        except torch.OutOfMemoryError:
            if at_once == 1:
                raise
        workspace.limit_bytes = at_once * expert_bytes // 2


def _multiply_dequantised(
    x: Tensor, weight: FrozenWeight, ends: Tensor, at_once: int, *, backward: bool, how: str | None
) -> Tensor:
    """So many experts are dequantised at once, one group after the other in the same memory."""
    experts, matrix_rows = len(ends), weight.rows // len(ends)
    out = None
    by_library = how == "library" or (how is None and not _tiles_are_faster(x))
    for first in range(0, experts, at_once):
        some = min(at_once, experts - first)
        values = weight.values(x.dtype, first * matrix_rows, (first + some) * matrix_rows)
        values = values.view(some, matrix_rows, weight.columns)
        matrices = values if backward else values.transpose(-2, -1)
        if some == experts and by_library and takes_grouped_mm(x, *matrices.shape[1:]):
            return grouped_mm(x, matrices, ends)
        if out is None:
            out = torch.empty(len(x), matrices.shape[2], dtype=x.dtype, device=x.device)
        products.multiply_dense(x, matrices, ends, out, first=first)
        del values, matrices
    assert out is not None
    return out


def _tiles_are_faster(x: Tensor) -> bool:
    """Whether our own product is known to be the faster one: by 4 to 12 % on an H200, for Qwen3-30B-A3B's layers."""
    return x.is_cuda and torch.cuda.get_device_capability(x.device)[0] == 9


def expand_and_multiply(x: Tensor, weight: FrozenWeight, routing: Routing) -> Tensor:
    """The product of the places' rows, where few are read through their tokens."""
    experts, pairs = len(routing.ends), len(routing.source)
    if not _are_few(pairs, weight, experts):
        return multiply(rows.expand(x, routing)[0], weight, routing.ends)
    few = lanes.takes_lanes(x) and pairs <= LANE_ROWS * experts
    product = lanes.multiply_lanes if few else products.multiply_packed
    return product(x, weight, weight.columns, routing.ends, source=routing.source, choices=routing.choices)


def _are_few(rows_: int, weight: FrozenWeight, experts: int) -> bool:
    return rows_ <= FEW_ROWS * experts and products.takes_packed(weight, weight.columns)
