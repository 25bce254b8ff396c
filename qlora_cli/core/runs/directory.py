"""Run directory: claimed for one process, cleared on request, and filled with the finished adapter."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qlora_cli.artifacts import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    BAD_ROWS,
    CHECKPOINTS,
    LOCK,
    LOSS_CURVE,
    METRICS,
    MODEL_CARD,
    REPORT_PAGE,
    RUN_RECORD,
    RUN_YAML,
    TRACKER_LOGS,
    fsync_path,
    is_run,
)
from qlora_cli.core.storage.checkpoint import list_checkpoints
from qlora_cli.core.storage.lock import locked
from qlora_cli.errors import RunError

RUN_FILES = (
    ADAPTER_WEIGHTS,
    ADAPTER_CONFIG,
    RUN_RECORD,
    RUN_YAML,
    METRICS,
    LOSS_CURVE,
    REPORT_PAGE,
    MODEL_CARD,
    BAD_ROWS,
)
UNFINISHED = ".finishing-"  # prefix of the directory that collects the final files


@contextmanager
def claimed(directory: Path, *, resume: bool, overwrite: bool) -> Iterator[None]:
    """Holds a run directory for this process; one that was made for nothing is removed again.

    A run in it goes on with `resume`; with `overwrite` its files are removed.

    Raises:
        RunError: Another process holds it, or it holds a run (without `resume` or `overwrite`) or other files.
    """
    created = not directory.exists()
    with locked(directory):
        try:
            _require_free(directory, resume=resume, overwrite=overwrite)
            yield
        finally:
            if created and {path.name for path in directory.iterdir()} <= {LOCK, TRACKER_LOGS}:
                shutil.rmtree(directory)


def _require_free(directory: Path, *, resume: bool, overwrite: bool) -> None:
    others = [p.name for p in directory.iterdir() if not p.name.startswith(".") and p.name != TRACKER_LOGS]
    holds_run = is_run(directory)
    if others and not holds_run:
        raise RunError(
            f"{directory} holds other files ({', '.join(sorted(others)[:3])}) and no run.",
            "Choose another --output.",
        )
    if not holds_run or resume:
        return
    if not overwrite:
        saved = list_checkpoints(directory / CHECKPOINTS)
        raise RunError(
            f"{directory} holds a run already{f', saved at step {int(saved[-1].name[5:])}' if saved else ''}.",
            "Add --resume to go on with it, --overwrite to remove it, or choose another --output.",
        )
    for name in RUN_FILES:
        (directory / name).unlink(missing_ok=True)
    shutil.rmtree(directory / CHECKPOINTS, ignore_errors=True)


@contextmanager
def finished_files(directory: Path) -> Iterator[Path]:
    """Yields an empty directory whose files take their places in the run directory when the block succeeds.

    Each is flushed and renamed, the adapter's configuration last: a directory with one has the weights too.
    """
    for leftover in directory.glob(f"{UNFINISHED}*"):
        shutil.rmtree(leftover)
    collected = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=directory))
    try:
        yield collected
        paths = sorted(collected.iterdir(), key=lambda path: path.name == ADAPTER_CONFIG)
        for path in paths:
            path.chmod(0o644)
            fsync_path(path)
        for path in paths:
            path.replace(directory / path.name)
        fsync_path(directory)
    finally:
        shutil.rmtree(collected, ignore_errors=True)
