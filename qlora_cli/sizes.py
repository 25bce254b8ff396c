"""Sizes in bytes, and numbers of things, as text for sentences that people read; everywhere else they stay numbers."""

import math

KIB, MIB, GIB = 2**10, 2**20, 2**30


def format_bytes(size_bytes: float) -> str:
    """Bytes in three digits of the largest unit of which there is a tenth: 4.57 GiB, 33.0 MiB, and 999 B below 1 KiB."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if abs(size_bytes) >= max(unit / 10, KIB):
            number = size_bytes / unit
            decimals = max(0, 2 - int(math.log10(abs(number)))) if abs(number) >= 1 else 2
            return f"{number:,.{decimals}f} {name}"
    return f"{size_bytes:.0f} B"


def format_count(number: int, thing: str) -> str:
    """So many of a thing: 1 row, 1,000 rows."""
    return f"{number:,} {thing}" if number == 1 else f"{number:,} {thing}s"
