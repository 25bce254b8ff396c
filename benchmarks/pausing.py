"""A command in; a process that can be paused and continued, with all it starts, out.

Paused is a process group that SIGSTOP holds: what it sent to the card before is finished there, and its memory stays.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from pathlib import Path

import psutil

STOP_SECONDS = 1.0  # a thread inside the driver comes out of it first; others are to be watched meanwhile
END_SECONDS = 10.0
TAIL_CHARACTERS = 4000
DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG


def die_with_parent() -> None:
    """Has the kernel end this process when the one that started it is gone, even by SIGKILL."""
    ctypes.CDLL(None).prctl(DEATH_SIGNAL, signal.SIGKILL)


class PausableProcess:
    """One command, in a process group of its own.

    Args:
        command: What runs.
        environment: Its environment.
        directory: Its working directory, made where it is missing.
        log: File of all that it says.

    Attributes:
        process: None before the start.
    """

    def __init__(self, command: list[str], *, environment: dict[str, str], directory: Path, log: Path) -> None:
        self.command, self.environment, self.directory, self.log = command, environment, directory, log
        self.process: subprocess.Popen | None = None
        self.killed = False

    def start(self) -> None:
        """Starts the command, in this session, so that what ends the session ends it too."""
        self.directory.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                self.command,
                env=self.environment,
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                process_group=0,
                preexec_fn=die_with_parent,
            )

    @property
    def running(self) -> bool:
        """Whether it was started and has not ended; a paused one is running."""
        return self.process is not None and self.process.poll() is None

    @property
    def code(self) -> int | None:
        """How it ended; None as long as it did not."""
        return self.process.poll() if self.process else None

    def pause(self) -> None:
        """Stops the group, and waits until it has stopped, for a moment at most."""
        if not self.running or self.process is None:
            return
        os.killpg(self.process.pid, signal.SIGSTOP)
        waited_until = time.monotonic() + STOP_SECONDS
        while self.running and time.monotonic() < waited_until:
            if psutil.Process(self.process.pid).status() == psutil.STATUS_STOPPED:
                return
            time.sleep(0.005)

    def go_on(self) -> None:
        """Continues the group."""
        if self.running and self.process is not None:
            os.killpg(self.process.pid, signal.SIGCONT)

    def kill(self) -> None:
        """Ends the group and whatever it started outside of it, at once, and waits for that."""
        if self.process is None or self.killed:
            return
        started = psutil.Process(self.process.pid).children(recursive=True) if self.running else []
        self.killed = True
        with contextlib.suppress(ProcessLookupError):  # all of it has ended by itself
            os.killpg(self.process.pid, signal.SIGKILL)
        for child in started:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        self.process.wait()
        psutil.wait_procs(started, timeout=END_SECONDS)

    def tail(self) -> str:
        """The end of what it said, its steps apart: what went wrong, or was decided anew, may be long past."""
        said = self.log.read_text(errors="replace") if self.log.is_file() else ""
        return "\n".join(line for line in said.splitlines() if not line.startswith("step "))[-TAIL_CHARACTERS:]
