"""Prompts laid out on a GPU in, the logits after each of them out; shapes that came before are replayed as CUDA graphs.

Reading a short prompt is some 900 launches, which Python issues slower than the card works them off. A graph stands for
one number of rows and places, so prompts are laid into the next larger of a coarse grid. Capturing takes as long as
reading a few prompts, so that a shape is captured when it comes for the second time. The first time everything is
compiled, chosen and compared, which a capture does not allow.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qlora_cli.core.decoding.decoder import LaidPrompts
from qlora_cli.core.engine.cuda_graphs import bucket, explain_failure

LEAST_TOKENS = 32
MOST_GRAPHS = 16
# With more tokens the card takes longer than Python, and a graph would keep the memory of them all.
MOST_TOKENS = 4096


def bucket_places(longest: int, capacity: int) -> int:
    """Places for prompts of at most `longest` tokens: an eighth too many at most where that is above 32."""
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


@dataclass
class _Graph:
    graph: Any
    laid: LaidPrompts  # what it reads
    logits: Tensor  # what it writes: (prompts, vocabulary)


class PromptGraphs:
    """Graphs of one decoder's prompts, the last ones used.

    Args:
        run: Reads prompts, from tensors that are all on the device.
        obstacle: Why nothing is to be captured, or None.

    Attributes:
        obstacle: Why no prompt is read by a graph; None as long as they are.
    """

    def __init__(self, run: Callable[[LaidPrompts], Tensor], reason: str | None) -> None:
        self.reason = reason
        self._run = run
        self._graphs: OrderedDict[tuple[int, ...], _Graph] = OrderedDict()  # by rows and places
        self._met: set[tuple[int, ...]] = set()
        # Of their own, not that of the steps: it ends with them when they have to make room.
        self._pool: Any = None

    def read(self, laid: LaidPrompts) -> Tensor:
        """(prompts, vocabulary), valid until the next call."""
        key = tuple(laid.ids.shape)
        graph = self._graphs.get(key)
        if graph is None and key in self._met and self.reason is None and laid.ids.numel() <= MOST_TOKENS:
            graph = self._capture(key, laid)
        if graph is None:
            self._met.add(key)
            return self._run_plainly(laid)
        self._graphs.move_to_end(key)
        graph.laid.whole.copy_(laid.whole)
        graph.graph.replay()
        return graph.logits

    def _run_plainly(self, laid: LaidPrompts) -> Tensor:
        try:
            return self._run(laid)
        except torch.OutOfMemoryError:
            if not self._graphs:
                raise
        self._give_up("their memory was needed")  # outside the handler, whose traceback keeps the activations
        return self._run(laid)

    def _capture(self, key: tuple[int, ...], laid: LaidPrompts) -> _Graph | None:
        if len(self._graphs) >= MOST_GRAPHS:
            torch.cuda.synchronize()  # it may still be running
            left, _ = self._graphs.popitem(last=False)
            self._met.discard(left)  # or shapes in rotation would each be captured every time
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        own = LaidPrompts.of(laid.whole.clone(), len(laid.rows))
        try:
            graph, logits = capture(lambda: self._run(own), self._pool)
        except Exception as error:  # memory, or something in this architecture waits for the device, or Triton's own
            reason, _ = explain_failure(error)
        else:
            self._graphs[key] = _Graph(graph, own, logits)
            return self._graphs[key]
        self._give_up(reason)
        return None

    def _give_up(self, reason: str) -> None:
        """For good: what stood in the way once will again."""
        self.reason = reason[:200]
        torch.cuda.synchronize()
        self._graphs.clear()
        self._pool = None
        torch.cuda.empty_cache()
