"""Structure of a model: its class, built without weights, its language model, linear layers and output head by name."""

import copy
from collections.abc import Iterable, Set
from functools import cache
from inspect import signature
from itertools import accumulate
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.auto_factory import _get_model_class
from transformers.pytorch_utils import Conv1D

from qlora_cli.core.models.files import context_length
from qlora_cli.core.models.raw_weights import call_layers, read_raw
from qlora_cli.errors import ModelError, first_line

# Subclasses of nn.Linear whose forward is that of nn.Linear in other words; transformers leaves them in 16 bits.
PLAIN_LINEAR_SUBCLASSES = {"FalconLinear"}
MOST_OFFSET = 2  # entries before the first position in a table of positions (OPT, XGLM)


def is_multimodal(config: PreTrainedConfig) -> bool:
    """Whether a configuration is of a language model with towers beside it, for images or sound."""
    return config.get_text_config(decoder=True) is not config and not config.is_encoder_decoder


def model_class(config: PreTrainedConfig) -> Any:
    """What builds and loads the model of a configuration by `from_config` and `from_pretrained`, whole.

    A multimodal checkpoint is of a class of its own; where `AutoModelForCausalLM` has one for it as well, that one may
    be of its language model alone, whose checkpoint would lack the towers (qwen3_5, llama4). Some language models are
    known as multimodal ones only (mistral4).
    """
    if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return AutoModelForCausalLM
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM):
        if auto._model_mapping.get(type(config), None):  # its keys() import the configurations of all models: 2 s
            if auto is AutoModelForCausalLM and not is_multimodal(config):
                return auto
            found = _get_model_class(config, auto._model_mapping)
            if found.config_class in (None, type(config)):
                return found
    return AutoModelForCausalLM


def text_class(config: PreTrainedConfig) -> Any:
    """As `model_class`, but that the towers of a multimodal model are left out: neither built nor read."""
    found = model_class(config)
    return _without_towers(found) if found is not AutoModelForCausalLM else found


@cache
def _without_towers(whole: type[PreTrainedModel]) -> type[PreTrainedModel]:
    def init(self: Any, *arguments: Any, **keywords: Any) -> None:
        whole.__init__(self, *arguments, **keywords)
        leave_out_towers(self)

    # transformers goes by a class's name and by the module that it is from.
    own = {"__init__": init, "__module__": whole.__module__, "__qualname__": whole.__qualname__}
    return type(whole.__name__, (whole,), own)


class AbsentTower(nn.Module):
    """Stands where a multimodal model has a tower, which text never reaches.

    Attributes:
        device: That some models ask it for before they look whether there is anything for it (qwen2_audio).
    """

    device = torch.device("cpu")

    def forward(self, *arguments: Any, **keywords: Any) -> NoReturn:
        raise ModelError("Only text is read here, and this is an image or a sound.", "Leave such rows and prompts out.")


def tower_names(model: Any) -> list[str]:
    """Names of what stands beside the language model and its head in a multimodal model, left out or not: towers and
    projectors."""
    if not is_multimodal(model.config):
        return []
    kept = [name for name, module in model.named_modules() if module is find_decoder(model)] + head_names(model)
    on_the_way = {"", *(part for name in kept for part in accumulate(name.split("."), "{}.{}".format))}
    return [
        name
        for name, module in model.named_modules()
        if name not in on_the_way
        and name.rpartition(".")[0] in on_the_way - set(kept)
        and (isinstance(module, AbsentTower) or any(True for _ in module.parameters()))
    ]


def leave_out_towers(model: Any) -> None:
    """Takes the towers out of a multimodal model; of any other nothing."""
    for name in tower_names(model):
        model.set_submodule(name, AbsentTower())


def build_empty(config: PreTrainedConfig, *, trust_remote_code: bool = False, whole: bool = False) -> PreTrainedModel:
    """The model of a configuration on the meta device: true shapes, no memory.

    Args:
        config: Of the model.
        trust_remote_code: Whether to run the model's own code.
        whole: With the towers of a multimodal model, which are left out as they are in loading.

    Raises:
        ModelError: The configuration belongs to no causal language model.
    """
    if config.is_encoder_decoder:
        raise ModelError(
            f"{config.model_type} is an encoder with a decoder, and no causal language model.",
            "Give --model a decoder such as llama, gpt_neox, falcon, mistral, qwen3 or gemma3.",
        )
    try:
        built = (model_class if whole else text_class)(config)
        # A class of models has `_from_config` only, and takes a configuration that it changes.
        from_config = getattr(built, "from_config", None) or built._from_config
        options = {} if built is not AutoModelForCausalLM else {"trust_remote_code": trust_remote_code}
        # In float32: PyTorch makes no complex numbers, which some rotary embeddings are, of 16-bit ones.
        with torch.device("meta"):
            model = from_config(copy.deepcopy(config), dtype=torch.float32, **options)
        find_decoder(model)  # which of some classes is in what was taken for a tower (blip)
    except ImportError as error:  # of a tower, that is built before it is left out
        raise ModelError(
            f"{config.model_type} cannot be built: {first_line(error).removesuffix(':')}",
            "Install that library, and type the command again.",
        ) from error
    except Exception as error:  # a configuration can break any line of a model's constructor
        raise ModelError(
            f"{config.model_type} is no causal language model that can be built here: {first_line(error)}",
            "Give --model a decoder such as llama, gpt_neox, falcon, mistral, qwen3 or gemma3.",
        ) from error
    call_layers(model)
    return model


def config_with_biases(
    config: PreTrainedConfig, wanted: Set[str], *, trust_remote_code: bool = False
) -> tuple[dict[str, bool], PreTrainedModel] | None:
    """Settings under which linear layers have the biases that they lack, and the model on the meta device with them.

    Tried out are the configuration's own settings that are named after biases and are off.

    Args:
        config: Of a model without them.
        wanted: Their names in the model.

    Returns:
        The settings, and the model, which may have more biases than wanted, and is the same else; None where there are
        no such settings.
    """

    def build(settings: Iterable[str]) -> PreTrainedModel:
        changed = copy.deepcopy(config)
        for name in settings:
            setattr(changed.get_text_config(decoder=True), name, True)
        return build_empty(changed, trust_remote_code=trust_remote_code)

    before = set(build(()).state_dict())
    chosen = []
    for name, value in config.get_text_config(decoder=True).to_dict().items():
        if "bias" in name and value is False and wanted & (set(build([name]).state_dict()) - before):
            chosen.append(name)
    model = build(chosen)
    new = set(model.state_dict()) - before
    plain = all(n.endswith(".bias") and isinstance(model.get_submodule(n[:-5]), nn.Linear) for n in new)
    return (dict.fromkeys(chosen, True), model) if wanted <= new and plain else None


def find_decoder(base: Any) -> Any:
    """The module below the head, which turns token ids into hidden states: of a multimodal model its language model."""
    decoder = base.get_decoder()
    if decoder is base.get_output_embeddings():  # which ModernBERT calls so
        decoder = base
    if decoder is not base and decoder.get_output_embeddings() is not None:  # Llama 4 has its head inside
        return find_decoder(decoder)
    if decoder is not base:
        return decoder
    return getattr(base, base.base_model_prefix, None) or base.model  # Llama 4's text model has another prefix


def inputs_by_token(decoder: Any, ids: Tensor) -> dict[str, Tensor]:
    """What a decoder that is given embeddings takes beside them: values for each layer, from a table of their own.

    Gemma 3n and 4 have such a table. Without its values the first computes as another model would, and the second looks for
    each embedding among those of the whole vocabulary, tokens x vocabulary x size at once; so does Qwen 4 for the token ids
    that its own tables are looked up by, and finds none where there is noise on embeddings.

    Args:
        decoder: From `find_decoder`.
        ids: (rows, length) int64, on any device.

    Returns:
        Keyword arguments of its forward pass: `per_layer_inputs`, (rows, length, layers, size), or `ple_input_ids`, the ids
        as they are; of other decoders none.
    """
    if getattr(decoder.config, "ple_layer_ids", None):
        return {"ple_input_ids": ids}
    if not getattr(decoder, "hidden_size_per_layer_input", 0) or not hasattr(decoder, "get_per_layer_inputs"):
        return {}
    device = next(decoder.embed_tokens_per_layer.parameters()).device
    look_up = decoder.get_per_layer_inputs
    # transformers before 5.23 asks for embeddings, too, which it looks at without ids alone.
    unasked = [None] * (len(signature(look_up).parameters) - 1)
    return {"per_layer_inputs": look_up(ids.to(device, non_blocking=True), *unasked)}


def bytes_by_token(decoder: Any) -> int:
    """Of `inputs_by_token` for one token."""
    with torch.no_grad():
        return sum(given.nbytes for given in inputs_by_token(decoder, torch.zeros(1, 1, dtype=torch.long)).values())


def has_other_tables(decoder: nn.Module, embedding: nn.Module) -> bool:
    """Whether a decoder has tables besides those of its input embeddings: of positions, or of tokens once more."""
    others = set(decoder.modules()) - set(embedding.modules())
    return any(isinstance(module, nn.Embedding) for module in others)


def values_by_layer(config: PreTrainedConfig, name: str) -> set[Any]:
    """Of a number that a configuration gives once, or some layers otherwise (heads of Gemma 4's global ones): each there is."""
    layers = config.per_layer_config if getattr(config, "is_heterogeneous", False) else [config]
    return {getattr(layer, name, None) for layer in layers}


def underlying_model(model: Any) -> Any:
    """The transformers model inside a PEFT one, its linears adapted; any other model as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def has_position_table(config: PreTrainedConfig, *, trust_remote_code: bool = False) -> bool:
    """Whether positions past the context have no values at all: they are looked up in a table as long as the context.

    Raises:
        ModelError: As `build_empty`.
    """
    context = context_length(config)
    if context is None:
        return False
    if config.get_text_config(decoder=True).model_type == "mpt":  # makes its ALiBi biases for the context, in each pass
        return True
    model: Any = build_empty(config, trust_remote_code=trust_remote_code)
    inputs = model.get_input_embeddings()
    tables = [m.weight for m in model.modules() if isinstance(m, nn.Embedding) and m is not inputs]
    lengths = {table.shape[0] for table in tables} | {size for buffer in model.buffers() for size in buffer.shape}
    return not lengths.isdisjoint(range(context, context + MOST_OFFSET + 1))


def directory_has_position_table(directory: str) -> bool:
    """`has_position_table` of the configuration in a directory.

    Raises:
        ModelError: As `build_empty`.
    """
    return has_position_table(AutoConfig.from_pretrained(directory))


def head_names(model: Any) -> list[str]:
    """Names of the output head, as far as there is one."""
    head = model.get_output_embeddings()
    return [name for name, module in model.named_modules() if module is head]


def embedding_names(model: PreTrainedModel) -> tuple[str, str | None]:
    """Parameter names of the input embeddings and of the output head, as far as there is one."""
    inputs, head = model.get_input_embeddings(), model.get_output_embeddings()
    places = {id(module): name for name, module in model.named_modules()}
    return f"{places[id(inputs)]}.weight", None if head is None else f"{places[id(head)]}.weight"


def linear_names(model: nn.Module) -> list[str]:
    """Full names of every linear layer that is called but the output head (nn.Linear, its subclasses, Conv1D, 4-bit)."""
    left_out = {*head_names(model), *read_raw(model)}
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and name not in left_out and "lora_" not in name
    ]


def is_plain_linear(module: nn.Module) -> bool:
    """Whether the module computes what nn.Linear computes, from a weight that is neither packed nor adapted."""
    kind = type(module)
    return isinstance(module, nn.Linear) and (
        kind.forward is nn.Linear.forward or kind.__name__ in PLAIN_LINEAR_SUBCLASSES
    )
