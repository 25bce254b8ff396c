"""Files of one model: found or downloaded once a command, then its configuration, tokenizer, weights and identity."""

import copy
import hashlib
import json
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from qlora_cli.artifacts import CHAT_TEMPLATE, TOKENIZER_FILES, TOKENIZER_SIGNS, own_code, tokenizer_files
from qlora_cli.core.models.hub import (
    OLD_CHAT_TEMPLATE,
    READ_FILES,
    check_blobs,
    download_snapshot,
    find_directory,
)
from qlora_cli.core.models.identity import BaseIdentity, config_digest, weights_digest
from qlora_cli.core.rope_scaling import growth, scale_positions, scaling_of
from qlora_cli.core.storage.content_digest import content_digests
from qlora_cli.core.untrusted import check_files, read_foreign_json, refuse_links
from qlora_cli.errors import ModelError, UsageError, first_line
from qlora_cli.events import Caution, Notice, Report, report_nothing
from qlora_cli.settings.groups import QuantizationSettings

if TYPE_CHECKING:
    import torch

TOKENIZER_CONFIG = "tokenizer_config.json"
WEIGHT_FILES = ["*.safetensors", "*.safetensors.index.json"]
# What configurations call the most tokens of a row: most of them; GPT-2 and its kin; MPT; Bloom and the first GLMs.
CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
STORED_DTYPES = ("bfloat16", "float16", "float32", "float64")  # that a configuration may say weights are in


@dataclass(frozen=True)
class ModelFiles:
    """A model's files, resolved by `resolve_model` once a command and handed on. Each property is read once."""

    name: str  # directory or hub id, as it was given
    directory: Path  # of configuration and tokenizer; `weights` is the same directory, with the weights in it
    commit: str | None  # full hash of a hub model; None for a directory of the user's
    trust_remote_code: bool = False
    report: Report = field(default=report_nothing, repr=False, compare=False)
    rope_scaling: str | None = None  # of its positions, asked for in place of its own

    @cached_property
    def config(self) -> PreTrainedConfig:
        """The configuration: config.json, and the scaling of positions that was asked for.

        Raises:
            ModelError: It is broken, needs code of its own, or is no causal language model.
            UsageError: It does not go with that scaling.
        """
        config = self._read_config()
        if self.rope_scaling is not None:
            self.report(Notice(scale_positions(config, self.rope_scaling, self.name)))
        return config

    @cached_property
    def held_config(self) -> PreTrainedConfig:
        """The configuration as the weights that are here have it, by which memory is counted: one that ties embeddings and
        head of weights that hold two is without that.

        Raises:
            ModelError: As `config`.
        """
        from qlora_cli.core.models.account import holds_own_head  # torch

        sections = (self.config, self.config.get_text_config(decoder=True))
        if not any(getattr(section, "tie_word_embeddings", False) for section in sections):
            return self.config
        if not holds_own_head(self.config, self.directory, trust_remote_code=self.trust_remote_code):
            return self.config
        config = copy.deepcopy(self.config)
        config.tie_word_embeddings = config.get_text_config(decoder=True).tie_word_embeddings = False
        return config

    @property
    def scaled_positions(self) -> dict[str, Any] | None:
        """The scaling of positions that was asked for, as records have it; None where it is the model's own."""
        return None if self.rope_scaling is None else scaling_of(self.config)

    def _read_config(self) -> PreTrainedConfig:
        self._check_dtypes()
        try:
            config = AutoConfig.from_pretrained(self.directory, trust_remote_code=self.trust_remote_code)
            text_config = config.get_text_config(decoder=True)
            if text_config is not config and hasattr(text_config, "quantization_config"):
                # Where some wrappers have it (Kimi K2.5), and transformers does not look: the outer one counts.
                if getattr(config, "quantization_config", None) is None:
                    config.quantization_config = text_config.quantization_config
                del text_config.quantization_config
            return config
        except Exception as error:  # whatever a configuration's own checks come upon
            if "trust_remote_code" in str(error):
                raise ModelError(
                    f"{self.name} needs code that comes with the model, which is not run.",
                    "If you have read it, add --trust-remote-code --model-revision COMMIT.",
                ) from error
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise ModelError(
                f"The configuration of {self.name} cannot be read: {reason}",
                f"Mend {self.directory / 'config.json'}, or download the model again.",
            ) from error

    def _check_dtypes(self) -> None:
        """Raises where config.json names a dtype that weights cannot be in: transformers fails on it anywhere."""
        try:
            content = json.loads((self.directory / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return  # whoever reads it as a configuration says what is wrong
        content = (
            {**content, "quantization_config": None} if isinstance(content, dict) else {}
        )  # with dtypes of its own
        sections = [content, *content.values()]
        for section in (section for section in sections if isinstance(section, dict)):
            for key in ("torch_dtype", "dtype"):
                if section.get(key) not in (None, *STORED_DTYPES):
                    raise ModelError(
                        f"{key} is {section[key]!r} in the config.json of {self.name}, which is no dtype of weights.",
                        f'Write "{key}": "bfloat16" there, or whatever dtype most of its weights are in.',
                    )

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer; where its processor alone has a chat template, as with some models that see pictures, with that.

        Raises:
            ModelError: There is none, or it cannot be read.
        """
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.directory, trust_remote_code=self.trust_remote_code)
            float(tokenizer.model_max_length)  # whose type the library leaves as it found it
            if tokenizer.chat_template is None and (self.directory / OLD_CHAT_TEMPLATE).is_file():
                content = read_foreign_json(self.directory / OLD_CHAT_TEMPLATE)
                template = content.get("chat_template") if isinstance(content, dict) else None
                tokenizer.chat_template = template if isinstance(template, str) else None
        except Exception as error:  # a broken tokenizer file raises whatever the Rust library raises
            raise ModelError(
                f"The tokenizer of {self.name} cannot be read: {first_line(error)}",
                "Check that the tokenizer files are there.",
            ) from error
        return tokenizer

    def check_token(self, token_id: int, vocabulary: int) -> None:
        """Checks that a token of the tokenizer has an embedding in a model with so many.

        Raises:
            ModelError: It has none.
        """
        if token_id >= vocabulary:
            raise ModelError(
                f"The tokenizer of {self.name} makes token {token_id} ({self.tokenizer.decode([token_id])!r}) of this "
                f"text, and the model has embeddings for {vocabulary} tokens.",
                "Use the tokenizer that the model was trained with, or a model whose embeddings were resized for it.",
            )

    @cached_property
    def weights(self) -> Path:
        """The directory once the weights are in it: those of a hub model are downloaded at the first use.

        Raises:
            ModelError: They cannot be downloaded, are not in safetensors, or in a quantised format that is not read, or
                were written to since they were downloaded.
        """
        from qlora_cli.core.weights.stored_formats import stored_format  # here, so that a tokenizer needs no torch

        stored_format(self.config, self.name)  # refuses what could not be read before it is downloaded
        if self.commit is not None:
            download_snapshot(self.name, self.commit, WEIGHT_FILES, kind="model", report=self.report)
            check_blobs([*self.directory.glob("*.safetensors")], self.name, self.report)
        if any(self.directory.glob("*.safetensors")):
            return self.directory
        if any(path.suffix in (".bin", ".pt", ".pth") for path in self.directory.iterdir()):
            raise ModelError(
                f"{self.name} holds pickle weights only, which can run code when they are read.",
                "Give --model a revision with safetensors files, or convert it once in a place you trust.",
            )
        raise ModelError(
            f"{self.name} holds no safetensors weights.", "Check the directory, or download the model again."
        )

    @property
    def is_local(self) -> bool:
        """Whether nothing of the weights is downloaded: the directory is the user's, or the hub's cache has every file."""
        from qlora_cli.core.storage.safetensors_file import list_weight_files  # torch

        try:
            return self.commit is None or bool(list_weight_files(self.directory))
        except ModelError:
            return False

    @property
    def missing_weights(self) -> str | None:
        """Why weights of a directory of the user's cannot be read, which may be planned with and not trained; None where
        their files are all there, or are downloaded."""
        from qlora_cli.core.storage.safetensors_file import list_weight_files  # torch

        try:
            if self.commit is None:
                list_weight_files(self.weights)
        except ModelError as error:
            return error.message
        return None

    @cached_property
    def config_sha256(self) -> str:
        """Digest of the configuration."""
        return config_digest(self.directory)

    @cached_property
    def weights_sha256(self) -> str:
        """Digest of the weights, which are downloaded if need be.

        Raises:
            ModelError: As `weights`, or a file is damaged.
        """
        return weights_digest(self.weights)

    @cached_property
    def content_sha256(self) -> str:
        """Digest of every byte of the weights, which are read once, and anew where they were written to since.

        Raises:
            ModelError: As `weights`, or a file of the hub's cache is not what its name says.
            RunError: A file was written to while it was read.
        """
        paths = sorted(self.weights.glob("*.safetensors"))
        if self.commit is not None:
            check_blobs(paths, self.name, self.report, all_of_them=True)
        digests = content_digests(paths, self.report)
        facts = [f"{path.name} {digest}\n" for path, digest in zip(paths, digests, strict=True)]
        return hashlib.sha256("".join(facts).encode()).hexdigest()

    @cached_property
    def weight_stamps(self) -> dict[str, list[int]]:
        """Bytes and last change (nanoseconds) of each file of weights in a directory of the user's; nothing on the hub.

        The digest samples a tensor at three places: an edit in place between them shows here only.
        """
        if self.commit is not None:
            return {}
        facts = {path.name: path.stat() for path in sorted(self.weights.glob("*.safetensors"))}
        return {name: [fact.st_size, fact.st_mtime_ns] for name, fact in facts.items()}

    def identity(self, quantization: QuantizationSettings, compute_dtype: "torch.dtype") -> BaseIdentity:
        """What an adapter trained on this model, held like that, is trained on. Nothing is loaded.

        Raises:
            ModelError: As `weights_sha256`.
        """
        return BaseIdentity(
            model=self.name if self.commit else str(self.directory.resolve()),
            revision=self.commit,
            config_sha256=self.config_sha256,
            weights_sha256=self.weights_sha256,
            quant_type=quantization.quant_type,
            double_quant=quantization.double_quant,
            compute_dtype=str(compute_dtype).removeprefix("torch."),
        )


def has_tokenizer(directory: Path) -> bool:
    """Whether a tokenizer lies in a directory, and not a stray chat template alone."""
    return any((directory / name).is_file() for name in TOKENIZER_SIGNS)


def are_same_tokenizer(one: Path, other: Path) -> bool:
    """Whether two directories hold the same files of a tokenizer, byte for byte."""
    contents = ({path.relative_to(of): path.read_bytes() for path in tokenizer_files(of)} for of in (one, other))
    return next(contents) == next(contents)


def files_beside(base: ModelFiles, adapter: Path) -> ModelFiles:
    """The files of an adapter, for the tokenizer among them. Its code is the base's or is not run: it is an adapter of
    anybody's, and --trust-remote-code was said of the base.

    Raises:
        ModelError: One is a link to elsewhere, or its settings cannot be read.
    """
    refuse_links(adapter, [*TOKENIZER_FILES, "*config.json"])
    refuse_links(adapter, ["*.py"] if base.trust_remote_code else [path.name for path in own_code(adapter)])
    trusted = base.trust_remote_code and not (adapter / "config.json").exists()
    if trusted and (adapter / TOKENIZER_CONFIG).exists():
        settings = read_foreign_json(adapter / TOKENIZER_CONFIG)
        named = json.dumps(settings.get("auto_map") if isinstance(settings, dict) else None)
        there = {path.name: path.read_bytes() for path in base.directory.glob("*.py")}
        own = {path.name: path.read_bytes() for path in adapter.glob("*.py")}
        trusted = not re.search("/|--", named) and own.items() <= there.items()  # no folder's code, nor a repository's
    return replace(base, name=str(adapter), directory=adapter, trust_remote_code=trusted)


def tokenizer_content(tokenizer: Any) -> tuple[Any, ...]:
    """All that a tokenizer says, its chat templates last, but how rows of a batch are cut and filled up, which whoever used
    it last leaves in it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        vocabulary = tokenizer.get_vocab() | tokenizer.added_tokens_decoder
    else:
        vocabulary = json.loads(backend.to_str()) | {"truncation": None, "padding": None}
    special = (tokenizer.special_tokens_map, getattr(tokenizer, "extra_special_tokens", None))
    return vocabulary, *special, getattr(tokenizer, "chat_template", None)


def save_tokenizer(files: ModelFiles, directory: Path) -> None:
    """Writes a model's tokenizer, its own files and the code they may need, to where no config.json lies beside them.

    transformers looks there for a class that they do not name (GPT-2) or name wrongly (`PreTrainedTokenizerFast` of many a
    Qwen2), and reads without it another tokenizer, with other ids and no end of text: such a one is saved anew.
    """
    code = own_code(files.directory) if files.trust_remote_code else []
    copy_files([*tokenizer_files(files.directory), *code], files.directory, directory)
    *meant, template = tokenizer_content(files.tokenizer)
    try:
        *read, without = tokenizer_content(replace(files, directory=directory).tokenizer)
    except ModelError:
        read, without = [], None
    if read != meant or not (without == template or (without is None and isinstance(template, str))):
        for path in tokenizer_files(directory):
            path.unlink()
        files.tokenizer.save_pretrained(directory)
    elif without != template:  # its processor's
        (directory / CHAT_TEMPLATE).write_text(template, encoding="utf-8")


def copy_files(paths: Iterable[Path], source: Path, target: Path) -> None:
    """Copies files of one directory to the same places in another."""
    for path in paths:
        place = target / path.relative_to(source)
        place.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, place)


def context_length(config: PreTrainedConfig) -> int | None:
    """Most tokens a model reads at once, prompt and answer together; None where its configuration names no limit."""
    text_config = config.get_text_config(decoder=True)
    lengths = (getattr(text_config, name, None) for name in CONTEXT_NAMES)
    length = next((length for length in lengths if isinstance(length, int) and length > 0), None)
    return None if length is None else int(length * growth(text_config))


def resolve_model(
    model: str,
    revision: str | None = None,
    *,
    trust_remote_code: bool = False,
    rope_scaling: str | None = None,
    report: Report = report_nothing,
) -> ModelFiles:
    """Finds a model; of one on the hub, configuration and tokenizer are downloaded.

    Args:
        model: Directory or hub id.
        revision: Commit, branch or tag of a hub model.
        trust_remote_code: Run the model's own code; needs a full commit hash unless the model is a directory.
        rope_scaling: Of its positions, in place of its own; see `parse_rope_scaling`.
        report: Receives what downloading reports, and later loading.

    Raises:
        ModelError: It is not there, gated, unauthorised or out of reach.
        UsageError: `trust_remote_code` without a pinned revision.
    """
    directory = find_directory(model)
    if directory is not None:
        check_files(directory, model, READ_FILES, trust_remote_code=trust_remote_code)
        if revision is not None:
            report(Caution(f"--model-revision {revision} does nothing: {model} is a directory, read as it is."))
        return ModelFiles(model, directory, None, trust_remote_code, report, rope_scaling)
    if trust_remote_code and not re.fullmatch(r"[0-9a-f]{40}", revision or ""):
        raise UsageError(
            "--trust-remote-code runs code from the hub and needs --model-revision with the full 40-digit commit hash.",
            "Read the code at that commit first, then name it with --model-revision.",
        )
    directory = download_snapshot(model, revision, READ_FILES, kind="model", report=report)
    if not (directory / "config.json").is_file():
        raise ModelError(f"{model} has no config.json.", "Give --model a transformers model.")
    check_files(directory, model, READ_FILES, trust_remote_code=trust_remote_code)
    return ModelFiles(model, directory, directory.name, trust_remote_code, report, rope_scaling)
