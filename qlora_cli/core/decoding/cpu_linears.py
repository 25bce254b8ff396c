"""A 4-bit model on the CPU in; the same numbers many times faster out, where memory has room for unpacked weights.

A GPU unpacks weights faster than it reads them; a CPU needs most of a token's time for it. So each weight is unpacked
once, if all of them fit in half of the memory that is free.
"""

from typing import Any

import psutil
import torch.nn.functional as F
from torch import Tensor

from qlora_cli.core.models.quantization import dequantized_weight, four_bit_linears, logical_numel

SHARE = 0.5  # of the free memory


def free_bytes() -> int:
    """Memory that programs can have without others being pushed out."""
    return psutil.virtual_memory().available


def unpack_linears(model: Any) -> bool:
    """Lets every 4-bit linear of a model instance compute with its weight unpacked; returns whether there is room.

    The packed weights stay where they are. Wrapping a linear with an adapter afterwards changes nothing.
    """
    linears = [module for _, module in four_bit_linears(model)]
    needed = sum(logical_numel(module.weight) * module.compute_dtype.itemsize for module in linears)
    if needed > SHARE * free_bytes():
        return False
    for module in linears:
        _unpack(module)
    return True


def _unpack(module: Any) -> None:
    weight = dequantized_weight(module, module.compute_dtype)
    bias = None if module.bias is None else module.bias.detach().to(module.compute_dtype)

    def forward(x: Tensor) -> Tensor:
        return F.linear(x.to(weight.dtype), weight, bias).to(x.dtype)

    module.forward = forward
