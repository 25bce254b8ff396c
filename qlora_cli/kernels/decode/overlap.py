"""Launches of a step that begin while the one before them is still running (programmatic dependent launch).

A step is hundreds of launches of a few microseconds each. A kernel that overlaps lets the next one be placed on the card at
once, and itself waits, before it reads anything that another has written, until the one before has ended and all it
wrote is seen. Each waits, so that the end of one means the end of all before it. What runs between is not slowed: a kernel
that knows nothing of this is launched as ever.
"""

import functools

import torch
import triton
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many the device has; 0 where neither this nor `multiply_lanes` runs: it needs tensor cores that take bfloat16."""
    if device.type != "cuda" or torch.version.cuda is None or torch.cuda.get_device_capability(device) < (8, 0):
        return 0
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def overlaps(device: torch.device) -> bool:
    """Whether a launch may begin while the one before it, if that allows it, is running."""
    return multiprocessors(device) > 0 and torch.cuda.get_device_capability(device) >= (9, 0)


@triton.jit
def follow():
    """First in a kernel: the next launch gets ready, and this one goes on when the one before it has ended."""
    gdc_launch_dependents()
    gdc_wait()
