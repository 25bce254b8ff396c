"""Screen of a result: sentences first, then a few facts in words that explain themselves."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Screen:
    """What is drawn of a result.

    Attributes:
        sentences: The answer, most wanted first.
        facts: A few, each with what it is called.
        tables: `{"title", "columns", "rows"}`, few.
        whole: Whether the result holds nothing more.
    """

    sentences: list[str]
    facts: list[tuple[str, str]] = field(default_factory=list)
    tables: list[dict[str, Any]] = field(default_factory=list)
    whole: bool = False


def count(number: float) -> str:
    """An amount in three digits: 8.65 M, 20.6 B; below ten thousand as it is."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "K")):
        if number >= size:
            return f"{number / (1e3 if unit == 'K' else size):.3g} {unit}"
    return f"{number:,.0f}"


def percent(share: float) -> str:
    """A share in percent, in two digits: 0.042 %."""
    return f"{share:.2g} %" if share < 10 else f"{share:.0f} %"


def trained_of(result: dict[str, Any]) -> str:
    """How much is trained, as a sentence."""
    trained, total = result["trainable_parameters"], result.get("total_parameters")
    if not total:
        return f"{count(trained)} parameters are trained."
    return f"{count(trained)} of {count(total)} parameters are trained ({percent(100 * trained / total)})."


def name_of(path: str) -> str:
    """What a model or a directory is called: the last part of its path, or its hub id."""
    return path.rstrip("/").rsplit("/", 1)[-1] if path.startswith(("/", ".", "~")) else path
