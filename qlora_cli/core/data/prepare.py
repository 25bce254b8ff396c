"""Preparation: a data source to a prepared directory of token rows, and a summary of what became of each row."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from qlora_cli import __version__
from qlora_cli.artifacts import (
    BAD_ROWS,
    FORMAT,
    PREPARED_MANIFEST,
    PREPARED_ROWS,
    cache_root,
    is_prepared,
    write_json,
)
from qlora_cli.core.data.data_sets import join_identities, read_data_sets, read_paths
from qlora_cli.core.data.dataset import PreparedRows, RowWriter, manifest_sha256
from qlora_cli.core.data.sources import Source, ignored_settings, resolve_source
from qlora_cli.core.data.statistics import PreparationStatistics
from qlora_cli.core.data.tokenize import TokenisedChunk, Tokeniser, TokeniserSettings
from qlora_cli.core.data.worker_pool import TokeniserPool, count_processes
from qlora_cli.core.models.files import context_length
from qlora_cli.core.prompts.encoder import TextEncoder, encoder_of
from qlora_cli.core.prompts.formatting import Formatting
from qlora_cli.core.reading.chunks import Chunk, count_rows, parse_chunk
from qlora_cli.core.reading.readers import CHUNK_BYTES
from qlora_cli.core.recognition.pairs import read_template
from qlora_cli.core.recognition.recognise import idle_settings, recognise
from qlora_cli.core.recognition.recognised import Recognised
from qlora_cli.core.records.record import Record
from qlora_cli.core.storage.disk_space import reporting_disk_full
from qlora_cli.core.storage.ownership import PREPARED, may_replace
from qlora_cli.core.storage.publish import atomic_directory
from qlora_cli.core.storage.temporaries import heal, sweep, sweep_beside
from qlora_cli.core.torchless import ask_with_torch, is_left_out
from qlora_cli.errors import DataError, DiskFull, RunError, UsageError, first_line
from qlora_cli.events import Caution, Notice, Progress, Report
from qlora_cli.settings.groups import DataSettings

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

PREPARATION = 9  # raised when the same input would give other rows, so that older caches are not taken for these
DEFAULT_MAX_LENGTH = 2048
SAMPLE_RECORDS = 256  # looked at to recognise the format
SAMPLE_LETTERS = 2**23  # where rows are long, fewer of them do
TASK = "Preparing"
PREPARED_FILES = (PREPARED_MANIFEST, PREPARED_ROWS, BAD_ROWS)


@dataclass(frozen=True)
class PreparedSummary:
    """What became of the data.

    Attributes:
        directory: Where the rows are.
        cache_hit: Whether they were there already.
        manifest: Content of the manifest (see `prepare_rows`).
    """

    directory: str
    cache_hit: bool
    manifest: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: the manifest with the directory and whether it was a cache hit."""
        return {"directory": self.directory, "cache_hit": self.cache_hit, **self.manifest}


def cache_directory() -> Path:
    """Where rows prepared by `train --data` are kept."""
    return cache_root() / "prepared"


def choose_max_length(wanted: int | None, model_config: "PreTrainedConfig | None", report: Report) -> int:
    """Longest row in tokens: what was asked for, or the model's context, at most 2048.

    Raises:
        UsageError: It is past what the model has position embeddings for.
    """
    context = None if model_config is None else context_length(model_config)
    if wanted is None:
        return min(context or DEFAULT_MAX_LENGTH, DEFAULT_MAX_LENGTH)
    if model_config is not None and context and wanted > context:
        if is_left_out():
            report(Notice(f"PyTorch is asked whether this model has positions past {context}: that takes a moment."))
        if _has_position_table(model_config):
            raise UsageError(
                f"--max-length {wanted} is past the {context} positions that the model has.",
                f"Use: --max-length {context}",
            )
        report(Caution(f"--max-length {wanted} is past the model's context of {context} tokens."))
    return wanted


def _has_position_table(config: "PreTrainedConfig") -> bool:
    if is_left_out():
        return ask_with_torch("qlora_cli.core.models.structure:directory_has_position_table", str(config.name_or_path))
    from qlora_cli.core.models.structure import has_position_table

    return has_position_table(config)


def prepare_cached_rows(
    settings: DataSettings,
    tokenizer: "PreTrainedTokenizerBase",
    model_config: "PreTrainedConfig | None",
    spare: Path,
    report: Report,
) -> PreparedSummary:
    """`prepare_rows` in the cache; in `spare` where that takes no files, which costs time and never the run.

    Raises:
        QloraError: As `prepare_rows`.
    """
    try:
        return prepare_rows(settings, tokenizer, model_config, None, report)
    except (OSError, RunError, DiskFull) as error:
        reason = first_line(error).rstrip(".")
        report(Caution(f"The cache in {cache_root()} cannot be used: {reason}. The rows are in {spare}."))
    return prepare_rows(settings, tokenizer, model_config, spare, report, overwrite=True)


def prepare_rows(
    settings: DataSettings,
    tokenizer: "PreTrainedTokenizerBase",
    model_config: "PreTrainedConfig | None",
    directory: Path | None,
    report: Report,
    *,
    overwrite: bool = False,
    workers: int | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> PreparedSummary:
    """Reads, formats and tokenises data into a prepared directory, unless the same rows are there already.

    Args:
        settings: Where the data is and how it becomes rows.
        tokenizer: The model's tokenizer.
        model_config: For the context length; None if there is no model yet.
        directory: Where the rows go; None for a directory in the cache that is named after the input.
        report: For what was recognised, the progress, and what deserves a look.
        overwrite: Replace other rows in `directory`.
        workers: Processes; by default one a core.
        chunk_bytes: Lines of a file that are tokenised together.

    Returns:
        The summary. Its manifest holds rows, tokens, trained_tokens, lengths (min, p50, p90, p99, max, mean),
        records, truncated, split, dropped (reason → records), lost (what a chat
        template leaves out → conversations, where it does), bad_rows, max_length, overlong, column, train_on,
        formatting, data and tokenizer (identities), rows_sha256 (of the rows) and digest (of all that made them).

    Raises:
        DataError: The data is missing, or holds a bad row, or nothing to train on.
        UsageError: The settings do not fit the data.
        RunError: `directory` holds something else and `overwrite` is off.
        DiskFull: There is no room.
    """
    sets = read_data_sets(settings.data)
    asked = None
    if directory is None:
        sweep(cache_directory())
    else:
        heal(directory)
        sweep_beside(directory)
        reads = [*read_paths(settings), Path(tokenizer.name_or_path)]
        may_replace(directory, PREPARED, overwrite=True, reads=reads, files=PREPARED_FILES)
        asked = partial(may_replace, directory, PREPARED, overwrite=overwrite, reads=reads, files=PREPARED_FILES)
    encoder = encoder_of(tokenizer)
    sources = [resolve_source(data_set.name, settings, report) for data_set in sets]
    max_length = choose_max_length(settings.max_length, model_config, report)
    for sentence in ignored_settings(settings, sources):
        report(Caution(sentence))
    stamps = [source.stamps() for source in sources]
    identity = join_identities(sets, [source.identify(report) for source in sources])
    digest = _digest(settings, encoder, max_length, identity)
    if directory is None:
        directory = cache_directory() / digest[:32]  # whatever is there under this name is a part of the same
    if (manifest := _manifest_of(directory, digest, report)) is not None:
        report(Notice(f"These rows are prepared already in {directory} (same data, tokenizer and settings)."))
        _report_idle(settings, [Formatting.from_dict(manifest["formatting"]).format] if len(sets) == 1 else [], report)
        return PreparedSummary(str(directory), True, manifest)
    place = asked() if asked else directory
    every = [recognise_source(source, settings, encoder) for source in sources]
    for source, recognised in zip(sources, every, strict=True):
        report(Notice(f"{source.name}: {recognised.sentence}."))
        for remark in recognised.remarks:
            report(Notice(remark))
    _report_idle(settings, [found.formatting.format for found in every], report)
    recognised = every[0]
    if any(other.formatting != recognised.formatting for other in every):
        report(Notice(f"generate will format prompts as those of {sources[0].name}, which was named first."))
    total_bytes = None if any(s.total_bytes is None for s in sources) else sum(s.total_bytes or 0 for s in sources)
    with reporting_disk_full(directory), atomic_directory(place) as temporary:
        statistics = PreparationStatistics()
        with _Output(temporary, statistics, settings, total_bytes, report) as output:
            for data_set, source, found in zip(sets, sources, every, strict=True):
                tokeniser_settings = TokeniserSettings(
                    spec=encoder.spec,
                    formatting=found.formatting,
                    train_on=found.train_on,
                    max_length=max_length,
                    overlong=settings.overlong,
                    max_line_bytes=settings.max_line_bytes,
                    vocabulary_size=len(tokenizer),
                    on_lost_content=settings.on_lost_content,
                    rules=found.rules,
                    columns=found.columns,
                )
                chunks = data_set.take(source.chunks(settings.max_line_bytes, chunk_bytes), settings.max_line_bytes)
                processes = count_processes(source.total_bytes, workers, cores=len(os.sched_getaffinity(0)))
                before = statistics.totals()
                with ExitStack() as stack:
                    results: Iterator[TokenisedChunk]
                    if processes == 1:
                        results = map(Tokeniser(tokeniser_settings).process, limited(chunks, settings))
                    else:
                        pool = stack.enter_context(TokeniserPool(tokeniser_settings, processes))
                        results = pool.process_all(limited(chunks, settings))
                    output.write(results)
                statistics.close_set(source.name, data_set.share, before)
        for source, stamp in zip(sources, stamps, strict=True):
            source.check_unchanged(stamp)
        statistics.check(identity["source"])
        manifest = {
            "format": FORMAT,
            "qlora_version": __version__,
            **statistics.to_dict(),
            "max_length": max_length,
            "overlong": settings.overlong,
            **({"data_sets": statistics.sets} if len(sets) > 1 or sets[0].share != 1 else {}),
            "column": recognised.formatting.column or recognised.formatting.completion_column,
            "train_on": recognised.train_on,
            "unused_columns": list(recognised.unused),
            "formatting": recognised.formatting.to_dict(),
            "data": identity,
            "tokenizer": {"name": tokenizer.name_or_path, "sha256": encoder.spec.sha256},
            "digest": digest,
        }
        write_json(temporary / PREPARED_MANIFEST, {**manifest, "sha256": manifest_sha256(manifest)})
    statistics.report(report, directory)
    return PreparedSummary(str(directory), False, manifest)


def _report_idle(settings: DataSettings, formats: list[str], report: Report) -> None:
    for sentence in idle_settings(settings, formats):
        report(Caution(sentence))


def _manifest_of(directory: Path, digest: str, report: Report) -> dict[str, Any] | None:
    """The manifest, if the rows in a directory are whole and the ones wanted."""
    try:
        manifest = PreparedRows(directory).manifest
    except RunError as error:
        if is_prepared(directory):
            report(Caution(f"{error.message} They are made anew."))
        return None
    return manifest if manifest.get("digest") == digest else None


def _digest(settings: DataSettings, encoder: TextEncoder, max_length: int, identity: dict[str, Any]) -> str:
    """Name of the rows that this input gives; nothing else decides what they are."""
    wanted = {f.name: getattr(settings, f.name) for f in fields(DataSettings) if f.name not in ("data", "revision")}
    wanted["shape"] = wanted.pop("format")  # its former name: a digest stays what it was
    wanted["max_length"] = max_length
    if settings.template:
        wanted["template"] = read_template(settings.template)
    if settings.chat_template and Path(settings.chat_template).is_file():
        wanted["chat_template"] = Path(settings.chat_template).read_text(encoding="utf-8", errors="replace")
    facts = [PREPARATION, FORMAT, wanted, identity["sha256"], encoder.spec.sha256, encoder.spec.chat_template]
    facts += [encoder.spec.tool_template] if encoder.spec.tool_template else []
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def recognise_source(source: Source, settings: DataSettings, encoder: TextEncoder) -> Recognised:
    """The format, from the first records that can be read."""
    sample: list[Record] = []
    letters, first_bad = 0, None
    for chunk in source.chunks(settings.max_line_bytes):
        parse_chunk(chunk, settings.max_line_bytes)
        sample += chunk.records
        letters += chunk.letters
        first_bad = first_bad or min(chunk.bad_rows, key=lambda bad: bad.line or 0, default=None)
        if first_bad and settings.on_bad_row == "stop" and not sample:
            raise first_bad.error(len(chunk.bad_rows))
        if len(sample) >= SAMPLE_RECORDS or letters >= SAMPLE_LETTERS:
            break
    if not sample:
        reason = f"; the first: {first_bad}" if first_bad else ""
        raise DataError(f"{source.name} holds no row that can be read{reason}.", "Check --data.")
    return recognise(sample[:SAMPLE_RECORDS], settings, encoder)


def limited(chunks: Iterator[Chunk], settings: DataSettings) -> Iterator[Chunk]:
    """The first --limit rows."""
    if settings.limit is None:
        yield from chunks
        return
    left = settings.limit
    for chunk in chunks:
        rows = count_rows(chunk, settings.max_line_bytes)
        if rows < left:
            left -= rows
            yield chunk
            continue
        parse_chunk(chunk, settings.max_line_bytes)
        chunk.records, chunk.lines = chunk.records[:left], chunk.lines[:left]
        last = chunk.lines[-1] if chunk.lines else 0
        chunk.bad_rows = [bad for bad in chunk.bad_rows if (bad.line or 0) < last]
        yield chunk
        return


class _Output:
    """The files of a preparation: rows and bad rows, counted as they are written; a context manager."""

    def __init__(
        self,
        directory: Path,
        statistics: PreparationStatistics,
        settings: DataSettings,
        total_bytes: int | None,
        report: Report,
    ) -> None:
        self._directory, self._statistics, self._settings = directory, statistics, settings
        self._total_bytes, self._done_bytes, self._report = total_bytes, 0, report
        self._writer = RowWriter(directory / PREPARED_ROWS)
        self._stack = ExitStack()
        self._bad_rows: IO[str] | None = None

    def write(self, results: Iterator[TokenisedChunk]) -> None:
        """Writes and counts chunks as they come.

        Raises:
            DataError: One holds a bad row, and --on-bad-row is stop.
            DiskFull: There is no room.
        """
        statistics = self._statistics
        for chunk in results:
            if chunk.bad_rows and self._settings.on_bad_row == "stop":
                every = not statistics.counts["records"] and len(chunk.bad_rows) == chunk.counts["records"]
                raise chunk.bad_rows[0].error(len(chunk.bad_rows) if every else 0)
            for bad in chunk.bad_rows:
                self._bad_rows = self._bad_rows or self._stack.enter_context(
                    (self._directory / BAD_ROWS).open("w", encoding="utf-8")
                )
                self._bad_rows.write(json.dumps(bad.to_dict(), ensure_ascii=False) + "\n")
            offsets = np.cumsum([0, *chunk.lengths], dtype=np.int32)
            self._writer.write(chunk.input_ids, chunk.trained, offsets, statistics.records_of(chunk))
            statistics.add(chunk)
            self._done_bytes += chunk.source_bytes
            records = statistics.counts["records"]
            self._report(Progress(TASK, records, _estimate(records, self._done_bytes, self._total_bytes)))

    def __enter__(self) -> "_Output":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            self._stack.close()
        finally:
            self._writer.close()
        if error is None:
            self._report(Progress(TASK, self._statistics.counts["records"], self._statistics.counts["records"]))


def _estimate(records: int, done_bytes: int, total_bytes: int | None) -> int | None:
    """Records there will be in all, by the share of bytes read so far; never so few as to mean the end."""
    if not total_bytes or not done_bytes:
        return None
    return max(records + 1, round(records * total_bytes / done_bytes))
