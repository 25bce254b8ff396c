"""Ownership of what stands where a command writes: only what this program wrote is replaced, and nothing that is read.

What we publish carries a mark, `.qlora.json`, with its kind and the names of its files; what older versions published
is known by the records in it. A directory that holds anything else is left alone, whatever flags are given.
"""

import errno
import json
import os
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from qlora_cli.artifacts import (
    LOCK,
    MARK,
    MERGE_RECORD,
    PREPARED_MANIFEST,
    RUN_RECORD,
    RUN_YAML,
    shortened,
    write_json,
)
from qlora_cli.core.storage.temporaries import is_temporary
from qlora_cli.errors import RunError

MARK_VERSION = 1
PREPARED, RUN, MERGED = "prepared", "run", "merged"
NAMES = {PREPARED: "prepared rows", RUN: "a run", MERGED: "a merged model"}
LAST_FILE = {PREPARED: PREPARED_MANIFEST, MERGED: MERGE_RECORD}  # the directory is whole once it is there


@dataclass(frozen=True)
class Mark:
    """What a directory of ours says of itself.

    Attributes:
        kind: One of `NAMES`.
        id: Of the run that wrote it, random; empty in what older versions wrote.
        files: What was published, by its path from here; None where only the kind is known.
        older: Whether checkpoints without an id, of an older version, belong to the run.
    """

    kind: str
    id: str = ""
    files: frozenset[str] | None = None
    older: bool = True


@dataclass(frozen=True)
class Place:
    """A directory that a command may fill and publish, as `may_replace` found it.

    Attributes:
        path: Absolute, without links.
        moved_into: A mount point or the working directory, which no rename can replace: it is empty, and the files are
            moved into it.
    """

    path: Path
    kind: str
    overwrite: bool
    reads: tuple[Path, ...]
    files: tuple[str, ...]
    moved_into: bool

    @property
    def home(self) -> Path:
        """Where temporaries of the publication lie, on the same file system."""
        return self.path if self.moved_into else self.path.parent

    def confirm(self) -> "Place":
        """Asks again, now that the work is done.

        Raises:
            RunError: As `may_replace`.
        """
        return may_replace(self.path, self.kind, overwrite=self.overwrite, reads=self.reads, files=self.files)


def read_mark(directory: Path) -> Mark | None:
    """What of ours a directory holds; None where nothing in it says so."""
    content = _json_object(directory / MARK)
    if content.get("qlora") == MARK_VERSION and content.get("kind") in NAMES:
        files = content.get("files")
        known = frozenset(files) if isinstance(files, list) and all(isinstance(name, str) for name in files) else None
        return Mark(content["kind"], str(content.get("id", "")), known, bool(content.get("older", False)))
    manifest = _json_object(directory / PREPARED_MANIFEST)
    if type(manifest.get("format")) is int and all(isinstance(manifest.get(n), str) for n in ("rows_sha256", "digest")):
        return Mark(PREPARED)
    if {"format", "formatting"} <= set(_json_object(directory / MERGE_RECORD)):
        return Mark(MERGED)
    if {"format", "qlora_version"} <= set(_json_object(directory / RUN_RECORD)) or _is_run_yaml(directory / RUN_YAML):
        return Mark(RUN)
    return None


def write_mark(directory: Path, kind: str, *, id: str = "", files: Iterable[str] | None = None, **more: Any) -> None:
    """Marks a directory as ours. `files` are what is in it, by default, and nothing else may be replaced later."""
    found = (path.relative_to(directory).as_posix() for path in directory.rglob("*") if not path.is_dir())
    names = sorted({*found, MARK}) if files is None else sorted(files)
    content = {"qlora": MARK_VERSION, "kind": kind, "id": id or secrets.token_hex(8), "files": names, **more}
    write_json(directory / MARK, content)


def may_replace(
    target: Path, kind: str, *, overwrite: bool, reads: Iterable[Path] = (), files: Iterable[str] = ()
) -> Place:
    """Where a directory of a kind may be published: asked before the work, and again when it is done.

    Args:
        target: As the user gave it.
        kind: One of `NAMES`.
        overwrite: Whether one of the same kind, written by this program, may be replaced.
        reads: All that the command reads.
        files: Names and patterns of the files of this kind, for those whose mark does not list them.

    Raises:
        RunError: What stands there is not ours to replace, or is read by the command, or lies above what is read.
    """
    reads, files = tuple(reads), tuple(files)
    path = resolve(target)
    require_apart(target, path, reads, above=True)
    if path.exists() and not path.is_dir():
        raise RunError(f"{target} is a file.", "Choose another --output.")
    found = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
    require_writable(target, path)
    moved_into = path.is_dir() and _no_rename_can_replace(path)
    unfinished = (LOCK, f".{shortened(path.name)}.merging")
    if foreign := [name for name in found if name not in unfinished and not is_temporary(name)]:
        _require_ours(target, path, kind, foreign, files, overwrite=overwrite)
        if moved_into and (path / LAST_FILE[kind]).exists():
            raise RunError(
                f"{target} is the working directory or a mount point, which cannot be replaced in one step.",
                "Choose another --output.",
            )
    return Place(path, kind, overwrite, reads, files, moved_into)


def _require_ours(
    target: Path, path: Path, kind: str, found: list[str], files: tuple[str, ...], *, overwrite: bool
) -> None:
    """Raises RunError where a directory with files in it is not one of ours, or may not be overwritten."""
    mark = read_mark(path)
    if mark is None:
        raise RunError(
            f"{target} holds other files ({', '.join(found[:3])}), which qlora did not write.",
            "Choose another --output.",
        )
    if mark.kind != kind:
        raise RunError(f"{target} holds {NAMES[mark.kind]}, and not {NAMES[kind]}.", "Choose another --output.")
    if others := [name for name in found if not _is_own_file(path / name, mark, files)]:
        raise RunError(
            f"{target} holds files that qlora did not write ({', '.join(others[:3])}).",
            "Move them elsewhere, or choose another --output.",
        )
    if not overwrite and (path / LAST_FILE[kind]).exists():
        raise RunError(
            f"{target} exists already and holds {NAMES[kind]}.",
            "Choose another directory, or add --overwrite to replace it.",
        )


def _is_own_file(path: Path, mark: Mark, files: tuple[str, ...]) -> bool:
    if path.is_symlink():
        return False
    if path.is_dir():
        inside = [found.relative_to(path.parent).as_posix() for found in path.rglob("*")]
        return bool(inside) and {*inside} <= {*(mark.files or ())}
    if mark.files is not None:
        return path.name in mark.files
    return path.name in (LOCK, MARK) or any(fnmatchcase(path.name, pattern) for pattern in files)


def require_apart(target: Path, path: Path, reads: Iterable[Path], *, above: bool) -> None:
    """Raises RunError where a target is what a command reads, or, with `above`, a folder around it.

    Args:
        target: As the user gave it.
        path: The same, resolved.
        reads: All that is read; what does not exist cannot be lost.
    """
    same = _file_number(path)
    for read in reads:
        real = Path(os.path.realpath(read))
        if not real.exists():
            continue
        if real == path or (same is not None and _file_number(real) == same):
            raise RunError(f"{target} is what this command reads ({read}).", "Choose another --output.")
        if above and (path in real.parents or (same and same in map(_file_number, real.parents))):
            raise RunError(f"{target} is above {read}, which this command reads.", "Choose another --output.")


def may_write_file(target: Path, reads: Iterable[Path]) -> Path:
    """Where a file of answers may be written: nothing that the command reads, and no folder, device or broken link.

    Raises:
        RunError: It may not.
    """
    path = resolve(target)
    require_apart(target, path, reads, above=False)
    if path.exists() and not path.is_file():
        raise RunError(f"{target} is not a regular file.", "Choose another --output.")
    return path


def resolve(target: Path) -> Path:
    """The path behind links.

    Raises:
        RunError: A link leads nowhere, or in a circle, the name is too long for the file system, or a folder on the way is
            closed.
    """
    path = Path(os.path.realpath(target))
    try:
        broken = path.is_symlink() or (target.is_symlink() and not target.exists())
        path.lstat()
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise RunError(f"The name of {target} is too long.", "Choose a shorter --output.") from error
        if error.errno == errno.EACCES:
            raise RunError(f"{target} cannot be written: {error.strerror}.", "Choose another --output.") from error
    if broken:
        raise RunError(f"{target} is a link that leads nowhere.", "Remove the link, or choose another --output.")
    return path


def require_writable(target: Path, path: Path) -> None:
    """Raises RunError where nothing can be made at a resolved path: said before the work."""
    folder = next(place for place in (path, *path.parents) if place.exists())
    if not folder.is_dir() and folder != path:
        raise RunError(f"{target} cannot be written: {folder} is a file.", "Choose another --output.")
    if not folder.is_dir():
        folder = folder.parent
    if not os.access(folder, os.W_OK | os.X_OK):
        raise RunError(f"{target} cannot be written: {folder} takes no files of yours.", "Choose another --output.")


def _no_rename_can_replace(path: Path) -> bool:
    """Whether a directory is a mount point, or the working directory, where the user's shell would keep the old one."""
    return path.is_mount() or path == Path(os.path.realpath(Path.cwd()))


def _file_number(path: Path) -> tuple[int, int] | None:
    try:
        facts = path.stat()
    except OSError:
        return None
    return facts.st_dev, facts.st_ino


def _json_object(path: Path) -> dict[str, Any]:
    """A JSON object that lies in a regular file; empty where there is none, or something else."""
    if path.is_symlink() or not path.is_file():
        return {}
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _is_run_yaml(path: Path) -> bool:
    """Whether these are the settings that `train` wrote: what other programs call run.yaml has other keys."""
    if path.is_symlink() or not path.is_file():
        return False
    try:
        content = yaml.safe_load(path.read_bytes())
    except (OSError, yaml.YAMLError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and {"model", "output", "learning_rate", "rank", "quant_type"} <= set(content)
