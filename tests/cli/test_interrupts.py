"""Ctrl-C, SIGTERM and SIGHUP at any moment: one line, 128 + the number, no traceback; typed twice, at once."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.hub import PROJECT

# Each case in a forked child: what a command does once it works, and signals before and after.
CASES = """
import contextlib, os, signal, sys, time, types
import qlora_cli.interrupts as interrupts
from qlora_cli.cli import app

def send(*numbers):
    for number in numbers:
        os.kill(os.getpid(), number)

def loading(): send(signal.SIGINT)
def terminated_loading(): send(signal.SIGTERM)
def working(*_): send(signal.SIGINT); time.sleep(1200)
def terminated(*_): send(signal.SIGTERM); time.sleep(1200)
def hung_up(*_): send(signal.SIGHUP); time.sleep(1200)
def group_and_passed_on(*_): send(signal.SIGINT, signal.SIGINT); time.sleep(1200)
def swallowed(*_):
    with contextlib.suppress(BaseException): send(signal.SIGINT)
    raise ModuleNotFoundError("No module named 'torch.x'")
def recursion(*_):
    try: send(signal.SIGINT)
    except KeyboardInterrupt: raise RecursionError("maximum recursion depth exceeded")
def typed_twice(*_):
    with contextlib.suppress(BaseException): send(signal.SIGINT)
    interrupts.AGAIN_SECONDS = 0.0
    send(signal.SIGINT); time.sleep(1200)
def in_a_lazy_import(*_):
    with interrupts.loading(): send(signal.SIGINT)
def in_an_import(*_):
    with open("imported.py", "w") as file:
        file.write("import os, signal, time\\ntry: os.kill(os.getpid(), signal.SIGINT); time.sleep(0.2)\\nexcept BaseException: os._exit(6)\\n")
    sys.path.insert(0, ".")
    import imported
    time.sleep(1200)
def none(*_): return types.SimpleNamespace(to_dict=dict)

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored, and stays so

reading, writing = os.pipe()
for name in "loading terminated_loading working terminated hung_up group_and_passed_on swallowed recursion typed_twice " \\
        "in_a_lazy_import in_an_import none".split():
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(writing, 2); os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        interrupts.install()
        command = globals()[name]
        if "loading" in name: command()
        sys.modules["qlora_cli.commands.prepare"] = types.SimpleNamespace(prepare=command, summarise=lambda summary: summary.to_dict())
        os._exit(app.main(["prepare", "--model", "m", "--data", "d"]))
    os.close(writing)
    said = os.fdopen(reading).read().removeprefix("Loading transformers and pyarrow.\\n")
    print(name, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said.splitlines(), sep="|")
"""


# `python -m qlora_cli`, which says when it can be interrupted: on a busy machine that takes any time.
TOLD = """
import sys
from qlora_cli import interrupts
interrupts.install()
print("signals are handled", flush=True)
from qlora_cli.cli.app import main
sys.exit(main())
"""


def test_whenever_a_signal_comes_there_is_one_line_and_its_exit_code(tmp_path):
    (tmp_path / "m").mkdir()
    for name in ("m/config.json", "d"):  # what is not there is said before
        (tmp_path / name).write_text("{}")
    where = {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": str(PROJECT)}}
    done = subprocess.run([sys.executable, "-c", CASES], capture_output=True, text=True, check=True, **where)
    codes = {"none": 0, "terminated_loading": 143, "terminated": 143, "hung_up": 129}
    for line in done.stdout.splitlines():
        name, code, said = line.split("|")
        assert int(code) == codes.get(name, 130), line
        assert name == "none" or said == "['error: Interrupted.']", line
    assert len(done.stdout.splitlines()) == 12


def test_what_was_ignored_stays_so_and_children_have_the_defaults():
    script = """
import os, signal
signal.signal(signal.SIGHUP, signal.SIG_IGN)
from qlora_cli import interrupts
interrupts.install()
os.kill(os.getpid(), signal.SIGHUP)
child = os.fork()
if child == 0:
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    os.kill(os.getpid(), signal.SIGTERM)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert subprocess.run([sys.executable, "-c", script], stdout=-1, text=True, check=True).stdout == "-15\n"


@pytest.mark.slow
@pytest.mark.parametrize("command", ["prepare", "train", "merge", "generate", "inspect"])
def test_at_any_moment_of_a_command(command, tiny_model, tmp_path):
    model, rows = str(tiny_model("llama")), tmp_path / "rows.jsonl"
    rows.write_text('{"text": "one and one make two"}\n' * 40)
    arguments = {
        "prepare": ["--model", model, "--data", str(rows)],
        "train": ["--model", model, "--data", str(rows), "--max-steps", "500"],
        "merge": ["--adapter", str(tmp_path), "--model", model],
        "generate": ["--model", model, "hello", "--max-new-tokens", "400"],
        "inspect": ["--model", model],
    }[command]
    for hundredths in range(0, 1000, 75):
        process = subprocess.Popen(
            [sys.executable, "-c", TOLD, command, *arguments],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "NO_COLOR": "1"},
        )
        assert process.stdout.readline() == "signals are handled\n"
        time.sleep(hundredths / 100)
        process.send_signal(signal.SIGINT)
        said = process.communicate()[1].splitlines()
        if process.returncode != 130:
            assert process.returncode in (0, 1), (hundredths, said)  # it had ended already
            continue
        assert [line for line in said if line.startswith("error: ")] == said[-1:] or "→" in said[-1], (hundredths, said)
        assert not any("Traceback" in line for line in said)
