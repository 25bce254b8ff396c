"""Batch files: JSON Lines of prompts, and of answers, appended to as they come so that a stopped run goes on."""

import hashlib
import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from qlora_cli.artifacts import write_bytes
from qlora_cli.core.reading.chunks import json_cause
from qlora_cli.core.records.media import find_media
from qlora_cli.core.storage.disk_space import reporting_disk_full
from qlora_cli.core.storage.lock import locked_file
from qlora_cli.core.storage.temporaries import sweep
from qlora_cli.errors import DataError, RunError
from qlora_cli.events import Report, report_nothing
from qlora_cli.sizes import format_bytes

MAX_LINE_BYTES = 16 * 2**20


@dataclass(frozen=True)
class FilePrompt:
    """One line of the file: what `format_prompt` takes, and the adapter that its `adapter` column names."""

    index: int
    prompt: str | dict[str, Any] | list[dict[str, Any]]
    adapter: str | None


def read_prompts(path: Path) -> list[FilePrompt]:
    """Reads prompts: each line a JSON string, a list of chat messages, or an object.

    An object holds `prompt` (text or messages), `messages`, or the columns that the model was trained on; `adapter`
    names a directory.

    Raises:
        DataError: The file is missing, unreadable or empty, or a line is none of these.
    """
    prompts: list[FilePrompt] = []
    try:
        with path.open("rb") as stream:
            for number, line in enumerate(iter(lambda: stream.readline(MAX_LINE_BYTES + 1), b""), start=1):
                if line.strip():
                    prompts.append(_parse(line, len(prompts), f"{path}, line {number}"))
    except FileNotFoundError:
        raise DataError(f"There is no file {path}.", "Give --input a JSON Lines file of prompts.") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.", "Give --input a JSON Lines file.") from error
    if not prompts:
        raise DataError(f"{path} holds no prompts.", 'Give it lines such as: {"prompt": "Your question"}')
    return prompts


def _parse(line: bytes, index: int, where: str) -> FilePrompt:
    hint = 'A line looks like: {"prompt": "Your question"}'
    if len(line) > MAX_LINE_BYTES:
        raise DataError(f"{where} is longer than {format_bytes(MAX_LINE_BYTES)}.", hint)
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: {json_cause(line.decode(errors='replace'), error)}.", hint) from error
    adapter = value.pop("adapter", None) if isinstance(value, dict) else None
    if adapter is not None and not isinstance(adapter, str):
        raise DataError(f"{where}: its adapter is not the name of a directory.", 'Write it like: "adapter": "out"')
    if isinstance(value, dict) and len(value) == 1 and next(iter(value)) in ("prompt", "messages"):
        (value,) = value.values()
    if not isinstance(value, str | list | dict) or not value:
        raise DataError(f"{where} holds no prompt.", hint)
    if isinstance(value, dict) and (media := find_media(value)):
        raise DataError(f"{where}: field {media[0]!r} holds {media[1]}, and only text is read.", "Leave it out.")
    return FilePrompt(index, value, adapter)


def fingerprint(*facts: Any) -> str:
    """Eight hexadecimal digits of a digest of JSON-ready facts."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:8]


class AnswerFile:
    """Answers on disk, a line each: whole or not there, whatever stops the program.

    When the file is opened again, a last line without its end is cut off and the finished answers are known. At the
    end the lines are put in the prompts' order.

    Args:
        path: Of the file.
        prompts: All that is to be answered.
        settings: Fingerprint of all that decides an answer beside its prompt.
        made_by: Digest of the weights that answer a prompt, and when they were last changed (seconds), by adapter.

    Raises:
        RunError: The file holds answers to other prompts, under other settings or of other weights, or something else;
            or another process is writing it.
    """

    def __init__(
        self,
        path: Path,
        prompts: list[FilePrompt],
        settings: str,
        made_by: Mapping[str | None, tuple[str, float]] | None = None,
        report: Report = report_nothing,
    ) -> None:
        self.path, self.settings = path, settings
        self._made_by = [(made_by or {}).get(prompt.adapter) for prompt in prompts]
        self._stream: Any = None  # the file is made with its first line
        self._held = ExitStack()
        self._held.enter_context(locked_file(path, report=report))
        try:
            self._start(prompts)
        except BaseException:
            self._held.close()
            raise

    def _start(self, prompts: list[FilePrompt]) -> None:
        path = self.path
        self._digests = [fingerprint(p.prompt, p.adapter) for p in prompts]
        self.finished: set[int] = set()
        sweep(path.parent, path.name)
        kept = self._read_finished() if path.exists() else 0
        if path.exists():
            self._open(kept)

    def _open(self, end: int) -> None:
        self._stream = self.path.open("r+b", buffering=0)
        self._stream.truncate(end)
        self._stream.seek(end)

    def _read_finished(self) -> int:
        """Notes which answers are there; returns the byte at which the last whole line ends."""
        other = "Choose another --output, or remove the file."
        end = 0
        with self.path.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                if not line.endswith(b"\n"):
                    break
                end += len(line)
                try:
                    row = json.loads(line)
                    index, found = row["index"], (row["key"], row["settings"])
                    wanted = (self._digests[index], self.settings)
                except (ValueError, KeyError, TypeError, IndexError, RecursionError):
                    raise RunError(f"{self.path}, line {number} is no answer to these prompts.", other) from None
                if found != wanted:
                    what = "another prompt" if found[0] != wanted[0] else "other settings"
                    raise RunError(f"{self.path}, line {number} was answered for {what}.", other)
                if (made_by := self._made_by[index]) is not None:
                    # Lines of older versions do not say: they are taken where the weights are older than the file.
                    digest, changed = made_by
                    if row.get("made_by", digest if changed < self.path.stat().st_mtime else None) != digest:
                        raise RunError(f"{self.path}, line {number} was answered by other weights.", other)
                self.finished.add(index)
        if not end and self.path.stat().st_size:
            # Ours has one whole line at least: a file without any was written by somebody else.
            raise RunError(f"{self.path} holds something else than answers.", other)
        return end

    def write(self, index: int, content: dict[str, Any]) -> None:
        """Appends one answer.

        Raises:
            DiskFull: No room; the file ends with its last whole line.
        """
        row = {"index": index, **content, "key": self._digests[index], "settings": self.settings}
        if (made_by := self._made_by[index]) is not None:
            row["made_by"] = made_by[0]
        line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
        with reporting_disk_full(self.path):
            if self._stream is None:
                write_bytes(self.path, line)
                self._open(len(line))
                self.finished.add(index)
                return
            before = written = self._stream.tell()
            try:
                while written < before + len(line):
                    written += self._stream.write(line[written - before :])
            except OSError:
                self._stream.truncate(before)
                self._stream.seek(before)
                raise
        self.finished.add(index)

    def put_in_order(self) -> None:
        """Sorts the lines by their index; the file is replaced in one go."""
        lines = sorted(self.path.read_bytes().splitlines(keepends=True), key=lambda line: json.loads(line)["index"])
        write_bytes(self.path, b"".join(lines))

    def __enter__(self) -> "AnswerFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: Any, trace: TracebackType | None) -> None:
        if self._stream is not None:
            self._stream.close()
        self._held.close()
