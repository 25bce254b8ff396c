"""Digests of files: taken once, and anew after any change."""

import hashlib
import os

import pytest

from qlora_cli.core.storage import content_digest
from qlora_cli.core.storage.content_digest import content_digests, was_written_since
from qlora_cli.errors import RunError
from qlora_cli.events import report_nothing


@pytest.fixture
def settled(tmp_path, monkeypatch):
    """A file that was last changed long ago."""
    monkeypatch.setattr(content_digest, "SETTLED_NS", -1)
    path = tmp_path / "file"
    path.write_bytes(b"content")
    return path


def digest_of(path):
    (digest,) = content_digests([path], report_nothing)
    return digest


def test_a_file_is_read_once_and_again_after_an_edit_that_puts_its_times_back(settled, monkeypatch):
    assert digest_of(settled) == hashlib.sha256(b"content").hexdigest()
    with monkeypatch.context() as patched:
        patched.setattr(content_digest, "_read_all", None)  # which would be called
        assert digest_of(settled) == hashlib.sha256(b"content").hexdigest() and not was_written_since(settled)
    before = settled.stat()
    settled.write_bytes(b"CONTENT")
    os.utime(settled, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert was_written_since(settled)
    assert digest_of(settled) == hashlib.sha256(b"CONTENT").hexdigest()


def test_a_file_that_was_just_written_is_read_again_as_a_change_may_have_the_same_time(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"content")
    assert digest_of(path) == hashlib.sha256(b"content").hexdigest()
    path.write_bytes(b"CONTENT")
    assert digest_of(path) == hashlib.sha256(b"CONTENT").hexdigest()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"stamp": [], "settled": true, "sha256": 3}'])
def test_a_damaged_record_costs_time_only(settled, content):
    digest_of(settled)
    content_digest._record(settled).write_text(content)
    assert digest_of(settled) == hashlib.sha256(b"content").hexdigest()


def test_a_file_that_is_written_to_meanwhile_is_said(settled, monkeypatch):
    def write(*_):
        settled.write_bytes(b"longer content")

    monkeypatch.setattr(content_digest, "SAID_BYTES", 0)
    with pytest.raises(RunError, match="written to while it was read"):
        content_digests([settled], write)
