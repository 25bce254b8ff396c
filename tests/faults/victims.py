"""What the forked children do: a run of `train` with a fault in it, told by name."""

import contextlib
import fcntl
import functools
import json
import os
import resource
import shutil
import signal
import socket
import sys
import termios
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import safetensors.torch
import torch
from huggingface_hub import constants
from transformers import AutoTokenizer

from qlora_cli import interrupts
from qlora_cli.cli.app import main
from qlora_cli.commands import train as training
from qlora_cli.commands.merge import merge
from qlora_cli.config import GenerateConfig, MergeConfig, PrepareConfig, TrainConfig
from qlora_cli.core.adapters import lora as adapter
from qlora_cli.core.data.prepare import prepare_rows
from qlora_cli.core.distributed import launcher
from qlora_cli.core.merge.output_directory import unfinished_path
from qlora_cli.core.models.files import resolve_model
from qlora_cli.errors import QloraError
from qlora_cli.events import Event, Progress, RunStarted, StepLogged

CALLS = ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir")  # of os, which pathlib and shutil go through


def train(options: dict[str, Any], fault: dict[str, Any] | None = None, events: list[Event] | None = None) -> None:
    """A run of `train`, with a fault that begins when training does.

    Args:
        options: Settings.
        fault: `{"kind": name of a function below, ...its arguments}`.
        events: Collects what is reported.
    """
    with contextlib.ExitStack() as stack:
        arguments = dict(fault or {"kind": "nothing"})
        on_event = stack.enter_context(globals()[arguments.pop("kind")](**arguments))

        def report(event: Event) -> None:
            if events is not None:
                events.append(event)
            else:
                print(event, flush=True)
            on_event(event)

        training.train(TrainConfig(**options), report)


@contextlib.contextmanager
def nothing() -> Iterator[Callable[[Event], None]]:
    """No fault."""
    yield lambda event: None


SAVE_FILE = safetensors.torch.save_file


class FileCalls:
    """Counts the calls that change files, from the start of training; at one of them the process is killed."""

    def __init__(self, kill_at: int | None) -> None:
        self.kill_at = kill_at
        self.names: list[str] = []
        self.counting = False

    def begin(self, name: str) -> bool:
        """Notes a call; True when it is the one to die in."""
        if not self.counting:
            return False
        self.names.append(name)
        return len(self.names) == self.kill_at

    def wrap(self, name: str, call: Callable) -> Callable:
        """The call, dying before it."""

        def wrapped(*arguments: Any, **keywords: Any) -> Any:
            if self.begin(name):
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **keywords)

        return wrapped

    def save_file(self, tensors: dict, path: Any, **keywords: Any) -> None:
        """safetensors' save_file, dying with the file half written."""
        dying = self.begin(f"write {Path(path).name}")
        SAVE_FILE(tensors, path, **keywords)
        if dying:
            os.truncate(path, Path(path).stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)


@contextlib.contextmanager
def file_calls(kill_at: int | None = None, names_to: str | None = None) -> Iterator[Callable[[Event], None]]:
    """Kills the process at one of its file calls, or writes down which there are."""
    calls = FileCalls(kill_at)

    def on_event(event: Event) -> None:
        calls.counting |= isinstance(event, RunStarted)

    with contextlib.ExitStack() as stack:
        for name in CALLS:
            stack.enter_context(mock.patch.object(os, name, calls.wrap(name, getattr(os, name))))
        for module in (adapter, safetensors.torch):  # a checkpoint's writer imports it when it writes
            stack.enter_context(mock.patch.object(module, "save_file", calls.save_file))
        yield on_event
    if names_to:
        Path(names_to).write_text("\n".join(calls.names))


@contextlib.contextmanager
def marked(mark: str) -> Iterator[Callable[[Event], None]]:
    """Makes a file when training begins, from which the zygote counts the time to a kill; the end leaves the seconds."""
    started = 0.0

    def on_event(event: Event) -> None:
        nonlocal started
        if isinstance(event, RunStarted):
            started = time.monotonic()
            Path(mark).touch()

    yield on_event
    Path(mark).write_text(str(time.monotonic() - started))


@contextlib.contextmanager
def killed_after(step: int) -> Iterator[Callable[[Event], None]]:
    """SIGKILL as soon as a step was told."""

    def on_event(event: Event) -> None:
        if isinstance(event, StepLogged) and event.step == step:
            os.kill(os.getpid(), signal.SIGKILL)

    yield on_event


@contextlib.contextmanager
def full_disk(ballast: str, step: int, room_bytes: int) -> Iterator[Callable[[Event], None]]:
    """After a step, something else fills the disk but for `room_bytes`."""

    def on_event(event: Event) -> None:
        if isinstance(event, StepLogged) and event.step == step:
            facts = os.statvfs(Path(ballast).parent)
            with Path(ballast).open("wb") as stream:
                os.posix_fallocate(stream.fileno(), 0, max(1, facts.f_bavail * facts.f_frsize - room_bytes))

    yield on_event


@contextlib.contextmanager
def file_limit(step: int, limit_bytes: int) -> Iterator[Callable[[Event], None]]:
    """After a step, no file may grow past `limit_bytes`: writes fail half-way with EFBIG, without root."""

    def on_event(event: Event) -> None:
        if isinstance(event, StepLogged) and event.step == step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, resource.RLIM_INFINITY))

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield on_event


@contextlib.contextmanager
def bad_engine(change: Callable[[Any, torch.Tensor, int], torch.Tensor]) -> Iterator[Callable[[Event], None]]:
    """Passes every loss, with its batch and the number of the step, through `change`."""
    step = 0  # 0 while the longest rows are tried
    install, take = training.install_engine, training.Trainer.take_step

    def install_bad(*arguments: Any, **keywords: Any) -> Any:
        engine = install(*arguments, **keywords)
        loss = engine.loss
        engine.loss = lambda batch: change(batch, loss(batch), step)
        return engine

    def take_known(trainer: Any, now: Any, batches: Any) -> Any:
        nonlocal step
        step = now.number
        return take(trainer, now, batches)

    with (
        mock.patch.object(training, "install_engine", install_bad),
        mock.patch.object(training.Trainer, "take_step", take_known),
    ):
        yield lambda event: None


@contextlib.contextmanager
def nan(steps: list[int]) -> Iterator[Callable[[Event], None]]:
    """The loss of these steps is NaN."""
    with bad_engine(lambda batch, loss, step: loss * torch.nan if step in steps else loss) as on_event:
        yield on_event


@contextlib.contextmanager
def out_of_memory(above_tokens: int, from_step: int) -> Iterator[Callable[[Event], None]]:
    """From a step on, micro-batches with more tokens do not fit."""

    def change(batch: Any, loss: torch.Tensor, step: int) -> torch.Tensor:
        if step >= from_step and batch.tokens > above_tokens:
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")
        return loss

    with bad_engine(change) as on_event:
        yield on_event


def train_as_ranks(
    options: dict[str, Any], world_size: int, fault: dict[str, Any] | None = None, faulty_rank: int = 0
) -> None:
    """A run of `train` in several processes that share each step over gloo, as torchrun starts them.

    Prints the exit code of each as `codes [...]`.
    """
    codes = fork_ranks(world_size, lambda rank: train(options, fault if rank == faulty_rank else None))
    print("codes", codes, flush=True)


def fork_ranks(world_size: int, run: Callable[[int], None]) -> list[int]:
    """`run(rank)` in so many forked processes, which find each other as torchrun's do; the exit code of each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(world_size):
        child = os.fork()
        if child == 0:
            numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
            numbers |= {"MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in numbers.items()}, MASTER_ADDR="127.0.0.1")
            _exit_as_rank(rank, run)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


class ForkedRanks:
    """Stands in for torch.distributed's `start_processes`: forks a rank instead of starting one, which imports nothing.

    Writes the process of the launcher and of each rank to `pids_to`.
    """

    def __init__(
        self, pids_to: str | None, entrypoint: str, args: dict[int, tuple], envs: dict[int, dict[str, str]], **_: Any
    ) -> None:
        assert entrypoint == sys.executable and all(words[:2] == ("-m", "qlora_cli") for words in args.values())
        self.subprocess_handlers = {rank: ForkedRank(args[rank][2:], envs[rank]) for rank in args}
        if pids_to:
            Path(f"{pids_to}.new").write_text(json.dumps([os.getpid(), *self.pids().values()]))
            Path(f"{pids_to}.new").replace(pids_to)

    def pids(self) -> dict[int, int]:
        """The process of each rank."""
        return {rank: handler.pid for rank, handler in self.subprocess_handlers.items()}

    def close(self, number: int, timeout: float) -> None:
        """Ends what has not ended."""
        for handler in self.subprocess_handlers.values():
            if handler.poll() is None:
                handler.close(number)


class ForkedRank:
    """One rank; its handler and its process in one."""

    def __init__(self, arguments: tuple[str, ...], environment: dict[str, str]) -> None:
        self.proc, self.code = self, None
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            os.environ.update(environment)
            interrupts.install()
            os._exit(main(list(arguments)))

    def poll(self) -> int | None:
        """Its exit code once it has ended."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code

    def wait(self) -> int:
        """Its exit code."""
        while self.poll() is None:
            time.sleep(0.01)
        return self.code

    def close(self, number: int) -> None:
        """Sends it a signal."""
        os.kill(self.pid, number)


def launch(arguments: list[str], pids_to: str | None = None, environment: dict[str, str] | None = None) -> None:
    """A command line with --gpus, whose ranks are forked."""
    os.environ.update(environment or {"ACCELERATE_USE_CPU": "1"})
    interrupts.install()
    ranks = functools.partial(ForkedRanks, pids_to)
    # A rank says why it ends, and ends, in its own time: on a busy machine that is long.
    with mock.patch.multiple(launcher, start_processes=ranks, SHUTDOWN_SECONDS=1200):
        os._exit(main(arguments))


def _exit_as_rank(rank: int, run: Callable[[int], None]) -> None:
    code = 1
    try:
        run(rank)
        code = 0
    except QloraError as error:
        print(error.message, flush=True)
        code = error.exit_code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


@contextlib.contextmanager
def signalled(step: int, number: int = signal.SIGTERM) -> Iterator[Callable[[Event], None]]:
    """A signal while the loss of a step is computed."""

    def change(batch: Any, loss: torch.Tensor, now: int) -> torch.Tensor:
        if now == step and loss.requires_grad:
            os.kill(os.getpid(), number)
        return loss

    with bad_engine(change) as on_event:
        yield on_event


@contextlib.contextmanager
def counted() -> Iterator[Callable[[Event], None]]:
    """Tells how many bytes of the base this rank holds once it is sharded."""
    original = training.shard_base

    def shard_base(base: Any, *arguments: Any) -> None:
        original(base, *arguments)
        held = [p.to_local() if hasattr(p, "to_local") else p for p in base.parameters() if not p.requires_grad]
        print("held", sum(tensor.nbytes for tensor in held), flush=True)

    with mock.patch.object(training, "shard_base", shard_base):
        yield lambda event: None


def download(model: str, cache: str, patience: float) -> None:
    """Resolves a hub model into a cache of its own, without the pauses between attempts.

    Args:
        patience: Seconds that the hub has for an answer.
    """
    with (
        mock.patch.object(constants, "HF_HUB_CACHE", cache),
        mock.patch.object(constants, "HF_HUB_DOWNLOAD_TIMEOUT", patience),
        mock.patch.object(constants, "HF_HUB_ETAG_TIMEOUT", patience),
        mock.patch.object(time, "sleep"),
    ):
        _ = resolve_model(model, report=lambda event: print(event, flush=True)).weights


def train_from_hub(options: dict[str, Any], cache: str) -> None:
    """A run of `train` whose hub cache is its own."""
    with mock.patch.object(constants, "HF_HUB_CACHE", cache):
        train({**options, "base_cache": False})


def generate_from_hub(options: dict[str, Any], cache: str) -> None:
    """An answer whose hub cache is its own."""
    from qlora_cli.commands.generate import generate

    with mock.patch.object(constants, "HF_HUB_CACHE", cache):
        config = GenerateConfig(base_cache=False, max_new_tokens=2, temperature=0, **options)
        generate(config, ["Once"], lambda event: print(event, flush=True))


def at_a_terminal(arguments: list[str], terminal: str) -> None:
    """A command line typed at a terminal, given by its path."""
    os.setsid()
    descriptor = os.open(terminal, os.O_RDWR)
    fcntl.ioctl(descriptor, termios.TIOCSCTTY, 0)
    for number in (0, 1, 2):
        os.dup2(descriptor, number)
    os.close(descriptor)
    os.environ.update(NO_COLOR="1", TERM="dumb", COLUMNS="200")
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    interrupts.install()
    os._exit(main(arguments))


def merge_and_stay(adapter: str, output: str, mark: str) -> None:
    """A merge that goes no further once three of its files are begun; `mark` is made then."""

    def report(event: Event) -> None:
        if len(list(unfinished_path(Path(output)).glob("*.safetensors"))) > 2:
            Path(mark).touch()
            time.sleep(1200)

    merge(MergeConfig(adapter=adapter, output=output, verify=False), report)


def merge_growth(small: str, large: str, work: str) -> None:
    """Prints how far merging `large` raised the resident peak over what a merge of next to nothing takes."""

    def merge_one(adapter: str, name: str) -> int:
        merge(MergeConfig(adapter=adapter, output=f"{work}/{name}", verify=False), lambda event: None)
        status = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in status if line.startswith("VmHWM")).split()[1])

    before = merge_one(small, "small")
    print("growth", merge_one(large, "large") - before, flush=True)


def prepare(directory: str, mark: str) -> None:
    """Rows of `rows.jsonl` prepared by two workers; `mark` holds this process's group once they are at it."""
    os.setsid()
    os.chdir(directory)

    def report(event: Event) -> None:
        if isinstance(event, Progress):
            Path(mark).write_text(str(os.getpid()))

    tokenizer = AutoTokenizer.from_pretrained("tokenizer")
    prepare_rows(PrepareConfig(data="rows.jsonl"), tokenizer, None, Path("prepared"), report, workers=2)


def command_line(arguments: list[str], broken: str) -> None:
    """A command line whose standard error cannot be written."""
    import pty

    reading, writing = os.pipe()
    if broken == "reader gone":
        os.close(reading)
    elif broken == "disk full":
        writing = os.open("/dev/full", os.O_WRONLY)
    elif broken == "terminal closed":
        reading, writing = pty.openpty()
        os.close(reading)
    elif broken == "full pipe":
        os.set_blocking(writing, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(writing, b"x" * 4096)
    os.dup2(writing, 2)
    os.close(writing)
    if broken == "closed":
        os.close(2)
    os._exit(main(arguments))


@contextlib.contextmanager
def removed(path: str, step: int) -> Iterator[Callable[[Event], None]]:
    """After a step, somebody removes the run directory."""

    def on_event(event: Event) -> None:
        if isinstance(event, StepLogged) and event.step == step:
            shutil.rmtree(path)

    yield on_event


@contextlib.contextmanager
def failing(where: str, step: int) -> Iterator[Callable[[Event], None]]:
    """Something fails while a step is computed, or when it is told."""

    def change(batch: Any, loss: torch.Tensor, now: int) -> torch.Tensor:
        if where == "forward" and now == step and loss.requires_grad:
            raise ValueError("injected")
        return loss

    def on_event(event: Event) -> None:
        if where == "report" and isinstance(event, StepLogged) and event.step == step:
            raise ValueError("injected")

    with bad_engine(change):
        yield on_event
