"""Small checkpoints of many architectures: two to four layers of 64, each with what is peculiar to it.

Weights are random and scaled up, so that logits, and their differences, are far from rounding.
"""

from pathlib import Path

SIZES = {"vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
MLP = {**SIZES, "intermediate_size": 128, "max_position_embeddings": 256}
GQA = {**MLP, "num_key_value_heads": 2}
HEADS = {**GQA, "head_dim": 16}
KINDS = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
CHOICES = {"num_experts_per_tok": 2, "moe_intermediate_size": 128}
EXPERTS = {"num_experts": 4, **CHOICES}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
SHARED = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    **CHOICES,
}
LATENT = {
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}
DELTA = {
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "layer_types": ["linear_attention", "full_attention"],
}
STATES = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_chunk_size": 32}
SCAN = {"vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 16, "time_step_rank": 64}
GPT2 = {"vocab_size": 320, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}
STILL = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
PER_LAYER = {"hidden_size_per_layer_input": 64, "vocab_size_per_layer_input": 320, "num_kv_shared_layers": 0}
SHARING = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
}
GEMMA = {**HEADS, **KINDS, "query_pre_attn_scalar": 16}
GEMMA4 = {**HEADS, **KINDS, **PER_LAYER, "global_head_dim": 16}
LLAMA4 = {
    **HEADS,
    "intermediate_size": 128,
    "intermediate_size_mlp": 128,
    "num_local_experts": 4,
    "num_experts_per_tok": 1,
    "attention_chunk_size": 64,
    "interleave_moe_layer_step": 1,
    "no_rope_layers": [1, 0],
}
TOWER = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
QWEN_TOWER = {"depth": 1, "hidden_size": 64, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64}
HALF = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
SECTIONS = {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}}

# model_type → arguments of its configuration class.
ARCHITECTURES: dict[str, dict] = {
    "afmoe": {**HEADS, **EXPERTS, **KINDS, "num_dense_layers": 1},
    "apertus": GQA,
    "arcee": GQA,
    "bamba": {**GQA, **STATES, "attn_layer_indices": [1], "mamba_expand": 2},
    "biogpt": {**MLP, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "layerdrop": 0.0},
    "bitnet": GQA,
    "bloom": {"vocab_size": 320, "hidden_size": 64, "n_layer": 2, "n_head": 4},
    "codegen": {**GPT2, **STILL, "n_ctx": 256, "rotary_dim": 8},
    "cohere": {**GQA, "logit_scale": 0.25},
    "cohere2": {**HEADS, **KINDS, "logit_scale": 0.25},
    "deepseek_v2": {**MLP, **SHARED, **LATENT},
    "deepseek_v3": {**MLP, **SHARED, **LATENT, "n_group": 2},
    "diffllama": GQA,
    "dots1": {**HEADS, **SHARED},
    "ernie4_5": HEADS,
    "ernie4_5_moe": {
        **HEADS,
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": 128,
        "moe_layer_start_index": 1,
        "moe_num_shared_experts": 1,
    },
    "exaone4": {**HEADS, **KINDS},
    "falcon": {
        **SIZES,
        "multi_query": True,
        "parallel_attn": True,
        "bias": False,
        "alibi": False,
        "new_decoder_architecture": False,
        "max_position_embeddings": 256,
    },
    "falcon_h1": {**HEADS, **STATES, "mamba_d_ssm": 128, "mamba_expand": 2},
    "falcon_mamba": SCAN,
    "flex_olmo": {**GQA, "num_experts": 4, "num_experts_per_tok": 2},
    "gemma": HEADS,
    "gemma2": {**HEADS, "sliding_window": 16, "query_pre_attn_scalar": 16},
    "gemma3": {"text_config": GEMMA, "vision_config": {**TOWER, "vision_use_head": False}, "mm_tokens_per_image": 4},
    "gemma3_text": GEMMA,
    "gemma3n_text": {
        **HEADS,
        **PER_LAYER,
        **SHARING,
        "sliding_window": 16,
        "intermediate_size": [128] * 4,
        "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0],
        "laurel_rank": 64,
        "altup_num_inputs": 3,
    },
    "gemma4": {
        "text_config": {**GEMMA4, "attention_k_eq_v": True, "num_global_key_value_heads": 1},
        "vision_config": {
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 32,
        },
        "audio_config": None,
    },
    "gemma4_text": {**GEMMA4, **SHARING},
    "glm": HEADS,
    "glm4": HEADS,
    "glm4_moe": {**HEADS, **SHARED},
    "glm4_moe_lite": {**MLP, **SHARED, **LATENT},
    "glm4v": {
        "text_config": {**HEADS, "rope_parameters": HALF},
        "vision_config": {**QWEN_TOWER, "image_size": 28, "patch_size": 14},
    },
    "gpt2": {**GPT2, **STILL},
    "gpt_bigcode": {**GPT2, **STILL},
    "gpt_neo": {
        "vocab_size": 320,
        "hidden_size": 64,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 16,
        "max_position_embeddings": 256,
        "intermediate_size": 128,
        "resid_dropout": 0.0,
        "embed_dropout": 0.0,
        "attention_dropout": 0.0,
    },
    "gpt_neox": {**MLP, "rotary_pct": 0.25},
    "gpt_neox_japanese": {**MLP, "hidden_dropout": 0.0, "attention_dropout": 0.0},
    "gpt_oss": {**HEADS, **KINDS, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gptj": {**GPT2, **STILL, "rotary_dim": 8},
    "granite": {
        **GQA,
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.2,
        "logits_scaling": 2.0,
    },
    "granitemoe": {**GQA, **LOCAL},
    "granitemoehybrid": {
        **GQA,
        **LOCAL,
        **STATES,
        "shared_intermediate_size": 128,
        "layer_types": ["mamba", "attention"],
        "mamba_expand": 2,
    },
    "granitemoeshared": {**GQA, **LOCAL, "shared_intermediate_size": 128},
    "helium": HEADS,
    "hrm_text": {**MLP, "head_dim": 16, "num_hidden_layers": 1, "H_cycles": 1, "L_cycles": 1, "L_bp_cycles": [1]},
    "hunyuan_v1_dense": HEADS,
    "hunyuan_v1_moe": {**HEADS, "num_experts": 4, "moe_topk": 2},
    "jamba": {
        **GQA,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 16,
        "mamba_dt_rank": 64,
        "use_mamba_kernels": False,
    },
    "lfm2": {**GQA, "layer_types": ["conv", "full_attention"], "block_ff_dim": 128, "block_auto_adjust_ff_dim": False},
    "lfm2_moe": {**GQA, **EXPERTS, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "llama": GQA,
    "llama4": {
        "text_config": LLAMA4,
        "vision_config": {
            **TOWER,
            "intermediate_size": 256,
            "vision_output_dim": 64,
            "projector_input_dim": 64,
            "projector_output_dim": 64,
        },
    },
    "llama4_text": LLAMA4,
    "llava": {
        "text_config": {"model_type": "llama", **GQA},
        "vision_config": {"model_type": "clip_vision_model", **TOWER},
    },
    "mamba": SCAN,
    "mamba2": {**SCAN, "num_heads": 4, "head_dim": 32, "n_groups": 1, "chunk_size": 32, "time_step_rank": 4},
    "minimax_m2": {**HEADS, **LOCAL},
    "ministral3": GQA,
    "mistral": {**GQA, "sliding_window": 16},
    "mistral3": {
        "text_config": {"model_type": "mistral", **GQA},
        "vision_config": {"model_type": "pixtral", **TOWER, "head_dim": 32},
    },
    "mistral4": {**MLP, **SHARED, **LATENT},
    "mixtral": {**GQA, **LOCAL, "sliding_window": None},
    "mpt": {"vocab_size": 320, "d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 256, "expansion_ratio": 2},
    "nanochat": GQA,
    "nemotron": HEADS,
    "nemotron_h": {
        **HEADS,
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "full_attention", "moe", "mlp"],
        "ssm_state_size": 16,
        "mamba_num_heads": 4,
        "mamba_head_dim": 32,
        "n_groups": 1,
        "chunk_size": 32,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 128,
        "moe_shared_expert_intermediate_size": 128,
    },
    "olmo": GQA,
    "olmo2": GQA,
    "olmo3": {**GQA, **KINDS},
    "olmoe": {**GQA, "num_experts": 4, "num_experts_per_tok": 2},
    "opt": {**SIZES, "ffn_dim": 128, "word_embed_proj_dim": 64, "max_position_embeddings": 256, "dropout": 0.0},
    "persimmon": {**MLP, "num_key_value_heads": 4},
    "phi": {**MLP, "num_key_value_heads": 4, **STILL},
    "phi3": {**GQA, "sliding_window": None},
    "phimoe": {**GQA, **LOCAL, "router_jitter_noise": 0.0, "input_jitter_noise": 0.0},
    "qwen2": {**GQA, "tie_word_embeddings": True},
    "qwen2_5_vl": {"text_config": {**GQA, **SECTIONS}, "vision_config": {**QWEN_TOWER, "fullatt_block_indexes": [0]}},
    "qwen2_moe": {**GQA, **EXPERTS, "shared_expert_intermediate_size": 128},
    "qwen3": {**HEADS, "tie_word_embeddings": True},
    "qwen3_5": {"text_config": {**HEADS, **DELTA}, "vision_config": QWEN_TOWER},
    "qwen3_5_moe_text": {**HEADS, **EXPERTS, **DELTA, "shared_expert_intermediate_size": 128},
    "qwen3_5_text": {**HEADS, **DELTA},
    "qwen3_moe": {**HEADS, **EXPERTS},
    "qwen3_next": {**HEADS, **EXPERTS, **DELTA, "shared_expert_intermediate_size": 128},
    "qwen3_vl": {
        "text_config": {**HEADS, **SECTIONS},
        "vision_config": {**QWEN_TOWER, "deepstack_visual_indexes": [0]},
    },
    "qwen3_vl_moe": {
        "text_config": {**HEADS, **SECTIONS, **EXPERTS},
        "vision_config": {**QWEN_TOWER, "deepstack_visual_indexes": [0]},
    },
    "qwen4_exp_text": {
        **HEADS,
        **EXPERTS,
        **DELTA,
        "num_hidden_layers": 3,
        "layer_types": ["linear_attention", "linear_attention", "full_attention"],
        "shared_expert_intermediate_size": 64,
        "hc_count": 2,
        "hc_lowrank": 64,
        "ple_layer_ids": [1],
        "ple_embed_dim": 64,
        "ngram_size": 2,
        "heads_per_ngram": 2,
        "ngram_vocab_size_base": 500,
        "make_ngram_vocab_size_divisible_by": 8,
        "split_ngram_parts": 1,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 32,
        "indexer_budget": 256,
        "indexer_compress_ratio": 4,
    },
    "seed_oss": {**HEADS, "attention_dropout": 0.0, "residual_dropout": 0.0},
    "smollm3": {**GQA, "no_rope_layers": [1, 0]},
    "stablelm": GQA,
    "starcoder2": {**GQA, "sliding_window": None, "residual_dropout": 0.0, "embedding_dropout": 0.0},
    "step3p7": {
        "text_config": {
            **HEADS,
            **CHOICES,
            "layer_types": ["full_attention", "sliding_attention"],
            "sliding_window": 16,
            "mlp_layer_types": ["dense", "sparse"],
            "n_routed_experts": 4,
            "share_expert_dim": 64,
        },
        "vision_config": TOWER,
    },
    "t5": {"vocab_size": 320, "d_model": 64, "num_layers": 2, "num_heads": 4, "d_ff": 128},
    "vaultgemma": {**HEADS, "sliding_window": 16, "query_pre_attn_scalar": 16},
    "voxtral": {
        "text_config": {"model_type": "llama", **GQA},
        "audio_config": {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 2},
    },
    "xglm": {
        "vocab_size": 320,
        "d_model": 64,
        "num_layers": 2,
        "attention_heads": 4,
        "ffn_dim": 128,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
        "layerdrop": 0.0,
        "max_position_embeddings": 256,
    },
    "zaya": {
        **HEADS,
        "num_hidden_layers": 4,
        "moe_intermediate_size": 128,
        "num_experts": 4,
        "num_experts_per_tok": 1,
        "router_hidden_size": 64,
    },
    "zamba2": {
        **SIZES,
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "num_key_value_heads": 4,
        "intermediate_size": 128,
        "mamba_d_state": 16,
        "mamba_ngroups": 1,
        "n_mamba_heads": 4,
        "num_mem_blocks": 1,
        "adapter_rank": 64,
        "use_shared_attention_adapter": True,
        "chunk_size": 32,
    },
}


def write_tokenizer(directory: Path) -> None:
    """A tokenizer of single bytes, with an end and a padding token at 0 and 1."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<|end|>", "<|pad|>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|end|>", eos_token="<|end|>", pad_token="<|pad|>", model_max_length=256
    ).save_pretrained(directory)


def make_config(name: str):
    """The configuration of a small model of that architecture."""
    from transformers import CONFIG_MAPPING

    marks = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    arguments = {**marks, **ARCHITECTURES[name]}
    if "text_config" in arguments:
        arguments["text_config"] = {**marks, **arguments["text_config"]}
    return CONFIG_MAPPING[name](**arguments)


def write_model(directory: Path, name: str, *, seed: int = 0) -> None:
    """Writes a random checkpoint with its tokenizer, in float32 and in the class that the architecture has, whole."""
    import torch
    from transformers import AutoModelForSeq2SeqLM

    from qlora_cli.core.models.structure import model_class

    config = make_config(name)
    built = AutoModelForSeq2SeqLM if config.is_encoder_decoder else model_class(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = (getattr(built, "from_config", None) or built._from_config)(config).float()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0, 0.1)
                elif parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.02)
    model.save_pretrained(directory)
    write_tokenizer(directory)
