"""Formats in which a checkpoint's weights are stored quantised already: which are read here, and their values.

bitsandbytes' 4 bits; FP8 with a scale for each block (https://arxiv.org/abs/2412.19437, section 3.3.2); and MXFP4, as
gpt-oss is released (OCP Microscaling Formats 1.0, sections 5.2 and 6.3).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qlora_cli.core.storage.safetensors_header import TensorEntry
from qlora_cli.errors import ModelError

FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # E2M1; the highest bit of a code is the sign
EXPONENT_BIAS = 127  # of E8M0
SCALE_DTYPES = ("F32", "BF16", "F16", "U8", "F8_E8M0")  # of FP8; bytes are E8M0 too


@dataclass(frozen=True)
class StoredFormat:
    """How a checkpoint is stored quantised, by its configuration.

    Attributes:
        method: bitsandbytes, fp8 or mxfp4.
        quant_type: nf4 or fp4, of bitsandbytes' 4 bits.
        double_quant: Likewise.
        skipped: Names or patterns of modules that it leaves in 16 bits.
        block: Rows and columns that an FP8 scale covers; None for one scale a weight.
    """

    method: str
    quant_type: str | None = None
    double_quant: bool = False
    skipped: tuple[str, ...] = ()
    block: tuple[int, int] | None = None

    @property
    def is_four_bit(self) -> bool:
        """Whether it is bitsandbytes' own, which is kept bit for bit."""
        return self.method == "bitsandbytes"

    @property
    def bytes_per_weight(self) -> float:
        """Bytes that one quantised weight takes in the files, with its share of what its block has (float32 but for MXFP4's
        exponents, and nested in bytes where quantised twice; https://arxiv.org/abs/2305.14314, section 3)."""
        if self.method == "fp8":
            return 1 + (4 / math.prod(self.block) if self.block else 0)
        if self.method == "mxfp4":
            return 0.5 + 1 / 32
        return 0.5 + ((1 + 4 / 256) / 64 if self.double_quant else 4 / 64)


def stored_format(config: Any, model: str) -> StoredFormat | None:
    """How a checkpoint is stored, from its configuration alone; None for a plain one.

    Args:
        config: Of transformers.
        model: As the user gave it.

    Raises:
        ModelError: In a format that cannot be trained on, with what to use instead.
    """
    settings: Any = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    settings = settings if isinstance(settings, Mapping) else settings.to_dict()
    _check_settings(settings, model)
    method = getattr(settings.get("quant_method"), "value", settings.get("quant_method"))
    if method is None and settings.get("load_in_4bit"):
        method = "bitsandbytes"
    skipped = tuple(settings.get("llm_int8_skip_modules") or settings.get("modules_to_not_convert") or ())
    if method == "bitsandbytes" and settings.get("load_in_4bit"):
        quant_type = settings.get("bnb_4bit_quant_type", "fp4")
        return StoredFormat(method, quant_type, bool(settings.get("bnb_4bit_use_double_quant")), skipped)
    if method == "fp8" and settings.get("expert_dtype", "fp8") == "fp8":
        block = settings.get("weight_block_size")
        return StoredFormat(method, skipped=skipped, block=tuple(block) if block else None)
    if method == "mxfp4":
        return StoredFormat(method, skipped=skipped)
    name = {"bitsandbytes": "bitsandbytes in 8 bits", "fp8": "FP8 with experts in FP4"}.get(str(method), method)
    by = f"by {name}" if name else "in a way that its config.json does not name"
    raise ModelError(
        f"{model} is quantised already, {by}, and an adapter cannot be trained on it here.",
        "Give --model the 16-bit checkpoint it was made from, which qlora quantises itself, or one in bitsandbytes' "
        "4 bits, MXFP4 or block-scaled FP8.",
    )


def _check_settings(settings: Mapping[str, Any], model: str) -> None:
    """Raises ModelError where a setting that is read here is none of its kind."""
    listed = (list, tuple)
    kinds = {"llm_int8_skip_modules": listed, "modules_to_not_convert": listed, "weight_block_size": listed}
    wrong = [n for n, kind in kinds.items() if settings.get(n) is not None and not isinstance(settings[n], kind)]
    block = settings.get("weight_block_size")
    if not wrong and block and not (len(block) == 2 and all(type(size) is int and size > 0 for size in block)):
        wrong = ["weight_block_size"]
    if not wrong and settings.get("bnb_4bit_quant_type", "fp4") not in ("fp4", "nf4"):
        wrong = ["bnb_4bit_quant_type"]
    if wrong:
        raise ModelError(
            f"{wrong[0]} is {settings[wrong[0]]!r} in the quantization_config of {model}.",
            "Mend its config.json, or download the model again.",
        )


def require_fp8_fit(codes: TensorEntry, scales: TensorEntry, block: tuple[int, int] | None) -> None:
    """Checks that the scales of a weight in FP8 are numbers for each of its blocks, or one for all.

    Raises:
        ModelError: They are not.
    """
    if scales.dtype_name not in SCALE_DTYPES:
        raise _unfit(codes.name, f"{scales.name} is stored as {scales.dtype_name}, which is no scale")
    if scales.elements == 1:
        return
    block_shape = block or codes.shape[-2:]  # stacked experts that have no blocks have one scale each
    blocks = (-(-length // size) for length, size in zip(codes.shape[-2:], block_shape, strict=False))
    if len(codes.shape) > 1 and scales.shape == (*codes.shape[:-2], *blocks):
        return
    if block is None:
        raise ModelError(
            f"{codes.name} has {scales.elements} scales where its configuration names no block.",
            "Name it as weight_block_size in the quantization_config of its config.json, or download the model again.",
        )
    found = f"it has scales for {scales.shape} blocks, which do not cover it in blocks of {block[0]} x {block[1]}"
    raise _unfit(codes.name, found)


def require_mxfp4_fit(blocks: TensorEntry, scales: TensorEntry) -> None:
    """Checks that a weight in MXFP4 has an exponent for each block of 32.

    Raises:
        ModelError: It has not.
    """
    if {blocks.dtype_name, scales.dtype_name} != {"U8"} or blocks.shape != (*scales.shape, 16):
        found = f"{blocks.shape} in {blocks.dtype_name} with exponents {scales.shape} in {scales.dtype_name}"
        raise _unfit(blocks.name, f"it is {found}, which do not belong together")


def _unfit(name: str, found: str) -> ModelError:
    return ModelError(f"{name} is stored quantised, and {found}.", "Download the model again.")


def fp8_values(codes: Tensor, scales: Tensor, block: tuple[int, int] | None, first_row: int) -> Tensor:
    """Values (…, rows, columns) fp32: each code times the scale of its block; blocks at the edges may be partial.

    Args:
        codes: (…, rows, columns) float8.
        scales: (…, ⌈rows / block⌉, ⌈columns / block⌉) of the whole weight, or one number.
        block: Rows and columns of a block, from the configuration: the shapes alone do not tell it. None for one scale a
            weight, or one for each of a stack, (…, 1, 1).
        first_row: Of the weight, that `codes` begin with.
    """
    if scales.dtype == torch.uint8:
        scales = torch.exp2(scales.float() - EXPONENT_BIAS)
    scales = scales.float()
    if scales.numel() == 1:
        return codes.float() * scales.reshape(())
    if block is None:
        return codes.float() * scales
    rows = (first_row + torch.arange(codes.shape[-2], device=codes.device)) // block[0]
    columns = torch.arange(codes.shape[-1], device=codes.device) // block[1]
    return codes.float() * scales[..., rows, :][..., columns]


def mxfp4_values(blocks: Tensor, scales: Tensor) -> Tensor:
    """Values (…, in, out) bf16, exact: stored as (…, out, in / 32, 16) bytes, with an exponent for each 32 inputs.

    Args:
        blocks: uint8, two codes a byte, the low half first.
        scales: (…, out, in / 32) uint8, E8M0.
    """
    positive = torch.tensor(FP4_VALUES, dtype=torch.float32, device=blocks.device)
    table = torch.cat((positive, -positive))
    codes = torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(-2)  # (…, out, in / 32, 32)
    values = torch.ldexp(table[codes.int()], (scales.int() - EXPONENT_BIAS)[..., None])
    return values.flatten(-2).transpose(-2, -1).to(torch.bfloat16)
