"""A YAML recipe in, checked settings of one command out; and a resolved configuration written as `run.yaml`."""

import difflib
import types
import typing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from qlora_cli.config import recorded_fields
from qlora_cli.errors import UsageError


def read_config_file(path: Path, config_type: type) -> dict[str, Any]:
    """Settings of a recipe, by field name, types and allowed values checked.

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
    hints = typing.get_type_hints(config_type)
    settings = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            raise UsageError(
                f"{path}: unknown setting {key}.", f"Did you mean {close[0]}?" if close else "See: qlora train --help"
            )
        settings[name] = _checked(path, name, value, hints[name], known[name].metadata["choices"])
    return settings


def _checked(path: Path, name: str, value: Any, hint: Any, choices: tuple[str, ...] | None) -> Any:
    """One value as its field's type; 2e-4, which YAML reads as text, becomes a number."""
    optional = isinstance(hint, types.UnionType) and type(None) in typing.get_args(hint)
    if value is None and optional:
        return None
    wanted = next((kind for kind in typing.get_args(hint) if kind is not type(None)), hint) if optional else hint
    if wanted == tuple[str, ...]:
        parts = value.split(",") if isinstance(value, str) else value
        if isinstance(parts, list) and parts and all(isinstance(part, str) for part in parts):
            return tuple(part.strip() for part in parts)
    elif wanted is bool or wanted is int:
        if type(value) is wanted:
            return value
    elif wanted is float:
        try:
            if not isinstance(value, bool):
                return float(value)
        except (TypeError, ValueError):
            pass
    elif wanted is str:
        # YAML reads on/off as booleans and bare numbers as numbers where the setting is a word.
        text = {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)
        if not isinstance(value, (list, dict)):
            if choices and text not in choices:
                raise UsageError(f"{path}: {name} is {text!r}.", f"Choose one of: {', '.join(choices)}.")
            return text
    raise UsageError(f"{path}: {name} should be {getattr(wanted, '__name__', wanted)}, found {value!r}.")


def write_config_file(config: Any, path: Path) -> None:
    """Writes every recorded setting of a configuration, resolved, so that `--config` repeats it."""
    values = asdict(config)
    recorded = {
        name: list(values[name]) if isinstance(values[name], tuple) else values[name]
        for name in recorded_fields(type(config))
    }
    path.write_text(yaml.safe_dump(recorded, sort_keys=False, allow_unicode=True), encoding="utf-8")
