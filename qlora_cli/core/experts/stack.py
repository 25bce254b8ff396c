"""Stack of 4-bit expert matrices: each quantised by itself as bitsandbytes quantises it, all in a few tensors.

A matrix is quantised as (out, in), blocks along its inputs, also where the model keeps it the other way round: so are
linear layers, and so is MXFP4. One by one because double quantisation takes the mean of a whole tensor's constants
(https://arxiv.org/abs/2305.14314, section 3): quantised as one tensor, an expert's values would depend on the others.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlora_cli.core.bnb import bitsandbytes as bnb
from qlora_cli.core.experts.layout import ExpertWeight
from qlora_cli.kernels.experts.operands import WORKSPACE_BYTES
from qlora_cli.kernels.weights import FrozenWeight

BLOCK_SIZE = 64  # weights a constant covers
NESTED_BLOCK_SIZE = 256  # constants a second-level constant covers (double quantisation)


class Packed(NamedTuple):
    """Tensors of one or more packed matrices, one behind the other.

    Attributes:
        codes: uint8, two values a byte.
        absmax: A constant a block of 64: fp32, or uint8 codes when nested.
        nested_absmax: fp32, a constant for so many of them as divide both 256 and the blocks of a matrix; or None.
        offset: fp32, one for each of `nested_absmax`; or None.
    """

    codes: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    offset: Tensor | None


def can_pack(weight: ExpertWeight) -> bool:
    """Whether each expert's matrix consists of whole blocks."""
    return weight.elements % BLOCK_SIZE == 0


def nested_block_size(elements: int) -> int:
    """Constants that a second-level constant of a stack covers, for matrices of so many weights each.

    It divides those of half a matrix too: gate and up may have been quantised apart.
    """
    blocks = elements // BLOCK_SIZE
    return 1 if blocks % 2 else math.gcd(NESTED_BLOCK_SIZE, blocks // 2)


def pack_matrix(matrix: Tensor, *, quant_type: str, double_quant: bool) -> Packed:
    """Quantises one matrix, (out, in) in the compute dtype, to the bits that bitsandbytes makes of it."""
    codes, state = bnb.functional.quantize_4bit(
        matrix.contiguous(), blocksize=BLOCK_SIZE, compress_statistics=double_quant, quant_type=quant_type
    )
    return packed_of(codes, state)


def pack_matrices(matrices: Tensor, *, quant_type: str, double_quant: bool) -> Packed:
    """Quantises some matrices, (count, out, in) in the compute dtype, contiguous: the same bits as `pack_matrix` of each."""
    count, elements = len(matrices), matrices[0].numel()
    blocks = elements // BLOCK_SIZE
    if count == 1 or blocks % NESTED_BLOCK_SIZE:  # scales of scales would be of two matrices
        return join_packed([pack_matrix(each, quant_type=quant_type, double_quant=double_quant) for each in matrices])
    codes, state = bnb.functional.quantize_4bit(matrices, blocksize=BLOCK_SIZE, quant_type=quant_type)
    if not double_quant:
        return Packed(codes.flatten(), state.absmax.flatten(), None, None)
    absmax = state.absmax.view(count, blocks)
    offsets = torch.stack([own.mean() for own in absmax])  # one by one: a sum's order decides its last bit
    nested, state = bnb.functional.quantize_blockwise(
        (absmax - offsets[:, None]).flatten(), blocksize=NESTED_BLOCK_SIZE
    )
    every = nested_block_size(elements)
    repeated = state.absmax.repeat_interleave(NESTED_BLOCK_SIZE // every)
    return Packed(codes.flatten(), nested, repeated, offsets.repeat_interleave(blocks // every))


def join_packed(pieces: Sequence[Packed]) -> Packed:
    """Packed matrices, or parts of one, one behind the other."""
    kinds: Any = zip(*pieces, strict=True)
    return Packed._make(None if kind[0] is None else torch.cat(kind) for kind in kinds)


def packed_of(codes: Tensor, state: Any, elements: int | None = None) -> Packed:
    """The tensors of a weight that bitsandbytes has quantised, of whole blocks.

    Args:
        codes: uint8.
        state: Its `QuantState`.
        elements: Of the matrix in the stack, where it is made of several such weights one above the other.
    """
    if state.state2 is None:
        return Packed(codes.flatten(), state.absmax.flatten(), None, None)
    every = nested_block_size(elements or int(torch.Size(state.shape).numel()))
    blocks = state.absmax.numel()
    nested = state.state2.absmax.repeat_interleave(NESTED_BLOCK_SIZE // every)[: blocks // every]
    return Packed(codes.flatten(), state.absmax.flatten(), nested, state.offset.float().expand(len(nested)))


def empty_stack(weight: ExpertWeight, *, double_quant: bool, device: torch.device) -> Packed:
    """Room for a whole stack."""
    total = weight.experts * weight.elements
    blocks = total // BLOCK_SIZE
    codes = torch.empty(total // 2, dtype=torch.uint8, device=device)
    if not double_quant:
        return Packed(codes, torch.empty(blocks, dtype=torch.float32, device=device), None, None)
    nested = blocks // nested_block_size(weight.elements)
    return Packed(
        codes,
        torch.empty(blocks, dtype=torch.uint8, device=device),
        torch.empty(nested, dtype=torch.float32, device=device),
        torch.empty(nested, dtype=torch.float32, device=device),
    )


def stack_bytes(weight: ExpertWeight, *, double_quant: bool) -> int:
    """Bytes of a whole stack, as it is held on the device."""
    blocks = weight.experts * weight.elements // BLOCK_SIZE
    constants = blocks + 8 * (blocks // nested_block_size(weight.elements)) if double_quant else 4 * blocks
    return weight.experts * weight.elements // 2 + constants


def put_packed(stack: Packed, packed: Packed, start: float) -> None:
    """Copies packed matrices into their place, which begins at so large a share of the whole stack."""
    for whole, part in zip(stack, packed, strict=True):
        if whole is not None and part is not None:
            first = round(start * whole.numel())
            whole[first : first + part.numel()].copy_(part)


def code_tables(quant_type: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """The 16 values of a 4-bit type and the 256 of its constants' codes, fp32, as bitsandbytes has them."""
    code = bnb.functional.get_4bit_type(quant_type, device=device)
    return code, bnb.functional.create_dynamic_map().to(device)


def expert_values(
    stack: FrozenWeight, weight: ExpertWeight, quant_type: str, dtype: torch.dtype, first: int, end: int
) -> Tensor:
    """Matrices of experts `first` to `end`, (experts, out, in) in `dtype`; valid until the next values are asked for.

    Bit-equal to `dequantize_4bit` of each: on a GPU the same fp32 products, rounded once; on a CPU by bitsandbytes
    itself, whose kernel rounds to bfloat16 in its own way.
    """
    shape = (end - first, weight.rows, weight.columns)
    assert stack.packed is not None
    if stack.packed.is_cuda:
        return stack.values(dtype, first * weight.rows, end * weight.rows).view(shape)
    size = weight.elements
    state = bnb.functional.QuantState(
        absmax=stack.block_scales(first * size // stack.blocksize, end * size // stack.blocksize),
        shape=torch.Size([1, (end - first) * size]),  # as one long row: the CPU kernel starts a new block at each row
        code=stack.code,
        blocksize=stack.blocksize,
        quant_type=quant_type,
        dtype=dtype,
    )
    return bnb.functional.dequantize_4bit(stack.packed[first * size // 2 : end * size // 2], state).view(shape)


def part_of(stack: FrozenWeight, weight: ExpertWeight, first: int, end: int) -> FrozenWeight:
    """Experts `first` to `end` of a stack, as views."""
    assert stack.packed is not None and stack.absmax is not None
    size, block = weight.elements, stack.blocksize

    def cut(tensor: Tensor | None, values: int) -> Tensor | None:
        """Of a tensor with an element for so many values."""
        return None if tensor is None else tensor[first * size // values : end * size // values]

    return stack._replace(
        rows=(end - first) * weight.rows,
        dense=None,
        packed=cut(stack.packed, 2),
        absmax=cut(stack.absmax, block),
        nested_absmax=cut(stack.nested_absmax, block * stack.nested_blocksize),
        offset=cut(stack.offset, block * stack.nested_blocksize),
        stack_scale=cut(stack.stack_scale, size),
    )


def of_this_pass(stack: FrozenWeight) -> FrozenWeight:
    """A stack as it is multiplied now: evaluation is not in 8 bits, as answers are not."""
    return stack if stack.stack_scale is None or torch.is_grad_enabled() else stack.plain()


def bytes_at_once(weight: ExpertWeight, itemsize: int) -> int:
    """Of those matrices of a stack that are unpacked at once, to so many bytes a value."""
    matrix_bytes = weight.elements * itemsize
    return matrix_bytes * min(weight.experts, max(1, WORKSPACE_BYTES // matrix_bytes))
