"""Engine of a training step: turns a micro-batch into its loss, for one model instance; nothing global is patched."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_cli.core.device import memory_error
from qlora_cli.core.distributed.context_group import context_of
from qlora_cli.core.engine.calibration import LEAST_TRIAL_TOKENS
from qlora_cli.core.engine.fast import HEAD_TRIAL_TOKENS, FastEngine
from qlora_cli.core.engine.fsdp import is_sharded
from qlora_cli.core.engine.lm_head import require_causal
from qlora_cli.core.engine.memory_plan import count_recomputed_layers
from qlora_cli.core.matmul.choice import ProductRecord, ProductTrial
from qlora_cli.core.models.structure import underlying_model
from qlora_cli.core.streaming.streamed_base import streamed_base_of
from qlora_cli.errors import TrainingError, UsageError, first_line
from qlora_cli.events import Caution, Report
from qlora_cli.kernels.embedding_noise import add_noise
from qlora_cli.settings.groups import StepSettings

if TYPE_CHECKING:
    from qlora_cli.core.data.packing import MicroBatch


@contextmanager
def set_aside(model: nn.Module) -> Iterator[None]:
    """Inside the block every module of a model computes as its class does, whatever an engine put in place of that; what
    is put in place meanwhile is gone afterwards."""
    before = {module: module.__dict__.pop("forward") for module in model.modules() if "forward" in module.__dict__}
    try:
        yield
    finally:
        for module in model.modules():
            module.__dict__.pop("forward", None)
        for module, forward in before.items():
            module.__dict__["forward"] = forward


class Engine(Protocol):
    """What the training loop needs of a step.

    Attributes:
        products: How linear layers are multiplied, where that was chosen; None for in the compute dtype.
        compiled: Whether layers are.
    """

    products: ProductRecord | None
    compiled: bool

    def prepare(self, batch: "MicroBatch") -> "MicroBatch":
        """The same batch, with what the host does for it done: best while the device computes another."""

    def loss(self, batch: "MicroBatch") -> Tensor:
        """Cross-entropy in nats, summed over the batch's trained tokens: a differentiable fp32 scalar."""

    def next_logits(self, batch: "MicroBatch") -> Tensor:
        """Logits of the token after each row of a batch, (rows, vocabulary); without gradients, in evaluation mode."""

    def reduce_memory(self) -> bool:
        """Gives up speed for memory, after memory ran out; returns whether there was anything left to give up."""

    def describe(self) -> str:
        """One line: which fast paths are in use."""

    def close(self) -> None:
        """Puts the model instance back as it was."""


def install_engine(
    model: nn.Module,
    settings: StepSettings,
    *,
    device: torch.device,
    compute_dtype: torch.dtype,
    max_tokens: int,
    total_steps: int,
    optimizer_bytes: int = 0,
    trial: ProductTrial | None = None,
    report: Report,
) -> Engine:
    """Prepares one instance of a causal language model, usually wrapped by PEFT, for training steps on its `device`.

    What `settings` leave open is decided here, by memory and by the length of the run.

    Args:
        compute_dtype: Of the base model's arithmetic.
        max_tokens: In one micro-batch.
        total_steps: Of the optimizer, still to run.
        optimizer_bytes: Of state that the optimizer has yet to allocate on the device.
        trial: What arithmetic of the linear layers is chosen by; None for random rows.

    Raises:
        UsageError: A setting is not one of those there are.
        TrainingError: There is not the memory to try a layer out.
    """
    if settings.engine == "plain":
        if settings.matmul == "fp8":
            raise UsageError("The plain engine does not multiply in fp8.", "Leave out --engine plain or --matmul fp8.")
        return PlainEngine(model, settings, device=device)
    if settings.engine != "fast":
        raise UsageError(f"There is no engine {settings.engine!r}.", "Use --engine fast or --engine plain.")
    try:
        return FastEngine(
            model,
            settings,
            device=device,
            compute_dtype=compute_dtype,
            max_tokens=max_tokens,
            total_steps=total_steps,
            optimizer_bytes=optimizer_bytes,
            trial=trial or ProductTrial(),
            report=report,
        )
    except torch.OutOfMemoryError as error:
        raise memory_error(
            TrainingError,
            f"Beside the model's weights there is no room on the device to run one layer on {LEAST_TRIAL_TOKENS} "
            f"tokens ({first_line(error).rstrip('.')}).",
            "Give more memory with --vram, or take a smaller model.",
            device,
        ) from error
    except (RuntimeError, TypeError, AttributeError, ValueError, LookupError) as error:
        if _needs_fast_engine(underlying_model(model), settings):
            raise
        report(
            Caution(
                f"The fast engine does not run this model ({type(error).__name__}: {first_line(error)}): it is trained as "
                "with --engine plain, which is slower and takes more memory."
            )
        )
        return PlainEngine(model, settings, device=device)


def _needs_fast_engine(base: Any, settings: StepSettings) -> bool:
    """Whether the base is held in a way, or something was asked for, that the plain engine would leave out."""
    held = is_sharded(base) or streamed_base_of(base) is not None or context_of(base) is not None
    return held or settings.matmul == "fp8"


class PlainEngine:
    """`Engine` of the model's own forward over padded rows, logits in full, cross-entropy in fp32: the reference."""

    def __init__(self, model: Any, settings: StepSettings, *, device: torch.device) -> None:
        self.model, self.device, self.noise_alpha = model, device, settings.neftune_noise_alpha
        self.products: ProductRecord | None = None
        self.compiled = False
        # Inputs that name each token's kind, all zero for text, which the model does not go without.
        self.types: set[str] = set()
        base = underlying_model(model)
        ids = torch.arange(HEAD_TRIAL_TOKENS, device=device) % base.get_input_embeddings().weight.shape[0]
        require_causal(base, {"input_ids": ids[None]})
        self.recompute = bool(count_recomputed_layers(settings, layers=1, on_cuda=device.type == "cuda"))
        if self.recompute:
            # Non-reentrant: gradients flow although the embeddings' output does not require any.
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def prepare(self, batch: "MicroBatch") -> "MicroBatch":
        return batch

    def loss(self, batch: "MicroBatch") -> Tensor:
        input_ids, attention_mask, labels = batch.to(self.device, non_blocking=True).padded()  # (rows, longest) each
        with self._noise(attention_mask):
            logits = self._logits(input_ids, attention_mask)
        return F.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
        )

    def _logits(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits, (rows, longest, vocabulary)."""
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask} | dict.fromkeys(self.types, input_ids * 0)
        try:
            logits: Tensor = self.model(**inputs, use_cache=False).logits
        except ValueError as error:
            # Molmo2 trains on nothing that does not say which tokens are of images, and of text that is none.
            wanted = set(re.findall(r"`(\w*token_type_ids)` is required", str(error))) - inputs.keys()
            if not wanted:
                raise
            self.types |= wanted
            return self._logits(input_ids, attention_mask)
        return logits

    @contextmanager
    def _noise(self, attention_mask: Tensor) -> Iterator[None]:
        """Inside the block the embeddings of a training step are noisy where that was asked for."""
        if not (self.noise_alpha and self.model.training):
            yield
            return
        lengths = attention_mask.sum(dim=1, keepdim=True)
        hook = self.model.get_input_embeddings().register_forward_hook(
            lambda _, __, embedded: add_noise(embedded, lengths, self.noise_alpha)
        )
        try:
            yield
        finally:
            hook.remove()

    def next_logits(self, batch: "MicroBatch") -> Tensor:
        input_ids, attention_mask, _ = batch.to(self.device, non_blocking=True).padded()
        logits = self._logits(input_ids, attention_mask)
        return logits[torch.arange(len(logits), device=logits.device), attention_mask.sum(1) - 1]

    def reduce_memory(self) -> bool:
        return False

    def describe(self) -> str:
        return "plain" + (", gradient checkpointing" if self.recompute else "")

    def close(self) -> None:
        if self.recompute:
            self.model.gradient_checkpointing_disable()
