"""Modules of routed experts in the layouts that transformers has, with random weights."""

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from qlora_cli.core.experts.four_bit_experts import FourBitExperts, pack_experts
from qlora_cli.core.experts.layout import expert_weights
from qlora_cli.core.experts.stack import pack_matrix
from tests.conftest import make_tokenizer

COMMON = {
    "vocab_size": 512,
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
# What is square in one of the two sizes would hide a matrix taken the wrong way round.
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "head_dim": 16},
    ),
    "gpt_oss": ("GptOssConfig", {"num_local_experts": 5, "intermediate_size": 48, "head_dim": 16}),
    "llama4": (
        "Llama4TextConfig",
        {
            "num_local_experts": 5,
            "intermediate_size": 128,
            "intermediate_size_mlp": 192,
            "head_dim": 16,
            "interleave_moe_layer_step": 1,
        },
    ),
    "llama": ("LlamaConfig", {"intermediate_size": 128, "num_hidden_layers": 2}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 5, "intermediate_size": 128}),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            "num_hidden_layers": 2,
            "first_k_dense_replace": 1,
            "num_key_value_heads": 4,
            "n_routed_experts": 6,
            "n_shared_experts": 1,
            "n_group": 2,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "intermediate_size": 128,
            "q_lora_rank": 64,
            "kv_lora_rank": 64,
            "qk_rope_head_dim": 16,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
        },
    ),
    "nemotron_h": (
        "NemotronHConfig",
        {
            "layers_block_type": ["moe"],
            "head_dim": 16,
            "intermediate_size": 96,
            "ssm_state_size": 16,
            "mamba_num_heads": 4,
            "mamba_head_dim": 32,
            "n_groups": 1,
            "n_routed_experts": 5,
            "moe_intermediate_size": 48,
            "moe_shared_expert_intermediate_size": 64,
        },
    ),
}


def make_experts(layout: str, *, seed: int = 0) -> nn.Module:
    """The experts of one layer, float64, with weights that are far from symmetric."""
    name, changes = CONFIGS[layout]
    config = getattr(transformers, name)(**{**COMMON, **changes})
    config._experts_implementation = "eager"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config)
        experts = next(module for module in model.modules() if expert_weights(module))
        for parameter in experts.parameters():
            parameter.data.normal_(0.02, 0.2)
    return experts.double()


def pack(
    experts: nn.Module, dtype: torch.dtype, *, quant_type: str = "nf4", double_quant: bool = True
) -> FourBitExperts:
    """The same module in 4 bits, in place."""
    matrices = {w.name: w.as_matrix(getattr(experts, w.name).data).to(dtype) for w in expert_weights(experts)}
    held = {"quant_type": quant_type, "double_quant": double_quant}
    packed = pack_experts(experts, compute_dtype=dtype, device=torch.device("cpu"), **held)
    for name, stack in matrices.items():
        for number, matrix in enumerate(stack):
            packed.put_experts(name, number, pack_matrix(matrix, **held))
    return packed.to(dtype)


def write_expert_model(layout: str, directory: Path, *, shard: str = "1GB", **changes: Any) -> Any:
    """Writes a checkpoint of a layout as transformers does, float32, and gives the model."""
    name, own = CONFIGS[layout]
    config = getattr(transformers, name)(**{**COMMON, **own, **changes}, bos_token_id=0, eos_token_id=0, pad_token_id=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = transformers.AutoModelForCausalLM.from_config(config).float()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.data.normal_(0, 0.08)
    model.save_pretrained(directory, max_shard_size=shard)
    make_tokenizer().save_pretrained(directory)
    return model
