"""Rank monitor: when one rank of a run ends, all others learn of it within seconds.

A collective does not notice that a process is gone: NCCL waits for ten minutes, and then cannot say for whom. So each rank
holds a TCP connection to the main one, which the kernel closes however a process ends. Works under any launcher and
over several machines.
"""

import json
import os
import secrets
import selectors
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from qlora_cli.core.distributed.process_group import ProcessGroup
from qlora_cli.errors import Interrupted, QloraError, RankLost
from qlora_cli.interrupts import end_at_once

LAUNCHER = "QLORA_LAUNCHER"  # environment: process id of the launcher that started this rank
GRACE_SECONDS = 5.0  # for a collective to fail by itself, after which the process is ended
CARD_GRACE_SECONDS = 1.0  # the same with NCCL, whose collectives do not: by then its own watchdog may end the process
PARTING_SECONDS = 10.0  # that the main rank, which ends last, is waited for
LAST_SECONDS = 15.0  # for a process that reported why it ends, but hangs in cleaning up after a broken collective
CONNECT_SECONDS = 120.0
POLL_SECONDS = 1.0
# A machine that is gone closes no connection: after so many seconds without an answer, probed so often, it counts as gone.
KEEPALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 3, "TCP_KEEPCNT": 4}


class RankMonitor:
    """This rank's connection (the main rank's connections) and the thread that listens."""

    def __init__(self, ranks: ProcessGroup, device: torch.device) -> None:
        self.ranks = ranks
        self.grace_seconds = CARD_GRACE_SECONDS if device.type == "cuda" else GRACE_SECONDS
        self.verdict: QloraError | None = None  # why the run cannot go on
        self.known = threading.Event()  # the verdict
        self.handled = threading.Event()  # by the main thread
        self.left: set[int] = set()  # ranks that announced their end
        self.main_closed = threading.Event()  # the main rank's connection
        self.peers: dict[socket.socket, dict[str, Any]] = {}
        self._connect(device)
        self.launcher = int(os.environ.get(LAUNCHER, 0))
        threading.Thread(target=self._listen, name="ranks", daemon=True).start()

    def _connect(self, device: torch.device) -> None:
        name = {"rank": self.ranks.rank, "process": os.getpid(), "host": socket.gethostname()}
        one_machine = os.environ.get("LOCAL_WORLD_SIZE") == str(self.ranks.world_size)
        # Whoever else connects does not know the number that the ranks share.
        secret = self.ranks.all_reduce_max(secrets.randbits(62) if self.ranks.is_main else 0, device)
        if self.ranks.is_main:
            with socket.create_server(("127.0.0.1" if one_machine else "", 0), backlog=128) as server:
                server.settimeout(CONNECT_SECONDS)
                self.ranks.all_reduce_max(server.getsockname()[1], device)
                while len(self.peers) < self.ranks.world_size - 1:
                    try:
                        peer, _ = server.accept()
                    except TimeoutError:
                        raise RankLost("Not all ranks have come.", "Run the command again.") from None
                    peer.settimeout(CONNECT_SECONDS)
                    messages = _receive(peer)
                    if messages and messages[0].pop("secret", None) == secret:
                        _send(peer, name)
                        self.peers[peer] = messages[0]
        else:
            port = self.ranks.all_reduce_max(0, device)
            host = "127.0.0.1" if one_machine else os.environ["MASTER_ADDR"]
            try:
                peer = socket.create_connection((host, port), timeout=CONNECT_SECONDS)
            except OSError as error:
                raise RankLost(
                    f"The main rank cannot be reached at {host}:{port}: {error.strerror or error}.",
                    "Open the ports between the machines to one another.",
                ) from error
            _send(peer, {**name, "secret": secret})
            messages = _receive(peer)
            if not messages:
                raise RankLost("The main rank has ended.", "See what it said.")
            self.peers[peer] = messages[0]
        for connected in self.peers:
            connected.settimeout(None)
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in KEEPALIVE.items():
                if hasattr(socket, option):
                    connected.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)

    # ------------------------------------------------------------ the listening thread

    def _listen(self) -> None:
        with selectors.DefaultSelector() as selector:
            for peer in self.peers:
                selector.register(peer, selectors.EVENT_READ, peer)
            while selector.get_map() and not self.known.is_set():
                for key, _ in selector.select(POLL_SECONDS):
                    peer = key.data
                    messages = _receive(peer)
                    for message in messages:
                        self._handle_message(peer, message)
                    if not messages:
                        selector.unregister(peer)
                        self._handle_end(peer)
                if self.launcher and os.getppid() != self.launcher:
                    self.launcher = 0
                    os.kill(os.getpid(), signal.SIGTERM)  # nobody is left to stop this run: it saves and ends
            if self.known.is_set():
                self._end_if_stuck(selector)

    def _end_if_stuck(self, selector: selectors.BaseSelector) -> None:
        """Ends the process where the main thread does not: it hangs in a collective, or in cleaning up after one."""
        decided = time.monotonic()
        while True:
            if time.monotonic() - decided > (LAST_SECONDS if self.handled.is_set() else self.grace_seconds):
                self._end_process()
            for key, _ in selector.select(POLL_SECONDS / 10):
                if not _receive(key.data):
                    selector.unregister(key.fileobj)
                    if self.peers[key.data]["rank"] == 0:
                        self.main_closed.set()

    def _handle_message(self, peer: socket.socket, message: dict[str, Any]) -> None:
        if "left" in message:
            self.left.add(self.peers[peer]["rank"])
        elif "lost" in message:
            self._decide(RankLost(message["lost"], message["hint"]), reported=not self._reports_end_of(0))
        elif "failed" in message:
            rank = self.peers[peer]["rank"]
            self.left.add(rank)
            failure = message["failed"]
            error = QloraError(failure if rank == 0 else f"rank {rank}: {failure}", message["hint"])
            error.exit_code = message["exit_code"]
            self._decide(error, reported=not self.ranks.is_main)

    def _handle_end(self, peer: socket.socket) -> None:
        """A connection is closed."""
        facts = self.peers[peer]
        if facts["rank"] == 0:
            self.main_closed.set()
        if facts["rank"] in self.left or 0 in self.left:
            return
        error = RankLost(
            f"Rank {facts['rank']} of {self.ranks.world_size} (process {facts['process']} on {facts['host']}) ended "
            "without a word, as when it is killed or the host's memory runs out; so the run has stopped.",
            "Go on from the newest checkpoint with the same command and --resume.",
        )
        self._decide(error, reported=not self._reports_end_of(facts["rank"]))

    def _reports_end_of(self, lost: int) -> bool:
        """Whether this rank is the one that reports the end of another: the lowest that is left."""
        return self.ranks.rank == (1 if lost == 0 else 0)

    def _decide(self, error: QloraError, *, reported: bool) -> None:
        if self.verdict is not None:
            return
        error.reported = reported
        self.verdict = error
        if self.ranks.is_main:
            self._send_to_all(error)
        self.known.set()

    def _end_process(self) -> None:
        assert self.verdict is not None
        words = ""
        if not self.verdict.reported and not self.handled.is_set():
            words = f"error: {self.verdict.message}\n" + (f"→ {self.verdict.hint}\n" if self.verdict.hint else "")
        end_at_once(self.verdict.exit_code, words)  # the last good checkpoint is on the disk already

    # ------------------------------------------------------------ the main thread

    def _send_to_all(self, failure: QloraError | None) -> None:
        message: dict[str, Any] = {"left": True}
        if failure is not None:
            kind = "lost" if isinstance(failure, RankLost) else "failed"
            message = {kind: failure.message, "hint": failure.hint, "exit_code": failure.exit_code}
        for peer in self.peers:
            _send(peer, message)

    def leave(self, failure: QloraError | None = None) -> None:
        """Announces that this process ends, which then is no failure. The main rank ends last, for its message to arrive."""
        self.handled.set()
        self._send_to_all(failure)
        if not self.ranks.is_main:
            self.main_closed.wait(PARTING_SECONDS)


def _send(peer: socket.socket, message: dict[str, Any]) -> None:
    try:
        peer.sendall(json.dumps(message).encode() + b"\n")
    except OSError:
        return  # it is gone, which the listening thread sees


def _receive(peer: socket.socket) -> list[dict[str, Any]]:
    """The messages that came; none where the connection is closed. Each is shorter than what arrives at once."""
    text = b""
    try:
        while not text.endswith(b"\n"):
            part = peer.recv(2**16)
            if not part:
                return []
            text += part
    except OSError:
        return []
    return [json.loads(line) for line in text.splitlines()]


_kept: list[RankMonitor] = []  # connections close with the process, not before


@contextmanager
def monitoring(ranks: ProcessGroup, device: torch.device) -> Iterator[None]:
    """Monitors the ranks inside the block; one that fails or ends there ends the others, with one error.

    Raises:
        RankLost: Another rank ended without a word.
        QloraError: Another rank failed, or this one did. `reported` says that another rank shows it.
    """
    if ranks.world_size == 1:
        yield
        return
    monitor = RankMonitor(ranks, device)
    _kept.append(monitor)
    try:
        yield
    except Interrupted as error:
        error.reported = not ranks.is_main
        monitor.leave()
        raise
    except QloraError as error:
        if isinstance(monitor.verdict, RankLost):  # its end came first, and this is what followed
            monitor.handled.set()
            raise monitor.verdict from error
        error.reported = not ranks.is_main
        monitor.leave(error)
        raise
    except Exception as error:
        monitor.known.wait(GRACE_SECONDS)  # a broken collective is noticed before the connection that says why
        if monitor.verdict is not None:
            monitor.handled.set()
            raise monitor.verdict from error
        monitor.leave(QloraError(f"Unexpected {type(error).__name__}: {' '.join(str(error).split())[:300]}"))
        raise
    else:
        monitor.leave()
