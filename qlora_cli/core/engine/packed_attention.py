"""Packed (variable-length) attention inside transformers' decoders, where an architecture allows that exactly.

The pack's boundaries travel as the attention mask: a 4-D mask reaches every layer of every architecture untouched, and
being a tensor it is carried through checkpointing and compilation. Its shape is (1, 1, longest, rows + 1), int32,
every [0, 0, i] the same `cu_seqlens`; the third dimension is a view that takes no memory and only carries `longest`.
Where all rows are of one length and cuDNN can attend to them, it is (1, rows, longest, 1), of which only the shape counts.
Other masks, those of padded rows, go to attention over chunks of queries where there are sinks or caps, else to SDPA.
"""

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from qlora_cli.core.distributed.context_group import context_of
from qlora_cli.core.engine.lora_linear import replace_forward
from qlora_cli.core.models.structure import has_other_tables, values_by_layer
from qlora_cli.events import Notice, Report
from qlora_cli.kernels.attention import (
    CUDNN_HEAD_SIZES,
    equal_rows_attention,
    groups_fit,
    packed_attention,
    sinks_fit,
    takes_caps,
)
from qlora_cli.kernels.sink_attention import chunked_attention

if TYPE_CHECKING:
    from qlora_cli.core.engine.calibration import Calibration

NAME = "qlora_packed"
MAX_HEAD_SIZE = 256
MOST_DIFFERENCE = 0.1  # of hidden states after many layers, that two ways of attention may make by rounding
# The same of what one layer changes in them, in roundings of the dtype: 2 in the mean, 2.3 at most, in bf16 with peaked
# attention; scores that are 1.2 times as large make 6.
MOST_ROUNDINGS = 4
TAKEN_BY_SDPA = frozenset(inspect.signature(sdpa_attention_forward).parameters)  # position biases, in some versions


def pack_mask(cu_seqlens: Tensor, longest: int, equal_rows: int = 0) -> Tensor:
    """Boundaries (rows + 1,) int32 to the mask described at the top, a view.

    Args:
        cu_seqlens: Where rows start, and the total.
        longest: Tokens of the longest row, or more.
        equal_rows: How many rows of `longest` tokens there are; 0 to go by the boundaries.
    """
    if equal_rows:
        return cu_seqlens[:1].view(1, 1, 1, 1).expand(1, equal_rows, longest, 1)
    return cu_seqlens.view(1, 1, 1, -1).expand(1, 1, longest, -1)


def _is_pack(mask: Tensor | None) -> TypeGuard[Tensor]:
    return mask is not None and mask.dtype == torch.int32 and mask.dim() == 4


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: (1, heads, T, size) in, (1, T, heads, size) out; other masks as said above.

    `s_aux`, (heads,), are the sinks; `softcap` is what scores stay below.

    Raises:
        ValueError: It is given what it does not know and would leave out.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    is_pack = _is_pack(attention_mask)
    is_plain = not is_pack and s_aux is None and not softcap
    known = TAKEN_BY_SDPA if is_plain else ()
    tensors = [n for n, given in kwargs.items() if isinstance(given, Tensor) and given.is_floating_point()]
    if unknown := [n for n in tensors if n not in known]:
        raise ValueError(f"attention takes {', '.join(unknown)}")
    if is_plain:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    cap = softcap or None
    if not is_pack:
        if attention_mask is None and not getattr(module, "is_causal", True):
            raise ValueError("attention looks both ways")
        window = sliding_window if attention_mask is None else None
        out = chunked_attention(query, key, value, s_aux, scale=scale, mask=attention_mask, window=window, cap=cap)
        return out.transpose(1, 2).contiguous(), None
    query, key, value = (t[0].transpose(0, 1) for t in (query, key, value))  # (T, heads, size)
    assert attention_mask is not None
    return _attend_pack(module, query, key, value, attention_mask, scale, sliding_window, s_aux, cap)[None], None


def _attend_pack(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scale: float,
    window: int | None = None,
    sinks: Tensor | None = None,
    cap: float | None = None,
) -> Tensor:
    """`packed_attention` by a pack's mask, (T, heads, size); where ranks share its tokens T are this one's."""
    context = context_of(module)
    context = context if context is not None and context.active else None
    if context is not None:
        query, key, value = context.to_heads(query, key, value)
        sinks = context.own_heads(sinks)
    rows, longest = mask.shape[1:3]
    if mask.shape[3] == 1:
        left_over = query.shape[0] - rows * longest  # places that fill up the ranks' parts
        if left_over:
            query, key, value = (t[:-left_over] for t in (query, key, value))
        if window is None and sinks is None:
            out = equal_rows_attention(query, key, value, rows, scale)
        else:
            ends = longest * torch.arange(rows + 1, dtype=torch.int32, device=query.device)
            out = packed_attention(query, key, value, ends, longest, scale, window, sinks, cap, equal_rows=True)
        out = F.pad(out, (0, 0, 0, 0, 0, left_over)) if left_over else out
    else:
        out = packed_attention(query, key, value, mask[0, 0, 0], longest, scale, window, sinks, cap)
    return out if context is None else context.to_tokens(out)


# Additive: no model uses the name unless an engine sets it on that model's own config.
AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, sdpa_mask)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, arXiv:2104.09864, on x (T, heads, size) with cos and sin (T, 1, size)."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


def _falcon_forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
    """Falcon's attention, which is outside the interface: one, some or all heads with keys and values of their own."""
    mask = kwargs.get("attention_mask")
    if args or not _is_pack(mask):
        return type(self).forward(self, hidden_states, *args, **kwargs)
    fused = self.query_key_value(hidden_states)[0]  # (T, all heads' features)
    if self.new_decoder_architecture:
        grouped = fused.unflatten(-1, (self.num_kv_heads, -1, self.head_dim))  # (T, key heads, queries + 2, size)
        query, key, value = grouped[:, :, :-2].flatten(1, 2), grouped[:, :, -2], grouped[:, :, -1]
    elif self.multi_query:
        heads = fused.unflatten(-1, (self.num_heads + 2, self.head_dim))
        query, key, value = heads[:, :-2], heads[:, -2:-1], heads[:, -1:]
    else:
        query, key, value = fused.unflatten(-1, (self.num_heads, 3, self.head_dim)).unbind(2)
    cos, sin = (t[0, :, None] for t in kwargs["position_embeddings"])  # (T, 1, size)
    query, key = _rotate(query, cos, sin), _rotate(key, cos, sin)
    out = _attend_pack(self, query, key, value, mask, self.head_dim**-0.5)
    return self.dense(out.flatten(1)[None]), None


def _head_sizes(decoder: nn.Module, config: Any) -> set[int]:
    attention = [m for n, m in decoder.named_modules() if n.endswith(("attn", "attention"))]
    sizes = {getattr(m, "head_dim", None) or getattr(m, "head_size", None) for m in attention}
    known = {size for size in sizes if size}
    if known != sizes or not sizes:
        known |= {getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads}
    return known


def attended_share(decoder: Any) -> float:
    """Values of attention's output, by those of a hidden state."""
    config = decoder.config
    heads = max(count or 0 for count in values_by_layer(config, "num_attention_heads"))
    return heads * max(_head_sizes(decoder, config)) / config.hidden_size if heads else 0.0


def has_sinks(decoder: nn.Module) -> bool:
    """Whether its attention has sinks: a score for each head that takes weight and gives nothing."""
    return any("sink" in name for name, _ in decoder.named_parameters())


def has_caps(decoder: Any) -> bool:
    """Whether its attention's scores are capped (arXiv:2408.00118)."""
    return bool(getattr(decoder.config, "attn_logit_softcapping", None))


def drops_weights(decoder: Any) -> bool:
    """Whether its attention weights are dropped out in training."""
    names = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")
    rates = [getattr(decoder.config, name, 0) for name in names]
    return any(isinstance(rate, int | float) and rate > 0 for rate in rates)


def why_not_packed(base: Any, decoder: Any, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this model's rows have to be padded instead of packed; None when they can be packed exactly."""
    config = decoder.config
    is_falcon = config.model_type == "falcon"
    if not is_falcon and not base._can_set_attn_implementation():
        return f"{config.model_type} does not use transformers' attention interface"
    if getattr(config, "alibi", False):
        return "its attention has ALiBi biases"
    if not getattr(config, "is_causal", True) or getattr(config, "use_bidirectional_attention", False):
        return "its attention looks both ways"
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        return f"it has layers of type {', '.join(sorted(kinds))}"
    if drops_weights(decoder):
        return "its attention weights are dropped out"
    if device.type == "cuda":
        if dtype not in (torch.bfloat16, torch.float16):
            return "flash attention computes in 16 bits only"
        if torch.cuda.get_device_capability(device) < (8, 0):
            return "flash attention takes a card of compute capability 8.0 or later"
        sizes = _head_sizes(decoder, config)
        if any(size % 8 or size > MAX_HEAD_SIZE for size in sizes):
            return f"flash attention takes no heads of size {max(sizes)}"
        if has_caps(decoder) and not takes_caps(max(sizes)):
            return "its attention scores are soft-capped, which takes Triton"
    return None


def takes_equal_rows(decoder: Any, device: torch.device) -> bool:
    """Whether packs of equal rows go to cuDNN: no caps, heads of a size it takes, and no windows, but beside sinks."""
    config = decoder.config
    counts = [values_by_layer(config, name) for name in ("num_attention_heads", "num_key_value_heads")]
    if any(len(count) > 1 for count in counts):
        return False
    heads, keys = (count.pop() for count in counts)  # a model of states alone has none
    keys = keys or heads
    if heads and keys and (context := context_of(decoder)) is not None:
        heads, keys = heads // context.size, math.lcm(keys, context.size) // context.size
    may = (
        device.type == "cuda"
        and heads is not None
        and config.model_type != "falcon"
        and (has_sinks(decoder) or not getattr(config, "sliding_window", None))
        and heads % keys == 0
        and not has_caps(decoder)
        and _head_sizes(decoder, config) <= CUDNN_HEAD_SIZES
    )
    if not may or not torch.cuda.is_available():  # plans are made without a card too
        return may
    trials = [sinks_fit] * has_sinks(decoder) + [groups_fit] * (keys != heads)
    sizes = _head_sizes(decoder, config)
    return all(fits(heads, keys, size, torch.bfloat16, device) for fits in trials for size in sizes)


def is_like(found: Tensor, own: Tensor) -> bool:
    """Whether two attentions' hidden states differ by the rounding of many layers at most; NaN are like nothing."""
    return bool((found - own).float().norm() <= MOST_DIFFERENCE * own.float().norm())


def _states_among(*found: Any) -> Tensor | None:
    """Hidden states among a layer's arguments, or in what it gives: the first tensor, which may be the first of a tuple."""
    first = next((each for each in found if each is not None), None)
    first = first[0] if isinstance(first, tuple) and first else first
    return first if isinstance(first, Tensor) and first.dim() > 1 else None


class HeldLayers:
    """What decoder layers were given and gave in one run, for trials of other attention.

    Where attention is peaked, rounding grows from layer to layer until hidden states are no more alike than by a wrong
    mask. A layer that is given what it was given before differs by its own rounding alone.

    Args:
        layers: All of a decoder's.
    """

    def __init__(self, layers: list[nn.Module]) -> None:
        self.layers = layers
        self.given: dict[nn.Module, Tensor] = {}
        self.gave: dict[nn.Module, Tensor] = {}

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Within it each layer's last call is noted."""

        def note(noted: dict[nn.Module, Tensor], layer: nn.Module, *found: Any) -> None:
            if (states := _states_among(*found)) is not None:
                noted[layer] = states.clone()  # a layer may add to what it is given

        def note_given(layer: nn.Module, arguments: tuple, named: dict) -> None:
            note(self.given, layer, *arguments, named.get("hidden_states"))

        def note_gave(layer: nn.Module, _: tuple, output: Any) -> None:
            note(self.gave, layer, output)

        with self._hooked(note_given, note_gave):
            yield

    @contextmanager
    def replayed(self) -> Iterator[list[bool]]:
        """Within it the last tokens that a layer is given, as many as were noted, are those; whether what it gives for
        them is like what it gave, but for rounding, is added to the list. Of the first layer before that, whether it was
        given what is noted: positions may have been added before it."""
        alike: list[bool] = []

        def give(layer: nn.Module, arguments: tuple, named: dict) -> tuple[tuple, dict]:
            now, held = _states_among(*arguments, named.get("hidden_states")), self.given.get(layer)
            if now is None or held is None:
                return arguments, named
            others = now.shape[-2] - held.shape[-2]
            if layer is self.layers[0]:
                alike.append(is_like(now[..., others:, :], held))
            both = torch.cat([now[..., :others, :], held], -2)
            named = {name: both if given is now else given for name, given in named.items()}
            return tuple(both if given is now else given for given in arguments), named

        def compare(layer: nn.Module, _: tuple, output: Any) -> None:
            found, own, given = _states_among(output), self.gave.get(layer), self.given.get(layer)
            if found is None or own is None or given is None:
                alike.append(False)
                return
            difference, change = found[..., -own.shape[-2] :, :] - own, own - given
            most = MOST_ROUNDINGS * change.float().norm() + own.float().norm() / 2
            alike.append(bool(difference.float().norm() <= torch.finfo(own.dtype).eps * most))

        with self._hooked(give, compare):
            yield alike

    def forget(self) -> None:
        """Lets go of what was noted."""
        self.given.clear()
        self.gave.clear()

    @contextmanager
    def _hooked(self, before: Callable, after: Callable) -> Iterator[None]:
        handles = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in self.layers]
        handles += [layer.register_forward_hook(after) for layer in self.layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def install_packed_attention(decoder: Any) -> Callable[[], None]:
    """Makes one model instance's attention understand packs; returns what undoes it."""
    config = decoder.config
    if config.model_type == "falcon":
        named = [m for m in decoder.modules() if type(m).__name__.startswith("Falcon")]
        return replace_forward({m: None for m in named if hasattr(m, "query_key_value")}, _falcon_forward)
    before, config._attn_implementation_internal = config._attn_implementation, NAME
    return lambda: setattr(config, "_attn_implementation_internal", before)


def install_attention(
    base: Any, decoder: Any, trials: "Calibration", report: Report
) -> tuple[bool, Callable[[], None]]:
    """Packs rows where that is exact, which is tried out. Otherwise rows stay padded, and attention with sinks goes over
    them in chunks instead of holding all scores, where that is tried out to be the same. What comes of it is reported.

    Returns:
        Whether rows are packed, and what undoes it.

    Raises:
        ValueError: The decoder computes otherwise of embeddings than of token ids, which a pack's trial would have shown.
    """

    def install(own: Tensor, why_different: Callable[[Tensor], str | None]) -> tuple[str | None, Callable[[], None]]:
        """Why our attention gives anything but `own`, the model's, and was taken back; and what undoes it."""
        undo = install_packed_attention(decoder)
        reason = why_different(own)
        if reason is not None:
            undo()
        return reason, undo if reason is None else lambda: None

    reason, undo = why_not_packed(base, decoder, trials.device, trials.values.dtype), lambda: None
    if reason is None:
        with trials.held.recorded():
            own = trials.states()
        reason, undo = install(own, trials.why_pack_differs)
        trials.held.forget()
    trials.packed = reason is None
    if reason is None:
        return True, undo
    if has_other_tables(decoder, trials.embedding):  # any other takes the same embeddings in both
        own = trials.states()
        if not is_like(trials.states(embedded=True), own):
            raise ValueError("its layers see token ids besides the embeddings")
    report(Notice(f"Rows are padded instead of packed, because {reason}."))
    if has_sinks(decoder) and base._can_set_attn_implementation() and not drops_weights(decoder):
        why_eager, undo = install(trials.states(padded=True), trials.why_padded_differs)
        if why_eager is not None:
            report(Notice(f"Attention with sinks holds all of its scores at once ({why_eager})."))
    return False, undo
