"""Typer options made from a settings dataclass, and the settings that a command line gives."""

import glob
import inspect
import os
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import Field, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from typer.core import TyperCommand, TyperGroup

from qlora_cli.artifacts import is_prepared, is_run
from qlora_cli.cli.command_line.declared import (
    SHORT,
    CallFlag,
    Command,
    Positional,
    Typed,
    call_flags,
    read_value,
    setting_value,
    variable_of,
)
from qlora_cli.frozen import frozen
from qlora_cli.settings.setting import PANELS, flag_of, type_of

THIS_CALL = "This call"
KINDS = (bool, int, float, str, list, Path)
NARROW = 58  # columns
CONTEXT = "context"  # name of the parameter through which Typer hands over its context


def _complete_config(incomplete: str) -> list[str]:
    from qlora_cli.config_file import list_recipes  # yaml

    return [*(name for name in list_recipes() if name.startswith(incomplete)), *_complete_path(incomplete, Path.exists)]


def _complete_path(incomplete: str, wanted: Callable[[Path], bool]) -> list[str]:
    return sorted(str(path) for path in Path().glob(f"{glob.escape(incomplete)}*") if wanted(path))


def _complete_model(incomplete: str) -> list[str]:
    hub = Path(os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME") or "~/.cache/huggingface") / "hub")
    cached = [path.name.removeprefix("models--").replace("--", "/") for path in hub.expanduser().glob("models--*")]
    found = [name for name in sorted(cached) if name.startswith(incomplete)]
    return [*found, *_complete_path(incomplete, lambda path: (path / "config.json").is_file())]


# What a shell offers for a value, beside the words of a choice.
COMPLETIONS: dict[str, Callable[[str], list[str]]] = {
    "config_file": _complete_config,
    "model": _complete_model,
    "adapter": lambda incomplete: _complete_path(incomplete, is_run),
    "prepared": lambda incomplete: _complete_path(incomplete, is_prepared),
    "data": lambda incomplete: _complete_path(incomplete, Path.exists),
}


def parameter(name: str, annotation: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    """One parameter of a command's signature."""
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)


def signature_of(command: Command) -> inspect.Signature:
    """The signature from which Typer makes a command: positional arguments, then every setting, panel by panel."""
    config_type = command.config_type
    owners = [*config_type.__mro__[1:-1], config_type]
    ordered = sorted(
        fields(config_type),
        key=lambda field: (
            PANELS.index(field.metadata["panel"]),
            next(i for i, owner in enumerate(owners) if field.name in owner.__annotations__),
        ),
    )
    return inspect.Signature(
        [
            parameter(CONTEXT, typer.Context),
            *(_positional(argument) for argument in command.positional),
            *(_option(field) for field in ordered),
            *(_call_flag(flag) for flag in call_flags(config_type)),
        ]
    )


def _positional(argument: Positional) -> inspect.Parameter:
    kind: Any = list[str] if argument.many else str
    return parameter(argument.name, Annotated[kind | None, typer.Argument(help=argument.help)], None)


def _call_flag(flag: CallFlag) -> inspect.Parameter:
    option = typer.Option(
        flag.flag,
        *_short(flag.name),
        help=flag.help,
        rich_help_panel=THIS_CALL,
        autocompletion=COMPLETIONS.get(flag.name),
    )
    kind: Any = bool if flag.kind is bool else Path | None
    return parameter(flag.name, Annotated[kind, option], False if flag.kind is bool else None)


def _short(name: str) -> tuple[str, ...]:
    return (SHORT[name],) if name in SHORT else ()


def _option(field: Field) -> inspect.Parameter:
    kind, optional = type_of(field)
    help, choices = field.metadata["help"], field.metadata["choices"]
    metavar = None
    if choices:
        kind = Literal[choices]
        if len("|".join(choices)) > 30:
            metavar = "NAME"
            help += f" One of: {', '.join(choices)}."
    elif get_origin(kind) is tuple:
        kind, metavar = (list[str], "TEXT") if field.metadata["repeated"] else (str, "A,B,...")
    former_name = field.metadata["former_name"]
    option = typer.Option(
        flag_of(field),
        *_short(field.name),
        *([f"--{former_name}"] if former_name else []),
        envvar=variable_of(field.name),
        show_envvar=False,
        autocompletion=COMPLETIONS.get(field.name),
        help=help,
        rich_help_panel=field.metadata["panel"],
        show_default=field.default is not None,
        metavar=metavar,
    )
    return parameter(field.name, Annotated[kind | None if optional else kind, option], field.default)


def read_typed(context: typer.Context, command: Command, values: dict[str, Any]) -> Typed:
    """What a command line says, of what Typer read.

    A variable of the environment, QLORA_RANK for --rank, counts as typed, and a flag overrides it. A default that Typer
    filled in is left out, so that a `--config` file is not overridden by it.
    """
    options = {field.name: field for field in fields(command.config_type)}
    sources = {name: source.name for name in values if (source := context.get_parameter_source(name)) is not None}
    typed = {name: values[name] for name, source in sources.items() if source in ("COMMANDLINE", "ENVIRONMENT")}
    return Typed(
        settings={name: setting_value(options[name], typed[name]) for name in options if name in typed},
        positional={argument.name: values[argument.name] for argument in command.positional},
        flags={flag.name: typed[flag.name] for flag in call_flags(command.config_type) if flag.name in typed},
        arguments=context.obj,
        variables=[variable_of(name) for name in options if sources.get(name) == "ENVIRONMENT"],
    )


@frozen
class Coercion:
    """Turns what was typed into a setting's type, in place of Typer's own, which imports pydantic: an eighth of a second.

    Attributes:
        kind: bool, int, float, str, Path, list or one of a few words.
        choices: The words, where there are any.
        other: Typer's description of a parameter of another kind, which it reads itself.
    """

    kind: Any
    choices: tuple[str, ...] = ()
    other: Any = None

    def coerce(self, value: Any, *, param: Any, ctx: Any) -> Any:
        """The value; None and defaults stay what they are.

        Raises:
            UsageError: It is none.
        """
        if not isinstance(value, str):
            return value
        if self.other is not None and not self.choices:
            from typer._coercion import build_runtime_param

            return build_runtime_param(self.other).coerce(value, param=param, ctx=ctx)
        return read_value(value, self.kind, self.choices, param.opts[0])


def coercion_of(descriptor: Any) -> Coercion:
    """How a parameter of a command is read, by Typer's description of it."""
    annotation = descriptor.annotation
    parts = [kind for kind in get_args(annotation) if kind is not NoneType] if isinstance(annotation, UnionType) else []
    (kind,) = parts or [annotation]
    if get_origin(kind) is Literal:
        return Coercion(str, get_args(kind))
    return Coercion(get_origin(kind) or kind, other=None if (get_origin(kind) or kind) in KINDS else descriptor)


def coerced_by_ourselves(options: Iterable[Any]) -> list[Any]:
    """Parameters of a Typer command, which get our coercion where it knows their kind."""
    options = list(options)
    for option in options:
        descriptor = getattr(option, "type_descriptor", None)
        if descriptor is not None:
            option._runtime_param = coercion_of(descriptor)
    return options


class QuickGroup(TyperGroup):
    """The program with its commands."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Its options, with those for help and completion, which Typer adds."""
        return coerced_by_ourselves(super().get_params(ctx))


class PanelledCommand(TyperCommand):
    """A command whose help lists its options panel by panel, in 80 columns without cutting a name short."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Its options, with that for help, which Typer adds."""
        return coerced_by_ourselves(super().get_params(ctx))

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Writes one section a panel (Typer's own panels draw with rich, which costs a third of the time there is)."""
        panels: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None:
                panel = getattr(param, "rich_help_panel", None) or THIS_CALL
                panels.setdefault("Arguments" if param.param_type_name == "argument" else panel, []).append(record)
        for panel, records in panels.items():
            with formatter.section(panel):
                for flags, help in records:
                    formatter.write(_definition(flags, " ".join(help.split()), formatter.width - 2))


def _definition(flags: str, help: str, width: int) -> str:
    """One option of the help: its spelling, then its meaning in a column, or below it on a narrow terminal; no flag or
    default is broken in two."""
    column = 30 if width >= NARROW else 6
    start = f"  {flags}" if len(flags) > column - 4 else f"  {flags:<{column - 2}}"
    indent = " " * column
    lines = textwrap.wrap(
        help.replace("[default: ", "[default:\xa0"),
        width,
        initial_indent=indent,
        subsequent_indent=indent,
        break_on_hyphens=False,
        break_long_words=False,
    )
    if len(start) == column and lines:
        lines[0] = start + lines[0][column:]
    else:
        lines.insert(0, start)
    return "\n".join(lines).replace("\xa0", " ") + "\n"
