"""A user without a home, or who may not write there: a place is found before any library fails for want of it."""

import os
import pwd
import tempfile
from pathlib import Path

import pytest

from qlora_cli.home import TRITON, may_write, settle_home


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    for name in TRITON:
        monkeypatch.setenv(name, "")  # so that what is set is taken back
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def close(monkeypatch, directory):
    """Has nothing below a directory be writable, also for root."""
    monkeypatch.setattr(os, "access", lambda path, mode: not Path(path).is_relative_to(directory))


def test_a_user_whom_the_system_does_not_know_has_the_home_of_containers(monkeypatch):
    def unknown(uid):
        raise KeyError(uid)

    monkeypatch.setenv("HOME", "x")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    with pytest.raises(RuntimeError):
        Path.home()
    settle_home()
    assert Path.home() == Path("/") and Path("~/.cache").expanduser() == Path("/.cache")


def test_compiled_kernels_go_elsewhere_where_the_home_cannot_be_written(monkeypatch, tmp_path):
    home = tmp_path / "home"
    monkeypatch.setenv("HOME", str(home))
    home.mkdir()
    settle_home()
    assert not os.environ["TRITON_CACHE_DIR"]  # it can: Triton's own place
    close(monkeypatch, home)
    for _ in range(2):
        monkeypatch.setenv("TRITON_CACHE_DIR", "")
        settle_home()
        place = Path(os.environ["TRITON_CACHE_DIR"])
        assert place == tmp_path / f"triton-{os.getuid()}" and place.stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("TRITON_CACHE_DIR", "/mine")
    settle_home()
    assert os.environ["TRITON_CACHE_DIR"] == "/mine"


def test_a_directory_of_somebody_else_s_is_not_taken(monkeypatch, tmp_path):
    home, uid = tmp_path / "home", os.getuid() + 1
    monkeypatch.setenv("HOME", str(home))
    close(monkeypatch, home)
    home.mkdir()
    monkeypatch.setattr(os, "getuid", lambda: uid)
    (tmp_path / f"triton-{uid}").mkdir()
    settle_home()
    place = Path(os.environ["TRITON_CACHE_DIR"])
    assert place.parent == tmp_path and place.name not in ("home", f"triton-{uid}") and place.is_dir()


def test_what_is_not_there_yet_is_writable_where_it_would_be_made(tmp_path, monkeypatch):
    assert may_write(tmp_path / "a" / "b")
    close(monkeypatch, tmp_path)
    assert not may_write(tmp_path / "a" / "b")


def test_nothing_ends_where_not_even_the_temporary_directory_can_be_written(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "not" / "there"))
    close(monkeypatch, tmp_path)
    settle_home()
    assert not os.environ["TRITON_CACHE_DIR"]
