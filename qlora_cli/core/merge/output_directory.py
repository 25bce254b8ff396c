"""Output directory of a merge, which takes its place only when it is complete; an interrupted one is kept.

The unfinished directory lies hidden beside the output, so that no program takes it for a model.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qlora_cli.artifacts import LOCK, fsync_path, publish_directory
from qlora_cli.core.merge.writer import JOURNAL
from qlora_cli.core.storage.disk_space import reporting_disk_full
from qlora_cli.core.storage.lock import locked
from qlora_cli.errors import DiskFull, Interrupted, QloraError, RunError


def unfinished_path(output: Path) -> Path:
    """Where a merge to `output` collects its files."""
    return output.with_name(f".{output.name}.merging")


def require_free(output: Path, *, overwrite: bool) -> None:
    """Raises RunError where `output` is a file, or holds files and may not be overwritten."""
    if output.exists() and not output.is_dir():
        raise RunError(f"{output} is a file.", "Choose another --output.")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise RunError(
            f"{output} is not empty.", "Choose another --output directory, or add --overwrite to replace it."
        )


@contextmanager
def unfinished_directory(output: Path, *, overwrite: bool, resume: bool) -> Iterator[Path]:
    """Yields the directory to fill; it becomes `output` when the block succeeds.

    After a failure that another attempt cannot mend it is removed. After an interruption or a full disk it stays, for
    the finished files in it.

    Args:
        output: Final directory; with `overwrite` an existing one is replaced.
        resume: Whether files of an earlier attempt are kept.

    Raises:
        RunError: Another process is merging to the same place, or it cannot be written.
        DiskFull: The disk has no room.
    """
    directory = unfinished_path(output)
    with locked(directory, output=output):
        if not resume:
            for path in directory.iterdir():
                if path.name != LOCK:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        try:
            with reporting_disk_full(output):
                yield directory
                require_free(output, overwrite=overwrite)
                publish_directory(directory, output)
                for name in (JOURNAL, LOCK):  # after the rename: a crash before it finds the journal where it looks
                    (output / name).unlink(missing_ok=True)
                fsync_path(output)
        except (DiskFull, Interrupted):
            raise
        except QloraError:
            shutil.rmtree(directory)
            raise
