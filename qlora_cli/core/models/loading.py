"""Loading a model: its configuration, its tokenizer, and its weights in 4 bits or as they are stored."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from qlora_cli.core.device import dtype_name
from qlora_cli.core.distributed.weight_shards import WeightShards
from qlora_cli.core.models.hub import resolve_model
from qlora_cli.core.models.identity import BaseIdentity, identify_base
from qlora_cli.core.models.quantization import (
    BLOCK_SIZE,
    CheckedQuantize,
    FourBitConfig,
    four_bit_linears,
    freeze_base,
    is_4bit,
    is_finite,
    restored_linear,
)
from qlora_cli.core.models.quantized_cache import restore_base, save_base
from qlora_cli.core.models.structure import build_empty, head_names, linear_names
from qlora_cli.errors import ModelError, UsageError, first_line
from qlora_cli.events import Notice, Report


def _check_remote_code(model: str, revision: str | None, trust_remote_code: bool) -> None:
    if trust_remote_code and not Path(model).is_dir() and not re.fullmatch(r"[0-9a-f]{40}", revision or ""):
        raise UsageError(
            "--trust-remote-code runs code from the hub and needs --model-revision with the full 40-digit commit hash.",
            "Read the code at that commit first, then name it with --model-revision.",
        )


def load_config(model: str, revision: str | None = None, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """A model's configuration, from config.json alone.

    Raises:
        ModelError: It is missing, broken, needs code of its own, or is no causal language model.
        UsageError: `trust_remote_code` without a pinned revision.
    """
    _check_remote_code(model, revision, trust_remote_code)
    directory = resolve_model(model, revision, weights=False)
    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, OSError, TypeError) as error:
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"{model} needs code that comes with the model, which is not run.",
                "If you have read it, add --trust-remote-code --model-revision COMMIT.",
            ) from error
        raise ModelError(f"The configuration of {model} cannot be read: {first_line(error)}") from error


def load_tokenizer(
    model: str, revision: str | None = None, *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """A model's tokenizer.

    Raises:
        ModelError: There is none, or it cannot be read.
        UsageError: `trust_remote_code` without a pinned revision.
    """
    _check_remote_code(model, revision, trust_remote_code)
    directory = resolve_model(model, revision, weights=False)
    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except Exception as error:  # a broken tokenizer file raises whatever the Rust library raises
        raise ModelError(
            f"The tokenizer of {model} cannot be read: {first_line(error)}",
            "Check that the tokenizer files are there.",
        ) from error


def load_base(
    model: str,
    *,
    revision: str | None = None,
    quant_type: str = "nf4",
    double_quant: bool = True,
    compute_dtype: torch.dtype,
    device: torch.device,
    trust_remote_code: bool = False,
    cache: bool = True,
    slices: WeightShards | None = None,
    report: Report | None = None,
) -> tuple[PreTrainedModel, BaseIdentity]:
    """Loads a causal language model frozen, every linear layer but the output head in 4 bits.

    Weights are quantised block-wise (64 weights a constant) from `compute_dtype`; norms, embeddings and the head are
    kept in `compute_dtype`.

    Args:
        model: Directory or hub id.
        revision: Commit, branch or tag.
        quant_type: "nf4" or "fp4" (https://arxiv.org/abs/2305.14314, section 3).
        double_quant: Quantise the constants to 8 bits too.
        compute_dtype: Dtype of the arithmetic and of what is not quantised.
        device: Where it goes.
        trust_remote_code: Run the model's own code; needs a pinned revision.
        cache: Reuse and write the local cache of quantised bases.
        slices: Keep this rank's share of each 4-bit weight only, for `engine.fsdp.shard_base`; all ranks load at once.
        report: Receives progress.

    Returns:
        The model in training mode off, nothing requiring gradients, and its identity.

    Raises:
        ModelError: Missing, no causal language model, a linear that did not become 4-bit, or non-finite weights.
    """
    config = load_config(model, revision, trust_remote_code=trust_remote_code)
    directory = resolve_model(model, revision, weights=True, report=report)
    stored = _stored_quantization(config, model)
    if stored is not None:
        quant_type, double_quant = stored["bnb_4bit_quant_type"], stored["bnb_4bit_use_double_quant"]
    identity = identify_base(
        model, revision, quant_type=quant_type, double_quant=double_quant, compute_dtype=compute_dtype
    )
    cached_facts = {**identity.to_dict(), "model": None, "revision": None, "device": device.type}

    def build() -> PreTrainedModel:
        return build_empty(config, trust_remote_code=trust_remote_code)

    if report:
        report(Notice(f"Loading {model} in 4 bits ({quant_type}, arithmetic in {dtype_name(compute_dtype)})."))
    if cache and stored is None:
        make_linear = partial(restored_linear, compute_dtype, device)
        base = restore_base(cached_facts, build, make_linear, device, report, slices)
        if base is not None:
            base.config.dtype = compute_dtype
            return freeze_base(base), identity
    if slices is not None and stored is not None:
        raise ModelError(
            f"{model} is stored in 4 bits, which cannot be sharded.", "Give --model the 16-bit checkpoint."
        )
    quantization = FourBitConfig(
        slices=slices,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=head_names(build()),
    )
    base = _load(
        directory,
        model,
        config=config,
        quantization_config=None if stored is not None else quantization,
        dtype=compute_dtype,
        device_map={"": device},
        trust_remote_code=trust_remote_code,
    )
    _check_weights(base, model)
    base = freeze_base(base)
    if cache and stored is None:
        save_base(base, cached_facts, report, slices)
    return base, identity


def _stored_quantization(config: PreTrainedConfig, model: str) -> dict[str, Any] | None:
    """How a checkpoint that is 4-bit already was quantised; None for a plain one."""
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return None
    settings = stored if isinstance(stored, dict) else stored.to_dict()
    if not settings.get("load_in_4bit"):
        raise ModelError(
            f"{model} is quantised already, by {settings.get('quant_method')}.",
            "Give --model the 16-bit checkpoint, or one in bitsandbytes' 4 bits.",
        )
    return {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False, **settings}


def load_unquantized(
    model: str,
    *,
    revision: str | None = None,
    dtype: torch.dtype,
    device: torch.device,
    trust_remote_code: bool = False,
    report: Report | None = None,
) -> PreTrainedModel:
    """Loads a causal language model frozen with its weights as they are stored, in `dtype`: a merged one, for example.

    Raises:
        ModelError: Missing, no causal language model, or non-finite weights.
    """
    config = load_config(model, revision, trust_remote_code=trust_remote_code)
    directory = resolve_model(model, revision, weights=True, report=report)
    if report:
        report(Notice(f"Loading {model} in {dtype_name(dtype)}, not quantised."))
    base = _load(
        directory, model, config=config, dtype=dtype, device_map={"": device}, trust_remote_code=trust_remote_code
    )
    _check_finite(base, model, {})
    base.requires_grad_(False)
    base.eval()
    return base


def _load(directory: Path, model: str, **arguments: Any) -> Any:
    CheckedQuantize.out_of_memory = None
    try:
        return AutoModelForCausalLM.from_pretrained(directory, use_safetensors=True, **arguments)
    except (ValueError, OSError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError) or CheckedQuantize.out_of_memory:
            raise ModelError(
                f"{model} does not fit in the GPU's memory while it is loaded.", f"See: qlora inspect --model {model}"
            ) from error
        raise ModelError(f"{model} cannot be loaded: {first_line(error)}") from error


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
    finite = dict(quantised)
    for name, parameter in base.named_parameters():
        if parameter.is_floating_point():
            finite[name] = is_finite(parameter)
    good = torch.stack([flag.to("cpu") for flag in finite.values()])
    if not bool(good.all()):
        bad = [name for name, flag in zip(finite, good.tolist(), strict=True) if not flag]
        raise ModelError(
            f"The weights of {model} hold NaN or infinity in {len(bad)} tensors, first {bad[0]}.",
            "Download the model again, or use another --compute-dtype if they overflow float16.",
        )
