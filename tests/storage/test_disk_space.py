"""Disk space: asked for before a write, and a full disk said in one sentence."""

import errno
from pathlib import Path

import pytest

from qlora_cli.artifacts import temporary_beside
from qlora_cli.core.storage.disk_space import describe_refusal, is_disk_full, reporting_disk_full, require_space
from qlora_cli.errors import DiskFull, RunError


def test_space_is_asked_of_the_nearest_existing_directory(tmp_path):
    require_space(tmp_path / "not" / "yet", 1)
    with pytest.raises(DiskFull, match="are needed") as caught:
        require_space(tmp_path / "not" / "yet", 2**60)
    assert "--output" in caught.value.hint


@pytest.mark.parametrize(
    ("number", "said"), [(errno.ENOSPC, "disk is full"), (errno.EDQUOT, "quota"), (errno.EFBIG, "ulimit -f")]
)
def test_a_full_disk_a_quota_and_a_file_size_limit_are_a_full_disk(tmp_path, number, said):
    with pytest.raises(DiskFull, match=said) as caught, reporting_disk_full(tmp_path / "file"):
        raise OSError(number, "no room")
    assert str(tmp_path / "file") in caught.value.message and caught.value.exit_code == 74


def test_a_real_full_device_is_recognised():
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with pytest.raises(DiskFull), reporting_disk_full(Path("/dev/full")), Path("/dev/full").open("wb") as stream:
        stream.write(b"1")


def test_a_temporary_is_called_by_what_it_is_to_become(tmp_path):
    temporary = temporary_beside(tmp_path / "rows") / "rows.arrow"
    assert f"at {tmp_path}/rows/rows.arrow:" in describe_refusal(OSError(errno.EROFS, "", str(temporary))).message
    with pytest.raises(DiskFull, match=f"{tmp_path}/rows/rows.arrow could not"), reporting_disk_full(temporary):
        raise OSError(errno.ENOSPC, "no room")


def test_other_failures_and_those_already_reported_pass(tmp_path):
    reported = DiskFull("The disk is full: as said before.")
    with pytest.raises(RunError, match="refused a file operation: Input/output error"), reporting_disk_full(tmp_path):
        raise OSError(errno.EIO, "broken disk")
    for error in (ConnectionRefusedError(111, "refused"), KeyError("a"), reported):
        with pytest.raises(type(error)) as caught, reporting_disk_full(tmp_path):
            raise error
        assert caught.value is error
    torch_s = RuntimeError("unable to open file </a/b> in read-only mode: Permission denied (13)")
    assert (
        "Permission denied" in describe_refusal(torch_s).message and describe_refusal(RuntimeError("of (13)")) is None
    )
    assert is_disk_full(Exception("I/O error (os error 28)")) and not is_disk_full(Exception("os error 13"))
