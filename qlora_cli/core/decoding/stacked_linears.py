"""4-bit linears of one model instance as stacked GEMVs with LoRA inside.

Layers that read the same tensor (query, key and value; gate and up) are found by watching one forward, and become one
product. Their packed weights are concatenated, and the layers keep views of that, so that nothing is held twice and
every other use of them goes on.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from qlora_cli.core.engine.lora_linear import group_by_input, is_adapted, is_plain_lora
from qlora_cli.core.models.quantization import is_4bit
from qlora_cli.kernels import lora_products
from qlora_cli.kernels.decode.gemv import MAX_TOKENS, ROW_UNIT, StackedAdapter, multiply
from qlora_cli.kernels.weights import FrozenWeight

MOST_VALUES = 2**29  # bytes of a stack's dequantised values at once; GPT-NeoX-20B's largest weight has 0.3 GB


@dataclass(eq=False)
class Site:
    """A 4-bit linear and what wraps it.

    Attributes:
        name: In the model.
        module: What the model calls: a LoRA layer, or the 4-bit linear itself.
        base: The 4-bit linear.
    """

    name: str
    module: Any
    base: Any

    @property
    def state(self) -> Any:
        """bitsandbytes' quantisation state."""
        return self.base.weight.quant_state

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of the weight."""
        rows, columns = self.state.shape
        return rows, columns

    def active_adapter(self) -> str | None:
        """Name of the LoRA adapter in effect here; None for none."""
        if self.module is self.base or self.module.disable_adapters:
            return None
        return next((name for name in self.module.active_adapters if name in self.module.lora_A), None)

    def largest_rank(self) -> int:
        """The largest rank among the adapters that were ever loaded here."""
        return 0 if self.module is self.base else max(self.module.r.values(), default=0)

    def is_plain(self) -> bool:
        """Whether base product plus scaled B A is all that the module computes, and its format is a known one."""
        state = self.state
        if state.shape[1] % state.blocksize or (state.nested and state.state2.blocksize & (state.state2.blocksize - 1)):
            return False
        if self.module is self.base:
            return True
        active = [name for name in self.module.active_adapters if name in self.module.lora_A]
        plain = all(is_plain_lora(self.module, name) for name in self.module.lora_A)  # any may be selected later
        return plain and len(active) <= 1 and not self.module.merged


def find_sites(model: nn.Module) -> list[Site]:
    """Every 4-bit linear that stacked products cover, in the model's order."""
    sites, inner = [], set()
    for name, module in model.named_modules():
        if is_adapted(module) and is_4bit(module.base_layer):
            inner.add(module.base_layer)
            sites.append(Site(name, module, module.base_layer))
        elif is_4bit(module) and module not in inner:
            sites.append(Site(name, module, module))
    return [site for site in sites if site.is_plain()]


def _stackable(sites: list[Site]) -> list[list[Site]]:
    """Sites of one input by the products they become: those of one format together, but for what fills no whole unit."""
    found: dict[Any, list[Site]] = {}
    for site in sites:
        state, (rows, columns) = site.state, site.shape
        unit = state.blocksize * (state.state2.blocksize if state.nested else 1)
        kind = (columns, state.blocksize, state.nested, state.quant_type, site.base.compute_dtype)
        found.setdefault(site if rows % ROW_UNIT or rows * columns % unit else kind, []).append(site)
    return list(found.values())


def _concatenate(tensors: list[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """One flat tensor of all, and the part of each in it; the same memory when they lie one after another already."""
    flat = [tensor.detach().as_subclass(Tensor).view(-1) for tensor in tensors]
    sizes, end = [tensor.numel() for tensor in flat], flat[0].data_ptr()
    for tensor in flat:
        if tensor.data_ptr() != end or tensor.untyped_storage().data_ptr() != flat[0].untyped_storage().data_ptr():
            whole = torch.cat(flat)
            break
        end += tensor.numel() * tensor.element_size()
    else:
        whole = flat[0].as_strided((sum(sizes),), (1,))
    return whole, whole.split(sizes)


class Stack:
    """Sites with the same input as one product.

    Args:
        sites: In the order in which the model calls them.
    """

    def __init__(self, sites: list[Site]) -> None:
        self.sites = sites
        self.dtype, self.device = sites[0].base.compute_dtype, sites[0].base.weight.device
        self.rank = max(site.largest_rank() for site in sites)
        self.weight = self._stack_weights()
        self.bias = self._stack_biases()
        self.adapter = self._allocate_adapter() if self.rank else None
        self._starts = [0]
        for site in sites:
            self._starts.append(self._starts[-1] + site.shape[0])
        self._adapted = self._divide()
        self.last: tuple[Tensor, Tensor] | None = None  # the input that was multiplied, and the product
        self.refresh()

    def _stack_weights(self) -> FrozenWeight:
        """The sites' weights as one, whose parts take the place of their own."""
        states = [site.state for site in self.sites]
        packed, parts = _concatenate([site.base.weight.data for site in self.sites])
        for site, part in zip(self.sites, parts, strict=True):
            site.base.weight.data = part.view(site.base.weight.data.shape)
        absmax, parts = _concatenate([state.absmax for state in states])
        for state, part in zip(states, parts, strict=True):
            state.absmax = part
        nested: dict[str, Any] = {}
        if states[0].nested:
            nested_absmax, parts = _concatenate([state.state2.absmax for state in states])
            for state, part in zip(states, parts, strict=True):
                state.state2.absmax = part
            nested = {
                "nested_absmax": nested_absmax,
                "nested_code": states[0].state2.code,
                "offset": torch.cat([state.offset.float().expand(state.state2.absmax.numel()) for state in states]),
                "nested_blocksize": states[0].state2.blocksize,
            }
        return FrozenWeight(
            rows=sum(site.shape[0] for site in self.sites),
            columns=self.sites[0].shape[1],
            packed=packed.view(torch.uint8),
            absmax=absmax,
            code=states[0].code,
            blocksize=states[0].blocksize,
            **nested,
        )

    def _divide(self) -> list[tuple[slice, slice, Tensor, Tensor]]:
        """For each site its rows, the ranks of its projection, B transposed and the scaling, as `refresh` changes them."""
        if self.adapter is None:
            return []
        found = []
        for number, (start, end) in enumerate(pairwise(self._starts)):
            at = number * self.rank
            rows, ranks = slice(start, end), slice(at, at + self.rank)
            found.append((rows, ranks, self.adapter.b[rows].t(), self.adapter.scaling[at]))
        return found

    def _stack_biases(self) -> Tensor | None:
        biases = [site.base.bias for site in self.sites]
        if all(bias is None for bias in biases):
            return None
        parts = [
            torch.zeros(site.shape[0], dtype=self.dtype, device=self.device)
            if bias is None
            else bias.detach().to(self.dtype)
            for site, bias in zip(self.sites, biases, strict=True)
        ]
        return torch.cat(parts)

    def _allocate_adapter(self) -> StackedAdapter:
        device, count = self.device, len(self.sites)
        first_rank = [
            number * self.rank for number, site in enumerate(self.sites) for _ in range(-(-site.shape[0] // ROW_UNIT))
        ]
        return StackedAdapter(
            a=torch.zeros(count * self.rank, self.weight.columns, dtype=self.dtype, device=device),
            scaling=torch.zeros(count * self.rank, device=device),
            b=torch.zeros(self.weight.rows, self.rank, dtype=self.dtype, device=device),
            first_rank=torch.tensor(first_rank, dtype=torch.int32, device=device),
        )

    def refresh(self) -> None:
        """Copies the adapter in effect into the stacked one, in place: captured graphs go on with it."""
        if self.adapter is None:
            return
        for tensor in self.adapter[:3]:
            tensor.zero_()
        for number, site in enumerate(self.sites):
            name = site.active_adapter()
            if name is None:
                continue
            a, b = site.module.lora_A[name].weight, site.module.lora_B[name].weight
            at, row = number * self.rank, self._starts[number]
            self.adapter.a[at : at + a.shape[0]].copy_(a)
            self.adapter.b[row : row + b.shape[0], : b.shape[1]].copy_(b)
            self.adapter.scaling[at : at + a.shape[0]] = site.module.scaling[name]

    def product(self, number: int, x: Tensor) -> Tensor:
        """What the module of the site of this number returns for x, (..., in) to (..., out)."""
        if self.last is None or self.last[0] is not x:
            self.last = None  # not two of them at once
            if (tell := getattr(x, "tell_reader", None)) is not None:
                tell(self)
            flat = x.reshape(-1, x.shape[-1]).to(self.dtype)
            if flat.shape[0] > MAX_TOKENS:
                self.last = (x, self._product_of_many(flat))
            else:
                adapter, projected = getattr(x, "projected", (None, None))  # where what made x did that on the way
                projected = projected if adapter is self.adapter else None
                y = multiply(flat.contiguous(), self.weight, self.adapter, self.bias, projected=projected)
                self.last = (x, y)
        y = self.last[1][:, self._starts[number] : self._starts[number + 1]]
        if number == len(self.sites) - 1:
            self.last = None  # the sites are called in order, and this was the last
        return y.reshape(*x.shape[:-1], -1).to(x.dtype)

    def _product_of_many(self, flat: Tensor) -> Tensor:
        """Dequantised once and multiplied, as in training; (tokens, rows) of all sites."""
        y = lora_products.forward(flat, self.weight, self.bias, None, None, MOST_VALUES)
        if self.adapter is not None:
            projected = flat @ self.adapter.a.t()  # (tokens, ranks)
            for rows, ranks, b, scale in self._adapted:
                lora_products.add_product(y[:, rows], projected[:, ranks], b, scale=scale)
        return y


class FastLinears:
    """Stacked products in place of the forwards of one model's 4-bit linears, until `close`.

    Args:
        model: With or without LoRA layers.
        run: Runs one forward of the model, over any tokens.
    """

    def __init__(self, model: nn.Module, run: Callable[[], Any]) -> None:
        self.stacks: list[Stack] = []
        site_of: dict[nn.Module, Site] = {site.module: site for site in find_sites(model)}
        for group in group_by_input(site_of, run):
            self.stacks += [Stack(sites) for sites in _stackable([site_of[module] for module in group])]
        for stack in self.stacks:
            for number, site in enumerate(stack.sites):
                site.module.forward = lambda x, *rest, stack=stack, number=number, **named: stack.product(number, x)

    def forget(self) -> None:
        """Drops the products that a forward pass which broke off left behind."""
        for stack in self.stacks:
            stack.last = None

    def refresh(self) -> None:
        """Brings every stack to the adapter in effect."""
        for stack in self.stacks:
            stack.refresh()

    def close(self) -> None:
        """Gives every layer its own forward back."""
        for stack in self.stacks:
            for site in stack.sites:
                del site.module.forward
        self.stacks = []

    def describe(self) -> str:
        """How many layers became how many products."""
        layers = sum(len(stack.sites) for stack in self.stacks)
        return f"{layers} linear layers in {len(self.stacks)} products"
