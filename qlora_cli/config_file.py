"""YAML settings file: read by `--config` with every value checked, written as a run's `run.yaml`."""

import contextlib
import difflib
import os
import re
import shlex
from dataclasses import Field, asdict
from pathlib import Path
from typing import Any

import yaml

from qlora_cli.config import GenerateConfig, InspectConfig, MergeConfig, PrepareConfig, TrainConfig
from qlora_cli.errors import UsageError, first_line
from qlora_cli.settings.peer_names import UNNEEDED, suggest_setting
from qlora_cli.settings.ranges import Numbers, Words
from qlora_cli.settings.setting import fault_of, recorded_fields, type_of

# What a setting's type is called in an error.
NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}

EXAMPLES = {bool: "Write true or false.", int: "Write digits alone, as 16.", float: "Write a number, as 2e-4."}
EXAMPLES[str] = "Write one word or a text in quotes."
LIST_EXAMPLE = "Write [a, b], or a, b."

CONFIGS = (TrainConfig, PrepareConfig, MergeConfig, GenerateConfig, InspectConfig)
MOST_BYTES = 2**20
VARIABLE = re.compile(r"\$(?:(\w+)|\{\w+\})")  # of a shell
RECIPES = Path(__file__).parent / "recipes"  # settings of tutorials, by name; examples/ links to them


def list_recipes() -> dict[str, Path]:
    """Packaged settings files by name."""
    return {path.stem: path for path in sorted(RECIPES.glob("*.yaml"))}


def describe_recipe(path: Path) -> str:
    """What a recipe says of itself in its first line."""
    return path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")


def find_config_file(path: Path) -> Path:
    """A file as it is named, else the recipe of that name."""
    return list_recipes().get(str(path).removesuffix(".yaml"), path) if not path.exists() else path


class PlainLoader(yaml.SafeLoader):
    """YAML without references to what stood before: nine lines of them make gigabytes, and settings have no use for any. Nor
    does a name stand twice, of which the last would count without a word."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        """One node.

        Raises:
            YAMLError: It refers to another one.
        """
        if self.check_event(yaml.events.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(None, None, "references (*name) are not read", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        """One mapping.

        Raises:
            YAMLError: A name stands twice in it.
        """
        names = set()
        for key, _ in node.value:
            if key.value in names:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} stands twice", key.start_mark)
            names.add(key.value)
        return super().construct_mapping(node, deep)


class WordLoader(PlainLoader):
    """YAML whose values are text as it is written: to YAML 1.1, 010 is 8, 1:30 is 90, 7.10 is 7.1 and no is false."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - of a class, as PyYAML has it


def read_config_file(path: Path, config_type: type) -> dict[str, Any]:
    """Settings of a YAML file, by field name, types and allowed values checked.

    Raises:
        UsageError: No such file, no YAML mapping, an unknown setting, or a value of the wrong type.
    """
    try:
        path = find_config_file(path)
        if path.stat().st_size > MOST_BYTES:
            raise UsageError(f"{path} has {path.stat().st_size:,} bytes, and holds no settings.", "Check --config.")
        text = path.read_text(encoding="utf-8")
        content, words = (yaml.load(text, Loader=loader) for loader in (PlainLoader, WordLoader))
    except IsADirectoryError:
        inside = next(iter(sorted(path.glob("*.yaml"))), None)
        hint = f"Type: --config {shlex.quote(str(inside))}" if inside else "Give --config a YAML file of settings."
        raise UsageError(f"{path} is a directory, and --config takes a file.", hint) from None
    except FileNotFoundError:
        name = path.name.removesuffix(".yaml")
        close = [recipe for recipe in list_recipes() if name.strip("-") and name in recipe]
        close = close or difflib.get_close_matches(name, list_recipes(), 1)
        hint = (
            f"Did you mean the recipe {close[0]}?"
            if close
            else "Check --config, or choose one of: qlora train --list-recipes"
        )
        raise UsageError(f"There is no configuration file {path}.", hint) from None
    except RecursionError:
        raise UsageError(
            f"{path} is nested too deeply to hold settings.", "Write one `setting: value` a line."
        ) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UsageError(
            f"{path}{line} is not YAML: {getattr(error, 'problem', first_line(error))}.",
            "Write one `setting: value` a line; text with a colon or a # in it stands in quotes.",
        ) from error
    except (OSError, ValueError) as error:  # bytes that are no text, digits without end
        raise UsageError(
            f"{path} cannot be read: {first_line(error)}.", "Give --config a YAML file of settings."
        ) from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UsageError(
            f"{path} holds a {type(content).__name__}, not `setting: value` lines.",
            "Write one `setting: value` a line.",
        )
    known = recorded_fields(config_type)
    former_names = {known[name].metadata["former_name"]: name for name in known}
    settings = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        name = former_names.get(name, name)
        if name not in known:
            if isinstance(value, dict):
                raise UsageError(
                    f"{path}: {key} is no setting but a group of some, and settings stand in no groups.",
                    "Write one `setting: value` a line, each at its beginning.",
                )
            raise _unknown(path, str(key), name, config_type)
        settings[name] = _typed(path, known[name], value, words.get(key))
        if fault := fault_of(known[name], settings[name]):
            raise UsageError(f"{path}: {name} {fault[0]}", fault[1])
        _refuse_variables(path, known[name], settings[name])
    return settings


def _refuse_variables(path: Path, field: Field, value: Any) -> None:
    """Checks that a name holds no variable of a shell, as a file's values are what they are: a run would go into $HOME.

    Without braces it is one where the environment has it: columns are called $id, too.
    """
    for item in value if isinstance(value, tuple) else (value,):
        found = [match[1] for match in VARIABLE.finditer(str(item))] if field.metadata["range"] == Words() else []
        if any(name is None or name in os.environ for name in found) and not Path(item).exists():
            raise UsageError(
                f"{path}: {field.name} is {item!r}, and variables are not read in a file of settings.",
                f"Write it out, as {shlex.quote(os.path.expandvars(item))}, or give it on the command line.",
            )


def _unknown(path: Path, key: str, name: str, config_type: type) -> UsageError:
    """That a file has a setting which its command has not, with what is meant, or which command it is of."""
    command = _command_of(config_type)
    owner = next((_command_of(other) for other in CONFIGS if name in recorded_fields(other)), None)
    if owner is not None:
        return UsageError(
            f"{path}: {key} is a setting of qlora {owner}, and this is qlora {command}.",
            f"Type: qlora {owner} --config {shlex.quote(str(path))}" + " --dry-run" * (owner == "train"),
        )
    near = suggest_setting(name, recorded_fields(config_type))
    unneeded = UNNEEDED.get(name.replace("_", "-"))
    hint = unneeded or (f"Did you mean {near}?" if near else f"See: qlora {command} --help")
    return UsageError(f"{path}: unknown setting {key}.", hint)


def _command_of(config_type: type) -> str:
    return config_type.__name__.removesuffix("Config").lower()


def _typed(path: Path, field: Field, value: Any, written: Any) -> Any:
    """One value as its field's type; numbers and text by what is `written`.

    Raises:
        UsageError: It is of another type.
    """
    kind, optional = type_of(field)
    if value is None and optional:
        return None
    if kind is bool:
        if type(value) is kind:
            return value
    elif kind is int:
        if type(value) is kind:
            with contextlib.suppress(TypeError, ValueError):
                return int(written, 0)
    elif kind is float:
        with contextlib.suppress(TypeError, ValueError):
            return float(written)  # also of 2e-4, which YAML reads as text
    elif kind is str:
        if not isinstance(value, list | dict | None):
            switch = {True: "on", False: "off"}[value] if isinstance(value, bool) else str(written)
            return switch if fault_of(field, str(written)) else str(written)
    else:
        parts: Any = written if not isinstance(value, list) or None not in value else value
        if isinstance(value, str):
            parts = [value] if field.metadata["repeated"] else value.split(",")  # items of the former may hold commas
        if isinstance(parts, list) and parts and all(isinstance(part, str) for part in parts):
            return tuple(part.strip() for part in parts)
    wanted = NAMES.get(kind, "a list of words")
    found = str(written) if type(value) in (int, float) else repr(value)
    raise UsageError(f"{path}: {field.name} should be {wanted}, found {found[:80]}.", EXAMPLES.get(kind, LIST_EXAMPLE))


def as_yaml(config: Any) -> str:
    """Every recorded setting of a configuration, resolved, as a settings file with which `--config` repeats it."""
    values = asdict(config)
    recorded = {
        name: list(values[name]) if isinstance(values[name], tuple) else values[name]
        for name in recorded_fields(type(config))
    }
    text: str = yaml.safe_dump(recorded, sort_keys=False, allow_unicode=True)
    return text


def schema_of(config_type: type) -> dict[str, Any]:
    """JSON Schema (https://json-schema.org, 2020-12) of a settings file, for editors that check and complete YAML."""
    names = {bool: "boolean", int: "integer", float: "number", str: "string"}
    properties: dict[str, Any] = {}
    for name, field in recorded_fields(config_type).items():
        kind, optional = type_of(field)
        of_kind: dict[str, Any] = (
            {"type": names[kind]}
            if kind in names
            else {
                "type": ["array", "string"],
                "items": {"type": "string"},
            }
        )
        if field.metadata["choices"]:
            of_kind["enum"] = list(field.metadata["choices"])
        allowed = field.metadata["range"]
        if isinstance(allowed, Numbers):
            of_kind["exclusiveMinimum" if allowed.open_low else "minimum"] = allowed.low
            of_kind["exclusiveMaximum" if allowed.open_high else "maximum"] = allowed.high
        content = {"anyOf": [of_kind, {"type": "null"}]} if optional else of_kind
        properties[name] = {"description": field.metadata["help"], **content, "default": field.default}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"Settings of qlora {_command_of(config_type)}",
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
    }
