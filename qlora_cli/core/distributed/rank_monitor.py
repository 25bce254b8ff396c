"""The ranks of a run in; the news that one of them ended, on all others and within seconds, out.

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
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from qlora_cli.core.distributed.process_group import ProcessGroup
from qlora_cli.core.distributed.signals import SHOW_CURSOR
from qlora_cli.errors import Interrupted, QloraError, RankLost

LAUNCHER = "QLORA_LAUNCHER"  # environment: process id of the launcher that started this rank
GRACE_SECONDS = 5.0  # for a collective to fail by itself, after which the process is ended
CARD_GRACE_SECONDS = 1.0  # the same with NCCL, whose collectives do not: by then its own watchdog may end the process
PARTING_SECONDS = 10.0  # that the main rank, which has the last word, is waited for
LAST_SECONDS = 15.0  # for a process that told why it ends, but hangs in tidying up after a broken collective
CONNECT_SECONDS = 120.0
POLL_SECONDS = 1.0
# A machine that is gone sends no word: after so many seconds without an answer, probed so often, it counts as gone.
KEEPALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 3, "TCP_KEEPCNT": 4}


class RankMonitor:
    """This rank's connection (the main rank's connections) and the thread that listens.

    Args:
        ranks: This process among those of the run.
        device: On which the ranks meet.

    Attributes:
        verdict: Why the run cannot go on; None while it can.
    """

    def __init__(self, ranks: ProcessGroup, device: torch.device) -> None:
        self.ranks = ranks
        self.grace_seconds = CARD_GRACE_SECONDS if device.type == "cuda" else GRACE_SECONDS
        self.verdict: QloraError | None = None
        self.known = threading.Event()  # the verdict
        self.handled = threading.Event()  # by the main thread
        self.left: set[int] = set()  # ranks that took their leave
        self.parted = threading.Event()  # the main rank's connection is closed
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
                    words = _receive(peer)
                    if words and words[0].pop("secret", None) == secret:
                        _send(peer, name)
                        self.peers[peer] = words[0]
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
            words = _receive(peer)
            if not words:
                raise RankLost("The main rank has ended.", "See what it said.")
            self.peers[peer] = words[0]
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
            while selector.get_map():
                for key, _ in selector.select(POLL_SECONDS):
                    peer = key.data
                    words = _receive(peer)
                    for word in words:
                        self._hear(peer, word)
                    if not words:
                        selector.unregister(peer)
                        self._miss(peer)
                if self.launcher and os.getppid() != self.launcher:
                    self.launcher = 0
                    os.kill(os.getpid(), signal.SIGTERM)  # nobody is left to stop this run: it saves and ends
                if self.known.is_set():
                    break
            if self.known.is_set():
                self._see_to_the_end(selector)

    def _see_to_the_end(self, selector: selectors.BaseSelector) -> None:
        """Ends the process where the main thread does not: it hangs in a collective, or in tidying up after one."""
        concluded = time.monotonic()
        while True:
            since_seconds = time.monotonic() - concluded
            if since_seconds > (LAST_SECONDS if self.handled.is_set() else self.grace_seconds):
                self._end_process()
            for key, _ in selector.select(POLL_SECONDS / 10) if selector.get_map() else ():
                if not _receive(key.data):
                    selector.unregister(key.fileobj)
                    if self.peers[key.data]["rank"] == 0:
                        self.parted.set()
            if not selector.get_map():
                time.sleep(POLL_SECONDS / 10)

    def _hear(self, peer: socket.socket, word: dict[str, Any]) -> None:
        if "left" in word:
            self.left.add(self.peers[peer]["rank"])
        elif "lost" in word:
            self._conclude(RankLost(word["lost"], word["hint"]), reported=not self._speaks_for(0))
        elif "failed" in word:
            rank = self.peers[peer]["rank"]
            self.left.add(rank)
            error = QloraError(word["failed"] if rank == 0 else f"rank {rank}: {word['failed']}", word["hint"])
            error.exit_code = word["exit_code"]
            self._conclude(error, reported=not self.ranks.is_main)

    def _miss(self, peer: socket.socket) -> None:
        """A connection is closed."""
        facts = self.peers[peer]
        if facts["rank"] == 0:
            self.parted.set()
        if facts["rank"] in self.left or 0 in self.left:
            return
        error = RankLost(
            f"Rank {facts['rank']} of {self.ranks.world_size} (process {facts['process']} on {facts['host']}) ended "
            "without a word, as when it is killed or the host's memory runs out; so the run has stopped.",
            "Go on from the newest checkpoint with the same command and --resume.",
        )
        self._conclude(error, reported=not self._speaks_for(facts["rank"]))

    def _speaks_for(self, lost: int) -> bool:
        """Whether this rank tells of the end of another: the lowest that is left."""
        return self.ranks.rank == (1 if lost == 0 else 0)

    def _conclude(self, error: QloraError, *, reported: bool) -> None:
        if self.verdict is not None:
            return
        error.reported = reported
        self.verdict = error
        if self.ranks.is_main:
            word = "lost" if isinstance(error, RankLost) else "failed"
            self._tell({word: error.message, "hint": error.hint, "exit_code": error.exit_code})
        self.known.set()

    def _end_process(self) -> None:
        assert self.verdict is not None
        if not self.verdict.reported and not self.handled.is_set():
            if sys.stderr.isatty():
                os.write(sys.stderr.fileno(), SHOW_CURSOR)
            hint = f"→ {self.verdict.hint}\n" if self.verdict.hint else ""
            os.write(2, f"error: {self.verdict.message}\n{hint}".encode())
        os._exit(self.verdict.exit_code)  # nothing is flushed: the last good checkpoint is on the disk already

    # ------------------------------------------------------------ the main thread

    def _tell(self, word: dict[str, Any]) -> None:
        for peer in self.peers:
            _send(peer, word)

    def explain(self) -> QloraError | None:
        """The verdict, waited for: a broken collective is noticed before the connection that tells why."""
        self.known.wait(GRACE_SECONDS)
        self.handled.set()
        return self.verdict

    def leave(self, failure: QloraError | None = None) -> None:
        """Takes leave, so that the end of this process means nothing. The main rank ends last: it has the last word."""
        self.handled.set()
        if failure is None:
            self._tell({"left": True})
        else:
            self._tell({"failed": failure.message, "hint": failure.hint, "exit_code": failure.exit_code})
        if not self.ranks.is_main:
            self.parted.wait(PARTING_SECONDS)


def _send(peer: socket.socket, word: dict[str, Any]) -> None:
    try:
        peer.sendall(json.dumps(word).encode() + b"\n")
    except OSError:
        return  # it is gone, which the listening thread hears


def _receive(peer: socket.socket) -> list[dict[str, Any]]:
    """The words that came; none where the connection is closed. A word is shorter than what arrives at once."""
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
def monitoring(ranks: ProcessGroup, device: torch.device) -> Iterator[RankMonitor | None]:
    """Watches over the ranks inside the block; one that fails or ends there ends the others, with one error.

    Raises:
        RankLost: Another rank ended without a word.
        QloraError: Another rank failed, or this one did. `reported` says that another rank shows it.
    """
    if ranks.world_size == 1:
        yield None
        return
    watch = RankMonitor(ranks, device)
    _kept.append(watch)
    try:
        yield watch
    except Interrupted as error:
        error.reported = not ranks.is_main
        watch.leave()
        raise
    except QloraError as error:
        if isinstance(watch.verdict, RankLost):  # its end came first, and this is what followed
            watch.handled.set()
            raise watch.verdict from error
        error.reported = not ranks.is_main
        watch.leave(error)
        raise
    except Exception as error:
        verdict = watch.explain()
        if verdict is not None:
            raise verdict from error
        failure = QloraError(f"Unexpected {type(error).__name__}: {' '.join(str(error).split())[:300]}")
        watch.leave(failure)
        raise
    else:
        watch.leave()
