"""The zygote's other end, a small run to torment, and the table of figures that the long form prints."""

import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

from qlora_cli.artifacts import ADAPTER_WEIGHTS, CHECKPOINTS, METRICS
from qlora_cli.core.storage.checkpoint import list_checkpoints, newest_valid
from qlora_cli.core.training.state import REQUIRED_FILES

CLOCK = ("step_seconds", "tokens_per_second")
NO_CARD = os.environ.get("CUDA_VISIBLE_DEVICES") == "" or not Path("/dev/nvidiactl").exists()
FIGURES: dict[str, dict[str, int]] = defaultdict(dict)  # of the test that runs
TABLE: dict[str, dict[str, int]] = defaultdict(dict)  # of all


@dataclass(frozen=True)
class Outcome:
    """How a child ended: its exit code, negative for a signal, and what it said."""

    code: int
    said: str


class Zygote:
    """The process that forks the victims."""

    def __init__(self, directory: Path, environment: dict[str, str], inside: tuple[str, ...] = ()) -> None:
        self.errors = directory / "stderr"
        self.process = subprocess.Popen(
            [*inside, sys.executable, "-m", "tests.faults.zygote"],
            cwd=Path(__file__).resolve().parents[2],
            env={**os.environ, "OMP_NUM_THREADS": "1", "QLORA_CACHE": str(directory / "cache"), **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors.open("wb"),
            text=True,
        )

    @cached_property
    def imported(self) -> set[str]:
        """Names of the modules that it imported to begin with: all commands, and what comes with them."""
        return set(self._ask({"imported": True})["names"])

    @property
    def said_while_importing(self) -> str:
        """What it wrote to standard error; what it runs writes elsewhere."""
        return self.errors.read_text(errors="replace")

    def run(self, function: str, *, kill_when: tuple[Path, float] | None = None, **arguments: Any) -> Outcome:
        """Runs `function` of a module in a child, which may be killed some time after a file appears."""
        request = {
            "function": function,
            "arguments": arguments,
            "kill_when": [str(kill_when[0]), kill_when[1]] if kill_when else None,
        }
        return Outcome(**self._ask(request))

    def run_here(self, function: str, **arguments: Any) -> Outcome:
        """Runs `function` where the victims are forked from: none of them then imports or looks up what it needed.

        Where there is a CUDA card, in a child all the same: its context does not outlive a fork.
        """
        return Outcome(**self._ask({"function": function, "arguments": arguments, "kill_when": None, "here": NO_CARD}))

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def train(self, options: dict[str, Any], fault: dict[str, Any] | None = None, **keywords: Any) -> Outcome:
        """A run of `train`."""
        return self.run("tests.faults.victims:train", options=options, fault=fault, **keywords)

    def close(self) -> None:
        """Ends it."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


@dataclass
class Run:
    """One run directory: its state, compared with that of the run that nothing happened to."""

    options: dict[str, Any]
    reference: "Run | None" = field(default=None, repr=False)

    @property
    def output(self) -> Path:
        return Path(self.options["output"])

    @property
    def checkpoints(self) -> list[Path]:
        return list_checkpoints(self.output / CHECKPOINTS)

    def newest_is_valid(self) -> bool:
        """Whether there is no checkpoint, or the newest one verifies."""
        found, skipped = newest_valid(self.output / CHECKPOINTS, REQUIRED_FILES)
        return not skipped and (found is not None or not self.checkpoints)

    def weights(self) -> bytes:
        return (self.output / ADAPTER_WEIGHTS).read_bytes()

    def metrics(self) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in (self.output / METRICS).read_text().splitlines()]
        return [{name: value for name, value in line.items() if name not in CLOCK} for line in lines]

    def equals_reference(self) -> bool:
        """Bit for bit: the adapter, and every number of every step."""
        assert self.reference is not None
        return self.weights() == self.reference.weights() and self.metrics() == self.reference.metrics()


@pytest.fixture(scope="session")
def make_run(zygote, tiny_model, tmp_path_factory) -> Callable[..., Run]:
    """`make_run(output)`: a run of six steps that nothing happened to yet, and one that finished, to compare with."""
    folder = tmp_path_factory.mktemp("runs")
    data = folder / "rows.jsonl"
    rows = [{"text": f"{a} and {b} make {a + b}."} for a in range(5) for b in range(6)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {
        "model": str(tiny_model("llama")),
        "data": str(data),
        "max_steps": 6,
        "batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 5e-3,
        "dropout": 0.1,
        "rank": 4,
        "target_modules": ["q_proj", "down_proj"],
        "eval_rows": 4,
        "eval_every": 3,
        "save_every": 2,
        "optimizer": "paged_adamw_8bit",
        "base_cache": False,
        "init": "default",
    }
    reference = Run({**common, "output": str(folder / "reference")})
    done = zygote.run_here("tests.faults.victims:train", options=reference.options)
    assert done.code == 0, done.said

    def make(output: Path, **changes: Any) -> Run:
        return Run({**common, "output": str(output), **changes}, reference)

    return make


def count(row: str, **figures: int) -> None:
    """Adds figures to a row of the table printed at the end."""
    for name, value in figures.items():
        FIGURES[row][name] = FIGURES[row].get(name, 0) + value


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Any:
    """Hands the figures of a test on with its report, which comes from another process where several run them."""
    report = yield
    if FIGURES:
        report.user_properties.append(("faults", {row: dict(figures) for row, figures in FIGURES.items()}))
        FIGURES.clear()
    return report


def pytest_runtest_logreport(report: Any) -> None:
    """Adds the figures of a test to the table."""
    for name, rows in report.user_properties:
        for row, figures in rows.items() if name == "faults" else ():
            for column, value in figures.items():
                TABLE[row][column] = TABLE[row].get(column, 0) + value


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The table of what happened, in the form benchmarks/faults.md keeps it."""
    if TABLE:
        terminalreporter.write_sep("=", "faults")
        terminalreporter.write_line("| fault | figures |\n|---|---|")
        for row, figures in TABLE.items():
            text = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in figures.items())
            terminalreporter.write_line(f"| {row} | {text} |")
