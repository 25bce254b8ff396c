"""Checkpoint of a model at its real size that is written fast, one shard a layer: experts are holes in sparse files.

    python -m support.hollow_checkpoint ARCHITECTURE DIRECTORY       # in benchmarks/

Holes read as zeros: memory and speed do not depend on the experts' values, and the disk holds none of the 61 GB. All else,
routers too, is random, so that tokens go to all experts (`models.routed_scale`). A dense model has no holes, as a card multiplies zeros faster than
numbers: a large tensor repeats a smaller random one.
"""

import json
import math
import shutil
import struct
from pathlib import Path

from support.models import make_config, routed_scale, write_tokenizer

BLOCK = 2**22 + 15  # random values of a tensor, which are then repeated: in no multiple of a row
NAMES = {"F32": "float32", "BF16": "bfloat16", "U8": "uint8"}
# architecture of models.py → how its experts are stored
LAYOUTS = {
    "qwen3-30b-a3b": "gated",
    "qwen3-30b-a3b-quarter": "gated",
    "gpt-oss-20b": "fused",
    "llama-7b": "dense",
    "llama3-8b": "dense",
    "qwen3-8b": "dense",
    "mistral-7b": "dense",
    "gemma2-9b": "dense",
    "tiny-moe": "gated",
    "tiny-oss": "fused",
}


def on_disk(name: str, shape: tuple[int, ...], layout: str) -> dict[str, tuple[str, tuple[int, ...], bool]]:
    """Tensors that a parameter is stored as: name → (dtype, shape, whether it is a hole).

    Args:
        name: Of the parameter in the model.
        shape: Of the parameter.
        layout: "dense" and "fused" as in the model, "gated" and "mixtral" with a matrix for each expert, "mxfp4" in blocks.
    """
    if ".experts." not in name or name.endswith("_bias"):
        return {name: ("BF16", shape, False)}
    if layout == "fused":
        return {name: ("BF16", shape, True)}
    stem, _, kind = name.rpartition(".")
    experts, rows, columns = shape
    if layout == "mxfp4":  # blocks run along the input, which the model keeps in the middle
        blocks = (experts, columns, rows // 32)
        return {f"{name}_blocks": ("U8", (*blocks, 16), False), f"{name}_scales": ("U8", blocks, False)}
    if layout == "mixtral":
        stem = stem.replace(".mlp.", ".block_sparse_moe.")
        parts = ("w1", "w3") if kind == "gate_up_proj" else ("w2",)
    else:
        parts = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
    each = (rows // len(parts), columns)
    return {f"{stem}.{e}.{part}.weight": ("BF16", each, True) for e in range(experts) for part in parts}


def write_shard(path: Path, tensors: dict[str, tuple[str, tuple[int, ...], bool]], generator, routed: bool) -> int:
    """One safetensors file, holes where they are asked for. Bytes that its tensors have.

    Args:
        routed: Whether it is of a mixture, whose tokens are to go to all experts.
    """
    import torch

    header, offset = {}, 0
    for name, (dtype, shape, _) in tensors.items():
        size = math.prod(shape) * getattr(torch, NAMES[dtype]).itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)
        for name, (dtype, shape, hole) in tensors.items():
            if hole:
                continue
            if name.endswith("_scales"):
                values = torch.full(shape, 120, dtype=torch.uint8)  # 2 ** -7
            elif dtype == "U8":
                block = torch.randint(0, 256, (2**24,), dtype=torch.uint8, generator=generator)
                values = block.repeat(-(-math.prod(shape) // len(block)))[: math.prod(shape)]
            elif "norm" in name:
                values = torch.ones(shape, dtype=torch.bfloat16)
            else:
                values = random_values(shape, generator) * (routed_scale(name) if routed else 1.0)
            file.seek(8 + len(text) + header[name]["data_offsets"][0])
            file.write(values.contiguous().view(torch.uint8).numpy().data)
    return offset


def random_values(shape: tuple[int, ...], generator):
    """bf16 of deviation 0.02; a large tensor is one random block again and again, which begins anywhere in a row."""
    import torch

    size = math.prod(shape)
    block = (torch.randn(min(size, BLOCK), generator=generator) * 0.02).to(torch.bfloat16)
    return block.repeat(-(-size // BLOCK))[:size].view(shape) if size > BLOCK else block.view(shape)


def write_hollow_checkpoint(config, directory: Path, layout: str) -> int:
    """The checkpoint of a configuration, and a small tokenizer, anew. Bytes it claims to have."""
    import torch
    import transformers

    config.dtype, config.pad_token_id = torch.bfloat16, 0
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    shards: dict[str, dict] = {}
    for parameter, value in model.named_parameters():
        shard = parameter.split(".")[2] if ".layers." in f".{parameter}" else "rest"
        shards.setdefault(shard, {}).update(on_disk(parameter, tuple(value.shape), layout))
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    total, index = 0, {}
    for shard, tensors in shards.items():
        file = f"model-{shard}.safetensors"
        total += write_shard(directory / file, tensors, generator, layout != "dense")
        index |= dict.fromkeys(tensors, file)
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    )
    written = {**json.loads(config.to_json_string(use_diff=False)), "architectures": [type(model).__name__]}
    if layout == "mxfp4":
        kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
        written["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": kept}
    (directory / "config.json").write_text(json.dumps(written))
    write_tokenizer(directory, config.vocab_size)  # the last file
    return total


if __name__ == "__main__":
    import sys

    write_hollow_checkpoint(make_config(sys.argv[1]), Path(sys.argv[2]), LAYOUTS[sys.argv[1]])
