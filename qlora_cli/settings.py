"""How a setting is declared: its default, help text, allowed values and flag, once."""

from dataclasses import Field, field, fields
from types import NoneType, UnionType
from typing import Any, get_args


def setting(
    default: Any,
    help: str,
    *,
    panel: str,
    choices: tuple[str, ...] | None = None,
    flag: str | None = None,
    former_name: str | None = None,
    repeated: bool = False,
    recorded: bool = True,
) -> Any:
    """A dataclass field with its help text.

    Args:
        default: The one default.
        help: Meaning and unit.
        panel: Heading under which `--help` lists it.
        choices: Allowed values.
        flag: Spelling on the command line where it is not the usual one (see `flag_of`).
        former_name: What it was called before; configuration files and command lines may still say so.
        repeated: A tuple is typed by repeating the flag, instead of with commas (its items may hold commas).
        recorded: Whether `run.yaml` keeps it (False for how one invocation behaves, such as `resume`).
    """
    metadata = {
        "help": help,
        "panel": panel,
        "choices": choices,
        "flag": flag,
        "former_name": former_name,
        "repeated": repeated,
        "recorded": recorded,
    }
    return field(default=default, metadata=metadata)


def recorded_fields(config_type: type) -> dict[str, Field]:
    """Fields that `run.yaml` keeps, by name."""
    return {f.name: f for f in fields(config_type) if f.metadata["recorded"]}


def type_of(option: Field) -> tuple[Any, bool]:
    """A setting's type without `| None`, and whether it may be None."""
    kinds = get_args(option.type) if isinstance(option.type, UnionType) else (option.type,)
    (kind,) = (kind for kind in kinds if kind is not NoneType)
    return kind, NoneType in kinds


def flag_of(option: Field) -> str:
    """How a setting is spelt on the command line: `--target-modules`, or `--double-quant/--no-double-quant`.

    A switch whose default is off has no opposite (`--dora`), unless its metadata spell one.
    """
    name = option.name.replace("_", "-")
    has_opposite = type_of(option)[0] is bool and option.default is not False
    return option.metadata["flag"] or (f"--{name}/--no-{name}" if has_opposite else f"--{name}")
