"""A disk that fills up in the middle of a run: exit 74, every checkpoint written before intact, and a way on."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from qlora_cli.core.storage.checkpoint import verify_checkpoint
from qlora_cli.core.training.state import REQUIRED_FILES

from .conftest import Run, Zygote, count

FILL_AFTER_STEP = 3  # one checkpoint stands, of step 2
LIMITS_KIB = (0, 24)
ROOMS = 60


def check_full(zygote: Zygote, run: Run, fault: dict, row: str, free_again) -> bool:
    """One run on a disk that fills up; returns whether it did fill up."""
    ended = zygote.train(run.options, fault)
    filled = ended.code != 0
    kept = all(verify_checkpoint(path, REQUIRED_FILES) for path in run.checkpoints) and len(run.checkpoints) >= 1
    named = not filled or (ended.code == 74 and "are needed" in ended.said and "--resume" in ended.said)
    left = [path.name for path in run.output.rglob(".step-*")] + [path.name for path in run.output.glob(".finishing-*")]
    free_again()
    done = zygote.train({**run.options, "resume": True})
    equal = done.code == 0 and run.equals_reference()
    count(
        row,
        sizes=1,
        ended_with_74=int(ended.code == 74),
        lost_checkpoints=int(not kept),
        different_after_resume=int(not equal),
    )
    assert kept and not left
    assert named, ended.said
    assert equal, done.said
    return filled


def limit_sizes(zygote: Zygote, make_run, tmp_path: Path, limits_bytes, row: str) -> None:
    filled = []
    for limit in limits_bytes:
        run = make_run(tmp_path / str(limit))
        fault = {"kind": "file_limit", "step": FILL_AFTER_STEP, "limit_bytes": limit}
        filled.append(check_full(zygote, run, fault, row, lambda: None))
    assert any(filled)


def test_files_that_cannot_grow_end_the_run_with_74_and_lose_nothing(zygote, make_run, tmp_path):
    limits = [1024 * limit for limit in LIMITS_KIB]
    limit_sizes(zygote, make_run, tmp_path, limits, "write fails at a file size (short)")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_files_that_cannot_grow_at_fifty_sizes(zygote, make_run, tmp_path):
    largest = max(path.stat().st_size for path in make_run(tmp_path).reference.output.rglob("*") if path.is_file())
    limits = [largest * number // 50 for number in range(51)]
    limit_sizes(zygote, make_run, tmp_path, limits, "write fails at a file size (RLIMIT_FSIZE)")


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 256 MiB in memory."""
    mounted = tmp_path / "disk"
    mounted.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256m", "tmpfs", str(mounted)], capture_output=True)
    if done.returncode:
        pytest.skip("mounting a file system is not permitted here")
    yield mounted
    subprocess.run(["umount", str(mounted)], check=True)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_real_disk_that_fills_up_at_sixty_sizes(zygote, make_run, small_disk):
    reference = make_run(small_disk).reference
    finished_bytes = sum(path.stat().st_size for path in reference.output.rglob("*") if path.is_file())
    ballast = small_disk / "ballast"
    filled = 0
    for number in range(ROOMS):
        output = small_disk / f"run{number}"
        fault = {
            "kind": "full_disk",
            "ballast": str(ballast),
            "step": FILL_AFTER_STEP,
            "room_bytes": 4096 * number if number < 20 else finished_bytes * number // ROOMS,
        }
        run = make_run(output)
        filled += check_full(zygote, run, fault, "disk full (a real file system)", lambda: ballast.unlink())
        subprocess.run(["rm", "-r", str(output)], check=True)
    assert 0 < filled < ROOMS
