"""LoRA adapters by PEFT: attached to a base, loaded and saved."""

import json
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import qlora_cli.core.bnb_before_peft  # noqa: F401 - with the compiler otherwise

# isort: split
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from qlora_cli.artifacts import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from qlora_cli.core.adapters.adapter_facts import base_name, read_adapter, way_to_a_place
from qlora_cli.core.adapters.expert_lora import expert_rank, expert_targets, short_parameters, use_expert_lora
from qlora_cli.core.adapters.fitting import fitted_adapter
from qlora_cli.core.adapters.peft_names import as_they_are, config_to_load, misread_tensors, stored_config
from qlora_cli.core.adapters.shared_layers import apart, share_pairs
from qlora_cli.core.adapters.targets import check_settings, describe_partial, find_targets, read_patterns, short_names
from qlora_cli.core.adapters.vocabulary import replaced_weights, take_vocabulary
from qlora_cli.core.models.structure import underlying_model
from qlora_cli.core.untrusted import check_expressions
from qlora_cli.errors import AdapterError, first_line
from qlora_cli.events import Caution, Notice, Report, report_nothing
from qlora_cli.settings.groups import LoraSettings
from qlora_cli.sizes import format_count


def attach_adapter(
    model: PreTrainedModel, lora: LoraSettings, *, seed: int = 0, report: Report = report_nothing
) -> PeftModel:
    """Attaches a fresh LoRA adapter in float32: A Kaiming-uniform, B zero (https://arxiv.org/abs/2106.09685, 4.1).

    What starts from the base's weights or from rows is set afterwards (`calibration.initialization`).

    Args:
        model: A base from `load_base`, or a meta model from `build_empty`.
        lora: A is (rank, in), B is (out, rank); B @ A is scaled by alpha / rank, or alpha / sqrt(rank) with rslora
            (https://arxiv.org/abs/2312.03732). DoRA: https://arxiv.org/abs/2402.09353.
        seed: Of A; the global random state is left as it was.
        report: Receives what PEFT will not read of it.

    Raises:
        AdapterError: A target matches nothing, or a value is out of range.
    """
    check_settings(model, lora)
    names, experts = find_targets(model, lora), expert_targets(model, lora)
    if partial := describe_partial(names, lora, model):
        report(Notice(partial))
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=_as_written(lora.alpha),
        lora_dropout=lora.dropout,
        target_modules=short_names(names, lora.target_modules, model),
        bias="none",
        task_type="CAUSAL_LM",
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        init_lora_weights="gaussian" if lora.init == "gaussian" else True,
        modules_to_save=list(lora.modules_to_save) if lora.modules_to_save else None,
        target_parameters=short_parameters(experts, model) if experts else None,
        **_patterns(model, lora, names, experts),
    )
    use_expert_lora(config, model)
    stored_config(config, model)  # refuses what PEFT could not read back
    device = next(model.parameters()).device
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), warnings.catch_warnings(), as_they_are():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        try:
            peft_model = get_peft_model(model, config, low_cpu_mem_usage=device.type == "meta")
        except ValueError as error:
            raise AdapterError(
                f"No adapter can be attached as asked: {first_line(error)}", "Leave modules out with --exclude-modules."
            ) from error
    share_pairs(peft_model)
    for name, parameter in peft_model.named_parameters():
        if parameter.requires_grad and "modules_to_save" in name:
            parameter.data = parameter.data.float()  # full modules train in float32 like the adapter
    if report is not report_nothing and (lost := misread_tensors(model, adapter_state(peft_model))):
        report(
            Caution(
                f"PEFT takes {len(lost)} tensors of this adapter for others, first {lost[0]}, and would leave them out: "
                "use it with qlora generate, or merge it."
            )
        )
    return peft_model


def _as_written(number: float) -> Any:
    return int(number) if float(number).is_integer() else number  # as peft writes it


def _patterns(
    model: PreTrainedModel, lora: LoraSettings, names: Sequence[str], experts: Sequence[str]
) -> dict[str, Any]:
    """`rank_pattern` and `alpha_pattern` of PEFT, by full name, and behind those the experts' by the end of theirs.

    Raises:
        AdapterError: A value is none, or a name matches no module that is adapted.
    """
    found: dict[str, dict[str, Any]] = {}
    for field, read in (("rank_pattern", int), ("alpha_pattern", float)):
        flag = "--" + field.replace("_", "-")
        values = {}
        for name, text in read_patterns(getattr(lora, field), [*names, *experts], flag).items():
            try:
                values[f"^{re.escape(name)}"] = _as_written(_positive(read(text)))
            except ValueError as error:
                raise AdapterError(f"{flag} gives {name} {text}, which is none above 0.") from error
        found[field] = values
    rank = expert_rank(model, lora) if experts else lora.rank
    if rank != lora.rank:
        alpha = lora.alpha if lora.rslora else lora.alpha * rank / lora.rank  # the scaling is that of all others
        for end in sorted({".".join(name.split(".")[-2:]) for name in experts}):
            alike = [f"^{re.escape(name)}" for name in experts if name.endswith(end)]
            for field, value in (("rank_pattern", rank), ("alpha_pattern", _as_written(alpha))):
                # One pattern for all, unless some have their own: PEFT takes the first that matches, in whatever order
                # the file has them.
                own = not found[field].keys().isdisjoint(alike)
                names = [name for name in alike if name not in found[field]] if own else [rf".*\.{re.escape(end)}"]
                found[field] |= dict.fromkeys(names, value)
    return found


def _positive(number: float) -> float:
    if not 0 < number < math.inf:
        raise ValueError
    return number


def load_adapter(
    model: PreTrainedModel | PeftModel, directory: Path, *, name: str = "default", report: Report = report_nothing
) -> PeftModel:
    """Loads an adapter onto a base, or one more onto a model that has some.

    Embeddings or a head that lie beside the adapter, of a vocabulary that grew or as they were when it was made, take the
    place of the base's.

    Args:
        model: The base, or the model with adapters.
        directory: Of the adapter.
        name: In the model.
        report: Receives which layers it names and has nothing for: they stay as the base has them.

    Raises:
        AdapterError: No adapter there, pickle weights, or shapes that belong to another base.
    """
    as_found = read_adapter(directory)
    made_for = as_found.base_model
    check_expressions(as_found.config, [module for module, _ in model.named_modules()], directory)
    with fitted_adapter(directory, model) as fitted:
        facts = read_adapter(fitted)
        replaced = replaced_weights(facts, underlying_model(model))
        take_vocabulary(model, fitted, facts, replaced)
        try:
            with warnings.catch_warnings(), as_they_are():
                warnings.simplefilter("ignore")
                config = config_to_load(facts, underlying_model(model))
                use_expert_lora(config, underlying_model(model))
                if isinstance(model, PeftModel):
                    model.add_adapter(name, config)
                    model.load_adapter(str(fitted), adapter_name=name)
                else:
                    model = PeftModel.from_pretrained(model, str(fitted), adapter_name=name, config=config)
        except (RuntimeError, ValueError, LookupError, TypeError, AttributeError, ImportError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise AdapterError(
                f"The adapter in {directory}{f' (made for {made_for})' if made_for else ''} does not fit this base: "
                f"{_first_mismatch(error)}",
                "Give the base it was trained on with --model.",
            ) from error
    state = adapter_state(model, name)
    missing = sorted(set(facts.tensors) - {*state, *replaced})
    if missing:
        raise AdapterError(
            f"The adapter in {directory} has {len(missing)} tensors this base has no place for, first {missing[0]}.",
            way_to_a_place(missing[0]),
        )
    started = sorted(tensor for tensor in state if ".lora_" in tensor and tensor not in facts.tensors)
    if started:  # B zero, so that they do nothing
        layers = sorted({base_name(tensor) for tensor in started})
        report(
            Caution(
                f"The adapter in {directory} names {format_count(len(layers), 'layer')} that it has nothing for, first "
                f"{layers[0]}: part of it is lost, or it was made for another base."
            )
        )
    return model


def report_unchanged(tensors: Iterable[tuple[str, torch.Tensor]], directory: Path, report: Report) -> None:
    """Reports an adapter that leaves its base as it is: B of every pair is zero, as before training, and there is nothing
    else in it. Tensors are looked at up to the first that is something."""
    if not any(bool(tensor.any()) for name, tensor in tensors if not re.search(r"\.lora_(embedding_)?A\b", name)):
        report(Caution(f"The adapter in {directory} changes nothing: B of every pair is zero, as before training."))


def _first_mismatch(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"{error.args[0]} is missing in it."
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
    with as_they_are():
        set_peft_model_state_dict(peft_model, dict(state))


def save_adapter(peft_model: PeftModel, directory: Path, *, base_name: str, name: str = "default") -> None:
    """Writes `adapter_config.json` and `adapter_model.safetensors`, loadable by `PeftModel.from_pretrained`.

    No network call is made. `base_name` is the hub id or directory that it records as the base.
    """
    save_file(apart(adapter_state(peft_model, name)), directory / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config = stored_config(peft_model.peft_config[name], peft_model.get_base_model())
    config["base_model_name_or_path"] = base_name
    config["inference_mode"] = True
    content = json.dumps(config, indent=2, sort_keys=True, default=sorted)  # sets as sorted lists
    (directory / ADAPTER_CONFIG).write_text(content + "\n", encoding="utf-8")


def adapted_modules(model: nn.Module) -> Iterator[nn.Module]:
    """Modules whose result depends on the adapter in effect: tuned layers, and those trained and saved as a whole."""
    return (m for m in model.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper))
