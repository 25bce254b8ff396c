"""Token sampling: temperature, top-k, top-p, min-p and repetition penalty; a row draws the same in any batch."""

import hashlib

import torch
from torch import Tensor

from qlora_cli.errors import UsageError
from qlora_cli.settings.generation import SamplingSettings

NOT_A_NUMBER = -1  # token id that stands for logits without a finite maximum


def check_sampling(sampling: SamplingSettings) -> None:
    """Checks the numbers that `choose_tokens` works with.

    Raises:
        UsageError: A value is out of range.
    """
    checks = {
        "repetition-penalty": (sampling.repetition_penalty > 0, "above 0"),
        "temperature": (sampling.temperature >= 0, "0 or more"),
        "top-k": (sampling.top_k >= 0, "0 or more"),
        "top-p": (0 < sampling.top_p <= 1, "above 0, at most 1"),
        "min-p": (0 <= sampling.min_p <= 1, "from 0 to 1"),
    }
    for flag, (good, wanted) in checks.items():
        if not good:
            value = getattr(sampling, flag.replace("-", "_"))
            raise UsageError(f"--{flag} is {value:g} and has to be {wanted}.", f"Change --{flag}.")


def is_greedy(sampling: SamplingSettings) -> bool:
    """Whether the likeliest token is always taken."""
    return sampling.temperature == 0


def penalises_repetition(sampling: SamplingSettings) -> bool:
    """Whether the choice depends on which tokens were seen."""
    return sampling.repetition_penalty != 1


def draw_uniforms(seed: int, index: int, count: int) -> Tensor:
    """The random numbers of one prompt.

    Args:
        seed: Of the whole command.
        index: The prompt's number; not its row in a batch.
        count: Tokens that may be sampled.

    Returns:
        (count,) float32 in [0, 1).
    """
    digest = hashlib.sha256(f"{seed}/{index}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    return torch.rand(count, generator=generator)


def choose_tokens(
    logits: Tensor, sampling: SamplingSettings, uniforms: Tensor | None = None, seen: Tensor | None = None
) -> Tensor:
    """The next token of each row; the filters apply in transformers' order.

    Shapes are fixed and nothing waits for the device, so that a CUDA graph can hold it.

    Args:
        logits: (batch, vocabulary), any floating dtype.
        sampling: The settings.
        uniforms: (batch,) in [0, 1), one number for each row; not needed when greedy.
        seen: (batch, vocabulary) bool, tokens of the prompt and the answer so far; needed for a repetition penalty.

    Returns:
        (batch,) int64; NOT_A_NUMBER where the row's logits have no finite maximum.
    """
    logits = logits.float()
    if penalises_repetition(sampling):  # https://arxiv.org/abs/1909.05858, section 4.1
        assert seen is not None
        penalised = torch.where(logits < 0, logits * sampling.repetition_penalty, logits / sampling.repetition_penalty)
        logits = torch.where(seen, penalised, logits)
    best, likeliest = logits.max(dim=-1)
    if is_greedy(sampling):
        chosen = likeliest
    else:
        assert uniforms is not None
        chosen = _sample(logits, sampling, uniforms)
    return torch.where(torch.isfinite(best), chosen, NOT_A_NUMBER)


def _sample(logits: Tensor, sampling: SamplingSettings, uniforms: Tensor) -> Tensor:
    """Inverse transform sampling over the sorted distribution: one uniform number a row decides."""
    vocabulary = logits.shape[-1]
    if 0 < sampling.top_k < vocabulary:
        scores, ids = logits.topk(sampling.top_k, dim=-1)
    else:
        scores, ids = logits.sort(dim=-1, descending=True, stable=True)
    weights = torch.softmax(scores / sampling.temperature, dim=-1)  # (batch, kept), falling
    if sampling.top_p < 1:  # a token stays while those before it hold less (https://arxiv.org/abs/1904.09751, 3.1)
        weights = weights.where(weights.cumsum(dim=-1) - weights < sampling.top_p, 0)
    if sampling.min_p > 0:  # https://arxiv.org/abs/2407.01082
        weights = weights.where(weights >= sampling.min_p * weights[:, :1], 0)
    mass = weights.cumsum(dim=-1)
    drawn = (mass <= uniforms[:, None] * mass[:, -1:]).sum(dim=-1)  # (batch,), an index into ids
    last = (weights > 0).sum(dim=-1).clamp(min=1) - 1  # rounding must not step past what was kept
    return ids.gather(-1, torch.minimum(drawn, last)[:, None]).squeeze(-1)
