"""Attention whose results are kept where a layer is recomputed: its repetition is given them instead of computing them again.

Below autograd: what the repetition records for its backward pass is what it would record otherwise.
"""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from qlora_cli.kernels.attention import ATTENTION_OPS, equal_rows_attention


def keep_attention(
    send: Callable[[Tensor], Any], bring: Callable[[Any], Any], again: Callable[[], AbstractContextManager]
) -> tuple[AbstractContextManager, AbstractContextManager]:
    """Contexts of a forward pass and of its repetition, as `checkpoint` takes them.

    Args:
        send: Puts a result where it waits.
        bring: Brings what that returned back; anything else stays as it is.
        again: What the repetition runs in besides.
    """
    kept: deque[tuple] = deque()

    @contextmanager
    def repetition() -> Iterator[None]:
        with again(), _Give(kept, bring):
            yield

    return _Keep(kept, send), repetition()


class _Keep(TorchDispatchMode):
    """Keeps the results of attention."""

    def __init__(self, kept: deque[tuple], send: Callable) -> None:
        super().__init__()
        self.kept, self.send = kept, send

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        results = func(*args, **(kwargs or {}))
        if func in ATTENTION_OPS:
            self.kept.append(tuple(self.send(r) if isinstance(r, Tensor) else r for r in results))
        return results


class _Give(TorchDispatchMode):
    """Answers attention with those results, in the order of the calls, and holds them no longer."""

    def __init__(self, kept: deque[tuple], bring: Callable) -> None:
        super().__init__()
        self.kept, self.bring = kept, bring

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in ATTENTION_OPS:
            return tuple(map(self.bring, self.kept.popleft()))
        return func(*args, **(kwargs or {}))


@cache
def can_keep_attention(device: torch.device) -> bool:
    """Whether cuDNN's attention, given its own results back, has the gradients that it has when it computes them again;
    tried out on a card."""
    if device.type != "cuda":
        return True
    generator = torch.Generator(device).manual_seed(0)
    drawn = [torch.randn(256, 4, 128, generator=generator, dtype=torch.bfloat16, device=device) for _ in range(4)]
    given = [t.requires_grad_() for t in drawn[:3]]
    attend = partial(equal_rows_attention, rows=1, scale=128**-0.5)
    keep = partial(keep_attention, Tensor.clone, lambda result: result, nullcontext)
    found = []
    try:
        for contexts in (lambda: (nullcontext(), nullcontext()), keep):
            with torch.enable_grad():
                out = checkpoint(attend, *given, use_reentrant=False, context_fn=contexts)
                found.append(torch.autograd.grad(out, given, drawn[3]))
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError):  # a cuDNN, or a PyTorch, that does not take them
        return False
    return all(bool((a - b).norm() <= 0.02 * b.norm()) for a, b in zip(found[1], found[0], strict=True))
