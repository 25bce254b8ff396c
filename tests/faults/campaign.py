"""Campaign of faults on the five commands: what a trial sets up, what it injects, and what is looked at after it."""

import errno
import hashlib
import json
import random
import re
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora_cli.artifacts import ADAPTER_WEIGHTS, MARK, METRICS
from qlora_cli.core.storage.temporaries import heal

from .conftest import CLOCK, Outcome, Zygote, count

KILL_BEFORE, KILL_AFTER, HALF_THEN_KILL = -1, -2, -3
NO_EXCHANGE, NO_LOCKS, LOCKS_LIE, NO_RENAME_OVER = 1, 2, 4, 8
MODES = {
    "kill before": KILL_BEFORE,
    "kill after": KILL_AFTER,
    "kill in mid-write": HALF_THEN_KILL,
    "EIO": errno.EIO,
    "ENOSPC": errno.ENOSPC,
    "EDQUOT": errno.EDQUOT,
    "EACCES": errno.EACCES,
    "EINTR": errno.EINTR,
}
STICKY = {errno.ENOSPC, errno.EDQUOT}  # a disk stays full
LEFTOVER = re.compile(
    r"\..*\.(tmp|old|swap|lock|merging)|.*\.new-[0-9a-f]{8}|\.journal\.json|\.rows|\.finishing.*", re.DOTALL
)


COMMANDS = (
    *("prepare", "prepare --overwrite", "train", "train --overwrite", "train --resume"),
    *("generate", "merge", "merge --overwrite", "inspect"),
)
NEEDS = {
    "prepare --overwrite": "prepare",
    "merge --overwrite": "merge",
    **dict.fromkeys(("train --overwrite", "train --resume", "generate", "merge", "inspect"), "train"),
}


@dataclass(frozen=True)
class Command:
    """One way to call the program: what stands there before, what is typed, and what is typed again after a fault."""

    name: str
    output: str  # below the sandbox; everything else there is foreign
    arguments: Callable[[Path], list[str]]
    before: str = ""  # a template that stands at `output`
    again: tuple[str, ...] = ()
    reads: bool = False  # whether calls that read fail too


@dataclass
class Campaign:
    """The templates, the commands, and what each makes of them when nothing happens."""

    zygote: Zygote
    home: Path
    model: Path
    commands: dict[str, Command] = field(default_factory=dict)
    references: dict[str, Any] = field(default_factory=dict)
    calls: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        inputs = self.home / "in"
        inputs.mkdir(parents=True)
        rows = [{"question": f"What make {a} and {b}?", "answer": f"{a + b}."} for a in range(4) for b in range(5)]
        for name, kept in (("data", rows), ("old", rows[:12])):
            (inputs / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
        prompts = [{"prompt": f"What make {a}?"} for a in range(4)]
        (inputs / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
        self._make_commands()

    def get_ready(self, name: str) -> None:
        """What a command makes when nothing happens, its file calls, and what others need of it; once."""
        if name in self.references:
            return
        if name in NEEDS:
            self.get_ready(NEEDS[name])
        if name in BEFORE:
            BEFORE[name](self)
        command = self.commands[name]
        self.warm(name, self.zygote)
        place, names = self._set_up(name), self.home / f"calls-{name.replace(' ', '-')}"
        done = self._run(command, place, names=str(names), reads=command.reads)
        assert done.code == 0, f"{name}: {done.said}"
        self.calls[name] = names.read_text().splitlines()
        self.references[name] = self._state(command, place)
        if name in ("train", "merge"):
            self._keep(place / command.output, {"train": "run", "merge": "merged"}[name])

    def warm(self, name: str, zygote: Zygote) -> None:
        """Runs a command where the victims are forked from: they import, compile and look up nothing anew."""
        self._run(self.commands[name], self._set_up(name), warm=True, zygote=zygote)

    def _prepare_other_rows(self) -> None:
        place = self._set_up("prepare")
        shutil.copy(place / "in" / "old.jsonl", place / "in" / "data.jsonl")
        assert self._run(self.commands["prepare"], place).code == 0
        self._keep(place / "p", "old-p")

    def _train_half(self) -> None:
        half = self._set_up("train")
        stop = {"at": self._call_after_save("train"), "mode": KILL_BEFORE}
        assert self._run(self.commands["train"], half, fault=stop).code == -9
        self._keep(half / "o", "half")

    def _merge_otherwise(self) -> None:
        shutil.copytree(self.home / "merged", self.home / "old-m", symlinks=True)
        with (self.home / "old-m" / "config.json").open("a") as stream:
            stream.write(" ")  # so that the old one is told from the new one

    def _call_after_save(self, name: str) -> int:
        """Number of the first call after the first checkpoint stands under its name."""
        return (
            next(i for i, c in enumerate(self.calls[name], 1) if re.search(r"rename /o/checkpoints/step-\d+$", c)) + 2
        )

    def _keep(self, path: Path, name: str) -> None:
        shutil.copytree(path, self.home / name, symlinks=True)

    def _make_commands(self) -> None:
        training = "--max-steps 2 --save-every 1 --batch-size 2 --gradient-accumulation-steps 1 --rank 4 --dropout 0.1"
        training += " --eval-rows 2 --eval-every 2 --keep-best --learning-rate 5e-3"  # its start is cached too

        def prepare(place: Path) -> list[str]:
            data = str(place / "in" / "data.jsonl")
            return ["prepare", "--model", str(self.model), "--data", data, "--output", str(place / "p")]

        def train(place: Path) -> list[str]:
            data = str(place / "in" / "data.jsonl")
            return [
                "train",
                "--model",
                str(self.model),
                "--data",
                data,
                "--output",
                str(place / "o"),
                *training.split(),
            ]

        def generate(place: Path) -> list[str]:
            flags = ["--input", str(place / "in" / "prompts.jsonl"), "--output", str(place / "a.jsonl")]
            return ["generate", "--adapter", str(self.home / "run"), *flags, *["--max-new-tokens", "4", "--seed", "1"]]

        def merge(place: Path) -> list[str]:
            return ["merge", "--adapter", str(self.home / "run"), "--output", str(place / "m"), "--no-verify"]

        def inspect(place: Path) -> list[str]:
            return ["inspect", "--adapter", str(place / "run"), "--json"]

        def overwriting(build: Callable[[Path], list[str]]) -> Callable[[Path], list[str]]:
            return lambda place: [*build(place), "--overwrite"]

        for command in (
            Command("prepare", "p", prepare),
            Command("prepare --overwrite", "p", overwriting(prepare), before="old-p"),
            Command("train", "o", train, again=("--resume",)),
            Command("train --overwrite", "o", overwriting(train), before="run"),
            Command("train --resume", "o", lambda place: [*train(place), "--resume"], before="half"),
            Command("generate", "a.jsonl", generate),
            Command("merge", "m", merge),
            Command("merge --overwrite", "m", overwriting(merge), before="old-m"),
            Command("inspect", "run/none", inspect, reads=True),
        ):
            self.commands[command.name] = command
        assert tuple(self.commands) == COMMANDS

    def _set_up(self, name: str, where: str = "t") -> Path:
        """A sandbox as the command finds it; its inputs and a few files of others are in it too."""
        place, command = self.home / where, self.commands[name]
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        shutil.copytree(self.home / "in", place / "in")
        (place / "notes.txt").write_text("mine")
        (place / f".{Path(command.output).name}.tmp").write_text("mine too")
        if command.before:
            shutil.copytree(self.home / command.before, place / command.output, symlinks=True)
        if name == "inspect":
            shutil.copytree(self.home / "run", place / "run")
        return place

    def _run(
        self, command: Command, place: Path, *more: str, names: str = "", reads: bool = False, **keywords: Any
    ) -> Outcome:
        fault, zygote = keywords.pop("fault", None), keywords.pop("zygote", self.zygote)
        if reads:
            fault = {"reads": 1, **(fault or {})}
        arguments, cache = [*command.arguments(place), *more], keywords.pop("cache", str(place / "cache"))
        if keywords.pop("warm", False):
            return zygote.run_here("tests.faults.command_line:warm", arguments=arguments, cache=cache)
        keywords = {"root": str(place), "cache": cache, "names": names, "fault": fault, **keywords}
        return zygote.run("tests.faults.command_line:run", arguments=arguments, **keywords)

    def _state(self, command: Command, place: Path) -> Any:
        """What a command has made, without what no two runs share: clocks and random ids."""
        output = place / command.output
        if command.name.startswith("train"):
            if not (output / ADAPTER_WEIGHTS).is_file():
                return None
            lines = [json.loads(line) for line in (output / METRICS).read_text().splitlines()]
            steps = [{name: value for name, value in line.items() if name not in CLOCK} for line in lines]
            return [hashlib.sha256((output / ADAPTER_WEIGHTS).read_bytes()).hexdigest(), steps]
        if command.name.startswith("prepare"):
            return _hash(output / "rows.arrow")
        if output.is_dir():
            return {
                n: _hash(output / n)
                for n in (p.name for p in output.iterdir())
                if n not in (MARK, ".lock", ".journal.json")
            }
        return _hash(output)

    def _foreign(self, command: Command, place: Path) -> dict[str, str | None]:
        target = place / command.output
        return {
            str(path.relative_to(place)): _hash(path)
            for path in sorted(place.rglob("*"))
            if (path.is_file() or path.is_dir())
            and target not in (path, *path.parents)
            and (place / "cache") not in (path, *path.parents)
            and not LEFTOVER.fullmatch(path.name.replace(f".{Path(command.output).name}.tmp", "x"))
            and not any(LEFTOVER.fullmatch(part) for part in path.relative_to(place).parts[:-1])
        }

    def points(self, name: str, chooser: random.Random) -> list[tuple[int, str]]:
        """Calls and modes in random order: first what ends a process at a rename, then everything else."""
        self.get_ready(name)
        calls = self.calls[name]
        pairs = [(number, mode) for number in range(1, len(calls) + 1) for mode in MODES]
        chooser.shuffle(pairs)
        at_renames = [
            p for p in pairs if calls[p[0] - 1].startswith("rename") and p[1] in ("kill before", "kill after", "EIO")
        ]
        half = at_renames[: len(at_renames) // 2]
        return half + [pair for pair in pairs if pair not in half]

    def trial(self, name: str, at: int, mode: str, *, table: str, ways: int = 0) -> list[str]:
        """One fault, and the same command again; what was wrong, counted in a row of the table."""
        command, place = self.commands[name], self._set_up(name)
        before, foreign = self._state(command, place), self._foreign(command, place)
        number = MODES[mode]
        fault = {"at": at, "mode": number, "sticky": int(number in STICKY)}
        first = self._run(command, place, fault=fault, ways=ways, reads=command.reads)
        wrong = []
        heal(place / command.output)  # as whoever reads it next does, where two renames put it in place
        state = self._state(command, place)
        finished = self.references[name]
        kept = command.name.startswith("train") or name == "generate" or state in (before, finished)
        if not kept or self._foreign(command, place) != foreign:
            wrong.append("lost or changed")
        again = self._run(command, place, *command.again, ways=ways)
        done_before = "exists already" in again.said and state == finished
        if again.code != 0 and not done_before:
            wrong.append("rerun fails")
        if self._state(command, place) != finished:
            wrong.append("differs")
        if self._foreign(command, place) != foreign:
            wrong.append("lost or changed")
        left = [str(path.relative_to(place)) for path in self._left(command, place)]
        if left:
            wrong.append("leftovers")
        if any(word in said for said in (first.said, again.said) for word in ("Unexpected", "Traceback")):
            wrong.append("unexpected")
        if number in STICKY and not command.reads and first.code not in (0, 74):
            wrong.append("full disk without 74")
        columns = ("lost or changed", "rerun fails", "differs", "leftovers", "unexpected", "full disk without 74")
        count(f"{table}: {name}", trials=1, **{c.replace(" ", "_"): int(c in wrong) for c in columns})
        if wrong:
            call = self.calls[name][at - 1] if at <= len(self.calls[name]) else "?"
            where = f"{table}: {name}, {mode} at call {at} ({call}): {', '.join(dict.fromkeys(wrong))} {left}"
            wrong = [f"{where}\n  first {first.code}: {first.said[-400:]}\n  again {again.code}: {again.said[-400:]}"]
        return wrong

    def pair(self, name: str, at: int, mode: str, other: Zygote, *, shares_output: bool, table: str) -> list[str]:
        """A fault in one process while another, in a container of its own, runs the same with the same cache.

        Args:
            other: The other container.
            shares_output: Whether both write to one output, where one of them may be refused.
        """
        command, place = self.commands[name], self._set_up(name)
        beside = place if shares_output else self.home / "u"
        if not shares_output:
            shutil.rmtree(beside, ignore_errors=True)
            shutil.copytree(place, beside)
        number, cache = MODES[mode], str(place / "cache")
        fault = {"at": at, "mode": number, "sticky": int(number in STICKY)}
        with ThreadPoolExecutor(2) as pool:
            mine = pool.submit(self._run, command, place, fault=fault)
            theirs = pool.submit(self._run, command, beside, zygote=other, cache=cache)
            first, second = mine.result(), theirs.result()
        wrong, finished = [], self.references[name]
        if second.code != 0 and not (shares_output and second.code == 1):
            wrong.append("other process fails")
        if not shares_output and self._state(command, beside) != finished:
            wrong.append("differs")
        again = self._run(command, place, *command.again)
        if again.code != 0 and "exists already" not in again.said:
            wrong.append("rerun fails")
        if self._state(command, place) != finished:
            wrong.append("differs")
        if left := [str(p) for p in self._left(command, place) + self._leftovers(command, beside)]:
            # What a dead process had merged so far waits for --overwrite where another's model came to stand meanwhile.
            refused = "exists already" in again.said
            kept_work = shares_output and all(".new-" in name or (refused and ".merging" in name) for name in left)
            wrong += [] if kept_work else ["leftovers"]
        if any(word in run.said for run in (first, second, again) for word in ("Unexpected", "Traceback")):
            wrong.append("unexpected")
        columns = ("other process fails", "rerun fails", "differs", "leftovers", "unexpected")
        count(f"{table}: {name}", trials=1, **{c.replace(" ", "_"): int(c in wrong) for c in columns})
        if not wrong:
            return []
        said = "\n".join(f"  {run.code}: {run.said[-300:]}" for run in (first, second, again))
        return [f"{table}: {name}, {mode} at call {at}: {', '.join(dict.fromkeys(wrong))} {left}\n{said}"]

    def _left(self, command: Command, place: Path) -> list[Path]:
        """Temporaries that stay: those of a cache until a command uses it, which one that finds its work done need not."""
        left, cache = self._leftovers(command, place), place / "cache"
        if left and all(cache in path.parents for path in left):
            self._run(command, self._set_up(command.name, "next"), cache=str(cache))
            left = self._leftovers(command, place)
        return left

    def _leftovers(self, command: Command, place: Path) -> list[Path]:
        """Temporaries, and finished work that could not be published, below a sandbox; not the file of others."""
        hidden = [p for p in place.rglob(".*") if LEFTOVER.fullmatch(p.name) and p.name != ".lock"]
        return [p for p in hidden if p.name != f".{Path(command.output).name}.tmp"] + list(place.glob("*.new-*"))


BEFORE = {
    "prepare --overwrite": Campaign._prepare_other_rows,
    "train --resume": Campaign._train_half,
    "merge --overwrite": Campaign._merge_otherwise,
}


def _hash(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def build_injector(folder: Path) -> Path | None:
    """The injector as a library to preload; None where there is no C compiler."""
    library, source = folder / "injector.so", Path(__file__).with_name("injector.c")
    if shutil.which("cc") is None:
        return None
    done = subprocess.run(
        ["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"], capture_output=True
    )
    return library if done.returncode == 0 else None
