"""Fused decode attention over the KV cache, as one of transformers' attention functions: rows of any length.

It is chosen by name in the configuration of one model instance, for the time of a step. Models outside transformers'
attention interface never call it.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qlora_cli.core.decoding.fused_layers import is_same
from qlora_cli.core.decoding.kv_cache import StaticKVCache
from qlora_cli.kernels.decode.attention import attend

NAME = "qlora_decode"
UNDERSTOOD = {"sliding_window", "softcap", "position_ids", "use_cache"}
ASKED = "output_"  # what a model is to give beside, as `output_router_logits`


class FusedAttention:
    """Attention over the rows of one KV cache, for one model instance.

    The first step is a trial: every layer computes both ways, and the results are compared. Only if all agree are
    later steps computed by the kernel alone, without masks.

    Attributes:
        usable: Whether it may be used; None before the trial.
        agreed: Whether each layer of the trial agreed.
    """

    def __init__(self, model: Any) -> None:
        self.usable: bool | None = None if model._can_set_attn_implementation() else False
        self._configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
        self._own: dict[int, str] = {}
        self.agreed: list[bool] = []

    @contextmanager
    def step(self, cache: StaticKVCache) -> Iterator[None]:
        """While it lasts, the model computes attention by this one."""
        self.agreed = []
        self._own = {key: config._attn_implementation for key, config in self._configs.items()}
        cache.attention = self
        try:
            for config in self._configs.values():
                config._attn_implementation = NAME
            yield
        finally:
            for key, config in self._configs.items():
                config._attn_implementation = self._own[key]
        if self.usable is None:
            self.usable = bool(self.agreed) and all(self.agreed)

    def own_attention(self, module: nn.Module, *given: Any, **named: Any) -> tuple[Tensor, Any]:
        """What the model would compute by itself."""
        eager = getattr(
            sys.modules[type(module).__module__], "eager_attention_forward", ALL_ATTENTION_FUNCTIONS["sdpa"]
        )
        own = ALL_ATTENTION_FUNCTIONS.get_interface(self._own[id(module.config)], eager)
        return own(module, *given, **named)


def _decode(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **named: Any,
) -> tuple[Tensor, Any]:
    """An attention function as transformers has them: (rows, heads, 1, size) to (rows, 1, heads, size)."""
    layer: Any = key.layer  # type: ignore[attr-defined]  # what StaticKVCache put there
    attention: FusedAttention = layer.cache.attention

    def fused() -> Tensor:
        new_key, new_value = layer.new
        return attend(
            query,
            new_key,
            new_value,
            layer.keys,
            layer.values,
            layer.cache.positions,
            scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
            window=named.get("sliding_window"),
            softcap=named.get("softcap"),
            shared=layer.cache.shared,
        )

    if attention.usable:
        return fused(), None
    own = {**named} if scaling is None else {**named, "scaling": scaling}
    expected, weights = attention.own_attention(module, query, key, value, attention_mask, dropout=dropout, **own)
    strange = {n for n, given in named.items() if given is not None and not n.startswith(ASKED)} - UNDERSTOOD
    alike = query.shape[-1] == layer.keys.shape[-1] == layer.values.shape[-1] and not strange
    attention.agreed.append(is_same(fused() if alike else expected[:0], expected))
    return expected, weights


AttentionInterface.register(NAME, _decode)
# Beside it a mask function, or transformers would build no masks at all.
AttentionMaskInterface.register(NAME, sdpa_mask)
