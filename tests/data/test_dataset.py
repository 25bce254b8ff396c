"""Prepared rows: what was written comes back without being read as a whole, damage is noticed; the held-out ones."""

import json
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_cli.artifacts import PREPARED_MANIFEST, PREPARED_ROWS
from qlora_cli.core.data.dataset import PreparedRows, RowSubset, RowWriter, count_shared, split_rows
from qlora_cli.errors import DataError, DiskFull, RunError


def write(directory, batches):
    directory.mkdir(parents=True, exist_ok=True)
    writer = RowWriter(directory / PREPARED_ROWS)
    rows = []
    for lengths in batches:
        offsets = np.cumsum([0, *lengths], dtype=np.int32)
        random = np.random.default_rng(len(rows))
        ids = random.integers(0, 2**31 - 1, offsets[-1]).astype(np.int32)
        trained = random.random(offsets[-1]) < 0.5
        writer.write(ids, trained, offsets, np.arange(len(rows), len(rows) + len(lengths)))
        rows += [(ids[a:b], trained[a:b]) for a, b in pairwise(offsets)]
    writer.close()
    (directory / PREPARED_MANIFEST).write_text(json.dumps({"format": 1, "rows": len(rows)}))
    return rows


@settings(max_examples=30, deadline=None)
@given(batches=st.lists(st.lists(st.integers(1, 30), max_size=6), max_size=5))
def test_rows_come_back_as_they_were_written(tmp_path_factory, batches):
    directory = tmp_path_factory.mktemp("prepared")
    rows = write(directory, batches)
    prepared = PreparedRows(directory)
    assert len(prepared) == len(rows)
    assert prepared.lengths.dtype == np.int32
    assert prepared.lengths.tolist() == [len(ids) for ids, _ in rows]
    for index, (ids, trained) in enumerate(rows):
        got_ids, got_trained = prepared[index]
        assert got_ids.dtype == np.int32
        assert got_trained.dtype == bool
        np.testing.assert_array_equal(got_ids, ids)
        np.testing.assert_array_equal(got_trained, trained)
    for wrong in (-1, len(rows)):
        with pytest.raises(IndexError):
            prepared[wrong]


def test_nothing_is_held_of_what_takes_more_than_its_share_of_memory(tmp_path):
    import pyarrow as pa

    rows = write(tmp_path, [[1000] * 500] * 8)
    before = pa.total_allocated_bytes()
    prepared = PreparedRows(tmp_path)
    np.testing.assert_array_equal(prepared[3999][0], rows[3999][0])
    np.testing.assert_array_equal(prepared[2501][1], rows[2501][1])
    assert prepared.largest_id() == max(ids.max() for ids, _ in rows)
    assert pa.total_allocated_bytes() - before < 2**16


@pytest.mark.parametrize("change", ["rewritten", "cut short", "emptied", "one bit"])
def test_rows_that_are_changed_in_place_are_told_and_never_used(tmp_path, change):
    """A map would end the process with SIGBUS where the file is cut short, or give the other bytes."""
    write(tmp_path, [[1000] * 50] * 4)
    prepared, held = (PreparedRows(tmp_path, memory_share=share) for share in (0.0, 0.5))
    wanted = held[150][0].copy()
    path = tmp_path / PREPARED_ROWS
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    if change == "one bit":
        content[middle] ^= 1
    written = {"rewritten": bytes(len(content)), "cut short": content[:middle], "emptied": b""}.get(change, content)
    path.write_bytes(written)
    with pytest.raises(RunError, match=r"rows\.arrow was changed while it was in use"):
        prepared[150]
    np.testing.assert_array_equal(held[150][0], wanted)


def test_rows_that_are_replaced_by_others_stay_what_they_were(tmp_path):
    rows = write(tmp_path / "old", [[10] * 5])
    prepared = PreparedRows(tmp_path / "old")
    write(tmp_path / "new", [[20] * 5])
    (tmp_path / "new" / PREPARED_ROWS).replace(tmp_path / "old" / PREPARED_ROWS)
    np.testing.assert_array_equal(prepared[4][0], rows[4][0])


def test_another_directory_is_no_prepared_one(tmp_path):
    with pytest.raises(RunError, match="holds no prepared rows") as error:
        PreparedRows(tmp_path)
    assert "qlora prepare" in error.value.hint


@pytest.mark.parametrize("kept_bytes", [0, 100, 2000])
def test_a_file_cut_short_is_damaged(tmp_path, kept_bytes):
    write(tmp_path, [[100] * 20])
    path = tmp_path / PREPARED_ROWS
    path.write_bytes(path.read_bytes()[:kept_bytes])
    with pytest.raises(RunError, match=r"rows\.arrow is damaged"):
        PreparedRows(tmp_path)


def test_rows_and_manifest_must_agree(tmp_path):
    write(tmp_path, [[3, 4]])
    (tmp_path / PREPARED_MANIFEST).write_text('{"format": 1, "rows": 3}')
    with pytest.raises(RunError, match="holds 2 rows, but its manifest says 3"):
        PreparedRows(tmp_path)
    (tmp_path / PREPARED_MANIFEST).write_text('{"format": 99, "rows": 2}')
    with pytest.raises(RunError, match="newer"):
        PreparedRows(tmp_path)


def test_a_full_disk_is_reported_as_such():
    from pathlib import Path

    writer = RowWriter(Path("/dev/full"))
    count = 1_000_000
    with pytest.raises(DiskFull):
        writer.write(
            np.zeros(count, np.int32), np.zeros(count, bool), np.array([0, count], np.int32), np.zeros(1, np.int64)
        )
        writer.close()


# ---------------------------------------------------------------- held-out rows


class Rows:
    lengths = np.arange(1, 21, dtype=np.int32)

    def __init__(self, records=None):
        self.records = np.arange(20) if records is None else np.asarray(records)

    def __len__(self):
        return 20

    def __getitem__(self, index):
        return np.full(index + 1, index, np.int32), np.ones(index + 1, bool)


def test_the_parts_are_disjoint_whole_and_repeatable():
    train, held = split_rows(Rows(), fraction=0.1, count=None, seed=1)
    assert len(held) == 2 and sorted([*train.indices, *held.indices]) == list(range(20))
    again = split_rows(Rows(), fraction=0.1, count=None, seed=1)[1]
    assert list(again.indices) == list(held.indices)
    assert any(
        list(split_rows(Rows(), fraction=0.1, count=None, seed=s)[1].indices) != list(held.indices) for s in (2, 3)
    )


def test_a_subset_numbers_its_rows_anew():
    train, _ = split_rows(Rows(), fraction=0.0, count=5, seed=1)
    assert len(train) == 15 and train[3][0][0] == train.indices[3] and train.lengths[3] == train.indices[3] + 1


def test_nothing_is_held_out_unless_asked_and_a_number_beats_a_share():
    assert len(split_rows(Rows(), fraction=0.0, count=None, seed=1)[1]) == 0
    assert len(split_rows(Rows(), fraction=0.5, count=0, seed=1)[1]) == 0
    assert len(split_rows(Rows(), fraction=0.001, count=None, seed=1)[1]) == 1


@pytest.mark.parametrize(("fraction", "count"), [(0, 20), (0.99, None)])
def test_what_leaves_nothing_to_train_on_is_refused(fraction, count):
    with pytest.raises(DataError):
        split_rows(Rows(), fraction=fraction, count=count, seed=1)


@given(sizes=st.lists(st.integers(1, 6), min_size=4, max_size=12), held=st.integers(1, 8), seed=st.integers(0, 99))
def test_a_conversation_is_never_on_both_sides(sizes, held, seed):
    records = np.repeat(np.arange(len(sizes)) * 7, sizes)  # numbers of records that were left out are missing
    rows = Rows(np.resize(records, 20) if len(records) < 20 else records[:20])
    try:
        train, evaluated = split_rows(rows, fraction=0, count=held, seed=seed)
    except DataError:
        return
    assert not {*rows.records[train.indices]} & {*rows.records[evaluated.indices]}
    assert len(train) + len(evaluated) == 20
    last = max(np.bincount(rows.records))
    assert held <= len(evaluated) < held + last


def test_rows_held_out_that_are_trained_on_as_well_are_counted(tmp_path, monkeypatch):
    batches = [[[1, 2], [2, 1], [0], [3]], [[0, 0], [1, 2], [3, 0], [2, 1]]]
    writer = RowWriter(tmp_path / PREPARED_ROWS)
    for number, batch in enumerate(batches):
        ids, offsets = np.concatenate(batch).astype(np.int32), np.cumsum([0, *map(len, batch)], dtype=np.int32)
        writer.write(ids, np.ones(ids.size, bool), offsets, np.arange(4) + 4 * number)
    writer.close()
    (tmp_path / PREPARED_MANIFEST).write_text(json.dumps({"format": 1, "rows": 8}))
    rows = PreparedRows(tmp_path)
    assert len(set(rows.sketches().tolist())) == 6, "two of the eight rows are there twice"
    assert count_shared(RowSubset(rows, [0, 2, 3, 4]), RowSubset(rows, [1, 5, 6, 7])) == 1
    assert count_shared(RowSubset(rows, [0, 1, 2]), RowSubset(rows, [5, 7, 3])) == 2
    assert count_shared(RowSubset(rows, [2, 3]), RowSubset(rows, [])) == 0
    monkeypatch.setattr(PreparedRows, "sketches", lambda rows: np.zeros(len(rows), np.uint64))
    read, get = [], PreparedRows.__getitem__
    monkeypatch.setattr(PreparedRows, "__getitem__", lambda rows, index: read.append(index) or get(rows, index))
    assert count_shared(RowSubset(rows, [0, 2, 3, 4]), RowSubset(rows, [1, 5, 6, 7])) == 1, "whatever else is alike"
    assert sorted(read) == [*range(8)], "each is read once: thousands may be alike"


def test_rows_without_groups_are_held_out_as_ever():
    """The choice is that of a version that knew no groups, so that a run's held-out rows stay what they were."""
    evaluated = split_rows(Rows(), fraction=0, count=4, seed=3)[1]
    order = np.random.default_rng([3, 0x5E7]).permutation(20)
    assert evaluated.indices.tolist() == sorted(order[:4].tolist())


def test_rows_written_before_groups_were_known_are_read(tmp_path):
    import pyarrow as pa

    write(tmp_path, [[3, 4], [2]])
    path = tmp_path / PREPARED_ROWS
    with pa.ipc.open_file(path) as reader:
        table = reader.read_all().drop_columns(["record"])
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    assert PreparedRows(tmp_path).records.tolist() == [0, 1, 2]
