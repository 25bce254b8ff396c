"""Recommendations: by size, by rows, by what an adapter holds; said only where they matter."""

import pytest

from qlora_cli.core.planning.recommendations import (
    advise_on_length,
    advise_on_rank,
    recommended_held_out_rows,
    recommended_learning_rate,
    recommended_rank,
)


@pytest.mark.parametrize("billions, rate", [(0.1, 2e-4), (7, 2e-4), (13, 2e-4), (20, 1e-4), (65, 1e-4)])
def test_the_rate_is_halved_for_large_bases(billions, rate):
    assert recommended_learning_rate(int(billions * 1e9)) == rate


@pytest.mark.parametrize("rows, held_out", [(0, 0), (999, 0), (1_000, 20), (5_000, 100), (10**7, 200)])
def test_rows_are_held_out_where_there_are_enough(rows, held_out):
    assert recommended_held_out_rows(rows) == held_out


def test_nothing_is_held_out_by_itself_where_a_document_could_make_it_half_of_all():
    assert recommended_held_out_rows(1000, largest_document=480) == 20
    assert recommended_held_out_rows(1000, largest_document=481) == recommended_held_out_rows(20_000, 20_000) == 0


def test_a_rank_is_doubled_until_its_parameters_hold_the_tokens():
    assert recommended_rank(16, 40_000_000, 10_000) == 16
    assert recommended_rank(16, 40_000_000, 80_000_000) == 16
    assert recommended_rank(16, 40_000_000, 80_000_001) == 32
    assert recommended_rank(16, 40_000_000, 10**12) == 256
    assert recommended_rank(512, 40_000_000, 10**15) == 512
    assert advise_on_rank(16, 40_000_000, 10_000) is None
    assert "--rank 64" in advise_on_rank(16, 40_000_000, 300_000_000)


def test_only_short_runs_are_told_so():
    assert advise_on_length(100, 1.0) is None
    assert advise_on_length(11, 1.0).startswith("11 steps in all teach little: --epochs 10 ")
    assert advise_on_length(1, 0.5).startswith("1 step in all teaches little: --epochs 50 ")
