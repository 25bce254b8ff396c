"""Typer options made from a settings dataclass, and the settings that a command line gives.

Nothing is restated here: name, type, default, help, panel and choices all come from `config.py`.
"""

import inspect
import textwrap
from dataclasses import Field, dataclass, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from typer._coercion import build_runtime_param
from typer.core import TyperCommand, TyperGroup

from qlora_cli.setting_groups import PANELS
from qlora_cli.settings import flag_of, type_of

THIS_CALL = "This call"
KINDS = (bool, int, float, str, list, Path)
CONTEXT = "context"  # name of the parameter through which Typer hands over its context


def parameter(name: str, annotation: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    """One parameter of a command's signature."""
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)


def signature_of(config_type: type, arguments: tuple[inspect.Parameter, ...] = ()) -> inspect.Signature:
    """The signature from which Typer makes a command: positional arguments, then every setting, panel by panel.

    Args:
        config_type: One of the dataclasses of `config.py`.
        arguments: Positional arguments that are no setting, such as the prompt.
    """
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
            *arguments,
            *(_option(field) for field in ordered),
            _extra("config_file", Path | None, None, "--config", "YAML file of settings; flags override it."),
            _extra("as_json", bool, False, "--json", "Print the result as one JSON object on stdout."),
            _extra("debug", bool, False, "--debug", "Show tracebacks, and what the libraries say."),
        ]
    )


def _extra(name: str, kind: Any, default: Any, flag: str, help: str) -> inspect.Parameter:
    return parameter(name, Annotated[kind, typer.Option(flag, help=help, rich_help_panel=THIS_CALL)], default)


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
        *([f"--{former_name}"] if former_name else []),
        help=help,
        rich_help_panel=field.metadata["panel"],
        show_default=field.default is not None,
        metavar=metavar,
    )
    return parameter(field.name, Annotated[kind | None if optional else kind, option], field.default)


def overrides(context: typer.Context, config_type: type, values: dict[str, Any]) -> dict[str, Any]:
    """The settings that stand on the command line, as the dataclass takes them.

    A default that Typer filled in is left out, so that a `--config` file is not overridden by it.
    """
    found = {}
    for field in fields(config_type):
        source = context.get_parameter_source(field.name)
        if source is None or source.name != "COMMANDLINE":
            continue
        value = values[field.name]
        if get_origin(type_of(field)[0]) is tuple:
            parts = value if field.metadata["repeated"] else [part.strip() for part in value.split(",")]
            value = tuple(filter(None, parts))
        found[field.name] = value
    return found


@dataclass(frozen=True)
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
            BadParameter: It is none.
        """
        if not isinstance(value, str):
            return value
        if self.choices:
            if value not in self.choices:
                words = ", ".join(map(repr, self.choices))
                raise typer.BadParameter(f"{value!r} is not one of {words}.", ctx=ctx, param=param)
            return value
        if self.other is not None:
            return build_runtime_param(self.other).coerce(value, param=param, ctx=ctx)
        if self.kind in (int, float):
            try:
                return self.kind(value)
            except ValueError:
                wanted = "a whole number" if self.kind is int else "a number"
                raise typer.BadParameter(f"{value!r} is not {wanted}.", ctx=ctx, param=param) from None
        return Path(value) if self.kind is Path else value


def coercion_of(descriptor: Any) -> Coercion:
    """How a parameter of a command is read, by Typer's description of it."""
    annotation = descriptor.annotation
    parts = [kind for kind in get_args(annotation) if kind is not NoneType] if isinstance(annotation, UnionType) else []
    (kind,) = parts or [annotation]
    if get_origin(kind) is Literal:
        return Coercion(str, get_args(kind))
    return Coercion(get_origin(kind) or kind, other=None if (get_origin(kind) or kind) in KINDS else descriptor)


def coerce_by_ourselves(command: Any) -> None:
    """Gives the parameters of a Typer command our coercion, where it knows their kind."""
    for option in command.params:
        descriptor = getattr(option, "type_descriptor", None)
        if descriptor is not None:
            option._runtime_param = coercion_of(descriptor)


class QuickGroup(TyperGroup):
    """The program with its commands."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """What is left of a command line; Typer has added its options for completion by now."""
        coerce_by_ourselves(self)
        return super().parse_args(ctx, args)


class PanelledCommand(TyperCommand):
    """A command whose help lists its options panel by panel, in 80 columns without cutting a name short."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        coerce_by_ourselves(self)

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


def _definition(flags: str, help: str, width: int, column: int = 30) -> str:
    """One option of the help: its spelling, then its meaning in a column; no flag or default is broken in two."""
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
