"""Profile of a model with its adapter: sizes and activation trace, from which memory is predicted without weights."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from math import inf
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from qlora_cli.core.engine.decoder_layers import find_layers
from qlora_cli.core.experts.four_bit_experts import FourBitExperts, pack_experts
from qlora_cli.core.experts.fused_experts import can_fuse
from qlora_cli.core.experts.layout import expert_weights, find_experts, share_of_experts
from qlora_cli.core.matmul.expert_stacks import ExpertStacks
from qlora_cli.core.models.account import FourBitPlan, plan_packing
from qlora_cli.core.models.structure import build_empty, find_decoder, underlying_model
from qlora_cli.core.planning.activation_trace import ModelTrace, trace_model, trace_tiles
from qlora_cli.core.planning.meta_adapter import attach_on_meta
from qlora_cli.core.planning.model_size import Footprint, measure_footprint
from qlora_cli.core.weights.stored_formats import stored_format
from qlora_cli.errors import ModelError
from qlora_cli.settings.groups import LoraSettings, QuantizationSettings


def _never(_tile_tokens: int, _in_8_bits: bool) -> None:
    return None


@dataclass(frozen=True)
class ModelProfile:
    """A base with its adapter, as it will be held and run."""

    footprint: Footprint
    trace: ModelTrace | None  # None where the forward pass cannot be followed without weights
    untraced: str | None  # then, why
    itemsize: int  # bytes of the compute dtype
    vocabulary: int  # tokens that have an input embedding
    embedding_bytes: int  # input embeddings, where they can stay on the host
    stored_bytes: int  # of the checkpoint, in the dtype that its configuration names, or quantised as it says
    merged_bytes: int  # of one merged, in that dtype
    packing: FourBitPlan  # what of the base is in 4 bits, and what is not
    met_experts: float  # share of a layer's experts that a token meets
    expert_layers: int = 0  # whose experts run through fused kernels, and may stay unpacked
    layer_bytes: tuple[int, ...] = ()  # of each decoder layer's 4-bit weights, as they are held
    # The trace where modules run in tiles of so many tokens, 0 for whole, or multiply experts in 8 bits, made when it is asked
    # for; None where they do not.
    trace_otherwise: Callable[[int, bool], ModelTrace | None] = field(default=_never, compare=False, repr=False)

    def traced(self, tile_tokens: int | None, *, in_8_bits: bool = False) -> ModelTrace | None:
        """The trace of layers that run in tiles of so many tokens, None for whole, with experts multiplied in 8 bits or in
        the compute dtype."""
        in_8_bits = in_8_bits and bool(self.footprint.expert_numels)
        if tile_tokens:
            return self.trace_otherwise(tile_tokens, in_8_bits)
        return (self.trace_otherwise(0, True) if in_8_bits else None) or self.trace

    @property
    def met_numel(self) -> float:
        """Values of the 4-bit weights that a token meets."""
        return sum(self.footprint.quantized_numels) + self.met_experts * sum(self.footprint.expert_numels)

    @property
    def layers(self) -> int:
        """Decoder layers; 0 where they are not known."""
        return len(self.trace.layers) if self.trace else 0

    @property
    def dense_bytes(self) -> int:
        """Of all 4-bit weights once dequantised."""
        return sum(self.footprint.quantized_numels) * self.itemsize

    @property
    def unpacked_bytes(self) -> int:
        """Of one layer's experts once unpacked, to the compute dtype or twice to 8 bits, in the mean."""
        return sum(self.footprint.expert_numels) * self.itemsize // max(1, self.expert_layers)

    @property
    def largest_weight_bytes(self) -> int:
        """Of the largest 4-bit weight once dequantised."""
        return max(self.footprint.quantized_numels, default=0) * self.itemsize


def profile_model(
    config: PreTrainedConfig,
    lora: LoraSettings,
    quantization: QuantizationSettings,
    *,
    compute_dtype: torch.dtype,
    engine: str = "fast",
    trust_remote_code: bool = False,
    traced: bool = True,
) -> ModelProfile:
    """Builds the model on the meta device, attaches the adapter, counts, and traces a training step.

    Args:
        compute_dtype: Of everything that is not quantised, resolved.
        traced: Whether to trace at all; without, memory cannot be predicted.

    Raises:
        ModelError: The configuration is no causal language model.
        AdapterError: The adapter cannot be attached.
    """
    own_code = {"trust_remote_code": trust_remote_code}
    stored_parameters = sum(p.numel() for p in build_empty(config, whole=True, **own_code).parameters())
    model: Any = build_empty(config, **own_code)
    model.to(compute_dtype)
    stored = stored_format(config, config.name_or_path or config.model_type)
    packing = plan_packing(model, stored.skipped if stored else ())
    _pack_experts(model, packing, quantization, compute_dtype)
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {module: name for name, module in model.named_modules()}
    layers = [f"{names[layer]}." for layer in find_layers(find_decoder(model))]
    tied = head is not None and head.weight is embeddings.weight
    adapted = attach_on_meta(model, lora, fused=engine == "fast")
    trace = untraced = None
    fused = engine == "fast" and not lora.dora
    try:
        trace = trace_model(adapted, fused=fused) if traced else None
    except ModelError as error:
        untraced = error.message
    movable = model.get_input_embeddings() is embeddings and not tied  # neither adapted, trained, nor shared
    dtype = getattr(config, "dtype", None) or torch.bfloat16  # most checkpoints that do not say are 16-bit
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype  # a name once the configuration was saved
    footprint = measure_footprint(adapted, quantization, compute_dtype, packing)
    merged_bytes = saved_bytes = stored_parameters * dtype.itemsize
    if stored is not None:
        codes = sum(footprint.expert_numels)
        codes += 0 if stored.method == "mxfp4" else sum(footprint.quantized_numels)  # which stores nothing else so
        saved_bytes -= int(codes * (dtype.itemsize - stored.bytes_per_weight))
    return ModelProfile(
        footprint=footprint,
        trace=trace,
        untraced=untraced,
        itemsize=compute_dtype.itemsize,
        vocabulary=embeddings.weight.shape[0],
        embedding_bytes=embeddings.weight.numel() * compute_dtype.itemsize * movable,
        stored_bytes=saved_bytes,
        merged_bytes=merged_bytes,
        packing=packing,
        met_experts=share_of_experts(model),
        expert_layers=sum(isinstance(m, FourBitExperts) and can_fuse(m) for m in adapted.modules()) if fused else 0,
        layer_bytes=tuple(
            sum(bytes_ for name, bytes_ in footprint.packed_bytes.items() if name.startswith(layer)) for layer in layers
        ),
        trace_otherwise=cache(partial(_trace_otherwise, adapted, trace)) if trace and fused else _never,
    )


def _trace_otherwise(adapted: Any, trace: ModelTrace, tile_tokens: int, in_8_bits: bool) -> ModelTrace | None:
    """`ModelProfile.trace_otherwise`, where `trace` is that of whole layers in the compute dtype."""
    if tile_tokens and not all(layer.keys_and_values for layer in trace.layers):  # as where it loops over tokens
        return None
    stacks = ExpertStacks(underlying_model(adapted))
    for name, (module, weight) in stacks.found.items() if in_8_bits else ():
        if not stacks.why_not(name, inf):
            module.scales[weight.name] = torch.empty(weight.experts, device="meta")
    try:
        return trace_tiles(adapted, tile_tokens) if tile_tokens else trace_model(adapted, fused=True)
    finally:
        stacks.put_back()


def _pack_experts(
    model: nn.Module, packing: FourBitPlan, quantization: QuantizationSettings, compute_dtype: torch.dtype
) -> None:
    """Makes experts on the meta device those in 4 bits, as they will run."""
    for name, module in list(find_experts(model)):
        if packing.packed.issuperset(f"{name}.{weight.name}" for weight in expert_weights(module)):
            pack_experts(
                module,
                compute_dtype=compute_dtype,
                quant_type=quantization.quant_type,
                double_quant=quantization.double_quant,
                device=torch.device("meta"),
            )
