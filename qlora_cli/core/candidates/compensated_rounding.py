"""Rounding of a decoder layer in which each weight makes up for what was lost in front of it.

Some rows go through the layer twice: in the model as it was trained, and in the rounded one, whose layers in front and
whose weights that are called before are rounded already. So a weight is given other inputs, x' for x, and what it should
give is what the trained model gives. A weight that writes to the stream of hidden states makes up for all that the stream
lacks by then; any other for its inputs, as GPTAQ does (https://arxiv.org/abs/2504.02692). Both are least squares: the
weight that is rounded is W + E[d x'ᵀ] E[x' x'ᵀ]⁻¹, d being what its output lacks. How much of it holds on other rows is
measured on some that were left out, and that share is taken.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qlora_cli.core.calibration.activation_stream import ActivationStream, replaced_forwards
from qlora_cli.core.calibration.low_rank import SecondMoment
from qlora_cli.core.calibration.rounding import damped_moment
from qlora_cli.core.engine.lora_linear import group_by_input, noted_calls

Round = Callable[[Mapping[str, Tensor], SecondMoment | None], Mapping[str, Tensor]]
Replace = Callable[
    [Mapping[str, Tensor]], AbstractContextManager[None]
]  # a context, to be entered as often as one likes, in which linear layers compute with these weights

CHECKED_BATCHES = 4  # of so many one is left out, to see what holds on it
LEAST_SHARE, MOST_STRAY = 1e-3, 0.05  # of a change of a linear's output that comes to the stream; of what comes besides


@dataclass
class Shortfall:
    """What an output lacks, against the inputs that it is to be made up from: sums over tokens.

    Attributes:
        moment: Of the inputs x'.
        products: Σ d x'ᵀ, (size of d, in) float32.
    """

    moment: SecondMoment = field(default_factory=SecondMoment)
    products: Tensor | None = None

    def add(self, lacking: Tensor | None, x: Tensor) -> None:
        """Adds tokens: d (tokens, size), if it is known, and x' (tokens, in)."""
        self.moment.add_inputs(x)
        if lacking is not None:
            product = lacking.float().T @ x.float()
            self.products = product if self.products is None else self.products.add_(product)

    def merge(self, other: "Shortfall") -> None:
        """Adds the sums of other tokens."""
        for name in ("inputs", "squares"):
            mine, theirs = getattr(self.moment, name), getattr(other.moment, name)
            setattr(self.moment, name, theirs if mine is None else mine if theirs is None else mine.add_(theirs))
        self.moment.tokens += other.moment.tokens
        if self.products is not None and other.products is not None:
            self.products.add_(other.products)

    def answer(self) -> Tensor:
        """(size of d, in): the matrix that gives most of d from x', by damped least squares."""
        assert self.products is not None and self.moment.squares is not None
        root = torch.linalg.cholesky(damped_moment(self.moment))
        return torch.cholesky_solve((self.products / self.moment.squares.clamp(min=1e-30)).T, root).T

    def share_of(self, answer: Tensor) -> float:
        """The factor, 0 to 1, with which an answer found on other tokens leaves the least of d on these."""
        assert self.products is not None and self.moment.inputs is not None
        along = float((answer * self.products).sum())
        square = float(((answer @ self.moment.inputs) * answer).sum())
        return min(1.0, max(0.0, along / square)) if square > 0 else 0.0


def round_layer(
    live: ActivationStream,
    rounded: ActivationStream,
    linears: Callable[[], Mapping[str, Any]],
    weights: Mapping[str, Tensor],
    replaced: Replace,
    round_weights: Round,
) -> dict[str, Tensor]:
    """The weights of the next layer as they are written, rounded in the order of their calls.

    Args:
        live: Rows on their way through the model as it was trained.
        rounded: The same rows in the rounded model, at the same layer.
        linears: The layer's linear layers by name, as they are when it is called.
        weights: Merged, (out, in) on the device, by the same names.
        replaced: Has the layers compute with weights inside a block, without their adapters; one context, many blocks.
        round_weights: Receives weights (out, in) float32 that read the same inputs, and the second moment of those, and
            gives what is computed with instead.
    """
    now = dict(weights)
    inside = replaced(now)
    with inside:
        names = {id(module): name for name, module in linears().items()}
        groups = [[names[id(m)] for m in group] for group in group_by_input(linears().values(), rounded.probe)]
    called = {name for group in groups for name in group}
    waiting = [name for name in weights if name in called]
    for group in groups:
        waiting = [name for name in waiting if name not in group]
        share = None
        if len(group) == 1:
            with inside, silenced([linears()[name] for name in waiting]):
                share = share_of_stream(rounded, linears()[group[0]])
        silent = waiting if share else [*waiting, *group]
        found = _gather(live, rounded, linears, group[0], silent, inside, through_stream=bool(share))
        answer, moment = _settle(*found)
        wanted = {name: now[name].float() for name in group}
        if answer is not None:
            wanted = {name: w + (answer / share if share else w @ answer) for name, w in wanted.items()}
        now |= {name: value.to(now[name].dtype) for name, value in round_weights(wanted, moment).items()}
        inside = replaced(now)
    for name in weights.keys() - called:  # none or several calls: as it is
        with replaced(now):
            moment = _plain_moment(rounded, linears()[name])
        now |= {n: v.to(now[n].dtype) for n, v in round_weights({name: now[name].float()}, moment).items()}
    return now


def _gather(
    live: ActivationStream,
    rounded: ActivationStream,
    linears: Callable[[], Mapping[str, Any]],
    reader: str,
    silent: Sequence[str],
    inside: AbstractContextManager[None],
    *,
    through_stream: bool,
) -> tuple[Shortfall, Shortfall]:
    """What is lacking at one linear layer's inputs, or at the layer's end, over batches to find an answer on and others.

    Linear layers that are called later give zeros meanwhile, so that the layer's end is the stream behind this one.
    """
    parts = Shortfall(), Shortfall()
    batches, comparable = rounded.counted, True
    for batch in range(batches):
        inputs, ends = [], []
        for stream, context in ((live, nullcontext()), (rounded, inside)):
            with context:
                modules = linears()
                with silenced([modules[name] for name in silent]), _noted(modules[reader]) as calls:
                    ends.append(stream.outputs(batch).float())
                inputs.append(calls)
        if not inputs[1]:
            continue  # no token came to it
        x, lacking = inputs[1][0], None
        comparable = comparable and [x.shape] == [call.shape for call in inputs[0]]
        if comparable:
            lacking = (ends[0] - ends[1] if through_stream else inputs[0][0].float() - x.float()).flatten(0, -2)
        left_out = batch % CHECKED_BATCHES == CHECKED_BATCHES - 1 or (batch == batches - 1 < CHECKED_BATCHES - 1)
        parts[left_out].add(lacking, x.flatten(0, -2))
    if not comparable:  # such as experts, to which other tokens came
        for part in parts:
            part.products = None
    return parts


def _settle(found: Shortfall, checked: Shortfall) -> tuple[Tensor | None, SecondMoment]:
    """The answer to what is lacking, as far as it holds on tokens that it was not found on, and the moment of all."""
    share = 0.0
    if found.products is not None and checked.products is not None:
        share = checked.share_of(found.answer())
    found.merge(checked)
    if not share or found.products is None:
        return None, found.moment
    answer = share * found.answer()
    return (answer if answer.isfinite().all() else None), found.moment


def _plain_moment(stream: ActivationStream, module: nn.Module) -> SecondMoment:
    moment = SecondMoment()
    stream.watch(lambda _, args, __: moment.add_inputs(args[0].detach().flatten(0, -2)), [module])
    return moment


def share_of_stream(stream: ActivationStream, module: nn.Module) -> float | None:
    """The factor with which a linear layer's output comes to the next layer's, as a sum; None where it does not come so.

    It is seen by a change of the output, some noise, which has to arrive as it is: past a norm it would not.
    """
    before = stream.probe()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(before.shape, generator=generator).to(before) * before.float().square().mean().sqrt()

    def add_noise(_: nn.Module, __: tuple, out: Tensor) -> Tensor:
        return out + noise if out.shape == noise.shape else out

    handle = module.register_forward_hook(add_noise)
    try:
        change = (stream.probe() - before).float()
    finally:
        handle.remove()
    whole = float(noise.float().square().sum())
    share = float((change * noise).sum()) / whole if whole else 0.0
    stray = float((change - share * noise).square().sum())
    return share if abs(share) > LEAST_SHARE and stray <= (MOST_STRAY * share) ** 2 * whole else None


def silenced(modules: Sequence[Any]) -> AbstractContextManager[None]:
    """Linear layers giving zeros inside the block."""

    def zeros(x: Tensor, *_: Any, size: int, **__: Any) -> Tensor:
        return x.new_zeros(*x.shape[:-1], size)

    return replaced_forwards({module: partial(zeros, size=module.out_features) for module in modules})


@contextmanager
def _noted(module: nn.Module) -> Iterator[list[Tensor]]:
    """What a module is called with inside the block."""
    inputs: list[Tensor] = []
    with noted_calls([module], lambda _, args, __: inputs.append(args[0].detach())):
        yield inputs
