"""Language-model head: found by trial, verified against the model's logits, with a loss over trained positions only."""

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qlora_cli.core.device import dtype_name
from qlora_cli.core.engine.fsdp import gathered, is_sharded
from qlora_cli.errors import ModelError, first_line
from qlora_cli.kernels.cross_entropy import chunk_tokens, linear_cross_entropy

TIMED_TOKENS = 4096
LEAST_SENSITIVITY = 1e-5  # to a later token, by that to the others, from which it counts


@dataclass(frozen=True)
class Head:
    """How hidden states become logits.

    Attributes:
        module: The output embeddings, maybe wrapped by PEFT.
        logit_scale: Factor on its output.
        softcap: Then softcap * tanh(logits / softcap); None for none.
        frozen: Whether it is a plain nn.Linear without trained parameters, which the fused loss takes.
    """

    module: Any
    logit_scale: float
    softcap: float | None
    frozen: bool

    def logits(self, hidden: Tensor) -> Tensor:
        """(tokens, size) to (tokens, vocabulary)."""
        logits = self.module(hidden) * self.logit_scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def loss(self, hidden: Tensor, targets: Tensor, wide: bool = False) -> Tensor:
        """Cross-entropy in nats summed over `targets` (tokens,), for hidden (tokens, size): an fp32 scalar.

        `wide` has a frozen head on a card take more tokens at once: see `chunk_tokens`.
        """
        if self.frozen:
            with gathered(self.module):
                weight = self.module.weight
                return linear_cross_entropy(
                    hidden.to(weight.dtype),
                    weight,
                    self.module.bias,
                    targets,
                    logit_scale=self.logit_scale,
                    softcap=self.softcap,
                    chunk=chunk_tokens(weight.shape[0], weight.element_size(), wide=wide and weight.is_cuda),
                )
        # A trained head: chunks as well, but through autograd, each made again in the backward pass.
        size = chunk_tokens(self.module.weight.shape[0], hidden.element_size())
        losses = [
            checkpoint(self._chunk_loss, h, t, use_reentrant=False)
            for h, t in zip(hidden.split(size), targets.split(size), strict=True)
        ]
        return torch.stack(losses).sum()

    def _chunk_loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(hidden).float(), targets, reduction="sum")


def time_head(head: Head | None, tokens: int) -> float | None:
    """Seconds that a CUDA device takes for the logits of so many tokens, their loss and its gradient, by a few of them; None
    without a frozen head, or the memory to try it."""
    if head is None or not head.frozen or not head.module.weight.is_cuda:
        return None
    weight, few = head.module.weight, min(tokens, TIMED_TOKENS)
    with suppress(torch.OutOfMemoryError):
        # No zeros, with which products are faster; nor random numbers, which a run draws.
        hidden = torch.linspace(-1, 1, few * weight.shape[1], dtype=weight.dtype, device=weight.device)
        hidden = hidden.view(few, -1).requires_grad_()
        targets = torch.arange(few, device=weight.device) % weight.shape[0]
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(2):
            begin.record()
            torch.autograd.backward(head.loss(hidden, targets), inputs=[hidden])
            end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000 * tokens / few
    return None


def _transforms(config: Any) -> list[tuple[float, float | None]]:
    """(scale, cap) pairs this config may mean; the one that reproduces the model's own logits is used."""
    cap = getattr(config, "final_logit_softcapping", None)
    scales = [1.0]
    if scale := getattr(config, "logit_scale", None):
        scales.append(float(scale))
    if divisor := getattr(config, "logits_scaling", None):
        scales += [1.0 / float(divisor), float(divisor)]
    caps = [None, float(cap)] if cap else [None]
    return [(scale, cap) for cap in reversed(caps) for scale in reversed(scales)]


@torch.no_grad()
def find_head(base: Any, decoder: Any, inputs: dict[str, Tensor]) -> Head | None:
    """The head that, after the decoder, reproduces the model's logits on `inputs`; None when none does.

    Raises:
        ModelError: The logits are not finite, or depend on later tokens.
    """
    require_causal(base, inputs)
    module = base.get_output_embeddings()
    if module is None:
        return None
    training = base.training
    base.eval()
    try:
        wanted = base(**inputs, use_cache=False).logits.float()
        if not bool(torch.isfinite(wanted.sum())):
            raise ModelError(
                f"The model's output is not a number in {dtype_name(next(decoder.parameters()).dtype)}.",
                "Try another --compute-dtype: float16 ends at 65,504, bfloat16 where float32 does.",
            )
        hidden = decoder(**inputs, use_cache=False).last_hidden_state
        plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward  # sharded or not
        frozen = plain and not any(p.requires_grad for p in module.parameters())
        for scale, cap in _transforms(base.config.get_text_config()):
            head = Head(module, scale, cap, frozen)
            got = head.logits(hidden).float()
            # Exact but for the rounding of one elementwise product in the compute dtype.
            close = torch.finfo(hidden.dtype).eps * 4
            if got.shape == wanted.shape and torch.allclose(got, wanted, rtol=close, atol=close * float(wanted.std())):
                return head
    finally:
        base.train(training)
    return None


def require_causal(base: Any, inputs: dict[str, Tensor]) -> None:
    """Tries out that no prediction depends on the tokens behind it; not where the base is sharded, whose backward pass
    is a whole step's.

    Models that read in both directions (BERT and its kin without `is_decoder`, XLM) would learn to copy the token they
    are to predict. Looked at is the derivative, which is zero where attention is masked, to the last bit: values change
    by rounding, and with it the experts that a token goes to.

    Args:
        base: A causal language model, its adapter inside.
        inputs: One row of `input_ids`, or of `inputs_embeds` with what goes beside them.

    Raises:
        ModelError: Predictions depend on later tokens, or the model's own code fails.
    """
    if is_sharded(base):
        return
    leaves: list[Tensor] = []

    def cut(_module: Any, _inputs: Any, embedded: Tensor) -> Tensor:
        leaves.append(embedded.detach().requires_grad_())
        return leaves[-1].clone()  # which a model may change in place

    embedding, training = base.get_input_embeddings(), base.training
    hook = embedding.register_forward_hook(cut)
    base.eval()
    try:
        with torch.enable_grad():
            if "inputs_embeds" in inputs:
                inputs = inputs | {"inputs_embeds": cut(None, None, inputs["inputs_embeds"])}
            logits = base(**inputs, use_cache=False).logits[0, :-1].float()
            # Of a sum the derivative may vanish: a norm takes the mean out.
            sensitivity = torch.autograd.grad((logits * logits.detach()).sum(), leaves[0])[0].abs().amax(-1)[0]
    except RuntimeError:  # no memory, or no derivative: training's own trials meet it as well, and say what helps
        return
    except (TypeError, AttributeError, ValueError, LookupError) as error:
        if "input_ids" not in inputs:  # some models want these
            raise
        raise ModelError(
            f"{base.config.model_type} does not run on a base in 4 bits: its own code ends in {type(error).__name__} "
            f"({first_line(error)}).",
            "Give --model another one.",
        ) from error
    finally:
        hook.remove()
        base.train(training)
    if bool(sensitivity[-1] > LEAST_SENSITIVITY * sensitivity.max()):
        raise ModelError(
            f"{base.config.model_type} is no causal language model: its predictions depend on the tokens behind them.",
            "Give --model a decoder such as llama, gpt_neox, falcon, mistral, qwen3 or gemma3.",
        )


def trained_positions(labels: Tensor, count: int, next_label: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Where the hidden state of a trained token's predecessor is, and the token, without asking the device how many.

    Args:
        labels: (rows, length) int64, -100 where untrained; a row's first label always is.
        count: How many labels are trained, or more.
        next_label: (rows, 1), of what follows in another rank's part; then `count` is exact, or 1 where none is trained.

    Returns:
        Indices into the flattened (rows * length), and targets: (count,) int64 each, in order; beyond the trained
        ones, the last place and -100.
    """
    if next_label is None:
        targets = F.pad(labels[:, 1:], (0, 1), value=-100).flatten()
    else:
        targets = torch.cat([labels[:, 1:], next_label], dim=1).flatten()
    trained = targets != -100
    # The k-th trained place is written to place k of the result, every other one to the place past its end.
    order = torch.where(trained, trained.cumsum(0) - 1, count)
    last = order.numel() - 1  # not trained where any place is left open: nothing follows it
    places = torch.arange(last + 1, device=order.device)
    positions = order.new_full((count + 1,), last).scatter_(0, order, places)[:count]
    return positions, targets[positions]
