"""Files of a merged checkpoint beside its weights: configuration, tokenizer, generation settings, index, own code."""

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import nn
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from qlora_cli.artifacts import (
    CHAT_TEMPLATE,
    FORMAT,
    MERGE_RECORD,
    TEMPLATES,
    find_run_record,
    own_code,
    tokenizer_files,
    write_json,
)
from qlora_cli.core.device import dtype_name
from qlora_cli.core.merge.base import Base
from qlora_cli.core.merge.plan import MergeOptions, MergePlan
from qlora_cli.core.models.files import (
    TOKENIZER_CONFIG,
    ModelFiles,
    are_same_tokenizer,
    copy_files,
    files_beside,
    has_tokenizer,
    tokenizer_content,
)
from qlora_cli.core.models.hub import OLD_CHAT_TEMPLATE, PROCESSOR_FILES
from qlora_cli.core.models.structure import head_names, tower_names
from qlora_cli.core.rope_scaling import write_scaling
from qlora_cli.core.storage.safetensors_file import INDEX_FILE, SINGLE_FILE, TensorFile
from qlora_cli.errors import ModelError
from qlora_cli.events import Caution, Report

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
MARKS = ("bos_token_id", "eos_token_id", "pad_token_id")  # of a configuration, that are of answering


def write_config(directory: Path, base: Base, plan: MergePlan, options: MergeOptions) -> None:
    """Writes the base's config.json with what the merge changed; every other line stays as the base has it.

    A 4-bit checkpoint gets the quantization_config with which transformers loads it by itself.

    Raises:
        ModelError: The base's cannot be read.
    """
    path = base.files.directory / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}.") from error
    config.pop("_name_or_path", None)  # a path on the machine that wrote it
    language = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    for section in [config] if language is config else [config, language]:
        section.pop("quantization_config", None)
        for name in {"dtype", "torch_dtype"} & set(section):
            section[name] = dtype_name(options.dtype)
        if plan.vocabulary is not None and ("vocab_size" in section or section is config):
            section["vocab_size"] = plan.vocabulary
        if plan.untied:  # in both: transformers 4 reads the inner one, and without one there ties
            section["tie_word_embeddings"] = False
    language.update(base.new_settings)
    if (scaling := base.files.scaled_positions) is not None:
        write_scaling(language, scaling)
    if "torch_dtype" not in config:
        config["dtype"] = dtype_name(options.dtype)
    if options.pack:
        heads = set(head_names(base.model))
        packed = {name.removesuffix(".weight") for name in (*base.packed, *base.shared)}
        linears = {name for name, part in base.model.named_modules() if isinstance(part, nn.Linear | Conv1D)}
        config["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=options.quantization.quant_type,
            bnb_4bit_use_double_quant=options.quantization.double_quant,
            bnb_4bit_compute_dtype=options.dtype,
            llm_int8_skip_modules=[*sorted(heads), *tower_names(base.model), *sorted(linears - heads - packed)],
        ).to_dict()
    write_json(directory / CONFIG, config)


def find_tokenizer(base: ModelFiles, adapter: Path, vocabulary: int, report: Report) -> dict[Path, list[Path]]:
    """The files of the tokenizer that a merged model gets, by the directory they are in: the adapter's only where it is
    another one than the base's, and of one with another chat template alone that.

    What transformers 5 saves of a tokenizer says the same in other words, with which transformers 4, and whatever is built
    on it, fails (`extra_special_tokens` in a list, `TokenizersBackend`), and lacks files that others read.

    One of the adapter's that has tokens past the `vocabulary`, of which the merged model has embeddings, is reported.

    Raises:
        ModelError: The adapter's cannot be read, or is a link to elsewhere.
    """
    own = {base.directory: tokenizer_files(base.directory)}
    if not has_tokenizer(adapter):
        return own
    beside = files_beside(base, adapter)
    if are_same_tokenizer(adapter, base.directory):
        return own
    theirs = {adapter: tokenizer_files(adapter)}
    highest = max(beside.tokenizer.get_vocab().values(), default=0)
    if highest >= vocabulary:
        text = f"The tokenizer in {adapter} has tokens up to {highest:,}, and the merged model has embeddings for {vocabulary:,}"
        report(Caution(f"{text}: whoever reads a text with one past them fails, as theirs are not in the adapter."))
    *trained, template = tokenizer_content(beside.tokenizer)
    try:
        *original, template_before = tokenizer_content(base.tokenizer)
    except ModelError:
        return theirs
    if trained == original and template == template_before:
        return own
    if trained != original or not (adapter / CHAT_TEMPLATE).is_file():
        return theirs
    parts = {adapter: True, base.directory: False}
    return {of: [p for p in (own | theirs)[of] if (p.suffix == ".jinja") == wanted] for of, wanted in parts.items()}


def copy_checkpoint_files(base: Path, tokenizer: Mapping[Path, list[Path]], adapter: Path, directory: Path) -> None:
    """Copies the tokenizer that `find_tokenizer` found with its chat templates, and the base's generation config,
    processors of images and sound, and own code.

    transformers saves `tokenizer.json` alone. The SentencePiece model that the base has it from comes along all the same:
    llama.cpp's converter reads gemma's, phi3's and others' tokens from nothing else.

    How prompts were formatted in training is recorded too, so that `generate --model` formats them so.
    """
    taken = {path.name for paths in tokenizer.values() for path in paths}
    own_template = adapter / CHAT_TEMPLATE in tokenizer.get(adapter, ())
    beside = {path for name in (GENERATION_CONFIG, *PROCESSOR_FILES) for path in base.glob(name) if path.is_file()}
    beside |= {*own_code(base), *(path for path in tokenizer_files(base) if path.suffix == ".model")}
    for source, paths in tokenizer.items():
        copy_files(paths, source, directory)
    copy_files([path for path in beside if path.name not in taken], base, directory)
    if own_template:
        name_no_template(directory)  # the base's
    write_json(directory / MERGE_RECORD, {"format": FORMAT, "formatting": find_run_record(adapter).get("formatting")})


def write_chat_template(directory: Path, template: str) -> None:
    """Gives the tokenizer in a directory a chat template in place of those that it has."""
    shutil.rmtree(directory / TEMPLATES, ignore_errors=True)
    (directory / CHAT_TEMPLATE).write_text(template, encoding="utf-8")
    name_no_template(directory)


def name_no_template(directory: Path) -> None:
    """Takes away the templates that some prefer to the file beside them: a processor's, and that in a tokenizer's settings,
    which llama.cpp's converter reads."""
    (directory / OLD_CHAT_TEMPLATE).unlink(missing_ok=True)
    if (directory / TOKENIZER_CONFIG).is_file():
        settings = json.loads((directory / TOKENIZER_CONFIG).read_text(encoding="utf-8"))
        if settings.pop("chat_template", None) is not None:
            write_json(directory / TOKENIZER_CONFIG, settings)


def add_end_marks(directory: Path, closing: Iterable[int]) -> None:
    """Has answers of the merged model end, whoever makes them, at what closed them in training too: transformers and vLLM
    go by generation_config.json, and that of a base no conversation was trained on has its end of text alone.

    Args:
        directory: Of the merged model.
        closing: Tokens (`requests.closing_ids`).
    """
    path = directory / GENERATION_CONFIG
    source = path if path.is_file() else directory / CONFIG  # by which transformers makes itself one
    content = json.loads(source.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        return
    if source is not path:
        language = content["text_config"] if isinstance(content.get("text_config"), dict) else content
        marks = {name: language.get(name, content.get(name)) for name in MARKS}
        content = {name: mark for name, mark in marks.items() if mark is not None}
    found = content.get("eos_token_id")
    known = found if isinstance(found, list) else [found] if found is not None else []
    if missing := sorted(set(closing) - {mark for mark in known if isinstance(mark, int)}):
        ends = [*known, *missing]
        content.pop("_from_model_config", None)  # by which transformers 4 may take the configuration's marks instead
        write_json(path, {**content, "eos_token_id": ends if len(ends) > 1 else ends[0]})


def write_index(directory: Path, names: list[str]) -> None:
    """Writes the index of a checkpoint, by which transformers finds its files; a single one of the usual name needs none.

    A base in one file may have it under a shard's name, `model-00001-of-00001.safetensors`.
    """
    if names == [SINGLE_FILE]:
        return
    weight_map, total_bytes, parameters = {}, 0, 0
    for name in names:
        with TensorFile(directory / name) as file:
            for entry in file.entries.values():
                weight_map[entry.name] = name
                total_bytes += entry.total_bytes
                parameters += entry.elements
    metadata = {"total_parameters": parameters, "total_size": total_bytes}
    write_json(directory / INDEX_FILE, {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))})
