"""Names that PEFT changes on its way: those of mixture-of-experts models, in a configuration and in a file.

transformers 4 had a linear layer for each expert, and PEFT takes `gate_proj` and its like for those (`w1` in Mixtral):
they become adapters on the stacked experts. The dense and shared layers that are called so get none, in training and when
PEFT loads an adapter that names them. Listed as parameters (`<layer>.weight`) they are what they are.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import qlora_cli.core.bnb_before_peft  # noqa: F401 - with the compiler otherwise

# isort: split
from peft import LoraConfig
from peft.tuners import tuners_utils
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import transformers_weight_conversion as conversion
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qlora_cli.core.adapters.adapter_facts import PREFIX, AdapterFacts
from qlora_cli.core.models.structure import tower_names
from qlora_cli.errors import AdapterError


@contextlib.contextmanager
def as_they_are() -> Iterator[None]:
    """Has PEFT take the names of a configuration and of tensors as they are."""
    converts = ("convert_peft_config_for_transformers", "convert_peft_adapter_state_dict_for_transformers")
    before = {name: getattr(conversion, name) for name in converts}
    try:
        conversion.convert_peft_config_for_transformers = lambda *_, **__: None
        conversion.convert_peft_adapter_state_dict_for_transformers = lambda *_, adapter_state_dict, **__: (
            adapter_state_dict
        )
        yield
    finally:
        for name, function in before.items():
            setattr(conversion, name, function)


def changes_name(model: Any, name: str) -> bool:
    """Whether PEFT takes a target of this name for something else in this model."""
    config = LoraConfig(target_modules=[name])
    try:
        conversion.convert_peft_config_for_transformers(config, model=model, conversions=None)
    except ValueError:  # one of two that are one parameter now
        return True
    return set(config.target_modules or ()) != {name}


def misread_tensors(model: Any, tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of an adapter's tensors that PEFT takes for others when it loads them, and so leaves out.

    transformers' renamings of checkpoints are meant for older names; some change today's too (`mlp.shared_experts` of
    Laguna, by a pattern whose dot stands for any character).

    Args:
        model: The base, adapted or not.
        tensors: Of the adapter, by the names in its file.
    """
    try:
        read = conversion.convert_peft_adapter_state_dict_for_transformers(
            model=model, peft_config=LoraConfig(), adapter_state_dict=dict(tensors)
        )
    except Exception:  # whatever an operation raises on tensors that it was not made for; PEFT then loads none
        return sorted(tensors)
    return sorted(set(tensors) - set(read))


def refuses_target(model: Any, name: str) -> bool:
    """Whether PEFT refuses to adapt a module of this name: some of mixers whose weight a kernel may read raw."""
    check = getattr(tuners_utils, "_check_lora_target_modules_mamba", None)
    try:
        if check is not None:
            check(LoraConfig(target_modules=[name]), model, name)
    except ValueError:
        return True
    return False


def stored_config(config: Any, model: Any) -> dict[str, Any]:
    """The fields of `adapter_config.json` with which PEFT attaches the adapter where it is attached here.

    Args:
        config: Whose `target_modules` are names and suffixes of modules, taken as they are.
        model: The base, adapted or not.

    Raises:
        AdapterError: No configuration of PEFT says it.
    """
    content: dict[str, Any] = config.to_dict()
    if config.target_parameters:
        content["target_parameters"] = sorted(config.target_parameters)
    targets = sorted(config.target_modules or ())
    if targets and tower_names(model):
        # Of many names PEFT keeps endings that suffice in this model, and that modules of the towers left out have too.
        endings = tuple(f".{name}" for name in targets)
        tuned = (name for name, module in model.named_modules() if _is_tuned(module))
        targets = sorted(name for name in tuned if name in targets or name.endswith(endings)) or targets
        content["target_modules"] = targets
    changed = {leaf for leaf in {name.rsplit(".", 1)[-1] for name in targets} if changes_name(model, leaf)}
    if not changed:
        return content
    kept = [name for name in targets if name.rsplit(".", 1)[-1] not in changed]
    endings = tuple(f".{name}" for name in set(targets) - set(kept))
    moved = [
        name
        for name, module in model.named_modules()
        if name.endswith(endings) or name in targets
        if name.rsplit(".", 1)[-1] in changed
    ]
    if config.use_dora or config.lora_bias:
        raise AdapterError(
            f"PEFT reads no DoRA adapter on {', '.join(sorted(changed))} of this {model.config.model_type} model.",
            f"Leave --dora out, or add: --exclude-modules {','.join(sorted(changed))}",
        )
    content["target_modules"] = kept
    content["target_parameters"] = sorted({*(config.target_parameters or ()), *(f"{name}.weight" for name in moved)})
    content["lora_dropout"] = 0.0  # of training alone; PEFT takes none with parameters
    for field in ("rank_pattern", "alpha_pattern"):
        patterns = content.get(field) or {}
        content[field] = patterns | {f"({key})\\.weight": value for key, value in patterns.items()}
    return content


def _is_tuned(module: Any) -> bool:
    return isinstance(module, BaseTunerLayer) and not isinstance(module, ParamWrapper)


def _has_bare_weight(module: Any) -> bool:
    """Whether a module is no layer that PEFT adapts and has a matrix: a router, which was a linear layer before
    transformers 5."""
    if isinstance(module, ParamWrapper):
        return module.parameter_name == "weight"
    adaptable = isinstance(module, (nn.Linear, nn.Embedding, Conv1D, BaseTunerLayer))
    return module is not None and not adaptable and getattr(getattr(module, "weight", None), "ndim", 0) == 2


def config_to_load(facts: AdapterFacts, model: Any) -> LoraConfig:
    """PEFT's configuration of an adapter in a file, its targets the modules that the file has tensors of.

    Args:
        facts: Of the adapter.
        model: The base, adapted or not.

    Raises:
        ValueError, TypeError: PEFT refuses a field.
    """
    known = {field.name for field in dataclasses.fields(LoraConfig)}
    config: Any = LoraConfig(**{name: value for name, value in facts.config.items() if name in known})
    config.inference_mode = True
    config.init_lora_weights = True  # the file's follow; B of what it has no tensors for has to be zero
    modules = dict(model.named_modules())
    adapted = {name.removeprefix(PREFIX).split(".lora_", 1)[0] for name in facts.tensors if ".lora_" in name}
    bare = [f"{name}.weight" for name in sorted(adapted) if _has_bare_weight(modules.get(name))]
    if bare:
        config.target_parameters = sorted({*(config.target_parameters or ()), *bare})
    if not config.target_parameters:
        return config
    layers = (nn.Linear, nn.Embedding, Conv1D, BaseTunerLayer)
    targets = {
        name
        for name in adapted
        if isinstance(modules.get(name), layers) and not isinstance(modules.get(name), ParamWrapper)
    }
    if targets:
        config.target_modules = targets
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    endings = tuple(f"{name}.weight" for name in targets)
    config.target_parameters = [
        parameter
        for parameter in config.target_parameters
        if not any(ending == parameter or ending.endswith(f".{parameter}") for ending in endings)
    ] or None
    return config
