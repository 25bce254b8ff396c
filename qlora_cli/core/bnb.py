"""bitsandbytes, imported when it is first used, and without torch's compiler: `from qlora_cli.core.bnb import bitsandbytes`.

It decorates two functions of its fallback backend with `torch.compile`. That alone imports Dynamo and Inductor, three
seconds of processor time in every command; and where they are called, which is on the CPU with shapes that its native
library does not take, a C++ compiler runs for each shape. Plain, they give the same bits. `inspect` of a model needs none of it.
"""

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

NAME = "bitsandbytes"


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


def load() -> Any:
    """The module; whoever imports peft calls this before, which imports it with the compiler."""
    if not is_loaded():
        with nothing_compiled():
            importlib.import_module(NAME)
    return sys.modules[NAME]


def is_loaded() -> bool:
    """Whether anything of it was used; without, there is no module of its classes."""
    return NAME in sys.modules


class _WhenUsed:
    def __getattr__(self, name: str) -> Any:
        return getattr(load(), name)


bitsandbytes: Any = _WhenUsed()
