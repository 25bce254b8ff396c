"""YAML settings file: read by `--config` with every value checked, written as a run's `run.yaml`."""

import contextlib
import difflib
from dataclasses import Field, asdict
from pathlib import Path
from typing import Any

import yaml

from qlora_cli.errors import UsageError
from qlora_cli.settings import recorded_fields, type_of

# What a setting's type is called in an error.
NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def read_config_file(path: Path, config_type: type) -> dict[str, Any]:
    """Settings of a YAML file, by field name, types and allowed values checked.

    Raises:
        UsageError: No such file, no YAML mapping, an unknown setting, or a value of the wrong type.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"There is no configuration file {path}.", "Check --config.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}.") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UsageError(f"{path}{line} is not YAML: {getattr(error, 'problem', error)}.") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UsageError(f"{path} holds a {type(content).__name__}, not `setting: value` lines.")
    known = recorded_fields(config_type)
    former_names = {known[name].metadata["former_name"]: name for name in known}
    settings = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        name = former_names.get(name, name)
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            command = config_type.__name__.removesuffix("Config").lower()
            hint = f"Did you mean {close[0]}?" if close else f"See: qlora {command} --help"
            raise UsageError(f"{path}: unknown setting {key}.", hint)
        settings[name] = _checked(path, known[name], value)
    return settings


def _checked(path: Path, field: Field, value: Any) -> Any:
    """One value as its field's type.

    Raises:
        UsageError: It is of another type, or none of the allowed values.
    """
    kind, optional = type_of(field)
    choices = field.metadata["choices"]
    if value is None and optional:
        return None
    if kind in (bool, int):
        if type(value) is kind:
            return value
    elif kind is float:
        if not isinstance(value, bool):
            with contextlib.suppress(TypeError, ValueError):
                return float(value)  # also of 2e-4, which YAML reads as text
    elif kind is str:
        if not isinstance(value, list | dict):
            # YAML reads on and off as booleans, and bare numbers as numbers, where the setting is a word.
            text = {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)
            if choices and text not in choices:
                raise UsageError(f"{path}: {field.name} is {text!r}.", f"Choose one of: {', '.join(choices)}.")
            return text
    else:
        parts = value.split(",") if isinstance(value, str) else value
        if isinstance(parts, list) and parts and all(isinstance(part, str) for part in parts):
            return tuple(part.strip() for part in parts)
    raise UsageError(f"{path}: {field.name} should be {NAMES.get(kind, 'a list of words')}, found {value!r}.")


def write_config_file(config: Any, path: Path) -> None:
    """Writes every recorded setting of a configuration, resolved, so that `--config` repeats it."""
    values = asdict(config)
    recorded = {
        name: list(values[name]) if isinstance(values[name], tuple) else values[name]
        for name in recorded_fields(type(config))
    }
    path.write_text(yaml.safe_dump(recorded, sort_keys=False, allow_unicode=True), encoding="utf-8")
