"""Lock on a directory: one process at a time, released however the holder ends."""

import contextlib
import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qlora_cli.artifacts import LOCK, process_name
from qlora_cli.core.storage.lock import find_holder, locked, locked_file, require_unheld
from qlora_cli.errors import DiskFull, RunError

HOLDER = """
import sys, time
from pathlib import Path
from qlora_cli.core.storage.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(3600)
"""


def test_a_directory_is_held_by_one_process_until_it_ends_however_it_ends(tmp_path):
    directory = tmp_path / "made" / "here"
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(directory)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        match = rf"\({holder.pid}\) is writing to the-output\."
        with pytest.raises(RunError, match=match) as caught, locked(directory, output="the-output"):
            pytest.fail("two processes hold it")
        assert "--output" in caught.value.hint
        assert find_holder(directory) == holder.pid
        with pytest.raises(RunError, match=rf"\({holder.pid}\) is writing to"):
            require_unheld(directory)
        os.kill(holder.pid, signal.SIGKILL)
    assert find_holder(directory) is None  # it has ended, though its name stands there
    with locked(directory):
        assert find_holder(directory) is None  # another one
    with locked(directory):
        pass
    place = process_name().rsplit("-", 2)[0]
    for words in ("", "x", "1 a-b-c-d", f"1 {place}-²-1", place):
        (directory / LOCK).write_text(words)
        assert find_holder(directory) is None
    (directory / LOCK).unlink()
    os.mkfifo(directory / LOCK)  # which nobody writes to
    assert find_holder(directory) is None


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"), locked(tmp_path / "file" / "below"):
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_without_locks_the_work_goes_on_and_a_second_process_is_still_refused(tmp_path, monkeypatch, number):
    def refuse(*arguments):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    notices = []
    with locked(tmp_path, report=notices.append):
        assert "has no locks" in notices[0].text
    with alive() as holder:
        write_owner(tmp_path, holder)
        with pytest.raises(RunError, match=rf"\({holder.pid}\) is writing"), locked(tmp_path):
            pass
    with locked(tmp_path):  # it has ended since
        pass


def test_where_locks_are_granted_to_all_the_holder_s_name_tells(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", lambda *arguments: None)
    with alive() as holder:
        write_owner(tmp_path, holder)
        with pytest.raises(RunError, match=rf"\({holder.pid}\) is writing"), locked(tmp_path):
            pass
    for machine, space in ((None, "1"), ("00000000", None)):  # another container; another machine
        with alive() as holder:
            write_owner(tmp_path, holder, machine, space)
        with pytest.raises(RunError, match="is writing"), locked(tmp_path):
            pass
        write_owner(tmp_path, holder, machine, space)
        os.utime(tmp_path / LOCK, (time.time() - 1000,) * 2)  # untouched: its holder was killed
        with locked(tmp_path):
            pass


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_or_quota_at_the_lock_is_a_full_disk(tmp_path, monkeypatch, number):
    def full(*arguments, **keywords):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open", full)
    with pytest.raises(DiskFull) as caught, locked(tmp_path):
        pass
    assert caught.value.exit_code == 74


def test_a_file_is_held_by_one_and_its_lock_leaves_nothing(tmp_path):
    path = tmp_path / "new" / "answers.jsonl"
    with locked_file(path):
        with pytest.raises(RunError, match="is writing to"), locked_file(path):
            pass
        with locked_file(path.with_name("other")):
            pass
    assert list(path.parent.iterdir()) == []
    (path.parent / ".answers.jsonl.lock").write_text("123")  # as a kill leaves it
    with locked_file(path):
        pass
    assert list(path.parent.iterdir()) == []


@contextlib.contextmanager
def alive():
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


def write_owner(directory, process, machine=None, space=None):
    """What a holder writes into its lock."""
    own_machine, own_space, *_ = process_name().split("-")
    start = "1"
    with contextlib.suppress(FileNotFoundError):
        start = Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()[19]
    name = f"{machine or own_machine}-{space or own_space}-{process.pid}-{start}"
    (directory / LOCK).write_text(f"{process.pid} {name}\n")
