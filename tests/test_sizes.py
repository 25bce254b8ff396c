"""Sizes in bytes as text."""

import pytest

from qlora_cli.sizes import GIB, format_bytes


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"),
        (100, "100 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (1500, "1.46 KiB"),
        (35 * 2**20, "35.0 MiB"),
        (GIB, "1.00 GiB"),
        (140 * GIB, "140 GiB"),
    ],
)
def test_bytes_are_written_in_binary_units(size_bytes, text):
    assert format_bytes(size_bytes) == text
