"""A 4-bit model with its adapter in, next tokens for a batch of independent rows out, at the best speed it allows."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlora_cli.core.decoding.kv_cache import StaticKVCache
from qlora_cli.core.decoding.sampling import Sampling, choose_tokens
from qlora_cli.core.models.structure import underlying_model

PREFILL_TOKENS = 8192  # most tokens in one forward over prompts
# Outside transformers' attention interface, yet right with one 2-D mask a step: their attention looks at every place
# that the mask leaves, whatever the row's own position (ALiBi differs by a constant in a row, which softmax ignores).
MASKED_BY_PLACE = {"falcon", "bloom", "mpt", "gptj", "codegen"}
ATTENTION_KINDS = {"full_attention", "sliding_attention"}


def why_not_stepwise(model: Any) -> str | None:
    """What keeps a model from being decoded row by row here, as the end of "because …"; None when nothing does."""
    base = underlying_model(model)
    config = base.config.get_text_config(decoder=True)
    kinds = set(getattr(config, "layer_types", None) or ())
    if kinds - ATTENTION_KINDS:
        return f"{config.model_type} has {', '.join(sorted(kinds - ATTENTION_KINDS))} layers"
    if getattr(base, "_is_stateful", False) or config.is_encoder_decoder:
        return f"{config.model_type} keeps a state that is no list of keys and values"
    if not base._can_set_attn_implementation() and config.model_type not in MASKED_BY_PLACE:
        return f"{config.model_type} has attention code of its own"
    if "logits_to_keep" not in inspect.signature(base.forward).parameters:
        return f"{config.model_type} gives the logits of every place or none"
    return None


@dataclass(frozen=True)
class Prompt:
    """One row to fill: token ids, and the random numbers of the tokens that may follow."""

    ids: Sequence[int]
    uniforms: Tensor | None = None  # (max new tokens,), not needed when greedy


class LaidPrompts(NamedTuple):
    """Prompts of a batch as one tensor, so that they travel to the device in one copy.

    Attributes:
        whole: int64 (prompts * (3 + room),), of which the others are views.
        rows: (prompts,), the slot of each.
        ends: (prompts,), tokens in each.
        last: (prompts,), where the last token of each is among `ids` laid end to end.
        ids: (prompts, room). What is beyond a prompt's end is its last token: causality hides it from what counts, and
            it adds nothing to what the prompt has seen.
    """

    whole: Tensor
    rows: Tensor
    ends: Tensor
    last: Tensor
    ids: Tensor

    @classmethod
    def of(cls, whole: Tensor, prompts: int) -> "LaidPrompts":
        """The views of a tensor that holds so many prompts."""
        rows, ends, last = whole[: 3 * prompts].view(3, prompts).unbind()
        return cls(whole, rows, ends, last, whole[3 * prompts :].view(prompts, -1))

    def to(self, device: torch.device) -> "LaidPrompts":
        """The same on a device, without waiting for it."""
        return self.of(send(self.whole, device), len(self.rows))


def lay_out(slots: Sequence[int], prompts: Sequence[Prompt], room: int) -> LaidPrompts:
    """Prompts side by side on the host, each given `room` places."""
    numbers = [*slots, *(len(prompt.ids) for prompt in prompts)]
    numbers += [row * room + len(prompt.ids) - 1 for row, prompt in enumerate(prompts)]
    for prompt in prompts:
        numbers += [*prompt.ids, *[prompt.ids[-1]] * (room - len(prompt.ids))]
    return LaidPrompts.of(torch.tensor(numbers), len(prompts))


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device; a GPU gets it in its turn, and the host goes on."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class Pending:
    """Tokens on their way from the device; `wait` gives one id a row."""

    def __init__(self, chosen: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if chosen.device.type == "cuda":
            self._host = torch.empty(chosen.shape, dtype=chosen.dtype, pin_memory=True)
            self._host.copy_(chosen, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._host = chosen.clone()

    def wait(self) -> list[int]:
        """Blocks until the tokens are there."""
        if self._event is not None:
            self._event.synchronize()
        return self._host.tolist()


class Decoder:
    """Runs answers for one model instance: `prefill` puts prompts into slots, `step` advances every slot by a token.

    Nothing waits for the device until `Pending.wait`, so that the host can look at one step's tokens while the next is
    running.

    Args:
        model: A transformers causal language model, maybe wrapped by PEFT, in eval mode.
        slots: Rows decoded at once.
        capacity: Most tokens in a row, prompt and answer together.
        sampling: How tokens are chosen.
    """

    def __init__(self, model: Any, *, slots: int, capacity: int, sampling: Sampling) -> None:
        self.model = underlying_model(model)
        self.sampling = sampling
        self.device = self.model.get_input_embeddings().weight.device
        self.cache = StaticKVCache(slots, capacity)
        config = self.model.config.get_text_config(decoder=True)
        self._takes_positions = "position_ids" in inspect.signature(self.model.forward).parameters
        self._mask_dtype = self.model.get_input_embeddings().weight.dtype
        # Slopes of ALiBi are made from a 2-D mask; everyone else hands a finished one of 4 dimensions on.
        alibi = config.model_type in ("bloom", "mpt") or getattr(config, "alibi", False)
        self._mask_by_place = alibi and not self.model._can_set_attn_implementation()
        self._window: Any = getattr(config, "sliding_window", None)
        default = "sliding_attention" if self._window else "full_attention"
        self._kinds = sorted(set(getattr(config, "layer_types", None) or [default]))

        def state(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=self.device)

        self.tokens = state(slots, 1)  # what the next step reads
        self.positions = state(slots)  # and where it stands
        self.chosen = state(slots)  # what the last step chose
        vocabulary = config.vocab_size
        self.uniforms = None if sampling.greedy else state(slots, capacity + 1, dtype=torch.float32)
        self.seen = state(slots, vocabulary, dtype=torch.bool) if sampling.remembers else None
        self.filled: list[int] = []  # tokens in each slot's keys, on the host; 0 for a slot that is not in use
        self.reset()

    # ------------------------------------------------------------ prompts

    @torch.no_grad()
    def prefill(self, slots: Sequence[int], prompts: Sequence[Prompt]) -> Pending:
        """Fills slots with prompts and chooses the first token of each answer.

        Args:
            slots: One slot a prompt.
            prompts: Each at least one token, and shorter than the capacity.

        Returns:
            One token for each prompt.
        """
        longest = max(len(prompt.ids) for prompt in prompts)
        together = max(1, PREFILL_TOKENS // self._room_for(longest))
        parts = [
            self._prefill(slots[at : at + together], prompts[at : at + together])
            for at in range(0, len(prompts), together)
        ]
        return Pending(torch.cat(parts))

    def _room_for(self, longest: int) -> int:
        """Places that prompts of at most `longest` tokens are laid into."""
        return longest

    def _prefill(self, slots: Sequence[int], prompts: Sequence[Prompt]) -> Tensor:
        lengths = [len(prompt.ids) for prompt in prompts]
        laid = lay_out(slots, prompts, self._room_for(max(lengths))).to(self.device)
        last = self._read(laid, lengths)  # (prompts, vocabulary)
        rows, ends = laid.rows, laid.ends
        uniforms = None
        if self.uniforms is not None:
            drawn = torch.zeros(len(prompts), self.uniforms.shape[1])
            for row, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
                assert prompt.uniforms is not None
                room = min(len(prompt.uniforms), drawn.shape[1] - length)
                drawn[row, length : length + room] = prompt.uniforms[:room]
            self.uniforms[rows] = send(drawn, self.device)
            uniforms = self.uniforms[rows, ends]
        seen = None
        if self.seen is not None:
            seen = self.seen.new_zeros(len(prompts), self.seen.shape[1]).scatter_(1, laid.ids, True)
            self.seen[rows] = seen
        chosen = choose_tokens(last, self.sampling, uniforms, seen)
        fed = chosen.clamp(min=0)
        self.tokens[rows, 0] = fed
        self.positions[rows] = ends
        if self.seen is not None:
            self.seen[rows, fed] = True
        for slot, length in zip(slots, lengths, strict=True):
            self.filled[slot] = length
        return chosen

    def _read(self, laid: LaidPrompts, lengths: list[int]) -> Tensor:
        """Keys and values of the prompts into their slots, the logits after each prompt out: (prompts, vocabulary)."""
        kept = sorted(set(lengths))  # the only places whose logits are needed
        self.cache.start_prefill(laid.rows, 0, laid.ids.shape[1])
        logits = self.model(
            input_ids=laid.ids,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=torch.tensor(kept, device=self.device) - 1,
        ).logits
        at = torch.tensor([kept.index(length) for length in lengths], device=self.device)
        return logits[torch.arange(len(lengths), device=self.device), at]

    # ------------------------------------------------------------ answers

    def reset(self) -> None:
        """No slot is in use."""
        self.filled = [0] * self.cache.slots

    def release(self, slot: int) -> None:
        """The slot's answer is finished; what it computes from here on is of no interest."""
        self.filled[slot] = 0

    @torch.no_grad()
    def step(self) -> Pending:
        """Advances every slot by a token.

        Returns:
            One token for each slot; those of slots not in use mean nothing.
        """
        self.filled = [min(n + 1, self.cache.capacity) if n else 0 for n in self.filled]
        self._advance()
        return Pending(self.chosen)

    def _advance(self) -> None:
        """One step, by the model's own forward."""
        length = max(self.filled)
        mask = None if set(self.filled) == {length} else self._mask(length)  # rows of one length need none
        self.cache.start_step(self.positions, length)
        self._forward_step(mask)

    def _forward_step(self, mask: Any) -> None:
        """From `tokens` and `positions` to the next ones, on the device alone.

        Args:
            mask: As the model takes it; None where every row sees all places.
        """
        arguments: dict[str, Any] = {"position_ids": self.positions[:, None]} if self._takes_positions else {}
        if mask is not None:
            arguments["attention_mask"] = mask
        logits = self.model(input_ids=self.tokens, past_key_values=self.cache, use_cache=True, **arguments).logits
        uniforms = None
        if self.uniforms is not None:
            uniforms = self.uniforms.gather(1, self.positions[:, None] + 1).squeeze(1)
        self.chosen.copy_(choose_tokens(logits[:, -1], self.sampling, uniforms, self.seen))
        self.tokens.copy_(self.chosen[:, None].clamp(min=0))
        if self.seen is not None:
            self.seen.scatter_(1, self.tokens, True)
        self.positions.add_(1).clamp_(max=self.cache.capacity - 1)  # a slot not in use stays inside

    def _mask(self, length: int) -> Any:
        """Which places each row's new token sees: those up to its own, or the last `sliding_window` of them."""
        places = torch.arange(length, device=self.device)
        seen = places <= self.positions[:, None]  # (slots, length)
        if self._mask_by_place:
            return seen.long()

        def additive(allowed: Tensor) -> Tensor:  # (slots, 1, 1, length): what eager attention and SDPA both take
            zeros = torch.zeros(allowed.shape, dtype=self._mask_dtype, device=self.device)
            return zeros.masked_fill(~allowed, torch.finfo(self._mask_dtype).min)[:, None, None]

        made = {}
        for kind in self._kinds:
            near = kind == "full_attention" or places > self.positions[:, None] - self._window
            made[kind] = additive(seen & near)
        return made if len(made) > 1 else next(iter(made.values()))
