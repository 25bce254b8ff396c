"""Rows in; rows to train on and rows held out for evaluation out, the same for the same seed."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from qlora_cli.errors import DataError, UsageError

HOLDOUT_STREAM = 0x5E7  # apart from the stream that orders the epochs


class Rows(Protocol):
    """Tokenised rows, in memory or on disk."""

    @property
    def lengths(self) -> np.ndarray:
        """(rows,) int32: tokens of each row."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(input_ids int32 (n,), trained bool (n,)) of one row."""
        ...


class RowSubset:
    """Some rows of a set, numbered from 0; `indices` are their numbers in the set."""

    def __init__(self, rows: Rows, indices: Sequence[int] | np.ndarray) -> None:
        self.rows = rows
        self.indices = np.asarray(indices, dtype=np.int64)
        self.lengths = np.asarray(rows.lengths)[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return self.rows[int(self.indices[index])]


def hold_out(rows: Rows, *, fraction: float, count: int | None, seed: int) -> tuple[RowSubset, RowSubset]:
    """Splits rows into those trained on and those evaluated on, each in the set's order.

    Args:
        rows: All rows.
        fraction: Share held out, rounded to whole rows, at least one where it is above 0.
        count: Number held out, instead of a share.
        seed: Chooses which.

    Raises:
        UsageError: The share or the number makes no sense.
        DataError: Nothing would be left to train on.
    """
    if not 0 <= fraction < 1:
        raise UsageError(f"--eval-fraction is {fraction}.", "Use a share from 0 to below 1, such as 0.1.")
    if count is not None and count < 0:
        raise UsageError(f"--eval-rows is {count}.", "Use 0 or more rows.")
    held = count if count is not None else max(1, round(fraction * len(rows))) if fraction else 0
    if held >= len(rows):
        raise DataError(
            f"Holding out {held} of {len(rows)} rows leaves nothing to train on.",
            "Lower --eval-rows or --eval-fraction, or use more rows.",
        )
    order = np.random.default_rng([seed, HOLDOUT_STREAM]).permutation(len(rows))
    return RowSubset(rows, np.sort(order[held:])), RowSubset(rows, np.sort(order[:held]))
