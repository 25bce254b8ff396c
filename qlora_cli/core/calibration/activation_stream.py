"""Hidden states of some rows on their way through a decoder, moved one layer at a time, so that a layer may change first."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qlora_cli.core.device import read_free_bytes
from qlora_cli.core.engine.decoder_layers import LayerCall, find_layers
from qlora_cli.core.engine.lora_linear import noted_calls
from qlora_cli.core.models.structure import find_decoder
from qlora_cli.errors import ModelError, first_line

HOST = torch.device("cpu")
PROBE_TOKENS = 16
RESIDENT_SHARE = 1 / 16  # of free memory, that a stream which may stay on the device may take


class ActivationStream:
    """The inputs of every layer of a decoder over some batches, of which one layer's are held at a time.

    Attributes:
        layers: The decoder's.
        batches: How many batches there are.
        counted: How many of them, from the first, `watch` looks at; all by default.
    """

    def __init__(self, base: Any, batches: Sequence[Tensor], *, may_stay: bool = False) -> None:
        """Looks up the embeddings and what each layer is called with.

        Args:
            base: A causal language model in evaluation mode, adapted or not.
            batches: (rows, length) int64 token ids each; padding, if any, behind.
            may_stay: Whether hidden states stay on the device where they are small beside what is free there; else they
                lie on the host.

        Raises:
            ModelError: The model is no stack of layers that take hidden states, (rows, length, size), in front.
        """
        decoder = find_decoder(base)
        self.layers = find_layers(decoder)
        self.batches = self.counted = len(batches)
        self._base, self._batches = base, batches
        self._device = base.device
        # Hidden states of each batch, and what the layers are called with beside them, one a layer.
        started = [self._start(decoder, batch) for batch in batches]
        self._hidden: list[Tensor] = [hidden for hidden, _ in started]
        stays = may_stay and sum(h.nbytes for h in self._hidden) <= RESIDENT_SHARE * read_free_bytes(self._device)
        self._home = self._device if stays else HOST
        self._hidden = [hidden.to(self._home) for hidden in self._hidden]
        self._calls: list[list[LayerCall]] = [calls for _, calls in started]
        self._probe = self._start(decoder, batches[0][:1, :PROBE_TOKENS])
        self._at = 0

    def _start(self, decoder: nn.Module, batch: Tensor) -> tuple[Tensor, list[LayerCall]]:
        calls: list[LayerCall] = []

        def note(_: nn.Module, args: tuple, kwargs: dict) -> None:
            calls.append(LayerCall(args, kwargs))

        with noted_calls(self.layers, note), skipped(self.layers), torch.no_grad(), calling_layers():
            decoder(input_ids=batch.to(self._device), use_cache=False)
        shapes = [tuple(call.args[0].shape[:2]) if call.args else () for call in calls]
        if not self.layers or shapes != [tuple(batch.shape)] * len(self.layers):
            raise ModelError("Its layers are not called one after another with hidden states in front.")
        return calls[0].args[0].cpu(), [LayerCall(call.args[1:], call.kwargs) for call in calls]

    def _outputs(self, hidden: Tensor, call: LayerCall) -> Tensor:
        with torch.no_grad(), calling_layers():
            out = self.layers[self._at](hidden.to(self._device), *call.args, **call.kwargs)
        return out[0] if isinstance(out, tuple | list) else out

    def outputs(self, batch: int) -> Tensor:
        """The next layer's output of one batch, (rows, length, size), on the device."""
        return self._outputs(self._hidden[batch], self._calls[batch][self._at])

    def probe(self) -> Tensor:
        """Runs the next layer on a few tokens, not those that come to it: to see which of its modules read what.

        Returns:
            What it gives, (1, tokens, size), on the device.
        """
        hidden, calls = self._probe
        return self._outputs(hidden, calls[self._at])

    def watch(self, note: Callable[[nn.Module, tuple, dict], None], modules: Sequence[nn.Module]) -> None:
        """Runs the next layer over the batches that count, each call of these modules in it noted."""
        with noted_calls(modules, note):
            for batch in range(self.counted):
                self.outputs(batch)

    def logits(self, batch: int) -> Tensor:
        """What the model makes of a batch's hidden states once every layer is behind them, (rows, length, vocabulary)."""
        *others, last = self.layers
        hidden = self._hidden[batch].to(self._device)
        with skipped(others), torch.no_grad(), calling_layers():
            hook = last.register_forward_hook(
                lambda _, __, out: (hidden, *out[1:]) if isinstance(out, tuple | list) else hidden, prepend=True
            )
            try:
                return self._base(input_ids=self._batches[batch].to(self._device), use_cache=False).logits
            finally:
                hook.remove()

    def advance(self) -> None:
        """Moves every batch through the next layer, as that is now."""
        for batch in range(self.batches):
            self._hidden[batch] = self.outputs(batch).to(self._home)
        self._at += 1


@contextmanager
def calling_layers() -> Iterator[None]:
    """Inside the block what a model's own code raises, where layers do not bear to be called apart, is a ModelError."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, AttributeError, ValueError, LookupError) as error:
        raise ModelError(
            f"Its layers cannot be called one by one ({type(error).__name__}: {first_line(error)})."
        ) from error


@contextmanager
def skipped(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Inside the block layers hand their hidden states on as they are, the first one excepted, which really runs."""
    length = 0  # of the tuple that a layer gives; 0 for a tensor

    def remember(_: nn.Module, __: Any, out: Any) -> None:
        nonlocal length
        length = len(out) if isinstance(out, tuple | list) else 0

    def pass_on(*args: Any, **named: Any) -> Any:
        hidden = args[0] if args else next(iter(named.values()))
        return (hidden, *[None] * (length - 1)) if length else hidden

    hook = layers[0].register_forward_hook(remember) if layers else None
    try:
        with replaced_forwards(dict.fromkeys(layers[1:], pass_on)):
            yield
    finally:
        if hook is not None:
            hook.remove()


@contextmanager
def replaced_forwards(forwards: Mapping[nn.Module, Callable]) -> Iterator[None]:
    """Inside the block modules run these, and afterwards what they ran before."""
    before = {module: vars(module)["forward"] for module in forwards if "forward" in vars(module)}
    for module, forward in forwards.items():
        vars(module)["forward"] = forward
    try:
        yield
    finally:
        for module in forwards:
            del vars(module)["forward"]
        for module, forward in before.items():
            vars(module)["forward"] = forward
