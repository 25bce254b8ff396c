"""What the forked children do: a run of `train` with a fault in it, told by name."""

import contextlib
import os
import resource
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import safetensors.torch
import torch
from huggingface_hub import constants

from qlora_cli.commands import train as training
from qlora_cli.config import GenerateConfig, TrainConfig
from qlora_cli.core.adapters import lora as adapter
from qlora_cli.core.models.files import resolve_model
from qlora_cli.errors import QloraError
from qlora_cli.events import Event, RunStarted, StepLogged

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


def download(model: str, cache: str) -> None:
    """Resolves a hub model into a cache of its own, without the pauses between attempts."""
    with mock.patch.object(constants, "HF_HUB_CACHE", cache), mock.patch.object(time, "sleep"):
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


def command_line(arguments: list[str], broken: str) -> None:
    """A command line whose standard error cannot be written."""
    import pty

    from qlora_cli.cli.app import main

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
