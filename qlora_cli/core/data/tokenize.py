"""Tokeniser: chunks of records to rows of token ids, each trained or not; may run as a process (see `worker_pool`)."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np

from qlora_cli.core.data.chunks import BadRow, Chunk, parse_chunk
from qlora_cli.core.prompts.encoder import Run, TextEncoder, TokenizerSpec
from qlora_cli.core.prompts.formatting import Formatting, RowFormatter
from qlora_cli.core.records.record import BadField, Blank, Record, describe_type
from qlora_cli.errors import QloraError

Row = tuple[np.ndarray, np.ndarray]  # input_ids (n,) int32, trained (n,) bool


@dataclass(frozen=True)
class TokeniserSettings:
    """How records become rows; small enough to be sent to another process."""

    spec: TokenizerSpec
    formatting: Formatting
    train_on: str
    max_length: int
    overlong: str
    max_line_bytes: int
    vocabulary_size: int
    on_lost_content: str = "stop"


@dataclass
class TokenisedChunk:
    """Rows of one chunk.

    Attributes:
        input_ids: (tokens,) int32, rows end to end.
        trained: (tokens,) bool.
        lengths: (rows,) int32.
        counts: records (read, good and bad); truncated (rows cut at the limit); split (records that became several
            rows); closed (pre-tokenised rows that were given a BOS or EOS, or whose EOS was made trained); unanswered
            (conversations whose last messages had no answer and were left out); unfolded (conversations that became a
            row for each answer); moved (conversations whose system turns were put where the chat template prints
            them); lost_text, lost_thought, lost_call, lost_tool (conversations of which the chat template leaves one out).
        dropped: Reason → records left out.
        bad_rows: In order.
        source_bytes: As in Chunk.
    """

    input_ids: np.ndarray
    trained: np.ndarray
    lengths: np.ndarray
    counts: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    bad_rows: list[BadRow] = field(default_factory=list)
    source_bytes: int = 0


class Tokeniser:
    """Turns chunks into rows under fixed settings."""

    def __init__(self, settings: TokeniserSettings) -> None:
        self._settings = settings
        self._encoder = TextEncoder(settings.spec)
        self._formatter = RowFormatter(settings.formatting, self._encoder, settings.on_lost_content)

    def process(self, chunk: Chunk) -> TokenisedChunk:
        """Parses, formats, tokenises and fits one chunk."""
        parse_chunk(chunk, self._settings.max_line_bytes)
        if self._settings.formatting.format == "tokens":
            result = self._gather(chunk)
        else:
            result = self._tokenise(chunk)
        result.counts["records"] = len(chunk.records) + len(chunk.bad_rows)
        result.bad_rows = sorted(chunk.bad_rows + result.bad_rows, key=lambda bad: bad.line or 0)
        result.source_bytes = chunk.source_bytes
        self._fit(result)
        return result

    def _tokenise(self, chunk: Chunk) -> TokenisedChunk:
        rows: list[list[Run]] = []
        dropped: Counter[str] = Counter()
        bad_rows = []
        self._formatter.counts.clear()
        formatted = self._formatter.format_records(chunk.records, self._settings.train_on)
        for line, row in zip(chunk.lines, formatted, strict=True):
            if isinstance(row, Blank):
                dropped[str(row)] += 1
            elif isinstance(row, BadField):
                bad_rows.append(BadRow(chunk.file, line, str(row)))
            else:
                rows += row
        encoded = self._encoder.encode_rows(rows)  # row → run → ids
        runs = list(chain.from_iterable(encoded))
        run_lengths = np.fromiter(map(len, runs), dtype=np.int64, count=len(runs))
        run_trained = np.fromiter((trained for row in rows for _, trained in row), dtype=bool, count=len(runs))
        input_ids = np.fromiter(chain.from_iterable(runs), dtype=np.int32, count=int(run_lengths.sum()))
        first_runs = np.cumsum([0, *map(len, encoded)])[:-1]
        lengths = np.add.reduceat(run_lengths, first_runs) if rows else run_lengths
        trained = np.repeat(run_trained, run_lengths)
        return TokenisedChunk(
            input_ids,
            trained,
            lengths.astype(np.int32),
            Counter(self._formatter.counts),
            dropped,
            bad_rows=bad_rows,
        )

    def _gather(self, chunk: Chunk) -> TokenisedChunk:
        rows: list[Row] = []
        result = TokenisedChunk(np.empty(0, np.int32), np.empty(0, bool), np.empty(0, np.int32))
        for line, record in zip(chunk.lines, chunk.records, strict=True):
            try:
                row = self._given_tokens(record)
            except BadField as reason:
                result.bad_rows.append(BadRow(chunk.file, line, str(reason)))
                continue
            if not row[1].any():
                result.dropped["every token is masked" if row[0].size else "no tokens"] += 1
                continue
            closed = self._close(*row)
            result.counts["closed"] += closed[0] is not row[0]
            rows.append(closed)
        _store(result, rows)
        return result

    def _given_tokens(self, record: Record) -> Row:
        """A record's own ids; trained where its labels are not -100, or everywhere."""
        column = str(self._settings.formatting.column)
        ids = _integers(record, column)
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < self._settings.vocabulary_size:
            wrong = ids[(ids < 0) | (ids >= self._settings.vocabulary_size)][0]
            raise BadField(f"field {column!r} holds {wrong}, which is no token of this tokenizer")
        trained = np.ones(ids.size, dtype=bool)
        real = np.ones(ids.size, dtype=bool)
        for name in ("labels", "attention_mask"):
            if record.get(name) is None:
                continue
            values = _integers(record, name)
            if values.size != ids.size:
                raise BadField(f"field {name!r} has {values.size} entries, but {column!r} has {ids.size}")
            if name == "labels" and self._settings.train_on != "all":
                trained = values != -100
            elif name == "attention_mask":
                real = values != 0  # padding is no part of a row
        return ids[real].astype(np.int32), trained[real]

    def _close(self, ids: np.ndarray, trained: np.ndarray) -> Row:
        eos, prefix = self._encoder.spec.eos_id, self._encoder.spec.prefix_ids
        missing = [] if not prefix or ids[0] == prefix[0] else list(prefix)
        ending = [] if ids[-1] == eos else [eos]
        if not missing and not ending and trained[-1]:
            return ids, trained
        ids = np.concatenate([missing, ids, ending]).astype(np.int32)
        trained = np.concatenate([np.zeros(len(missing), bool), trained, np.ones(len(ending), bool)])
        trained[-1] = True
        return ids, trained

    def _fit(self, result: TokenisedChunk) -> None:
        """Applies the length limit and leaves out rows in which nothing is trained."""
        limit, overlong = self._settings.max_length, self._settings.overlong
        if result.lengths.size and int(result.lengths.max()) > limit:
            if overlong == "split":
                self._split(result)
            elif overlong == "drop":
                result.dropped[f"longer than {limit} tokens"] += int((result.lengths > limit).sum())
                _keep(result, result.lengths <= limit)
        starts = np.cumsum(result.lengths) - result.lengths
        cut = result.lengths > limit
        if cut.any():
            positions = np.arange(result.input_ids.size) - np.repeat(starts, result.lengths)
            result.input_ids, result.trained = result.input_ids[positions < limit], result.trained[positions < limit]
            result.lengths = np.minimum(result.lengths, limit).astype(np.int32)
            starts = np.cumsum(result.lengths) - result.lengths
        if not result.lengths.size:
            return
        result.trained[starts] = False  # nothing stands before a row's first token to predict it from
        has_trained = np.add.reduceat(result.trained, starts, dtype=np.int64) > 0
        if not has_trained.all():
            for reason, lost in (
                ("nothing left to train within --max-length", ~has_trained & cut),
                ("nothing to train", ~has_trained & ~cut),
            ):
                if lost.any():
                    result.dropped[reason] += int(lost.sum())
            _keep(result, has_trained)
        result.counts["truncated"] = int((cut & has_trained).sum())

    def _split(self, result: TokenisedChunk) -> None:
        """Cuts each long row into parts of at most the limit, each with the tokenizer's prefix (BOS)."""
        limit = self._settings.max_length
        prefix = np.array(self._encoder.spec.prefix_ids, dtype=np.int32)
        step = limit - prefix.size
        parts: list[Row] = []
        for ids, trained in _rows(result):
            parts.append((ids[:limit], trained[:limit]))
            result.counts["split"] += ids.size > limit
            for start in range(limit, ids.size, step):
                parts.append(
                    (
                        np.concatenate([prefix, ids[start : start + step]]),
                        np.concatenate([np.zeros(prefix.size, bool), trained[start : start + step]]),
                    )
                )
        _store(result, parts)


def _integers(record: Record, name: str) -> np.ndarray:
    value = record.get(name)
    if name not in record:
        raise BadField(f"field {name!r} is missing (it has {', '.join(map(repr, record))})")
    if not isinstance(value, list):
        raise BadField(f"field {name!r} is {describe_type(value)}, not a list of numbers")
    for item in value:
        if type(item) is not int:
            raise BadField(f"field {name!r} holds {describe_type(item)} where a whole number belongs")
    return np.array(value, dtype=np.int64)


def _rows(result: TokenisedChunk) -> list[Row]:
    borders = np.cumsum(result.lengths)[:-1]
    return list(zip(np.split(result.input_ids, borders), np.split(result.trained, borders), strict=True))


def _store(result: TokenisedChunk, rows: Sequence[Row]) -> None:
    result.input_ids = np.concatenate([np.empty(0, np.int32), *(ids for ids, _ in rows)])
    result.trained = np.concatenate([np.empty(0, bool), *(trained for _, trained in rows)])
    result.lengths = np.array([ids.size for ids, _ in rows], dtype=np.int32)


def _keep(result: TokenisedChunk, wanted: np.ndarray) -> None:
    tokens = np.repeat(wanted, result.lengths)
    result.input_ids, result.trained = result.input_ids[tokens], result.trained[tokens]
    result.lengths = result.lengths[wanted]


def serve(connection: Any) -> None:
    """Answers requests until the pipe closes: first the settings, then chunks; an error is sent as what it is."""
    try:
        settings = connection.recv()
        tokeniser: Tokeniser | None = None
        while True:
            chunk = connection.recv()
            try:
                tokeniser = tokeniser or Tokeniser(settings)
                answer: TokenisedChunk | QloraError = tokeniser.process(chunk)
            except QloraError as error:
                answer = error
            connection.send(answer)
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        return
