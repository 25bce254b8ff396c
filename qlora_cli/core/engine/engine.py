"""A model with an adapter in, an `Engine` out that turns micro-batches into losses; nothing is patched globally."""

from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_cli.core.engine.calibration import EngineOptions
from qlora_cli.core.engine.fast import FastEngine
from qlora_cli.core.engine.trials import LEAST_TRIAL_TOKENS
from qlora_cli.errors import TrainingError, UsageError, first_line
from qlora_cli.events import Report

if TYPE_CHECKING:
    from qlora_cli.core.data.packing import MicroBatch


class Engine(Protocol):
    """What the training loop needs of a step."""

    def prepare(self, batch: "MicroBatch") -> "MicroBatch":
        """The same batch, with what the host does for it done: best while the device computes another."""
        ...

    def loss(self, batch: "MicroBatch") -> Tensor:
        """Cross-entropy in nats, summed over the batch's trained tokens: a differentiable fp32 scalar."""
        ...

    def reduce_memory(self) -> bool:
        """Gives up speed for memory, after it ran out. False where nothing is left to give up."""
        ...

    def describe(self) -> str:
        """One line: which fast paths are in use."""
        ...

    def close(self) -> None:
        """Puts the model instance back as it was."""
        ...


def install_engine(
    model: nn.Module,
    *,
    kind: str,
    device: torch.device,
    compute_dtype: torch.dtype,
    gradient_checkpointing: str = "auto",
    offload_activations: bool | None = None,
    offload_embeddings: bool | None = None,
    resident_weights: bool | None = None,
    compile: bool | None = None,
    max_tokens: int,
    total_steps: int,
    optimizer_bytes: int = 0,
    report: Report,
) -> Engine:
    """Prepares one model instance for training steps.

    Args:
        model: A transformers causal language model, usually wrapped by PEFT, on `device`.
        kind: "fast", or "plain" for the model's own forward on padded rows.
        device: Where the model computes.
        compute_dtype: Dtype of the base model's arithmetic.
        gradient_checkpointing: "auto", "on", "off", or how many decoder layers are recomputed.
        offload_activations: Whether checkpointed activations wait in pinned host memory; None decides by memory.
        offload_embeddings: Whether the input embeddings stay on the host; None decides by memory.
        resident_weights: Whether dequantised weights stay in memory; None decides by memory.
        compile: Whether decoder layers are compiled; None decides by the length of the run.
        max_tokens: Most tokens in one micro-batch.
        total_steps: Optimizer steps still to run.
        optimizer_bytes: Of state that the optimizer has yet to allocate on the device.
        report: Receives notices of what was decided.

    Raises:
        UsageError: A value is not one of the above.
        TrainingError: There is not the memory to try a layer out.
    """
    if kind == "plain":
        return PlainEngine(model, device=device, gradient_checkpointing=gradient_checkpointing)
    if kind == "fast":
        options = EngineOptions(
            compute_dtype=compute_dtype,
            recomputed=lambda layers: count_recomputed_layers(gradient_checkpointing, layers),
            offload_activations=offload_activations,
            offload_embeddings=offload_embeddings,
            resident_weights=resident_weights,
            compile=compile,
            max_tokens=max_tokens,
            total_steps=total_steps,
            optimizer_bytes=optimizer_bytes,
        )
        try:
            return FastEngine(model, options, device=device, report=report)
        except torch.OutOfMemoryError as error:
            raise TrainingError(
                f"Beside the model's weights there is no room on the device to run one layer on {LEAST_TRIAL_TOKENS} "
                f"tokens ({first_line(error)})",
                "Give more memory with --vram, close what else uses the card, or take a smaller model.",
            ) from error
    raise UsageError(f"There is no engine {kind!r}.", "Use --engine fast or --engine plain.")


def count_recomputed_layers(gradient_checkpointing: str, layers: int) -> int | None:
    """How many of `layers` decoder layers are recomputed in the backward pass; None leaves it to the engine.

    Raises:
        UsageError: Neither a word nor a number of layers.
    """
    words = {"auto": None, "on": layers, "off": 0}
    if gradient_checkpointing in words:
        return words[gradient_checkpointing]
    if gradient_checkpointing.isdecimal():
        return min(int(gradient_checkpointing), layers)
    raise UsageError(
        f"--gradient-checkpointing is {gradient_checkpointing!r}.",
        "Use auto, on, off, or a number of layers.",
    )


class PlainEngine:
    """The model's own forward over padded rows, logits in full, cross-entropy in fp32: the truth to compare with."""

    def __init__(self, model: Any, *, device: torch.device, gradient_checkpointing: str) -> None:
        recomputed = count_recomputed_layers(gradient_checkpointing, layers=1)
        self.model, self.device = model, device
        self.recompute = device.type == "cuda" if recomputed is None else recomputed > 0
        if self.recompute:
            # Non-reentrant: gradients flow although the embeddings' output does not require any.
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def prepare(self, batch: "MicroBatch") -> "MicroBatch":
        """See `Engine.prepare`."""
        return batch

    def loss(self, batch: "MicroBatch") -> Tensor:
        """See `Engine.loss`."""
        padded = batch.to(self.device, non_blocking=True).padded()
        input_ids, attention_mask, labels = padded  # (rows, longest) each
        logits = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        return F.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
        )

    def reduce_memory(self) -> bool:
        """See `Engine.reduce_memory`."""
        return False

    def describe(self) -> str:
        """See `Engine.describe`."""
        return "plain" + (", gradient checkpointing" if self.recompute else "")

    def close(self) -> None:
        """See `Engine.close`."""
        if self.recompute:
            self.model.gradient_checkpointing_disable()
