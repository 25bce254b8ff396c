"""Ours and the peers on one card, in turn: each peer, and then ours on the same checkpoint and rows.

    python benchmarks/train_beside.py --work llama-free --work pythia --folder /tmp/bench --json beside.json
    python benchmarks/train_beside.py --work gpt-oss-least-experts --together --extra "--matmul fp8 --no-cache --init default"

What is compared stands a minute apart on the same card, each with the card and the cores to itself. Figures are those of
train_speed.py and train_peers.py; the last column is the speed of ours over that of the peer just before it.

With --together all start at once, which spares the minutes in which each loads and compiles alone; who is warm stands
still until the others are, and each is then measured by itself. They share the card's memory: what ours is not told by
`--vram` it plans by what the others leave, and what it measures of a layer before step 1 is slower beside them. Whose
figure decides is better measured alone.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

import train_peers
import train_speed

STEPS_AFTER = 2  # a contender's first steps after it stood still do not count
MANY_STEPS = 100_000


@dataclass
class Contender:
    """One of those that start together.

    Attributes:
        work: What it trains.
        who: As the table has it.
        command: What runs it.
        environment: Of that.
        steps: Where its steps are written.
        warm: Of them, how many are left out.
        log: Where the rest of its output goes.
    """

    work: str
    who: str
    command: list[str]
    environment: dict[str, str]
    steps: Path
    warm: int
    log: Path
    process: subprocess.Popen | None = field(default=None, init=False)

    def start(self) -> None:
        """In a process group of its own; steps that a run before left there are none of its own."""
        self.steps.unlink(missing_ok=True)
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=subprocess.STDOUT, env=self.environment, start_new_session=True
            )

    def signal(self, number: int) -> None:
        """Sends the group a signal, if it is still there."""
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, number)

    def taken(self) -> list[dict]:
        """Its steps so far."""
        return train_speed.read_steps(self.steps)

    def measure(self, steps: int, seconds: float) -> dict:
        """Lets it go on alone for so many steps that count, or so long, and ends it: its figures."""
        before, until = len(self.taken()) + STEPS_AFTER, time.time() + seconds
        self.signal(signal.SIGCONT)
        while time.time() < until and len(self.taken()) < before + steps:
            time.sleep(0.05)
        self.signal(signal.SIGKILL)
        counted = self.taken()[before:]
        return train_speed.figures_of(counted) if counted else {"error": f"no step in {seconds} s", "log": ""}


def contenders_of(works: list[str], arguments: argparse.Namespace) -> list[Contender]:
    """Each work's peers, and ours after them."""
    folder, found = arguments.folder.resolve(), []
    for work in works:
        for number in train_peers.chosen_peers(work, arguments.peer):
            command, environment = train_peers.peer_command(work, number, folder, MANY_STEPS, arguments.peer_site)
            who, path = train_peers.peer_name(work, number), train_peers.steps_file(work, number, folder)
            log = folder / f"{work}-{number}.log"
            found.append(Contender(work, who, command, environment, path, arguments.peer_warm, log))
        extra = shlex.split(arguments.extra)
        command = train_speed.our_command(work, folder, steps=MANY_STEPS, extra=extra, cached=arguments.cached_base)
        path, warm = folder / f"run-{work}" / "metrics.jsonl", train_speed.warm_of(work, arguments.warm)
        environment = train_speed.our_environment(folder, cached=arguments.cached_base)
        found.append(Contender(work, "ours", command, environment, path, warm, folder / f"{work}-ours.log"))
    return found


def run_together(contenders: list[Contender], warm_s: float, measured_s: float, steps: int) -> list[dict]:
    """Starts all, waits until all stand still or `warm_s` are over, and measures those that do, one after another."""
    waiting, warm, results = list(contenders), [], {}
    try:
        for contender in contenders:
            contender.start()
        until = time.time() + warm_s
        while waiting and time.time() < until:
            for contender in list(waiting):
                if contender.process.poll() is not None:
                    results[id(contender)] = {"error": f"exit {contender.process.returncode}"}
                elif len(contender.taken()) >= contender.warm:
                    contender.signal(signal.SIGSTOP)
                    warm.append(contender)
                else:
                    continue
                waiting.remove(contender)
            time.sleep(0.1)
        for contender in waiting:
            contender.signal(signal.SIGKILL)
            results[id(contender)] = {"error": f"not warm after {warm_s:.0f} s"}
        for contender in warm:
            results[id(contender)] = contender.measure(steps, measured_s)
    finally:
        for contender in contenders:
            contender.signal(signal.SIGKILL)
    named = [{"work": c.work, "who": c.who, **results[id(c)]} for c in contenders]
    return [
        {**r, "log": c.log.read_text()[-1500:]} if "error" in r else r for r, c in zip(named, contenders, strict=True)
    ]


def main() -> None:
    """Runs the chosen works in turn, or all at once, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", action="append", choices=sorted(train_peers.PEERS), required=True, help="repeat")
    parser.add_argument("--timeout", type=float, default=240, help="seconds for one run, or until all are warm")
    parser.add_argument("--together", action="store_true", help="start all at once, measure each alone")
    parser.add_argument("--together-steps", type=int, default=8, help="steps that count of each then")
    train_speed.add_arguments(parser)
    train_peers.add_arguments(parser)
    arguments = parser.parse_args()
    folder, cached = arguments.folder, arguments.cached_base
    folder.mkdir(parents=True, exist_ok=True)
    results: list[dict] = []

    def add(result: dict) -> None:
        results.append(result)
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=1))

    works = list(dict.fromkeys(arguments.work))
    for work in works:
        train_speed.write_model(work, folder, cached=False)
        train_speed.write_work_rows(work, folder)
    if arguments.together:
        for result in run_together(contenders_of(works, arguments), arguments.timeout, 30.0, arguments.together_steps):
            add(result)
    for work in [] if arguments.together else works:
        for number in train_peers.chosen_peers(work, arguments.peer):
            add(train_peers.run_peer(work, number, folder, arguments))
            extra = shlex.split(arguments.extra)
            add(train_speed.run_work(work, folder, extra, arguments.warm, arguments.timeout, cached=cached))
    print(train_speed.draw_table(results))


if __name__ == "__main__":
    main()
