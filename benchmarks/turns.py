"""Processes that train in; the figures of each, measured one after another though all started at once, out."""

import json
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from pausing import PausableProcess
from train_speed import figures_of, read_steps

POLL_SECONDS = 0.02  # the steps of the smallest model take 40 ms
QUIET_SECONDS = 1.0  # for what paused processes sent to the card before
AFTER_PAUSE = 2  # steps left out: the one that was paused, and the next
SPARE = 8  # steps that may pass before a process is paused; those left over are never computed
WRITERS_AT_ONCE = 2


@dataclass
class Contender:
    """One who does a work, on the way to its figures.

    Attributes:
        needs: Writes its model; None where that is there already.
        warm: Steps before it is paused.
        counted: Steps that count.
        state: waiting, warming, paused, or done.
        late: Not warm when it was paused, or never started.
        first: Index of the first step that counts.
        result: Its entry among the results.
    """

    work: str
    who: str
    process: PausableProcess
    steps_file: Path
    needs: PausableProcess | None
    warm: int
    counted: int
    result: dict
    state: str = "waiting"
    late: bool = True
    first: int = 0
    started: float = 0.0

    def fail(self, error: str, log: str) -> None:
        """Notes what went wrong in place of figures."""
        self.state = "done"
        self.result |= {"error": error, "log": log}
        print(f"{self.work} {self.who}: {error}", flush=True)

    def start(self) -> None:
        """Starts to warm up."""
        self.process.start()
        self.state, self.first, self.started = "warming", self.warm, time.monotonic()

    def pause(self) -> None:
        """Pauses wherever it is."""
        self.process.pause()
        passed = len(read_steps(self.steps_file))
        self.state, self.first, self.late = "paused", max(self.warm, passed + AFTER_PAUSE), passed < self.warm
        seconds = round(time.monotonic() - self.started, 1)
        self.result |= {"paused_after_s": seconds, "paused_after_steps": passed}
        print(f"{self.work} {self.who}: paused after {passed} steps, {seconds} s", flush=True)


class Bench:
    """One run of this script.

    Args:
        contenders: In the order in which they are measured.
        json_path: Where the results go each time that one is known.
        ends_at: When all has to be over, of time.monotonic().
    """

    def __init__(self, contenders: list[Contender], json_path: Path | None, ends_at: float) -> None:
        self.contenders, self.json_path, self.ends_at = contenders, json_path, ends_at
        self.writers = list({id(c.needs): c.needs for c in contenders if c.needs}.values())
        self.stopping = False
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._stop)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.stopping = True  # looked at in every loop, so that no process escapes between its start and its record

    def goes_on(self, until: float) -> bool:
        """Waits a moment; whether there is time left."""
        time.sleep(POLL_SECONDS)
        return not self.stopping and time.monotonic() < min(until, self.ends_at)

    def warm_up(self, *, at_once: int, stagger_s: float, patience_s: float) -> None:
        """Starts all as soon as their models are there, and pauses each when it is warm, or when patience is over."""
        last_start, until = -stagger_s, time.monotonic() + patience_s
        while self._unready() and self.goes_on(until):
            for writer in self.writers:
                if writer.process is None and sum(w.running for w in self.writers) < WRITERS_AT_ONCE:
                    writer.start()
            for contender in self._unready():
                if contender.state == "warming":
                    self._watch(contender)
                elif contender.needs and contender.needs.code:
                    contender.fail("its model could not be written", contender.needs.tail())
                elif contender.needs is None or contender.needs.code == 0:
                    warming = sum(c.state == "warming" for c in self.contenders)
                    if warming < at_once and time.monotonic() - last_start >= stagger_s:
                        contender.start()
                        last_start = time.monotonic()
        for writer in self.writers:
            writer.kill()
        for contender in self._unready():
            if contender.state == "warming":
                contender.pause()
        self.keep()

    def _unready(self) -> list[Contender]:
        return [c for c in self.contenders if c.state in ("waiting", "warming")]

    def _watch(self, contender: Contender) -> None:
        if not contender.process.running:
            contender.fail(f"exit {contender.process.code} while it warmed up", contender.process.tail())
            contender.process.kill()
            self.keep()
        elif len(read_steps(contender.steps_file)) >= contender.warm:
            contender.pause()

    def measure_all(self, turn_s: float) -> None:
        """Gives each its turn, those that are warm first."""
        left = [c for c in self.contenders if c.state != "done"]
        time.sleep(0 if self.stopping else QUIET_SECONDS)
        for contender in sorted(left, key=lambda c: c.late):
            self._measure(contender, turn_s)
            contender.process.kill()
            self.keep()

    def _measure(self, contender: Contender, turn_s: float) -> None:
        if self.stopping or time.monotonic() > self.ends_at:
            contender.fail(self._unmeasured(), contender.process.tail())
            return
        if contender.state == "waiting":
            if contender.needs and contender.needs.code != 0:
                contender.fail("its model was not written in time", contender.needs.tail())
                return
            contender.start()
        else:
            contender.process.go_on()
        until, running = time.monotonic() + turn_s * (1 + contender.late), True  # a late one has to warm up too
        enough = contender.first + contender.counted
        while running and len(read_steps(contender.steps_file)) < enough and self.goes_on(until):
            running = contender.process.running  # what it wrote before its end is read once more
        contender.process.kill()
        steps = read_steps(contender.steps_file)
        counted = steps[contender.first : enough]
        contender.state = "done"
        if len(counted) < contender.counted:
            how = "out of time" if running else f"exit {contender.process.code}"
            contender.fail(f"{how} after {len(steps)} steps of {enough}", contender.process.tail())
        if counted:
            contender.result |= {**figures_of(counted), "first_loss": steps[0]["loss"]}
        contender.result |= {"engine": engine_of(contender.process.log), "log": contender.process.tail()}
        print(f"{contender.work} {contender.who}: {contender.result.get('tokens_per_second')} tokens/s", flush=True)

    def _unmeasured(self) -> str:
        return "stopped" if self.stopping else "no time was left to measure it"

    def close(self) -> None:
        """Ends whatever is left, with its figures lost, and keeps the results."""
        for process in [*self.writers, *(c.process for c in self.contenders)]:
            process.kill()
        for contender in self.contenders:
            if contender.state != "done":
                contender.fail(self._unmeasured(), contender.process.tail())
        self.keep()

    def keep(self) -> None:
        """Writes the results that are known so far."""
        if self.json_path:
            written = self.json_path.with_name(f".{self.json_path.name}.new")
            written.write_text(json.dumps([c.result for c in self.contenders], indent=1))
            written.replace(self.json_path)


def engine_of(log: Path) -> str:
    """What ours says that it computes with: it depends on the memory that it found free."""
    return next((line for line in log.read_text(errors="replace").splitlines() if "engine:" in line), "")[-300:]
