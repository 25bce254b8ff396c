"""More than 48 KiB of shared memory for kernels that have a static part of their own.

A kernel may have more in all only where that was asked for, and Triton asks for what it allots itself alone.
"""

import ctypes
from typing import Any

from triton import knobs

MOST_DYNAMIC = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, in the CUDA driver's numbers
DYNAMIC_BYTES = 49152  # beside the static part


def allow_beside_static(kernel: str) -> None:
    """Lets kernels of this name that are loaded from here on have DYNAMIC_BYTES beside their static part, if Triton wants them."""

    def allow(module: Any, function: Any, name: str, *rest: Any) -> None:
        if name != kernel:
            return
        cuda = ctypes.CDLL("libcuda.so.1")
        code = cuda.cuFuncSetAttribute(ctypes.c_void_p(function), MOST_DYNAMIC, ctypes.c_int(DYNAMIC_BYTES))
        if code != 0:
            raise RuntimeError(f"the CUDA driver refused {kernel} its shared memory (error {code})")

    knobs.runtime.kernel_load_end_hook.add(allow)
