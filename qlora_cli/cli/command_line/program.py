"""The program as Typer knows it: help, completion, settings from the environment, and a sentence for each mistake."""

import difflib
import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from qlora_cli import __version__
from qlora_cli.artifacts import is_model, is_prepared, is_run
from qlora_cli.cli.command_line.declared import Command
from qlora_cli.cli.command_line.typer_options import CONTEXT, PanelledCommand, QuickGroup, read_typed, signature_of
from qlora_cli.cli.screens.drawing import columns_of_terminal
from qlora_cli.errors import UsageError
from qlora_cli.settings.peer_names import COMMANDS as PEER_COMMANDS
from qlora_cli.settings.peer_names import PEERS, UNNEEDED, suggest_setting
from qlora_cli.settings.ranges import HUB_ID

NARROWEST, WIDEST = 24, 80  # columns of the help


def run_program(commands: dict[str, Command], arguments: list[str]) -> int:
    """Runs a command line and returns its exit code.

    Raises:
        UsageError: There is a mistake in it.
    """
    asked = arguments[0] if arguments else ""
    # To make all of them takes a fifth of the time to the first line.
    program = make_program([commands[asked]] if asked in commands else commands.values())
    try:
        return program(arguments, prog_name="qlora", standalone_mode=False, obj=arguments) or 0
    except typer.TyperException as error:
        context = getattr(error, "ctx", None)
        message = error.format_message().replace("Value error, ", "")  # as pydantic, inside Typer, begins some
        message = re.sub(r" (\(Possible options: .*\)|Did you mean .*)$", "", message)
        place = context.command_path if context else f"qlora {asked}" if asked in commands else "qlora"
        raise UsageError(message, explain_mistake(error, commands) or f"See: {place} --help") from error


def make_program(commands: Iterable[Command]) -> typer.Typer:
    """The program with these commands."""
    program = typer.Typer(
        name="qlora",
        cls=QuickGroup,
        help="Fine-tune a large language model with QLoRA: its weights in 4 bits, a small adapter trained on top.",
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={
            "help_option_names": ["-h", "--help"],
            # By itself Typer takes no terminal for narrower than 52 columns.
            "terminal_width": max(NARROWEST, min(columns_of_terminal(), WIDEST) - 2),
        },
    )
    program.callback(invoke_without_command=True)(_qlora)
    for command in commands:
        _add(program, command)
    return program


def _add(program: typer.Typer, command: Command) -> None:
    def run(**values: Any) -> int:
        return command.run(read_typed(values[CONTEXT], command, values))

    signature = signature_of(command)
    run.__signature__ = signature  # type: ignore[attr-defined]
    run.__annotations__ = {name: parameter.annotation for name, parameter in signature.parameters.items()}
    program.command(command.name, help=command.help, cls=PanelledCommand)(run)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"qlora {__version__}")
        raise typer.Exit


def _qlora(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def place_words(words: list[str], flags: set[str]) -> str | None:
    """The flags that words without one are meant for, by what lies there; None where that is not seen.

    Args:
        flags: Of the command.
    """
    found = []
    for word in words:
        place = Path(word).expanduser()
        kinds = {
            "--adapter": is_run(place),
            "--model": is_model(place) or ("/" in word and HUB_ID.fullmatch(word) is not None and not place.exists()),
            "--prepared": is_prepared(place),
            "--data": place.exists(),
        }
        flag = next((flag for flag, fits in kinds.items() if fits and flag in flags), None)
        if flag is None:
            return None
        found.append(f"{flag} {shlex.quote(word)}")
    return f"Did you mean: {' '.join(found)}"


def list_flags(commands: dict[str, Command]) -> dict[str, set[str]]:
    """The flags of every command."""
    group: Any = typer.main.get_command(make_program(commands.values()))
    return {name: {flag for param in command.params for flag in param.opts} for name, command in group.commands.items()}


def explain_mistake(error: Any, commands: dict[str, Command]) -> str | None:
    """What to type instead of an option or a command that there is not; None where nothing is known of it.

    Args:
        error: Of Typer.
        commands: Those there are.
    """
    context = getattr(error, "ctx", None)
    if (option := getattr(error, "option_name", None)) is not None and context is not None:
        by_name = {param.name: param for param in context.command.params if getattr(param, "opts", None)}
        dashed = option.strip("-").lower()
        found = suggest_setting(option, by_name)
        is_named = found is not None and found in PEERS.get(dashed.replace("_", "-"), ())
        if dashed in UNNEEDED and not is_named:
            return UNNEEDED[dashed]
        elsewhere = list_flags(commands)
        if not is_named and (owner := next((name for name, flags in elsewhere.items() if option in flags), None)):
            return f"{option} is a setting of: qlora {owner}"
        if found is not None:
            return f"Did you mean: {by_name[found].opts[0]}"
        meant = {f"--{setting.replace('_', '-')}" for setting in PEERS.get(dashed, ())}
        other = next((name for name, flags in elsewhere.items() if meant & flags), None)
        return f"That is a setting of another command; see: qlora {other} --help" if other else None
    said = str(getattr(error, "message", ""))
    if context is not None and (
        extra := re.search(r"unexpected extra arguments? \((.*)\)|argument\(s\) \((.*)\)", said)
    ):
        flags = {flag for param in context.command.params for flag in param.opts}
        if long := re.search(r"(?:^|[\s(])-?[‐-―−]+-?(\w[\w-]*)", extra[0]):
            return f"A flag begins with two hyphens, and no longer dash: --{long[1]}"
        placed = place_words((extra[1] or extra[2]).split(), flags)
        return placed or ("A prompt of several words stands in quotes." if context.command.name == "generate" else None)
    typed = re.search(r"No such command '([^']*)'", said)
    if typed is None:
        return None
    word = typed[1].lower()
    close = difflib.get_close_matches(word, [*commands], 1)
    return f"Type: {PEER_COMMANDS[word]}" if word in PEER_COMMANDS else f"Type: qlora {close[0]}" if close else None
