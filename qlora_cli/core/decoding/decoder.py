"""Decoder: prefill and steps of one model over a batch of independent rows, by the model's own forward."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlora_cli.core.decoding.kv_cache import StaticKVCache
from qlora_cli.core.decoding.pending_tokens import PendingRun, PendingTokens, send
from qlora_cli.core.decoding.prompt_lookup import WIDTH, PromptLookUp
from qlora_cli.core.decoding.sampling import choose_tokens, is_greedy, penalises_repetition
from qlora_cli.core.models.structure import underlying_model
from qlora_cli.settings.generation import SamplingSettings

PREFILL_TOKENS = 8192  # most tokens in one forward over prompts
# Outside transformers' attention interface, yet right with one mask a step: their attention looks at every position
# that the mask leaves, whatever the row's own (ALiBi differs by a constant in a row, which softmax ignores).
MASKED_BY_POSITION = {"falcon", "bloom", "mpt", "gptj", "codegen"}
ATTENTION_KINDS = {"full_attention", "sliding_attention"}
STATE_KINDS = {"linear_attention", "conv"}  # keep a state of fixed size in the cache
# Kinds of layer that are made of others, or of none that the cache knows.
PARTS = {
    "hybrid": ("full_attention", "linear_attention"),
    "hybrid_sliding": ("sliding_attention", "linear_attention"),
    "moe": (),
    "mlp": (),
}


def _layer_kinds(config: Any) -> set[str]:
    """What a model's layers keep in the cache, in transformers' words."""
    kinds = set(getattr(config, "layer_types", None) or ())
    return {part for kind in kinds for part in PARTS.get(kind, (kind,))}


def updates_state(module: Any) -> bool:
    """Whether a module keeps its state in the cache it is given."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and not {"update_conv_state", "update_recurrent_state"}.isdisjoint(code.co_names)


def why_not_stepwise(model: Any) -> str | None:
    """What keeps a model from being decoded row by row here, as the end of "because …"; None when nothing does."""
    base = underlying_model(model)
    config = base.config.get_text_config(decoder=True)
    kinds = _layer_kinds(config)
    if strange := kinds - ATTENTION_KINDS - STATE_KINDS:
        return f"{config.model_type} has {', '.join(sorted(strange))} layers"
    stateful = bool(kinds & STATE_KINDS)
    if (getattr(base, "_is_stateful", False) and not stateful) or config.is_encoder_decoder:
        return f"{config.model_type} keeps a state that is no list of keys and values"
    if stateful and not any(updates_state(module) for module in base.modules()):
        return f"{config.model_type} keeps a state outside transformers' cache"
    if "past_key_values" not in inspect.signature(base.forward).parameters:
        return f"{config.model_type} takes no keys and values of before"
    if not base._can_set_attn_implementation() and config.model_type not in MASKED_BY_POSITION:
        return f"{config.model_type} has attention code of its own"
    if "logits_to_keep" not in inspect.signature(base.forward).parameters:
        return f"{config.model_type} gives the logits of every position or none"
    return None


@dataclass(frozen=True)
class Prompt:
    """One row to fill: token ids, and the random numbers of the tokens that may follow."""

    ids: Sequence[int]
    uniforms: Tensor | None = None  # (max new tokens,), not needed when greedy


class PaddedPrompts(NamedTuple):
    """Prompts of a batch, padded on the right, as one tensor: they travel to the device in one copy.

    Attributes:
        whole: int64 (prompts * (3 + length),), of which the others are views.
        rows: (prompts,), the row of the cache that each fills.
        ends: (prompts,), tokens in each.
        last: (prompts,), where the last token of each is in the flattened `ids`.
        ids: (prompts, length). The padding is each prompt's last token: causality hides it from what counts, and it
            adds nothing to what the prompt has seen.
    """

    whole: Tensor
    rows: Tensor
    ends: Tensor
    last: Tensor
    ids: Tensor

    @classmethod
    def of(cls, whole: Tensor, prompts: int) -> "PaddedPrompts":
        """The views of a tensor that holds so many prompts."""
        rows, ends, last = whole[: 3 * prompts].view(3, prompts).unbind()
        return cls(whole, rows, ends, last, whole[3 * prompts :].view(prompts, -1))

    def to(self, device: torch.device) -> "PaddedPrompts":
        """The same on a device, without waiting for it."""
        return self.of(send(self.whole, device), len(self.rows))


def pad_prompts(rows: Sequence[int], prompts: Sequence[Prompt], length: int) -> PaddedPrompts:
    """Prompts for these rows, padded to `length` tokens, on the host."""
    numbers = [*rows, *(len(prompt.ids) for prompt in prompts)]
    numbers += [number * length + len(prompt.ids) - 1 for number, prompt in enumerate(prompts)]
    for prompt in prompts:
        numbers += [*prompt.ids, *[prompt.ids[-1]] * (length - len(prompt.ids))]
    return PaddedPrompts.of(torch.tensor(numbers), len(prompts))


class Decoder:
    """Decodes for one model instance: `prefill` puts prompts into rows, `step` advances every row by a token.

    Nothing waits for the device until `PendingTokens.wait`, so that the host can look at one step's tokens while the next is
    running.

    Args:
        model: A transformers causal language model, maybe wrapped by PEFT, in eval mode.
        rows: Answers decoded at once.
        capacity: Most tokens in a row, prompt and answer together.
        sampling: How tokens are chosen.
        look_up: Whether steps of a single row may take guesses along, see `PromptLookUp`. A state that every token changes
            cannot be taken back: models with one go without.
    """

    def __init__(
        self, model: Any, *, rows: int, capacity: int, sampling: SamplingSettings, look_up: bool = False
    ) -> None:
        self.model = underlying_model(model)
        self.sampling = sampling
        self.device = self.model.get_input_embeddings().weight.device
        config = self.model.config.get_text_config(decoder=True)
        self.cache = StaticKVCache(rows, capacity, config.num_hidden_layers)
        self._takes_positions = "position_ids" in inspect.signature(self.model.forward).parameters
        self._mask_dtype = self.model.get_input_embeddings().weight.dtype
        # Slopes of ALiBi are made from a 2-D mask; everyone else hands a finished one of 4 dimensions on.
        alibi = config.model_type in ("bloom", "mpt") or getattr(config, "alibi", False)
        self._boolean_mask = alibi and not self.model._can_set_attn_implementation()
        self._window: Any = getattr(config, "sliding_window", None)
        default = "sliding_attention" if self._window else "full_attention"
        kinds = _layer_kinds(config) or {default}
        self._kinds = sorted(kinds & ATTENTION_KINDS)
        self._stateful = sorted(kinds & STATE_KINDS)

        def state(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=self.device)

        self.tokens = state(rows, 1)  # what the next step reads
        self.positions = state(rows)  # and at which position
        self.chosen = state(rows)  # what the last step chose
        vocabulary = config.vocab_size
        self.uniforms = None if is_greedy(sampling) else state(rows, capacity + 1, dtype=torch.float32)
        self.seen = state(rows, vocabulary, dtype=torch.bool) if penalises_repetition(sampling) else None
        self.filled: list[int] = []  # tokens in each row of the cache, on the host; 0 for a row that is not in use
        hindered = "several rows at once" if rows > 1 else "layers with a state" if self._stateful else None
        self.look_up = PromptLookUp(capacity, self.device) if look_up and hindered is None else None
        self._unguessed = f" (no prompt look-up: {hindered})" if look_up and hindered else ""
        self._hits = 0  # first guesses in a row that were right, as far as the host knows
        self._unread = 0  # by so much `filled` may be too high, until the tokens of the last steps are read
        self._answer = 0  # number of the prompt in the row, of those that came
        self.guessed_steps = self.guessed_right = 0  # steps with guesses, and guesses that were right
        self.reset()

    # ------------------------------------------------------------ prompts

    @torch.no_grad()
    def prefill(self, rows: Sequence[int], prompts: Sequence[Prompt]) -> PendingTokens:
        """Fills rows with prompts and chooses the first token of each answer.

        Args:
            rows: One row a prompt.
            prompts: Each at least one token, and shorter than the capacity.

        Returns:
            One token for each prompt.
        """
        lengths = [len(prompt.ids) for prompt in prompts]
        # A state goes on through padding: prompts beside one another have the same length then.
        runs = [len([*run]) for _, run in groupby(lengths)] if self._stateful else [len(lengths)]
        parts, start = [], 0
        for count in runs:
            together = max(1, PREFILL_TOKENS // self._padded_length(max(lengths[start : start + count])))
            for at in range(start, start + count, together):
                end = min(at + together, start + count)
                parts.append(self._prefill(rows[at:end], prompts[at:end]))
            start += count
        return PendingTokens(torch.cat(parts))

    def _padded_length(self, longest: int) -> int:
        """Tokens that prompts of at most `longest` are padded to."""
        return longest

    def _prefill(self, numbers: Sequence[int], prompts: Sequence[Prompt]) -> Tensor:
        lengths = [len(prompt.ids) for prompt in prompts]
        padded = pad_prompts(numbers, prompts, self._padded_length(max(lengths))).to(self.device)
        last = self._read(padded, lengths)  # (prompts, vocabulary)
        rows, ends = padded.rows, padded.ends
        uniforms = None
        if self.uniforms is not None:
            drawn = torch.zeros(len(prompts), self.uniforms.shape[1])
            for row, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
                assert prompt.uniforms is not None
                count = min(len(prompt.uniforms), drawn.shape[1] - length)
                drawn[row, length : length + count] = prompt.uniforms[:count]
            self.uniforms[rows] = send(drawn, self.device)
            uniforms = self.uniforms[rows, ends]
        seen = None
        if self.seen is not None:
            seen = self.seen.new_zeros(len(prompts), self.seen.shape[1]).scatter_(1, padded.ids, True)
            self.seen[rows] = seen
        chosen = choose_tokens(last, self.sampling, uniforms, seen)
        fed = chosen.clamp(min=0)
        self.tokens[rows, 0] = fed
        self.positions[rows] = ends
        if self.seen is not None:
            self.seen[rows, fed] = True
        for number, length in zip(numbers, lengths, strict=True):
            self.filled[number] = length
        if self.look_up is not None:
            self.look_up.start(padded.ids[0], lengths[0], fed)
            self._hits, self._unread, self._answer = 0, 0, self._answer + 1
        return chosen

    def _read(self, padded: PaddedPrompts, lengths: list[int]) -> Tensor:
        """Stores the prompts' keys and values; returns the logits after each prompt, (prompts, vocabulary)."""
        kept = sorted(set(lengths))  # the only positions whose logits are needed
        self.cache.start_prefill(padded.rows, padded.ids.shape[1])
        logits = self.model(
            input_ids=padded.ids,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=torch.tensor(kept, device=self.device) - 1,
        ).logits
        at = torch.tensor([kept.index(length) for length in lengths], device=self.device)
        return logits[torch.arange(len(lengths), device=self.device), at]

    # ------------------------------------------------------------ answers

    def reset(self) -> None:
        """No row is in use from here on."""
        self.filled = [0] * self.cache.rows

    def describe(self) -> str:
        """How tokens are computed, and why not faster."""
        return "own steps, one forward a token" + self._describe_guesses()

    def _describe_guesses(self) -> str:
        if not self.guessed_steps:
            return self._unguessed
        return (
            f", {self.guessed_right} tokens guessed rightly in {self.guessed_steps} steps of several (prompt look-up)"
        )

    def release(self, row: int) -> None:
        """The row's answer is finished; what it computes from here on means nothing."""
        self.filled[row] = 0

    @torch.no_grad()
    def step(self) -> PendingTokens:
        """Advances every row by a token, or a single row by as many as were guessed rightly and one.

        Returns:
            The tokens of each row; those of rows not in use mean nothing.
        """
        width = self._choose_width()
        self.filled = [min(n + width, self.cache.capacity) if n else 0 for n in self.filled]
        self._advance(width)
        if self.look_up is None:
            return PendingTokens(self.chosen)
        self._unread += width - 1
        answer = self._answer

        def learn(count: int, first: bool) -> None:
            if answer != self._answer:
                return
            self._hits = self._hits + 1 if first else 0
            self._unread -= width - 1
            self.filled = [max(0, n - width + count) for n in self.filled]
            if width > 1:
                self.guessed_steps += 1
                self.guessed_right += count - 1

        return PendingRun(self.look_up.report[: 2 + width], learn)

    def _choose_width(self) -> int:
        """Tokens that the next step reads: with guesses only where one would have been right, and there is room for all."""
        taken = self.look_up is not None and self._takes_guesses() and self.filled[0] + WIDTH < self.cache.capacity
        return WIDTH if taken else 1

    def _takes_guesses(self) -> bool:
        """Whether guesses are worth a step of several tokens."""
        return self._hits > 0

    def _advance(self, width: int) -> None:
        """One step, by the model's own forward."""
        length = max(self.filled)
        exact = width == 1 and not self._unread and set(self.filled) == {length}  # rows of one length need no mask
        tokens, positions = self._inputs(width)
        self.cache.start_step(positions, length, shared=width > 1)
        self._take_step(tokens, positions, None if exact else self._mask(length, positions))

    def _inputs(self, width: int) -> tuple[Tensor, Tensor]:
        """What a step reads and where: (tokens, 1) and (tokens,) int64, one token a row or several of a single one."""
        if self.look_up is None:
            return self.tokens, self.positions
        return self.look_up.extend(self.tokens, self.positions, width)

    def _forward(self, tokens: Tensor, positions: Tensor, mask: Any) -> Tensor:
        """The logits after each token, (tokens, vocabulary).

        Args:
            mask: As the model takes it; None where every row sees all positions.
        """
        arguments: dict[str, Any] = {"position_ids": positions[:, None]} if self._takes_positions else {}
        if mask is not None:
            arguments["attention_mask"] = mask
        return self.model(input_ids=tokens, past_key_values=self.cache, use_cache=True, **arguments).logits[:, -1]

    def _take_step(self, tokens: Tensor, positions: Tensor, mask: Any) -> None:
        """From what a step reads to what the next one does, on the device alone."""
        logits = self._forward(tokens, positions, mask)
        uniforms, seen = None, self.seen
        if self.uniforms is not None:
            uniforms = self.uniforms.expand(len(tokens), -1).gather(1, positions[:, None] + 1).squeeze(1)
        if self.look_up is not None and seen is not None:
            seen = self.look_up.seen_by_each(seen, tokens)
        chosen = choose_tokens(logits, self.sampling, uniforms, seen)
        steps: Tensor | int = 1
        if self.look_up is not None:
            right = self.look_up.accept(chosen, self.positions)
            chosen, steps = chosen.index_select(0, right), right + 1
            if self.seen is not None and seen is not None:
                self.seen.copy_(seen.index_select(0, right))
        self.chosen.copy_(chosen)
        self.tokens.copy_(self.chosen[:, None].clamp(min=0))
        if self.seen is not None:
            self.seen.scatter_(1, self.tokens, True)
        self.positions.add_(steps).clamp_(max=self.cache.capacity - 1)  # a row not in use stays inside

    def _mask(self, length: int, own: Tensor) -> Any:
        """Which positions new tokens see: those up to their own, (tokens,), or the last `sliding_window` of them."""
        positions = torch.arange(length, device=self.device)
        seen = positions <= own[:, None]  # (tokens, length)
        if self._boolean_mask:
            return seen.long()

        def additive(allowed: Tensor) -> Tensor:  # (tokens, 1, 1, length): what eager attention and SDPA both take
            zeros = torch.zeros(allowed.shape, dtype=self._mask_dtype, device=self.device)
            return zeros.masked_fill(~allowed, torch.finfo(self._mask_dtype).min)[:, None, None]

        made = {}
        for kind in self._kinds:
            near = kind == "full_attention" or positions > own[:, None] - self._window
            made[kind] = additive(seen & near)
        return self._masks(made)

    def _masks(self, made: dict[str, Tensor]) -> Any:
        """Masks by kind of attention as the model takes them; those of one kind alone go without its name."""
        if len(made) < 2:
            return next(iter(made.values()), None)
        return {**dict.fromkeys(self._stateful), **made}
