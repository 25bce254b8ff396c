"""A record: one JSON object with named fields, such as a row of data or a prompt; what it may not hold."""

import ast
import json
from collections.abc import Iterable
from typing import Any

Record = dict[str, Any]
NULLS = ("null", "None")  # what JSON and Python print for nothing, where nested values are written as text
NOTHING: tuple[Any, ...] = (None, "", [], {})  # what a field may hold that says nothing
LONGEST_LITERAL = 2**20  # letters of a Python literal that are parsed; Python's parser takes 100 times as much memory


class BadField(Exception):
    """Why a record cannot be used, as a sentence without its full stop.

    Args:
        reason: The sentence.
        way: What to type to train on such records all the same, as another one; empty where there is nothing.
    """

    def __init__(self, reason: str, way: str = "") -> None:
        super().__init__(reason)
        self.way = way


class Blank(Exception):
    """A record with nothing to train on; says which part is empty."""


def problem_of_record(record: Any) -> str | None:
    """What the JSON parser lets through: rows that are no object, NUL, and halves of surrogate pairs."""
    if not isinstance(record, dict):
        return f"a row must be an object with named fields, but this is {describe_type(record)}"
    problems = (problem_of_value({name: value}, f"field {name!r}") for name, value in record.items())
    return next(filter(None, problems), None)


def problem_of_value(value: Any, where: str) -> str | None:
    """NUL, and halves of surrogate pairs, in a text, or in those and the keys of a list or an object."""
    stack = [value]
    while stack:
        value = stack.pop()
        if isinstance(value, str):
            if "\0" in value:
                return f"{where} holds a NUL character"
            if not value.isascii():
                try:
                    value.encode("utf-8")
                except UnicodeEncodeError as error:
                    code = ord(value[error.start])
                    if 0xDC80 <= code <= 0xDCFF:  # how the CSV reader keeps a byte that is not UTF-8
                        return f"not UTF-8: byte 0x{code - 0xDC00:02X} in {where}"
                    return f"{where} holds half a surrogate pair (\\u{code:04x})"
        elif isinstance(value, dict):
            stack += [*value, *value.values()]
        elif isinstance(value, list):
            stack += value
    return None


def field_at(record: Record, path: str) -> Any:
    """What a dotted name stands for, as datasets' `flatten` gives them: the field `en` of the object in `translation` for
    `translation.en`; None where there is none. A column that is called so itself counts first."""
    if path in record:
        return record[path]
    name, _, rest = path.partition(".")
    inside = fields_in(record.get(name)) if rest else None
    return None if inside is None else field_at(inside, rest)


def fields_in(value: Any) -> Record | None:
    """The object that a value is, also as JSON text; None where it is none."""
    value = decode_nested(value) if isinstance(value, str) else value
    return value if isinstance(value, dict) else None


def with_fields(record: Record, paths: Iterable[str]) -> Record:
    """The record with what these dotted names stand for beside its columns."""
    found = {path: field_at(record, path) for path in paths if path not in record}
    return {**record, **{path: value for path, value in found.items() if value is not None}}


def describe_type(value: Any) -> str:
    """A JSON type in words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    names = {str: "text", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def says_nothing(text: str) -> bool:
    """Whether a text is empty, or how JSON or Python print nothing, where a list, an object or a system text belongs."""
    return text.strip() in ("", *NULLS)


def decode_nested(text: str) -> Any:
    """What a text holds if it is a list, an object or nothing written as JSON, or as Python prints it; else the text itself."""
    if (stripped := text.strip()) in NULLS:
        return None
    try:
        return parse_nested(stripped) if stripped[:1] + stripped[-1:] in ("[]", "{}") else text
    except ValueError:
        return text


def why_unread(text: str) -> str | None:
    """Why a text that begins like a list or an object is read as none; None where it is one, or does not begin so."""
    if text.lstrip()[:1] not in ("[", "{"):
        return None
    try:
        parse_nested(text.strip())
    except ValueError as reason:
        return str(reason)
    return None


def parse_nested(text: str) -> Any:
    """The list or object that a text is, as JSON or as Python prints it; Python's tuples are lists.

    Raises:
        ValueError: It is neither, or a text in it cannot be used; says which, without a subject.
    """
    may_be_bad = "\\u" in text  # the only way in which JSON writes NUL and halves of pairs
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        may_be_bad = True
        try:
            value = ast.literal_eval(text) if len(text) <= LONGEST_LITERAL else None
            value = json.loads(json.dumps(value)) if isinstance(value, list | dict) else None
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            value = None
        if value is None:
            raise ValueError("is neither JSON nor a Python list of what JSON holds") from None
    if may_be_bad and (problem := problem_of_value(value, "a text in it")):
        raise ValueError(f"cannot be used: {problem}")
    return value
