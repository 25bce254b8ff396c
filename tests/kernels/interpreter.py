"""Triton's interpreter in less time: a plugin of the process that runs kernels under it, and them alone.

It replaces the functions of `triton.language` at each launch and at each call of a device function, and looks a table of
dtypes up by making it. Here the first is done once and the second remembered: a third less.
"""

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


interpreter._patch_lang = replace_language_once(interpreter._patch_lang)
interpreter._get_np_dtype = remember_dtypes(interpreter._get_np_dtype)
