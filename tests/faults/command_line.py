"""What a forked child does in the campaign: one command line, with the injector armed while it works."""

import ctypes
import os
import signal
import sys
from contextlib import suppress
from typing import Any
from unittest import mock

import qlora_cli.commands.generate
import qlora_cli.commands.inspect
import qlora_cli.commands.merge
import qlora_cli.commands.prepare  # noqa: F401 - so that no child has to
from qlora_cli.cli.app import main
from qlora_cli.commands import train
from qlora_cli.core.candidates.four_bit_gap import measure_held_out
from qlora_cli.core.runs import metrics


def warm(arguments: list[str], cache: str) -> None:
    """Runs `qlora ARGUMENTS` in this process, which the victims are forked from."""
    os.environ["QLORA_CACHE"] = cache
    with mock.patch.object(metrics, "draw_losses", lambda *_, **__: b"drawn"):
        main(arguments)


def run(
    arguments: list[str], root: str, cache: str, fault: dict[str, Any] | None = None, ways: int = 0, names: str = ""
) -> None:
    """Runs `qlora ARGUMENTS` and ends this process with its exit code.

    Args:
        root: Calls on files below it are counted.
        cache: QLORA_CACHE.
        fault: `at` (which call, from 1), `mode` (an error number, or one of the injector's), `sticky`, `reads`.
        ways: Of a file system (the injector's bits).
        names: A file that the calls' names are written to.
    """
    os.environ["QLORA_CACHE"] = cache
    signal.signal(signal.SIGINT, signal.default_int_handler)
    injector: Any = ctypes.CDLL(None)
    if fault or ways or names:
        wanted = {"at": -1, "mode": 0, "sticky": 0, "reads": 0, **(fault or {})}
        numbers = (wanted["at"], wanted["mode"], wanted["sticky"], wanted["reads"], ways)
        injector.fault_arm(root.encode(), *numbers, names.encode())
    with (
        mock.patch.object(metrics, "draw_losses", lambda *_, **__: b"drawn"),  # a quarter of a run's time
        mock.patch.object(train, "measure_held_out", measure_held_out),  # which other victims go without
    ):
        code = main(arguments)
    with suppress(AttributeError):
        injector.fault_disarm()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
