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
from qlora_cli.settings.groups import NAME
from qlora_cli.settings.setting import flag_of

COMMAND = re.compile(r"qlora \w+(?: +-\S+(?: +[^-\s]\S*)?)*")  # with its flags and their values


@contextmanager
def naming_file(path: Path | None, of_file: dict[str, Any], config_type: type) -> Iterator[None]:
    """Has an error that names a flag say which settings file has given it, where it was not typed."""
    try:
        yield
    except QloraError as error:
        named = [field for field in fields(config_type) if of_file.get(field.name) is not None]
        words = {word.strip(".,:;'") for word in error.message.split()}
        said = [field for field in named if _names(error, field)]
        places = (field for field in named if field.metadata["range"] is NAME)
        said = said or [field for field in places if of_file[field.name] in words]  # named by itself
        if said:
            values = (of_file[field.name] for field in said)
            shown = (", ".join(value) if isinstance(value, tuple) else value for value in values)
            pairs = (f"{field.name}: {value}" for field, value in zip(said, shown, strict=True))
            error.message += f" {path} says {', '.join(pairs)}."
        raise


def name_variable(error: QloraError, command: Command, arguments: list[str]) -> str:
    """That what an error says of a flag stands in the environment, and was not typed; else nothing."""
    known = spellings(command)
    # Typer takes -oout, too.
    words = [word.partition("=")[0] if word.startswith("--") else word[:2] for word in arguments]
    typed = {known[word].name for word in words if word in known}
    for field in fields(command.config_type):
        variable = variable_of(field.name)
        if variable in os.environ and field.name not in typed and _names(error, field):
            return f" {variable}={os.environ[variable]} stands in the environment."
    return ""


def _names(error: QloraError, field: Field) -> bool:
    """Whether an error names the flag of a setting; the flags of a command that is to be typed next are not meant."""
    text = f"{error.message} {COMMAND.sub('', error.hint or '')}"
    return re.search(rf"{re.escape(flag_of(field).split('/')[0])}(?![\w-])", text) is not None
