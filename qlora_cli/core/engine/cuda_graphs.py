"""CUDA graphs of a training step: forward and backward pass of a micro-batch, each replayed as one graph.

Launching a step's thousands of kernels from Python takes longer than small models or short steps compute. A graph
stands for one shape, so a pack is padded to the next larger shape of a coarse grid: what is added is a row of its own,
empty rows, and positions without a target. All graphs share one pool of memory, for only one runs at a time.
"""

import gc
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_cli.core.data.packing import MicroBatch, Part
from qlora_cli.errors import first_line
from qlora_cli.events import Notice, Report
from qlora_cli.kernels.attention import kernels_of
from qlora_cli.kernels.embedding_noise import add_noise, tokens_of_rows

MOST_GRAPHS = 48
MOST_RELEASES = 4  # how often graphs make room before a leaner plan has to
COARSENESS = 8  # buckets of tokens from one power of two to the next
# Each shape is captured once, which takes as long as several steps: shapes are kept few where that costs little.
LEAST_TOKENS = 64
TRAINED_COARSENESS, MOSTLY_TRAINED = 4, 0.65  # of trained tokens; above this share of all, all of them
# Rows and tokens of the longest only bound attention's launch, which shows in small packs: 64 heads of 8 rows of 40
# tokens take flash 63 µs where no row has more than 128, 100 with 512, and the kernel for short rows 32 (H200).
LEAST_ROWS, LEAST_LONGEST = 16, (128, 512)  # in small packs and in large ones


@dataclass(frozen=True)
class StepInputs:
    """A micro-batch on the device.

    Attributes:
        embedded: (1, T, size) in the compute dtype.
        labels: (1, T) int64.
        position_ids: (1, T) int64.
        boundaries: (rows + 1,) int32.
        longest: Tokens of the longest row, or more.
        equal_rows: How many rows of `longest` tokens the pack consists of; 0 where they are not of one length.
        trained_tokens: How many labels are trained, or more.
        part: What else there is to know of a part of a pack, which then has no graph.
        by_token: From `structure.inputs_by_token`, (1, T, ...) each.
    """

    embedded: Tensor
    labels: Tensor
    position_ids: Tensor
    boundaries: Tensor
    longest: int
    equal_rows: int
    trained_tokens: int
    part: Part | None = None
    by_token: dict[str, Tensor] = field(default_factory=dict)

    def noisy(self, alpha: float) -> "StepInputs":
        """The same with NEFTune's noise on each row's embeddings."""
        lengths = self.part.row_tokens if self.part else tokens_of_rows(self.boundaries, self.labels.shape[1])
        return replace(self, embedded=add_noise(self.embedded, lengths, alpha))


def step_inputs(batch: MicroBatch, embedded: Tensor, by_token: dict[str, Tensor], *, equal_rows: bool) -> StepInputs:
    """A micro-batch on the device, or a part of one, with its embeddings and what else was looked up; `equal_rows` says
    whether rows of one length are to be attended to as such."""
    rows, part = batch.cu_seqlens.numel() - 1, batch.part
    tokens, filler = batch.pack_tokens, 0 if part is None else part.filler
    equal = equal_rows and rows * batch.max_seqlen == tokens
    boundaries = batch.cu_seqlens
    if filler:  # is a row of its own
        boundaries = F.pad(boundaries, (0, 1), value=tokens + filler)
    return StepInputs(
        embedded=embedded,
        labels=batch.labels,
        position_ids=batch.position_ids,
        boundaries=boundaries,
        longest=batch.max_seqlen if equal else max(batch.max_seqlen, filler),
        equal_rows=rows if equal else 0,
        # A part without trained tokens has a place that counts nothing, for its backward pass is part of the others'.
        trained_tokens=batch.trained_tokens if part is None else max(batch.trained_tokens, 1),
        part=part,
        by_token=by_token,
    )


def bucket(count: int, least: int = 16, coarseness: int = COARSENESS) -> int:
    """The next larger of a grid of numbers, at most 1 / coarseness above `count` where that is above coarseness * `least`."""
    step = max(least, 2 ** max(0, count.bit_length() - 1) // coarseness)
    return -(-count // step) * step


def bucket_tokens(tokens: int) -> int:
    """Tokens of a micro-batch, on the grid."""
    return bucket(tokens, LEAST_TOKENS)


def bucketed(inputs: StepInputs) -> StepInputs:
    """The same loss and gradients in a shape of the grid. A pack of equal rows keeps its shape."""
    tokens = inputs.labels.shape[1]
    if inputs.equal_rows:
        return replace(inputs, trained_tokens=_trained(inputs, tokens))
    wanted = bucket_tokens(tokens)
    added = wanted - tokens
    rows = bucket(inputs.boundaries.numel() + 1, LEAST_ROWS)
    least, most = LEAST_LONGEST
    least = min(most, max(least, 2 ** wanted.bit_length() // 8))
    longest = max(least, 2 ** (max(inputs.longest, added) - 1).bit_length())
    return StepInputs(
        # Gemma 3n takes a root of a token's states, at zero without a derivative.
        embedded=F.pad(inputs.embedded, (0, 0, 0, added), value=1.0 if inputs.by_token else 0.0),
        labels=F.pad(inputs.labels, (0, added), value=-100),
        position_ids=F.pad(inputs.position_ids, (0, added)),
        boundaries=F.pad(inputs.boundaries, (0, rows - inputs.boundaries.numel()), value=wanted),
        longest=min(longest, wanted),
        equal_rows=0,
        trained_tokens=_trained(inputs, wanted),
        by_token={n: F.pad(t, (0, 0) * (t.dim() - 2) + (0, added)) for n, t in inputs.by_token.items()},
    )


def _trained(inputs: StepInputs, most: int) -> int:
    count = bucket(inputs.trained_tokens, coarseness=TRAINED_COARSENESS)
    return most if count >= MOSTLY_TRAINED * most else count


@dataclass
class _Graph:
    forward: Any
    backward: Any
    inputs: StepInputs  # what the graphs read
    loss: Tensor
    slope: Tensor  # gradient of the loss, read by the backward pass


class StepGraphs:
    """Graphs of one engine, made as shapes come.

    Args:
        run: Loss of a micro-batch; capturable, differentiable.
        parameters: Which receive gradients, in place: a parameter's `grad` has to stand.
        join: Makes the current stream wait for whatever other streams `run` and its backward pass use.
        layout: How layers run at so many tokens: each way is run once without a graph before it is captured.
        gather: Whether there is memory for all new gradients at once, which are then added in a few launches.
        report: Receives a notice when graphs are given up.
    """

    def __init__(
        self,
        run: Callable[[StepInputs], Tensor],
        parameters: list[Tensor],
        join: Callable[[], None],
        layout: Callable[[int], tuple],
        gather: Callable[[], bool],
        report: Report,
    ) -> None:
        self.run, self.parameters, self.join, self.layout = run, parameters, join, layout
        self.gather, self.report = gather, report
        self.graphs: dict[tuple, _Graph] = {}
        self.warm: set[tuple] = set()
        self.warming: tuple | None = None  # the way of the last pass, where that was its first one
        self.addresses: tuple[int, ...] = ()
        self.pool: Any = None
        self.stream: Any = None
        self.passes = 0  # forward passes of training, with a graph and without
        self.crowded = False  # memory ran out in a capture while other graphs held some
        self.releases = 0
        self.failed = False

    def clear(self) -> None:
        """Forgets all graphs; new ones are made of what `run` does then."""
        self._drop()
        self.warm.clear()
        self.failed = False

    def make_room(self) -> bool:
        """After memory ran out: whether graphs held some, which is given back. A pass without a graph beside them takes
        what a plan counts once, and so does a first one of another shape where their pool has no large enough hole."""
        held = bool(self.graphs) or self.crowded
        self.crowded = False
        if not held or self.releases >= MOST_RELEASES:
            return False
        self.releases += 1
        self._drop()
        if self.warming is not None:  # that pass has yet to come to its end
            self.warm.discard(self.warming)
        return True

    def _drop(self) -> None:
        """A pool ends with its last graph; what Python had when it began is looked through again."""
        self.graphs.clear()
        if self.pool is not None:
            self.pool = None
            gc.unfreeze()

    def loss(self, inputs: StepInputs) -> Tensor:
        """The loss of a shape of the grid: replayed where there is a graph of it, or one can be captured.

        Raises:
            torch.OutOfMemoryError: There is not the memory to capture this shape.
        """
        graph = self._graph_for(inputs)
        return self.run(inputs) if graph is None else _Replay.apply(self.parameters[0], graph, self)

    def loss_beside(self, inputs: StepInputs) -> Tensor:
        """The loss of any shape, without a graph; what graphs hold makes room where memory runs out."""
        try:
            return self.run(inputs)
        except torch.OutOfMemoryError:
            if not self.graphs:
                raise
        self.clear()
        torch.cuda.empty_cache()
        return self.run(inputs)

    def _graph_for(self, inputs: StepInputs) -> _Graph | None:
        """The graph of this shape, filled with these inputs; None where this micro-batch has to run without one."""
        self.passes += 1
        addresses = tuple(0 if p.grad is None else p.grad.data_ptr() for p in self.parameters)
        if self.failed or 0 in addresses or any(given.requires_grad for given in inputs.by_token.values()):
            return None
        if addresses != self.addresses:
            self._drop()
            self.addresses = addresses
        # Kernels are compiled and chosen, buffers are pinned outside a graph, once for each way to attend and to keep within memory.
        way = (inputs.equal_rows > 0, kernels_of(inputs.longest), *self.layout(inputs.labels.shape[1]))
        self.warming = None if way in self.warm else way
        if self.warming is not None:
            self.warm.add(way)
            return None
        numbers = inputs.longest, inputs.equal_rows, inputs.trained_tokens
        key = (*way, *inputs.labels.shape, inputs.boundaries.numel(), *numbers)
        graph = self.graphs.get(key)
        if graph is not None:
            for name in ("embedded", "labels", "position_ids", "boundaries"):
                getattr(graph.inputs, name).copy_(getattr(inputs, name))
            for name, given in inputs.by_token.items():
                graph.inputs.by_token[name].copy_(given)
        elif len(self.graphs) < MOST_GRAPHS:
            graph = self._capture(inputs)
            if graph is not None:
                self.graphs[key] = graph
        return graph

    def _add_together(self, found: tuple[Tensor | None, ...]) -> None:
        pairs = [
            (p.grad, g) for p, g in zip(self.parameters, found, strict=True) if p.grad is not None and g is not None
        ]
        torch._foreach_add_([grad for grad, _ in pairs], [new for _, new in pairs])

    def _capture(self, inputs: StepInputs) -> _Graph | None:
        if self.stream is None:
            self.stream = torch.cuda.Stream()
        # Capturing begins by giving back unused memory, which cycles of Python objects may hold. Looking through half a
        # million modules and functions takes a third of a second each time: what is there by now is left out after.
        gc.collect()
        if self.pool is None:
            self.pool = torch.cuda.graph_pool_handle()
            gc.freeze()
        torch._C._cuda_clearCublasWorkspaces()  # those of steps without a graph; each stream has its own
        options = {"pool": self.pool, "stream": self.stream, "capture_error_mode": "relaxed"}
        inputs = replace(inputs, embedded=inputs.embedded.detach())
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        loss = None
        try:
            slope = torch.ones((), device=inputs.embedded.device)
            with torch.cuda.graph(forward, **options):
                loss = self.run(inputs)
                self.join()
            with torch.cuda.graph(backward, **options):
                if self.gather():
                    self._add_together(torch.autograd.grad(loss, self.parameters, slope, allow_unused=True))
                else:
                    torch.autograd.backward(loss, slope, inputs=self.parameters)
                self.join()
            return _Graph(forward, backward, inputs, loss.detach(), slope)
        except Exception as error:  # Triton's errors have no class in common with torch's
            reason, memory_ran_out = explain_failure(error)
        # Outside the handler, whose traceback would keep the activations.
        del loss
        self.crowded = memory_ran_out and bool(self.graphs)
        self._drop()
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        if memory_ran_out:
            raise torch.OutOfMemoryError(reason)
        self.failed = True
        self.report(Notice(f"Steps run without CUDA graphs, because capturing one failed ({reason})."))
        return None


def explain_failure(error: BaseException) -> tuple[str, bool]:
    """Why a capture failed, and whether because memory ran out; what its frames hold is let go.

    An error inside a capture breaks the capture off, which raises another one on top of it.
    """
    chain = [error]
    while chain[-1].__context__ is not None:
        chain.append(chain[-1].__context__)
    for each in chain:
        traceback.clear_frames(each.__traceback__)
    memory_ran_out = any(isinstance(each, torch.OutOfMemoryError) for each in chain)
    return f"{type(chain[-1]).__name__}: {first_line(chain[-1])}", memory_ran_out


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, graph: _Graph, graphs: StepGraphs) -> Tensor:
        graph.forward.replay()
        ctx.graph, ctx.graphs, ctx.number = graph, graphs, graphs.passes
        return graph.loss.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None]:
        if ctx.number != ctx.graphs.passes:
            raise RuntimeError("another micro-batch ran between this one's forward and backward pass")
        ctx.graph.slope.copy_(grads[0])
        ctx.graph.backward.replay()
        return None, None, None
