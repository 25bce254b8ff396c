"""Numbers as short text: durations, amounts, and facts by the unit in their key."""

import math
import re
from typing import Any

from qlora_cli.sizes import format_bytes


def format_duration(seconds: float) -> str:
    """0:03, 12:40, 1:02:03; days in front where there are any."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    clock = f"{hour}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
    return f"{days} d {clock}" if days else clock


def format_seconds(seconds: float) -> str:
    """Below two minutes 3.2 s, above it 12:40."""
    return f"{seconds:.1f} s" if seconds < 120 else format_duration(seconds)


def format_amount(done: float, unit: str) -> str:
    """An amount of a progress event: 1,234 rows, or GiB where the unit is bytes."""
    return format_bytes(done) if unit == "bytes" else f"{done:,.0f} {unit}"


def format_share(done: float, total: float | None, unit: str) -> str:
    """How much of how much: 200 rows of 300 (67 %), or the amount alone while the total is unknown."""
    if not total:
        return format_amount(done, unit)
    whole = format_bytes(total) if unit == "bytes" else f"{total:,.0f}"
    return f"{format_amount(done, unit)} of {whole} ({100 * done / total:.0f} %)"


# A key's ending says its unit, everywhere in this project; here it becomes the unit that is drawn.
_UNITS = {
    "_bytes": format_bytes,
    "_percent": lambda value: f"{value:.4g} %",
    "_seconds": format_seconds,
}


def split_unit(key: str) -> tuple[str, Any]:
    """A key as words without its unit, and what formats its numbers (None for a plain number)."""
    for ending, form in _UNITS.items():
        if f"_{key}".endswith(ending):
            return key.removesuffix(ending).replace("_", " "), form
    return key.replace("_", " "), None


def format_value(key: str, value: Any) -> str:
    """One fact as text, its unit read from the key's ending."""
    form = split_unit(key)[1]
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float) and not math.isfinite(value):
        return str(value)
    if form and isinstance(value, int | float):
        return form(value)
    if isinstance(value, int):
        return str(value) if split_unit(key)[0] in ("seed", "format") else f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.5g}"
    if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value):
        return f"{value[:12]}…"  # a digest
    if isinstance(value, dict):
        return ", ".join(f"{split_unit(str(k))[0]} {format_value(str(k), v)}" for k, v in value.items()) or "none"
    if isinstance(value, list | tuple | set | frozenset):
        return ", ".join(format_value(key, item) for item in value) or "none"
    return str(value)
