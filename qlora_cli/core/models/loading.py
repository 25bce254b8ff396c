"""Loading a causal language model: frozen in 4 bits, or with its weights as they are stored."""

import contextlib
import copy
import json
import shlex
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from qlora_cli.core.device import choose_device, dtype_name, memory_error
from qlora_cli.core.distributed.weight_shards import WeightShards
from qlora_cli.core.models.account import Account, account_for
from qlora_cli.core.models.files import ModelFiles
from qlora_cli.core.models.identity import BaseIdentity
from qlora_cli.core.models.packing import LazyWeight, Packer, withdraw
from qlora_cli.core.models.quantization import (
    FourBitConfig,
    four_bit_linears,
    freeze_base,
    is_finite,
)
from qlora_cli.core.models.quantized_cache import restore_base, save_base
from qlora_cli.core.models.structure import build_empty, text_class
from qlora_cli.core.rope_scaling import require_scaled
from qlora_cli.core.weights.checkpoint import Checkpoint
from qlora_cli.core.weights.stored_formats import stored_format
from qlora_cli.errors import ModelError, first_line
from qlora_cli.events import Caution, Notice
from qlora_cli.settings.groups import QuantizationSettings
from qlora_cli.sizes import format_count


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
        ModelError: Missing or lacking a tensor, no causal language model, stored in a format that is not read, or
            non-finite weights.
    """
    stored = stored_format(files.config, files.name)
    four_bit = stored is not None and stored.is_four_bit
    if stored is not None and stored.quant_type:
        quantization = replace(quantization, quant_type=stored.quant_type, double_quant=stored.double_quant)
    identity = files.identity(quantization, compute_dtype)
    empty = build_empty(files.config, trust_remote_code=files.trust_remote_code)
    if files.scaled_positions is not None:
        require_scaled(empty, files.name)
    with Checkpoint(files.weights, stored, device) as checkpoint:
        account = account_for(empty, checkpoint.entries, stored.skipped if stored else ())
        account.require_whole(files.name)
        account.require_values(empty, checkpoint.entries, files.name, four_bit=four_bit)
        held = f"{quantization.quant_type}, arithmetic in {dtype_name(compute_dtype)}"
        files.report(Notice(f"Loading {files.name} in 4 bits ({held}). {account.describe()}"))
        facts = {**asdict(identity), "model": None, "revision": None, "device": device.type, **_packing_facts(account)}
        if files.scaled_positions is not None:  # frequencies are buffers, of which a copy has all
            facts["rope_scaling"] = files.scaled_positions
        kept = quantization.base_cache and not four_bit
        if kept and (base := _restore(facts, files, compute_dtype, device, weight_shards)) is not None:
            _say_untied(files, empty, base)
            return base, identity
        packer = Packer(checkpoint, quantization, compute_dtype, device, weight_shards)
        base = _load(files, empty, checkpoint, account, packer)
        base.generation_config = _end_marks(files, base)
    _check_weights(base, files.name, packer.finite)
    _say_zeros(files, packer.zero)
    _say_untied(files, empty, base)
    freeze_base(base)
    if kept:
        save_base(base, facts, files.report, weight_shards, stamps=files.weight_stamps)
    if weight_shards is not None and weight_shards.in_copy:
        base = None  # before the copy is read, which takes its place
        base = _restore(facts, files, compute_dtype, device, weight_shards) if kept else None
        if base is None:
            raise ModelError(
                f"The layers of {files.name} were to wait on the disk, where no copy of the 4-bit base could be kept.",
                "Free some disk, or point QLORA_CACHE to one that has room, and leave out --no-base-cache.",
            )
    return base, identity


def _restore(
    facts: dict[str, Any],
    files: ModelFiles,
    compute_dtype: torch.dtype,
    device: torch.device,
    weight_shards: WeightShards | None,
) -> PreTrainedModel | None:
    """The base whose copy is here, frozen; None where there is none."""
    base = restore_base(facts, files, compute_dtype, device, weight_shards)
    if base is None:
        return None
    base.config.dtype = compute_dtype
    base.generation_config = _end_marks(files, base)
    return freeze_base(base)


def _packing_facts(account: Account) -> dict[str, Any]:
    """What of the packing the other facts of a copy do not decide; nothing for a model of plain linear layers."""
    stacks = sorted(name for name in account.plan.packed if not name.endswith(".weight"))
    left = sorted(p.name for p in account.plan.parameters if p.reason is not None and p.reason.startswith("read by"))
    facts: dict[str, Any] = {"experts": len(stacks), "left": left} if stacks or left else {}
    return facts | ({"shared": len(account.plan.shared)} if account.plan.shared else {})


def _load(files: ModelFiles, empty: Any, checkpoint: Checkpoint, account: Account, packer: Packer) -> Any:
    """The model of `empty`, its weights read: what is packed by `packer`, all else by transformers."""
    four_bit = FourBitConfig(
        prepare=lambda model: withdraw(model, account),
        bnb_4bit_quant_type=packer.quantization.quant_type,
        bnb_4bit_use_double_quant=packer.quantization.double_quant,
        bnb_4bit_compute_dtype=packer.compute_dtype,
    )
    plain = [origin for origin in account.origins.of.values() if account.plan.packed.isdisjoint(origin.targets)]
    config = copy.deepcopy(empty.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with _loading_errors(files):
        base = type(empty).from_pretrained(
            None,
            config=config,
            state_dict={name: LazyWeight(checkpoint, name) for origin in plain for name in origin.names},
            dtype=packer.compute_dtype,
            device_map={"": packer.device},
            quantization_config=four_bit,
        )
        packer.fill(base, account, empty)
    for module in base.modules():  # some code computes otherwise by this (Jamba's time steps), and no copy has it
        if isinstance(module, PreTrainedModel):
            vars(module.config).pop("_is_quantized", None)
    base.config.name_or_path = base.name_or_path = str(files.directory)
    return base


def _end_marks(files: ModelFiles, base: Any) -> GenerationConfig:
    """The tokens that end an answer, of generation_config.json as it is now; where there is none, of the configuration.

    Nothing else of it is for anything here, and transformers refuses what does not go together in it.
    """
    try:
        content = json.loads((files.directory / "generation_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return GenerationConfig(eos_token_id=base.generation_config.eos_token_id)
    marks = content.get("eos_token_id") if isinstance(content, dict) else None
    marks = [mark for mark in (marks if isinstance(marks, list) else [marks]) if type(mark) is int]
    return GenerationConfig(eos_token_id=marks or None)


@contextlib.contextmanager
def _loading_errors(files: ModelFiles) -> Iterator[None]:
    """Turns what transformers raises while weights are loaded into one sentence."""
    try:
        yield
    except (ValueError, OSError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise memory_error(
                ModelError,
                f"{files.name} does not fit in the GPU's memory while it is loaded.",
                f"See: qlora inspect --model {shlex.quote(files.name)}",
                choose_device(),
            ) from error
        raise ModelError(f"{files.name} cannot be loaded: {first_line(error)}") from error


def load_unquantized(files: ModelFiles, *, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Loads a causal language model frozen with its weights as they are stored, in `dtype`: a merged one, for example.

    Raises:
        ModelError: Missing, no causal language model, or non-finite weights.
    """
    files.report(Notice(f"Loading {files.name} in {dtype_name(dtype)}, not quantised."))
    with _loading_errors(files):
        base = text_class(files.config).from_pretrained(
            files.weights,
            config=files.config,
            dtype=dtype,
            device_map={"": device},
            trust_remote_code=files.trust_remote_code,
            use_safetensors=True,
        )
    _check_finite(base, files.name, {})
    return base.requires_grad_(False).eval()


def _say_zeros(files: ModelFiles, zero: dict[str, torch.Tensor]) -> None:
    """Reports matrices of zeros alone, which some models begin added layers with."""
    flags = torch.stack([*zero.values()]).tolist() if zero else []  # waits for the device once
    found = [name for name, flag in zip(zero, flags, strict=True) if flag]
    if found:
        files.report(
            Caution(
                f"{format_count(len(found), 'tensor')} of {files.name} hold{'s' * (len(found) == 1)} nothing but zeros, first "
                f"{found[0]}: so does a file look that was not copied to its end."
            )
        )


def _say_untied(files: ModelFiles, empty: Any, base: Any) -> None:
    """Reports embeddings and a head that the configuration ties and the weights do not: `empty` is made of it alone."""

    def tied(model: Any) -> bool:
        inputs, head = model.get_input_embeddings(), model.get_output_embeddings()
        return head is not None and head.weight is inputs.weight

    if tied(empty) and not tied(base):
        files.report(
            Caution(
                f"config.json of {files.name} ties embeddings and head, and its weights hold two that differ: both are taken "
                "as they are, as transformers 5 does. Other programs take the embeddings for both, unless it says "
                '"tie_word_embeddings": false.'
            )
        )


def _check_weights(base: Any, model: str, finite: dict[str, torch.Tensor]) -> None:
    on_cpu = base.device.type == "cpu"
    states = ((name, module.weight.quant_state) for name, module in four_bit_linears(base) if on_cpu)
    odd = [(name, state.blocksize) for name, state in states if state.shape[-1] % state.blocksize]
    if odd:
        # bitsandbytes 0.50's AVX512 kernel starts a new block at each row: such weights come back wrong by their size.
        raise ModelError(
            f"{model} has linear layers such as {odd[0][0]} whose width is no multiple of {odd[0][1]}, "
            "which bitsandbytes cannot read back on a CPU.",
            "Use a machine with a CUDA GPU for this model.",
        )
    _check_finite(base, model, finite)


def _check_finite(base: Any, model: str, quantised: dict[str, torch.Tensor]) -> None:
    """Raises when a weight is not finite; `quantised` says it of those that were looked at before quantisation."""
    finite = quantised | {name: is_finite(p) for name, p in base.named_parameters() if p.is_floating_point()}
    bad = [name for name, flag in finite.items() if not flag]
    if bad:
        raise ModelError(
            f"The weights of {model} hold NaN or infinity in {len(bad)} tensors, first {bad[0]}.",
            "Download the model again, or use another --compute-dtype if they overflow float16.",
        )
