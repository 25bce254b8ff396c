"""4-bit quantization (NF4, FP4) by bitsandbytes: while a model loads, of a weight, and back."""

import copy
from collections.abc import Callable, Iterator
from math import prod
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

from qlora_cli.core.bnb import bitsandbytes as bnb
from qlora_cli.core.bnb import is_loaded
from qlora_cli.core.models.raw_weights import call_layers
from qlora_cli.core.storage.safetensors_file import TensorSpec
from qlora_cli.settings.groups import QuantizationSettings

QUANT_STATE_BYTES = 512  # room for bitsandbytes' JSON of one weight; its length varies, a file's header must not
BLOCK_SIZE = 64  # weights a quantisation constant covers
NESTED_BLOCK_SIZE = 256  # constants a second-level constant covers (double quantisation)
# In the `__dict__` of a module whose weights wait on the host: a function that brings them to the device.
STREAMED = "_qlora_bring"


def is_finite(tensor: torch.Tensor) -> torch.Tensor:
    """A bool scalar that stays on the device: no synchronisation, and no memory, of which there may be little."""
    if not tensor.numel():
        return torch.ones((), dtype=torch.bool, device=tensor.device)
    lowest, highest = torch.aminmax(tensor)  # NaN wins
    return torch.isfinite(lowest) & torch.isfinite(highest)


def finite_and_zero(matrices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As `is_finite`, of each of several matrices, (count, ...); and whether each holds nothing but zeros."""
    if matrices.device.type == "cpu":  # where a reduction along a dimension takes six times as long
        lowest, highest = (torch.stack(found) for found in zip(*map(torch.aminmax, matrices), strict=True))
    else:
        lowest, highest = torch.aminmax(matrices.flatten(1), dim=1)
    return torch.isfinite(lowest) & torch.isfinite(highest), (lowest == 0) & (highest == 0)


class FourBitConfig(BitsAndBytesConfig):
    """BitsAndBytesConfig that selects the quantizer below."""

    def __init__(self, prepare: Callable[[Any], None] | None = None, **arguments: Any) -> None:
        """`prepare` is called with the model before any of its weights is loaded."""
        super().__init__(load_in_4bit=True, **arguments)
        self.quant_method = "qlora_4bit"  # type: ignore[assignment]  # a registered name of ours
        self.prepare = prepare

    def to_dict(self) -> dict[str, Any]:
        """As bitsandbytes' own: what is saved is in its format."""
        content = {name: value for name, value in super().to_dict().items() if name != "prepare"}
        return {**content, "quant_method": "bitsandbytes"}


class FourBitQuantizer(Bnb4BitHfQuantizer):
    """transformers' 4-bit quantizer, for which it is a model in 4 bits, while `packing` does the work."""

    def _process_model_before_weight_loading(self, model: Any, device_map: Any = None, **arguments: Any) -> None:
        config: Any = self.quantization_config
        if config.prepare is not None:
            config.prepare(model)
            config.prepare = None

    def param_needs_quantization(self, model: Any, param_name: str, **arguments: Any) -> bool:
        return False


if "qlora_4bit" not in AUTO_QUANTIZER_MAPPING:
    register_quantizer("qlora_4bit")(FourBitQuantizer)


def restored_linear(
    compute_dtype: torch.dtype, device: torch.device, packed: dict[str, torch.Tensor], bias: torch.Tensor | None
) -> nn.Module:
    """A 4-bit linear of tensors that a checkpoint or the cache holds; `packed` as `pack_weight` gives it."""
    weight = packed.pop("")
    linear = bnb.nn.Linear4bit(1, 1, bias is not None, compute_dtype, device="meta")
    waits = weight.device != device  # on the host: `from_prequantized` would move it
    here = weight[:0] if waits else weight
    linear.weight = bnb.nn.Params4bit.from_prequantized(here, packed, device=device, module=linear)
    if waits:
        linear.weight.data, linear.weight.quant_state.absmax = weight, packed[".absmax"]
    linear.out_features, linear.in_features = linear.weight.quant_state.shape
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


def twin_of(linear: Any, bias: nn.Parameter | None) -> nn.Module:
    """A module of its own with the weight of a 4-bit linear, which is there once."""
    twin = bnb.nn.Linear4bit(1, 1, bias is not None, linear.compute_dtype, device="meta")
    twin.weight, twin.bias = linear.weight, bias
    twin.out_features, twin.in_features = linear.out_features, linear.in_features
    return twin


def freeze_base(base: Any) -> PreTrainedModel:
    """Makes a loaded 4-bit model a frozen base: no gradients, no cache, no repacking or rescaling of the packed weights,
    which are reached by calling their layers."""
    base.requires_grad_(False).eval()
    call_layers(base)
    base.config.use_cache = False
    if getattr(base.config, "rescale_every", None):
        # rwkv halves weights in evaluation, and its hidden states with them, against overflow in float16. It cannot write
        # packed ones below an adapter (transformers 5.23), and without that the numbers are the same.
        base.config.rescale_every = 0
    for module in base.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            # On AVX512-BF16 CPUs an eval forward repacks the weight in place, and a later backward or dequantise
            # reads those bytes as plain NF4 (gradient cosine 0.48 before against after).
            module.support_avx512bf16_for_cpu = False
    # peft, accelerate and transformers ask these two whether the model is a bitsandbytes one.
    base.is_loaded_in_4bit = True
    base.quantization_method = "bitsandbytes"
    return base


def is_4bit(module: nn.Module) -> bool:
    """Whether the module is a 4-bit linear whose weight is quantised."""
    return (
        is_loaded()
        and isinstance(module, bnb.nn.Linear4bit)
        and getattr(module.weight, "quant_state", None) is not None
    )


def four_bit_linears(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Every quantised linear with its name."""
    return ((name, module) for name, module in model.named_modules() if is_4bit(module))


def dequantized_weight(module: Any) -> torch.Tensor:
    """The weight a 4-bit linear computes with, (out_features, in_features) in the dtype it was quantised from."""
    if (bring := module.__dict__.get(STREAMED)) is not None:
        bring()
    return _dequantize(module.weight.data, module.weight.quant_state)


def _dequantize(packed: torch.Tensor, state: Any) -> torch.Tensor:
    if packed.device.type != "cpu" or state.shape[-1] % state.blocksize == 0:
        return bnb.functional.dequantize_4bit(packed, state)
    # As one long row: the CPU kernel starts a new block at each row, where quantisation ran on.
    flat = copy.copy(state)
    flat.shape = torch.Size([1, state.shape.numel()])
    return bnb.functional.dequantize_4bit(packed, flat).reshape(state.shape)


def _quantize(weight: torch.Tensor, quant_type: str, double_quant: bool) -> tuple[torch.Tensor, Any]:
    return bnb.functional.quantize_4bit(
        weight.contiguous(), blocksize=BLOCK_SIZE, compress_statistics=double_quant, quant_type=quant_type
    )


def round_trip(weight: torch.Tensor, *, quant_type: str, double_quant: bool) -> torch.Tensor:
    """Quantises and dequantises a weight, (out, in) in the run's compute dtype, as `load_base` does, bit for bit."""
    return _dequantize(*_quantize(weight, quant_type, double_quant))


def four_bit_values(quant_type: str) -> torch.Tensor:
    """The 16 numbers of a 4-bit type, (16,) float32 on the CPU, at the places their codes name; from -1 to 1."""
    return bnb.functional.get_4bit_type(quant_type, device="cpu")


def round_trip_constants(constants: torch.Tensor) -> torch.Tensor:
    """What double quantisation leaves of one weight's constants, bit for bit.

    Args:
        constants: (blocks,) float32, the largest magnitude of each block.
    """
    offset = constants.mean()
    codes, state = bnb.functional.quantize_blockwise(constants - offset, blocksize=NESTED_BLOCK_SIZE)
    return bnb.functional.dequantize_blockwise(codes, state) + offset


def pack_weight(weight: torch.Tensor, *, quant_type: str, double_quant: bool) -> dict[str, torch.Tensor]:
    """A weight, (out, in) in 16 or 32 bits, as a 4-bit checkpoint holds it.

    Returns:
        The packed codes under "", and what undoes the quantisation under the ending each has in a checkpoint.
    """
    packed, state = _quantize(weight, quant_type, double_quant)
    return {"": packed, **{f".{name}": value for name, value in state.as_dict(packed=True).items()}}


def logical_numel(parameter: torch.Tensor) -> int:
    """Number of weights a parameter stands for: a packed 4-bit one holds two in a byte."""
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        return int(torch.Size(state.shape).numel())
    return getattr(parameter, "logical_elements", parameter.numel())  # of a stack of experts


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, total) parameters; a packed 4-bit weight counts the weights it holds, a tied one counts once."""
    counts = [(logical_numel(parameter), parameter.requires_grad) for parameter in model.parameters()]
    return sum(count for count, trained in counts if trained), sum(count for count, _ in counts)


def packed_tensors(shape: tuple[int, ...], quantization: QuantizationSettings) -> list[TensorSpec]:
    """Name endings, dtypes and shapes of the tensors a 4-bit checkpoint holds for one weight of `shape` (out, in)."""
    blocks = -(-prod(shape) // BLOCK_SIZE)
    made: list[TensorSpec] = [
        ("", torch.uint8, ((prod(shape) + 1) // 2, 1)),
        (".absmax", torch.uint8 if quantization.double_quant else torch.float32, (blocks,)),
        (".quant_map", torch.float32, (16,)),
        (f".quant_state.bitsandbytes__{quantization.quant_type}", torch.uint8, (QUANT_STATE_BYTES,)),
    ]
    if quantization.double_quant:
        made += [
            (".nested_absmax", torch.float32, (-(-blocks // NESTED_BLOCK_SIZE),)),
            (".nested_quant_map", torch.float32, (256,)),
        ]
    return made
