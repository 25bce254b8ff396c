"""Two processes that share each step: the same run as one process, one voice, one directory, and one end."""

import pytest

from .conftest import Outcome, Run, Zygote

ALONE = {"dropout": 0.0, "optimizer": "adamw"}  # where dropout falls depends on how a step is shared


def train_as_two(zygote: Zygote, run: Run, **fault) -> Outcome:
    function = "tests.faults.victims:train_as_ranks"
    return zygote.run(function, options=run.options, world_size=2, **fault)


def same_numbers(left: Run, right: Run) -> bool:
    """Within the rounding that another order of adding brings."""
    pairs = list(zip(left.metrics(), right.metrics(), strict=True))
    numbers = [(a[name], b[name]) for a, b in pairs for name in a if a[name] is not None]
    return all(a.keys() == b.keys() for a, b in pairs) and all(a == pytest.approx(b, rel=1e-4) for a, b in numbers)


@pytest.fixture(scope="module")
def single(zygote, make_run, tmp_path_factory) -> Run:
    run = make_run(tmp_path_factory.mktemp("single") / "out", **ALONE)
    assert zygote.train(run.options).code == 0
    return run


def test_two_processes_train_as_one_does_and_one_speaks(zygote, make_run, single, tmp_path):
    run = make_run(tmp_path / "out", **ALONE)
    done = train_as_two(zygote, run)
    assert "codes [0, 0]" in done.said, done.said
    assert done.said.count("RunStarted(") == 1 and done.said.count("StepLogged(") == 6
    assert same_numbers(run, single)
    assert {path.name for path in run.output.iterdir()} == {path.name for path in single.output.iterdir()}


def test_a_signal_to_one_stops_both_at_the_same_step_and_one_process_goes_on(zygote, make_run, single, tmp_path):
    run = make_run(tmp_path / "out", **ALONE)
    stopped = train_as_two(zygote, run, fault={"kind": "signalled", "step": 3}, faulty_rank=0)
    assert "codes [143, 143]" in stopped.said, stopped.said
    assert [int(path.name[5:]) for path in run.checkpoints] == [2, 3]
    done = zygote.train({**run.options, "resume": True})
    assert done.code == 0 and "first_step=4" in done.said, done.said
    assert same_numbers(run, single)


def test_memory_that_runs_out_on_one_repeats_the_step_on_both(zygote, make_run, single, tmp_path):
    run = make_run(tmp_path / "out", **ALONE)
    fault = {"kind": "out_of_memory", "above_tokens": 20, "from_step": 1}
    done = train_as_two(zygote, run, fault=fault, faulty_rank=0)
    assert "codes [0, 0]" in done.said and "Memory ran out" in done.said, done.said
    assert same_numbers(run, single)


def test_a_process_that_dies_does_not_leave_the_other_waiting_and_the_run_goes_on(zygote, make_run, single, tmp_path):
    run = make_run(tmp_path / "out", **ALONE)
    died = train_as_two(zygote, run, fault={"kind": "signalled", "step": 4, "number": 9}, faulty_rank=1)
    assert "codes [1, -9]" in died.said, died.said
    done = zygote.train({**run.options, "resume": True})
    assert done.code == 0 and same_numbers(run, single), done.said


def test_two_processes_resumed_are_bit_for_bit_two_processes_never_stopped(zygote, make_run, tmp_path):
    """Each with its own dropout: the random state of every rank is in the checkpoint."""
    straight, run = make_run(tmp_path / "straight"), make_run(tmp_path / "out")
    assert "codes [0, 0]" in train_as_two(zygote, straight).said
    stopped = train_as_two(zygote, run, fault={"kind": "signalled", "step": 3}, faulty_rank=1)
    assert "codes [143, 143]" in stopped.said, stopped.said
    run.options["resume"] = True
    done = train_as_two(zygote, run)
    assert "codes [0, 0]" in done.said and "first_step=4" in done.said, done.said
    assert run.weights() == straight.weights() and run.metrics() == straight.metrics()
