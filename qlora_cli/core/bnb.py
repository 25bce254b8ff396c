"""bitsandbytes, imported without torch's compiler: `from qlora_cli.core.bnb import bitsandbytes`.

It decorates two functions of its fallback backend with `torch.compile`. That alone imports Dynamo and Inductor, three
seconds of processor time in every command; and where they are called, which is on the CPU with shapes that its native
library does not take, a C++ compiler runs for each shape. Plain, they give the same bits.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


@contextmanager
def nothing_compiled() -> Iterator[None]:
    """Within, `torch.compile(function, …)` is the function."""
    compiling = torch.compile

    def as_it_is(function: Callable, **options: object) -> Callable:
        return function

    torch.compile = as_it_is  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compiling


with nothing_compiled():
    import bitsandbytes
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

__all__ = ["Bnb4BitHfQuantizer", "bitsandbytes"]
