"""Frozen linear weight as raw tensors, packed in 4 bits or dense or both, and its values, whole or by rows."""

import functools
import importlib.util
from typing import Any, NamedTuple

import torch
from torch import Tensor

if importlib.util.find_spec("triton"):  # not there beside a CPU-only torch
    from qlora_cli.kernels.triton import nf4


_buffers: dict[torch.device, Tensor] = {}


def reserve_values(device: torch.device, bytes_: int) -> Tensor | None:
    """Has weights of a device dequantised into one buffer of so many bytes; 0 for a tensor each, as without this.

    Large tensors that come and go leave holes between smaller ones that stay, lost where memory is short. Values are
    then valid until the next ones are asked for, and who asks for them has to stay on one stream.

    Returns:
        The buffer, which CUDA graphs go on using: keep it as long as them.
    """
    buffer = torch.empty(bytes_, dtype=torch.uint8, device=device) if bytes_ else None
    if buffer is None:
        for key in [key for key in _buffers if key.type == device.type and device.index in (None, key.index)]:
            del _buffers[key]
    else:
        _buffers[buffer.device] = buffer
    return buffer


def reserved_room(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(rows, columns) to write values into: the start of the reserved buffer where there is one that is large enough."""
    bytes_ = rows * columns * dtype.itemsize
    buffer = _buffers.get(device)
    if buffer is None or buffer.numel() < bytes_:
        return torch.empty(rows, columns, dtype=dtype, device=device)
    return buffer[:bytes_].view(dtype).view(rows, columns)


class FrozenWeight(NamedTuple):
    """(out, in) values, `dense` or packed two a byte with a scale a block, or both where a stack stays unpacked.

    Attributes:
        rows: out features.
        columns: in features.
        dense: (out, in) in the compute dtype, or None.
        packed: uint8, high nibble first.
        absmax: fp32 (blocks,), or uint8 codes when nested.
        code: fp32 (16,).
        nested_absmax: fp32 (blocks / nested_blocksize,), or None.
        nested_code: fp32 (256,), or None.
        offset: fp32 scalar, or one for each nested scale, or None.
        blocksize: Values that share a scale.
        nested_blocksize: Scales that share a nested scale.
        row_scale: fp32 (out,), what a row's e4m3 codes are multiplied by, where the weight is multiplied in 8 bits
            (kernels/float8.py); else None.
        column_scale: fp32 (in,), what those of a column are, which are other codes; likewise.
        codes: e4m3 (out, in) over `row_scale` where they are resident, else None; of a stack (experts, out, in).
        turned_codes: e4m3 (in, out) over `column_scale`, likewise; of a stack (experts, in, out).
        stack_scale: fp32 (experts,), what the e4m3 codes of each expert's matrix are multiplied by, where a stack of
            them, one below the other, is multiplied in 8 bits (kernels/experts/grouped.py); else None.
    """

    rows: int
    columns: int
    dense: Tensor | None = None
    packed: Tensor | None = None
    absmax: Tensor | None = None
    code: Tensor | None = None
    nested_absmax: Tensor | None = None
    nested_code: Tensor | None = None
    offset: Tensor | None = None
    blocksize: int = 64
    nested_blocksize: int = 256
    row_scale: Tensor | None = None
    column_scale: Tensor | None = None
    codes: Tensor | None = None
    turned_codes: Tensor | None = None
    stack_scale: Tensor | None = None

    @classmethod
    def of_state(cls, state: Any, packed: Tensor | None = None) -> "FrozenWeight":
        """The weight that bitsandbytes' `QuantState` describes, of two dimensions; `packed` as it stores it."""
        nested = state.state2
        return cls(
            rows=state.shape[0],
            columns=state.shape[1],
            packed=packed,
            absmax=state.absmax,
            code=state.code,
            nested_absmax=nested.absmax if nested is not None else None,
            nested_code=nested.code if nested is not None else None,
            offset=state.offset if nested is not None else None,
            blocksize=state.blocksize,
            nested_blocksize=nested.blocksize if nested is not None else 256,
        )

    def plain(self) -> "FrozenWeight":
        """The same weight, multiplied in the dtype of what it is multiplied with."""
        return self._replace(row_scale=None, column_scale=None, codes=None, turned_codes=None, stack_scale=None)

    def values(self, dtype: torch.dtype, first_row: int = 0, end_row: int | None = None) -> Tensor:
        """Rows first_row to end_row, (end_row - first_row, in) in `dtype`; a view when dense. See `reserve_values`.

        first_row * columns must be a multiple of the blocksize, as it is for `row_slices`.
        """
        end_row = self.rows if end_row is None else end_row
        if self.dense is not None:
            return self.dense[first_row:end_row]
        assert self.packed is not None and self.absmax is not None and self.code is not None
        if self.packed.is_cuda:
            out = reserved_room(end_row - first_row, self.columns, dtype, self.packed.device)
            return nf4.dequantize_4bit(self, out, first_row * self.columns)
        return self._plain_values().view(self.rows, self.columns)[first_row:end_row].to(dtype)

    def block_scales(self, first: int = 0, end: int | None = None) -> Tensor:
        """Scales of blocks first to end, fp32 (end - first,), in plain PyTorch."""
        assert self.absmax is not None
        scales = self.absmax[first:end]
        if self.nested_absmax is None or self.nested_code is None or self.offset is None:
            return scales.float()
        block = torch.arange(first, first + scales.numel(), device=scales.device) // self.nested_blocksize
        offset = self.offset[block] if self.offset.numel() > 1 else self.offset
        return self.nested_code[scales.int()] * self.nested_absmax[block] + offset

    def _plain_values(self) -> Tensor:
        """code[nibble] * scale of its block, fp32 (out * in,), in plain PyTorch; the last byte and block may be partly filled.

        Scales are plain, or from their own 8-bit blocks: the double quantisation of arXiv:2305.14314, section 3.
        """
        assert self.packed is not None and self.code is not None
        packed, scales = self.packed.flatten(), self.block_scales()
        elements = self.rows * self.columns
        nibbles = torch.stack((packed >> 4, packed & 15), dim=-1).flatten()[:elements]
        values = self.code[nibbles.int()]
        whole = elements - elements % self.blocksize
        values[:whole].view(-1, self.blocksize).mul_(scales[: whole // self.blocksize, None])
        values[whole:] *= scales[-1:]
        return values

    def row_slices(self, limit_bytes: int | None, itemsize: int) -> list[tuple[int, int]]:
        """Row ranges, each starting with a block, whose dequantised values take about `limit_bytes` or less."""
        if limit_bytes is None or self.dense is not None:
            return [(0, self.rows)]
        step = max(1, limit_bytes // (self.columns * itemsize) // 128) * 128  # whole GEMM tiles
        if step * self.columns % self.blocksize:
            return [(0, self.rows)]
        return [(first, min(first + step, self.rows)) for first in range(0, self.rows, step)]


@functools.cache
def shared_bytes(device: torch.device) -> int:
    """Shared memory that a program on the device may have; on the CPU, where kernels are interpreted, as on an H200."""
    if device.type != "cuda":
        return 227 * 1024
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0)
