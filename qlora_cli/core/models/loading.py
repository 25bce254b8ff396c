"""A model id or directory in, a frozen 4-bit model, its tokenizer and its identity out; bitsandbytes is spoken to here."""

import copy
import hashlib
import json
import os
import re
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from huggingface_hub import constants as hub_constants
from huggingface_hub import errors as hub_errors
from huggingface_hub import snapshot_download
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.bitsandbytes import Bnb4bitQuantize
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

from qlora_cli.artifacts import MERGE_RECORD
from qlora_cli.core.distributed.weight_shards import WeightShards
from qlora_cli.core.models.quantized_cache import restore_base, save_base
from qlora_cli.errors import ModelError, UsageError, first_line
from qlora_cli.events import Notice, Report

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
BLOCK_SIZE = 64  # weights a quantisation constant covers
NESTED_BLOCK_SIZE = 256  # constants a second-level constant covers (double quantisation)
DOWNLOAD_ATTEMPTS = 5
# Subclasses of nn.Linear whose forward is that of nn.Linear in other words; transformers leaves them in 16 bits.
PLAIN_LINEAR_SUBCLASSES = {"FalconLinear"}
CONFIG_FILES = ["config.json", "generation_config.json", MERGE_RECORD]
TOKENIZER_FILES = [
    "tokenizer*",
    "*.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.jinja",
]
WEIGHT_FILES = ["*.safetensors", "*.safetensors.index.json"]


@dataclass(frozen=True)
class BaseIdentity:
    """What the adapter was trained on: enough to refuse another base of the same shapes.

    `weights_sha256` covers each safetensors header and, of every tensor, 4 KiB at its start, middle and end: a
    fine-tuned sibling differs everywhere, and reading whole weights would cost minutes.
    """

    model: str
    revision: str | None  # commit hash of a hub model, None for a directory
    config_sha256: str
    weights_sha256: str
    quant_type: str
    double_quant: bool
    compute_dtype: str

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "BaseIdentity":
        """Reads what `to_dict` wrote; unknown keys are ignored."""
        return cls(**{name: content[name] for name in cls.__dataclass_fields__})

    def differences(self, other: "BaseIdentity") -> list[str]:
        """Fields in which two bases differ, as "field: this → other"; where the base lies does not count."""
        mine, theirs = self.to_dict(), other.to_dict()
        return [
            f"{name}: {mine[name]} → {theirs[name]}"
            for name in mine
            if name not in ("model", "revision") and mine[name] != theirs[name]
        ]


# ---------------------------------------------------------------- files


def resolve_model(
    model: str, revision: str | None = None, *, weights: bool = True, report: Report | None = None
) -> Path:
    """The local directory of a model, downloading what is missing.

    Args:
        model: Directory or hub id.
        revision: Commit, branch or tag of a hub model.
        weights: Whether the safetensors files are needed, or the configuration and tokenizer only.
        report: Told when a download is about to happen.

    Raises:
        ModelError: It is not there, gated, unauthorised, out of reach, or has no safetensors weights.
    """
    directory = Path(model).expanduser()
    if directory.is_dir():
        if not (directory / "config.json").is_file():
            raise ModelError(f"{model} is a directory without config.json.", "Give --model a transformers checkpoint.")
        if weights:
            _require_safetensors(directory, model)
        return directory
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model) or model.startswith((".", "/", "~")):
        raise ModelError(f"No model directory at {model}.", "Check the path, or give a hub id such as org/name.")
    patterns = CONFIG_FILES + TOKENIZER_FILES + (WEIGHT_FILES if weights else [])
    directory = download_snapshot(model, revision, patterns, kind="model", report=report)
    if not (directory / "config.json").is_file():
        raise ModelError(f"{model} has no config.json.", "Give --model a transformers model.")
    if weights:
        _require_safetensors(directory, model)
    return directory


def download_snapshot(
    repository: str, revision: str | None, patterns: list[str], *, kind: str, report: Report | None = None
) -> Path:
    """A snapshot of a hub repository in the local cache, retried when the network fails.

    Args:
        repository: Hub id.
        revision: Commit, branch or tag.
        patterns: File names wanted, at the top of the repository for models.
        kind: "model" or "dataset".
        report: Told when the network is used.

    Raises:
        ModelError: One sentence on what stands in the way.
    """
    flag = "--model" if kind == "model" else "--data"
    ignore = ["consolidated*", "*/*"] if kind == "model" else None

    def fetch(local: bool) -> Path:
        return Path(
            snapshot_download(
                repository,
                repo_type=kind,
                revision=revision,
                allow_patterns=patterns,
                ignore_patterns=ignore,
                local_files_only=local,
            )
        )

    if hub_constants.HF_HUB_OFFLINE:
        try:
            return fetch(local=True)
        except (hub_errors.LocalEntryNotFoundError, hub_errors.RevisionNotFoundError) as error:
            raise ModelError(
                f"The {kind} {repository} is not in the local hub cache and HF_HUB_OFFLINE is set.",
                f"Unset HF_HUB_OFFLINE to download it, or give {flag} a local path.",
            ) from error
    pause_seconds = float(os.environ.get("QLORA_RETRY_SECONDS", "2"))
    for attempt in range(1, DOWNLOAD_ATTEMPTS + 1):
        try:
            return fetch(local=False)
        except hub_errors.GatedRepoError as error:
            raise ModelError(
                f"Access to the {kind} {repository} is gated and this account has not been let in.",
                f"Ask for access on its hub page, then run: hf auth login, and the command again ({error.__class__.__name__}).",
            ) from error
        except hub_errors.RepositoryNotFoundError as error:
            raise ModelError(
                f"There is no {kind} {repository} on the hub, or it is private.",
                "Check the spelling, give a local path, or run: hf auth login",
            ) from error
        except hub_errors.RevisionNotFoundError as error:
            raise ModelError(
                f"The {kind} {repository} has no revision {revision}.", "Check the revision's name."
            ) from error
        except hub_errors.HFValidationError as error:
            raise ModelError(f"{repository} is neither a local path nor a hub id.", f"Check {flag}.") from error
        except (hub_errors.LocalEntryNotFoundError, hub_errors.HTTPError, OSError) as error:
            # A refused file comes as "not in the cache", caused by the refusal.
            response = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
            status = getattr(response, "status_code", None)
            if status in (401, 403):
                raise ModelError(
                    f"The hub refuses the {kind} {repository} to this account (HTTP {status}).", "Run: hf auth login"
                ) from error
            if attempt == DOWNLOAD_ATTEMPTS:
                raise ModelError(
                    f"The {kind} {repository} could not be downloaded after {attempt} attempts: {_first_line(error)}",
                    "Check the connection and run the command again: finished files are kept.",
                ) from error
            if report:
                report(
                    Notice(f"Download of {repository} failed ({_first_line(error)}); attempt {attempt + 1} follows.")
                )
            time.sleep(pause_seconds * 2 ** (attempt - 1))
    raise AssertionError("unreachable")


def _first_line(error: Exception) -> str:
    """An exception's first line, without the query of any URL in it (tokens travel there)."""
    return re.sub(r"\?\S*", "", first_line(error) or type(error).__name__)[:200]


def _require_safetensors(directory: Path, model: str) -> None:
    if any(directory.glob("*.safetensors")):
        return
    if any(directory.glob("*.bin")) or any(directory.glob("*.pt")) or any(directory.glob("*.pth")):
        raise ModelError(
            f"{model} holds pickle weights only, which can run code when they are read.",
            "Give --model a revision with safetensors files, or convert it once in a place you trust.",
        )
    raise ModelError(f"{model} holds no safetensors weights.", "Check the directory, or download the model again.")


def commit_of(directory: Path) -> str | None:
    """The commit hash when the directory is a snapshot in the hub cache."""
    name = directory.resolve().name if directory.parent.name != "snapshots" else directory.name
    return name if directory.parent.name == "snapshots" and re.fullmatch(r"[0-9a-f]{40}", name) else None


# ---------------------------------------------------------------- configuration and tokenizer


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
        raise ModelError(f"The configuration of {model} cannot be read: {_first_line(error)}") from error


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
            f"The tokenizer of {model} cannot be read: {_first_line(error)}",
            "Check that the tokenizer files are there.",
        ) from error


# ---------------------------------------------------------------- device and dtype


def choose_device() -> torch.device:
    """The current CUDA device, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def resolve_compute_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The dtype of the arithmetic: as named, or bfloat16 on GPUs that have it, float16 on older ones, float32 on CPU.

    Raises:
        UsageError: The name is none of bfloat16, float16, float32.
    """
    if name is not None:
        if name not in DTYPES:
            raise UsageError(f"Unknown compute dtype {name}.", f"Choose one of: {', '.join(DTYPES)}.")
        return DTYPES[name]
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16` for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


# ---------------------------------------------------------------- loading in 4 bits


class _FourBitConfig(BitsAndBytesConfig):
    """BitsAndBytesConfig that selects the quantizer below, which may keep a share of each weight only."""

    def __init__(self, slices: WeightShards | None = None, **arguments: Any) -> None:
        super().__init__(load_in_4bit=True, **arguments)
        self.quant_method = "qlora_4bit"  # type: ignore[assignment]  # a registered name of ours
        self.slices = slices

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in super().to_dict().items() if name != "slices"}


def _is_finite(tensor: torch.Tensor) -> torch.Tensor:
    """A bool scalar that stays on the device: no synchronisation, and no memory, of which there may be little."""
    if not tensor.numel():
        return torch.ones((), dtype=torch.bool, device=tensor.device)
    lowest, highest = torch.aminmax(tensor)  # NaN wins
    return torch.isfinite(lowest) & torch.isfinite(highest)


class _CheckedQuantize(Bnb4bitQuantize):
    """Quantises one weight and remembers whether it was finite: quantisation hides a NaN."""

    out_of_memory: torch.OutOfMemoryError | None = None  # of the load that is under way

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        for name, value in input_dict.items():
            tensor = value[0] if isinstance(value, list) else value
            self.hf_quantizer.finite[name] = _is_finite(tensor)
        try:
            converted = super().convert(input_dict, *args, **kwargs)
        except torch.OutOfMemoryError as error:  # transformers goes on, and reports that something failed
            _CheckedQuantize.out_of_memory = error.with_traceback(None)
            raise
        if slices := self.hf_quantizer.quantization_config.slices:
            weights: Any = converted.values()
            for weight in weights:
                weight.data = slices.keep(weight.data)
                weight.quant_state.absmax = slices.keep(weight.quant_state.absmax)
        return converted


class _FourBitQuantizer(Bnb4BitHfQuantizer):
    """transformers' 4-bit quantizer that also takes the linears it leaves out and finds non-finite weights."""

    def __init__(self, quantization_config: Any, **arguments: Any) -> None:
        super().__init__(quantization_config, **arguments)
        self.finite: dict[str, torch.Tensor] = {}

    def _process_model_before_weight_loading(self, model: Any, device_map: Any = None, **arguments: Any) -> None:
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and type(module).__name__ in PLAIN_LINEAR_SUBCLASSES:
                with torch.device("meta"):
                    plain = nn.Linear(module.in_features, module.out_features, module.bias is not None)
                model.set_submodule(name, plain)
        super()._process_model_before_weight_loading(model, device_map, **arguments)

    def get_quantize_ops(self) -> Bnb4bitQuantize:
        return _CheckedQuantize(self)


if "qlora_4bit" not in AUTO_QUANTIZER_MAPPING:
    register_quantizer("qlora_4bit")(_FourBitQuantizer)


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
        make_linear = partial(_restored_linear, compute_dtype, device)
        base = restore_base(cached_facts, build, make_linear, device, report, slices)
        if base is not None:
            base.config.dtype = compute_dtype
            return freeze_base(base), identity
    if slices is not None and stored is not None:
        raise ModelError(
            f"{model} is stored in 4 bits, which cannot be sharded.", "Give --model the 16-bit checkpoint."
        )
    quantization = _FourBitConfig(
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
    _CheckedQuantize.out_of_memory = None
    try:
        return AutoModelForCausalLM.from_pretrained(directory, use_safetensors=True, **arguments)
    except (ValueError, OSError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError) or _CheckedQuantize.out_of_memory:
            raise ModelError(
                f"{model} does not fit in the GPU's memory while it is loaded.", f"See: qlora inspect --model {model}"
            ) from error
        raise ModelError(f"{model} cannot be loaded: {_first_line(error)}") from error


def _restored_linear(
    compute_dtype: torch.dtype, device: torch.device, packed: dict[str, torch.Tensor], bias: torch.Tensor | None
) -> nn.Module:
    """A 4-bit linear of tensors that a checkpoint or the cache holds."""
    weight = packed.pop("")
    linear = bnb.nn.Linear4bit(1, 1, bias is not None, compute_dtype, device="meta")
    linear.weight = bnb.nn.Params4bit.from_prequantized(weight, packed, device=device, module=linear)
    if weight.device != device:  # shares that wait on the host, which has moved them
        linear.weight.data, linear.weight.quant_state.absmax = weight, packed[".absmax"]
    linear.out_features, linear.in_features = linear.weight.quant_state.shape
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


def freeze_base(base: Any) -> PreTrainedModel:
    """Makes a loaded 4-bit model a frozen base: no gradients, no cache, no CPU repacking of the packed weights."""
    base.requires_grad_(False)
    base.eval()
    base.config.use_cache = False
    for module in base.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            # On AVX512-BF16 CPUs an eval forward repacks the weight in place, and a later backward or dequantise
            # reads those bytes as plain NF4 (gradient cosine 0.48 before against after).
            module.support_avx512bf16_for_cpu = False
    # peft, accelerate and transformers ask these two whether the model is a bitsandbytes one.
    base.is_loaded_in_4bit = True
    base.quantization_method = "bitsandbytes"
    return base


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
            finite[name] = _is_finite(parameter)
    good = torch.stack([flag.to("cpu") for flag in finite.values()])
    if not bool(good.all()):
        bad = [name for name, flag in zip(finite, good.tolist(), strict=True) if not flag]
        raise ModelError(
            f"The weights of {model} hold NaN or infinity in {len(bad)} tensors, first {bad[0]}.",
            "Download the model again, or use another --compute-dtype if they overflow float16.",
        )


# ---------------------------------------------------------------- structure


def build_empty(config: PreTrainedConfig, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of a configuration on the meta device: true shapes, no memory.

    Raises:
        ModelError: The configuration belongs to no causal language model.
    """
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, RuntimeError) as error:
        raise ModelError(
            f"{config.model_type} is no causal language model that can be built here: {_first_line(error)}",
            "Give --model a decoder such as llama, gpt_neox, falcon, mistral, qwen3 or gemma3.",
        ) from error


def head_names(model: Any) -> list[str]:
    """Names of the output head, as far as there is one."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return [name for name, module in model.named_modules() if head is not None and module is head]


def linear_names(model: nn.Module) -> list[str]:
    """Full names of every linear layer but the output head (nn.Linear and its subclasses, Conv1D, 4-bit ones)."""
    heads = set(head_names(model))
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and name not in heads and "lora_" not in name
    ]


def is_4bit(module: nn.Module) -> bool:
    """Whether the module is a 4-bit linear whose weight is quantised."""
    return isinstance(module, bnb.nn.Linear4bit) and getattr(module.weight, "quant_state", None) is not None


def four_bit_linears(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Every quantised linear with its name."""
    return ((name, module) for name, module in model.named_modules() if is_4bit(module))


def dequantized_weight(module: Any, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The weight a 4-bit linear computes with.

    Args:
        module: A quantised linear.
        dtype: Of the result; by default the dtype it was quantised from.

    Returns:
        (out_features, in_features).
    """
    weight = _dequantize(module.weight.data, module.weight.quant_state)
    return weight if dtype is None else weight.to(dtype)


def _dequantize(packed: torch.Tensor, state: Any) -> torch.Tensor:
    if packed.device.type != "cpu" or state.shape[-1] % BLOCK_SIZE == 0:
        return bnb.functional.dequantize_4bit(packed, state)
    # As one long row: the CPU kernel starts a new block at each row, where quantisation ran on.
    flat = copy.copy(state)
    flat.shape = torch.Size([1, state.shape.numel()])
    return bnb.functional.dequantize_4bit(packed, flat).reshape(state.shape)


def round_trip(weight: torch.Tensor, *, quant_type: str, double_quant: bool) -> torch.Tensor:
    """Quantises and dequantises a weight as `load_base` does, bit for bit.

    Args:
        weight: (out, in) in the compute dtype of the run.
        quant_type: "nf4" or "fp4".
        double_quant: As in `load_base`.

    Returns:
        (out, in) in the same dtype.
    """
    packed, state = bnb.functional.quantize_4bit(
        weight.contiguous(), blocksize=BLOCK_SIZE, compress_statistics=double_quant, quant_type=quant_type
    )
    return _dequantize(packed, state)


def four_bit_values(quant_type: str) -> torch.Tensor:
    """The 16 numbers of a 4-bit type, (16,) float32 on the CPU, at the places their codes name; from -1 to 1."""
    return bnb.functional.get_4bit_type(quant_type, device="cpu")


def round_trip_constants(constants: torch.Tensor) -> torch.Tensor:
    """What double quantisation leaves of the constants of one weight, bit for bit.

    Args:
        constants: (blocks,) float32, the largest magnitude of each block.

    Returns:
        (blocks,) float32.
    """
    offset = constants.mean()
    codes, state = bnb.functional.quantize_blockwise(constants - offset, blocksize=NESTED_BLOCK_SIZE)
    return bnb.functional.dequantize_blockwise(codes, state) + offset


def pack_weight(weight: torch.Tensor, *, quant_type: str, double_quant: bool) -> dict[str, torch.Tensor]:
    """A weight as a 4-bit checkpoint holds it.

    Args:
        weight: (out, in), 16 or 32 bit.
        quant_type: "nf4" or "fp4".
        double_quant: As in `load_base`.

    Returns:
        The packed codes under "", and what undoes the quantisation under the ending each has in a checkpoint.
    """
    packed, state = bnb.functional.quantize_4bit(
        weight.contiguous(), blocksize=BLOCK_SIZE, compress_statistics=double_quant, quant_type=quant_type
    )
    return {"": packed, **{f".{name}": value for name, value in state.as_dict(packed=True).items()}}


def logical_numel(parameter: torch.Tensor) -> int:
    """Number of weights a parameter stands for: a packed 4-bit one holds two in a byte."""
    state = getattr(parameter, "quant_state", None)
    return int(torch.Size(state.shape).numel()) if state is not None else parameter.numel()


# ---------------------------------------------------------------- identity


def identify_base(
    model: str,
    revision: str | None = None,
    *,
    quant_type: str,
    double_quant: bool,
    compute_dtype: torch.dtype,
) -> BaseIdentity:
    """The identity of a base whose files are local, without loading it.

    Raises:
        ModelError: As `resolve_model`.
    """
    directory = resolve_model(model, revision, weights=True)
    local = Path(model).expanduser().is_dir()
    return BaseIdentity(
        model=str(Path(model).expanduser().resolve()) if local else model,
        revision=commit_of(directory),
        config_sha256=_config_digest(directory),
        weights_sha256=weights_digest(directory),
        quant_type=quant_type,
        double_quant=double_quant,
        compute_dtype=dtype_name(compute_dtype),
    )


def _config_digest(directory: Path) -> str:
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    for volatile in ("_name_or_path", "transformers_version", "use_cache"):
        config.pop(volatile, None)
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def weights_digest(directory: Path) -> str:
    """SHA-256 over the headers and sampled bytes of a checkpoint's safetensors files.

    Raises:
        ModelError: A file is truncated or not safetensors.
    """
    digest = hashlib.sha256()
    for path in sorted(directory.glob("*.safetensors")):
        size = path.stat().st_size
        with path.open("rb") as stream:
            header_bytes = int.from_bytes(stream.read(8), "little")
            try:
                if header_bytes > min(size, 100 * 2**20):
                    raise ValueError("header longer than the file")
                header = stream.read(header_bytes)
                entries = json.loads(header)
                spans = sorted(entry["data_offsets"] for name, entry in entries.items() if name != "__metadata__")
                if spans and 8 + header_bytes + spans[-1][1] != size:
                    raise ValueError(f"{size} bytes where its header says {8 + header_bytes + spans[-1][1]}")
            except (ValueError, KeyError, TypeError) as error:
                raise ModelError(
                    f"{path} is damaged: {_first_line(error)}.", "Remove it and download the model again."
                ) from error
            digest.update(header)
            for start, end in spans:
                for position in (start, (start + end) // 2, max(start, end - 4096)):
                    stream.seek(8 + header_bytes + position)
                    digest.update(stream.read(min(4096, end - position)))
    return digest.hexdigest()
