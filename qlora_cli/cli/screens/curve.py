"""Curve of numbers in block characters: one line of them, or a few lines with an axis."""

import itertools
from collections.abc import Sequence

BLOCKS = "▁▂▃▄▅▆▇█"


def condense(values: Sequence[float], width: int) -> list[float]:
    """At most `width` means, each of its share of the values."""
    width = min(width, len(values))
    bounds = [len(values) * i // width for i in range(width + 1)] if width > 0 else []
    return [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(bounds)]


def sparkline(values: Sequence[float], width: int) -> str:
    """A curve of at most `width` block characters; each is the mean of its share of the values."""
    means = condense(values, width)
    if not means:
        return ""
    low, high = min(means), max(means)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((mean - low) * scale)] for mean in means)


def chart(values: Sequence[float], width: int, height: int) -> list[str]:
    """A curve in `height` lines of at most `width` columns, its highest and lowest value written before it.

    Each column is filled from below up to its mean, in eighths of a line.
    """
    if not values:
        return []
    margin = max(len(f"{value:.3f}") for value in (min(values), max(values))) + 1
    means = condense(values, max(1, width - margin))
    low, high = min(means), max(means)
    scale = (8 * height - 1) / (high - low) if high > low else 0.0
    eighths = [1 + round((mean - low) * scale) for mean in means]
    lines = []
    for row in range(height - 1, -1, -1):
        label = f"{high:.3f}" if row == height - 1 else f"{low:.3f}" if row == 0 else ""
        filled = (min(8, max(0, amount - 8 * row)) for amount in eighths)
        lines.append(label.rjust(margin - 1) + " " + "".join(BLOCKS[part - 1] if part else " " for part in filled))
    return lines
