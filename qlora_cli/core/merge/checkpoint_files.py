"""Files of a merged checkpoint beside its weights: configuration, tokenizer, generation settings, index, own code."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from qlora_cli.artifacts import FORMAT, MERGE_RECORD, find_run_record, write_json
from qlora_cli.config import QuantizationSettings
from qlora_cli.core.device import dtype_name
from qlora_cli.core.models.files import TOKENIZER_FILES
from qlora_cli.core.storage.safetensors_file import INDEX_FILE, TensorFile
from qlora_cli.errors import ModelError

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
# Files that only a tokenizer has: an adapter saved without one may still hold a stray chat template.
TOKENIZER_SIGNS = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def write_config(
    base: Path,
    directory: Path,
    *,
    dtype: torch.dtype,
    vocabulary: int | None,
    untied: bool,
    quantization: Mapping[str, Any] | None,
) -> None:
    """Writes the base's config.json with what the merge changed; every other line stays as the base has it.

    Args:
        base: Where it is.
        directory: Of the merged checkpoint.
        dtype: Of the merged weights.
        vocabulary: New number of embedding rows, or None.
        untied: Whether head and input embeddings are two tensors now.
        quantization: quantization_config of a 4-bit checkpoint, or None.

    Raises:
        ModelError: The base's cannot be read.
    """
    try:
        config = json.loads((base / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{base / CONFIG} cannot be read: {error}.") from error
    config.pop("quantization_config", None)
    config.pop("_name_or_path", None)  # a path on the machine that wrote it
    text_config = config.get("text_config")
    for section in [config, text_config] if isinstance(text_config, dict) else [config]:
        for name in {"dtype", "torch_dtype"} & set(section):
            section[name] = dtype_name(dtype)
        if vocabulary is not None and ("vocab_size" in section or section is config):
            section["vocab_size"] = vocabulary
        if untied and (section.get("tie_word_embeddings") is not None or section is config):
            section["tie_word_embeddings"] = False
    if "torch_dtype" not in config:
        config["dtype"] = dtype_name(dtype)
    if quantization is not None:
        config["quantization_config"] = dict(quantization)
    write_json(directory / CONFIG, config)


def four_bit_config(quantization: QuantizationSettings, dtype: torch.dtype, *, skipped: list[str]) -> dict[str, Any]:
    """The quantization_config with which transformers loads a 4-bit checkpoint by itself."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.quant_type,
        bnb_4bit_use_double_quant=quantization.double_quant,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=skipped,
    ).to_dict()


def copy_checkpoint_files(base: Path, adapter: Path, directory: Path) -> None:
    """Copies the tokenizer (the adapter's, else the base's) with its chat template, generation config and own code.

    How prompts were formatted in training is recorded too, so that `generate --model` formats them so.
    """
    trained = any((adapter / name).is_file() for name in TOKENIZER_SIGNS)
    for pattern in TOKENIZER_FILES:
        for path in (adapter if trained else base).glob(pattern):
            if path.is_file():
                shutil.copyfile(path, directory / path.name)
    for path in [base / GENERATION_CONFIG, *base.glob("*.py")]:  # *.py: of a model that comes with its code
        if path.is_file():
            shutil.copyfile(path, directory / path.name)
    write_json(directory / MERGE_RECORD, {"format": FORMAT, "formatting": find_run_record(adapter).get("formatting")})


def write_index(directory: Path, names: list[str]) -> None:
    """Writes the index of a checkpoint in several files, as transformers does."""
    weight_map, total_bytes, parameters = {}, 0, 0
    for name in names:
        with TensorFile(directory / name) as file:
            for entry in file.entries.values():
                weight_map[entry.name] = name
                total_bytes += entry.total_bytes
                parameters += entry.elements
    metadata = {"total_parameters": parameters, "total_size": total_bytes}
    write_json(directory / INDEX_FILE, {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))})
