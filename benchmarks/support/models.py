"""Random models of the real architectures, as checkpoints or built in 4 bits, and rows of real lengths.

Weights are random (normal, 0.02): speed and memory do not depend on them, and no download is needed.
"""

import json
import shutil
from pathlib import Path

CONFIGS = {
    "llama-7b": (
        "LlamaConfig",
        {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "intermediate_size": 11008,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
        },
    ),
    "llama3-8b": (
        "LlamaConfig",
        {
            "vocab_size": 128256,
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "intermediate_size": 14336,
            "max_position_embeddings": 2**20,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
            "tie_word_embeddings": False,
        },
    ),
    "smollm2-135m": (
        "LlamaConfig",
        {
            "vocab_size": 49152,
            "hidden_size": 576,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "intermediate_size": 1536,
            "max_position_embeddings": 8192,
            "rope_theta": 100000.0,
            "tie_word_embeddings": True,
        },
    ),
    "neox-20b": (
        "GPTNeoXConfig",
        {
            "vocab_size": 50432,
            "hidden_size": 6144,
            "num_hidden_layers": 44,
            "num_attention_heads": 64,
            "intermediate_size": 24576,
            "rotary_pct": 0.25,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": False,
        },
    ),
    "pythia-410m": (
        "GPTNeoXConfig",
        {
            "vocab_size": 50304,
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "intermediate_size": 4096,
            "rotary_pct": 0.25,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": False,
        },
    ),
    "falcon-7b": (
        "FalconConfig",
        {
            "vocab_size": 65024,
            "hidden_size": 4544,
            "num_hidden_layers": 32,
            "num_attention_heads": 71,
            "multi_query": True,
            "parallel_attn": True,
            "bias": False,
            "alibi": False,
            "new_decoder_architecture": False,
        },
    ),
    "gemma2-9b": (
        "Gemma2Config",
        {
            "vocab_size": 256000,
            "hidden_size": 3584,
            "num_hidden_layers": 42,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 256,
            "query_pre_attn_scalar": 256,
            "intermediate_size": 14336,
            "sliding_window": 4096,
            "max_position_embeddings": 8192,
        },
    ),
    "qwen3-30b-a3b": (
        "Qwen3MoeConfig",
        {
            "vocab_size": 151936,
            "hidden_size": 2048,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "max_position_embeddings": 40960,
            "tie_word_embeddings": False,
        },
    ),
    "qwen3.5-9b": ("Qwen3_5TextConfig", {"num_hidden_layers": 32, "vocab_size": 248320}),
    "small-moe": (
        "Qwen3MoeConfig",
        {
            "vocab_size": 1024,
            "hidden_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "intermediate_size": 1024,
            "moe_intermediate_size": 256,
            "num_experts": 32,
            "num_experts_per_tok": 4,
            "norm_topk_prob": True,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": False,
        },
    ),
    "gpt-oss-20b": ("GptOssConfig", {"num_hidden_layers": 24, "num_local_experts": 32, "vocab_size": 201088}),
    "llama-70b": (
        "LlamaConfig",
        {
            "vocab_size": 32000,
            "hidden_size": 8192,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "intermediate_size": 28672,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
        },
    ),
    "qwen3-8b": (
        "Qwen3Config",
        {
            "vocab_size": 151936,
            "hidden_size": 4096,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "intermediate_size": 12288,
            "max_position_embeddings": 40960,
            "tie_word_embeddings": False,
        },
    ),
    "mistral-7b": (
        "MistralConfig",
        {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "intermediate_size": 14336,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-5,
            "sliding_window": 4096,
            "tie_word_embeddings": False,
        },
    ),
    "mixtral-8x7b": ("MixtralConfig", {"vocab_size": 32000, "sliding_window": None}),
    "tiny-moe": (
        "Qwen3MoeConfig",
        {
            "vocab_size": 1024,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "moe_intermediate_size": 128,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "max_position_embeddings": 512,
            "tie_word_embeddings": False,
        },
    ),
    "tiny-oss": (
        "GptOssConfig",
        {
            "vocab_size": 1024,
            "hidden_size": 128,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "tie_word_embeddings": False,
        },
    ),
    "tiny-llama": (
        "LlamaConfig",
        {
            "vocab_size": 1024,
            "hidden_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "intermediate_size": 256,
            "max_position_embeddings": 512,
            "tie_word_embeddings": False,
        },
    ),
}
# The same with fewer layers: name → (of which, layers)
for _name, (_whole, _layers) in {
    "neox-20b-half": ("neox-20b", 22),
    "llama3-8b-2-layers": ("llama3-8b", 2),
    "llama3-8b-8-layers": ("llama3-8b", 8),
    "qwen3-30b-a3b-quarter": ("qwen3-30b-a3b", 12),
    "llama-70b-tenth": ("llama-70b", 8),
    "llama-70b-sixth": ("llama-70b", 13),
    "neox-20b-quarter": ("neox-20b", 11),
    "llama-7b-half": ("llama-7b", 16),
    "gemma2-9b-quarter": ("gemma2-9b", 10),
    "mixtral-8x7b-eighth": ("mixtral-8x7b", 4),
    "tiny-llama-half": ("tiny-llama", 1),
}.items():
    CONFIGS[_name] = (CONFIGS[_whole][0], CONFIGS[_whole][1] | {"num_hidden_layers": _layers})

# Arguments of `attach_adapter`.
ALL16 = {"rank": 16, "target_modules": None}
ALL64 = {"rank": 64, "target_modules": None, "dropout": 0.1}
EXPERTS16 = {  # attention and every expert
    "rank": 16,
    "target_modules": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "adapt_experts": True,
    "expert_rank": 16,
}
QKV16 = {"rank": 16, "target_modules": ("query_key_value",)}
QKV8 = {"rank": 8, "target_modules": ("query_key_value",), "dropout": 0.05}


def make_config(name: str):
    """The transformers configuration of a named architecture."""
    import transformers

    kind, arguments = CONFIGS[name]
    return getattr(transformers, kind)(**arguments, bos_token_id=0, eos_token_id=0)


def routed_scale(name: str) -> float:
    """How many times larger a mixture's random parameter is than 0.02's, so that its tokens go to all of its experts.

    A trained router does so. Of a mixture that is random alike, attention soon makes up most of the hidden states, the mean
    of many tokens, and routers send nearly all of them the same way: of Qwen3-30B-A3B's 128 experts 59 are used in the
    second layer and some 27 from the seventh on, with 16 times the mean's rows. With embeddings of 1 and little from
    attention it is all 128, with at most 1.4 times the mean's.
    """
    parts = name.split(".")
    return 50.0 if "embed_tokens" in parts else 0.02 if "o_proj" in parts else 1.0


def build(name: str, device: str):
    """A random base of that architecture, linears and experts in NF4 with double quantisation, frozen as `load_base`
    leaves it."""
    import bitsandbytes
    import torch
    from torch import nn
    from transformers import AutoModelForCausalLM

    from qlora_cli.core.experts.four_bit_experts import pack_experts
    from qlora_cli.core.experts.layout import expert_weights, find_experts
    from qlora_cli.core.experts.stack import pack_matrix
    from qlora_cli.core.models.quantization import freeze_base

    torch.manual_seed(0)
    held = {"quant_type": "nf4", "double_quant": True}
    with torch.device(device), torch.no_grad():
        base = AutoModelForCausalLM.from_config(make_config(name), dtype=torch.bfloat16)
        for full_name, parameter in base.named_parameters() if any(find_experts(base)) else ():
            parameter.mul_(routed_scale(full_name))
    for full_name, module in list(base.named_modules()):
        if not isinstance(module, nn.Linear) or module is base.get_output_embeddings():
            continue
        with torch.device("meta"):
            linear = bitsandbytes.nn.Linear4bit(
                module.in_features,
                module.out_features,
                bias=module.bias is not None,
                compute_dtype=torch.bfloat16,
                compress_statistics=True,
                quant_type="nf4",
            )
        linear.weight = bitsandbytes.nn.Params4bit(
            module.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4", module=linear
        ).to(device)
        linear.bias = module.bias
        base.set_submodule(full_name, linear)
        module.weight = None
    for _, module in list(find_experts(base)):
        stacks = {weight.name: weight.as_matrix(getattr(module, weight.name).data) for weight in expert_weights(module)}
        packed = pack_experts(module, compute_dtype=torch.bfloat16, device=torch.device(device), **held)
        for stack_name in list(stacks):
            for number, matrix in enumerate(stacks.pop(stack_name)):
                packed.put_experts(stack_name, number, pack_matrix(matrix, **held))
    return freeze_base(base)


def write_checkpoint(name: str, directory: Path, dtype: str = "bfloat16") -> Path:
    """A random 16-bit checkpoint with a small tokenizer, written once."""
    import torch
    from transformers import AutoModelForCausalLM

    if (directory / "tokenizer.json").is_file():
        return directory
    shutil.rmtree(directory, ignore_errors=True)
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(make_config(name), dtype=getattr(torch, dtype))
    model.save_pretrained(directory, max_shard_size="4GB")
    del model
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    write_tokenizer(directory, CONFIGS[name][1]["vocab_size"])
    return directory


def write_tokenizer(directory: Path, vocab_size: int) -> None:
    """A byte-level tokenizer filled up to `vocab_size`; the rows below are token ids already."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|endoftext|>": 0, **{character: i + 1 for i, character in enumerate(alphabet)}}
    vocabulary |= {f"<{i}>": i for i in range(len(vocabulary), vocab_size)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # Some peers refuse a tokenizer without a padding token.
    special = {"eos_token": "<|endoftext|>", "pad_token": f"<{vocab_size - 1}>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(directory)


def write_rows(kind: str, path: Path, *, rows: int, vocab_size: int, max_length: int = 2048) -> Path:
    """JSON Lines of `input_ids`: `fixed` rows of max_length, `quotes` of 12 to 80, `gsm8k` of that set's lengths.

    The GSM8K lengths (question and answer, GPT-NeoX tokenizer) are drawn from the measured quantiles, so that the
    benchmark needs no data set.
    """
    import random

    rng = random.Random(0)
    # 0, 10, ... 100 % quantiles of the 7,473 training rows' token counts
    gsm8k = [49, 90, 104, 116, 129, 142, 157, 174, 195, 230, 442]
    with path.open("w") as stream:
        for _ in range(rows):
            if kind == "fixed":
                length = max_length
            elif kind == "quotes":
                length = rng.randrange(12, 80)
            else:
                part = rng.random() * 10
                low, high = gsm8k[int(part)], gsm8k[int(part) + 1]
                length = int(low + (part % 1) * (high - low))
            ids = [rng.randrange(5, vocab_size) for _ in range(length)]
            stream.write(json.dumps({"input_ids": ids}) + "\n")
    return path


if __name__ == "__main__":
    import sys

    write_checkpoint(sys.argv[1], Path(sys.argv[2]))
