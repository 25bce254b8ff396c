"""Seconds to the first line on a terminal and to the result of each command, against importing what the command needs.

    python benchmarks/startup.py [--repeats 5] [--json startup.json] [--only prepare --only inspect-adapter] [--work DIR]

A llama of two layers, rows, a run and prepared rows are made first. Every command then runs by turns with a bare
interpreter and with a process that imports only what the command needs, so that what else the machine does falls on all
of them alike: on a pseudo-terminal for the first line, and without one for the processor seconds to the result. Each
figure is the median of its repeats, and each ratio that of the medians of one call of this script. Compiled modules are kept,
as after any installation. Nothing is downloaded.
"""

import argparse
import json
import os
import pty
import re
import select
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

QLORA = [sys.executable, "-m", "qlora_cli"]
ROWS = 100
WITHOUT_TORCH = "import sys; sys.modules['torch'] = None; "  # a tokenizer needs none, and `prepare` leaves it out
LIBRARIES = "import torch, transformers, peft; from transformers import AutoModelForCausalLM, AutoTokenizer"
CONTROLS = re.compile(rb"\x1b\[[0-9;?]*[a-zA-Z]|[\r\n\s]")  # colours, movements and blanks are no line yet
LONGEST_SECONDS = 120
BARE = "interpreter alone"


@dataclass(frozen=True)
class Case:
    """One command, and the Python that imports what it needs."""

    arguments: tuple[str, ...]
    needs: str


CASES = {
    "version": Case(("--version",), "import typer"),
    "help": Case(("train", "--help"), "import typer"),
    "mistake": Case(("train", "--rank", "0"), "import typer"),
    "prepare": Case(
        ("prepare", "-m", "model", "-d", "rows.jsonl", "-o", "fresh", "--overwrite"),
        WITHOUT_TORCH + "import pyarrow; from transformers import AutoTokenizer",
    ),
    "inspect-prepared": Case(("inspect", "--prepared", "prepared"), "import typer, pyarrow"),
    "inspect-adapter": Case(("inspect", "--adapter", "out"), "import safetensors, yaml, rich"),
    "inspect-adapter-json": Case(
        ("inspect", "--adapter", "out", "--json"), "import safetensors, yaml, rich, numpy"
    ),
    "inspect-model": Case(
        ("inspect", "-m", "model"), "import torch, transformers; from transformers import AutoModelForCausalLM"
    ),
    "train": Case(("train", "-m", "model", "--prepared", "prepared", "-o", "again", "--max-steps", "1", "--overwrite"), LIBRARIES),
    "generate": Case(("generate", "-a", "out", "Hello", "--max-new-tokens", "4"), LIBRARIES),
    "merge": Case(("merge", "-a", "out", "-o", "merged", "--base", "dequantized", "--overwrite"), LIBRARIES),
}  # fmt: skip


def prepare_place(place: Path, environment: dict[str, str]) -> None:
    """A model, rows of it, and a run on them."""
    from benchmarks.support.architectures import write_model

    write_model(place / "model", "llama")
    rows = [{"question": f"What is {n} + {n}?", "answer": f"It is {2 * n}."} for n in range(ROWS)]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for line in (
        "prepare -m model -d rows.jsonl -o prepared",
        "train -m model --prepared prepared -o out --max-steps 2 --init default",
    ):
        done = subprocess.run([*QLORA, *line.split()], cwd=place, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"qlora {line}: {done.stderr}")


def first_line_seconds(command: list[str], place: Path, environment: dict[str, str]) -> float:
    """Seconds of the clock until a command shows the first letter on a terminal of its own."""
    started = time.perf_counter()
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(place)
        os.execve(command[0], command, environment)
    seen = b""
    try:
        while time.perf_counter() - started < LONGEST_SECONDS:
            if select.select([terminal], [], [], 1.0)[0]:
                try:
                    seen += os.read(terminal, 4096)
                except OSError:  # it has ended
                    break
                if CONTROLS.sub(b"", seen):
                    return time.perf_counter() - started
        raise SystemExit(f"{command} showed nothing")
    finally:
        while True:  # it is to end by itself: the next measurement shall not share the processor with it
            try:
                if not os.read(terminal, 65536):
                    break
            except OSError:
                break
        os.close(terminal)
        os.waitpid(child, 0)


def processor_seconds(command: list[str], place: Path, environment: dict[str, str]) -> float:
    """Processor seconds of a command and its processes."""
    with subprocess.Popen(
        command,
        cwd=place,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        _, _, used = os.wait4(process.pid, 0)
        process.returncode = 0
    return used.ru_utime + used.ru_stime


def measure(case: Case, place: Path, environment: dict[str, str], repeats: int) -> dict[str, float]:
    """Medians of one command, of what it needs, and of a bare interpreter."""
    command, needs = [*QLORA, *case.arguments], [sys.executable, "-c", case.needs]
    bare = [sys.executable, "-c", "print('.')"]
    figures: dict[str, list[float]] = {}
    for _ in range(repeats):
        for name, value in (
            ("first line", first_line_seconds(command, place, environment)),
            (BARE, first_line_seconds(bare, place, environment)),
            ("result", processor_seconds(command, place, environment)),
            ("needs", processor_seconds(needs, place, environment)),
        ):
            figures.setdefault(name, []).append(value)
    found = {name: statistics.median(values) for name, values in figures.items()}
    return {**found, "ratio": found["result"] / found["needs"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", action="append", choices=list(CASES), help="This command alone; may be repeated.")
    parser.add_argument("--work", type=Path, help="Where model, rows and run are made, or lie already.")
    options = parser.parse_args()
    place = options.work or Path(tempfile.mkdtemp(prefix="qlora-startup-"))
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "QLORA_CACHE": str(place / "cache"), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    if not (place / "out").is_dir():
        place.mkdir(parents=True, exist_ok=True)
        prepare_place(place, environment)
    print("| command | first line, s | an interpreter's | result, processor s | importing | ratio |")
    print("|---|---|---|---|---|---|")
    results = {}
    for name in options.only or CASES:
        found = results[name] = measure(CASES[name], place, environment, options.repeats)
        print(
            f"| `qlora {' '.join(CASES[name].arguments)}` | {found['first line']:.2f} | "
            f"{found[BARE]:.2f} | {found['result']:.2f} | {found['needs']:.2f} | "
            f"{found['ratio']:.2f} |",
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
