"""Mixtures of experts at their real sizes through `qlora train` on one card: peak memory, speed, and what was predicted.

    python benchmarks/experts_memory.py --json experts.json [--model qwen3-30b-a3b]

Each checkpoint is written as it is released: Qwen3-30B-A3B and Mixtral-8x7B with a bfloat16 matrix for every expert,
gpt-oss-20b with MXFP4 blocks; one shard a layer. Experts of the first two are holes in sparse files, which read as zeros:
memory does not depend on values, and the disk holds neither. Everything else, routers too, is random. On the CPU
`--model tiny` shows that it runs.
"""

import argparse
import json
import math
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.models import write_rows, write_tokenizer

# name → (configuration class, arguments, layout on disk, memory a peer trains it in)
MODELS = {
    "qwen3-30b-a3b": (
        "Qwen3MoeConfig",
        {
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "moe_intermediate_size": 768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "max_position_embeddings": 40960,
            "tie_word_embeddings": False,
        },
        "gated",
        "21.7GiB",
    ),
    "gpt-oss-20b": (
        "GptOssConfig",
        {
            "vocab_size": 201088,
            "hidden_size": 2880,
            "intermediate_size": 2880,
            "num_hidden_layers": 24,
            "num_local_experts": 32,
            "num_experts_per_tok": 4,
            "tie_word_embeddings": False,
        },
        "mxfp4",
        "14.7GiB",
    ),
    "mixtral-8x7b": (
        "MixtralConfig",
        {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "max_position_embeddings": 32768,
            "tie_word_embeddings": False,
        },
        "mixtral",
        "32GiB",
    ),
    "tiny": (
        "Qwen3MoeConfig",
        {
            "vocab_size": 1024,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "moe_intermediate_size": 96,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "max_position_embeddings": 512,
            "tie_word_embeddings": False,
        },
        "gated",
        "4GiB",
    ),
    "tiny-oss": (
        "GptOssConfig",
        {
            "vocab_size": 1024,
            "hidden_size": 128,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "tie_word_embeddings": False,
        },
        "mxfp4",
        "4GiB",
    ),
}
NAMES = {"F32": "float32", "BF16": "bfloat16", "U8": "uint8"}


def on_disk(name: str, shape: tuple[int, ...], layout: str) -> dict[str, tuple[str, tuple[int, ...], bool]]:
    """Tensors that a parameter is stored as: name → (dtype, shape, whether it is a hole)."""
    if ".experts." not in name or name.endswith("_bias"):
        return {name: ("BF16", shape, False)}
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


def write_shard(path: Path, tensors: dict[str, tuple[str, tuple[int, ...], bool]], generator) -> int:
    """One safetensors file, holes where they are asked for. Bytes that its tensors have."""
    import torch

    header, offset = {}, 0
    for name, (dtype, shape, _) in tensors.items():
        size = math.prod(shape) * getattr(torch, NAMES[dtype]).itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
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
                values = (torch.randn(shape, generator=generator) * 0.02).to(torch.bfloat16)
            file.seek(8 + len(text) + header[name]["data_offsets"][0])
            file.write(values.view(torch.uint8).numpy().tobytes())
    return offset


def write_checkpoint(name: str, directory: Path) -> int:
    """The checkpoint of a model, one shard a layer. Bytes it claims to have."""
    import torch
    import transformers

    kind, arguments, layout, _ = MODELS[name]
    config = getattr(transformers, kind)(**arguments, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    config.dtype = torch.bfloat16
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    shards: dict[str, dict] = {}
    for parameter, value in model.named_parameters():
        shard = parameter.split(".")[2] if ".layers." in f".{parameter}" else "rest"
        shards.setdefault(shard, {}).update(on_disk(parameter, tuple(value.shape), layout))
    directory.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    total, index = 0, {}
    for shard, tensors in shards.items():
        file = f"model-{shard}.safetensors"
        total += write_shard(directory / file, tensors, generator)
        index |= dict.fromkeys(tensors, file)
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    )
    written = {**json.loads(config.to_json_string(use_diff=False)), "architectures": [type(model).__name__]}
    if layout == "mxfp4":
        kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
        written["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": kept}
    (directory / "config.json").write_text(json.dumps(written))
    write_tokenizer(directory, arguments["vocab_size"])
    return total


def run_qlora(arguments: list[str], timeout: float) -> tuple[int, str, str]:
    """A command of ours: exit code, what it printed, and what it said."""
    root = str(Path(__file__).resolve().parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "qlora_cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout)
    return done.returncode, done.stdout, done.stderr


def measure(name: str, work: Path, *, row_tokens: int, rows: int, steps: int, vram: str, timeout: float) -> dict:
    """Trains with all linear layers adapted and recomputation, within `vram`; and the prediction for the same."""
    model, output = work / name, work / f"{name}-out"
    started = time.perf_counter()
    size = write_checkpoint(name, model)
    facts: dict = {"model": name, "checkpoint_bytes": size, "write_seconds": time.perf_counter() - started}
    data = write_rows("fixed", work / "rows.jsonl", rows=rows * steps, vocab_size=1000, max_length=row_tokens - 1)
    step = [
        "--max-length",
        str(row_tokens),
        "--batch-size",
        str(rows),
        "--vram",
        vram,
        "--gradient-checkpointing",
        "on",
    ]
    code, out, said = run_qlora(["inspect", "--model", str(model), *step, "--json"], timeout)
    facts["predicted"] = json.loads(out) if out.strip().startswith("{") else said[-2000:]
    started = time.perf_counter()
    train = ["train", "--model", str(model), "--data", str(data), "--output", str(output), *step, "--no-cache"]
    train += [
        "--max-steps",
        str(steps),
        "--gradient-accumulation-steps",
        "1",
        "--save-every",
        "1000",
        "--init",
        "default",
    ]
    try:
        code, out, said = run_qlora(train, timeout)
    except subprocess.TimeoutExpired as error:
        return {**facts, "failed": f"not done after {timeout:.0f} s", "said": str(error.stderr)[-3000:]}
    facts |= {"exit_code": code, "train_seconds": time.perf_counter() - started, "said": said[-4000:]}
    if code == 0:
        lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        last = lines[steps // 2 :]
        seconds = sorted(line["step_seconds"] for line in last)[len(last) // 2]
        facts["peak_gib"] = max(line["peak_vram_bytes"] or 0 for line in lines) / 2**30
        facts["tokens_per_second"] = rows * row_tokens / seconds
        facts["losses"] = [line["loss"] for line in lines]
    shutil.rmtree(model)
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=list(MODELS))
    parser.add_argument("--row-tokens", type=int, default=2048)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--vram", help="instead of what a peer trains the model in")
    parser.add_argument("--timeout", type=float, default=500, help="seconds for each command")
    parser.add_argument("--work", type=Path, help="where checkpoints are written")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        for name in arguments.model or ["qwen3-30b-a3b", "gpt-oss-20b", "mixtral-8x7b"]:
            found = measure(
                name,
                Path(folder),
                row_tokens=arguments.row_tokens,
                rows=arguments.rows,
                steps=arguments.steps,
                vram=arguments.vram or MODELS[name][3],
                timeout=arguments.timeout,
            )
            results.append(found)
            predicted = found["predicted"]
            training = predicted.get("training", {}) if isinstance(predicted, dict) else predicted
            print(json.dumps({k: v for k, v in found.items() if k not in ("predicted", "said")}), flush=True)
            print(f"predicted: {training}\n{found.get('said', '')}", flush=True)
            if arguments.json:
                arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
