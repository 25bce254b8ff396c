"""Loading a causal language model: frozen in 4 bits, or with its weights as they are stored."""

from dataclasses import asdict, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from qlora_cli.config import QuantizationSettings
from qlora_cli.core.device import dtype_name
from qlora_cli.core.distributed.weight_shards import WeightShards
from qlora_cli.core.models.files import ModelFiles
from qlora_cli.core.models.identity import BaseIdentity
from qlora_cli.core.models.quantization import (
    BLOCK_SIZE,
    FourBitConfig,
    four_bit_linears,
    freeze_base,
    is_4bit,
    is_finite,
)
from qlora_cli.core.models.quantized_cache import restore_base, save_base
from qlora_cli.core.models.raw_weights import read_raw
from qlora_cli.core.models.structure import build_empty, head_names, linear_names, text_class
from qlora_cli.errors import ModelError, first_line
from qlora_cli.events import Notice


def load_base(
    files: ModelFiles,
    quantization: QuantizationSettings,
    *,
    compute_dtype: torch.dtype,
    device: torch.device,
    weight_shards: WeightShards | None = None,
) -> tuple[PreTrainedModel, BaseIdentity]:
    """Loads a causal language model frozen, every linear layer but the output head in 4 bits.

    Weights are quantised block-wise (64 weights a constant, https://arxiv.org/abs/2305.14314, section 3) from
    `compute_dtype`; norms, embeddings and the head are kept in `compute_dtype`.

    Args:
        files: Of the model; their `report` receives progress.
        quantization: How it is held; a checkpoint that is 4-bit already stays as it is.
        compute_dtype: Dtype of the arithmetic and of what is not quantised, resolved.
        device: Where it goes.
        weight_shards: Keep this rank's share of each 4-bit weight only, for `engine.fsdp.shard_base`; all ranks load
            at once.

    Raises:
        ModelError: Missing, no causal language model, a linear that did not become 4-bit, or non-finite weights.
    """
    stored = _stored_quantization(files)
    if stored is not None:
        quantization = replace(quantization, **stored)
    identity = files.identity(quantization, compute_dtype)
    cached_facts = {**asdict(identity), "model": None, "revision": None, "device": device.type}
    held = f"{quantization.quant_type}, arithmetic in {dtype_name(compute_dtype)}"
    files.report(Notice(f"Loading {files.name} in 4 bits ({held})."))
    if quantization.base_cache and stored is None:
        base = restore_base(cached_facts, files, compute_dtype, device, weight_shards)
        if base is not None:
            base.config.dtype = compute_dtype
            return freeze_base(base), identity
    if weight_shards is not None and stored is not None:
        raise ModelError(
            f"{files.name} is stored in 4 bits, which cannot be sharded.", "Give --model the 16-bit checkpoint."
        )
    empty = build_empty(files.config, trust_remote_code=files.trust_remote_code)
    four_bit = FourBitConfig(
        weight_shards=weight_shards,
        bnb_4bit_quant_type=quantization.quant_type,
        bnb_4bit_use_double_quant=quantization.double_quant,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=[*head_names(empty), *sorted(read_raw(empty))],
    )
    base = _load(files, compute_dtype, device, four_bit if stored is None else None)
    _check_weights(base, files.name)
    freeze_base(base)
    if quantization.base_cache and stored is None:
        save_base(base, cached_facts, files.report, weight_shards)
    return base, identity


def _stored_quantization(files: ModelFiles) -> dict[str, Any] | None:
    """`quant_type` and `double_quant` of a checkpoint that is 4-bit already; None for a plain one."""
    stored = getattr(files.config, "quantization_config", None)
    if stored is None:
        return None
    settings = stored if isinstance(stored, dict) else stored.to_dict()
    if not settings.get("load_in_4bit"):
        raise ModelError(
            f"{files.name} is quantised already, by {settings.get('quant_method')}.",
            "Give --model the 16-bit checkpoint, or one in bitsandbytes' 4 bits.",
        )
    return {
        "quant_type": settings.get("bnb_4bit_quant_type", "fp4"),
        "double_quant": settings.get("bnb_4bit_use_double_quant", False),
    }


def load_unquantized(files: ModelFiles, *, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Loads a causal language model frozen with its weights as they are stored, in `dtype`: a merged one, for example.

    Raises:
        ModelError: Missing, no causal language model, or non-finite weights.
    """
    files.report(Notice(f"Loading {files.name} in {dtype_name(dtype)}, not quantised."))
    base = _load(files, dtype, device)
    _check_finite(base, files.name, {})
    return base.requires_grad_(False).eval()


def _load(files: ModelFiles, dtype: torch.dtype, device: torch.device, four_bit: FourBitConfig | None = None) -> Any:
    try:
        return text_class(files.config).from_pretrained(
            files.weights,
            config=files.config,
            dtype=dtype,
            device_map={"": device},
            trust_remote_code=files.trust_remote_code,
            use_safetensors=True,
            quantization_config=four_bit,
        )
    except (ValueError, OSError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError) or (four_bit and four_bit.out_of_memory):
            raise ModelError(
                f"{files.name} does not fit in the GPU's memory while it is loaded.",
                f"See: qlora inspect --model {files.name}",
            ) from error
        raise ModelError(f"{files.name} cannot be loaded: {first_line(error)}") from error


def _check_weights(base: Any, model: str) -> None:
    on_cpu = base.device.type == "cpu"
    odd = [n for n, m in four_bit_linears(base) if on_cpu and m.weight.quant_state.shape[-1] % BLOCK_SIZE]
    if odd:
        # bitsandbytes 0.50's AVX512 kernel starts a new block at each row: such weights come back wrong by their size.
        raise ModelError(
            f"{model} has linear layers such as {odd[0]} whose width is no multiple of {BLOCK_SIZE}, "
            "which bitsandbytes cannot read back on a CPU.",
            "Use a machine with a CUDA GPU for this model.",
        )
    left = [name for name in linear_names(base) if not is_4bit(base.get_submodule(name))]
    if left:
        raise ModelError(
            f"{len(left)} linear layers of {model} did not become 4-bit, first {left[0]} "
            f"({type(base.get_submodule(left[0])).__name__}).",
            "This architecture is not supported yet.",
        )
    _check_finite(base, model, getattr(base.hf_quantizer, "finite", {}))


def _check_finite(base: Any, model: str, quantised: dict[str, torch.Tensor]) -> None:
    """Raises when a weight is not finite; `quantised` says it of those that were looked at before quantisation."""
    finite = quantised | {name: is_finite(p) for name, p in base.named_parameters() if p.is_floating_point()}
    bad = [name for name, flag in finite.items() if not flag]
    if bad:
        raise ModelError(
            f"The weights of {model} hold NaN or infinity in {len(bad)} tensors, first {bad[0]}.",
            "Download the model again, or use another --compute-dtype if they overflow float16.",
        )
