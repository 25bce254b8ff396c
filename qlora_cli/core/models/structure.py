"""Structure of a model: built without weights, its linear layers and its output head by name."""

import copy
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qlora_cli.errors import ModelError, first_line

# Subclasses of nn.Linear whose forward is that of nn.Linear in other words; transformers leaves them in 16 bits.
PLAIN_LINEAR_SUBCLASSES = {"FalconLinear"}
# What configurations call the most tokens of a row: most of them; GPT-2 and its kin; MPT; Bloom and the first GLMs.
CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")


def build_empty(config: PreTrainedConfig, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of a configuration on the meta device: true shapes, no memory.

    Raises:
        ModelError: The configuration belongs to no causal language model.
    """
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, RuntimeError) as error:
        raise ModelError(
            f"{config.model_type} is no causal language model that can be built here: {first_line(error)}",
            "Give --model a decoder such as llama, gpt_neox, falcon, mistral, qwen3 or gemma3.",
        ) from error


def underlying_model(model: Any) -> Any:
    """The transformers model inside a PEFT one, its linears adapted; any other model as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def context_length(config: PreTrainedConfig) -> int | None:
    """Most tokens a model reads at once, prompt and answer together; None where its configuration names no limit."""
    text_config = config.get_text_config(decoder=True)
    lengths = (getattr(text_config, name, None) for name in CONTEXT_NAMES)
    return next((length for length in lengths if isinstance(length, int) and length > 0), None)


def head_names(model: Any) -> list[str]:
    """Names of the output head, as far as there is one."""
    head = model.get_output_embeddings()
    return [name for name, module in model.named_modules() if module is head]


def linear_names(model: nn.Module) -> list[str]:
    """Full names of every linear layer but the output head (nn.Linear and its subclasses, Conv1D, 4-bit ones)."""
    heads = set(head_names(model))
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and name not in heads and "lora_" not in name
    ]


def is_plain_linear(module: nn.Module) -> bool:
    """Whether the module computes what nn.Linear computes, from a weight that is neither packed nor adapted."""
    kind = type(module)
    return isinstance(module, nn.Linear) and (
        kind.forward is nn.Linear.forward or kind.__name__ in PLAIN_LINEAR_SUBCLASSES
    )
