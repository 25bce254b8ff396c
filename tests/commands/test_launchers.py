"""Ranks as users start them: --gpus, torchrun, accelerate and SLURM; signals through the launcher, and a rank that dies."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "many_cards"
STEPS = 6
SRUN = """#!/usr/bin/env bash
# Stands in for SLURM's: every task of a job, here on one machine.
shift  # --kill-on-bad-exit
for task in $(seq 0 $((SLURM_NTASKS - 1))); do
    SLURM_PROCID=$task SLURM_LOCALID=0 SLURM_NTASKS_PER_NODE=1 "$@" & tasks="${tasks:-} $!"
done
for task in $tasks; do wait "$task" || code=$?; done
exit "${code:-0}"
"""


@pytest.fixture(scope="module")
def given(tiny_model, tmp_path_factory):
    """A folder, and the flags that every launcher is given."""
    folder = tmp_path_factory.mktemp("launchers")
    rows = [{"text": f"{a} and {b} make {a + b}."} for a in range(5) for b in range(6)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--model", str(tiny_model("llama")), "--data", str(folder / "rows.jsonl"), "--max-steps", str(STEPS)]
    flags += ["--batch-size", "2", "--gradient-accumulation-steps", "2", "--rank", "4", "--save-every", "2"]
    return folder, [*flags, "--learning-rate", "1e-3", "--optimizer", "adamw"]


@pytest.fixture(scope="module")
def case(given, zygote):
    """What is given to every launcher, and the losses of the run that one process goes through alone."""
    folder, flags = given
    options = {
        "model": flags[1],
        "data": flags[3],
        "max_steps": STEPS,
        "batch_size": 2,
        "gradient_accumulation_steps": 2,
        "rank": 4,
        "learning_rate": 1e-3,
        "optimizer": "adamw",
        "output": str(folder / "alone"),
    }
    done = zygote.run_here("tests.faults.victims:train", options=options)  # the ranks profile nothing then
    assert done.code == 0, done.said
    return folder, flags, losses(folder / "alone")


def start(command, **environment) -> subprocess.Popen:
    packages = os.pathsep.join([str(EXAMPLES.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    changed = {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": packages}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    left = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return subprocess.Popen(
        [str(word) for word in command],
        env={**left, **changed, "PATH": path, **{name: str(value) for name, value in environment.items()}},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait(process: subprocess.Popen) -> tuple[int, str, str]:
    out, said = process.communicate()
    return process.returncode, out, said


def losses(output: Path) -> list[float]:
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_gpus_starts_the_ranks_whose_losses_are_those_of_one_and_one_rank_reports(case, zygote):
    """Ranks are forked here, and started as they are below."""
    folder, flags, alone = case
    arguments = ["train", *flags, "--gpus", "2", "--output", str(folder / "gpus"), "--json"]
    done = zygote.run("tests.faults.victims:launch", arguments=arguments)
    assert done.code == 0, done.said
    (answer,) = re.findall(r"^\{$.*?^\}$", done.said, re.M | re.S)  # one object, of one rank
    assert json.loads(answer)["steps"] == STEPS
    assert done.said.count(f"step {STEPS}/{STEPS}") == 1 and "on 2 × cpu" in done.said
    assert losses(folder / "gpus") == pytest.approx(alone, rel=1e-5)


def test_more_cards_than_there_are_is_one_sentence(case, zygote):
    folder, flags, _ = case
    arguments = ["train", *flags, "--gpus", "2", "--output", str(folder / "none")]
    environment = {"ACCELERATE_USE_CPU": "0", "CUDA_VISIBLE_DEVICES": ""}
    done = zygote.run("tests.faults.victims:launch", arguments=arguments, environment=environment)
    lines = ["error: --gpus 2 was asked for, and this machine has no CUDA card.", "→ Leave --gpus out."]
    assert done.code == 2 and done.said.splitlines() == lines


def test_a_killed_rank_is_named_once_and_the_run_goes_on_until_a_signal_stops_it(case, zygote, tmp_path):
    folder, flags, _ = case
    output = folder / "killed"
    arguments = ["train", *flags, "--output", str(output), "--gpus", "2", "--max-steps", "100000"]
    with running(zygote, tmp_path / "first", arguments, output) as (done, (_, *ranks)):
        os.kill(ranks[1], signal.SIGKILL)
    ended = done.result()
    assert ended.code == 1 and ended.said.count("error:") == 1 and "Traceback" not in ended.said, ended.said
    assert f"error: Rank 1 of 2 (process {ranks[1]} on " in ended.said and "--resume" in ended.said
    assert not any(psutil.pid_exists(rank) for rank in ranks)
    # The run goes on, and a signal to the launcher stops it orderly.
    with running(zygote, tmp_path / "second", [*arguments, "--resume"], output) as (done, (launcher, *_)):
        os.kill(launcher, signal.SIGINT)
    ended = done.result()
    assert ended.code == 130 and ended.said.count("error:") == 1, ended.said
    assert "Stopped by a signal after step" in ended.said, ended.said


@contextmanager
def running(zygote, pids: Path, arguments, output: Path):
    """A run of two ranks once it has saved a checkpoint: its outcome to come; the processes of launcher and ranks."""
    before = newest(output)
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(zygote.run, "tests.faults.victims:launch", arguments=arguments, pids_to=str(pids))
        while newest(output) <= before:
            assert not done.done(), done.result()
            time.sleep(0.1)
        yield done, json.loads(pids.read_text())


def newest(output: Path) -> str:
    return max((path.name for path in (output / "checkpoints").glob("step-*")), default="")


@pytest.mark.slow
def test_gpus_starts_processes_whose_losses_are_those_of_one(case):
    folder, flags, alone = case
    code, _, said = wait(
        start([sys.executable, "-m", "qlora_cli", "train", *flags, "--gpus", "2", "--output", folder / "two"])
    )
    assert code == 0 and said.count(f"step {STEPS}/{STEPS}") == 1, said
    assert losses(folder / "two") == pytest.approx(alone, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("script", ["torchrun.sh", "accelerate.sh"])
def test_two_machines_of_one_rank_each_train_as_one_does(case, script):
    folder, flags, alone = case
    output, port = folder / script, free_port()
    command = [EXAMPLES / script, *flags, "--output", output]
    machines = [start(command, HEAD="127.0.0.1", NODE=node, NODES=2, CARDS=1, PORT=port) for node in range(2)]
    ended = [wait(machine) for machine in machines]
    assert [code for code, _, _ in ended] == [0, 0], ended
    assert f"step {STEPS}/{STEPS}" in ended[0][2] and "step" not in ended[1][2]
    assert losses(output) == pytest.approx(alone, rel=1e-5)


@pytest.mark.slow
def test_slurm_starts_a_rank_a_task(case, tmp_path):
    folder, flags, alone = case
    for name, text in (("srun", SRUN), ("scontrol", "#!/usr/bin/env bash\necho 127.0.0.1\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    output = folder / "slurm"
    path = os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]])
    job = {"SLURM_JOB_NODELIST": "here", "SLURM_NTASKS": 2, "PORT": free_port(), "PATH": path}
    code, _, said = wait(start([EXAMPLES / "slurm.sh", *flags, "--output", output], **job))
    assert code == 0 and f"step {STEPS}/{STEPS}" in said, said
    assert losses(output) == pytest.approx(alone, rel=1e-5)
