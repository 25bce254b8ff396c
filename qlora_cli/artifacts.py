"""Artifacts: the directories handed between commands, their files' names and versions, atomic writes."""

import fcntl
import json
import os
import re
import shlex
import stat
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import MISSING, fields
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin

from qlora_cli.errors import RunError, first_line

Record = TypeVar("Record")

FORMAT = 1  # of RUN_RECORD and PREPARED_MANIFEST; raised when an older version could not read them

SWAP = "swap"  # ending of what stands aside while two renames put another in its place
MARK = ".qlora.json"  # in whatever directory this program published: its kind, and the files that may be replaced

# Run directory: a PEFT adapter with what produced it.
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
RUN_RECORD = "qlora.json"  # base identity, formatting, data identity, versions
RUN_YAML = "run.yaml"
TRAINER_STATE = "state.json"  # in checkpoints: how far the training came
METRICS = "metrics.jsonl"
LOSS_CURVE = "loss.png"
REPORT_PAGE = "report.html"
MODEL_CARD = "README.md"
CHECKPOINTS = "checkpoints"
TRACKER_LOGS = "logs"
BAD_ROWS = "bad_rows.jsonl"
LOCK = ".lock"
SPARE_ROWS = ".rows"  # prepared rows where the cache takes none, removed when the run ends

# Merged model: beside the checkpoint, how prompts were formatted.
MERGE_RECORD = "qlora_merge.json"

# A model's tokenizer, wherever it lies.
TEMPLATES = "additional_chat_templates"  # a folder; whatever else lies in folders is no part of a model here
# Files that only a tokenizer has: an adapter saved without one may still hold a stray chat template.
TOKENIZER_SIGNS = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
CHAT_TEMPLATE = "chat_template.jinja"
# What the tokenizers of transformers, and Mistral's, call their files: others may be the user's, beside a run or a model.
TOKENIZER_NAMES = (
    *TOKENIZER_SIGNS,
    *("special_tokens_map.json", "added_tokens.json", "merges.txt", CHAT_TEMPLATE, TEMPLATES),
    *("spiece.model", "sentencepiece.model", "sentencepiece.bpe.model", "spm.model", "spm_char.model"),
    *("source.spm", "target.spm", "target_vocab.json", "vocab-src.json", "vocab-tgt.json"),
    *("bpe.codes", "byte_maps.json", "dict.txt", "emoji.json", "entity_vocab.json", "normalizer.json"),
    *("prophetnet.tokenizer", "word_pronunciation.json", "word_shape.json"),
    *("tekken.json", *(f"tokenizer.model.v{version}" for version in (1, 2, 3, 7))),
)
# Where a model's own code may name others.
TOKENIZER_FILES = ["tokenizer*", "*.model", "*vocab*.*", "*.tiktoken", *TOKENIZER_NAMES, f"{TEMPLATES}/*.jinja"]

# Prepared directory.
PREPARED_MANIFEST = "prepared.json"
PREPARED_ROWS = "rows.arrow"  # Arrow IPC file: input_ids list<int32>, trained list<bool>


def cache_root() -> Path:
    """Where what can be made again is kept: $QLORA_CACHE, or ~/.cache/qlora."""
    return Path(os.environ.get("QLORA_CACHE") or "~/.cache/qlora").expanduser()


def own_code(directory: Path) -> list[Path]:
    """The modules of Python of a model that comes with its code: those that its settings name (`auto_map`), and those that
    these import."""
    settings = "".join(path.read_text("utf-8", "replace") for path in sorted(directory.glob("*config.json")))
    names, found = re.findall(r'"([\w-]+)\.\w+"', settings), []
    while names:
        path = directory / f"{names.pop()}.py"
        if path.is_file() and path not in found:
            found.append(path)
            names += re.findall(r"^\s*from\s+\.(\w+)\s+import", path.read_text("utf-8", "replace"), re.MULTILINE)
    return sorted(found)


def tokenizer_files(directory: Path) -> list[Path]:
    """The files of the tokenizer in a directory, with its chat templates: those that transformers, the tokenizer's settings or
    its own code call so."""
    naming = [directory / TOKENIZER_SIGNS[0], *own_code(directory)]
    named = set(re.findall("[\"']([^\"'\n]+)", "".join(p.read_text("utf-8", "replace") for p in naming if p.is_file())))
    found = {path for pattern in TOKENIZER_FILES for path in directory.glob(pattern) if path.is_file()}
    return sorted(p for p in found if p.relative_to(directory).parts[0] in TOKENIZER_NAMES or p.name in named)


def fsync_path(path: Path) -> None:
    """Flushes one file or directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    import hashlib

    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@cache
def _machine() -> str:
    """Eight hexadecimal digits for this machine since it was started, by its name where the system does not tell."""
    try:
        facts = Path("/proc/sys/kernel/random/boot_id").read_bytes()
    except OSError:
        facts = os.uname().nodename.encode()
    from hashlib import sha256  # a tenth of what `inspect` of an adapter takes, which names no file

    return sha256(facts).hexdigest()[:8]


def process_name() -> str:
    """Machine, process-id namespace, number and start of this process, which no other ever shares.

    Two containers may both be process 1; a number is given again once its process has ended.
    """
    try:
        space = Path("/proc/self/ns/pid").stat().st_ino
        start = Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19]
    except (OSError, IndexError):
        space, start = 0, "0"
    return f"{_machine()}-{space}-{os.getpid()}-{start}"


def temporary_beside(path: Path, ending: str = "tmp") -> Path:
    """A name beside `path` that nobody else takes; `core/storage/temporaries.py` removes those of dead processes."""
    return path.with_name(f".{shortened(path.name)}.{process_name()}-{os.urandom(4).hex()}.{ending}")


def free_name(name: str) -> str:
    """A directory's name, with a number behind it where one stands there already."""
    path, number = Path(name), 1
    while path.exists():
        number += 1
        path = Path(f"{name}-{number}")
    return str(path)


def shortened(name: str) -> str:
    """A file's name, short enough that more fits into the 255 bytes that file systems allow."""
    return os.fsencode(name)[:150].decode(errors="ignore")


def replace_file(source: Path, target: Path) -> None:
    """Renames a file over another. Where the file system renames over nothing, that steps aside first.

    Who dies in between is healed by the next that writes there (see `core/storage/temporaries.py`).
    """
    try:
        source.replace(target)
    except FileExistsError:
        aside = temporary_beside(target, SWAP)
        target.rename(aside)
        try:
            source.rename(target)
        except BaseException:
            aside.rename(target)
            raise
        with suppress(OSError):
            aside.unlink()


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file atomically: a reader sees the old one or the new one, never a part. Rights stay what they were."""
    temporary = temporary_beside(path)
    try:
        with temporary.open("wb") as stream:
            with suppress(OSError):  # there is none yet
                os.fchmod(stream.fileno(), stat.S_IMODE(path.stat().st_mode))
            with suppress(OSError):  # it only tells others that the writer lives
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
            replace_file(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    fsync_path(path.parent)


def write_json(path: Path, content: Any) -> None:
    """Writes JSON as `write_bytes` does."""
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_bytes(path, text.encode())


def read_json(path: Path) -> Any:
    """Reads a JSON file of ours.

    Raises:
        RunError: It is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(f"{path} is missing.", "Check the directory's name.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{path} cannot be read: {first_line(error)}.") from error


def read_fields(kind: type[Record], content: Any) -> Record:
    """A dataclass from a JSON object, whose other keys are ignored.

    Raises:
        ValueError: It is none, or a field is missing or of another type, as a clause.
    """
    if not isinstance(content, dict):
        raise ValueError(f"an object is expected, and {type(content).__name__} found")
    known = {}
    for option in fields(kind):  # type: ignore[arg-type]
        if option.name not in content:
            if option.default is MISSING and option.default_factory is MISSING:
                raise ValueError(f"{option.name} is missing")
            continue
        value = content[option.name]
        types = get_args(option.type) if isinstance(option.type, UnionType) else (option.type,)
        if not isinstance(value, tuple(get_origin(kind) or kind for kind in types)):
            raise ValueError(f"{option.name} is {str(value)[:80]!r}")
        known[option.name] = value
    return kind(**known)


def run_of(adapter: Path) -> Path:
    """The run directory of an adapter: its own, or for one in a checkpoint the one above."""
    place = adapter.absolute().parent
    return place.parent if place.name == CHECKPOINTS else adapter


_RECORD_TYPES = {
    "format": int,
    "adapter_sha256": str,  # of a finished run's weights; those of a checkpoint have theirs in its manifest
    "adapter_config_sha256": str,  # of the adapter's settings but for where its base lies
    "merging_refused": str,  # why a merge into the base as it was trained on will be
    **dict.fromkeys(("base", "data", "formatting", "parameters", "training", "start", "versions"), dict),
}
_TRAINING_NUMBERS = {
    "steps",
    "total_steps",
    "tokens",
    "seconds",
    "final_loss",
    "eval_loss",
    "best_eval_loss",
    "best_step",
}


def find_run_record(adapter: Path) -> dict[str, Any]:
    """The record beside an adapter, or for a checkpoint without one that of its run; empty where there is none.

    Raises:
        RunError: It is broken, or written by a newer version.
    """
    path = next((place / RUN_RECORD for place in (adapter, run_of(adapter)) if (place / RUN_RECORD).is_file()), None)
    if path is None:
        return {}
    checkpoints = path.parent / CHECKPOINTS
    hint = f"Remove it, or use one of {checkpoints}, which have their own." if checkpoints.is_dir() else "Remove it."
    try:
        record = read_json(path)
    except RunError as error:
        raise RunError(error.message, hint) from error
    wrong = "it is no object" if not isinstance(record, dict) else None
    if wrong is None and not record.get("format"):
        wrong = "format is missing"
    for name, kind in _RECORD_TYPES.items() if wrong is None else ():
        if record.get(name) is not None and not isinstance(record[name], kind):
            wrong = f"{name} is {str(record[name])[:80]!r}"
    for name, value in (record.get("training") or {}).items() if wrong is None else ():
        if name in _TRAINING_NUMBERS and not isinstance(value, int | float | None):
            wrong = f"training.{name} is {str(value)[:80]!r}"
    if wrong is not None:
        raise RunError(f"{path} is no record of a run: {wrong}.", hint)
    if record["format"] > FORMAT:
        raise RunError(f"{path} was written by a newer qlora.", "Update with: pip install -U qlora-cli")
    return record


def ways_to_use(adapter: Path) -> list[str]:
    """What to type next with an adapter."""
    place, record = shlex.quote(str(adapter)), find_run_record(adapter)
    return [f'qlora generate --adapter {place} "Your question"', *ways_to_merge(record, place, free_name("merged"))]


def ways_to_merge(record: Mapping[str, Any], place: str, output: str) -> list[str]:
    """What to type to merge the adapter at a place, by its run's record; nothing where every merge will be refused."""
    line = f"qlora merge --adapter {place} --output {output}"
    if record.get("merging_refused") is None:
        return [line]
    return [f"{line} --base original"] if record.get("merges_original") else []


def is_run(directory: Path) -> bool:
    """Whether a run was begun there, or an adapter lies there. `RUN_YAML` is written before metrics and record."""
    return any((directory / name).exists() for name in (RUN_YAML, CHECKPOINTS, RUN_RECORD, ADAPTER_CONFIG))


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics, without one that a crash cut short or that is none; none where there is no file."""
    lines = []
    with suppress(FileNotFoundError):
        for line in (directory / METRICS).read_bytes().splitlines():
            with suppress(ValueError, RecursionError):
                if isinstance(found := json.loads(line), dict) and isinstance(found.get("step"), int):
                    lines.append(found)
    return lines


def is_model(directory: Path) -> bool:
    """Whether the directory holds a whole model, and is no run or adapter, which may hold its configuration too."""
    return (directory / "config.json").is_file() and not is_run(directory)


def describe_place(directory: Path) -> tuple[str, str] | None:
    """What a directory holds, and which commands take it, as a sentence; None where it is nothing of ours."""
    place = shlex.quote(str(directory))
    if is_prepared(directory):
        return "it holds prepared rows", f"Train on them with: qlora train --model ... --prepared {place}"
    if is_model(directory):
        return "it holds a whole model", f"Ask it with: qlora generate --model {place}"
    way = f"To train on, merge it, or go on with its run: --output {place} --resume. Other commands: --adapter {place}"
    return ("it holds a run or an adapter", way) if is_run(directory) else None


def is_prepared(directory: Path) -> bool:
    """Whether the directory was written by `qlora prepare`."""
    return (directory / PREPARED_MANIFEST).is_file()


def find_near(place: Path, name: str) -> Path | None:
    """The directory that was probably meant, of those with a file of this name: the one that a file lies in, or at most two
    levels below a directory, as checkpoints and snapshots of a hub's cache lie, that of the last step, or the newest; or the
    last checkpoint beside one that is no longer kept. None where there is none, or several of which any may be meant."""
    if place.is_file():
        return place.parent if (place.parent / name).is_file() else None
    if place.parent.name == CHECKPOINTS and not place.exists():
        place = place.parent
    found = [*place.glob(f"*/{name}"), *place.glob(f"*/*/{name}")]

    def step_of(path: Path) -> int:
        step = re.search(r"-(\d+)$", path.parent.name)
        return int(step[1]) if step else -1

    above = {path.parent.parent for path in found}
    if len(above) > 1 or (len(found) > 1 and above.pop().name != "snapshots" and min(map(step_of, found)) < 0):
        return None
    return max(found, key=lambda path: (step_of(path), path.stat().st_mtime)).parent if found else None
