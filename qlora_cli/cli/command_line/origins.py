"""Where the value of a flag that an error names comes from, if nobody typed it: a settings file, or the environment."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

from qlora_cli.cli.command_line.declared import Command, variable_of
from qlora_cli.cli.command_line.plain import spellings
from qlora_cli.errors import QloraError
from qlora_cli.settings.setting import flag_of


@contextmanager
def naming_file(path: Path | None, of_file: dict[str, Any], config_type: type) -> Iterator[None]:
    """Has an error that names a flag say which settings file has given it, where it was not typed."""
    try:
        yield
    except QloraError as error:
        text = f"{error.message} {error.hint}"
        named = (field for field in fields(config_type) if of_file.get(field.name) is not None)
        said = [field for field in named if _names(text, field)]
        if said:
            values = (of_file[field.name] for field in said)
            shown = (", ".join(value) if isinstance(value, tuple) else value for value in values)
            pairs = (f"{field.name}: {value}" for field, value in zip(said, shown, strict=True))
            error.message += f" {path} says {', '.join(pairs)}."
        raise


def name_variable(message: str, command: Command, arguments: list[str]) -> str:
    """That what a message says of a flag stands in the environment, and was not typed; else nothing."""
    known = spellings(command)
    # Typer takes -oout, too.
    words = [word.partition("=")[0] if word.startswith("--") else word[:2] for word in arguments]
    typed = {known[word].name for word in words if word in known}
    for field in fields(command.config_type):
        variable = variable_of(field.name)
        if variable in os.environ and field.name not in typed and _names(message, field):
            return f" It comes from {variable} in the environment."
    return ""


def _names(text: str, field: Field) -> bool:
    """Whether a text names the flag of a setting."""
    return re.search(rf"{re.escape(flag_of(field).split('/')[0])}(?![\w-])", text) is not None
