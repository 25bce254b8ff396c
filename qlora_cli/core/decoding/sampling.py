"""Logits and sampling settings in, token ids out; the same seed gives the same draw wherever a row stands in a batch."""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_cli.errors import UsageError

NOT_A_NUMBER = -1  # token id that stands for logits without a finite maximum


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; the filters apply in the order of the fields, as in transformers.

    Raises:
        UsageError: A value is out of range.
    """

    repetition_penalty: float = 1.0  # https://arxiv.org/abs/1909.05858, section 4.1
    temperature: float = 0.0  # 0 is greedy
    top_k: int = 0  # 0 keeps all
    top_p: float = 1.0  # https://arxiv.org/abs/1904.09751, section 3.1
    min_p: float = 0.0  # https://arxiv.org/abs/2407.01082

    def __post_init__(self) -> None:
        checks = {
            "repetition-penalty": (self.repetition_penalty > 0, "above 0"),
            "temperature": (self.temperature >= 0, "0 or more"),
            "top-k": (self.top_k >= 0, "0 or more"),
            "top-p": (0 < self.top_p <= 1, "above 0, at most 1"),
            "min-p": (0 <= self.min_p <= 1, "from 0 to 1"),
        }
        for flag, (good, wanted) in checks.items():
            if not good:
                value = getattr(self, flag.replace("-", "_"))
                raise UsageError(f"--{flag} is {value:g} and has to be {wanted}.", f"Change --{flag}.")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0

    @property
    def remembers(self) -> bool:
        """Whether the choice depends on which tokens were seen."""
        return self.repetition_penalty != 1


def draw_uniforms(seed: int, index: int, count: int) -> Tensor:
    """The random numbers of one prompt.

    Args:
        seed: Of the whole command.
        index: The prompt's number; not its place in a batch.
        count: Tokens that may be sampled.

    Returns:
        (count,) float32 in [0, 1).
    """
    digest = hashlib.sha256(f"{seed}/{index}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    return torch.rand(count, generator=generator)


def choose_tokens(
    logits: Tensor, sampling: Sampling, uniforms: Tensor | None = None, seen: Tensor | None = None
) -> Tensor:
    """The next token of each row. Fixed shapes and no synchronisation, so that a CUDA graph can hold it.

    Args:
        logits: (batch, vocabulary), any floating dtype.
        sampling: The settings.
        uniforms: (batch,) in [0, 1), one number for each row; not needed when greedy.
        seen: (batch, vocabulary) bool, tokens of the prompt and the answer so far; needed for a repetition penalty.

    Returns:
        (batch,) int64; NOT_A_NUMBER where the row's logits have no finite maximum.
    """
    logits = logits.float()
    if sampling.remembers:
        assert seen is not None
        penalised = torch.where(logits < 0, logits * sampling.repetition_penalty, logits / sampling.repetition_penalty)
        logits = torch.where(seen, penalised, logits)
    best, likeliest = logits.max(dim=-1)
    if sampling.greedy:
        chosen = likeliest
    else:
        assert uniforms is not None
        chosen = _sample(logits, sampling, uniforms)
    return torch.where(torch.isfinite(best), chosen, NOT_A_NUMBER)


def _sample(logits: Tensor, sampling: Sampling, uniforms: Tensor) -> Tensor:
    """Inverse transform sampling over the sorted distribution: one uniform number a row decides."""
    vocabulary = logits.shape[-1]
    if 0 < sampling.top_k < vocabulary:
        scores, ids = logits.topk(sampling.top_k, dim=-1)
    else:
        scores, ids = logits.sort(dim=-1, descending=True, stable=True)
    weights = torch.softmax(scores / sampling.temperature, dim=-1)  # (batch, kept), falling
    if sampling.top_p < 1:  # a token stays while those before it hold less than top_p
        weights = weights.where(weights.cumsum(dim=-1) - weights < sampling.top_p, 0)
    if sampling.min_p > 0:
        weights = weights.where(weights >= sampling.min_p * weights[:, :1], 0)
    mass = weights.cumsum(dim=-1)
    place = (mass <= uniforms[:, None] * mass[:, -1:]).sum(dim=-1)
    last = (weights > 0).sum(dim=-1).clamp(min=1) - 1  # rounding must not step past what was kept
    return ids.gather(-1, torch.minimum(place, last)[:, None]).squeeze(-1)
