"""Checkpoints: whole or absent whatever happens while they are written; any later damage is named and skipped."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from qlora_cli.core.storage.checkpoint import (
    MANIFEST,
    checkpoint_path,
    differences,
    list_checkpoints,
    manifest_digest,
    newest_valid,
    prune,
    read_tensors,
    remove_leftovers,
    verify_checkpoint,
    write_checkpoint,
    write_tensors,
)
from qlora_cli.errors import CheckpointError, DiskFull, RunError

FILES = ("adapter.safetensors", "state.json")


def save(root: Path, step: int, **changes):
    def fill(directory: Path) -> None:
        write_tensors(directory / FILES[0], {"weight": torch.full((64,), float(step))})
        (directory / FILES[1]).write_text(json.dumps({"step": step}))

    return write_checkpoint(root, step, **({"identity": {"seed": 1}, "fill": fill, "needed_bytes": 999} | changes))


def test_what_was_written_verifies_and_reads_back(tmp_path):
    written = save(tmp_path, 7)
    found, skipped = newest_valid(tmp_path, FILES)
    assert (found, skipped) == (written, [])
    assert found.identity == {"seed": 1} and found.step == 7
    assert torch.equal(read_tensors(found.path / FILES[0])["weight"], torch.full((64,), 7.0))


def test_views_of_one_storage_are_saved_as_they_are(tmp_path):
    flat = torch.arange(32.0)
    write_tensors(tmp_path / "t.safetensors", {"a": flat[:8].view(2, 4), "b": flat[8:24].view(4, 4).t()})
    found = read_tensors(tmp_path / "t.safetensors")
    assert torch.equal(found["a"], flat[:8].view(2, 4)) and torch.equal(found["b"], flat[8:24].view(4, 4).t())


def remove(path: Path) -> None:
    path.unlink()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def link(path: Path) -> None:
    elsewhere = path.parent.parent / f"elsewhere-{path.name}"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


@pytest.mark.parametrize("damage", [remove, cut, empty, flip, zero])
@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_a_damaged_file_is_named_and_the_older_checkpoint_used(tmp_path, name, damage):
    older, newer = save(tmp_path, 1), save(tmp_path, 2)
    damage(newer.path / name)
    found, skipped = newest_valid(tmp_path, FILES)
    assert found == older
    assert [s.path for s in skipped] == [newer.path]
    assert name in skipped[0].reason


def test_a_link_in_place_of_a_file_is_refused(tmp_path):
    written = save(tmp_path, 1)
    link(written.path / FILES[0])
    with pytest.raises(CheckpointError, match=r"adapter.safetensors is a link"):
        verify_checkpoint(written.path)


def test_what_was_verified_is_what_is_read_and_no_later_change_reaches_it(tmp_path):
    save(tmp_path, 1)
    found = newest_valid(tmp_path)[0]
    tensors = read_tensors(found, FILES[0])
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    replacement = tmp_path / "other"
    write_tensors(replacement, {"weight": torch.zeros(64)})
    replacement.replace(found.path / FILES[0])  # another file under the name: the verified one is still read
    assert torch.equal(read_tensors(found, FILES[0])["weight"], tensors["weight"])
    found.close()
    with pytest.raises(CheckpointError, match=r"adapter.safetensors was changed while it was read"):
        read_tensors(found, FILES[0])
    assert torch.equal(tensors["weight"], torch.full((64,), 1.0))
    save(tmp_path, 2)
    found = newest_valid(tmp_path)[0]
    with (found.path / FILES[0]).open("r+b") as stream:  # written into, in place
        stream.seek(-4, 2)
        stream.write(b"\1\2\3\4")
    with pytest.raises(CheckpointError, match="was changed"):
        read_tensors(found, FILES[0])


@pytest.mark.parametrize("call", ["open", "pread", "fstat"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES, errno.ELOOP])
@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_a_file_that_cannot_be_read_leads_to_the_older_checkpoint(tmp_path, monkeypatch, name, number, call):
    older, newer = save(tmp_path, 1), save(tmp_path, 2)
    real, bad = getattr(os, call), (newer.path / name).stat().st_ino

    def failing(what, *arguments, **keywords):
        facts = Path(what if call == "open" else f"/proc/self/fd/{what}").stat()
        if facts.st_ino == bad:
            raise OSError(number, os.strerror(number))
        return real(what, *arguments, **keywords)

    monkeypatch.setattr(os, call, failing)
    found, skipped = newest_valid(tmp_path, FILES)
    assert found == older and f"{name} cannot be read ({os.strerror(number)})" in skipped[0].reason


def test_a_pipe_in_place_of_a_file_is_not_waited_for(tmp_path):
    older, newer = save(tmp_path, 1), save(tmp_path, 2)
    for name in (FILES[0], MANIFEST):
        (newer.path / name).unlink()
        os.mkfifo(newer.path / name)
        found, skipped = newest_valid(tmp_path, FILES)
        assert found == older and "not a regular file" in skipped[0].reason


def test_the_order_is_the_step_s_number(tmp_path):
    for step in (99_999_998, 99_999_999):
        save(tmp_path, step)
    prune(tmp_path, save(tmp_path, 100_000_000), keep=2)
    assert [int(path.name[5:]) for path in list_checkpoints(tmp_path)] == [99_999_999, 100_000_000]
    assert newest_valid(tmp_path, FILES)[0].step == 100_000_000


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/b", "..", ".hidden", "a\x00b", "C:\\x", ""])
def test_a_manifest_naming_a_path_is_refused_before_a_file_is_looked_at(tmp_path, name):
    written = save(tmp_path, 1)
    manifest = json.loads((written.path / MANIFEST).read_text())
    del manifest["sha256"]
    manifest["files"] = {FILES[0]: {"bytes": 1, "sha256": "00"}, name: {"bytes": 1, "sha256": "00"}}
    (written.path / MANIFEST).write_text(json.dumps({**manifest, "sha256": manifest_digest(manifest)}))
    with pytest.raises(CheckpointError, match="not a plain file name"):
        verify_checkpoint(written.path)


@pytest.mark.parametrize(
    "changes", [{"files": [1]}, {"step": "x"}, {"identity": 3}, {"files": {"a": 1}}, {"format": 99}]
)
def test_a_malformed_manifest_with_a_right_digest_is_refused(tmp_path, changes):
    written = save(tmp_path, 1)
    manifest = json.loads((written.path / MANIFEST).read_text()) | changes
    del manifest["sha256"]
    (written.path / MANIFEST).write_text(json.dumps({**manifest, "sha256": manifest_digest(manifest)}))
    with pytest.raises(CheckpointError, match=MANIFEST):
        verify_checkpoint(written.path)


def test_a_checkpoint_lacking_a_required_file_or_under_another_steps_name_is_skipped(tmp_path):
    save(tmp_path, 1)
    assert "does not name optimizer" in newest_valid(tmp_path, [*FILES, "optimizer"])[1][0].reason
    save(tmp_path, 5).path.rename(checkpoint_path(tmp_path, 9))
    found, skipped = newest_valid(tmp_path, FILES)
    assert found.step == 1 and "its manifest is of step 5" in skipped[0].reason


def test_pruning_keeps_the_newest_whole_ones_and_the_protected(tmp_path):
    for step in range(1, 6):
        save(tmp_path, step)
    (checkpoint_path(tmp_path, 4) / FILES[0]).unlink()
    prune(tmp_path, verify_checkpoint(checkpoint_path(tmp_path, 5)), keep=2, protect=[1])
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000001", "step-00000003", "step-00000005"]


def test_pruning_after_going_back_removes_the_newer_that_did_not_verify(tmp_path):
    for step in (1, 2, 8):
        save(tmp_path, step)
    prune(tmp_path, save(tmp_path, 3), keep=2)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000002", "step-00000003"]


def test_keeping_one_leaves_only_the_one_just_written(tmp_path):
    save(tmp_path, 1)
    prune(tmp_path, save(tmp_path, 2), keep=1)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000002"]


def test_leftovers_of_a_killed_save_are_removed_and_never_taken_for_a_checkpoint(tmp_path):
    save(tmp_path, 1)
    (tmp_path / ".step-00000002.77.tmp").mkdir()
    assert newest_valid(tmp_path)[0].step == 1
    remove_leftovers(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_names_the_bytes_and_leaves_the_old_checkpoint(tmp_path, number):
    older = save(tmp_path, 1)

    def fill(directory: Path) -> None:
        (directory / "half").write_bytes(b"1")
        raise OSError(number, "no room")

    with pytest.raises(DiskFull, match="999 B are needed") as caught:
        save(tmp_path, 2, fill=fill)
    assert caught.value.exit_code == 74 and "--resume" in caught.value.hint
    assert newest_valid(tmp_path) == (older, []) and [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


@pytest.mark.parametrize("kind", [SafetensorError, Exception])  # tokenizers raises bare ones
def test_a_full_disk_in_the_words_of_a_library_is_understood(tmp_path, kind):
    def fill(directory: Path) -> None:
        raise kind("Error while serializing: I/O error: No space left on device (os error 28)")

    with pytest.raises(DiskFull):
        save(tmp_path, 1, fill=fill)


@pytest.mark.parametrize(
    ("raised", "seen", "words"),
    [
        (OSError(errno.EIO, "broken disk", "/a/b"), RunError, "refused a file operation at /a/b: Input/output error"),
        (SafetensorError("I/O error: broken (os error 5)"), RunError, "refused a file operation: Input/output error"),
        (ConnectionRefusedError(111, "refused"), ConnectionRefusedError, "refused"),
        (ZeroDivisionError("x"), ZeroDivisionError, "x"),
    ],
)
def test_any_other_failure_is_said_or_raised_as_it_is_and_leaves_nothing(tmp_path, raised, seen, words):
    def fill(directory: Path) -> None:
        raise raised

    with pytest.raises(seen, match=words):
        save(tmp_path, 1, fill=fill)
    assert list(tmp_path.iterdir()) == []


def test_differences_name_every_leaf_and_see_through_json(tmp_path):
    saved = {"base": {"sha": "a"}, "settings": {"rank": 8, "targets": ["q"], "gone": 1}}
    now = {"base": {"sha": "a"}, "settings": {"rank": 16, "targets": ("q",), "new": 2}}
    assert differences(saved, now) == ["settings.gone: 1 → None", "settings.new: None → 2", "settings.rank: 8 → 16"]
    assert differences({"a": 32, "b": [1]}, {"a": 32.0, "b": (1,)}) == []
    assert differences({"data": "0a" * 32}, {"data": "1b" * 32}) == ["data: other content"]
