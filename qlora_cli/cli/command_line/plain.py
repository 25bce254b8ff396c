"""Plain command lines, read by what is declared; one with a mistake, or that asks for help, is left to Typer.

Importing Typer and having it make a command takes 0.1 s of the processor, more than all else that `qlora inspect` of an
adapter does. tests/cli/test_options.py holds that both readers find the same.
"""

from collections.abc import Iterator
from dataclasses import fields
from typing import Any, get_origin

from qlora_cli.cli.command_line.declared import (
    SHORT,
    Command,
    Typed,
    call_flags,
    has_variables,
    read_value,
    setting_value,
)
from qlora_cli.frozen import frozen
from qlora_cli.settings.setting import flag_of, type_of


@frozen
class Spelling:
    """One way to type a flag.

    Attributes:
        flag: As messages call it.
        switch: What it means where it takes no value; None where it takes one.
        repeated: Whether its values become a list.
    """

    name: str
    flag: str
    kind: Any
    choices: tuple[str, ...]
    switch: bool | None
    repeated: bool


def read_plainly(command: Command, arguments: list[str]) -> Typed | None:
    """What a command line says; None where Typer has to read it: it asks for help, has a mistake, or comes with settings
    in the environment.

    Args:
        command: Which its first word named.
        arguments: The whole line.

    Raises:
        UsageError: A number or a word of a choice is none.
    """
    split = None if has_variables(command.config_type) else _split(command, arguments)
    if split is None:
        return None
    given, alone = split
    positional = _place(command, alone)
    if positional is None:
        return None
    values = _read_values(given)
    options = {option.name: option for option in fields(command.config_type)}
    settings = {name: setting_value(options[name], values[name]) for name in options if name in values}
    flags = {name: value for name, value in values.items() if name not in options}
    return Typed(settings, positional, flags, arguments)


def given_again(command: Command, arguments: list[str]) -> dict[str, str]:
    """Flags of one value that a command line gives several of, a switch and its opposite among them, and the one that
    counts: the last."""
    given, _ = _split(command, arguments) or ((), ())
    found: dict[str, list[str]] = {}
    for spelling, text in given:
        if not spelling.repeated:
            switched = spelling.flag if spelling.switch else spelling.flag.replace("--", "--no-", 1)
            found.setdefault(spelling.flag, []).append(switched if text is None else text)
    return {flag: texts[-1] for flag, texts in found.items() if len(set(texts)) > 1}


def _split(command: Command, arguments: list[str]) -> tuple[list[tuple[Spelling, str | None]], list[str]] | None:
    """Flags with their values, and words without a flag; None where there is a mistake, or a value that needs care."""
    known = spellings(command)
    given: list[tuple[Spelling, str | None]] = []
    alone: list[str] = []
    words = iter(arguments[1:])
    for word in words:
        if not word.startswith("-") or word == "-":
            alone.append(word)
            continue
        typed, equals, text = word.partition("=")
        spelling = known.get(typed)
        if spelling is None or (equals and (spelling.switch is not None or not typed.startswith("--"))):
            return None
        if spelling.switch is not None:
            given.append((spelling, None))
            continue
        value = text if equals else next(words, None)
        if value is None or (value.startswith("-") and not equals):
            return None
        given.append((spelling, value))
    return given, alone


def _read_values(given: list[tuple[Spelling, str | None]]) -> dict[str, Any]:
    """Values by name; the last one counts, or all where a flag is repeated."""
    values: dict[str, Any] = {}
    for spelling, text in given:
        if text is None:
            values[spelling.name] = spelling.switch
        elif spelling.repeated:
            values.setdefault(spelling.name, []).append(text)
        else:
            values[spelling.name] = read_value(text, spelling.kind, spelling.choices, spelling.flag)
    return values


def spellings(command: Command) -> dict[str, Spelling]:
    """Every flag of a command, by how it is typed."""
    found: dict[str, Spelling] = {}
    for option in fields(command.config_type):
        kind, metadata = type_of(option)[0], option.metadata
        flag, _, off = flag_of(option).partition("/")
        repeated = bool(metadata["repeated"])
        kind = str if get_origin(kind) is tuple else kind
        switch = True if kind is bool else None
        spelling = Spelling(option.name, flag, kind, metadata["choices"] or (), switch, repeated)
        for typed in _all(flag, SHORT.get(option.name), metadata["former_name"]):
            found[typed] = spelling
        if off:
            found[off] = Spelling(option.name, flag, kind, (), False, repeated)
    for call in call_flags(command.config_type):
        spelling = Spelling(call.name, call.flag, call.kind, (), True if call.kind is bool else None, False)
        for typed in _all(call.flag, SHORT.get(call.name), None):
            found[typed] = spelling
    return found


def _all(flag: str, short: str | None, former: str | None) -> Iterator[str]:
    yield flag
    if short:
        yield short
    if former:
        yield f"--{former}"


def _place(command: Command, words: list[str]) -> dict[str, Any] | None:
    """Words without a flag, as the positional arguments; None where there are too many."""
    found: dict[str, Any] = {}
    for argument in command.positional:
        if argument.many:
            found[argument.name], words = (words or None), []
        else:
            found[argument.name], words = (words[0] if words else None), words[1:]
    return None if words else found
