"""Frozen weights of linear layers as the fused op takes them: packed, dequantised, or with what 8 bits need."""

from typing import Any

import torch
from torch import Tensor, nn

from qlora_cli.core.models.quantization import STREAMED
from qlora_cli.core.models.structure import is_plain_linear
from qlora_cli.kernels import float8
from qlora_cli.kernels.weights import FrozenWeight


def frozen_weight(
    module: nn.Module, dtype: torch.dtype, *, resident: bool, in_8_bits: bool = False
) -> FrozenWeight | None:
    """The raw tensors of a frozen linear layer, a 4-bit one of bitsandbytes or an nn.Linear in `dtype`; None when it is
    not one, or is stored in a way not covered. `resident` has the dequantised values kept, not the packed ones, or those
    of a 4-bit weight that is multiplied `in_8_bits` beside them."""
    weight: Any = getattr(module, "weight", None)
    if weight is None or weight.requires_grad:
        return None
    state = getattr(weight, "quant_state", None)
    if state is None:
        if is_plain_linear(module) and weight.dtype == dtype and weight.ndim == 2:
            return FrozenWeight(weight.shape[0], weight.shape[1], dense=weight.detach())
        return None
    if getattr(state, "packing_format_for_cpu", False) or len(state.shape) != 2:
        return None
    packed = FrozenWeight.of_state(state, weight.detach().as_subclass(Tensor).view(torch.uint8).flatten())
    if in_8_bits:
        if (bring := module.__dict__.get(STREAMED)) is not None:
            bring()  # its scales are of all its values
        return float8.with_codes(packed, resident=resident)
    return FrozenWeight(packed.rows, packed.columns, dense=packed.values(dtype)) if resident else packed
