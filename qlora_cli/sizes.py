"""Sizes in bytes as text in binary units, for sentences that people read; everywhere else bytes stay numbers."""

import math

KIB, MIB, GIB = 2**10, 2**20, 2**30


def format_bytes(size_bytes: float) -> str:
    """Bytes in the largest binary unit that keeps the number above a tenth, or as they are below 1 KiB."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if abs(size_bytes) >= max(unit / 10, KIB):
            return f"{_three_digits(size_bytes / unit)} {name}"
    return f"{size_bytes:.0f} B"


def _three_digits(number: float) -> str:
    """4.57, 33.0, 140, 12,345: three digits where that is enough."""
    decimals = max(0, 2 - int(math.log10(abs(number)))) if abs(number) >= 1 else 2
    return f"{number:,.{decimals}f}"
