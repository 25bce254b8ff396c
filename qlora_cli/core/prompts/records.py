"""A record: one JSON object with named fields, such as a row of data or a prompt; what it may not hold."""

from typing import Any

Record = dict[str, Any]


def problem_of_record(record: Any) -> str | None:
    """What the JSON parser lets through: rows that are no object, NUL, and halves of surrogate pairs."""
    if not isinstance(record, dict):
        return f"a row must be an object with named fields, but this is {describe_type(record)}"
    stack: list[tuple[Any, str]] = [(value, f"field {name!r}") for name, value in record.items()]
    while stack:
        value, where = stack.pop()
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
            stack += [(item, where) for item in value.values()]
        elif isinstance(value, list):
            stack += [(item, where) for item in value]
    return None


def describe_type(value: Any) -> str:
    """A JSON type in words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    names = {str: "text", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)
