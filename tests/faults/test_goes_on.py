"""A run goes on or is saved: streams that cannot be written, a run directory that is removed, whatever fails in a step."""

import shutil

import pytest

from qlora_cli.config import TrainConfig
from qlora_cli.config_file import as_yaml
from tests.conftest import most_slow

from .conftest import count

BROKEN = ["reader gone", "disk full", "terminal closed", "closed", "full pipe"]


@pytest.mark.parametrize("broken", most_slow(BROKEN, ["reader gone", "full pipe"]))
def test_standard_error_that_cannot_be_written_changes_nothing(zygote, make_run, tmp_path, broken):
    run = make_run(tmp_path / "out")
    options = {name: tuple(value) if isinstance(value, list) else value for name, value in run.options.items()}
    (tmp_path / "run.yaml").write_text(as_yaml(TrainConfig(**options)))
    line = ["train", "--config", str(tmp_path / "run.yaml")]
    done = zygote.run("tests.faults.victims:command_line", arguments=line, broken=broken)
    equal = done.code == 0 and run.equals_reference()
    count(f"standard error: {broken}", runs=1, ended_or_different=int(not equal))
    assert equal, done.said


def test_a_removed_run_directory_is_said_at_the_next_step_and_what_was_trained_is_there_again(
    zygote, make_run, tmp_path
):
    run = make_run(tmp_path / "out", save_every=100)
    ended = zygote.train(run.options, {"kind": "removed", "path": str(run.output), "step": 4})
    assert ended.code == 1 and "was removed" in ended.said and "--resume" in ended.said, ended.said
    done = zygote.train({**run.options, "resume": True})
    equal = done.code == 0 and "first_step=6" in done.said and run.equals_reference()
    count("run directory removed", runs=1, steps_lost=int(not equal))
    assert equal, done.said


@pytest.mark.parametrize("where", most_slow(["forward", "report"], ["forward"]))
def test_whatever_fails_costs_no_step(zygote, make_run, tmp_path, where):
    run = make_run(tmp_path / "out", save_every=100)
    ended = zygote.train(run.options, {"kind": "failing", "where": where, "step": 4})
    assert ended.code == 1 and "injected" in ended.said, ended.said
    assert [path.name for path in run.checkpoints] == ["step-00000003" if where == "forward" else "step-00000004"]
    done = zygote.train({**run.options, "resume": True})
    equal = done.code == 0 and run.equals_reference()
    count("exception in a step", runs=1, different_after_resume=int(not equal))
    assert equal, done.said
    shutil.rmtree(run.output)
