"""Preparation statistics: what became of every row, as counts, lengths, a digest, and the sentences that report them."""

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from qlora_cli.artifacts import BAD_ROWS
from qlora_cli.core.data.tokenize import TokenisedChunk
from qlora_cli.core.reading.chunks import BadRow
from qlora_cli.core.records.rules import HELD_OUT, PARTS
from qlora_cli.errors import DataError
from qlora_cli.events import Caution, Notice, Report
from qlora_cli.settings.groups import COLUMN_FLAGS
from qlora_cli.sizes import format_count

# Kinds of content that a chat template may leave out, in words.
LOST = {
    "text": "texts (or prints them elsewhere, or once more between tags that they stand between)",
    "thought": "thoughts of trained answers (or prints an empty one before them)",
    "call": "tool calls or arguments",
    "tool": "descriptions of tools",
}
UNREAD, DOUBLED, PART = "unread_", "doubled_", "part_"  # before keys, among the counts


class PreparationStatistics:
    """Counts what became of every row, chunk by chunk."""

    def __init__(self) -> None:
        self.lengths: list[np.ndarray] = []
        self.dropped: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()  # as in TokenisedChunk, with trained_tokens and bad_rows
        self.first_bad: list[BadRow] = []
        self.unseen: Counter[str] = Counter()
        self.sets: list[dict[str, Any]] = []  # of each data set: name, share, records, rows, tokens, trained_tokens
        self._hashes = [hashlib.sha256() for _ in range(3)]
        self._records_hash = hashlib.sha256()

    def add(self, chunk: TokenisedChunk) -> None:
        """Counts one chunk."""
        self.lengths.append(chunk.lengths)
        self._records_hash.update(self.records_of(chunk).tobytes())
        self.dropped += chunk.dropped
        self.unseen += chunk.unseen
        self.counts += chunk.counts + Counter(trained_tokens=int(chunk.trained.sum()), bad_rows=len(chunk.bad_rows))
        self.first_bad += chunk.bad_rows[: 3 - len(self.first_bad)]
        for hashed, values in zip(self._hashes, (chunk.input_ids, chunk.trained, chunk.lengths), strict=True):
            hashed.update(values.tobytes())

    @property
    def lost(self) -> dict[str, int]:
        """Conversations of which the chat template leaves something out, by what it is."""
        return {kind: count for kind in LOST if (count := self.counts[f"lost_{kind}"])}

    def _keys(self, prefix: str) -> Counter[str]:
        return Counter({key.removeprefix(prefix): n for key, n in self.counts.items() if key.startswith(prefix)})

    def records_of(self, chunk: TokenisedChunk) -> np.ndarray:
        """(rows,) int64, the number of the record that each row of the next chunk comes from, counted from the first."""
        return chunk.origins + self.counts["records"]

    def totals(self) -> Counter[str]:
        """Records, rows, tokens and trained tokens so far."""
        return Counter(
            records=self.counts["records"],
            rows=sum(lengths.size for lengths in self.lengths),
            tokens=sum(int(lengths.sum(dtype=np.int64)) for lengths in self.lengths),
            trained_tokens=self.counts["trained_tokens"],
        )

    def close_set(self, name: str, share: float, before: Counter[str]) -> None:
        """Notes what one data set has given since `before`."""
        now = self.totals()
        self.sets.append({"name": name, "share": share, **{key: now[key] - before[key] for key in now}})

    def check(self, data: str) -> None:
        """Raises DataError if no row is left."""
        if any(lengths.size for lengths in self.lengths):
            return
        records, bad = format_count(self.counts["records"], "row"), self.counts["bad_rows"]
        if self.first_bad and not self.dropped:
            raise DataError(
                f"Of {records} in {data} none can be trained on; the first: {self.first_bad[0]}.",
                self.first_bad[0].way
                or f"If that is wrong with all of them, mend it there, or name other columns: {COLUMN_FLAGS}.",
            )
        reasons = [f"{count} {reason}" for reason, count in self.dropped.most_common()]
        reasons += [f"{format_count(bad, 'bad row')}, the first {self.first_bad[0]}"] if self.first_bad else []
        raise DataError(
            f"Of {records} in {data} none is left to train on ({'; '.join(reasons) or 'no rows'}).",
            "Check the columns and --max-length.",
        )

    def to_dict(self) -> dict[str, Any]:
        """The counts as the manifest keeps them; lengths are in tokens."""
        lengths = np.concatenate(self.lengths)
        low, median, p90, p99, high = np.percentile(lengths, [0, 50, 90, 99, 100], method="nearest").tolist()
        return {
            "rows": int(lengths.size),
            "tokens": int(lengths.sum(dtype=np.int64)),
            "trained_tokens": self.counts["trained_tokens"],
            "lengths": {
                "min": low,
                "p50": median,
                "p90": p90,
                "p99": p99,
                "max": high,
                "mean": round(float(lengths.mean()), 1),
            },
            **{name: self.counts[name] for name in ("records", "truncated", "split")},
            "dropped": dict(self.dropped),
            **({"lost": self.lost} if self.lost else {}),
            "bad_rows": self.counts["bad_rows"],
            "rows_sha256": hashlib.sha256(b"".join(hashed.digest() for hashed in self._hashes)).hexdigest(),
            "records_sha256": self._records_hash.hexdigest(),
        }

    def report(self, report: Report, directory: Path) -> None:
        """Reports everything that was not taken as it came."""
        counts, records = self.counts, self.counts["records"]
        rows, conversations = format_count(records, "row"), format_count(records, "conversation")
        if len(self.sets) > 1 or any(part["share"] != 1 for part in self.sets):
            for part in self.sets:
                share = f" (the share {part['share']:g} of all)" if part["share"] != 1 else ""
                report(
                    Notice(
                        f"{part['name']}: {format_count(part['records'], 'record')}{share} became "
                        f"{format_count(part['rows'], 'row')} of {format_count(part['tokens'], 'token')}, "
                        f"{part['trained_tokens']:,} trained."
                    )
                )
        if count := counts["truncated"]:
            cut = f"{_were(count)} cut at --max-length and {_have(count)} no end of text"
            report(Caution(f"{count} of {rows} {cut}; --overlong split would keep what was cut off."))
        if count := counts["split"]:
            report(Notice(f"{count} of {rows} {_were(count)} split at --max-length."))
        for reason, count in self.dropped.most_common():
            report(Caution(f"{count} of {rows} {_were(count)} left out: {reason}."))
        if self.unseen:
            report(
                Caution(
                    f"Columns in which the first rows hold nothing are not used: {_name_most(self.unseen, 'row')}. To have them "
                    "recognised, put one of these rows first."
                )
            )
        if doubled := self._keys(DOUBLED):
            report(
                Caution(
                    f"Keys that stand twice in an object, with different values: {_name_most(doubled, 'object')}. The last "
                    "value of each counts."
                )
            )
        for name in PARTS:
            said = self._keys(f"{PART}{name}=")
            held = Counter({value: n for value, n in said.items() if value.strip().lower() in HELD_OUT})
            if held and len(held) < len(said):
                report(
                    Caution(
                        f"Rows that {name!r} keeps from training are trained with the others: {_name_most(held, 'row')}. Of JSON "
                        f'lines, this leaves them out: grep -vE \'"{name}": *"({"|".join(sorted(held))})"\' DATA.jsonl > train.jsonl'
                    )
                )
        if unread := self._keys(UNREAD):
            report(Notice(f"Keys of messages that are not used: {_name_most(unread, 'conversation')}."))
        if count := counts["weighed"]:
            says = "says" if count == 1 else "say"
            report(
                Notice(
                    f"{format_count(count, 'conversation')} {says} of turns that are no answers that they are trained, which "
                    "does nothing: --train-on all trains these too."
                )
            )
        if count := counts["closed"]:
            lacked = (
                "the beginning or end token that it lacked"
                if count == 1
                else "the beginning or end token that they lacked"
            )
            report(Notice(f"{format_count(count, 'row')} {_were(count)} given {lacked}."))
        if count := counts["padded"]:
            ends = "its ends" if count == 1 else "their ends"
            report(Notice(f"{count} of {rows} {_were(count)} filled up with padding, which was taken off {ends}."))
        if count := counts["unpacked"]:
            report(Notice(f"{count} of {rows} {_were(count)} packed beforehand and became a row for each example."))
        if count := counts["unanswered"]:
            ends = "ends" if count == 1 else "end"
            report(
                Notice(
                    f"{format_count(count, 'conversation')} {ends} in messages without an answer, which were left out."
                )
            )
        if count := counts["unfolded"]:
            report(
                Notice(
                    f"{count} of {conversations} became a row for each answer, because the chat template shows "
                    "an answer differently once another follows; --train-on last takes one each."
                )
            )
        if count := counts["moved"]:
            report(
                Notice(
                    f"{format_count(count, 'conversation')} {_have(count)} system or developer turns that the chat template does "
                    "not print as they stand; they were put into its system turn, or into the user turn that follows."
                )
            )
        if count := counts["reordered"]:
            report(
                Notice(
                    f"{format_count(count, 'conversation')} {_have(count)} results of tools in another order than the calls, and the "
                    "chat template prints no ids: they were put into the order of the calls."
                )
            )
        if count := counts["hollow"]:
            report(
                Notice(
                    f"The chat template writes an empty thought before answers that have none, in {count} of "
                    f"{conversations}, and it is trained. Where the template reads it, --template-setting "
                    "enable_thinking=false leaves it to the prompt."
                )
            )
        for kind, count in self.lost.items():
            report(
                Caution(
                    f"The chat template leaves out {LOST[kind]} in {count} of {conversations}; what is left is trained "
                    "all the same."
                )
            )
        if count := counts["bad_rows"]:
            report(
                Caution(
                    f"{count} of {rows} {'is' if count == 1 else 'are'} bad and {_were(count)} skipped, listed in "
                    f"{directory / BAD_ROWS}. "
                    f"The first: {self.first_bad[0]}."
                )
            )


def _name_most(counts: Counter[str], where: str) -> str:
    """The names that are counted most, each with how often."""
    most = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:9]
    shown = ", ".join(f"{name!r} (in {format_count(count, where)})" for name, count in most)
    return shown + (f", and {len(counts) - 9} more" if len(counts) > 9 else "")


def _were(count: int) -> str:
    return "was" if count == 1 else "were"


def _have(count: int) -> str:
    return "has" if count == 1 else "have"
