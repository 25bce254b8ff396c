"""LoRA adapters by PEFT: attached to a base, loaded, saved, and read without their base."""

import json
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from qlora_cli.artifacts import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from qlora_cli.config import LoraSettings
from qlora_cli.core.models.quantization import logical_numel
from qlora_cli.core.models.structure import head_names, linear_names, tower_names
from qlora_cli.errors import AdapterError


@dataclass(frozen=True)
class AdapterFacts:
    """What an adapter's own files say, without its base."""

    rank: int
    alpha: float
    scaling: float  # factor on B @ A
    dropout: float
    target_modules: tuple[str, ...]
    base_model: str | None
    rslora: bool
    dora: bool
    modules_to_save: tuple[str, ...]
    tensors: Mapping[str, tuple[tuple[int, ...], str]]  # name → (shape, safetensors dtype)
    config: Mapping[str, Any]  # adapter_config.json


def find_targets(model: PreTrainedModel, target_modules: tuple[str, ...] | None) -> list[str]:
    """Module names for PEFT: those asked for, or the last names of every linear layer but the head.

    Raises:
        AdapterError: A name matches no module that an adapter can be attached to.
    """
    linears = linear_names(model)
    leaves = {name.rsplit(".", 1)[-1] for name in linears}
    if target_modules is None:
        if not linears:
            raise AdapterError("The model has no linear layer to adapt.", "Name modules with --target-modules.")
        others = {name.rsplit(".", 1)[-1] for name in dict(model.named_modules()).keys() - set(linears)}
        # Towers, which are left out here, have leaves of these names too: whoever loads the adapter loads them.
        return sorted(linears if leaves & others or tower_names(model) else leaves)
    adaptable = [*linears, *head_names(model)]
    adaptable += [name for name, module in model.named_modules() if isinstance(module, nn.Embedding)]
    missing = [t for t in target_modules if not any(n == t or n.endswith("." + t) for n in adaptable)]
    if missing:
        raise AdapterError(
            f"--target-modules {', '.join(missing)} matches no linear layer of this {model.config.model_type} model.",
            f"Its linear layers are: {', '.join(sorted(leaves))}.",
        )
    return list(target_modules)


def attach_adapter(model: PreTrainedModel, lora: LoraSettings, *, seed: int = 0) -> PeftModel:
    """Attaches a fresh LoRA adapter in float32: A Kaiming-uniform, B zero (https://arxiv.org/abs/2106.09685, 4.1).

    Args:
        model: A base from `load_base`, or a meta model from `build_empty`.
        lora: A is (rank, in), B is (out, rank); B @ A is scaled by alpha / rank, or alpha / sqrt(rank) with rslora
            (https://arxiv.org/abs/2312.03732). DoRA: https://arxiv.org/abs/2402.09353.
        seed: Of A; the global random state is left as it was.

    Raises:
        AdapterError: A target matches nothing, or a value is out of range.
    """
    if lora.rank < 1 or not 0 <= lora.dropout < 1 or lora.alpha <= 0:
        raise AdapterError(
            f"rank {lora.rank}, alpha {lora.alpha}, dropout {lora.dropout} make no adapter.",
            "Use --rank 1 or more, --alpha above 0, and --dropout from 0 to below 1.",
        )
    for name in lora.modules_to_save or ():
        if not any(n == name or n.endswith("." + name) for n, _ in model.named_modules()):
            raise AdapterError(f"--modules-to-save {name} matches no module.", "Check the name with: qlora inspect")
    alpha: Any = int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha  # as peft writes it
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=alpha,
        lora_dropout=lora.dropout,
        target_modules=find_targets(model, lora.target_modules),
        bias="none",
        task_type="CAUSAL_LM",
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        modules_to_save=list(lora.modules_to_save) if lora.modules_to_save else None,
    )
    device = next(model.parameters()).device
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        peft_model = get_peft_model(model, config, low_cpu_mem_usage=device.type == "meta")
    for name, parameter in peft_model.named_parameters():
        if parameter.requires_grad and "modules_to_save" in name:
            parameter.data = parameter.data.float()  # full modules train in float32 like the adapter
    return peft_model


def load_adapter(
    model: PreTrainedModel | PeftModel,
    directory: Path,
    *,
    name: str = "default",
    replaced: Iterable[str | None] = (),
) -> PeftModel:
    """Loads an adapter onto a base, or one more onto a model that has some.

    Args:
        model: The base, or the model with adapters.
        directory: Of the adapter.
        name: In the model.
        replaced: Parameters of the base that the adapter's file may replace: embeddings of a vocabulary that grew.

    Raises:
        AdapterError: No adapter there, pickle weights, or shapes that belong to another base.
    """
    facts = read_adapter(directory)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if isinstance(model, PeftModel):
                model.load_adapter(str(directory), adapter_name=name)
            else:
                model = PeftModel.from_pretrained(model, str(directory), adapter_name=name)
    except (RuntimeError, ValueError, KeyError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        made_for = f" (made for {facts.base_model})" if facts.base_model else ""
        raise AdapterError(
            f"The adapter in {directory}{made_for} does not fit this base: {_first_mismatch(error)}",
            "Give the base it was trained on with --model.",
        ) from error
    loaded = {*adapter_state(model, name), *(f"base_model.model.{parameter}" for parameter in replaced)}
    missing = sorted(set(facts.tensors) - loaded)
    if missing:
        raise AdapterError(
            f"The adapter in {directory} has {len(missing)} tensors this base has no place for, first {missing[0]}.",
            "Give the base it was trained on with --model.",
        )
    return model


def _first_mismatch(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    detail = next((line for line in lines if "size mismatch" in line), lines[0] if lines else type(error).__name__)
    return detail[:300]


def adapter_state(peft_model: PeftModel, name: str = "default") -> dict[str, torch.Tensor]:
    """The adapter's tensors under the names PEFT saves them by, on their device, sharing storage."""
    # "auto" would ask the hub whether the vocabulary was resized; this project never resizes it.
    return get_peft_model_state_dict(peft_model, adapter_name=name, save_embedding_layers=False)


def load_adapter_state(peft_model: PeftModel, state: Mapping[str, torch.Tensor]) -> None:
    """Puts saved adapter tensors back, in place.

    Raises:
        AdapterError: The names or shapes are not this adapter's.
    """
    current = adapter_state(peft_model)
    wrong = [n for n in sorted(set(current) | set(state)) if n not in current or n not in state]
    wrong += [n for n in current if n in state and current[n].shape != state[n].shape]
    if wrong:
        raise AdapterError(f"The saved adapter does not match: {wrong[0]} and {len(wrong) - 1} more tensors differ.")
    set_peft_model_state_dict(peft_model, dict(state))


def save_adapter(peft_model: PeftModel, directory: Path, *, base_name: str, name: str = "default") -> None:
    """Writes `adapter_config.json` and `adapter_model.safetensors`, loadable by `PeftModel.from_pretrained`.

    No network call is made. `base_name` is the hub id or directory that it records as the base.
    """
    state = {key: value.detach().to("cpu").contiguous() for key, value in adapter_state(peft_model, name).items()}
    save_file(state, directory / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config = peft_model.peft_config[name].to_dict()
    config["base_model_name_or_path"] = base_name
    config["inference_mode"] = True
    content = json.dumps(config, indent=2, sort_keys=True, default=sorted)  # sets as sorted lists
    (directory / ADAPTER_CONFIG).write_text(content + "\n", encoding="utf-8")


def read_adapter(directory: Path) -> AdapterFacts:
    """Reads what an adapter directory says of itself.

    Raises:
        AdapterError: No adapter there, pickle weights only, or files that cannot be read.
    """
    config_path, weights_path = directory / ADAPTER_CONFIG, directory / ADAPTER_WEIGHTS
    if not config_path.is_file():
        raise AdapterError(
            f"There is no adapter in {directory}: {ADAPTER_CONFIG} is missing.",
            "Train one with: qlora train, or give --adapter the right directory.",
        )
    if not weights_path.is_file():
        pickle = next(directory.glob("adapter_model*.bin"), None)
        found = f"only {pickle.name}, a pickle file, is there and is not read" if pickle else "it is missing"
        raise AdapterError(f"{weights_path} is needed: {found}.", "Save the adapter as safetensors.")
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
        if config.get("peft_type") != "LORA":
            raise AdapterError(
                f"{directory} holds a {config.get('peft_type')} adapter.", "Only LoRA adapters are read."
            )
        with safe_open(weights_path, framework="pt") as reader:
            tensors = {}
            for name in reader.keys():  # noqa: SIM118 - not a mapping
                part = reader.get_slice(name)
                tensors[name] = (tuple(part.get_shape()), part.get_dtype())
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
    except (ValueError, KeyError, TypeError, AttributeError, OSError, SafetensorError) as error:
        raise AdapterError(
            f"The adapter in {directory} cannot be read: {error}.", "Use an earlier checkpoint."
        ) from error
    rslora = bool(config.get("use_rslora"))
    targets = config.get("target_modules") or ()
    return AdapterFacts(
        rank=rank,
        alpha=alpha,
        scaling=alpha / (rank**0.5 if rslora else rank),
        dropout=float(config.get("lora_dropout") or 0),
        target_modules=(targets,) if isinstance(targets, str) else tuple(sorted(targets)),
        base_model=config.get("base_model_name_or_path"),
        rslora=rslora,
        dora=bool(config.get("use_dora")),
        modules_to_save=tuple(config.get("modules_to_save") or ()),
        tensors=tensors,
        config=config,
    )


def adapted_modules(model: nn.Module) -> Iterator[nn.Module]:
    """Modules whose result depends on the adapter in effect: tuned layers, and those trained and saved as a whole."""
    return (m for m in model.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper))


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, total) parameters; a packed 4-bit weight counts the weights it holds, a tied one counts once."""
    counts = [(logical_numel(parameter), parameter.requires_grad) for parameter in model.parameters()]
    return sum(count for count, trained in counts if trained), sum(count for count, _ in counts)
