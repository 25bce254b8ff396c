"""Context parallelism: the ranks that share the tokens of each pack, and their exchange of tokens for heads in attention.

Each of N ranks holds one part in N of a pack's tokens, which all but attention take one by one. Around attention the
ranks exchange them: each gets all tokens of one part in N of the heads, and gives the result back (DeepSpeed Ulysses,
https://arxiv.org/abs/2309.14509). So attention is that of one card, kernels, packs, windows, sinks and caps included,
and causal attention is shared evenly.

torch's own `context_parallel` is ring attention in place of `F.scaled_dot_product_attention` for a whole process, and
takes no mask: no packs, windows, sinks or caps. It sends keys and values alone, and hides that. What is sent here is
little too: llama3-8b's layer on a row of 262,144 tokens sends 1.3 GB from each of two cards, 8 ms on H200 with NVLink, and
computes attention of 2.8e14 operations on each, some 500 ms (benchmarks/ranks.md).
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from qlora_cli.core.distributed.process_group import ProcessGroup
from qlora_cli.errors import UsageError

ATTRIBUTE = "_qlora_context"  # of a decoder and its modules: their `ContextGroup`
_groups: dict[str, dist.ProcessGroup] = {}  # torch's, by name


@dataclass(eq=False)
class ContextGroup:
    """The ranks that share the tokens of each pack.

    Attributes:
        ranks: All of the run.
        size: How many of them share the tokens of a pack.
        place: Which part this one holds.
        name: Of their process group.
        active: Whether attention is given this rank's part of a pack, or, as in trials, a whole one.
        longest: Tokens of the longest row of the pack at hand.
    """

    ranks: ProcessGroup
    size: int
    place: int
    name: str
    active: bool = False
    longest: int = 0

    def to_heads(self, *tensors: Tensor) -> list[Tensor]:
        """Query, key and value, (part, heads, size) each, to all tokens of this rank's heads, (tokens, heads / N, size).

        Of keys and values that N does not divide there are copies, for each rank the one that its queries look at.

        Raises:
            UsageError: N does not divide the heads of the query.
        """
        require_even_heads(tensors[0].shape[1], self.size)
        return [_exchange(_copied_evenly(tensor, self.size), True, self.size, self.name) for tensor in tensors]

    def to_tokens(self, out: Tensor) -> Tensor:
        """(tokens, heads / N, size) to all heads of this rank's part of the tokens, (part, heads, size)."""
        return _exchange(out, False, self.size, self.name)

    def part(self, of_tokens: Tensor) -> Tensor:
        """What there is one of for each token of a pack, (1, tokens), to that of this rank's, filled up with zeros."""
        size = -(-of_tokens.shape[1] // self.size)
        return F.pad(of_tokens, (0, size * self.size - of_tokens.shape[1])).split(size, dim=1)[self.place]

    def own_heads(self, of_heads: Tensor | None) -> Tensor | None:
        """This rank's part of what there is one of for each head of the query, (heads, ...)."""
        return None if of_heads is None else of_heads.chunk(self.size)[self.place]

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Inside the block attention is given whole packs."""
        self.active, before = False, self.active
        try:
            yield
        finally:
            self.active = before

    def agree(self, reason: str | None) -> str | None:
        """Why something cannot be, where that is so on any rank of the run."""
        device = torch.device("cuda" if dist.get_backend(_groups[self.name]) == "nccl" else "cpu")
        found = self.ranks.all_reduce_max(int(reason is not None), device)
        return reason or ("another rank found so" if found else None)


def require_even_heads(heads: int, size: int) -> None:
    """Checks that ranks can share attention's heads.

    Raises:
        UsageError: They cannot.
    """
    if heads % size:
        fitting = [n for n in range(2, heads + 1) if heads % n == 0]
        raise UsageError(
            f"--context-parallel {size} cannot share {heads} attention heads evenly.",
            f"Use one of {', '.join(map(str, fitting))}." if fitting else "Leave it out: there is one head.",
        )


def _copied_evenly(tensor: Tensor, size: int) -> Tensor:
    """(part, heads, size) with each head as often, one after the other, as makes their number a multiple of `size`."""
    copies = size // math.gcd(tensor.shape[1], size)
    return tensor if copies == 1 else tensor.repeat_interleave(copies, dim=1)


@torch.library.custom_op("qlora::exchange", mutates_args=())
def _exchange(x: Tensor, to_heads: bool, size: int, group: str) -> Tensor:
    """All-to-all of a group: (part, heads, size) to (tokens, heads / N, size), or back."""
    if to_heads:
        sent = x.unflatten(1, (size, -1)).transpose(0, 1).contiguous()  # (N, part, heads / N, size): one for each rank
    else:
        sent = x.contiguous().unflatten(0, (size, -1))
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=_groups[group])
    # By the rank it came from: its part of the tokens, or its heads.
    return received.flatten(0, 1) if to_heads else received.transpose(0, 1).flatten(1, 2)


@_exchange.register_fake
def _(x: Tensor, to_heads: bool, size: int, group: str) -> Tensor:
    tokens, heads, width = x.shape
    shape = (tokens * size, heads // size) if to_heads else (tokens // size, heads * size)
    return x.new_empty(*shape, width)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, ctx.to_heads, ctx.size, ctx.group = inputs


def _differentiate(ctx: Any, grad: Tensor) -> tuple:
    return _exchange(grad, not ctx.to_heads, ctx.size, ctx.group), None, None, None


_exchange.register_autograd(_differentiate, setup_context=_save)


def share_tokens(base: nn.Module, decoder: nn.Module, ranks: ProcessGroup, device: torch.device) -> None:
    """Has a causal language model's ranks share the tokens of each pack, once an engine makes use of it."""
    mesh = init_device_mesh(device.type, (ranks.of_rows.world_size, ranks.context), mesh_dim_names=("rows", "tokens"))
    group = mesh.get_group("tokens")
    _groups[group.group_name] = group
    context = ContextGroup(ranks, ranks.context, ranks.rank % ranks.context, group.group_name)
    for module in {base, *decoder.modules()}:
        setattr(module, ATTRIBUTE, context)
        if _depends_on_longest(module):
            module.forward = MethodType(_rotary_of_whole_rows, module)


def share_packs(context: ContextGroup, is_alike: Callable[[ContextGroup], bool] | None) -> Callable[[], None]:
    """Has attention take parts of packs from now on, once that was tried out.

    Args:
        is_alike: Whether this rank's part of a pack comes out as in a whole one; None where rows are padded.

    Returns:
        What undoes it.

    Raises:
        UsageError: Parts do not come out so, or rows are padded.
    """
    context.active = True
    try:
        reason = "they are padded, as said above" if is_alike is None else None
        if is_alike is not None and not is_alike(context):
            reason = "parts of them came out otherwise in a trial"
        if reason := context.agree(reason):
            raise UsageError(f"Cards cannot share this model's rows: {reason}.", "Leave --context-parallel out.")
    except BaseException:
        context.active = False
        raise
    return lambda: setattr(context, "active", False)


def context_of(module: nn.Module) -> ContextGroup | None:
    """With whom this rank shares the tokens of packs; None where it has whole ones."""
    return getattr(module, ATTRIBUTE, None)


def _depends_on_longest(module: Any) -> bool:
    """Whether rotary frequencies follow from the highest position given: transformers' dynamic NTK and LongRoPE."""
    kinds = getattr(module, "rope_type", None)
    kinds = kinds.values() if isinstance(kinds, dict) else [kinds]
    return any(kind == "longrope" or "dynamic" in str(kind) for kind in kinds)


def _rotary_of_whole_rows(self: Any, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Replaces `forward` of rotary embeddings: those of this part by the highest position of the whole pack."""
    context: ContextGroup = getattr(self, ATTRIBUTE)
    if not context.active:
        return type(self).forward(self, x, position_ids, *args, **kwargs)
    highest = position_ids.new_full((position_ids.shape[0], 1), context.longest - 1)
    found = type(self).forward(self, x, torch.cat([position_ids, highest], dim=1), *args, **kwargs)
    return tuple(table[:, :-1] for table in found)
