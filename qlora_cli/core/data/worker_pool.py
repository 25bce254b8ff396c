"""Worker pool: chunks tokenised in their order by several processes.

Not concurrent.futures' ProcessPoolExecutor with "spawn": it takes 7 % more processor time a row (415 against 388 µs,
30,000 rows of GSM8K) and 108 against 100 MB a process with a tracker of 13 MB beside them, its processes outlive a
parent that was killed, and each imports the main module again, with whatever that imports.
"""

import os
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Condition
from types import TracebackType

import qlora_cli
from qlora_cli.core.data.tokenize import TokenisedChunk, TokeniserSettings
from qlora_cli.core.reading.chunks import Chunk
from qlora_cli.errors import DataError

SMALL_BYTES = 2**21  # a smaller input is done before processes would have started
MOST_PROCESSES = 8  # of 100 MB each beside 600 MB in this one; --workers may ask for more
CHUNKS_AHEAD = 3  # chunks held for each process, waiting, in work or done; bounds the memory
BYTES_AHEAD = 3 * 2**24  # that these take, of all processes together; two rows of 16 MiB fit
IMPORT_ROOT = str(Path(qlora_cli.__file__).resolve().parents[1])
# One thread and one heap that gives memory back: 100 MB a process instead of 140, at the same speed.
ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_TRIM_THRESHOLD_": "131072",
}
# A bare interpreter rather than a fork: it holds a tokenizer and numpy and none of torch's threads.
CODE = (
    f"import sys; sys.path.insert(0, {IMPORT_ROOT!r})\n"
    "from multiprocessing.connection import Connection\n"
    "from qlora_cli.core.data.tokenize import serve\n"
    "serve(Connection(int(sys.argv[1])))"
)


def count_processes(total_bytes: int | None, workers: int | None, cores: int) -> int:
    """Processes that tokenise: as many as were asked for, else one a core, or one in all for a small input.

    Args:
        total_bytes: Size of the files; None for a table.
        workers: What --workers says.
        cores: Of this machine.
    """
    if workers is not None:
        return workers
    return 1 if total_bytes is not None and total_bytes < SMALL_BYTES else min(cores, MOST_PROCESSES)


class TokeniserPool:
    """Processes that tokenise; a context manager that ends them.

    A row of 16 MiB may take half a gigabyte while it is parsed and tokenised. All such rows go to the first process, which
    takes them one by one, so that the memory of all is that of one long row and of short ones, however many they are.
    """

    def __init__(self, settings: TokeniserSettings, processes: int) -> None:
        self._workers: list[tuple[subprocess.Popen[bytes], Connection]] = []
        self._idle: set[int] = set()  # places in `_workers`
        self._freed = Condition()
        self._threads = ThreadPoolExecutor(processes)  # each only waits for a process
        for _ in range(processes):
            ours, theirs = Pipe()
            with theirs:
                process = subprocess.Popen(
                    [sys.executable, "-c", CODE, str(theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    env={**os.environ, **ENVIRONMENT},
                )
            self._workers.append((process, ours))
            ours.send(settings)
            self._idle.add(len(self._workers) - 1)

    def process_all(self, chunks: Iterable[Chunk]) -> Iterator[TokenisedChunk]:
        """The chunks, tokenised, in their order.

        Raises:
            DataError: A chunk cannot be tokenised, or a process died.
        """
        waiting: deque[tuple[Future[TokenisedChunk], int]] = deque()
        for chunk in chunks:
            held_bytes = sum(bytes_ for _, bytes_ in waiting) + chunk.held_bytes
            while waiting and (len(waiting) >= CHUNKS_AHEAD * len(self._workers) or held_bytes > BYTES_AHEAD):
                future, bytes_ = waiting.popleft()
                held_bytes -= bytes_
                yield future.result()
            waiting.append((self._threads.submit(self._process, chunk), chunk.held_bytes))
            del chunk  # its bytes go when its process has them
        while waiting:
            yield waiting.popleft()[0].result()

    def _process(self, chunk: Chunk) -> TokenisedChunk:
        number = self._take(chunk.is_long)
        process, connection = self._workers[number]
        try:
            connection.send(chunk)
            answer = connection.recv()
        except (EOFError, OSError):
            code = process.wait()
            raise DataError(
                f"A tokenising process died (exit code {code}).",
                "If memory ran out, use fewer processes: --workers 1",
            ) from None
        finally:
            with self._freed:
                self._idle.add(number)  # a dead one too: who gets it next fails at once
                self._freed.notify_all()
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def _take(self, is_long: bool) -> int:
        """Waits for a process: the first one for a long row, for others any, the first one last."""
        with self._freed:
            self._freed.wait_for(lambda: 0 in self._idle if is_long else self._idle)
            number = 0 if is_long else max(self._idle)
            self._idle.remove(number)
            return number

    def __enter__(self) -> "TokeniserPool":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process, _ in self._workers:
            process.terminate()
        for process, connection in self._workers:
            process.wait()
            connection.close()
        self._threads.shutdown(cancel_futures=True)
