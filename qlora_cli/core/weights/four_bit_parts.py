"""bitsandbytes' 4 bits as a checkpoint stores them: the tensors beside a weight's codes, which must fit it and each other.

bitsandbytes itself looks at none of that: constants that are too few are read past their end, and of a missing second
level the codes of the first are taken for numbers.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite, prod
from typing import Any

import torch
from torch import Tensor

from qlora_cli.core.bnb import bitsandbytes as bnb
from qlora_cli.core.storage.safetensors_header import TensorEntry
from qlora_cli.errors import ModelError

STATES = {f".quant_state.bitsandbytes__{kind}": kind for kind in ("nf4", "fp4")}  # the ending of the state's name
CONSTANTS, CODE = ".absmax", ".quant_map"
NESTED, NESTED_CODE = ".nested_absmax", ".nested_quant_map"  # of double quantisation
CONSTANT_PARTS = (CONSTANTS, CODE, NESTED, NESTED_CODE)
NESTED_FIELDS = {"nested_blocksize", "nested_dtype", "nested_offset"}
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # of bitsandbytes
DTYPES = ("bfloat16", "float16", "float32")  # that its kernels give values in
MAP_TOLERANCE = 2**-8  # bfloat16 rounds so; the closest two of the 16 values are 0.005 apart


@dataclass(frozen=True)
class FourBitLayout:
    """How one weight is stored, by the state beside it."""

    name: str
    ending: str  # of the state's name
    dtype: torch.dtype  # of its values
    shape: tuple[int, ...]
    block_size: int  # weights a constant covers
    nested_block_size: int | None  # constants a second-level one covers; None without double quantisation

    @property
    def parts(self) -> dict[str, str]:
        """The names of all its tensors, by the ending behind its own."""
        nested = (NESTED, NESTED_CODE) if self.nested_block_size else ()
        return {ending: self.name + ending for ending in ("", CONSTANTS, CODE, *nested, self.ending)}

    def require_fit(self, entries: Mapping[str, TensorEntry]) -> None:
        """Checks dtypes and sizes of the parts, by their endings.

        Raises:
            ModelError: One does not fit.
        """
        elements = prod(self.shape)
        blocks = -(-elements // self.block_size)
        expected = {CONSTANTS: ("F32", blocks), CODE: ("F32", 16)}
        if self.nested_block_size:
            expected = {CONSTANTS: ("U8", blocks), CODE: ("F32", 16), NESTED_CODE: ("F32", 256)}
            expected[NESTED] = "F32", -(-blocks // self.nested_block_size)
        for ending, (dtype_name, count) in expected.items():
            entry = entries[ending]
            if (entry.dtype_name, entry.elements) != (dtype_name, count):
                found = f"has {entry.elements:,} numbers in {entry.dtype_name} instead of {count:,} in {dtype_name}"
                raise _damaged(self.name, self.name + ending, found)
        codes_bytes = (elements + 1) // 2
        if entries[""].total_bytes != codes_bytes:
            found = f"has {entries[''].total_bytes:,} bytes instead of {codes_bytes:,}"
            raise _damaged(self.name, self.name, found)


def read_layout(name: str, ending: str, state: Tensor) -> FourBitLayout:
    """The layout that a state tells, (bytes,) uint8: JSON.

    Raises:
        ModelError: It tells none that bitsandbytes writes.
    """
    try:
        fields: Any = json.loads(bytes(state.flatten().view(torch.uint8).tolist()))
        dtype, shape, size, kind = (fields[key] for key in ("dtype", "shape", "blocksize", "quant_type"))
        nested_size = fields["nested_blocksize"] if NESTED_FIELDS & fields.keys() else None
        offset = float(fields["nested_offset"]) if nested_size else 0.0
        well_formed = (
            kind == STATES[ending]
            and dtype in DTYPES
            and size in BLOCK_SIZES
            and (nested_size is None or (nested_size in BLOCK_SIZES and fields["nested_dtype"] in DTYPES))
            and isfinite(offset)
            and all(type(length) is int and length > 0 for length in shape)
        )
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        well_formed = False
    if not well_formed:
        raise _damaged(name, name + ending, "does not describe it")
    return FourBitLayout(name, ending, getattr(torch, dtype), tuple(shape), size, nested_size)


def require_values(name: str, parts: Mapping[str, Tensor]) -> None:
    """Checks what only the numbers of a weight's parts tell, by their endings.

    Raises:
        ModelError: A constant is not finite, or the codes stand for other values than those of NF4 or FP4, which
            bitsandbytes' kernels have built in.
    """
    for ending in (CONSTANTS, NESTED):
        if ending in parts and not torch.isfinite(parts[ending]).all():
            raise _damaged(name, name + ending, "holds NaN or infinity")
    kind = next(kind for ending, kind in STATES.items() if ending in parts)
    values = bnb.functional.get_4bit_type(kind, device="cpu")
    if not torch.allclose(parts[CODE].flatten(), values, rtol=MAP_TOLERANCE, atol=0.0):
        raise _damaged(name, name + CODE, f"holds other values than the 16 of {kind}")
    if NESTED_CODE in parts and not (parts[NESTED_CODE].flatten().diff() > 0).all():
        raise _damaged(name, name + NESTED_CODE, "does not rise from code to code")


def in_bytes(codes: Tensor) -> Tensor:
    """Codes as (bytes, 1) uint8, which some store as numbers of 16 or 32 bits (`bnb_4bit_quant_storage`): FSDP shards
    nothing else beside them."""
    return codes.flatten().view(torch.uint8)[:, None]


def four_bit_state(parts: Mapping[str, Tensor], device: torch.device) -> Any:
    """bitsandbytes' `QuantState` of the tensors stored beside a weight, by their endings behind its name."""
    held = {ending.removeprefix("."): tensor for ending, tensor in parts.items() if ending}
    return bnb.functional.QuantState.from_dict(held, device)


def four_bit_values_of(parts: Mapping[str, Tensor]) -> Tensor:
    """The values of a weight in bitsandbytes' 4 bits, of the tensors it is stored as, by their endings; codes in bytes."""
    state = four_bit_state(parts, parts[""].device)
    shape, state.shape = state.shape, torch.Size([1, state.shape.numel()])  # one long row, as the CPU kernel needs it
    return bnb.functional.dequantize_4bit(parts[""], state).view(shape)


def _damaged(name: str, part: str, found: str) -> ModelError:
    message = f"{name} is stored in bitsandbytes' 4 bits, and {part} {found}."
    return ModelError(message, "Download the model again, or give --model the 16-bit checkpoint it was made from.")
