"""Loss that is not a number, and memory that runs out, in the middle of a run of the whole command."""

import json

import pytest

from qlora_cli.artifacts import METRICS

from .conftest import count


@pytest.mark.slow
def test_nan_in_one_step_costs_that_step_only(zygote, make_run, tmp_path):
    run = make_run(tmp_path / "out")
    done = zygote.train(run.options, {"kind": "nan", "steps": [3]})
    lines = [line for line in run.metrics() if "learning_rate" in line]
    finite = [line["step"] for line in lines if line["loss"] is not None]
    good = done.code == 0 and finite == [1, 2, 4, 5, 6] and b"nan" not in (run.output / METRICS).read_bytes().lower()
    count("NaN in one step", runs=1, not_survived=int(not good))
    assert good, done.said


def test_nan_that_stays_ends_the_run_and_the_mended_run_goes_on_bit_for_bit(zygote, make_run, tmp_path):
    run = make_run(tmp_path / "out")
    done = zygote.train(run.options, {"kind": "nan", "steps": [3, 4, 5, 6]})
    reported = done.code == 1 and "not finite in steps 3 to 5" in done.said
    last = [int(path.name[5:]) for path in run.checkpoints][-1]
    resumed = zygote.train({**run.options, "resume": True})
    equal = resumed.code == 0 and run.equals_reference()
    count("NaN that stays", runs=1, not_stopped=int(not reported), different_after_resume=int(not equal))
    assert reported and last == 2 and equal, done.said + resumed.said


@pytest.mark.slow  # tests/training/test_trainer.py has the trainer do it
def test_memory_that_runs_out_midway_costs_a_notice(zygote, make_run, tmp_path):
    quiet = {"dropout": 0.0}  # where dropout falls depends on the micro-batches
    straight = make_run(tmp_path / "straight", **quiet)
    run = make_run(tmp_path / "out", **quiet)
    assert zygote.train(straight.options).code == 0
    done = zygote.train(run.options, {"kind": "out_of_memory", "above_tokens": 40, "from_step": 3})
    assert done.code == 0, done.said
    assert done.said.count("Memory ran out") == 1
    pairs = [(a, b) for a, b in zip(run.metrics(), straight.metrics(), strict=True) if "loss" in a]
    assert all(a["tokens"] == b["tokens"] and a["step"] == b["step"] for a, b in pairs)
    worst = max(abs(a["loss"] / b["loss"] - 1) for a, b in pairs)
    count("out of memory in step 3", runs=1, restarts=0, steps_lost=0)
    assert worst < 1e-3, json.dumps(pairs)
