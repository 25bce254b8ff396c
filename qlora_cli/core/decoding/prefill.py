"""CUDA graphs of prefill: padded shapes of prompts that came before are replayed.

Reading a short prompt is some 900 launches, which Python issues slower than the card works them off. A graph stands for
one number of prompts and tokens, so prompts are padded to the next larger length of a coarse grid. Capturing takes as
long as reading a few prompts, so that a shape is captured when it comes for the second time. The first time everything
is compiled, chosen and compared, which a capture does not allow.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qlora_cli.core.decoding.decoder import PaddedPrompts
from qlora_cli.core.engine.cuda_graphs import bucket, explain_failure

LEAST_TOKENS = 32
MOST_GRAPHS = 16
# With more tokens the card takes longer than Python, and a graph would keep the memory of them all.
MOST_TOKENS = 4096


def bucket_length(longest: int, capacity: int) -> int:
    """Tokens that prompts of at most `longest` are padded to: an eighth too many at most where that is above 32."""
    return min(bucket(longest, LEAST_TOKENS), capacity)


def capture(run: Callable[[], Any], pool: Any) -> tuple[Any, Any]:
    """The graph of what `run` launches, and what it returned; it is not yet run.

    Raises:
        Exception: Whatever the capture broke off with, of any class. The current stream is what it was.
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        # Relaxed: libraries may load what they need for the first time on the capture's stream.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="relaxed"):
            result = run()
    except BaseException:
        torch.cuda.set_stream(stream)  # torch leaves its own the current one when the end of a capture fails, too
        raise
    return graph, result


def leaves(graph: Any, states: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Whether a replay leaves states as they are expected, but for rounding; what is not a number is not.

    Args:
        graph: As `capture` gives it.
        states: What it changes.
        expected: What they are afterwards, in the same shapes.
    """
    graph.replay()
    pairs = [(found.float(), wanted.float()) for found, wanted in zip(states, expected, strict=True)]
    return all(bool((found - wanted).norm() <= 0.02 * wanted.norm()) for found, wanted in pairs)


Capture = Callable[[Callable[[], Any], Any], tuple[Any, Any]]


@dataclass
class _Graph:
    graph: Any
    padded: PaddedPrompts  # what it reads
    logits: Tensor  # what it writes: (prompts, vocabulary)


class PrefillGraphs:
    """Graphs of one decoder's prefill, the last ones used.

    Args:
        run: Reads prompts, from tensors that are all on the device.
        reason: Why nothing is to be captured, or None.
        capture: Captures a graph, as `capture` of this module.

    Attributes:
        graphs: By (prompts, length), the least recently used first.
        reason: Why no prompt is read by a graph; None as long as they are.
    """

    def __init__(self, run: Callable[[PaddedPrompts], Tensor], reason: str | None, capture: Capture = capture) -> None:
        self.reason = reason
        self._run, self._capture_run = run, capture
        self.graphs: OrderedDict[tuple[int, ...], _Graph] = OrderedDict()
        self._met: set[tuple[int, ...]] = set()
        # Their own memory pool, not that of the steps: it is freed when their memory is needed.
        self._pool: Any = None

    def read(self, padded: PaddedPrompts) -> Tensor:
        """(prompts, vocabulary), valid until the next call."""
        key = tuple(padded.ids.shape)
        graph = self.graphs.get(key)
        if graph is None and key in self._met and self.reason is None and padded.ids.numel() <= MOST_TOKENS:
            graph = self._capture(key, padded)
        if graph is None:
            self._met.add(key)
            return self._run_plainly(padded)
        self.graphs.move_to_end(key)
        graph.padded.whole.copy_(padded.whole)
        graph.graph.replay()
        return graph.logits

    def _run_plainly(self, padded: PaddedPrompts) -> Tensor:
        try:
            return self._run(padded)
        except torch.OutOfMemoryError:
            if not self.graphs:
                raise
        self._give_up("their memory was needed")  # outside the handler, whose traceback keeps the activations
        return self._run(padded)

    def _capture(self, key: tuple[int, ...], padded: PaddedPrompts) -> _Graph | None:
        if len(self.graphs) >= MOST_GRAPHS:
            torch.cuda.synchronize()  # it may still be running
            oldest, _ = self.graphs.popitem(last=False)
            self._met.discard(oldest)  # or shapes in rotation would each be captured every time
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        own = PaddedPrompts.of(padded.whole.clone(), len(padded.rows))
        try:
            graph, logits = self._capture_run(lambda: self._run(own), self._pool)
        except Exception as error:  # memory, or something in this architecture waits for the device, or Triton's own
            reason, _ = explain_failure(error)
        else:
            self.graphs[key] = _Graph(graph, own, logits)
            return self.graphs[key]
        self._give_up(reason)
        return None

    def _give_up(self, reason: str) -> None:
        """Captures nothing more: what failed once will again."""
        self.reason = reason[:200]
        torch.cuda.synchronize()
        self.graphs.clear()
        self._pool = None
        torch.cuda.empty_cache()
