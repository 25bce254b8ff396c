"""Triton's interpreter in less time: a plugin of the process that runs kernels under it, and them alone.

It replaces the functions of `triton.language` at each launch and at each call of a device function, and makes a table of
dtypes to look one up, the type of each value, and its shape twice. Here the first is done once and the others are
remembered. Make test does without the check that no sum or product of integers overflows, a third of the time: its
shapes are small, and the long form has it.
"""

from dataclasses import replace
from types import SimpleNamespace

import numpy
import triton.language as tl
from triton.runtime import interpreter


def replace_language_once(replace_language):
    """`_patch_lang` that leaves what it replaced, which is the same for all functions that see the same modules."""
    replaced = set()

    def replace_once(function):
        seen = frozenset(
            name
            for name, module in (("tl", tl), ("core", tl.core))
            if any(v is module for v in function.__globals__.values())
        )
        if seen not in replaced:
            replace_language(function)
            replaced.add(seen)
        return SimpleNamespace(restore=lambda: None)

    return replace_once


def remember_dtypes(find_dtype):
    """`_get_np_dtype` by the dtype's name."""
    found = {}

    def remembered(dtype):
        if isinstance(dtype.scalar, tl.pointer_type):
            return numpy.dtype(numpy.uint64)
        name = dtype.scalar.name
        if name not in found:
            found[name] = find_dtype(dtype)
        return found[name]

    return remembered


def remember_block_types(kind):
    """One block type for each element type and shape."""
    initialize, made = kind.__init__, {}

    def find(cls, element_ty, shape):
        given = getattr(shape, "values", shape)
        key = id(element_ty), tuple(size.value if isinstance(size, tl.constexpr) else size for size in given)
        if key not in made:
            made[key] = object.__new__(cls), element_ty  # which lives on, so that its id stays its own
        return made[key][0]

    def initialize_once(self, element_ty, shape):
        if not self.__dict__:
            initialize(self, element_ty, shape)

    kind.__new__, kind.__init__ = find, initialize_once


def remember_shapes(kind):
    """What a tensor says of itself is that of the first one of its type."""
    initialize, told = kind.__init__, {}

    def initialize_alike(self, handle, type):
        if id(type) not in told:
            initialize(self, handle, type)
            told[id(type)] = {**self.__dict__}
        else:
            self.__dict__.update(told[id(type)], handle=handle)

    kind.__init__ = initialize_alike


def pytest_configure(config):
    """Whether overflow is looked for."""
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=config.option.markexpr != "not slow")


remember_block_types(tl.block_type)
remember_shapes(tl.tensor)
interpreter._patch_lang = replace_language_once(interpreter._patch_lang)
interpreter._get_np_dtype = remember_dtypes(interpreter._get_np_dtype)
