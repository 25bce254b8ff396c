"""Tiling over tokens: modules that treat every token by itself (MLPs, norms) run over tiles of a long row, both ways.

Such a module keeps its input alone. Its backward pass repeats it tile by tile, so that the wide intermediate results of
an MLP, and a norm's in fp32, are there for one tile at a time (as in https://arxiv.org/abs/2506.13996, section 3.3).
Gradients of parameters are summed here and handed to autograd once.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

# Of a tile: 8,192 x 14,336 in 16 bits are 224 MiB, of which an MLP's backward pass holds some six; a product of so many
# rows takes 1.4 ms on an H200, beside which the weight, dequantised for each tile anew, takes 0.04.
TILE_TOKENS = 8192
LEAST_TILES = 2  # that a micro-batch has to fill, for tiles to be taken unasked
# Tokens that a tile is a multiple of: whole groups of dropout's numbers, whole tiles of products, and more than layers are
# tried out on, where they run whole.
TILE_MULTIPLE = 128
ROUNDING = 2**-7  # of a norm that rounds in other places
MOST_NORMED = 2**32  # values: PyTorch's kernel finds a row by a product of 32 bits (layer_norm_kernel.cu)
MOST_DIFFERENCE = 2**-5  # of a token's output, by its size, that the rounding of other products explains


class TileState(Protocol):
    """What the linears of a tile ask while it runs.

    Attributes:
        recomputing: Whether a layer's forward pass is repeated in the backward pass.
    """

    recomputing: bool

    def tile(self, first_token: int, *, repeated: bool) -> AbstractContextManager[None]:
        """Marks a run on the tokens from `first_token` on; `repeated` where only what is saved is needed."""


@dataclass(eq=False)
class TiledModule:
    """What a module instance runs in place of its `forward`.

    Attributes:
        module: Of one input and one output, (rows, length, ...) each, every token by itself.
        shape: Of a token's output.
        dtype: Of the output.
        tile_tokens: Tokens of a tile, at most; rows together no longer than that run as ever.
        output_unused_in_recompute: Whether a repetition of the layer's forward pass can do without the output.
    """

    module: Any
    shape: tuple[int, ...]
    dtype: torch.dtype
    tile_tokens: int
    state: TileState
    output_unused_in_recompute: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape[0] * x.shape[1] <= self.tile_tokens or torch.compiler.is_compiling():
            return self.run(x)
        parameters = [p for p in self.module.parameters() if p.requires_grad]
        return _Tiled.apply(x, self, torch.is_grad_enabled(), *parameters)

    def run(self, x: Tensor) -> Tensor:
        """The module's own forward."""
        return type(self.module).forward(self.module, x)

    def ranges(self, tokens: int) -> Iterator[slice]:
        """Tiles of nearly one size."""
        tiles = -(-tokens // self.tile_tokens)
        size = -(-tokens // (tiles * TILE_MULTIPLE)) * TILE_MULTIPLE
        return (slice(first, min(first + size, tokens)) for first in range(0, tokens, size))


@contextmanager
def _keeping_nothing(differentiated: bool) -> Iterator[None]:
    """Gradients are enabled as where the module is called, by which products in 8 bits go, and nothing is saved for them;
    in an autograd function they are not, and the repetition would be of another forward pass."""
    with torch.set_grad_enabled(differentiated), saved_tensors_hooks(lambda _: None, lambda kept: kept):
        yield


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tile: TiledModule, differentiated: bool, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.tile, ctx.parameters = tile, parameters
        flat = x.flatten(0, 1)  # (tokens, ...)
        out = x.new_empty(*x.shape[:2], *tile.shape, dtype=tile.dtype)  # no view: a model may add to it in place
        flat_out = out.view(len(flat), *tile.shape)
        if not (tile.output_unused_in_recompute and tile.state.recomputing):
            for part in tile.ranges(len(flat)):
                with tile.state.tile(part.start, repeated=False), _keeping_nothing(differentiated):
                    flat_out[part] = tile.run(flat[None, part])[0].detach()
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,), tile = ctx.saved_tensors, ctx.tile
        flat, grad = x.flatten(0, 1), grads[0].flatten(0, 1)
        needs_x, needed = ctx.needs_input_grad[0], ctx.needs_input_grad[3:]
        grad_x = torch.empty_like(flat) if needs_x else None
        parameters = [p for p, is_needed in zip(ctx.parameters, needed, strict=True) if is_needed]
        totals: list[Tensor | None] = [None] * len(parameters)
        for part in tile.ranges(len(flat)):
            with torch.enable_grad(), tile.state.tile(part.start, repeated=True):
                given = flat[None, part].detach().requires_grad_(needs_x)
                out = tile.run(given)
            wanted = [given, *parameters] if needs_x else parameters
            found = list(torch.autograd.grad(out, wanted, grad[None, part], allow_unused=True))
            del out
            if grad_x is not None:
                first = found.pop(0)
                grad_x[part] = 0 if first is None else first[0]
            for place, new in enumerate(found):
                total = totals[place]
                totals[place] = new if total is None or new is None else total.add_(new)
        of = iter(totals)
        return (
            None if grad_x is None else grad_x.view(x.shape),
            None,
            None,
            *(next(of) if is_needed else None for is_needed in needed),
        )


class TokenTiles:
    """The modules of one decoder that can run in tiles: parts of its layers, and what stands beside these.

    Args:
        run: Calls them all once, on a row of a few tokens.
        state: See `TileState`.
    """

    def __init__(
        self, decoder: nn.Module, layers: Iterable[nn.Module], run: Callable[[], Any], state: TileState
    ) -> None:
        self.state = state
        beside = [m for m in decoder.children() if not isinstance(m, nn.ModuleList)]
        found = find_token_wise([*layers, *beside], run)
        self.found = {module: (tuple(out.shape[2:]), out.dtype) for module, (_, out) in found.items()}
        self.norms = {m: norm for m, (x, _) in found.items() if x.is_cuda and (norm := fused_norm(m, x)) is not None}
        self.tile_tokens: int | None = None

    def install(self, tile_tokens: int) -> None:
        """Has the modules run in tiles of at most so many tokens from now on."""
        self.remove()
        self.tile_tokens = -(-tile_tokens // TILE_MULTIPLE) * TILE_MULTIPLE
        for module, (shape, dtype) in self.found.items():
            tiled, norm = TiledModule(module, shape, dtype, self.tile_tokens, self.state), self.norms.get(module)
            vars(module)["forward"] = tiled if norm is None else partial(run_norm, norm, tiled)

    def remove(self) -> None:
        """Gives the modules their own forward back."""
        if self.tile_tokens is not None:
            for module in self.found:
                vars(module).pop("forward", None)
        self.tile_tokens = None


def fused_norm(module: Any, x: Tensor) -> Callable[[Tensor], Tensor] | None:
    """PyTorch's own root-mean-square norm, where a module does no more than that, found by trial; None elsewhere.

    On a card it is one kernel each way and keeps its input alone, so that it needs no tiles: 18 bytes a value and step
    from the card's memory, where the operations in float32 that models write take some 180.

    Args:
        x: What the module is called with, (rows, length, ...).
    """
    eps, parameters = getattr(module, "variance_epsilon", getattr(module, "eps", None)), [*module.parameters()]
    if not isinstance(eps, float) or len(parameters) != 1 or parameters[0].requires_grad:
        return None
    weight = parameters[0]
    if weight.shape != x.shape[-1:] or weight.dtype != x.dtype:
        return None
    norm = partial(nn.functional.rms_norm, normalized_shape=weight.shape, weight=weight, eps=eps)
    found = []
    with torch.enable_grad():
        for each in (partial(type(module).forward, module), norm):
            given = x.detach().requires_grad_()
            out = each(given)
            found.append((out, *torch.autograd.grad(out, given, out.detach().flip(-1))))
    near = all(bool((a - b).float().norm() <= ROUNDING * a.float().norm()) for a, b in zip(*found, strict=True))
    return norm if near else None


def run_norm(norm: Callable[[Tensor], Tensor], tiled: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The norm of all tokens in one kernel, or in tiles where that would count past 32 bits, and norm the first rows twice."""
    return norm(x) if x.numel() <= MOST_NORMED else tiled(x)


def tile_of(module: nn.Module) -> TiledModule | None:
    """What a module runs in tiles by; None for any other."""
    forward = vars(module).get("forward")
    return forward if isinstance(forward, TiledModule) else None


@torch.no_grad()
def find_token_wise(
    roots: list[nn.Module], run: Callable[[], Any], is_token_wise: Callable[[Any, Tensor, Tensor], bool] | None = None
) -> dict[nn.Module, tuple[Tensor, Tensor]]:
    """The outermost modules that treat each token by itself, with an input and an output of each.

    Args:
        roots: Modules whose parts are looked at.
        run: Calls them all.
        is_token_wise: Of a module, its input and its output; by default that is tried out.
    """
    is_token_wise = is_token_wise or _is_token_wise
    calls: dict[nn.Module, tuple[Tensor, Tensor]] = {}
    counts: Counter[nn.Module] = Counter()

    def note(module: nn.Module, args: tuple, kwargs: dict, out: Any) -> None:
        counts[module] += 1
        if len(args) == 1 and not kwargs and _are_tokens(args[0], out):
            calls[module] = args[0], out

    inside = dict.fromkeys(module for root in roots for module in root.modules())
    hooks = [module.register_forward_hook(note, with_kwargs=True) for module in inside]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    found: dict[nn.Module, tuple[Tensor, Tensor]] = {}
    answers: dict[tuple, bool] = {}

    def look(module: nn.Module, kind: tuple) -> None:
        if _is_linear(module):  # keeps its input and no more as it is
            return
        plain = "forward" not in vars(module) and next(module.parameters(), None) is not None
        if plain and counts[module] == 1 and module in calls:
            key = (*kind, type(module))
            if key not in answers:
                answers[key] = is_token_wise(module, *calls[module])
            if answers[key]:
                found[module] = calls[module]
                return
        for name, child in module.named_children():
            look(child, (*kind, name))

    for root in roots:
        if list(root.children()):
            for name, child in root.named_children():
                look(child, (type(root), name))
        else:
            look(root, (type(root),))
    return found


def _are_tokens(x: Any, out: Any) -> bool:
    tensors = isinstance(x, Tensor) and isinstance(out, Tensor)
    return tensors and min(x.dim(), out.dim()) >= 3 and x.is_floating_point() and x.shape[:2] == out.shape[:2]


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or hasattr(module, "base_layer")


def _is_token_wise(module: Any, x: Tensor, _out: Tensor) -> bool:
    """Whether each half of a row comes out as in the whole one, in a tile of its own, and where the other half is not a
    number; tried out without adapters' dropout, whose places would differ."""
    half = x.shape[1] // 2
    if x.shape[0] != 1 or half < 1:
        return False
    dropping = [m for m in module.modules() if hasattr(m, "base_layer") and m.training]
    for each in dropping:
        each.training = False
    run = partial(type(module).forward, module)
    try:
        whole = run(x)
        for own, other in ((slice(0, half), slice(half, None)), (slice(half, None), slice(0, half))):
            spoiled = x.clone()
            spoiled[:, other] = float("nan")
            most = MOST_DIFFERENCE * whole[:, own].float().norm(dim=-1)
            for found in (run(spoiled)[:, own], run(x[:, own])):
                if not bool(((found - whole[:, own]).float().norm(dim=-1) <= most).all()):
                    return False
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, RuntimeError, IndexError):  # it wants a whole row, and says so in a way of its own
        return False
    finally:
        for each in dropping:
            each.training = True
    return True
