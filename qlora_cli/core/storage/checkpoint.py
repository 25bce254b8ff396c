"""Checkpoint directories of training state: written atomically, verified by SHA-256 when they are read, never pickled.

A checkpoint is a directory `step-00000120` whose manifest names every file with its size and SHA-256, the identity of
what produced it, and its own digest. It is built under a temporary name, flushed file by file, and renamed, so that a
directory with the final name is complete whatever killed the process; what a disk does to it later, the digests show.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_cli.artifacts import sha256_of, write_json
from qlora_cli.core.storage.disk_space import reporting_disk_full
from qlora_cli.core.storage.ownership import read_mark
from qlora_cli.core.storage.publish import atomic_directory
from qlora_cli.core.storage.temporaries import discard, remove, sweep
from qlora_cli.core.storage.verified import VerifiedFolder
from qlora_cli.errors import CheckpointError, first_line
from qlora_cli.events import Caution, Report, report_nothing

if TYPE_CHECKING:
    import torch

MANIFEST = "manifest.json"
MANIFEST_FORMAT = 1
_DIRECTORY = re.compile(r"step-(\d{8,})")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that verified: each file named in `files` had its recorded size and SHA-256 when it was read."""

    path: Path
    step: int
    identity: dict[str, Any]
    files: dict[str, int]  # all but the manifest: name → bytes
    run: str = ""  # id of the run that wrote it; empty in those of older versions
    folder: VerifiedFolder | None = field(default=None, compare=False, repr=False)  # of one that was read

    def read(self, name: str) -> bytes:
        """The content of a file, from where it was verified: nothing is looked up by its path a second time.

        Raises:
            CheckpointError: It changed since, or cannot be read.
        """
        return (self.folder or VerifiedFolder(self.path)).read(name)

    def close(self) -> None:
        """Closes its files: an open one cannot be removed from some network file systems."""
        if self.folder is not None:
            self.folder.close()


@dataclass(frozen=True)
class Skipped:
    """A checkpoint that did not verify, with the reason as a clause."""

    path: Path
    reason: str


def checkpoint_path(root: Path, step: int) -> Path:
    """Directory of the checkpoint after `step` optimizer steps."""
    return root / f"step-{step:08d}"


def is_checkpoint(path: Path) -> bool:
    """Whether a directory holds a manifest of ours, whole or damaged in its files: other programs name theirs so too."""
    return _own_manifest(path) is not None


def recorded_digest(path: Path, name: str) -> str | None:
    """SHA-256 of a file as a checkpoint's manifest has it, in hexadecimal; None where no manifest of ours names it."""
    files = (_own_manifest(path) or {}).get("files")
    entry = files.get(name) if isinstance(files, dict) else None
    return str(entry.get("sha256")) if isinstance(entry, dict) else None


def _own_manifest(path: Path) -> dict[str, Any] | None:
    """A directory's manifest without its own digest; None where there is none of ours, or it was changed."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    is_own = isinstance(manifest, dict) and manifest.pop("sha256", None) == manifest_digest(manifest)
    return manifest if is_own else None


def step_of(path: Path) -> int:
    """The step in a checkpoint's name, which is their order: the texts of 99999999 and 100000000 are not."""
    return int(path.name.removeprefix("step-"))


def write_tensors(path: Path, tensors: "dict[str, torch.Tensor]") -> None:
    """Writes tensors as safetensors, from any device, with or without shared storage."""
    from safetensors.torch import save_file  # here, as below: what only looks at checkpoints needs no torch

    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)


def read_file(source: Checkpoint | Path, name: str) -> bytes:
    """The content of a file of a checkpoint that verified, or of any directory.

    Raises:
        CheckpointError: It cannot be read, or is not what was verified.
    """
    return source.read(name) if isinstance(source, Checkpoint) else VerifiedFolder(source).read(name)


def read_tensors(source: Checkpoint | Path, name: str | None = None) -> "dict[str, torch.Tensor]":
    """Reads safetensors onto the CPU, into memory of their own: no later change of the file reaches them.

    Args:
        source: A checkpoint with the file's `name` in it; or the file itself.

    Raises:
        CheckpointError: The file is not safetensors, or cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    if name is None:
        assert isinstance(source, Path)
        source, name = source.parent, source.name
    try:
        return load(read_file(source, name))
    except SafetensorError as error:
        raise CheckpointError(f"{name} is not a safetensors file: {error}.") from error


def write_checkpoint(
    root: Path, step: int, *, identity: dict[str, Any], fill: Callable[[Path], None], needed_bytes: int, run: str = ""
) -> Checkpoint:
    """Writes the checkpoint after `step` optimizer steps below `root`, replacing one of the same step.

    Args:
        identity: What the state depends on (base, data, settings), compared on resume.
        fill: Writes the files into the directory it is given.
        needed_bytes: Expected size, reported when the disk is full.
        run: Id of the run, by which those of an older run in the same place are told from its own.

    Raises:
        DiskFull: It did not fit. The older checkpoints are untouched and nothing of this one is left.
    """
    target = checkpoint_path(root, step)
    root.mkdir(parents=True, exist_ok=True)
    with reporting_disk_full(root, needed_bytes), atomic_directory(target) as directory:
        fill(directory)
        paths = sorted(directory.iterdir())
        files = {path.name: path.stat().st_size for path in paths}
        entries = {path.name: {"bytes": files[path.name], "sha256": sha256_of(path)} for path in paths}
        manifest = {"format": MANIFEST_FORMAT, "step": step, "run": run, "identity": identity, "files": entries}
        write_json(directory / MANIFEST, {**manifest, "sha256": manifest_digest(manifest)})
    return Checkpoint(target, step, identity, files, run)


def verify_checkpoint(path: Path, required: Iterable[str] = ()) -> Checkpoint:
    """Reads a checkpoint's manifest and checks every file against it.

    Raises:
        CheckpointError: With the reason as its message: what is missing, cut short, changed or not allowed.
    """
    folder = VerifiedFolder(path)
    try:
        manifest = json.loads(folder.read(MANIFEST))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{MANIFEST} cannot be read ({first_line(error)})") from error
    if not isinstance(manifest, dict) or manifest.pop("sha256", None) != manifest_digest(manifest):
        raise CheckpointError(f"{MANIFEST} was changed or cut short")
    if manifest.get("format") != MANIFEST_FORMAT:
        raise CheckpointError(f"{MANIFEST} has format {manifest.get('format')!r}, this version reads {MANIFEST_FORMAT}")
    try:
        step, identity, entries = int(manifest["step"]), dict(manifest["identity"]), manifest["files"]
        expected = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in entries.items()}
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{MANIFEST} is malformed ({error!r})") from error
    if odd := [name for name in expected if not _PLAIN_NAME.fullmatch(name)]:
        raise CheckpointError(f"{MANIFEST} names {odd[0]!r}, which is not a plain file name")
    for name in sorted({*expected, *required}):
        if name not in expected:
            raise CheckpointError(f"{MANIFEST} does not name {name}")
        folder.check(name, *expected[name])
    files = {name: size_bytes for name, (size_bytes, _) in expected.items()}
    return Checkpoint(path, step, identity, files, str(manifest.get("run", "")), folder)


def newest_valid(root: Path, required: Iterable[str] = ()) -> tuple[Checkpoint | None, list[Skipped]]:
    """The newest checkpoint of this run that verifies and holds the `required` files, and the newer ones that do not."""
    skipped: list[Skipped] = []
    mark = read_mark(root.parent)
    for path in reversed(list_checkpoints(root)):
        try:
            checkpoint = verify_checkpoint(path, required)
            if checkpoint_path(root, checkpoint.step) != path:
                raise CheckpointError(f"its manifest is of step {checkpoint.step}")
            if mark is not None and mark.id and not (checkpoint.run == mark.id or (mark.older and not checkpoint.run)):
                raise CheckpointError("it was written by another run than that of this directory")
        except CheckpointError as error:
            skipped.append(Skipped(path, error.message))
        else:
            return checkpoint, skipped
    return None, skipped


def list_checkpoints(root: Path) -> list[Path]:
    """Directories named as checkpoints, oldest first, verified or not."""
    if not root.is_dir():
        return []
    return sorted((path for path in root.iterdir() if _DIRECTORY.fullmatch(path.name) and path.is_dir()), key=step_of)


def prune(
    root: Path, written: Checkpoint, *, keep: int, protect: Iterable[int] = (), report: Report = report_nothing
) -> None:
    """Removes what `written`, just saved, makes superfluous.

    What stays: `written`, the `keep` - 1 checkpoints before it that look whole, and the steps in `protect`. Newer ones
    go: the run went back behind them because they did not verify. What cannot be removed costs a caution, never the run.
    """
    older = [path for path in list_checkpoints(root) if step_of(path) < written.step and _looks_whole(path)]
    staying = {written.path, *older[len(older) - (keep - 1) :]} | {checkpoint_path(root, step) for step in protect}
    for path in list_checkpoints(root):
        if path not in staying and (error := discard(path)):
            report(Caution(f"The superfluous checkpoint {path} could not be removed ({error.strerror})."))


def remove_leftovers(root: Path) -> None:
    """Removes temporary directories of a killed process. Call it with the run's lock held."""
    sweep(root)
    for path in root.glob(".step-*"):  # of versions that named them by the step alone
        with suppress(OSError):
            remove(path)


def differences(saved: Any, now: Any, name: str = "") -> list[str]:
    """Leaves that differ between two identities, each as `settings.rank: 8 → 16`, or `data: other content` of digests."""
    if isinstance(saved, dict) and isinstance(now, dict):
        found = []
        for key in sorted({*saved, *now}):
            found += differences(saved.get(key), now.get(key), f"{name}.{key}" if name else key)
        return found
    # Through JSON, so that a tuple equals the list it was saved as, while 32 equals 32.0.
    if saved == json.loads(json.dumps(now)):
        return []
    digests = all(isinstance(each, str) and re.fullmatch("[0-9a-f]{64}", each) for each in (saved, now))
    return [f"{name}: other content" if digests else f"{name}: {saved!r} → {now!r}"]


def manifest_digest(manifest: dict[str, Any]) -> str:
    """SHA-256 of a manifest without its own digest, in hexadecimal."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _looks_whole(path: Path) -> bool:
    """A cheap check, without reading the tensors: the manifest is valid and every file has its size."""
    try:
        entries = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["files"]
        return all((path / name).stat().st_size == entry["bytes"] for name, entry in entries.items())
    except (OSError, ValueError, LookupError, TypeError):
        return False
