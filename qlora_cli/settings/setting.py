"""How a setting is declared: its default, help text, allowed values and flag, once."""

from dataclasses import Field, field, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args

from qlora_cli.errors import UsageError
from qlora_cli.frozen import frozen
from qlora_cli.settings.ranges import Range, Words

MODEL = "Model"
DATA = "Data"
ADAPTER = "Adapter"
QUANTIZATION = "Quantisation"
OPTIMISATION = "Optimisation"
EVALUATION = "Evaluation and checkpoints"
MEMORY = "Memory and speed"
SAMPLING = "Sampling"
RUN = "Run"
PANELS = (MODEL, DATA, ADAPTER, QUANTIZATION, OPTIMISATION, EVALUATION, MEMORY, SAMPLING, RUN)  # as --help lists them

# What a setting means for a run that goes on with another value than the checkpoint's.
SAME = "same"  # refused by name
RESOLVED = "resolved"  # refused where what it comes to differs: the base, the rows, the optimizer, the number of steps
ROUNDING = "rounding"  # allowed and said: the same mathematics in another order
FREE = "free"  # allowed: no number depends on it
CALL = "call"  # of one invocation alone, never compared
RESUME = (SAME, RESOLVED, ROUNDING, FREE, CALL)


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
    range: Range | None = None,
    resume: str | None = None,
    needs: str | None = None,
    instead_of: tuple[str, ...] = (),
    beside: str | None = None,
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
        range: Which values mean anything; every number and every text has one (tests/test_settings.py).
        resume: What it means for a run that goes on with another value: one of `RESUME`.
        needs: Another setting, by name, without which this one does nothing; `name=value` for one value of it.
        instead_of: Other settings, by name, which this one takes the place of: typed, it goes over those of a settings file.
        beside: Another setting, by name, beside which this one does nothing.
    """
    metadata = {
        "help": help,
        "panel": panel,
        "choices": choices,
        "flag": flag,
        "former_name": former_name,
        "repeated": repeated,
        "recorded": recorded,
        "range": range,
        "resume": resume,
        "needs": needs,
        "instead_of": instead_of,
        "beside": beside,
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


def is_given(option: Field, config: Any) -> bool:
    """Whether a setting has another value than its default."""
    return bool(getattr(config, option.name) != option.default)


def describe_idle(option: Field, config: Any) -> str | None:
    """That a setting does nothing, as a sentence, where another one has not the value that it needs, or goes over it; else
    None."""
    over = option.metadata["beside"]
    if over and getattr(config, option.name) and getattr(config, over) is not None:
        return f"{flag_of(option)} does nothing beside --{over.replace('_', '-')}."
    name, _, value = (option.metadata["needs"] or "").partition("=")
    if not name or (str(getattr(config, name)) == value if value else getattr(config, name)):
        return None
    flag, given = f"--{name.replace('_', '-')}", getattr(config, name)
    needed = f"with {flag} {given:g}" if type(given) in (int, float) else f"without {flag} {value}".strip()
    return f"{flag_of(option).split('/')[0]} does nothing {needed}."


def fault_of(option: Field, value: Any) -> tuple[str, str] | None:
    """What is wrong with a setting's value, and what to use instead; None where nothing is."""
    if value is None and type_of(option)[1]:
        return None
    choices, allowed = option.metadata["choices"], option.metadata["range"]
    if choices and value not in choices:
        return f"is {value!r}.", f"Choose one of: {', '.join(choices)}."
    if isinstance(value, tuple) and not value:
        return "names nothing.", "Leave it out, or name one or more."
    for item in value if isinstance(value, tuple) else (value,):
        if allowed is not None and not allowed.allows(item):
            shown = repr(item) if isinstance(item, str) else str(item)
            return f"is {shown if len(shown) <= 80 else shown[:80] + '…'}.", allowed.advice
    return None


def _at_home(value: str | tuple[str, ...]) -> str | tuple[str, ...]:
    if isinstance(value, tuple):
        return tuple(str(Path(item).expanduser()) if str(item).startswith("~/") else item for item in value)
    return str(Path(value).expanduser()) if str(value).startswith("~/") else value


@frozen(kw_only=True)
class Settings:
    """Base of every group of settings: no value outside its range gets into one, and `~/` in a name is the home directory, which
    shells leave as it is in `--output=~/run`, and files of settings too.

    Raises:
        UsageError: A value means nothing.
    """

    def __post_init__(self) -> None:
        for option in fields(self):
            value = getattr(self, option.name)
            if option.metadata["range"] == Words() and value is not None:  # of names alone
                self.__dict__[option.name] = _at_home(value)
            if fault := fault_of(option, getattr(self, option.name)):
                flag = flag_of(option).split("/")[0]
                raise UsageError(f"{flag} {fault[0]}", fault[1])
