"""NEFTune: uniform noise on the input embeddings of a training step (https://arxiv.org/abs/2310.05914, algorithm 1)."""

import torch
from torch import Tensor


def add_noise(embedded: Tensor, row_tokens: Tensor, alpha: float) -> Tensor:
    """Embeddings with alpha / sqrt(L d) times a number of [-1, 1) added to each; drawn by the device's own generator.

    Args:
        embedded: (rows, length, size) in the compute dtype; size is the formula's d.
        row_tokens: (rows, length) or what broadcasts to it: tokens of the row that each belongs to, L.
        alpha: The paper uses 5 to 15.
    """
    magnitude = alpha * (row_tokens.float() * embedded.shape[-1]).rsqrt()
    noise = torch.empty_like(embedded, requires_grad=False).uniform_(-1, 1)
    return embedded + noise.mul_(magnitude[..., None].to(noise.dtype))


def tokens_of_rows(boundaries: Tensor, tokens: int) -> Tensor:
    """(1, tokens) int64: how long the row is that each token of a pack belongs to.

    Args:
        boundaries: (rows + 1,) integers, where each row starts, and `tokens`.
        tokens: Of the pack.
    """
    lengths = boundaries.diff().long()
    return lengths.repeat_interleave(lengths, output_size=tokens)[None]
