"""Norms, rotary embeddings, gates and routers of one model instance as one fused launch each, wherever that gives the same.

Each is compared with the module's own at its first use, on what it is really given; one that differs is left alone. A
step's single token says nothing about the many of a prompt, so that steps and prefill are compared separately.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_cli.core.decoding.decoder import updates_state
from qlora_cli.core.engine.gated_mlp import gated_mlp_kind
from qlora_cli.kernels.decode.fused_projections import gate_and_project, normalise_and_project
from qlora_cli.kernels.decode.gemv import APART_TOKENS, StackedAdapter
from qlora_cli.kernels.decode.pointwise import add_and_rms_norm, gate, layer_norm, rms_norm, rotate
from qlora_cli.kernels.decode.routing import choose_experts

ROTARY = "apply_rotary_pos_emb"  # what every module of transformers that rotates in halves calls it
# All that a decoder layer like llama's has.
PRE_NORM = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
# (offset, round_first) of known RMS norms: llama and most; those that multiply in float32; gemma.
NORMS = ((0.0, True), (0.0, False), (1.0, False))
WHOLE = 1e-6  # relative difference between two ways of computing the same in float32
HALF = {torch.bfloat16: 2**-7, torch.float16: 2**-10}  # and in 16 bits: one rounding of the largest value


def is_same(found: Tensor, expected: Tensor) -> bool:
    """Whether two results differ by rounding at most; waits for the device."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    largest = float(expected.abs().max())
    # In their own dtype: near values differ exactly, and a prompt's activations are large.
    return float((found - expected).abs_().max()) <= HALF.get(expected.dtype, 4 * WHOLE) * largest


def _epsilon(norm: Any) -> float | None:
    """What an RMS norm adds to the mean square; None where it has none by a known name."""
    return next((getattr(norm, n) for n in ("variance_epsilon", "eps", "epsilon") if hasattr(norm, n)), None)


def _may_be_pre_norm(module: nn.Module) -> bool:
    """Whether it has the parts of a decoder layer like llama's, nothing of its own, and no state that a trial would change."""
    parts = {name: part for name, part in module.named_children() if not isinstance(part, nn.Dropout)}
    return parts.keys() == PRE_NORM and not module._parameters and not updates_state(parts["self_attn"])


def _may_route(module: Any) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 2 and type(getattr(module, "top_k", None)) is int


def _routes_alike(route: Callable[..., Any], x: Tensor, normalised: bool, expected: Any) -> bool:
    """Whether a router's own answer is that of `route`; of experts with the same logit either will do."""
    if not isinstance(expected, tuple) or len(expected) != 3:
        return False
    try:
        logits, scores, indices = route(x, normalised)
    except RuntimeError:  # dtypes that differ
        return False
    own_logits, own_scores, own_indices = expected
    if own_indices.shape != indices.shape or own_indices.dtype != indices.dtype or not is_same(logits, own_logits):
        return False
    met = own_logits.gather(1, indices), own_logits.gather(1, own_indices)
    return is_same(scores, own_scores) and torch.equal(*met)


class FastLayers:
    """Takes over small modules of one model instance, during `used_for` only; `close` gives them back."""

    def __init__(self, model: nn.Module) -> None:
        self._use: str | None = None  # None: every module computes as it always did
        # Results of the comparisons, by use first; None for nothing that fits.
        self._norms: dict[tuple[str, type], tuple[float, bool] | None] = {}
        self._centred: dict[str, bool] = {}  # whether layer norms agree
        self._rotations: dict[tuple[str, int], bool] = {}  # by identity of the function that is replaced
        self._gates: dict[tuple[str, type], bool] = {}
        self._routes: dict[tuple[str, type], bool | None] = {}  # whether weights are normalised; None for neither
        self._trying = False  # whether what is computed is to have the bits of one launch after another
        self._residuals: dict[type, bool] = {}  # whether decoder layers add as llama's do
        self._next_norm: dict[nn.Module, Any] = {}  # the norm that reads what a decoder layer returns
        self._returned: tuple[nn.Module, Tensor] | None = None  # a decoder layer, and what it returned
        self._ready: tuple[Any, Tensor, Tensor] | None = None  # a norm, what it will be given, and its answer
        self._readers: dict[nn.Module, Any] = {}  # the `Stack` that read last what a norm or a gated MLP made
        self._splits: dict[str, bool] = {}  # whether heads come apart as Falcon's do
        self._taken: list[tuple[nn.Module, str]] = []
        module: Any
        for module in model.modules():
            if type(module).__name__.endswith("RMSNorm") and isinstance(getattr(module, "weight", None), Tensor):
                self._take(module, self._norm_of(module, module.forward))
            elif type(module) is nn.LayerNorm and len(module.normalized_shape) == 1 and module.weight is not None:
                self._take(module, self._centring_of(module, module.forward))
            elif _may_route(module):
                self._take(module, self._routing_of(module, module.forward))
            elif kind := gated_mlp_kind(module):
                self._take(module, self._gating_of(module, kind, module.forward))
            elif _may_be_pre_norm(module):
                self._take(module, self._layer_of(module, module.forward))
            elif rotating := self._rotating_forward(module):
                self._take(module, MethodType(rotating, module))
            if hasattr(module, "_split_heads") and hasattr(module, "new_decoder_architecture"):
                module._split_heads = self._splitting_of(module, module._split_heads)
                self._taken.append((module, "_split_heads"))

    def _take(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        module.forward = forward
        self._taken.append((module, "forward"))

    @contextmanager
    def used_for(self, use: str) -> Iterator[None]:
        """While it lasts the modules are these, as far as they were found to be right for this use."""
        self._use = use
        try:
            yield
        finally:
            self._use = self._returned = self._ready = None
            self._trying = False

    def close(self) -> None:
        """Gives every module its own forward back."""
        for module, name in self._taken:
            delattr(module, name)
        self._taken = []

    def describe(self) -> str:
        """What is computed in one launch."""
        norms = len({kind for (_, kind), fits in self._norms.items() if fits is not None})
        norms += any(self._centred.values())
        kinds = [f"{norms} kinds of norm" if norms > 1 else "norms"] if norms else []
        kinds += ["rotary embeddings"] if any(self._rotations.values()) else []
        kinds += ["gates"] if any(self._gates.values()) else []
        kinds += ["routers"] if any(fits is not None for fits in self._routes.values()) else []
        return " and ".join([", ".join(kinds[:-1]), kinds[-1]] if len(kinds) > 1 else kinds)

    # ------------------------------------------------------------ norms

    def _norm_of(self, module: Any, own: Callable[..., Tensor]) -> Callable[..., Tensor]:
        kind = type(module)
        epsilon = _epsilon(module)

        def forward(*given: Any, **named: Any) -> Tensor:
            if self._use is None or epsilon is None or len(given) != 1 or named:
                return own(*given, **named)
            (x,) = given
            if self._ready is not None and self._ready[0] is module and self._ready[1] is x:
                return self._ready[2]
            if self._returned is not None and self._returned[1] is x:
                self._next_norm[self._returned[0]] = module
            known = self._use, kind
            if known not in self._norms:
                expected = own(x)
                fitting = (
                    (offset, first)
                    for offset, first in NORMS
                    if is_same(rms_norm(x, module.weight, epsilon, offset=offset, round_first=first), expected)
                )
                self._norms[known] = next(fitting, None)
                return expected
            fits = self._norms[known]
            if fits is None:
                return own(x)
            return self._watched(module, rms_norm(x, module.weight, epsilon, offset=fits[0], round_first=fits[1]))

        return forward

    # ------------------------------------------------------------ residual additions

    def _layer_of(self, module: Any, own: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """A decoder layer whose two additions are computed with the norms that read them, the second one the next layer's."""

        def forward(*given: Any, **named: Any) -> Tensor:
            fits = self._residuals.get(type(module))
            if self._use != "step" or len(given) != 1 or fits is False:
                return own(*given, **named)
            if fits:
                found = self._pre_norm_layer(module, *given, **named)
            else:
                norms = module.input_layernorm, module.post_attention_layernorm
                known = all(("step", type(norm)) in self._norms for norm in norms)
                found = own(*given, **named)
                if known:  # the norms' launches are chosen already, so that bits are the same
                    self._residuals[type(module)] = self._adds_alike(module, found, *given, **named)
            self._returned = module, found
            return found

        return forward

    def _adds_alike(self, module: Any, expected: Any, *given: Any, **named: Any) -> bool:
        """Whether a layer's own answer is that of `_pre_norm_layer`; an MLP that returns more than a tensor makes it fail."""
        self._trying = True
        try:
            return isinstance(expected, Tensor) and torch.equal(self._pre_norm_layer(module, *given, **named), expected)
        except torch.OutOfMemoryError:
            raise
        except (TypeError, AttributeError, ValueError, RuntimeError):
            return False
        finally:
            self._trying = False

    def _pre_norm_layer(self, module: Any, x: Tensor, **named: Any) -> Tensor:
        """x + attention(norm(x)) =: h; h + mlp(norm(h))."""
        answer = module.self_attn(hidden_states=module.input_layernorm(x), **named)
        if not isinstance(answer, tuple):
            raise TypeError("attention returns a tensor alone")
        attended = answer[0]
        total = self._add(x, attended, module.post_attention_layernorm)
        added = module.mlp(module.post_attention_layernorm(total))
        return self._add(total, added, self._next_norm.get(module))

    def _add(self, x: Tensor, y: Tensor, norm: Any) -> Tensor:
        """x + y; what the norm that reads it will be asked for is computed on the way, where its own launch is in use."""
        fits = None if norm is None else self._norms.get(("step", type(norm)))
        if fits is None or (x.shape, x.dtype) != (y.shape, y.dtype) or not (x.is_contiguous() and y.is_contiguous()):
            return x + y
        how: dict[str, Any] = {"epsilon": _epsilon(norm), "offset": fits[0], "round_first": fits[1]}
        adapter = self._adapter_of_reader(norm, x)
        if adapter is None:
            total, normed = add_and_rms_norm(x, y, norm.weight, **how)
        else:
            total, normed, projected = normalise_and_project(x, y, norm.weight, adapter=adapter, **how)
            normed.projected = adapter, projected  # type: ignore[attr-defined]
        self._ready = norm, total, self._watched(norm, normed)
        return total

    # ------------------------------------------------------------ what reads a norm or a gate

    def _watched(self, module: nn.Module, made: Tensor) -> Tensor:
        """What a module made; a `Stack` that reads it tells."""
        made.tell_reader = partial(self._readers.__setitem__, module)  # type: ignore[attr-defined]
        return made

    def _adapter_of_reader(self, module: nn.Module, x: Tensor) -> StackedAdapter | None:
        """The adapter whose first half can be computed with what the module makes of a tensor like x."""
        reader = self._readers.get(module)
        if self._use != "step" or self._trying or reader is None or reader.adapter is None or reader.dtype != x.dtype:
            return None
        columns = reader.weight.columns
        few = x.numel() // x.shape[-1] <= APART_TOKENS
        return reader.adapter if few and x.shape[-1] == columns else None

    def _centring_of(self, module: nn.LayerNorm, own: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def forward(input: Tensor) -> Tensor:  # torch's name for it
            if self._use is None or self._centred.get(self._use) is False:
                return own(input)
            found = layer_norm(input, module.weight, module.bias, module.eps)
            if self._use not in self._centred:
                expected = own(input)
                self._centred[self._use] = is_same(found, expected)
                return expected
            return found

        return forward

    # ------------------------------------------------------------ gates

    def _gating_of(self, module: Any, kind: str, own: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def forward(*given: Any, **named: Any) -> Tensor:
            if self._use is None or len(given) != 1 or named:
                return own(*given, **named)
            (x,) = given
            known = self._use, type(module)
            if self._gates.get(known) is False:
                return own(x)
            gated, up = module.gate_proj(x), module.up_proj(x)
            if known not in self._gates:
                self._gates[known] = is_same(gate(gated, up, kind), module.act_fn(gated) * up)
                return own(x)
            adapter = self._adapter_of_reader(module, gated)
            if adapter is None:
                return module.down_proj(self._watched(module, gate(gated, up, kind)))
            made, projected = gate_and_project(gated, up, kind, adapter)
            made.projected = adapter, projected  # type: ignore[attr-defined]
            return module.down_proj(self._watched(module, made))

        return forward

    # ------------------------------------------------------------ routers

    def _routing_of(self, module: Any, own: Callable[..., Any]) -> Callable[..., Any]:
        """A router's logits, the weights of its experts and their numbers: a softmax, a sort and what else it takes."""
        kind = type(module)  # before PEFT gives an adapted one another class in each call

        def route(x: Tensor, normalised: bool) -> tuple[Tensor, Tensor, Tensor]:
            logits = F.linear(x.reshape(-1, x.shape[-1]), module.weight, getattr(module, "bias", None))
            return logits, *choose_experts(logits, module.top_k, normalised=normalised)

        def forward(*given: Any, **named: Any) -> Any:
            if self._use is None or len(given) != 1 or named:
                return own(*given, **named)
            (x,) = given
            known = self._use, kind
            if known not in self._routes:
                expected = own(x)
                ways = (normalised for normalised in (True, False) if _routes_alike(route, x, normalised, expected))
                self._routes[known] = next(ways, None)
                return expected
            normalised = self._routes[known]
            return own(x) if normalised is None else route(x, normalised)

        return forward

    # ------------------------------------------------------------ heads

    def _splitting_of(self, module: Any, own: Callable[[Tensor], tuple[Tensor, ...]]) -> Callable[[Tensor], Any]:
        """Falcon's query, key and value by slices: its lists of indices come from the host, which no graph allows."""

        def split(fused: Tensor) -> tuple[Tensor, ...]:
            if self._use is None or self._splits.get(self._use) is False:
                return own(fused)
            joint = bool(module.new_decoder_architecture)
            groups = fused.view(*fused.shape[:2], module.num_kv_heads if joint else 1, -1, module.head_dim)
            query, key, value = groups[..., :-2, :], groups[..., -2:-1, :], groups[..., -1:, :]
            if joint:  # every query head gets the key and value of its group
                key, value = key.expand_as(query), value.expand_as(query)
            found = tuple(part.flatten(2, 3) for part in (query, key, value))
            if self._use not in self._splits:
                expected = own(fused)
                self._splits[self._use] = all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))
                return expected
            return found

        return split

    # ------------------------------------------------------------ rotary embeddings

    def _rotating_forward(self, module: nn.Module) -> FunctionType | None:
        """The module's forward with another rotation behind the name it calls; nothing but this copy is changed."""
        forward = type(module).forward
        if not isinstance(forward, FunctionType) or ROTARY not in forward.__code__.co_names:
            return None
        original = forward.__globals__.get(ROTARY)
        if original is None:
            return None
        names = {**forward.__globals__, ROTARY: self._rotation(original)}
        copy = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
        copy.__kwdefaults__ = forward.__kwdefaults__
        return copy

    def _rotation(self, original: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
        def apply(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *rest: Any, **named: Any) -> Any:
            if self._use is None or rest or named or self._rotations.get((self._use, id(original))) is False:
                return original(query, key, cos, sin, *rest, **named)
            known = self._use, id(original)
            if known not in self._rotations:
                expected = original(query, key, cos, sin)
                try:
                    found = rotate(query, key, cos, sin)
                    self._rotations[known] = all(is_same(f, e) for f, e in zip(found, expected, strict=True))
                except ValueError:  # a layout the kernel does not know
                    self._rotations[known] = False
                return expected
            return rotate(query, key, cos, sin)

        return apply
