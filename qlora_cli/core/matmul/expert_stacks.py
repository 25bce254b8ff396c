"""Stacks of routed experts that steps multiply in 8 bits, and what that does to them on the rows that a trial sends them."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from math import inf
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qlora_cli.core.adapters.adapter_facts import base_name
from qlora_cli.core.distributed.context_group import context_of
from qlora_cli.core.experts.four_bit_experts import FourBitExperts
from qlora_cli.core.experts.fused_experts import FusedExperts, can_fuse
from qlora_cli.core.experts.grouped_product import Routing, codes_of
from qlora_cli.core.experts.layout import ExpertWeight, share_of_experts
from qlora_cli.core.experts.stack import bytes_at_once, part_of
from qlora_cli.core.experts.unpacked_experts import UnpackedExperts
from qlora_cli.core.matmul.gate import SLICE_BYTES, ProductErrors, code_noise, over_expected, read_errors
from qlora_cli.core.models.quantization import STREAMED
from qlora_cli.errors import first_line
from qlora_cli.kernels import float8
from qlora_cli.kernels.experts.operands import FEW_ROWS, are_few
from qlora_cli.kernels.weights import FrozenWeight

MOST_UNLIKE = 0.5  # of experts in 8 bits, which are off by some 0.1; by 1.4 where a product is of something else


class RoutedStack(NamedTuple):
    """One stack of a layer's experts."""

    module: FourBitExperts
    weight: ExpertWeight

    def values(self) -> FrozenWeight:
        """Its matrices, one below the other."""
        return self.module.stack(self.weight.name).values


def has_many_rows(tokens: float, share: float) -> bool:
    """Whether so many tokens, of whose layer's experts each meets a share, are multiplied in 8 bits: of few rows the 4 bits
    are read on the way, and nothing is rounded to 8."""
    return not are_few(tokens * share, 1)


class ExpertStacks:
    """The stacks of experts of one model instance, of which some are multiplied in 8 bits.

    Attributes:
        found: All that are packed, by name.
        in_8_bits: Names of those that are.
        unpacked: Those that stay unpacked, as they are multiplied.
    """

    def __init__(self, model: Any) -> None:
        context = context_of(model)  # of a micro-batch's tokens each of its ranks has a part
        self.share = share_of_experts(model) / (context.size if context else 1)
        self.found = {
            base_name(f"{name}.{weight.name}"): RoutedStack(module, weight)
            for name, module in model.named_modules()
            if isinstance(module, FourBitExperts)
            for weight in module.expert_weights
        }
        self.in_8_bits: tuple[str, ...] = ()
        self.unpacked = UnpackedExperts(model)
        self._scales: dict[RoutedStack, Tensor] = {}

    def why_not(self, name: str, tokens: float) -> str | None:
        """Why a stack cannot be multiplied in 8 bits, in micro-batches of so many tokens; None where it can."""
        stack = self.found[name]
        if not can_fuse(stack.module) or not float8.covers_stack(stack.values(), stack.weight.experts):
            return "sides or kind"
        return None if has_many_rows(tokens, self.share) else "few rows for each expert"

    def scaled(self, stack: RoutedStack) -> FrozenWeight:
        """A stack as it is multiplied in 8 bits; its scales are of all its constants, which come where they stream."""
        values = stack.values()
        if stack not in self._scales:
            if (bring := stack.module.__dict__.get(STREAMED)) is not None:
                bring()
            scale = float8.with_stack_scale(values, stack.weight.experts).stack_scale
            assert scale is not None
            self._scales[stack] = scale
        return values._replace(stack_scale=self._scales[stack])

    def multiply_in_8_bits(self, names: Iterable[str]) -> None:
        """Has steps multiply these, and no others, in 8 bits from now on."""
        self.put_back()
        self.in_8_bits = tuple(names)
        for stack in map(self.found.__getitem__, self.in_8_bits):
            scale = self.scaled(stack).stack_scale
            assert scale is not None
            stack.module.scales[stack.weight.name] = scale
        self._renew()

    def put_back(self) -> None:
        """Has all of them multiplied in the compute dtype, unpacked anew each time."""
        self.in_8_bits = ()
        self.unpacked.keep(0)
        for module, _ in self.found.values():
            module.scales.clear()
        self._renew()

    def _renew(self) -> None:
        for module in {module for module, _ in self.found.values()}:
            if isinstance(fused := module.__dict__.get("fused"), FusedExperts):
                fused.take_stacks()

    def bytes_beyond(self, layer: nn.Module, itemsize: int) -> int:
        """How many more bytes than any stack of this layer the largest of all takes while it is multiplied, where some
        are in 8 bits; unpacked to the compute dtype it takes `itemsize` a value."""
        inside, taken = set(layer.modules()), {True: 0, False: 0}
        for name, (module, weight) in self.found.items() if self.in_8_bits else ():
            bytes_ = bytes_at_once(weight, 1 if name in self.in_8_bits else itemsize)
            taken[module in inside] = max(taken[module in inside], bytes_)
        return max(0, taken[False] - taken[True])

    def failures(self, names: Iterable[str]) -> dict[str, str]:
        """Why fused experts do not multiply these in 8 bits here after all, by name. `measuring` has what the products are
        to be; a module of each kind runs both ways, as in a step, on a card that may not take the kernels."""
        stacks = {name: self.found[name] for name in names}
        of_kinds: dict[tuple, FourBitExperts] = {}
        kinds: dict[str, tuple] = {}
        for name, (module, _) in stacks.items():
            own = tuple(weight.name for each, weight in stacks.values() if each is module)
            kinds[name] = type(module), module.expert_weights, own, tuple(module.lora)
            if isinstance(module.__dict__.get("fused"), FusedExperts):  # else products are those of the reference
                of_kinds.setdefault(kinds[name], module)
        self.put_back()
        exact = {kind: _both_passes(module) for kind, module in of_kinds.items()}
        self.multiply_in_8_bits(stacks)
        try:
            reasons = {kind: _why_unlike(module, exact[kind]) for kind, module in of_kinds.items()}
        finally:
            self.put_back()
        return {name: reason for name, kind in kinds.items() if (reason := reasons.get(kind))}

    @contextmanager
    def measuring(self, names: Iterable[str]) -> Iterator[Callable[[], dict[str, ProductErrors]]]:
        """Inside the block the modules of these stacks compute plainly, so that each product is seen by itself; gives what
        reads the errors in 8 bits of those that were called, and got a gradient if their outputs need one; else that one's
        is 0."""
        own = {self.found[name]: name for name in names}
        outputs: dict[str, Tensor] = {}
        gradients: dict[str, Tensor] = {}

        def note(stack: RoutedStack, rows: Tensor, routing: Routing, result: Tensor) -> None:
            name = own[stack]
            with torch.no_grad():
                outputs[name] = stack_error(rows.detach(), routing, self.scaled(stack), stack.weight, transposed=False)

            def note_gradient(gradient: Tensor) -> None:
                with torch.no_grad():
                    gradients[name] = stack_error(gradient, routing, self.scaled(stack), stack.weight, transposed=True)

            if result.requires_grad:
                result.register_hook(note_gradient)
            else:
                gradients[name] = outputs[name].new_zeros(())

        def noted(module: FourBitExperts) -> Callable[..., Tensor]:
            def product(name: str, x: Tensor, routing: Routing, expert_ids: Tensor) -> Tensor:
                result = type(module).product(module, name, x, routing, expert_ids)
                stack = RoutedStack(module, module.weight_of(name))
                if stack in own and own[stack] not in outputs:  # a repetition's outputs are those of before
                    note(stack, x, routing, result)
                return result

            return product

        modules = {module for module, _ in own}
        forwards = {module: module.__dict__.pop("forward") for module in modules if "forward" in module.__dict__}
        for module in modules:
            module.__dict__["product"] = noted(module)
        try:
            yield lambda: read_errors(outputs, gradients)
        finally:
            for module in modules:
                del module.__dict__["product"]
            for module, forward in forwards.items():
                module.__dict__["forward"] = forward


def _both_passes(module: FourBitExperts) -> tuple[Tensor, Tensor]:
    """What a module of experts gives, and the gradient of its input, of random tokens that each expert has many rows of."""
    weight = module.expert_weights[0]
    device, choices = getattr(module, weight.name).device, min(2, weight.experts)
    tokens = -(-(FEW_ROWS + 1) * weight.experts // choices)
    generator = torch.Generator(device).manual_seed(0)
    shape, dtype = (tokens, weight.columns), module.compute_dtype
    x, gradient = (torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(2))
    index = torch.arange(tokens * choices, device=device).view(tokens, choices) % weight.experts
    if (bring := module.__dict__.get(STREAMED)) is not None:
        bring()
    with torch.enable_grad():
        out = module(x.requires_grad_(), index, torch.ones(index.shape, dtype=dtype, device=device))
    return out.detach(), *torch.autograd.grad(out, x, gradient)


def _why_unlike(module: FourBitExperts, exact: tuple[Tensor, Tensor]) -> str:
    """Why a module in 8 bits does not give what it gave in the compute dtype; nothing where it does."""
    try:
        found = _both_passes(module)
        errors = [_relative(a, b) for a, b in zip(found, exact, strict=True)]
    except torch.OutOfMemoryError:
        raise
    except Exception as failure:  # of a compiler too, whose kinds of errors are its own
        return f"its kernels fail: {first_line(failure)}"
    error = float(torch.tensor(errors).max())  # NaN if any is
    return "" if error <= MOST_UNLIKE else f"its kernels are off by {error:.2f}"


def _relative(found: Tensor, exact: Tensor) -> float:
    """How far they are apart, as a share of what is exact: nothing where both are zeros, as of experts that are."""
    apart, norm = float((found - exact).float().norm()), float(exact.float().norm())
    return apart / norm if norm else apart and inf


def stack_error(
    rows: Tensor, routing: Routing, stack: FrozenWeight, weight: ExpertWeight, *, transposed: bool
) -> Tensor:
    """Norm of the error of an expert's rows times its W^T, or W, in 8 bits, over what rounding W to 4 bits is expected to
    have changed (`gate.expected_error`), of that expert where it is largest: in a sum over 128 experts one whose matrix is
    lost would not exceed what is expected of the others.

    Args:
        rows: (count, in), or (count, out) where `transposed`, sorted by expert.
        stack: With its scales.
    """
    codes, row_scales = float8.quantise_rows(rows)
    both, bounds = torch.stack([rows.float(), codes.float() * row_scales]), routing.bounds()  # exact and rounded
    error, expected = both.new_zeros(weight.experts), both.new_zeros(weight.experts)
    starts = torch.tensor(bounds, device=rows.device)
    at_once = max(1, SLICE_BYTES // (4 * weight.elements))
    for first in range(0, weight.experts, at_once):
        end = min(first + at_once, weight.experts)
        longest = max(stop - start for start, stop in pairwise(bounds[first : end + 1]))
        if not longest:
            continue
        place = starts[first:end, None] + torch.arange(longest, device=rows.device)  # (experts, longest)
        beyond = place >= starts[first + 1 : end + 1, None]
        exact, rounded = both[:, place.clamp(max=len(rows) - 1)].masked_fill(beyond[..., None], 0)
        part, shape = part_of(stack, weight, first, end), (end - first, weight.rows, weight.columns)
        assert part.code is not None and part.stack_scale is not None
        noise = part._replace(code=code_noise(part.code)).values(torch.float32).view(shape)
        variance = noise.square_().sum(2 if transposed else 1)  # (experts, in), or (experts, out) where transposed
        expected[first:end] = (variance * exact.square().sum(1)).sum(1).sqrt()
        del noise
        matrices = part.values(torch.float32).view(shape)
        turned = matrices if transposed else matrices.mT
        wanted = exact @ turned
        matrices.copy_(codes_of(matrices, part.stack_scale))
        found = (rounded @ turned).mul_(part.stack_scale[:, None, None])
        error[first:end] = found.sub_(wanted).flatten(1).norm(dim=1)
        del matrices, turned
    return over_expected(error, expected).amax()
