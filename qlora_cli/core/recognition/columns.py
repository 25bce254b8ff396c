"""Columns of a data set: their names, and what (almost) every one of the first rows holds in them."""

import difflib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from qlora_cli.core.records.messages import ROLE_KEYS, is_transcript, role_of, turns_of
from qlora_cli.core.records.record import Record, decode_nested, fields_in, says_nothing, with_fields
from qlora_cli.errors import UsageError

ALMOST_ALL = 0.9  # of the rows: what a format has to explain, or it is not taken
# Names under which a list of texts is a conversation, user and assistant in turn, and a transcript is one; elsewhere they
# may be tags, and who spoke in a recording.
CONVERSATIONS = (
    "messages",
    "conversations",
    "conversation",
    "dialogue",
    "dialog",
    "chat",
    "turns",
    "utterances",
    "data",
)
# Answers that are preferred, and those that they are preferred to.
PREFERENCES = (
    ("chosen", "rejected"),
    ("chosen_response", "rejected_response"),
    ("response_chosen", "response_rejected"),
    ("preferred_output", "non_preferred_output"),
)
# (prompt, columns that may be empty, completion), in the order they are looked for; names compare without case.
PAIRS: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("instruction", ("input", "context"), ("output", "response", "answer", "completion", "generation")),
    ("question", ("context",), ("answer", "response", "output", "completion", "answers")),
    ("prompt", (), ("completion", "response", "answer", "output", "generation")),
    ("query", ("context",), ("response", "answer", "output", "completion", "answers")),
    ("problem", (), ("solution", "answer")),
    ("input", (), ("output", "target", "response", "completion", "answer", "ideal")),
    ("inputs", (), ("targets",)),
    ("inputs_pretokenized", (), ("targets_pretokenized",)),
    ("source", (), ("target",)),
    ("user", (), ("assistant",)),
    ("human", (), ("assistant", "bot")),
    ("q", (), ("a",)),
    ("context", (), ("response",)),
)
ANSWERS = tuple(dict.fromkeys(name for _, _, completions in PAIRS for name in completions))
ASKING = ("user", "tool", "system", "developer")  # whose turns are no answers
NAMES_SHOWN = 40  # of columns, in a message
YES_OR_NO = {"true", "false"}


def list_names(names: Sequence[str]) -> str:
    """Names of columns for a message; of very many only the first."""
    more = f", and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(repr(name) if name else "one without a name" for name in names[:NAMES_SHOWN]) + more


def named_like_answers(names: Sequence[str]) -> list[str]:
    """Those of these names that end in the word for an answer: `model_outputs`, `answer1`, `response_a`, `target_text`."""
    return [name for name in names if len(word := _last_word(name)) > 1 and word in ANSWERS]


def _last_word(name: str) -> str:
    words = [word.rstrip("0123456789").removesuffix("s") for word in re.split(r"[\W_]+", name.lower())]
    return next((word for word in reversed(words) if len(word) > 1 and word != "text"), "")


class Columns:
    """Names and sample values of the columns.

    Attributes:
        records: The first rows of the data.
        names: In the order in which they come.
        roles: As given.

    Args:
        records: As they are in the data.
        inner: Dotted names of fields inside objects, which count like columns in the place of these objects. They are
            found by the field's name too.
        roles: Names of roles in this data → names that chat templates know, beside ROLES.
    """

    def __init__(
        self, records: Sequence[Record], inner: Sequence[str] = (), roles: Mapping[str, str] | None = None
    ) -> None:
        self.roles = roles or {}
        opened = {name.partition(".")[0] for name in inner}
        self.records = [
            {name: value for name, value in with_fields(record, inner).items() if name not in opened}
            for record in records
        ]
        self.names = list(dict.fromkeys(name for record in self.records for name in record))
        found = [name for name in inner if name in self.names]
        self._by_lower = {name.rpartition(".")[2].lower(): name for name in reversed(found)}
        self._by_lower |= {name.lower(): name for name in reversed(self.names)}

    def find(self, wanted: Iterable[str]) -> str | None:
        """The first of these names that is there, in any case of letters."""
        return next((self._by_lower[name] for name in wanted if name in self._by_lower), None)

    def preference(self) -> tuple[str, str] | tuple[None, None]:
        """The columns of preferred answers and of those that they are preferred to, where there are both."""
        found = [(good, bad) for good, bad in PREFERENCES if {good, bad} <= self._by_lower.keys()]
        return (self._by_lower[found[0][0]], self._by_lower[found[0][1]]) if found else (None, None)

    def rejected(self) -> list[str]:
        """The columns of answers that others are preferred to, whether or not these are there as well."""
        return [self._by_lower[bad] for _, bad in PREFERENCES if bad in self._by_lower]

    def require(self, name: str, flag: str) -> str:
        """The name itself, if it is a column.

        Raises:
            UsageError: It is none.
        """
        if name in self.names:
            return name
        close = difflib.get_close_matches(name, self.names, n=1, cutoff=0.4)
        raise UsageError(
            f"There is no column {name!r}; the data has {self.listed}.",
            f"Did you mean {flag} {close[0]}?" if close else f"Choose one of them for {flag.partition(' ')[0]}.",
        )

    @property
    def listed(self) -> str:
        """The names, for a message."""
        return list_names(self.names)

    def values(self, name: str) -> list[Any]:
        """What the rows hold in a column, without nulls."""
        return [record[name] for record in self.records if record.get(name) is not None]

    def fields_of(self, name: str) -> list[str]:
        """The fields of the objects in a column, as they may be named in its place."""
        inside = [fields_in(value) or {} for value in self.values(name)]
        return [f"{name}.{field}" for field in dict.fromkeys(field for fields in inside for field in fields)]

    def explained(self, name: str, is_so: Callable[[Any], bool]) -> int:
        """Rows in which a column's value is so, or in which it is there and empty: such a row is a bad one by itself."""
        given = [record[name] for record in self.records if name in record]
        return sum(value is None or value in ("", []) or is_so(value) for value in given)

    def holds(self, name: str, is_so: Callable[[Any], bool]) -> bool:
        """Whether (almost) every row's value is so, and one at least."""
        values = self.values(name)
        return any(map(is_so, values)) and self.explained(name, is_so) >= ALMOST_ALL * len(self.records)

    def is_text(self, name: str) -> bool:
        """Whether a column holds text."""
        return self.holds(name, lambda value: isinstance(value, str))

    def has_some(self, name: str | None) -> bool:
        """Whether some row holds something else than nothing in a column."""
        return name is not None and any(
            not says_nothing(value) if isinstance(value, str) else value for value in self.values(name)
        )

    def is_conversation(self, name: str) -> bool:
        """Whether a column holds conversations, in any form that can be read; see `turns_of`."""
        return self.holds(name, lambda value: self._is_conversation(value, name))

    def count_conversations(self, name: str) -> int:
        """Rows that hold a conversation in a column."""
        return sum(self._is_conversation(value, name) for value in self.values(name))

    def _is_conversation(self, value: Any, name: str) -> bool:
        value = decode_nested(value) if isinstance(value, str) else value
        if isinstance(value, list) and value and all(isinstance(item, str) and item[:1] != "{" for item in value):
            return name.lower() in CONVERSATIONS and len(value) > 1
        if is_transcript(value) and name.lower() not in CONVERSATIONS[:-1]:
            return "assistant" in self.roles_of(value)
        return bool(turns_of(value))

    def roles_of(self, value: Any) -> list[str]:
        """Who says each turn of a conversation, under the names that chat templates know."""
        turns = [turn for turn in turns_of(value) or [] if isinstance(turn, dict)]
        return [role_of(turn, self.roles) or "" for turn in turns]

    def is_answer_alone(self, value: Any) -> bool:
        """Whether the assistant says every turn of a conversation."""
        return {*self.roles_of(value)} == {"assistant"}

    def is_whole(self, value: Any) -> bool:
        """Whether a conversation ends in an answer."""
        return self.roles_of(value)[-1:] == ["assistant"]

    def is_open(self, value: Any) -> bool:
        """Whether a conversation ends in something that is still to be answered."""
        return bool({*self.roles_of(value)[-1:]} & {*ASKING})

    def is_yes_or_no(self, name: str) -> bool:
        """Whether a column says true or false of each row, as a boolean or in words."""
        return self.holds(
            name,
            lambda value: isinstance(value, bool) or (isinstance(value, str) and value.strip().lower() in YES_OR_NO),
        )

    def are_messages(self) -> bool:
        """Whether each row is one message of a conversation, instead of a whole one."""
        role = self.find(ROLE_KEYS)
        words = {"user", "assistant", "human", "gpt", "prompter", "system", "tool"}
        return role is not None and self.holds(role, lambda value: isinstance(value, str) and value.lower() in words)

    def letters(self, name: str) -> int:
        """Letters that the rows hold in a column, nested ones as JSON."""
        values = self.values(name)
        return sum(len(v) if isinstance(v, str) else len(json.dumps(v, default=str)) for v in values)
