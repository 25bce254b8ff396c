"""Decoder layers that keep, recompute or offload their activations and run compiled or not, each as planned."""

import math
import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from statistics import median_low
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from qlora_cli.core.device import LayerSeconds
from qlora_cli.core.engine.fsdp import gathered
from qlora_cli.core.engine.gated_mlp import GatedUnit, SharedProjection
from qlora_cli.core.engine.lora_linear import ATTRIBUTE, FastLinear, StepState, fast_linear_of, noted_calls
from qlora_cli.core.engine.memory_plan import MemoryPlan
from qlora_cli.core.engine.offload import ActivationOffload, tensor_of
from qlora_cli.core.experts.fused_experts import FusedExperts
from qlora_cli.core.streaming.streamed_base import evenly
from qlora_cli.core.tiling.kept_attention import keep_attention
from qlora_cli.core.tiling.token_tiles import TiledModule, tile_of

HEAD_START_CYCLES = 50_000_000  # some 30 ms
# A card that was idle has clocks that it does not keep: its power is limited. So long it is kept busy before it is timed.
BUSY_SECONDS, MOST_PASSES = 0.4, 50
LATE = 0.75  # the host, from so much of the device's time on: some launches of a pass come late before all do
# Of what a layer saves, without its input's gradient: GPT-NeoX, Falcon and Phi with adapted attention 0.5, others 0.9.
MOSTLY_LEFT_OUT = 0.7


@dataclass
class LayerPlan:
    """How one decoder layer runs.

    Attributes:
        number: Which layer.
        recompute: Whether its forward pass is repeated in the backward pass instead of saving activations.
        offload: Where what it saves waits; None for where it is.
        compiled: Whether it runs compiled.
        lean: Whether compiled code repeats element-wise operations instead of keeping it.
        preserve_random_state: Whether a repetition must draw the same random numbers again.
        step: The engine's shared state.
        shared: What linears of the layer have in common while they are compiled.
        gates: Its gated MLPs, fused while they are compiled.
        backend: What compiles it, as `torch.compile` takes it.
        keeps_attention: Whether, where it is recomputed and offloaded, attention's results wait on the host as well.
    """

    number: int
    recompute: bool
    offload: ActivationOffload | None
    compiled: bool
    preserve_random_state: bool
    step: StepState
    shared: tuple[SharedProjection, ...] = ()
    gates: tuple[GatedUnit, ...] = ()
    lean: bool = False
    backend: str | Callable = "inductor"
    keeps_attention: bool = False

    def note_shared(self, layer: nn.Module) -> None:
        """Looks up what linears of the layer share, and its gated MLPs."""
        states = [getattr(module, ATTRIBUTE, None) for module in layer.modules()]
        shared = (s.shared for s in states if isinstance(s, FastLinear) and s.shared is not None)
        self.shared = tuple(dict.fromkeys(shared))
        self.gates = tuple(s for s in states if isinstance(s, GatedUnit))

    def run_leanly(self) -> None:
        """Compiled code keeps less from now on."""
        self.lean = True
        for unit in self.gates:
            unit.enabled = False


def set_layers(layers: list[LayerPlan], plan: MemoryPlan, offload: ActivationOffload | None) -> None:
    """Which layers are recomputed and which wait on the host or in memory of gradients in the next pass, by its plan."""
    if offload is not None:
        offload.start()
    recomputed, sent, lent = *plan.numbers(len(layers)), plan.lent_numbers(len(layers))
    attended = evenly(sorted(recomputed), plan.attention_kept)
    for layer in layers:
        layer.recompute = layer.number in recomputed
        for shared in layer.shared:
            shared.enabled = not layer.recompute
        for unit in layer.gates:
            unit.enabled = not layer.lean  # a lean layer repeats the gating instead of keeping what comes of it
        away = layer.number in sent or (layer.recompute and plan.offload_activations)
        layer.offload = offload if away else offload.loan if offload is not None and layer.number in lent else None
        layer.keeps_attention = layer.number in attended


def find_layers(decoder: nn.Module) -> list[nn.Module]:
    """The decoder's blocks: its longest list of modules."""
    return max((list(m) for m in decoder.modules() if isinstance(m, nn.ModuleList)), key=len, default=[])


def _run(layer: Any, args: tuple, kwargs: dict) -> Any:
    return type(layer).forward(layer, *args, **kwargs)


def _run_recomputed(layer: Any, args: tuple, kwargs: dict) -> Any:
    """Inside a compiled region: the compiler drops from the repetition whatever the backward pass does not need."""
    random = getattr(layer, ATTRIBUTE).preserve_random_state
    return checkpoint(lambda *inner: _run(layer, inner, kwargs), *args, use_reentrant=False, preserve_rng_state=random)


def _lean(backend: Callable) -> Callable:
    """A compiler's backend that repeats element-wise operations in the backward pass even where a product takes their
    result from memory. A normalised input, or a gated product, is then not kept for the adapters' gradients."""

    def compile_leanly(graph: Any, inputs: Any, **options: Any) -> Any:
        with torch._functorch.config.patch(ban_recompute_materialized_backward=False):
            return backend(graph, inputs, **options)

    return compile_leanly


@cache
def _compile(function: Callable, backend: str | Callable, lean: bool) -> Callable:
    """One compiled function for all layers: those alike share its code."""
    return torch.compile(function, backend=_lean(torch._dynamo.lookup_backend(backend)) if lean else backend)


def _mark_dynamic(tensors: Any, tokens: int) -> None:
    """Declares to the compiler which dimensions change from batch to batch, so that it compiles once for all of them."""
    for value in tensors:
        if isinstance(value, tuple | list):
            _mark_dynamic(value, tokens)
        elif isinstance(value, Tensor):
            if value.dim() == 4 and value.dtype == torch.int32:  # boundaries of a pack
                torch._dynamo.maybe_mark_dynamic(value, [1, 2] if value.shape[3] == 1 else [2, 3])
            elif value.dim() in (2, 3) and value.shape[1] == tokens:
                torch._dynamo.maybe_mark_dynamic(value, 1)


def run_as_planned(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Replaces `forward` on one layer instance, which has a `LayerPlan`."""
    plan: LayerPlan = getattr(self, ATTRIBUTE)
    if not torch.is_grad_enabled():
        return _run(self, args, kwargs)
    with plan.offload.layer(plan.number) if plan.offload is not None else nullcontext() as send:
        if plan.compiled:
            _mark_dynamic((*args, *kwargs.values()), args[0].shape[1])
            function = _run_recomputed if plan.recompute else _run
            return _compile(function, plan.backend, plan.lean)(self, args, kwargs)
        if not plan.recompute:
            return _run(self, args, kwargs)
        return checkpoint(
            lambda *inner: _run(self, inner, kwargs),
            *args,
            use_reentrant=False,
            preserve_rng_state=plan.preserve_random_state,
            context_fn=lambda: _recomputing(plan, send),
        )


def _recomputing(plan: LayerPlan, send: Callable | None) -> tuple[AbstractContextManager, AbstractContextManager]:
    """What a layer's forward pass runs in, and what its repetition does."""
    if send is None or not plan.keeps_attention:
        return nullcontext(), plan.step.recompute()
    return keep_attention(send, tensor_of, plan.step.recompute)


class LayerCall(NamedTuple):
    """Arguments a layer was called with in a trial."""

    args: tuple
    kwargs: dict[str, Any]


class _EnoughSeen(Exception):
    """Ends a trial run."""


def capture_first_call(layer: nn.Module, run: Callable[[], Any]) -> LayerCall:
    """What a layer is called with while `run` runs, which ends there."""
    calls: list[LayerCall] = []

    def note(_: nn.Module, args: tuple, kwargs: dict) -> None:
        calls.append(LayerCall(args, kwargs))
        raise _EnoughSeen

    with suppress(_EnoughSeen), noted_calls([layer], note):
        run()
    return calls[0]


def capture_calls(layers: list[nn.Module], run: Callable[[], Any]) -> list[LayerCall]:
    """What each layer is called with while `run` runs."""
    calls: list[LayerCall] = []
    with noted_calls(layers, lambda _, args, kwargs: calls.append(LayerCall(args, kwargs))):
        run()
    return calls


class LayerBytes(NamedTuple):
    """Memory one layer takes at some number of tokens."""

    kept: int  # what it saves for its backward pass, its output included, which the next layer saves
    peak: int  # the most it holds at once in a forward and backward pass, `kept` included


def measure_layer(layer: Any, call: LayerCall, first: LayerCall) -> tuple[LayerBytes, LayerSeconds]:
    """Runs a layer forward and backward on its CUDA device, as planned, and reads the allocator and the clock.

    Args:
        first: With which it runs before: the first run also takes libraries' workspaces and compiles.
    """
    _run_both_ways(layer, first)
    return _run_both_ways(layer, call)


def time_layer(layer: Any, call: LayerCall, first: LayerCall) -> LayerSeconds:
    """Time of a layer on its CUDA device, run as planned, on a card that has been as busy as steps keep it.

    Args:
        first: With which it runs before: see `measure_layer`.
    """
    _seconds_of(_pass(layer, first))
    torch.cuda._sleep(HEAD_START_CYCLES)
    measured = [_seconds_of(_pass(layer, call))]
    if (idle := BUSY_SECONDS - measured[0].device) > 0:
        most = min(MOST_PASSES, math.ceil(idle / max(measured[0].device, 1e-4)))
        measured += map(_seconds_of, [_pass(layer, call) for _ in range(most)])
    return usual_seconds(measured)


def usual_seconds(measured: list[LayerSeconds]) -> LayerSeconds:
    """Of passes of one layer, of which the host had a head start for the first alone, and the queue of launches was not yet
    full for the next four. Where passes wait for the host they take its time: then the first has the device's own, and the
    later ones the host's, which is slower at what it does for the first time."""
    later = sorted(measured[len(measured) // 2 :], key=lambda seconds: seconds.device)
    usual = later[len(later) // 2]  # not any one of them, which the host may have been late to launch
    launching = min(median_low(seconds.launching for seconds in part) for part in (measured[:5], later))
    own = min(measured[0], usual, key=lambda seconds: seconds.device) if launching > LATE * usual.device else usual
    return own._replace(launching=launching)


def _run_both_ways(layer: Any, call: LayerCall) -> tuple[LayerBytes, LayerSeconds]:
    device = call.args[0].device
    torch.cuda.synchronize(device)
    peak_before, start = torch.cuda.max_memory_allocated(device), torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    torch.cuda._sleep(HEAD_START_CYCLES)  # so that the device, once it begins, need not wait for launches
    kept = 0

    def after_forward() -> None:
        nonlocal kept
        kept = torch.cuda.memory_allocated(device) - start

    seconds = _seconds_of(_pass(layer, call, after_forward))
    peak = torch.cuda.max_memory_allocated(device) - start
    missing = peak_before - torch.cuda.memory_allocated(device)
    with suppress(torch.OutOfMemoryError):  # the peak was before memory was limited
        torch.empty(max(0, missing), dtype=torch.uint8, device=device)  # the peak of the process stays what it was
    return LayerBytes(kept, peak), seconds


def _pass(layer: Any, call: LayerCall, after_forward: Callable = lambda: None) -> tuple[list[torch.cuda.Event], float]:
    """Launches both passes of a layer; when they begin, change and end on the device, and seconds that the host took."""
    started = time.perf_counter()
    times = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
    hidden = call.args[0].detach().requires_grad_()
    with torch.enable_grad():
        times[0].record()
        out = layer(hidden, *call.args[1:], **call.kwargs)
        times[1].record()
        out = out[0] if isinstance(out, tuple | list) else out
        after_forward()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Attempting to run cuBLAS")  # autograd's thread is a new one
            # Parameters' gradients stay as they are.
            torch.autograd.backward(out, torch.zeros_like(out), inputs=[hidden])
        times[2].record()
    return times, time.perf_counter() - started


def _seconds_of(launched: tuple[list[torch.cuda.Event], float]) -> LayerSeconds:
    times, launching = launched
    times[-1].synchronize()
    forward, backward = (begin.elapsed_time(end) / 1000 for begin, end in pairwise(times))
    return LayerSeconds(forward, backward, launching)


def _saved_by(layer: nn.Module, call: LayerCall, *, input_gradient: bool = True) -> list[Tensor]:
    """The tensors autograd saves in one forward pass of a layer, run plainly."""
    saved: list[Tensor] = []
    hidden = call.args[0].detach().requires_grad_(input_gradient)
    with torch.enable_grad(), saved_tensors_hooks(lambda t: saved.append(t.detach()), lambda t: t):
        _run(layer, (hidden, *call.args[1:]), call.kwargs)
    return saved


def saved_bytes_a_token(layer: nn.Module, call: LayerCall, *, input_gradient: bool = True) -> float:
    """Memory a layer's forward pass, run plainly, keeps for its backward pass, by the tokens of the call, which has
    hidden states (rows, length, size) in front; `input_gradient` says whether their gradient is wanted."""
    rows, length, _ = call.args[0].shape
    sizes = {rows * length, length}  # in the shape of every activation, and of no weight: see TRIAL_LENGTHS
    saved = {t.data_ptr(): t for t in _saved_by(layer, call, input_gradient=input_gradient) if sizes & set(t.shape)}
    return sum(t.nbytes for t in saved.values()) / (rows * length)


def can_compile(calls: list[LayerCall]) -> bool:
    """Whether layers may be compiled: not where a token has several hidden states (Gemma 3n), whose mixing clamps a weight in
    place, which the compiler refuses."""
    return all(call.args[0].dim() == 3 for call in calls)


def runs_better_plainly(first: nn.Module, call: LayerCall, compiled_bytes_a_token: float) -> bool:
    """Whether the first layer is better not compiled.

    Its input needs no gradient, so that run plainly it leaves out what only leads there: where adapters are on the
    attention alone and the MLP stands beside it, all of the MLP's backward pass. (Compiled, it would be compiled a
    second time.) Elsewhere little is left out, and plain operations are slower.
    `compiled_bytes_a_token` is what a compiled layer keeps for its backward pass.
    """
    whole, rest = (saved_bytes_a_token(first, call, input_gradient=wanted) for wanted in (True, False))
    return rest <= min(MOSTLY_LEFT_OUT * whole, compiled_bytes_a_token)


def skip_unused_outputs(layers: list[nn.Module], calls: list[LayerCall]) -> list[str]:
    """Lets repeated forward passes leave out the linear layers, experts and tiled modules whose output no saved tensor
    depends on.

    In a residual network that is the last one, often a third of the layer's arithmetic. It is found by trial: an
    output made NaN that leaves every saved tensor free of NaN is not needed. Modules that several layers share stay as
    they are: another layer may need what this one does not even call.

    Returns:
        Names, inside a layer, of the linears left out.
    """
    found: dict[tuple, list[str]] = {}
    owners = Counter(module for layer in layers for module in layer.modules())
    for layer, call in zip(layers, calls, strict=True):
        linears = [(n, m) for n, m in layer.named_modules() if _skips_output(m) is not None and owners[m] == 1]
        kind = (type(layer), *(name for name, _ in linears))  # of one class may be layers with experts and without
        if kind not in found:
            with gathered(layer):
                found[kind] = [name for name, linear in linears if _unused(layer, call, linear)]
        for name in found[kind]:
            state: Any = _skips_output(layer.get_submodule(name))
            state.output_unused_in_recompute = True
    return sorted({name for names in found.values() for name in names})


def _skips_output(module: nn.Module) -> FastLinear | FusedExperts | TiledModule | None:
    """What a module computes with that can leave out its output; None for other modules."""
    return fast_linear_of(module) or getattr(module, "fused", None) or tile_of(module)


def _unused(layer: nn.Module, call: LayerCall, linear: Any) -> bool:
    original, called = linear.forward, False

    def spoil(*args: Any, **kwargs: Any) -> Tensor:
        nonlocal called
        called = True
        return original(*args, **kwargs) * float("nan")

    linear.forward = spoil
    try:
        return not any(t.is_floating_point() and bool(t.isnan().any()) for t in _saved_by(layer, call)) and called
    finally:
        linear.forward = original


def draws_random(layers: list[nn.Module], calls: list[LayerCall]) -> bool:
    """Whether layers draw from torch's random state in training, as dropout does, or routers that jitter; found by trial.

    Adapters' dropout in fused linears does not: it has seeds of its own. The random state stays as it was.
    """
    return any(_draws_random(layer, call) for layer, call in zip(layers, calls, strict=True))


@torch.no_grad()
def _draws_random(layer: nn.Module, call: LayerCall) -> bool:
    device, modes = call.args[0].device, {module: module.training for module in layer.modules()}
    on_cuda = device.type == "cuda"

    def states() -> list[Tensor]:
        return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if on_cuda else [])]

    with torch.random.fork_rng(devices=[device] if on_cuda else []), gathered(layer):
        before = states()
        layer.train()
        try:
            _run(layer, call.args, call.kwargs)
        finally:
            for module, mode in modes.items():
                module.training = mode
        return not all(map(torch.equal, before, states()))
