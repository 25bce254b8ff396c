"""Held-out rows: apart from the trained ones, the same for the same seed."""

import numpy as np
import pytest

from qlora_cli.core.data.split import hold_out
from qlora_cli.errors import DataError, UsageError


class Rows:
    lengths = np.arange(1, 21, dtype=np.int32)

    def __len__(self):
        return 20

    def __getitem__(self, index):
        return np.full(index + 1, index, np.int32), np.ones(index + 1, bool)


def test_the_parts_are_disjoint_whole_and_repeatable():
    train, held = hold_out(Rows(), fraction=0.1, count=None, seed=1)
    assert len(held) == 2 and sorted([*train.indices, *held.indices]) == list(range(20))
    again = hold_out(Rows(), fraction=0.1, count=None, seed=1)[1]
    assert list(again.indices) == list(held.indices)
    assert any(
        list(hold_out(Rows(), fraction=0.1, count=None, seed=s)[1].indices) != list(held.indices) for s in (2, 3)
    )


def test_a_subset_numbers_its_rows_anew():
    train, _ = hold_out(Rows(), fraction=0.0, count=5, seed=1)
    assert len(train) == 15 and train[3][0][0] == train.indices[3] and train.lengths[3] == train.indices[3] + 1


def test_nothing_is_held_out_unless_asked_and_a_number_beats_a_share():
    assert len(hold_out(Rows(), fraction=0.0, count=None, seed=1)[1]) == 0
    assert len(hold_out(Rows(), fraction=0.5, count=0, seed=1)[1]) == 0
    assert len(hold_out(Rows(), fraction=0.001, count=None, seed=1)[1]) == 1


@pytest.mark.parametrize(
    ("fraction", "count", "error"),
    [
        (1.0, None, UsageError),
        (-0.1, None, UsageError),
        (0, -1, UsageError),
        (0, 20, DataError),
        (0.99, None, DataError),
    ],
)
def test_what_leaves_nothing_to_train_on_is_refused(fraction, count, error):
    with pytest.raises(error):
        hold_out(Rows(), fraction=fraction, count=count, seed=1)
