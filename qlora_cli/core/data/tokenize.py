"""Tokeniser: chunks of records to rows of token ids, each trained or not; may run as a process (see `worker_pool`)."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np

from qlora_cli.core.prompts.chat_rows import SETTINGS_COLUMN
from qlora_cli.core.prompts.encoder import Run, TextEncoder, TokenizerSpec
from qlora_cli.core.prompts.formatting import Formatted, Formatting, RowFormatter
from qlora_cli.core.reading.chunks import BadRow, Chunk, parse_chunk
from qlora_cli.core.records.record import NOTHING, BadField, Blank, Record, describe_type
from qlora_cli.core.records.rules import BESIDE_IDS, GIVEN_MASKS, RowRules, part_of
from qlora_cli.errors import QloraError

# Columns of a format that are read in whatever row has them.
READ_ANYWAY = {"chat": {SETTINGS_COLUMN}, "tokens": {*BESIDE_IDS}}
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
    rules: RowRules = field(default_factory=RowRules)
    columns: frozenset[str] | None = None  # that are used, or hold something in the first rows; None: all


@dataclass
class TokenisedChunk:
    """Rows of one chunk.

    Attributes:
        input_ids: (tokens,) int32, rows end to end.
        trained: (tokens,) bool.
        lengths: (rows,) int32.
        origins: (rows,) int64, which record of the chunk each row comes from: rows of one record stay together where
            rows are held out.
        counts: records (read, good and bad); truncated (rows cut at the limit); split (records that became several
            rows); padded (pre-tokenised rows without padding that no mask told of); closed (pre-tokenised rows that
            were given a BOS or EOS, or whose EOS was made trained); unanswered (conversations whose last messages had
            no answer and were left out); unfolded (conversations that became a row for each answer); moved
            (conversations whose system turns were put where the chat template prints them); reordered (conversations
            whose results of tools were put into the order of the calls); weighed (conversations that say of turns which
            are no answers that they are trained); hollow (conversations in which it writes an empty thought before
            trained answers); lost_text, lost_thought, lost_call, lost_tool (conversations of which the chat template
            leaves one out); unread_KEY (conversations with a key of messages that nothing reads); doubled_KEY (objects
            that hold a key twice).
        dropped: Reason → records left out.
        unseen: Column in which the first rows hold nothing → records that hold something in it.
        bad_rows: In order.
        source_bytes: As in Chunk.
    """

    input_ids: np.ndarray
    trained: np.ndarray
    lengths: np.ndarray
    origins: np.ndarray
    counts: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    bad_rows: list[BadRow] = field(default_factory=list)
    source_bytes: int = 0
    unseen: Counter[str] = field(default_factory=Counter)


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
        result.counts.update({f"doubled_{key}": count for key, count in chunk.doubled.items()})
        result.counts.update(f"part_{part}" for part in map(part_of, chunk.records) if part)
        if self._settings.columns is not None:
            known = self._settings.columns | READ_ANYWAY.get(self._settings.formatting.format, set())
            later = ((record, record.keys() - known) for record in chunk.records if not known.issuperset(record))
            result.unseen = Counter(name for record, names in later for name in names if record[name] not in NOTHING)
        self._fit(result)
        return result

    def _tokenise(self, chunk: Chunk) -> TokenisedChunk:
        rows: list[list[Run]] = []
        origins: list[int] = []
        dropped: Counter[str] = Counter()
        bad_rows = []
        self._formatter.counts.clear()
        for number, (line, row) in enumerate(zip(chunk.lines, self._format(chunk.records), strict=True)):
            if isinstance(row, Blank):
                dropped[str(row)] += 1
            elif problem := str(row) if isinstance(row, BadField) else self._problem_of(row):
                bad_rows.append(BadRow(chunk.file, line, problem, row.way if isinstance(row, BadField) else ""))
            else:
                assert not isinstance(row, BadField)
                rows += row
                origins += [number] * len(row)
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
            np.array(origins, dtype=np.int64),
            Counter(self._formatter.counts),
            dropped,
            bad_rows=bad_rows,
        )

    def _problem_of(self, rows: list[list[Run]]) -> str | None:
        return next(filter(None, map(self._encoder.problem_of, rows)), None)

    def _format(self, records: list[Record]) -> list[Formatted]:
        """The rows of each record, or why there are none, after the rules of the data set."""
        rules = self._settings.rules
        if not rules:
            return self._formatter.format_records(records, self._settings.train_on)
        reasons: list[BadField | Blank | None] = []
        kept: list[Record] = []
        for record in records:
            try:
                kept.append(rules.apply(record))
                reasons.append(None)
            except (BadField, Blank) as reason:
                reasons.append(reason)
        formatted = iter(self._formatter.format_records(kept, self._settings.train_on))
        return [reason or next(formatted) for reason in reasons]

    def _gather(self, chunk: Chunk) -> TokenisedChunk:
        rows: list[Row] = []
        origins: list[int] = []
        result = TokenisedChunk(np.empty(0, np.int32), np.empty(0, bool), np.empty(0, np.int32), np.empty(0, np.int64))
        for number, (line, record) in enumerate(zip(chunk.lines, chunk.records, strict=True)):
            try:
                parts = self._given_rows(self._settings.rules.apply(record))
            except BadField as reason:
                result.bad_rows.append(BadRow(chunk.file, line, str(reason), reason.way))
                continue
            except Blank as reason:
                result.dropped[str(reason)] += 1
                continue
            result.counts["unpacked"] += len(parts) > 1
            is_shorter = sum(ids.size for ids, _ in parts) < len(record[str(self._settings.formatting.column)])
            result.counts["padded"] += is_shorter and record.get("attention_mask") is None
            for ids, trained in parts:
                if not trained.any():
                    result.dropped["every token is masked" if ids.size else "no tokens"] += 1
                    continue
                closed = self._close(ids, trained)
                result.counts["closed"] += closed[0] is not ids
                rows.append(closed)
                origins.append(number)
        _store(result, rows, np.array(origins, dtype=np.int64))
        return result

    def _given_rows(self, record: Record) -> list[Row]:
        """A record's own ids, cut where its positions begin anew; trained where labels and masks say so, or everywhere."""
        column = str(self._settings.formatting.column)
        ids = _integers(record, column)
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < self._settings.vocabulary_size:
            wrong = ids[(ids < 0) | (ids >= self._settings.vocabulary_size)][0]
            raise BadField(f"field {column!r} holds {wrong}, which is no token of this tokenizer")
        trained = np.ones(ids.size, dtype=bool)
        real = np.ones(ids.size, dtype=bool) if record.get("attention_mask") is not None else self._without_padding(ids)
        borders = np.zeros(ids.size, dtype=bool)
        for name in BESIDE_IDS:
            if record.get(name) is None:
                continue
            values = _integers(record, name, or_flags=name not in ("labels", "position_ids"))
            if values.size != ids.size:
                raise BadField(f"field {name!r} has {values.size} entries, but {column!r} has {ids.size}")
            if name == "labels" and self._settings.train_on != "all":
                trained &= values != -100
                if (others := np.flatnonzero(trained & real & (values != ids))).size:
                    at = int(others[0])
                    raise BadField(
                        f"field 'labels' holds {values[at]} where {column!r} holds {ids[at]}; a label is the token itself, "
                        "or -100 where it is not trained",
                        "Train every token: --train-on all.",
                    )
            elif name in GIVEN_MASKS and self._settings.train_on != "all":
                trained &= values != 0
            elif name == "attention_mask":
                real = values != 0  # padding is no part of a row
            elif name == "position_ids":
                borders = np.append(False, np.diff(values) < 0)[: ids.size]
        cuts = np.flatnonzero(borders[real])
        ids, trained = ids[real].astype(np.int32), trained[real]
        return list(zip(np.split(ids, cuts), np.split(trained, cuts), strict=True))

    def _without_padding(self, ids: np.ndarray) -> np.ndarray:
        """(n,) bool, False for what fills a row up at its ends: padding tokens; where these are EOS too, all
        but the first at the end, and at the beginning if there are several."""
        spec = self._encoder.spec
        padding = self._encoder.control_ids.get(spec.names.get("pad_token", ""))
        if padding is None or padding in spec.prefix_ids or padding not in (*ids[:1], *ids[-1:]):
            return np.ones(ids.size, dtype=bool)
        words = np.flatnonzero(ids != padding)
        if not words.size:
            return np.ones(ids.size, dtype=bool)
        first, last = words[0], words[-1]
        if padding == spec.eos_id:  # one at the beginning may stand between documents
            first, last = (first if first > 1 else 0), last + 1
        places = np.arange(ids.size)
        return (places >= first) & (places <= last)

    def _close(self, ids: np.ndarray, trained: np.ndarray) -> Row:
        eos, prefix = self._encoder.spec.eos_id, self._encoder.spec.prefix_ids
        missing = [] if not prefix or ids[0] == prefix[0] else list(prefix)
        ending = [] if ids[-1] == eos else [eos]
        # An EOS is trained where the words before it are. Collators that mask padding mask it too where both are one
        # token; but where the data masks a row's last words, nothing after them is trained either.
        last = bool(trained[-1]) or bool(not ending and ids.size > 1 and trained[-2])
        if not missing and not ending and trained[-1] == last:
            return ids, trained
        ids = np.concatenate([missing, ids, ending]).astype(np.int32)
        trained = np.concatenate([np.zeros(len(missing), bool), trained, np.full(len(ending), last)])
        trained[-1] = last
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
        """Cuts each long row into parts of at most the limit, each with the tokenizer's prefix (BOS).

        Parts in which nothing can be trained are left out, unless that is the whole row. A last token that would stand
        alone in its part, with nothing to predict it from, has the one before it there too.
        """
        limit = self._settings.max_length
        prefix = np.array(self._encoder.spec.prefix_ids, dtype=np.int32)
        step = limit - prefix.size
        parts: list[Row] = []
        origins: list[int] = []
        for origin, (ids, trained) in zip(result.origins.tolist(), _rows(result), strict=True):
            own = [(ids[:limit], trained[:limit])]
            result.counts["split"] += ids.size > limit
            for start in range(limit, ids.size, step):
                begin = start - (not prefix.size and start + 1 == ids.size)
                stop = start + step
                masked = np.zeros(prefix.size, bool)
                own.append((np.concatenate([prefix, ids[begin:stop]]), np.concatenate([masked, trained[begin:stop]])))
            parts += [part for part in own if part[1][1:].any()] or own[:1]
            origins += [origin] * (len(parts) - len(origins))
        _store(result, parts, np.array(origins, dtype=np.int64))


def _integers(record: Record, name: str, *, or_flags: bool = False) -> np.ndarray:
    value = record.get(name)
    if name not in record:
        raise BadField(f"field {name!r} is missing (it has {', '.join(map(repr, record))})")
    if not isinstance(value, list):
        raise BadField(f"field {name!r} is {describe_type(value)}, not a list of numbers")
    for item in value:
        if type(item) is not int and not (or_flags and type(item) is bool):
            raise BadField(f"field {name!r} holds {describe_type(item)} where a whole number belongs")
    try:
        return np.array(value, dtype=np.int64)
    except OverflowError:
        largest = max(value, key=abs)
        raise BadField(f"field {name!r} holds {largest:.3g}, which is no token of any tokenizer") from None


def _rows(result: TokenisedChunk) -> list[Row]:
    borders = np.cumsum(result.lengths)[:-1]
    return list(zip(np.split(result.input_ids, borders), np.split(result.trained, borders), strict=True))


def _store(result: TokenisedChunk, rows: Sequence[Row], origins: np.ndarray) -> None:
    result.input_ids = np.concatenate([np.empty(0, np.int32), *(ids for ids, _ in rows)])
    result.trained = np.concatenate([np.empty(0, bool), *(trained for _, trained in rows)])
    result.lengths = np.array([ids.size for ids, _ in rows], dtype=np.int32)
    result.origins = origins


def _keep(result: TokenisedChunk, wanted: np.ndarray) -> None:
    tokens = np.repeat(wanted, result.lengths)
    result.input_ids, result.trained = result.input_ids[tokens], result.trained[tokens]
    result.lengths, result.origins = result.lengths[wanted], result.origins[wanted]


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
