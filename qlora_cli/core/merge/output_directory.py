"""Output directory of a merge, which takes its place only when it is complete; an interrupted one is kept.

The unfinished directory lies hidden beside the output, so that no program takes it for a model.
"""

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from qlora_cli.artifacts import LOCK, MERGE_RECORD, MODEL_CARD, TOKENIZER_FILES, fsync_path, shortened, temporary_beside
from qlora_cli.core.merge.checkpoint_files import CONFIG, GENERATION_CONFIG
from qlora_cli.core.merge.writer import JOURNAL
from qlora_cli.core.storage.disk_space import reporting_disk_full
from qlora_cli.core.storage.lock import locked
from qlora_cli.core.storage.ownership import MERGED, Place, may_replace, read_mark
from qlora_cli.core.storage.publish import publish
from qlora_cli.core.storage.safetensors_file import INDEX_FILE
from qlora_cli.core.storage.temporaries import heal, sweep, sweep_beside
from qlora_cli.errors import DiskFull, Interrupted, QloraError

MERGED_FILES = (
    "model*.safetensors",
    INDEX_FILE,
    CONFIG,
    GENERATION_CONFIG,
    "*.py",
    MODEL_CARD,
    MERGE_RECORD,
    JOURNAL,
    *TOKENIZER_FILES,
)


def unfinished_path(output: Place | Path) -> Path:
    """Where a merge to `output` collects its files."""
    path, home = (output.path, output.home) if isinstance(output, Place) else (output, output.parent)
    return home / f".{shortened(path.name)}.merging"


def find_place(output: Path, *, overwrite: bool, reads: Iterable[Path]) -> Place:
    """The place of a merge: asked before the work.

    Raises:
        RunError: It may not be replaced.
    """
    heal(output)
    sweep_beside(output)
    if (mark := read_mark(output)) is not None and mark.kind == MERGED:
        for name in (JOURNAL, LOCK):  # of a merge that was killed right after its publication
            (output / name).unlink(missing_ok=True)
    return may_replace(output, MERGED, overwrite=overwrite, reads=reads, files=MERGED_FILES)


@contextmanager
def unfinished_directory(output: Place, *, shown: str, resume: bool) -> Iterator[Path]:
    """Yields the directory to fill; it becomes `output` when the block succeeds.

    After a failure that another attempt cannot mend it is removed. After an interruption or a full disk it stays, for
    the finished files in it.

    Args:
        output: Final directory.
        shown: What the user called it.
        resume: Whether weights of an earlier attempt are kept.

    Raises:
        RunError: Another process is merging to the same place, or it cannot be written.
        DiskFull: The disk has no room.
    """
    directory = unfinished_path(output)
    with locked(directory, output=Path(shown)):
        sweep(directory)
        for path in directory.iterdir():
            finished = resume and (path.suffix == ".safetensors" or path.name == JOURNAL)
            if path.name != LOCK and not finished:  # what is small is made anew: it may be of another adapter
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        try:
            with reporting_disk_full(output.path):
                yield directory
                _publish(directory, output)
                for name in (JOURNAL, LOCK):  # after the rename: a crash before it finds the journal where it looks
                    (output.path / name).unlink(missing_ok=True)
                fsync_path(output.path)
        except (DiskFull, Interrupted):
            raise
        except QloraError:
            shutil.rmtree(directory, ignore_errors=True)
            raise


def _publish(directory: Path, output: Place) -> None:
    """Publishes under a temporary's name: after the exchange the old model lies there, and is never gone on with."""
    temporary = temporary_beside(output.home / output.path.name)
    directory.rename(temporary)
    try:
        publish(temporary, output)
    except OSError:
        if os.path.lexists(temporary / JOURNAL):
            temporary.rename(directory)
        raise
