"""Text from elsewhere as it may be shown: control sequences become visible, and control nothing.

Rows, file names, answers, templates and the messages of libraries may hold sequences that clear a terminal, set its title,
write to its clipboard, or turn the direction of what follows. Whoever wants an answer to the byte takes --json.
"""

import dataclasses
import re
from typing import Any, TypeVar

from qlora_cli.events import Event

# C0 but line ends and tabs, DEL, C1, and what turns the direction of writing (https://trojansource.codes).
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
Shown = TypeVar("Shown")


def visible(value: Shown) -> Shown:
    """The same value with control characters written out as `\\x1b` or `\\u202e`, in every text within it."""
    if isinstance(value, str):
        return CONTROLS.sub(_written_out, value)  # type: ignore[return-value]
    if isinstance(value, dict):
        return {visible(key): visible(item) for key, item in value.items()}  # type: ignore[return-value]
    if isinstance(value, list | tuple | set | frozenset):
        return type(value)(visible(item) for item in value)
    return value


def visible_event(event: Event) -> Event:
    """An event whose texts are visible."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(event):
        value = getattr(event, field.name)
        if isinstance(value, str | tuple):
            values[field.name] = visible(value)
    return dataclasses.replace(event, **values) if values else event


def _written_out(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
