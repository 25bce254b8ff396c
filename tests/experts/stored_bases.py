"""Checkpoints stored quantised, made of plain ones: bitsandbytes' 4 bits, block-scaled FP8, MXFP4."""

import json
import shutil

import torch
from safetensors.torch import load_file, save_file

from qlora_cli.core.bnb import bitsandbytes as bnb

LUT = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])


def _rewrite(directory, stored, tensors, quantization):
    shutil.copytree(directory, stored)
    save_file({k: v.contiguous() for k, v in tensors.items()}, stored / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((stored / "config.json").read_text())
    (stored / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))


def store_in_fp8(directory, stored, block=128):
    """Every `*proj*.weight` as float8 with a scale a block; gives their values, fp32."""
    tensors, values = {}, {}
    for name, weight in load_file(directory / "model.safetensors").items():
        if "proj" not in name or weight.ndim != 2:
            tensors[name] = weight.bfloat16()
            continue
        grid = [range(0, size, block) for size in weight.shape]
        scales = torch.zeros(len(grid[0]), len(grid[1]))
        codes = torch.zeros_like(weight, dtype=torch.float8_e4m3fn)
        values[name] = torch.zeros_like(weight)
        for i, row in enumerate(grid[0]):
            for j, column in enumerate(grid[1]):
                part = weight[row : row + block, column : column + block]
                scales[i, j] = part.abs().max() / 448
                codes[row : row + block, column : column + block] = (part / scales[i, j]).to(torch.float8_e4m3fn)
                read = codes[row : row + block, column : column + block].float()
                values[name][row : row + block, column : column + block] = read * scales[i, j]
        tensors |= {name: codes, f"{name}_scale_inv": scales}
    settings = {"fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [block, block]}
    _rewrite(directory, stored, tensors, {"quant_method": "fp8", **settings})
    return values


def store_in_mxfp4(directory, stored):
    """The experts of gpt_oss as it is released; gives their values as the model has them, bf16."""
    tensors, values = {}, {}
    for name, weight in load_file(directory / "model.safetensors").items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            tensors[name] = weight.bfloat16()
            continue
        rows = weight.transpose(1, 2).float()  # (experts, out, in)
        parts = rows.reshape(*rows.shape[:2], rows.shape[2] // 32, 32)
        exponent = torch.floor(torch.log2(parts.abs().amax(-1).clamp(min=2**-100))) - 2
        codes = ((parts / 2 ** exponent[..., None])[..., None] - LUT).abs().argmin(-1).to(torch.uint8)
        tensors[f"{name}_blocks"] = codes[..., 0::2] | codes[..., 1::2] << 4
        tensors[f"{name}_scales"] = (exponent + 127).to(torch.uint8)
        read = (LUT[codes.int()] * 2 ** exponent[..., None]).reshape(rows.shape)
        values[name] = read.transpose(1, 2).bfloat16()
    _rewrite(directory, stored, tensors, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    return values


def store_in_4_bits(directory, stored, skipped=("model.layers.0.self_attn",)):
    """Every linear layer but those skipped as bitsandbytes stores it; gives their values."""
    tensors, values = {}, {}
    for name, weight in load_file(directory / "model.safetensors").items():
        if not name.endswith("proj.weight") or name.startswith(tuple(skipped)):
            tensors[name] = weight
            continue
        codes, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        tensors |= {name: codes, **{f"{name}.{end}": part for end, part in state.as_dict(packed=True).items()}}
        values[name] = bnb.functional.dequantize_4bit(codes, state)
    settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    skip = {"llm_int8_skip_modules": [*skipped, "lm_head"]}
    _rewrite(directory, stored, tensors, {"quant_method": "bitsandbytes", **settings, **skip})
    return values
