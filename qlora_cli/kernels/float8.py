"""Products in 8-bit floating point (e4m3): a frozen 4-bit weight with rows of activations or of output gradients.

Activations and gradients have one scale a token, a weight one an output row, and for the gradient of the input, whose
sum goes along those rows, one an input column. Rounding a value to e4m3 moves it by 2.6 % of itself in the mean square,
rounding it to NF4 by 9 % of its block's. On the CPU the products are emulated: the same rounding, sums in fp32.
"""

import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor

from qlora_cli.kernels.weights import FrozenWeight, reserved_room

if importlib.util.find_spec("triton"):  # not there beside a CPU-only torch
    from qlora_cli.kernels.triton import float8 as triton_float8

LARGEST = 448.0  # of e4m3
LEAST_ROW = 2.0**-100  # what a row's largest value counts as at the least: a row of zeros has a scale
ALIGNMENT = 16  # of both sides of a weight: what the products of tensor cores and libraries ask for
# Sums within the tensor core keep some 14 bits (arXiv:2412.19437, section 3.3.2); promoted to fp32 every 128 values, the
# product takes longer. See benchmarks/matmul.md for what both cost and change.
FAST_SUMS = True
MANY_ROWS = 512  # of which the library refuses no product
_REFUSED: set[tuple] = set()  # shapes, dtypes and devices of products that it did


def covers(weight: FrozenWeight) -> bool:
    """Whether a weight can be multiplied in 8 bits: packed in 4, with sides that the products take."""
    return weight.packed is not None and weight.rows % ALIGNMENT == 0 and weight.columns % ALIGNMENT == 0


def side_scales(weight: FrozenWeight) -> tuple[Tensor, Tensor]:
    """What each row, and what each column, of a packed weight is divided by to fit e4m3: fp32 (rows,) and (columns,)."""
    assert weight.packed is not None
    by_row, by_column = [], torch.zeros(weight.columns, device=weight.packed.device)
    for part in weight.row_slices(2**26, 4):
        sizes = weight.values(torch.float32, *part).abs_()
        by_row.append(sizes.amax(1))
        torch.maximum(by_column, sizes.amax(0), out=by_column)
        del sizes
    return tuple(largest.clamp(min=LEAST_ROW) / LARGEST for largest in (torch.cat(by_row), by_column))  # type: ignore[return-value]


def with_codes(weight: FrozenWeight, *, resident: bool) -> FrozenWeight:
    """A packed weight that is multiplied in 8 bits. `resident` has its codes kept in both layouts, 2 bytes a value;
    without it they are made of the 4 bits for each product."""
    row_scale, column_scale = side_scales(weight)
    scaled = weight._replace(row_scale=row_scale, column_scale=column_scale)
    if not resident:
        return scaled
    codes, turned = (_unpack(scaled, 0, weight.rows, transposed=way, keep=True) for way in (False, True))
    return scaled._replace(codes=codes, turned_codes=turned)


def join(weights: Sequence[FrozenWeight]) -> tuple[FrozenWeight, list[FrozenWeight]]:
    """Weights with resident codes that are multiplied with one input as one, the rows of each after those before it.

    Returns:
        The weight of all rows, whose columns have one scale for all, and each as a part of its tensors.
    """
    rows = [weight.rows for weight in weights]
    column_scale = torch.stack([weight.column_scale for weight in weights if weight.column_scale is not None]).amax(0)
    row_scale, codes = (torch.cat([getattr(weight, name) for weight in weights]) for name in ("row_scale", "codes"))
    scaled = [weight._replace(column_scale=column_scale) for weight in weights]
    turned = torch.cat([_unpack(weight, 0, weight.rows, transposed=True, keep=True) for weight in scaled], 1)
    whole = FrozenWeight(
        sum(rows), len(turned), row_scale=row_scale, column_scale=column_scale, codes=codes, turned_codes=turned
    )
    held = zip(scaled, row_scale.split(rows), codes.split(rows), turned.split(rows, 1), strict=True)
    return whole, [each._replace(row_scale=scale, codes=own, turned_codes=turn) for each, scale, own, turn in held]


def covers_stack(weight: FrozenWeight, experts: int) -> bool:
    """Whether a stack of experts' matrices, one below the other, can be multiplied in 8 bits: see `covers`."""
    rows, rest = divmod(weight.rows, experts)
    return rest == 0 and covers(weight._replace(rows=rows))


def with_stack_scale(weight: FrozenWeight, experts: int) -> FrozenWeight:
    """A stack of packed matrices that is multiplied in 8 bits, each over one scale, of its largest block; nothing waits
    for the device.

    Rounding to e4m3 is relative down to 2^-6 / 448 of the largest value, 1/28,672: a scale for each row or column would
    move next to no value less. And with one for a matrix both passes read the same codes, straight or transposed.
    """
    assert weight.absmax is not None and weight.code is not None
    blocks = weight.rows // experts * weight.columns // weight.blocksize
    some = max(1, 2**20 // blocks) * blocks  # of a few experts at a time, in a few megabytes
    parts = (weight.block_scales(first, first + some) for first in range(0, experts * blocks, some))
    sizes = torch.cat([part.abs().view(-1, blocks).amax(1) for part in parts])
    scale = sizes * weight.code.abs().amax() / LARGEST
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))  # a matrix of zeros has one
    return weight._replace(stack_scale=scale)


def quantise_rows(x: Tensor, beside: Sequence[Tensor] = ()) -> tuple[Tensor, Tensor]:
    """x, (rows, columns), in e4m3 with a scale for each row; two more contiguous ones `beside` it are part of it.

    Returns:
        Codes e4m3 (rows, columns) and scales fp32 (rows, 1). A row with a NaN or an infinity gives NaN in its product.
    """
    if x.is_cuda:
        return triton_float8.quantise_rows(x if x.stride(1) == 1 else x.contiguous(), LEAST_ROW, beside=beside)
    values = (torch.cat([x, *beside], 1) if beside else x).float()
    largest = values.abs().amax(1, keepdim=True).clamp(min=LEAST_ROW)
    inverse = torch.full_like(largest, LARGEST) / largest  # a number by a tensor would be rounded twice
    return (values * inverse).to(torch.float8_e4m3fn), largest / LARGEST


def _unpack(weight: FrozenWeight, first_row: int, end_row: int, *, transposed: bool, keep: bool = False) -> Tensor:
    """Codes of these rows, or of their transpose, contiguous; in the buffer of `reserve_values` unless they are kept."""
    assert weight.packed is not None and weight.row_scale is not None and weight.column_scale is not None
    scale = weight.column_scale if transposed else weight.row_scale
    shape = (end_row - first_row, weight.columns)
    shape = shape[::-1] if transposed else shape
    device = weight.packed.device
    if weight.packed.is_cuda:
        if keep:
            out = torch.empty(shape, dtype=torch.float8_e4m3fn, device=device)
        else:
            out = reserved_room(*shape, torch.float8_e4m3fn, device)
        return triton_float8.unpack(weight, scale, out, first_row, end_row, transposed=transposed)
    values = weight.values(torch.float32, first_row, end_row)
    if transposed:
        return (values * scale.reciprocal()).to(torch.float8_e4m3fn).t().contiguous()
    return (values * scale[first_row:end_row, None].reciprocal()).to(torch.float8_e4m3fn)


def scaled_product(
    left: Tensor,
    left_scale: Tensor,
    right: Tensor,
    right_scale: Tensor,
    out: Tensor,
    bias: Tensor | None = None,
    *,
    fast: bool = FAST_SUMS,
) -> None:
    """out = (left right^T) left_scale right_scale^T + bias, by the card's 8-bit arithmetic, emulated on the CPU.

    Args:
        left: e4m3 (rows, inner), values of a row side by side.
        left_scale: fp32 (rows, 1).
        right: e4m3 (columns, inner), likewise.
        right_scale: fp32 (columns,).
        out: (rows, columns), bf16 on a card.
        bias: (columns,) in the dtype of `out`; it joins before the result is rounded, where the library can do that.
        fast: Whether sums stay in the tensor core to their end.
    """
    if not left.is_cuda:
        product = (left.float() @ right.float().t()) * left_scale * right_scale
        out.copy_(product if bias is None else product + bias)
        return
    result = _library_product(left, left_scale, right, right_scale, bias, out, fast=fast)
    if result is not out:
        out.copy_(result)


def _library_product(
    left: Tensor,
    left_scale: Tensor,
    right: Tensor,
    right_scale: Tensor,
    bias: Tensor | None,
    out: Tensor,
    *,
    fast: bool,
) -> Tensor:
    """What `scaled_product` wants, in `out` where that is contiguous. A product that the library refuses is made of others: the
    bias behind it, or of more rows.

    It has no kernel for some of few rows whose sum is long: cuBLAS 13 for none with a bias at up to 32 rows and 9,216 values and
    more, other versions without a bias too (https://github.com/pytorch/ao/issues/4582).
    """
    rows, case = left.shape[0], (*left.shape, *out.shape, out.dtype, out.device, bias is None)
    if case not in _REFUSED:
        try:
            return torch._scaled_mm(
                left,
                right.t(),
                scale_a=left_scale,
                scale_b=right_scale[None],
                bias=bias,
                out_dtype=out.dtype,
                use_fast_accum=fast,
                **({"out": out} if out.is_contiguous() else {}),
            )
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            if bias is None and rows >= MANY_ROWS:
                raise
            _REFUSED.add(case)
    if bias is not None:
        return _library_product(left, left_scale, right, right_scale, None, out, fast=fast).add_(bias)
    beside = MANY_ROWS - rows
    codes = torch.cat([left.view(torch.uint8), left.new_zeros((beside, left.shape[1]), dtype=torch.uint8)])
    more, scales = out.new_empty(MANY_ROWS, out.shape[1]), torch.cat([left_scale, left_scale.new_ones(beside, 1)])
    return _library_product(codes.view(left.dtype), scales, right, right_scale, None, more, fast=fast)[:rows]


def multiply(
    x: Tensor,
    weight: FrozenWeight,
    out: Tensor,
    workspace_bytes: int | None,
    quantised: tuple[Tensor, Tensor] | None = None,
    bias: Tensor | None = None,
) -> None:
    """out = x W^T + bias in 8 bits.

    Args:
        x: (rows, in).
        weight: (out, in), of `with_codes`.
        out: (rows, out) in the compute dtype.
        workspace_bytes: Most bytes of codes made at once; None for a whole weight.
        quantised: Of `quantise_rows(x)`, where that is there already.
        bias: (out,) in the compute dtype, or None.
    """
    assert weight.row_scale is not None
    codes, scale = quantise_rows(x) if quantised is None else quantised
    for first, end in code_slices(weight, weight.codes, workspace_bytes):
        values = _unpack(weight, first, end, transposed=False) if weight.codes is None else weight.codes
        part = None if bias is None else bias[first:end]
        scaled_product(codes, scale, values, weight.row_scale[first:end], out[:, first:end], part)
        del values


def multiply_transposed(grad: Tensor, weight: FrozenWeight, workspace_bytes: int | None) -> Tensor:
    """grad W in 8 bits: (rows, out) to (rows, in), in the dtype of `grad`. See `multiply`."""
    assert weight.column_scale is not None
    codes, scale = quantise_rows(grad)
    total: Tensor | None = None
    for first, end in code_slices(weight, weight.turned_codes, workspace_bytes):
        turned = weight.turned_codes
        if turned is None:
            turned = _unpack(weight, first, end, transposed=True)
        part = grad.new_empty(grad.shape[0], weight.columns)
        scaled_product(codes[:, first:end], scale, turned, weight.column_scale, part)
        total = part if total is None else total.add_(part)
        del turned
    assert total is not None
    return total


def code_slices(weight: FrozenWeight, resident: Tensor | None, workspace_bytes: int | None) -> list[tuple[int, int]]:
    """Row ranges whose codes are made one after another: one of all rows where they are resident."""
    return weight.row_slices(None if resident is not None else workspace_bytes, 1)
