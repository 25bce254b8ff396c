"""Requests on stdin, outcomes on stdout, one JSON object a line: forks a child for each, with everything imported.

A process that is to be killed a hundred times would spend its time importing torch. This one imports once, does no
arithmetic itself (so that no thread pool stands where it forks), and lets its children be killed.
"""

import gc
import importlib
import json
import os
import signal
import sys
import tempfile
import threading
import traceback
from pathlib import Path

import pytest

from qlora_cli.cli.quiet import quiet_libraries

with quiet_libraries():  # as commands import them
    import torch
    from accelerate.state import AcceleratorState

    import qlora_cli.commands.train  # noqa: F401 - what the children need
    from qlora_cli.errors import QloraError
    from tests.conftest import draw_curves_once, leave_gap_out, remember_profiles
    from tests.faults import command_line, victims  # noqa: F401

IMPORTED = frozenset(sys.modules)
LATER = ("qlora_cli.core.engine.fsdp",)  # which commands import only where they need it


def run_child(request: dict, output: int) -> None:
    """Runs one request in this (forked) process and leaves with its exit code. What is printed goes into a pipe."""
    os.dup2(output, 1)
    os.dup2(output, 2)
    code = 1
    try:
        code = call(request)
    finally:
        os._exit(code)


def call(request: dict) -> int:
    """What a request asks for; the exit code it would end with."""
    try:
        module, _, name = request["function"].partition(":")
        getattr(importlib.import_module(module), name)(**request["arguments"])
        return 0
    except QloraError as error:
        print(f"{error.message}\n{error.hint}", flush=True)
        return error.exit_code
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def run_here(request: dict) -> dict:
    """Runs one request in this process, so that its children find imported and cached what it needed."""
    kept = [os.dup(number) for number in (1, 2)]
    with tempfile.TemporaryFile() as said:
        for number in (1, 2):
            os.dup2(said.fileno(), number)
        try:
            code = call(request)
            AcceleratorState._reset_state(reset_partial_state=True)  # a child may be one of several ranks
        finally:
            for number, copy in enumerate(kept, 1):
                os.dup2(copy, number)
                os.close(copy)
        said.seek(0)
        return {"code": code, "said": said.read().decode(errors="replace")}


def main() -> None:
    """Serves until stdin ends."""
    torch.set_num_threads(1)
    for shorten in (draw_curves_once, leave_gap_out, remember_profiles):
        shorten(pytest.MonkeyPatch())
    for name in LATER:
        importlib.import_module(name)
    for line in sys.stdin:
        request = json.loads(line)
        if "imported" in request:
            print(json.dumps({"names": sorted(IMPORTED)}), flush=True)
            continue
        if request.get("here"):
            print(json.dumps(run_here(request)), flush=True)
            continue
        gc.freeze()  # a child's collector then leaves what is here alone: a tenth of a run's time
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            run_child(request, writing)
        os.close(writing)
        if request["kill_when"]:
            threading.Thread(target=_kill_when, args=(child, *request["kill_when"]), daemon=True).start()
        with os.fdopen(reading, errors="replace") as stream:
            said = stream.read()
        _, status = os.waitpid(child, 0)
        print(json.dumps({"code": os.waitstatus_to_exitcode(status), "said": said}), flush=True)


def _kill_when(child: int, mark: str, seconds: float) -> None:
    """SIGKILL for the child so many seconds after the file `mark` appears."""
    event = threading.Event()
    while not Path(mark).exists():
        if not _alive(child):
            return
        event.wait(0.002)
    event.wait(seconds)
    if _alive(child):
        os.kill(child, signal.SIGKILL)


def _alive(child: int) -> bool:
    # Not reaped before `waitpid` above, so the number cannot be another process's yet.
    try:
        return Path(f"/proc/{child}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


if __name__ == "__main__":
    main()
