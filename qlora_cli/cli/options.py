"""Typer options made from a settings dataclass, and the settings that a command line gives.

Nothing is restated here: name, type, default, help, panel and choices all come from `config.py`.
"""

import difflib
import glob
import inspect
import os
import re
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import Field, dataclass, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from typer.core import TyperCommand, TyperGroup

from qlora_cli.artifacts import is_prepared, is_run
from qlora_cli.errors import UsageError
from qlora_cli.settings.peer_names import COMMANDS, PEERS, UNNEEDED, VALUES, suggest_setting
from qlora_cli.settings.setting import PANELS, flag_of, type_of

THIS_CALL = "This call"
KINDS = (bool, int, float, str, list, Path)
CONTEXT = "context"  # name of the parameter through which Typer hands over its context


SHORT = {
    "model": ("-m",),
    "data": ("-d",),
    "output": ("-o",),
    "adapter": ("-a",),
    "config_file": ("-c",),
    "quiet": ("-q",),
}


def variable_of(name: str) -> str:
    """The variable of the environment that stands for a setting: QLORA_LEARNING_RATE."""
    return f"QLORA_{name.upper()}"


def variables_in_use(context: Any, config_type: type) -> list[str]:
    """Variables of the environment that this invocation took settings from."""
    sources = {field.name: context.get_parameter_source(field.name) for field in fields(config_type)}
    return [
        variable_of(name) for name, source in sources.items() if source is not None and source.name == "ENVIRONMENT"
    ]


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


RECIPES_FLAG = parameter(
    "list_recipes",
    Annotated[bool, typer.Option("--list-recipes", help="List the recipes for --config.", rich_help_panel=THIS_CALL)],
    False,
)


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
            _extra(
                "config_file",
                Path | None,
                None,
                "--config",
                "YAML file of settings, or a recipe's name; flags override it.",
            ),
            _extra("as_json", bool, False, "--json", "Print the result as one JSON object on stdout."),
            *(
                []
                if "verbose" in {field.name for field in fields(config_type)}
                else [_extra("verbose", bool, False, "--verbose", "Show every fact of the result.")]
            ),
            _extra("quiet", bool, False, "--quiet", "Warnings, errors and results alone."),
            _extra(
                "log_file", Path | None, None, "--log-file", "Append all that is reported to this file, with the time."
            ),
            _extra("debug", bool, False, "--debug", "Show tracebacks, and what the libraries say."),
            *([RECIPES_FLAG] if "learning_rate" in {field.name for field in fields(config_type)} else []),
            _extra("print_schema", bool, False, "--print-schema", "Print a JSON schema of --config, for editors."),
        ]
    )


def _extra(name: str, kind: Any, default: Any, flag: str, help: str) -> inspect.Parameter:
    option = typer.Option(
        flag, *SHORT.get(name, ()), help=help, rich_help_panel=THIS_CALL, autocompletion=COMPLETIONS.get(name)
    )
    return parameter(name, Annotated[kind, option], default)


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
        *SHORT.get(field.name, ()),
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


def overrides(context: typer.Context, config_type: type, values: dict[str, Any]) -> dict[str, Any]:
    """The settings that stand on the command line, as the dataclass takes them.

    A variable of the environment, QLORA_RANK for --rank, counts as typed, and a flag overrides it. A default that Typer
    filled in is left out, so that a `--config` file is not overridden by it.
    """
    found = {}
    for field in fields(config_type):
        source = context.get_parameter_source(field.name)
        if source is None or source.name not in ("COMMANDLINE", "ENVIRONMENT"):
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
            UsageError: It is none.
        """
        if not isinstance(value, str):
            return value
        if self.choices:
            if value not in self.choices:
                meant = [VALUES.get(value.lower()), *difflib.get_close_matches(value.lower(), self.choices, 1)]
                close = next((word for word in meant if word in self.choices), None)
                words = ", ".join(map(repr, self.choices))
                raise UsageError(
                    f"Invalid value for '{param.opts[0]}': {value!r} is not one of {words}.",
                    f"Did you mean: {param.opts[0]} {close}" if close else f"Choose one of: {', '.join(self.choices)}.",
                )
            return value
        if self.kind is bool:
            return value.strip().lower() in ("1", "true", "yes", "on")  # of the environment
        if self.other is not None:
            from typer._coercion import build_runtime_param

            return build_runtime_param(self.other).coerce(value, param=param, ctx=ctx)
        if self.kind in (int, float):
            try:
                return self.kind(value)
            except ValueError:
                wanted = "a whole number" if self.kind is int else "a number"
                example = "as 16" if self.kind is int else "as 2e-4"
                raise UsageError(
                    f"Invalid value for '{param.opts[0]}': {value!r} is not {wanted}.",
                    f"Write {wanted}, {example}: {param.opts[0]} {'16' if self.kind is int else '2e-4'}",
                ) from None
        return Path(value) if self.kind is Path else value


def coercion_of(descriptor: Any) -> Coercion:
    """How a parameter of a command is read, by Typer's description of it."""
    annotation = descriptor.annotation
    parts = [kind for kind in get_args(annotation) if kind is not NoneType] if isinstance(annotation, UnionType) else []
    (kind,) = parts or [annotation]
    if get_origin(kind) is Literal:
        return Coercion(str, get_args(kind))
    return Coercion(get_origin(kind) or kind, other=None if (get_origin(kind) or kind) in KINDS else descriptor)


def explain_mistake(error: Any, names: Iterable[str], list_flags: Callable[[], dict[str, set[str]]]) -> str | None:
    """What to type instead of an option or a command that there is not; None where nothing is known of it.

    Args:
        error: Of Typer.
        names: Commands there are.
        list_flags: Returns the flags of every command.
    """
    context = getattr(error, "ctx", None)
    if (option := getattr(error, "option_name", None)) is not None and context is not None:
        by_name = {param.name: param for param in context.command.params if getattr(param, "opts", None)}
        dashed = option.strip("-").lower()
        found = suggest_setting(option, by_name)
        is_named = found is not None and found in PEERS.get(dashed.replace("_", "-"), ())
        if dashed in UNNEEDED and not is_named:
            return UNNEEDED[dashed]
        elsewhere = list_flags()
        if not is_named and (owner := next((name for name, flags in elsewhere.items() if option in flags), None)):
            return f"{option} is a setting of: qlora {owner}"
        if found is not None:
            return f"Did you mean: {by_name[found].opts[0]}"
        meant = {f"--{setting.replace('_', '-')}" for setting in PEERS.get(dashed, ())}
        other = next((name for name, flags in elsewhere.items() if meant & flags), None)
        return f"That is a setting of another command; see: qlora {other} --help" if other else None
    typed = re.search(r"No such command '([^']*)'", str(getattr(error, "message", "")))
    if typed is None:
        return None
    word = typed[1].lower()
    close = difflib.get_close_matches(word, [*names], 1)
    return f"Type: {COMMANDS[word]}" if word in COMMANDS else f"Type: qlora {close[0]}" if close else None


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
