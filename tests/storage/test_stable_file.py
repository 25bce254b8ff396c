"""A file that is read by position: as it was when it was opened, or an error."""

import pytest

from qlora_cli.core.storage.stable_file import StableFile
from qlora_cli.errors import RunError

CONTENT = bytes(range(256))


@pytest.mark.parametrize("most_bytes", [0, 256])
def test_parts_of_it_are_read_wherever_they_lie(tmp_path, most_bytes):
    (tmp_path / "file").write_bytes(CONTENT)
    file = StableFile(tmp_path / "file", most_bytes)
    assert file.size_bytes == 256 and bytes(file.view()) == CONTENT
    for start, count in ((0, 256), (0, 1), (255, 1), (100, 50), (256, 0)):
        assert bytes(file.read(start, count)) == CONTENT[start : start + count]


def test_what_is_done_to_it_later_changes_nothing_where_it_is_in_memory_and_is_found_elsewhere(tmp_path):
    (tmp_path / "file").write_bytes(CONTENT)
    held, watched = (StableFile(tmp_path / "file", most_bytes) for most_bytes in (256, 255))
    (tmp_path / "file").write_bytes(CONTENT[:200] + b"changed")
    assert bytes(held.read(200, 56)) == CONTENT[200:]
    with pytest.raises(RunError, match="was changed while it was in use"):
        watched.read(0, 10)
