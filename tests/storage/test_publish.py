"""Publication: at every instant the old or the new directory stands there; what the dead leave is swept or healed."""

import ctypes
import errno
import fcntl
import os
import shutil
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from qlora_cli.artifacts import process_name, temporary_beside, write_bytes
from qlora_cli.core.storage import publish as publication
from qlora_cli.core.storage.publish import atomic_directory, exchange
from qlora_cli.core.storage.temporaries import discard, heal, is_temporary, lives, sweep


def fill(target: Path, text: str) -> None:
    with atomic_directory(target) as directory:
        (directory / "file").write_text(text)


@pytest.fixture
def without_exchange(monkeypatch):
    """A file system such as NFS, whose renames take no flags."""

    def refuse(*arguments):
        ctypes.set_errno(errno.EINVAL)
        return -1

    monkeypatch.setattr(publication, "_renameat2", lambda: refuse)


def test_a_watcher_always_finds_the_old_or_the_new_one(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    if not exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this file system exchanges no names")
    target, seen, done = tmp_path / "t", set(), threading.Event()
    fill(target, "0")

    def watch():
        while not done.is_set():
            try:
                descriptor = os.open(target, os.O_RDONLY)
            except OSError as error:
                seen.add(error.errno)
            else:
                os.close(descriptor)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for number in range(50):
        fill(target, str(number))
    done.set()
    watcher.join()
    assert seen == set() and (target / "file").read_text() == "49"


def test_without_an_exchange_it_takes_two_renames_and_leaves_nothing(tmp_path, without_exchange):
    for text in ("old", "new"):
        fill(tmp_path / "t", text)
        assert (tmp_path / "t" / "file").read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == ["t"]


DIES = """
import os, sys
from pathlib import Path
from qlora_cli.core.storage import publish
from qlora_cli.core.storage.publish import atomic_directory
publish._renameat2 = lambda: None
calls, real = [0], os.rename
def rename(source, target, **keywords):
    calls[0] += 1
    if calls[0] == int(sys.argv[2]):
        os.kill(os.getpid(), 9)
    return real(source, target, **keywords)
os.rename = rename
with atomic_directory(Path(sys.argv[1])) as directory:
    (directory / "file").write_text("new")
"""


@pytest.mark.parametrize("call", [1, 2])
def test_who_dies_between_two_renames_is_healed_by_the_next_reader_or_writer(tmp_path, call):
    for healed_by in (heal, lambda target: sweep(target.parent, target.name), lambda target: fill(target, "next")):
        target = tmp_path / "t"
        fill(target, "old")
        ended = subprocess.run([sys.executable, "-c", DIES, str(target), str(call)], capture_output=True, text=True)
        assert ended.returncode == -9, ended.stderr
        assert target.exists() == (call == 1)
        healed_by(target)
        assert (target / "file").read_text() in ("old", "next")
        sweep(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["t"]


def test_only_temporaries_of_the_dead_are_swept(tmp_path):
    mine = temporary_beside(tmp_path / "t")
    mine.mkdir()
    machine, space, pid, start = mine.name.split(".")[2].rsplit("-", 1)[0].split("-")
    child = subprocess.Popen(["sleep", "3600"])
    facts = Path(f"/proc/{child.pid}/stat").read_text().rsplit(")", 1)[1].split()

    def named(machine=machine, space=space, pid=pid, start=start, age=0.0):
        path = tmp_path / f".t.{machine}-{space}-{pid}-{start}-{os.urandom(4).hex()}.tmp"
        path.mkdir()
        os.utime(path, (time.time() - age,) * 2)
        return path

    alive = {
        mine,
        named(pid=child.pid, start=facts[19]),
        named(space="1", age=-3600),  # of another container, just made, however busy this machine is
        named(machine="00000000", age=3600),  # of another machine
        held := named(space="1", age=3600),
    }
    dead = {
        named(pid=child.pid, start="1"),  # the number was given again
        named(pid=2**22 + 1),
        named(space="1", age=3600),
        named(machine="00000000", age=25 * 3600),
    }
    for former, age in ((".t.123.tmp", 0), (".t.124.old", 25 * 3600)):
        (tmp_path / former).mkdir()
        os.utime(tmp_path / former, (time.time() - age,) * 2)
        (dead if age else alive).add(tmp_path / former)
    foreign = tmp_path / ".t.tmp"
    foreign.mkdir()
    descriptor = os.open(held, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        sweep(tmp_path, "t")
        assert set(tmp_path.iterdir()) == alive | {foreign}
    finally:
        os.close(descriptor)
        child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # nobody has asked yet how it ended
    assert not lives(child.pid, facts[19])
    child.wait()
    assert not lives(child.pid, facts[19]) and not is_temporary(foreign.name)


def test_one_s_own_are_not_swept_where_the_system_does_not_tell_when_it_began(tmp_path, monkeypatch):
    name = f"{process_name().partition('-')[0]}-0-{os.getpid()}-0"
    for module in ("qlora_cli.artifacts", "qlora_cli.core.storage.temporaries"):
        monkeypatch.setattr(f"{module}.process_name", lambda: name)
    mine = temporary_beside(tmp_path / "t")
    mine.mkdir()
    sweep(tmp_path)
    assert mine.is_dir()


def test_two_containers_with_one_process_number_never_touch_each_other_s(tmp_path):
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom qlora_cli.core.storage.publish import atomic_directory\n"
        "for number in range(20):\n"
        "    with atomic_directory(Path(sys.argv[1])) as directory:\n"
        "        (directory / 'file').write_text('x' * 1000)\n"
        "        time.sleep(0.01)\n"
    )
    command = ["unshare", "--fork", "--pid", "--mount-proc", sys.executable, "-c", code, str(tmp_path / "t")]
    if subprocess.run([*command[:4], "true"], capture_output=True).returncode:
        pytest.skip("namespaces are not permitted here")
    writers = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [writer.communicate()[1] for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0], said
    assert [path.name for path in tmp_path.iterdir()] == ["t"] and (tmp_path / "t" / "file").stat().st_size == 1000


def test_what_cannot_be_removed_costs_nothing_but_room(tmp_path, monkeypatch):
    fill(tmp_path / "t", "old")

    def busy(*arguments, **keywords):
        raise OSError(errno.ENOTEMPTY, "Directory not empty")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", busy)
        fill(tmp_path / "t", "new")
        assert discard(tmp_path / "t").errno == errno.ENOTEMPTY
    assert not (tmp_path / "t").exists()
    assert all(is_temporary(path.name) for path in tmp_path.iterdir())


def test_rights_are_those_that_the_umask_leaves(tmp_path):
    before = os.umask(0)
    try:
        for mask in (0o022, 0o002, 0o077):
            os.umask(mask)
            target = tmp_path / oct(mask)
            with atomic_directory(target) as directory:
                (directory / "file").write_text("x")
                (directory / "file").chmod(0o600)  # as libraries do
            write_bytes(tmp_path / f"{mask:o}.json", b"{}")
            modes = [
                stat.S_IMODE(path.stat().st_mode) for path in (target, target / "file", tmp_path / f"{mask:o}.json")
            ]
            assert modes == [0o777 & ~mask, 0o666 & ~mask, 0o666 & ~mask]
    finally:
        os.umask(before)


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o666])
def test_a_file_that_is_written_anew_keeps_its_rights(tmp_path, mode):
    path = tmp_path / "answers.jsonl"
    path.write_text("old")
    path.chmod(mode)
    write_bytes(path, b"new")
    assert path.read_bytes() == b"new" and path.stat().st_mode & 0o777 == mode
