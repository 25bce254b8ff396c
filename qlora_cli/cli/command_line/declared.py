"""Commands as they are declared: the settings of each, the flags of one call, and what a command line gives them.

Nothing is restated here: name, type, default, help, panel and choices of a setting all come from `config.py`.
"""

import os
from collections.abc import Callable, Iterable
from dataclasses import Field, field, fields
from pathlib import Path
from typing import Any, get_origin

from qlora_cli.errors import UsageError
from qlora_cli.frozen import frozen
from qlora_cli.settings.setting import type_of

SHORT = {
    "model": "-m",
    "data": "-d",
    "output": "-o",
    "adapter": "-a",
    "config_file": "-c",
    "quiet": "-q",
}

TRUE, FALSE = ("1", "true", "yes", "on", "y", "t"), ("0", "false", "no", "off", "n", "f")

# Of the environment, named like settings: where caches lie, a launcher's process, and a model for tests.
OTHER_VARIABLES = {"QLORA_CACHE", "QLORA_LAUNCHER", "QLORA_SMALL_MODEL"}


@frozen
class Positional:
    """An argument that is no setting and has no flag.

    Attributes:
        many: Whether there may be several; then its value is a list, or None where there is none.
    """

    name: str
    help: str
    many: bool = False


@frozen
class CallFlag:
    """A flag of one invocation, which is no setting.

    Attributes:
        kind: bool or Path.
    """

    name: str
    kind: type
    flag: str
    help: str


CONFIG_FILE = CallFlag("config_file", Path, "--config", "YAML file of settings, or a recipe's name; flags override it.")
AS_JSON = CallFlag("as_json", bool, "--json", "Print the result as one JSON object on stdout.")
VERBOSE = CallFlag("verbose", bool, "--verbose", "Show every fact of the result.")
QUIET = CallFlag("quiet", bool, "--quiet", "Warnings, errors and results alone.")
LOG_FILE = CallFlag("log_file", Path, "--log-file", "Append all that is reported to this file, with the time.")
DEBUG = CallFlag("debug", bool, "--debug", "Show tracebacks, and what the libraries say.")
LIST_RECIPES = CallFlag("list_recipes", bool, "--list-recipes", "List the recipes for --config.")
PRINT_SCHEMA = CallFlag("print_schema", bool, "--print-schema", "Print a JSON schema of --config, for editors.")


def call_flags(config_type: type) -> list[CallFlag]:
    """The flags of one call of a command with these settings, as --help lists them."""
    names = {option.name for option in fields(config_type)}
    flags = [CONFIG_FILE, AS_JSON, *([] if "verbose" in names else [VERBOSE]), QUIET, LOG_FILE, DEBUG]
    return [*flags, *([LIST_RECIPES] if "learning_rate" in names else []), PRINT_SCHEMA]


@frozen
class Typed:
    """What a command line says.

    Attributes:
        settings: Those that were typed, or stand in the environment, as the dataclass takes them.
        positional: Arguments without a flag, by name.
        flags: Those of this call, by name; one that is missing was not typed.
        arguments: The whole line.
        variables: Of the environment, that settings came from.
    """

    settings: dict[str, Any]
    positional: dict[str, Any]
    flags: dict[str, Any]
    arguments: list[str]
    variables: list[str] = field(default_factory=list)


@frozen
class Command:
    """A command of the program.

    Attributes:
        help: What it does; the first sentence stands in the list of commands.
        config_type: One of the dataclasses of `config.py`.
        run: Runs it and returns the exit code.
    """

    name: str
    help: str
    config_type: type
    positional: tuple[Positional, ...]
    run: Callable[[Typed], int]


def variable_of(name: str) -> str:
    """The variable of the environment that stands for a setting: QLORA_LEARNING_RATE."""
    return f"QLORA_{name.upper()}"


def has_variables(config_type: type) -> bool:
    """Whether the environment holds any of these settings."""
    return any(variable_of(option.name) in os.environ for option in fields(config_type))


def unknown_variables(commands: Iterable[Command]) -> list[tuple[str, str | None]]:
    """Variables of the environment that are named like a setting's and are none's, each with the one that is probably meant."""
    given = {name for name in os.environ if name.upper().startswith("QLORA_")} - OTHER_VARIABLES
    if not given:
        return []
    settings = {option.name for command in commands for option in fields(command.config_type)}
    unknown = sorted(given - {variable_of(name) for name in settings})
    if not unknown:
        return []
    from qlora_cli.settings.peer_names import suggest_setting

    found = [(name, suggest_setting(name[len("QLORA_") :], sorted(settings))) for name in unknown]
    return [(name, variable_of(meant) if meant else None) for name, meant in found]


def setting_value(option: Field, given: Any) -> Any:
    """A setting as its dataclass takes it, of what was typed: a tuple from a repeated flag, or from text with commas."""
    if get_origin(type_of(option)[0]) is not tuple:
        return given
    parts = given if option.metadata["repeated"] else [part.strip() for part in given.split(",")]
    return tuple(filter(None, parts))


def read_value(text: str, kind: Any, choices: tuple[str, ...], flag: str) -> Any:
    """What was typed for a flag, in the type of its setting.

    Args:
        kind: bool, int, float, str or Path.
        choices: The words that it may be; none where it may be any.

    Raises:
        UsageError: It is no such value.
    """
    if choices:
        if text in choices:
            return text
        import difflib

        from qlora_cli.settings.peer_names import VALUES

        meant = [VALUES.get(text.lower()), *difflib.get_close_matches(text.lower(), choices, 1)]
        close = next((word for word in meant if word in choices), None)
        words = ", ".join(map(repr, choices))
        raise UsageError(
            f"Invalid value for '{flag}': {text!r} is not one of {words}.",
            f"Did you mean: {flag} {close}" if close else f"Choose one of: {', '.join(choices)}.",
        )
    if kind is bool:  # of the environment
        word = text.strip().lower()
        if word not in (*TRUE, *FALSE):
            raise UsageError(f"Invalid value for '{flag}': {text!r} is neither true nor false.", "Write true or false.")
        return word in TRUE
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            wanted = "a whole number" if kind is int else "a number"
            example = "as 16" if kind is int else "as 2e-4"
            raise UsageError(
                f"Invalid value for '{flag}': {text!r} is not {wanted}.",
                f"Write {wanted}, {example}: {flag} {'16' if kind is int else '2e-4'}",
            ) from None
    return Path(text) if kind is Path else text
