"""Chunked cross-entropy of a language-model head, which never holds all the logits.

The gradient of the hidden states is made while a chunk of logits is there, so that the backward pass only scales it.
"""

import importlib.util
from typing import Any

import torch
from torch import Tensor

if importlib.util.find_spec("triton"):  # not there beside a CPU-only torch
    from qlora_cli.kernels.triton import softmax

CHUNK_BYTES = 64 * 2**20  # of logits; 1,024 tokens of a vocabulary of 32,000 in bf16
# Of logits, where memory is plentiful: the two products of 8,192 tokens with a vocabulary of 128,256, 4,096 wide, take 27.0 ms
# on an H200, in chunks of 256 tokens 30.6.
WIDE_CHUNK_BYTES = 512 * 2**20
# Fewer tokens and reading the head's weight takes longer than multiplying with it: by 128 of a vocabulary of 152,000 the
# two products took 10.4 ms of a step of 4,096 tokens on an H200, 6.5 by their arithmetic.
LEAST_TOKENS = 256


def chunk_tokens(vocabulary: int, itemsize: int, *, wide: bool = False) -> int:
    """Tokens whose logits take about `CHUNK_BYTES`, or `WIDE_CHUNK_BYTES`: at least `LEAST_TOKENS` and a multiple of 128."""
    return max(LEAST_TOKENS, (WIDE_CHUNK_BYTES if wide else CHUNK_BYTES) // (vocabulary * itemsize) // 128 * 128)


def _loss_and_gradient(logits: Tensor, targets: Tensor, scale: float, softcap: float | None) -> tuple[Tensor, Tensor]:
    """Loss of each token, fp32 (tokens,), and the gradient of its raw logits, in place or in their dtype."""
    if logits.is_cuda:
        return softmax.loss_and_gradient_(logits, targets, scale, softcap), logits
    final = logits.float() * scale
    slope: Tensor | float = scale
    if softcap is not None:
        final = softcap * torch.tanh(final / softcap)
        slope = (1 - (final / softcap) ** 2) * scale
    logsumexp = final.logsumexp(dim=-1, keepdim=True)
    counts, wanted = targets[:, None] >= 0, targets[:, None].clamp_min(0)
    losses = ((logsumexp - final.gather(1, wanted)) * counts).squeeze(1)
    gradient = (final - logsumexp).exp_()
    gradient.scatter_add_(1, wanted, gradient.new_full((targets.numel(), 1), -1.0))
    return losses, (gradient * slope * counts).to(logits.dtype)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        logit_scale: float,
        softcap: float | None,
        chunk: int,
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for first in range(0, hidden.shape[0], chunk):
            part = hidden[first : first + chunk]
            logits = part @ weight.t() if bias is None else torch.addmm(bias, part, weight.t())  # (chunk, vocabulary)
            losses, gradient = _loss_and_gradient(logits, targets[first : first + chunk], logit_scale, softcap)
            total += losses.sum()
            if grad_hidden is not None:
                torch.mm(gradient, weight, out=grad_hidden[first : first + chunk])
            del logits, gradient
        ctx.save_for_backward(grad_hidden)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_hidden,) = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = (grad_hidden * grads[0]).to(grad_hidden.dtype)
        return grad_hidden, None, None, None, None, None, None


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Sum over tokens of -log softmax(f(hidden W^T + b))[target] in nats; differentiable in `hidden`.

    Args:
        hidden: (tokens, size) in the compute dtype.
        weight: (vocabulary, size), frozen, in the compute dtype.
        bias: (vocabulary,) or None.
        targets: (tokens,) int64; a negative one counts nothing.
        logit_scale: Factor on the logits, before the cap.
        softcap: Logits become softcap * tanh(logits / softcap); None for none.
        chunk: Tokens whose logits are held at once; by default those of `chunk_tokens`.

    Returns:
        fp32 scalar.
    """
    chunk = chunk or chunk_tokens(weight.shape[0], hidden.element_size())
    return _LinearCrossEntropy.apply(hidden, weight, bias, targets, logit_scale, softcap, chunk)
