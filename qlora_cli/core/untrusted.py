"""Files that came from elsewhere: links, sizes, references to code and expressions in them, before anything is built.

A model or an adapter is data. Nothing in it may read a file beside it, run code that was not pinned, or make this process
take memory or time without bound.
"""

import json
import math
import os
import re
import shlex
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from qlora_cli.errors import AdapterError, ModelError, QloraError

MATCH_SECONDS = 2.0  # of processor time, for all expressions of an adapter on all names of a model
MOST_BYTES = 2**26  # of a configuration
RANKS = range(1, 8193)
# What a number of that name may be at most, anywhere in a configuration; models of today stay far below.
MOST = {
    2_000: ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "depth"),
    2**12: (
        *("num_attention_heads", "num_key_value_heads", "n_head", "n_heads", "num_heads", "num_kv_heads"),
        *("num_experts", "num_local_experts", "n_routed_experts", "n_shared_experts", "num_experts_per_tok"),
    ),
    2**17: ("hidden_size", "n_embd", "d_model", "dim", "head_dim", "word_embed_proj_dim", "embedding_size"),
    2**20: ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "moe_intermediate_size", "d_ff", "d_inner"),
    2**22: ("vocab_size", "type_vocab_size"),
    2**27: ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "sliding_window"),
}
LIMITS = {name: most for most, names in MOST.items() for name in names}
ATTENTION = ("_attn_implementation", "attn_implementation", "_attn_implementation_internal")
LFS_POINTER = b"version https://git-lfs"
JSON_FILES = ("config.json", "generation_config.json", "tokenizer_config.json", "*processor_config.json")


def check_files(directory: Path, name: str, patterns: Iterable[str], *, trust_remote_code: bool) -> None:
    """Checks the files of a model beside its weights.

    Args:
        directory: In which they are.
        name: As the user gave it.
        patterns: Names of all files that are read, or copied into a merged model.
        trust_remote_code: Whether the model's own code is run, which may then name no other's.

    Raises:
        ModelError: A file is a link out of the directory or a pointer of Git LFS, or a configuration asks for what no
            model needs.
    """
    refuse_links(directory, [*patterns, *JSON_FILES, "*.py"])
    for path in _matching(directory, patterns):
        refuse_pointer(path)
    for path in _matching(directory, JSON_FILES):
        content = read_foreign_json(path)
        if path.name == "config.json":
            _check_sizes(content, f"config.json of {name}")
        _check_references(content, f"{path.name} of {name}", trust_remote_code=trust_remote_code)


def _matching(directory: Path, patterns: Iterable[str]) -> list[Path]:
    return sorted({path for pattern in patterns for path in directory.glob(pattern)})


def refuse_links(directory: Path, patterns: Iterable[str]) -> None:
    """Checks that files are regular ones in their directory, or in the hub's cache, whose snapshots are links.

    Raises:
        ModelError: One is a link to elsewhere, or no file at all.
    """
    root = Path(os.path.realpath(directory))
    for path in _matching(directory, patterns):
        target = Path(os.path.realpath(path))
        if target.is_dir() and not path.is_symlink():
            continue
        inside = target.is_relative_to(root) or (
            target.parent.name == "blobs" and target.parent.parent.name.startswith("models--")
        )
        if not inside:
            raise ModelError(
                f"{path.name} in {directory} is a link out of it, which is not followed.",
                "If its content is wanted, copy the file into the directory.",
            )
        if not target.is_file():
            raise ModelError(f"{path.name} in {directory} is no regular file.", "Remove it, or download it again.")


def refuse_pointer(path: Path) -> None:
    """Raises ModelError for what a clone without Git LFS has in the place of a large file."""
    with suppress(OSError), path.open("rb") as stream:
        if stream.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ModelError(
                f"{path} is a pointer of Git LFS, and not the file that it stands for.",
                f"Type: git -C {shlex.quote(str(path.parent))} lfs pull, or download the model again.",
            )


def read_foreign_json(path: Path) -> Any:
    """A JSON file of somebody else's, of bounded size and depth.

    Raises:
        ModelError: It is too large, nested too deeply, or no JSON.
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ModelError(f"{path} has {path.stat().st_size:,} bytes, which no configuration needs.", "Look at it.")
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ModelError(f"{path} is nested too deeply to be a configuration.", "Download the model again.") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}.", "Download the model again.") from error


def _check_sizes(content: Any, where: str) -> None:
    """Bounds the numbers that decide how much is built. What else is wrong with them, transformers says."""
    for section in _sections(content):
        for name, value in section.items():
            most = LIMITS.get(name)
            for number in (value if isinstance(value, list) else [value]) if most else ():
                if isinstance(number, int | float) and not -(2**31) <= number <= (most or 0):
                    raise ModelError(
                        f"{where} says {name}: {number}, and at most {most:,} makes sense.", "Download the model again."
                    )


def _check_references(content: Any, where: str, *, trust_remote_code: bool) -> None:
    for section in _sections(content):
        for name in ATTENTION:
            if "/" in str(section.get(name) or ""):
                raise ModelError(
                    f"{where} asks for attention code from {section[name]}, which is not run.",
                    f"Remove {name} from it.",
                )
        named = [section.get("auto_map"), section.get("custom_generate"), section.get("custom_pipelines")]
        elsewhere = [text for text in _texts(named) if "--" in text] if trust_remote_code else []
        if elsewhere:
            raise ModelError(
                f"{where} names code of another repository ({elsewhere[0]}), of which no commit is pinned.",
                "Copy that code into the model's directory and name it there, or leave out --trust-remote-code.",
            )


def _sections(content: Any) -> Iterator[dict[str, Any]]:
    if isinstance(content, dict):
        yield content
        content = list(content.values())
    if isinstance(content, list):
        for item in content:
            yield from _sections(item)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)


def check_adapter_config(config: Mapping[str, Any], directory: Path) -> None:
    """Checks the numbers of an adapter, and that it names no code.

    Raises:
        AdapterError: A rank or alpha makes no adapter, or code of another library is asked for.
    """
    patterns = [config.get(name) or {} for name in ("rank_pattern", "alpha_pattern")]
    if not all(isinstance(pattern, dict) for pattern in patterns):
        raise AdapterError(f"A pattern of the adapter in {directory} is no mapping.", "Use an earlier checkpoint.")
    for rank in (config.get("r"), *patterns[0].values()):
        if isinstance(rank, bool) or not isinstance(rank, int) or rank not in RANKS:
            raise AdapterError(f"The adapter in {directory} has rank {rank!r}.", "Ranks are 1 to 8,192.")
    for alpha in (config.get("lora_alpha"), *patterns[1].values()):
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
            raise AdapterError(f"The adapter in {directory} has alpha {alpha!r}.", "Alphas are finite and above 0.")
    dropout = config.get("lora_dropout") or 0
    if not isinstance(dropout, int | float) or not 0 <= dropout <= 1:
        raise AdapterError(f"The adapter in {directory} has dropout {str(dropout)[:80]}.", "It is 0 to 1.")
    for name in ("target_modules", "exclude_modules", "modules_to_save", "target_parameters"):
        listed = config.get(name) or []
        if not isinstance(listed, str) and not (isinstance(listed, list) and all(isinstance(x, str) for x in listed)):
            raise AdapterError(f"{name} of the adapter in {directory} is {str(listed)[:80]}.", "It lists names.")
    if config.get("megatron_config"):
        raise AdapterError(
            f"The adapter in {directory} asks for the module {config.get('megatron_core')!r} to be imported.",
            "Remove megatron_config from its adapter_config.json.",
        )


def check_expressions(config: Mapping[str, Any], names: Iterable[str], directory: Path) -> None:
    """Matches the regular expressions of an adapter against the names of modules, within bounded time.

    What PEFT, or a merge, does with them afterwards takes no longer.

    Raises:
        AdapterError: One is no expression, or takes too long, as those made to do.
    """
    texts = [config.get(name) for name in ("target_modules", "exclude_modules", "layers_pattern")]
    expressions = [text for text in texts if isinstance(text, str)]
    lists = [config.get("target_parameters"), config.get("layers_pattern")]
    expressions += [item for items in lists if isinstance(items, list) for item in items if isinstance(item, str)]
    expressions += [key for name in ("rank_pattern", "alpha_pattern") for key in config.get(name) or {}]
    if not expressions:
        return
    slow = AdapterError(
        f"A regular expression of the adapter in {directory} takes too long to match the names of modules.",
        "Name the modules in its adapter_config.json instead.",
    )
    try:
        with _bounded(MATCH_SECONDS, slow):
            for expression in expressions:
                forms = [re.compile(expression), re.compile(rf"(.*\.)?({expression})$")]
                forms.append(re.compile(rf".*\.[^.]*{expression}\.(\d+)\."))
                for name in names:
                    for form in forms:
                        form.match(name)
                    forms[0].fullmatch(name)
    except (re.error, RecursionError, OverflowError) as error:
        raise AdapterError(
            f"The adapter in {directory} names modules by {expression[:80]!r}, which is no regular expression: {error}.",
            "Name the modules in its adapter_config.json instead.",
        ) from error


@contextmanager
def _bounded(seconds: float, error: QloraError) -> Iterator[None]:
    """Raises `error` in the block once the process has computed for so long; `re` asks for signals as it goes."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread is interrupted; the commands work there
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise error

    previous = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, previous)


def is_ours(path: Path) -> bool:
    """Whether a path is this user's or root's, and no other user, nor a group that is not this user's, may write to it."""
    try:
        facts = path.lstat()
    except FileNotFoundError:
        return True  # whoever reads it says that it is missing
    except OSError:
        return False
    others = facts.st_mode & 0o002 or (facts.st_mode & 0o020 and facts.st_gid != os.getegid())
    return facts.st_uid in (os.geteuid(), 0) and not others
