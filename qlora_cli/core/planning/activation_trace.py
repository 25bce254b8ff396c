"""Activation trace of a training step: bytes that each decoder layer keeps, and peaks of its passes, by tokens.

Nothing is computed or allocated: layers run forward and backward on the meta device, fused ops through their kernels in
`meta_ops`, and the bytes of the tensors alive are counted.
"""

from collections.abc import Callable, Iterator, MutableMapping
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from qlora_cli.core.engine.decoder_layers import find_layers
from qlora_cli.core.engine.lm_head import chunk_tokens
from qlora_cli.core.engine.packed_attention import has_sinks, takes_equal_rows
from qlora_cli.core.experts.four_bit_experts import FourBitExperts
from qlora_cli.core.experts.fused_experts import can_fuse, fuse_experts
from qlora_cli.core.models.structure import (
    find_decoder,
    inputs_by_token,
    is_plain_linear,
    linear_names,
    underlying_model,
)
from qlora_cli.core.planning.meta_experts import ExpertNotes, TracedExperts, plain_product
from qlora_cli.core.planning.meta_ops import (
    CatchAttention,
    Growth,
    Linear,
    LiveBytes,
    Loss,
    Peak,
    Sink,
    Source,
    Tiled,
    attend_in_groups,
    fit_growth,
    replace_attention,
    replace_methods,
    storage_key,
)
from qlora_cli.core.tiling.token_tiles import find_token_wise
from qlora_cli.errors import ModelError, first_line
from qlora_cli.kernels.attention import LONG_ROW_TOKENS, head_groups

# So many that what does not grow with the tokens, such as an adapter's gradient, is next to nothing. The second length
# is needed only where attention is no fused op, and grows with the tokens' square.
TRACED_TOKENS = (4096, 8192)
# Of a model whose layers loop in Python over the tokens (a scan takes some ten operations a token and pass), or over
# pieces of 64 (the gated delta rule). Two lengths, since in so short a row what does not grow counts.
LOOP_TOKENS = ((16, 32), (64, 128))


@dataclass(frozen=True)
class Pass:
    """One layer's forward and backward pass."""

    held: Growth  # between the two
    forward: Peak
    backward: Peak


@dataclass(frozen=True)
class LayerTrace:
    """One decoder layer, its input counted as its own where it is held."""

    hidden: int  # elements a token of its input and its output
    keys_and_values: int  # elements a token that a cache holds for it
    key_heads: int  # heads that they are of
    queries: int  # elements a token of attention's output
    kept: Pass  # its activations kept
    recomputed: Pass  # its input kept, the rest made again
    compiled: Pass  # activations kept, and a compiler that makes again what is elementwise
    lean: int  # elements a token that are kept where it makes again what opaque ops read, too; 0 where not known


@dataclass(frozen=True)
class ModelTrace:
    """Activations of a training step."""

    layers: tuple[LayerTrace, ...]
    tail: Peak  # all before the first and after the last layer, the loss included
    vocabulary: int


def trace_tiles(model: Any, tile_tokens: int) -> ModelTrace:
    """`trace_model` of the fast engine where modules run in tiles of so many tokens (`tiling.token_tiles`), in rows so
    long that heads go in groups. Modules that are given one tensor, and give one, are taken for such."""
    model.train()
    return _Trace(model, TRACED_TOKENS[0], fused=True, tile_tokens=tile_tokens).result


def trace_model(model: Any, *, fused: bool) -> ModelTrace:
    """Traces a training step of a model on the meta device, in the compute dtype, with its adapter attached.

    Args:
        fused: Whether the fast engine runs it, or PEFT, bitsandbytes and transformers alone.

    Raises:
        ModelError: The model's forward pass asks for values.
    """
    model.train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.empty_like(parameter)  # as in a training loop, where gradients are added up
    try:
        for lengths in LOOP_TOKENS:
            if _count_operations(model, lengths[1]) > _count_operations(model, lengths[0]):
                return fit_growth([_Trace(model, tokens, fused).result for tokens in lengths], lengths, pairs=False)
        short = _Trace(model, TRACED_TOKENS[0], fused)
        if all(layer.keys_and_values for layer in short.result.layers):
            return short.result
        return fit_growth([short.result, _Trace(model, TRACED_TOKENS[1], fused).result], TRACED_TOKENS, pairs=True)
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError, LookupError) as error:
        raise ModelError(
            f"The forward pass of {model.config.model_type} cannot be followed without weights: {first_line(error)}.",
            "Its memory cannot be predicted; its parameters can be counted.",
        ) from error


def _count_operations(model: Any, tokens: int) -> int:
    """Operations of a forward pass, which are more with more tokens only where a layer loops over them."""
    return _Trace(model, tokens, fused=False, counted=True).operations


@dataclass
class _Call:
    """How the model calls one of its layers."""

    module: Any
    arguments: tuple
    keywords: dict[str, Any]
    output: Any

    def named(self) -> dict[str, Any]:
        """Its keywords, with dictionaries of their own: what this run leaves in them is not for another."""
        return {
            name: copy(given) if isinstance(given, MutableMapping) else given for name, given in self.keywords.items()
        }

    def answer(self, hidden: Tensor) -> Any:
        """The layer's output as the model expects it, with these hidden states."""
        return (hidden, *self.output[1:]) if isinstance(self.output, tuple | list) else hidden


class _Trace:
    """Trace of a step on one row of so many tokens; or where it is `counted`, the operations of a forward pass alone."""

    def __init__(self, model: Any, tokens: int, fused: bool, *, counted: bool = False, tile_tokens: int = 0) -> None:
        self.model, self.tokens, self.fused, self.tile_tokens = model, tokens, fused, tile_tokens
        self.base = underlying_model(model)
        self.vocabulary: int = self.base.get_output_embeddings().weight.shape[0]
        self.decoder = find_decoder(self.base)
        self.modules: list[Any] = find_layers(self.decoder)
        # Whether attention has its inputs token by token: as packs do, and rows of one length, which take most, where
        # they do not go to cuDNN, or have sinks.
        takes = takes_equal_rows(self.decoder, torch.device("cuda")) and not has_sinks(self.decoder)
        self.token_by_token = fused and not takes
        self.live = LiveBytes()
        self.keys_and_values = self.key_heads = self.queries = 0
        self.recording = False  # whether these two are filled, which keeps the tensors alive
        self.read: dict[int, Tensor] = {}  # by opaque ops and norms
        self.made: dict[int, tuple[Tensor, Tensor]] = {}  # by linears, and of what
        self.anchor = torch.empty((), device="meta", requires_grad=True)
        self.moments: list[tuple[int, int]] = []  # of experts: scratch memory, and bytes beside what is kept
        with (
            self._meta_experts(),
            replace_methods(self._meta_linears()),
            replace_attention(self.base, self._attend) as needs_mask,
            ExitStack() as tiling,
        ):
            ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
            self.inputs = {"attention_mask": torch.ones_like(ids)} if needs_mask else {}
            # Layers of one kind are alike, but for the first: its input requires no gradient, as embeddings are frozen.
            kinds = [
                (number == 0 and not counted, type(module), tuple(parameter.shape for parameter in module.parameters()))
                for number, module in enumerate(self.modules)
            ]
            with self.live:
                calls = self._capture_calls(ids, kinds)
            self.operations = self.live.operations
            if counted:
                return
            tiles = self._tile(ids, kinds, [call.module for call in calls.values()]) if tile_tokens else {}
            tiling.enter_context(replace_methods(tiles))
            traced = {kind: self._trace_layer(call, differentiable=not kind[0]) for kind, call in calls.items()}
            tail = self._trace_tail(ids, [calls[kind] for kind in kinds])
        self.result = ModelTrace(tuple(traced[kind] for kind in kinds), tail, self.vocabulary)

    # ------------------------------------------------------------ meta kernels

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if self.token_by_token:
            query, key, value = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (query, key, value))
        groups = head_groups(key.shape[1], LONG_ROW_TOKENS + 1) if self.tile_tokens else 1
        output = attend_in_groups(query, key, value, groups, at_once=self.token_by_token)
        self.keys_and_values += key.shape[1] * (key.shape[3] + value.shape[3])
        self.key_heads += key.shape[1]
        self.queries += query.shape[1] * value.shape[3]
        self._note_read(query, key, value, output)
        return output

    def _tile(self, ids: Tensor, kinds: list[Any], layers: list[Any]) -> dict[Any, Callable]:
        """The modules that run in tiles, with what they run."""
        roots = layers + [m for m in self.decoder.children() if not isinstance(m, torch.nn.ModuleList)]
        found = find_token_wise(roots, lambda: self._capture_calls(ids, kinds), lambda *_: True)
        return {module: self._tiled(module, x, out) for module, (x, out) in found.items()}

    def _tiled(self, module: Any, x: Tensor, out: Tensor) -> Callable:
        """A module's forward in tiles, each of which takes what so many tokens take by themselves, both ways."""
        tile = self.tile_tokens or self.tokens
        passes = self._count(partial(type(module).forward, module), _Call(module, (x,), {}, out), differentiable=True)
        peaks = [int(peak.bytes(tile, tile)) for peak in (passes.forward, passes.backward)]
        parameters = [p for p in module.parameters() if p.requires_grad]
        return lambda given: Tiled.apply(given, out, (peaks[0], max(peaks)), self.live, *parameters)

    def _meta_linears(self) -> dict[Any, Callable]:
        """Linear layers, and their forward on the meta device; with the fast engine the adapter is part of it."""
        forwards = {}
        for name in linear_names(self.model):
            module = self.model.get_submodule(name.removesuffix(".base_layer") if self.fused else name)
            base = getattr(module, "base_layer", module)
            if is_plain_linear(base) or type(base) is Conv1D:
                forwards[module] = self._linear(module, base.nf if type(base) is Conv1D else base.out_features)
        return forwards

    def _linear(self, module: Any, out_features: int) -> Callable:
        a, b, dropout = None, None, 0.0
        if hasattr(module, "lora_A"):
            name = next(iter(module.lora_A))
            a, b = module.lora_A[name].weight, module.lora_B[name].weight
            dropout = getattr(module.lora_dropout[name], "p", 0.0)

        def forward(x: Tensor, *_: Any, **__: Any) -> Tensor:
            y = Linear.apply(x, out_features, dropout, self.live, a, b)
            if self.recording:
                self.made[storage_key(y)] = (y, x)
            if a is not None:
                self._note_read(x)
            return y

        return forward

    @contextmanager
    def _meta_experts(self) -> Iterator[None]:
        """Experts fused where the fast engine fuses them, else by products that are."""
        notes = self.notes = ExpertNotes(lambda: self.live, self._note_read, self._note_moment)
        experts = [m for m in self.base.modules() if isinstance(m, FourBitExperts)]
        put_back = fuse_experts(self.base, kind=partial(TracedExperts, notes=notes)) if self.fused else lambda: None
        plain = {m: plain_product(m, notes) for m in experts if not (self.fused and can_fuse(m))}
        try:
            with replace_methods(plain, "product"):
                yield
        finally:
            put_back()

    def _peak(self, highest_bytes: dict[int, int]) -> Peak:
        return Peak(tuple((scratch, Growth(alive / self.tokens)) for scratch, alive in sorted(highest_bytes.items())))

    # ------------------------------------------------------------ layers

    def _capture_calls(self, ids: Tensor, kinds: list[Any]) -> dict[Any, _Call]:
        """How the model calls the first layer of each kind; others of the kind pass their input on."""
        calls: dict[Any, _Call] = {}

        def pass_on(module: Any, kind: Any) -> Callable:
            def forward(*arguments: Any, **keywords: Any) -> Any:
                # In a dictionary a layer leaves what others take from it: keys and values that they share.
                if kind in calls and not any(isinstance(given, MutableMapping) for given in keywords.values()):
                    return calls[kind].answer(arguments[0])
                output = type(module).forward(module, *arguments, **keywords)
                calls.setdefault(kind, _Call(module, arguments, keywords, output))
                return output

            return forward

        with (
            torch.no_grad(),
            CatchAttention(self._attend),
            replace_methods(dict(zip(self.modules, map(pass_on, self.modules, kinds), strict=True))),
        ):
            self.decoder(**self._embedded(ids), use_cache=False, **self.inputs)
        return calls

    def _trace_layer(self, call: _Call, *, differentiable: bool) -> LayerTrace:
        self.keys_and_values = self.key_heads = self.queries = 0

        def run(*arguments: Any, **keywords: Any) -> Any:
            with CatchAttention(self._attend):
                return call.module(*arguments, **keywords)

        with saved_tensors_hooks(self.notes.saved, lambda tensor: tensor):
            kept = self._count(run, call, differentiable=differentiable)
        self.notes.settle()
        attention = self.keys_and_values, self.key_heads, self.queries
        recompute = partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False)
        recomputed = self._count(recompute, call, differentiable=differentiable)
        hidden = call.arguments[0].shape[-1]
        compiled, made = self._compile(call), [tensor.numel() // self.tokens for tensor, _ in self.made.values()]
        lean = 0 if self.moments else hidden + sum(made[:-1]) + attention[2]  # what is only added up is not kept
        return LayerTrace(hidden, *attention, kept, recomputed, compiled, lean)

    def _count(self, run: Callable, call: _Call, *, differentiable: bool) -> Pass:
        """Runs a layer forward and backward, and counts bytes."""
        self.live = LiveBytes()
        with self.live:
            inputs = Source.apply(self.anchor, call.arguments[0].shape, call.arguments[0].dtype)
            output = run(inputs if differentiable else inputs.detach(), *call.arguments[1:], **call.named())
            output = output[0] if isinstance(output, tuple | list) else output
            del inputs
            held_bytes = self.live.now_bytes - output.untyped_storage().nbytes()
            forward = self.live.restart()
            end = Sink.apply(output)
            del output
            end.backward()
        return Pass(Growth(held_bytes / self.tokens), self._peak(forward), self._peak(self.live.highest_bytes))

    def _compile(self, call: _Call) -> Pass:
        """The same of a compiled layer, by rule instead of by count.

        Kept are what opaque ops (linears with adapters, attention) and norms read, and the outputs of linears that an
        activation's gradient needs; all else is elementwise on these and recomputed. Inductor's partitioner does not
        recompute what an opaque op reads in the backward pass (functorch's ban_recompute_materialized_backward). The
        backward pass is highest where the widest activation's gradients meet, or in a linear.
        """
        self.read, self.made, self.moments, self.recording = {}, {}, [], True
        saved: dict[int, Tensor] = {}  # the tensors too: an address that is free is another's next

        def save(tensor: Tensor) -> Tensor:
            saved[storage_key(tensor)] = tensor
            return tensor

        with saved_tensors_hooks(save, lambda tensor: tensor), CatchAttention(self._attend), ExitStack() as hooks:
            for part in call.module.modules():
                is_leaf = list(part.parameters(recurse=False)) and not list(part.children())
                if is_leaf and "forward" not in vars(part):  # a norm: linears have a forward of their own here
                    note = part.register_forward_pre_hook(lambda _, arguments: self._note_read(arguments[0]))
                    hooks.callback(note.remove)
            inputs = Source.apply(self.anchor, call.arguments[0].shape, call.arguments[0].dtype)
            call.module(inputs, *call.arguments[1:], **call.named())
        self.recording = False
        made = {key: tensor for key, (tensor, _) in self.made.items() if key in saved}
        kept_bytes, hidden_bytes = sum(tensor.nbytes for tensor in (self.read | made).values()), inputs.nbytes
        linears = [(read.nbytes, tensor.nbytes) for tensor, read in self.made.values()]
        widest = max((read for read, _ in linears), default=0)
        gradients = widest + sum(tensor for _, tensor in linears if tensor >= widest) + hidden_bytes
        backward = {0: kept_bytes + gradients}
        for read, tensor in linears:
            scratch = read // self.tokens * (tensor // self.tokens) // inputs.element_size()
            backward[scratch] = max(backward.get(scratch, 0), kept_bytes + read + tensor + hidden_bytes)
        for scratch, beside in self.moments:
            backward[scratch] = max(backward.get(scratch, 0), kept_bytes + beside + hidden_bytes)
        return Pass(Growth(kept_bytes / self.tokens), self._peak({0: kept_bytes + hidden_bytes}), self._peak(backward))

    def _note_read(self, *tensors: Tensor) -> None:
        if self.recording:
            self.read.update({storage_key(tensor): tensor for tensor in tensors})

    def _note_moment(self, scratch: int, beside: int) -> None:
        if self.recording:
            self.moments.append((scratch, beside))

    # ------------------------------------------------------------ before and after the layers

    def _trace_tail(self, ids: Tensor, calls: list[_Call]) -> Peak:
        """Everything but the layers: embeddings, last norm, head and loss, from the last layer on and back to it."""
        self.live = LiveBytes()
        with replace_methods(dict(zip(self.modules, map(self._skipped_layer, calls), strict=True))), self.live:
            if self.fused:
                self._fused_loss(ids).backward()
            else:
                logits = self.model(**self._embedded(ids), use_cache=False, **self.inputs).logits
                loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum")
                del logits
                loss.backward()
        return self._peak(self.live.highest_bytes)

    def _embedded(self, ids: Tensor) -> dict[str, Tensor]:  # models look at the values of ids, and there are none
        return {"inputs_embeds": self.base.get_input_embeddings()(ids), **inputs_by_token(self.decoder, ids)}

    def _fused_loss(self, ids: Tensor) -> Tensor:
        given = self._embedded(ids)  # held to the end, as by the engine
        hidden = self.decoder(**given, use_cache=False, **self.inputs).last_hidden_state.flatten(0, 1)
        chunk_bytes = chunk_tokens(self.vocabulary, hidden.element_size()) * self.vocabulary * hidden.element_size()
        return Loss.apply(hidden[ids[0]], chunk_bytes, self.live)  # some position for each token

    def _skipped_layer(self, call: _Call) -> Callable:
        return lambda hidden, *_, **__: call.answer(Source.apply(self.anchor, hidden.shape, hidden.dtype))
