"""Launcher: runs a command line as one rank a card of this machine, and waits for its exit code.

The processes are started by torch.distributed's elastic launcher, each in a session of its own. That launcher ends every
rank the moment one has ended, even while the main one still reports why; this one gives the others time to end.
"""

import os
import signal
import socket
import sys
import time
from types import FrameType

import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, start_processes

from qlora_cli.core.distributed.rank_monitor import LAUNCHER
from qlora_cli.core.distributed.signals import ending_signals
from qlora_cli.errors import RankLost, UsageError

POLL_SECONDS = 0.1
SHUTDOWN_SECONDS = 20.0  # for the other ranks to end by themselves once one has failed


def launch(count: int, arguments: list[str]) -> int:
    """Runs `python -m qlora_cli` with these arguments as `count` ranks of this machine, a card each.

    Signals that would end it are passed on: every rank finishes its step, and the run is saved.

    Returns:
        The exit code of the run: the main rank's, or that of the one that failed.

    Raises:
        UsageError: There are not so many cards.
        RankLost: A rank ended by a signal, and no other was left to report it.
    """
    environment = rank_environment(count)
    processes = start_processes(
        name="qlora",
        entrypoint=sys.executable,
        args=dict.fromkeys(range(count), ("-m", "qlora_cli", *arguments)),
        envs={
            rank: {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank), "TORCHELASTIC_ERROR_FILE": os.devnull}
            for rank in range(count)
        },
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),
    )
    pids = processes.pids()

    def pass_on(number: int, frame: FrameType | None) -> None:
        for rank, handler in processes.subprocess_handlers.items():  # type: ignore[attr-defined]
            if handler.proc.poll() is None:
                os.kill(pids[rank], number)

    previous = {number: signal.signal(number, pass_on) for number in ending_signals()}
    try:
        codes, first_lost = _wait(processes, count)
    finally:
        processes.close(signal.SIGKILL, timeout=5)
        for number, handler in previous.items():
            signal.signal(number, handler)
    reported = [code for code in codes.values() if code > 0]
    if not any(codes.values()) or reported:
        return codes[0] if codes[0] > 0 else max(reported, default=0)
    lost_by = signal.Signals(-codes[first_lost]).name
    raise RankLost(
        f"Rank {first_lost} of {count} (process {pids[first_lost]}) was ended by {lost_by}, and the others with it.",
        "Go on from the newest checkpoint, if there is one, with the same command and --resume.",
    )


def rank_environment(count: int) -> dict[str, str]:
    """Environment variables that all ranks share.

    `ACCELERATE_USE_CPU=1`, accelerate's own switch, makes ranks of this machine's cores instead of its cards.

    Raises:
        UsageError: There are fewer cards than ranks.
    """
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "on", "y")
    cards = torch.cuda.device_count()
    if not on_cpu and count > cards:
        found = {0: "no CUDA card", 1: "one card"}.get(cards, f"{cards} cards")
        hint = f"Use --gpus {cards}." if cards else "Leave --gpus out."
        raise UsageError(f"--gpus {count} was asked for, and this machine has {found}.", hint)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        LAUNCHER: str(os.getpid()),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // count)),
    }
    return environment | ({"CUDA_VISIBLE_DEVICES": ""} if on_cpu else {})


def _wait(processes: object, count: int) -> tuple[dict[int, int], int]:
    """Every rank's exit code, negative for a signal, and the rank that failed first (0 where none did)."""
    handlers = processes.subprocess_handlers  # type: ignore[attr-defined]
    codes: dict[int, int] = {}
    first_failed, deadline = 0, float("inf")
    while len(codes) < count and time.monotonic() < deadline:
        for rank in range(count):
            code = handlers[rank].proc.poll()
            if code is None or rank in codes:
                continue
            codes[rank] = code
            if code and deadline == float("inf"):
                first_failed, deadline = rank, time.monotonic() + SHUTDOWN_SECONDS
        time.sleep(POLL_SECONDS)
    for rank in range(count):
        if rank not in codes:
            handlers[rank].close(signal.SIGKILL)
            codes[rank] = handlers[rank].proc.wait()
    return codes, first_failed
