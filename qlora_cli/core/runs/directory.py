"""Run directory: claimed for one process, cleared when a new run begins, and filled with the finished adapter."""

import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from qlora_cli.artifacts import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    BAD_ROWS,
    CHECKPOINTS,
    LOCK,
    LOSS_CURVE,
    MARK,
    METRICS,
    MODEL_CARD,
    REPORT_PAGE,
    RUN_RECORD,
    RUN_YAML,
    SPARE_ROWS,
    TOKENIZER_NAMES,
    TRACKER_LOGS,
    fsync_path,
    is_run,
    replace_file,
    temporary_beside,
    tokenizer_files,
)
from qlora_cli.config import TrainConfig
from qlora_cli.core.data.data_sets import read_paths
from qlora_cli.core.storage.checkpoint import is_checkpoint, list_checkpoints, remove_leftovers, step_of
from qlora_cli.core.storage.lock import locked, require_unheld
from qlora_cli.core.storage.ownership import (
    NAMES,
    RUN,
    read_mark,
    require_apart,
    require_writable,
    resolve,
    write_mark,
)
from qlora_cli.core.storage.publish import flush_tree
from qlora_cli.core.storage.temporaries import discard, remove, sweep
from qlora_cli.errors import RunError
from qlora_cli.events import Caution, Report, report_nothing

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
UNFINISHED = ".finishing"  # the directory that collects the final files


def claimed_output(config: TrainConfig, report: Report) -> AbstractContextManager[None]:
    """A run's directory, held for this process."""
    inputs = [Path(name).expanduser() for name in (config.model, config.prepared) if name]
    return claimed(
        Path(config.output),
        resume=config.resume,
        overwrite=config.overwrite,
        reads=[*read_paths(config), *inputs],
        dry_run=config.dry_run,
        report=report,
    )


@contextmanager
def claimed(
    directory: Path,
    *,
    resume: bool,
    overwrite: bool,
    reads: Iterable[Path] = (),
    dry_run: bool = False,
    report: Report = report_nothing,
) -> Iterator[None]:
    """Holds a run directory for this process; one that was made for nothing is removed again.

    Nothing in it is touched but what dead processes left behind: `begin_run` clears an older run. A dry run only looks.

    Raises:
        RunError: Another process holds it, or it holds a run (without `resume` or `overwrite`) or other files, or is
            what the command reads.
    """
    path = resolve(directory)
    require_apart(directory, path, reads, above=False)
    for read in reads:
        inside = read.exists() and path in read.resolve().parents and read.resolve().relative_to(path).parts[0]
        if overwrite and inside in (CHECKPOINTS, *RUN_FILES, *TOKENIZER_NAMES):
            raise RunError(f"--overwrite would remove {read}, which this command reads.", "Choose another --output.")
    try:
        require_free(directory, resume=resume, overwrite=overwrite)
    except RunError as error:
        if not dry_run or not is_run(directory):
            raise
        report(Caution(f"{error.message} {error.hint or ''}".strip()))
    require_writable(directory, path)
    created = not directory.exists()
    if dry_run:
        try:
            yield
        finally:
            _remove_spare(directory, created=created)
        return
    with locked(directory, report=report):
        try:
            require_free(directory, resume=resume, overwrite=overwrite)
            sweep(directory)
            for leftover in directory.glob(f"{UNFINISHED}-*"):  # of versions that named it so
                with suppress(OSError):
                    remove(leftover)
            if (directory / CHECKPOINTS).is_dir():
                remove_leftovers(directory / CHECKPOINTS)
            yield
        finally:
            _remove_spare(directory, created=False)
            if created and {path.name for path in directory.iterdir()} <= {LOCK, TRACKER_LOGS}:
                shutil.rmtree(directory)


def _remove_spare(directory: Path, *, created: bool) -> None:
    """Removes rows that were kept here because the cache takes none, and with `created` the directory made for them."""
    with suppress(OSError):
        remove(directory / SPARE_ROWS)
    if created:
        with suppress(OSError):
            directory.rmdir()


def require_free(directory: Path, *, resume: bool, overwrite: bool) -> None:
    """Checks that a run may be written to a directory.

    Raises:
        RunError: It holds a run, without `resume` or `overwrite`, or something else; or another process writes there.
    """
    if directory.exists() and not directory.is_dir():
        raise RunError(f"{directory} cannot be written: it is a file.", "Choose another --output.")
    names = sorted(path.name for path in directory.iterdir()) if directory.is_dir() else []
    others = [name for name in names if name[0] != "." and name != TRACKER_LOGS]
    mark = read_mark(directory)
    if mark is not None and mark.kind != RUN:
        raise RunError(f"{directory} holds {NAMES[mark.kind]}, and not {NAMES[RUN]}.", "Choose another --output.")
    saved = [path for path in list_checkpoints(directory / CHECKPOINTS) if is_checkpoint(path)]
    if others and mark is None and not saved:
        raise RunError(
            f"{directory} holds other files ({', '.join(others[:3])}) and no run of qlora.",
            "Choose another --output.",
        )
    require_unheld(directory)
    if not others or resume or overwrite:
        return
    raise RunError(
        f"{directory} holds a run already{f', saved at step {step_of(saved[-1])}' if saved else ''}.",
        "Add --resume to go on with it, --overwrite to remove it, or choose another --output.",
    )


def begin_run(directory: Path, run_id: str | None, report: Report) -> str:
    """Marks a directory as a run that begins or goes on, and clears what an older one left.

    The mark comes first: checkpoints of another run are not seen any more from then on, whatever stops the clearing.

    Args:
        run_id: Of the run that goes on, empty for one of a version without ids; None for one that begins.

    Returns:
        The run's id.
    """
    id, mark = run_id or secrets.token_hex(8), read_mark(directory)
    older = run_id is not None and (mark is None or mark.older)
    write_mark(directory, RUN, id=id, files=[*RUN_FILES, MARK], older=older)
    if run_id is None:
        old = [directory / name for name in RUN_FILES if (directory / name).is_file()]
        for path in [*list_checkpoints(directory / CHECKPOINTS), *old]:
            if error := discard(path):
                report(Caution(f"{path} of the older run could not be removed ({error.strerror})."))
    return id


@contextmanager
def finished_files(directory: Path) -> Iterator[Path]:
    """Yields an empty directory whose files take their places in the run directory when the block succeeds.

    Each is flushed and renamed, the adapter's configuration last: a directory with one has the weights too. That of the
    same run when it ended before goes first: until all of them are there, its newest checkpoint is the adapter.
    """
    collected = temporary_beside(directory / UNFINISHED[1:])
    collected.mkdir()
    try:
        yield collected
        flush_tree(collected)
        (directory / ADAPTER_CONFIG).unlink(missing_ok=True)
        fsync_path(directory)
        made = [path.relative_to(collected) for path in collected.rglob("*") if path.is_file()]
        for path in tokenizer_files(directory):  # of another base's, whose template would go with this one's tokens
            name = path.relative_to(directory)
            if name not in made and name.parts[0] in TOKENIZER_NAMES:
                path.unlink()
        for name in sorted(made, key=lambda name: name.name == ADAPTER_CONFIG):
            (directory / name).parent.mkdir(exist_ok=True)
            replace_file(collected / name, directory / name)
        fsync_path(directory)
    finally:
        shutil.rmtree(collected, ignore_errors=True)
