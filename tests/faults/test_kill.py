"""SIGKILL at every file call of every save, and at random times: nothing is lost and the result is the same bits."""

import random
from pathlib import Path

import pytest

from .conftest import Run, Zygote, count

SHORT_POINTS = 2
SHORT_TIMES = 2
LONG_TIMES = 100


def finish(zygote: Zygote, run: Run, row: str) -> None:
    """Checks the directory a kill left behind, resumes it, and compares what comes out."""
    usable = run.newest_is_valid()
    done = zygote.train({**run.options, "resume": True})
    usable = usable and done.code == 0
    equal = usable and run.equals_reference()
    count(row, unusable=int(not usable), different=int(not equal))
    assert usable, done.said
    assert equal


def list_calls(zygote: Zygote, make_run, tmp_path: Path) -> list[str]:
    """The file calls of one run, in order."""
    run = make_run(tmp_path / "counted")
    done = zygote.train(run.options, {"kind": "file_calls", "names_to": str(tmp_path / "names")})
    assert done.code == 0, done.said
    return (tmp_path / "names").read_text().splitlines()


def kill_at_calls(zygote: Zygote, make_run, tmp_path: Path, points: list[int], row: str) -> None:
    for point in points:
        run = make_run(tmp_path / f"at{point}")
        killed = zygote.train(run.options, {"kind": "file_calls", "kill_at": point})
        assert killed.code == -9, killed.said
        count(row, kills=1)
        finish(zygote, run, row)


def kill_at_times(zygote: Zygote, make_run, tmp_path: Path, kills: int, row: str) -> None:
    """Kills runs at random times of their training, some again after they were resumed."""
    mark = tmp_path / "seconds"
    assert zygote.train(make_run(tmp_path / "timed").options, {"kind": "marked", "mark": str(mark)}).code == 0
    seconds = float(mark.read_text())
    chooser = random.Random(0)
    done = tried = 0
    while done < kills:
        run = make_run(tmp_path / f"time{tried}", resume=True)
        for _ in range(chooser.choice((1, 1, 2, 3))):
            tried += 1
            assert tried < 20 * kills, "the runs end before they are killed"
            mark = tmp_path / f"mark{tried}"
            fault = {"kind": "marked", "mark": str(mark)}
            ended = zygote.train(run.options, fault, kill_when=(mark, chooser.uniform(0, seconds)))
            assert ended.code in (0, -9), ended.said
            done += ended.code == -9
            count(row, kills=int(ended.code == -9))
            if ended.code == 0:
                break
        finish(zygote, run, row)


def test_killed_at_file_calls_of_a_save_a_run_goes_on_bit_for_bit(zygote, make_run, tmp_path):
    calls = list_calls(zygote, make_run, tmp_path)
    assert sum(name.startswith("write") for name in calls) >= 9  # adapter, optimizer, random state, three times
    points = random.Random(1).sample(range(1, len(calls) + 1), SHORT_POINTS)
    kill_at_calls(zygote, make_run, tmp_path, points, "SIGKILL at a file call (short)")


@pytest.mark.slow
def test_killed_at_random_times_a_run_goes_on_bit_for_bit(zygote, make_run, tmp_path):
    kill_at_times(zygote, make_run, tmp_path, SHORT_TIMES, "SIGKILL at a random time (short)")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_at_every_file_call_of_every_save(zygote, make_run, tmp_path):
    calls = list_calls(zygote, make_run, tmp_path)
    kill_at_calls(zygote, make_run, tmp_path, list(range(1, len(calls) + 1)), "SIGKILL at every file call of a run")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_at_a_hundred_random_times(zygote, make_run, tmp_path):
    kill_at_times(zygote, make_run, tmp_path, LONG_TIMES, "SIGKILL at random times, some runs several times")


@pytest.mark.slow
def test_killed_while_its_base_streams_a_run_goes_on_like_one_whose_base_is_whole(
    zygote, make_run, tiny_model, tmp_path
):
    options = {"model": str(tiny_model("llama", num_hidden_layers=5)), "resident_weights": False}
    whole = make_run(tmp_path / "whole", **options)
    assert zygote.train(whole.options).code == 0

    def make_streaming(output: Path, **changes) -> Run:
        return Run({**whole.options, "output": str(output), "stream": True, **changes}, whole)

    kill_at_times(zygote, make_streaming, tmp_path, SHORT_TIMES, "SIGKILL at a random time, the base streaming")
