"""4-bit linears on the CPU with their weights dequantised once: the same numbers many times faster.

A GPU dequantises weights faster than it reads them; a CPU needs most of a token's time for it. So each weight is
dequantised once, if all of them fit in half of the memory that is free.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_cli.core.device import read_free_bytes
from qlora_cli.core.models.quantization import dequantized_weight, four_bit_linears, logical_numel

SHARE = 0.5  # of the free memory


def unpack_linears(model: Any, free_bytes: int | None = None) -> bool:
    """Lets every 4-bit linear of a model instance compute with its weight dequantised; returns whether memory allows it.

    The packed weights stay where they are. Wrapping a linear with an adapter afterwards changes nothing.

    Args:
        model: Its linears are changed in place.
        free_bytes: Memory to be had; by default what the host has available.
    """
    if free_bytes is None:
        free_bytes = read_free_bytes(torch.device("cpu"))
    linears = [module for _, module in four_bit_linears(model)]
    needed = sum(logical_numel(module.weight) * module.compute_dtype.itemsize for module in linears)
    if needed > SHARE * free_bytes:
        return False
    for module in linears:
        _unpack(module)
    return True


def _unpack(module: Any) -> None:
    weight = dequantized_weight(module).to(module.compute_dtype)
    bias = None if module.bias is None else module.bias.detach().to(module.compute_dtype)

    def forward(x: Tensor) -> Tensor:
        return F.linear(x.to(weight.dtype), weight, bias).to(x.dtype)

    module.forward = forward
