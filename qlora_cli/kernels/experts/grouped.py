"""Products of rows sorted by expert with 4-bit matrices: unpacked on the way, or a group of experts at a time before.

These are dequantised for products in the rows' dtype, or become e4m3 codes for products in 8 bits.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qlora_cli.kernels import float8
from qlora_cli.kernels.experts import dense, lanes, low_rank, products, rows
from qlora_cli.kernels.experts.codes import unpack_stack
from qlora_cli.kernels.experts.float8 import multiply_codes
from qlora_cli.kernels.experts.operands import Routing, Update, are_few, workspace
from qlora_cli.kernels.grouped_mm import grouped_mm, takes_grouped_mm, tiles_are_faster
from qlora_cli.kernels.weights import FrozenWeight

LANE_ROWS = 8  # up to which the product's program is the one of lanes


def multiply(
    x: Tensor,
    weight: FrozenWeight,
    ends: Tensor,
    *,
    backward: bool = False,
    gathered: Routing | None = None,
    update: Update | None = None,
    how: str | None = None,
) -> Tensor:
    """x W^T, or x W, with each row's expert's W, and what an adapter adds to it.

    In 8 bits where the weight has a `stack_scale`, but for few rows, whose product is that of reading 4 bits: those stay
    in their own dtype.

    Args:
        x: (rows, in), contiguous, sorted by expert; with `gathered`, (tokens, in).
        weight: The experts' matrices, one below the other; packed or of `float8.with_stack_scale`.
        ends: int32 (experts,), the row behind each one's last.
        backward: Whether it is x W.
        gathered: Whose places the rows are, where x has those of the tokens.
        update: Added; rounded with the product where that is of dequantised matrices by our tiles, else after it.
        how: "packed", "tiles" or "library", in the rows' dtype; None for what is known to be fast, by lanes too.

    Returns:
        (rows, out); rows of no expert are undefined.
    """
    experts = len(ends)
    rows_ = len(x) if gathered is None else len(gathered.source)
    if how == "packed" or (how is None and _are_few(rows_, weight, experts)):
        few = how is None and not backward and rows_ <= LANE_ROWS * experts and lanes.takes_lanes(x)
        named: dict[str, Any] = {} if gathered is None else {"source": gathered.source, "choices": gathered.choices}
        if few:
            out = lanes.multiply_lanes(x, weight, weight.columns, ends, **named)
        else:
            out = products.multiply_packed(x, weight, weight.columns, ends, backward=backward, **named)
        return _add(out, update, ends)
    if weight.stack_scale is not None and how is None:
        rounded = float8.quantise_rows(x)
        return multiply_rounded(rounded, x.dtype, weight, ends, backward=backward, gathered=gathered, update=update)
    if update is not None:
        update = Update(update.projected, low_rank.arrange(update.second, x.dtype, rows_))
    call = partial(_multiply_dequantised, x, weight, ends, backward=backward, gathered=gathered, update=update, how=how)
    expert_bytes = weight.rows // experts * weight.columns * x.element_size()
    return _in_groups(call, experts, expert_bytes, weight.dense)


def multiply_rounded(
    rounded: tuple[Tensor, Tensor],
    dtype: torch.dtype,
    weight: FrozenWeight,
    ends: Tensor,
    *,
    backward: bool = False,
    gathered: Routing | None = None,
    update: Update | None = None,
) -> Tensor:
    """As `multiply`, in 8 bits, of rows that `float8.quantise_rows` has rounded; `dtype` is the result's."""
    rows_ = len(rounded[0]) if gathered is None else len(gathered.source)
    if update is not None:
        update = Update(update.projected, low_rank.arrange(update.second, dtype, rows_))
    call = partial(_multiply_codes, rounded, dtype, weight, ends, backward=backward, gathered=gathered, update=update)
    return _in_groups(call, len(ends), weight.rows // len(ends) * weight.columns, weight.codes)


def _in_groups(groups: Callable[..., Tensor], experts: int, expert_bytes: int, unpacked: Tensor | None) -> Tensor:
    """What a product gives of as many experts at once as the workspace holds; of all where they are there unpacked."""
    return groups(at_once=experts) if unpacked is not None else workspace.multiply(groups, experts, expert_bytes)


def unpack(weight: FrozenWeight, experts: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """What `multiply` and its gradient unpack of a stack, apart from the reserved buffer: fields that it takes instead.

    Returns:
        `dense`, (experts * out, in) in `dtype`; or `codes` and `turned_codes`, e4m3 (experts, out, in) and (experts, in, out).
    """
    if weight.stack_scale is None:
        return {"dense": weight.values(dtype).clone()}
    ways = {"codes": False, "turned_codes": True}
    return {name: unpack_stack(weight, experts, 0, experts, transposed=way).clone() for name, way in ways.items()}


def rounds(rows_: int, weight: FrozenWeight, experts: int) -> bool:
    """Whether `multiply` rounds so many rows to e4m3."""
    return weight.stack_scale is not None and not _are_few(rows_, weight, experts)


def _multiply_dequantised(
    x: Tensor,
    weight: FrozenWeight,
    ends: Tensor,
    *,
    at_once: int,
    backward: bool,
    gathered: Routing | None,
    update: Update | None,
    how: str | None,
) -> Tensor:
    """So many experts are dequantised at once, one group after the other in the same memory."""
    experts, matrix_rows = len(ends), weight.rows // len(ends)
    rows_ = len(x) if gathered is None else len(gathered.source)
    out = None
    by_library = how == "library" or (how is None and not tiles_are_faster(x.device))
    for first in range(0, experts, at_once):
        some = min(at_once, experts - first)
        values = weight.values(x.dtype, first * matrix_rows, (first + some) * matrix_rows)
        values = values.view(some, matrix_rows, weight.columns)
        matrices = values if backward else values.transpose(-2, -1)
        if some == experts and by_library and takes_grouped_mm(x, *matrices.shape[1:]):
            spread = x if gathered is None else rows.expand(x, gathered)
            return _add(grouped_mm(spread, matrices, ends), update, ends)
        if out is None:
            out = torch.empty(rows_, matrices.shape[2], dtype=x.dtype, device=x.device)
        dense.multiply_dense(x, matrices, ends, out, first=first, gathered=gathered, update=update)
        del values, matrices
    assert out is not None
    return out


def _multiply_codes(
    rounded: tuple[Tensor, Tensor],
    dtype: torch.dtype,
    weight: FrozenWeight,
    ends: Tensor,
    *,
    at_once: int,
    backward: bool,
    gathered: Routing | None,
    update: Update | None,
) -> Tensor:
    """As `_multiply_dequantised`, in 8 bits, of the codes of x and their scales; `dtype` is the result's."""
    experts, matrix_rows = len(ends), weight.rows // len(ends)
    assert weight.stack_scale is not None
    rows_ = len(rounded[0]) if gathered is None else len(gathered.source)
    out = torch.empty(rows_, weight.columns if backward else matrix_rows, dtype=dtype, device=ends.device)
    for first in range(0, experts, at_once):
        codes = weight.turned_codes if backward else weight.codes
        if codes is None:
            codes = unpack_stack(weight, experts, first, min(at_once, experts - first), transposed=backward)
        multiply_codes(*rounded, codes, weight.stack_scale, ends, out, first=first, gathered=gathered, update=update)
        del codes
    return out


def _add(out: Tensor, update: Update | None, ends: Tensor) -> Tensor:
    """A product with an adapter's update, added in place."""
    if update is not None:
        low_rank.add_product(out, *update, ends)
    return out


def _are_few(rows_: int, weight: FrozenWeight, experts: int) -> bool:
    return are_few(rows_, experts) and products.takes_packed(weight, weight.columns)
