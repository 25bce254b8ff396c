"""This machine's device: which one, its memory, the dtype of its arithmetic, its time for a layer; library versions, and sizes in words."""

import gc
import math
import os
import platform
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple, TypeVar

import psutil
import torch

from qlora_cli.errors import QloraError
from qlora_cli.events import Vram
from qlora_cli.sizes import format_bytes

LIBRARIES = (
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "accelerate",
    "datasets",
    "safetensors",
    "huggingface_hub",
    "tokenizers",
    "triton",
)
# CUDA context with the kernels of PyTorch, cuBLAS and Triton: outside PyTorch's allocator, so in no peak it reports.
# Measured on an H200 after a few steps of four models: 0.77 to 1.07 GiB, most where activations are offloaded.
CONTEXT_BYTES = 2**30
HOST_SHARE = 0.75  # of free host memory, which what waits there may take, of all ranks together
CONTROL_GROUP = Path("/sys/fs/cgroup")  # of this process, as a container sees it
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

Failure = TypeVar("Failure", bound=QloraError)


class LayerSeconds(NamedTuple):
    """Device time of one layer at some number of tokens, and the host's."""

    forward: float
    backward: float
    launching: float = 0.0  # of the host, both passes; 0 where it was not measured

    @property
    def device(self) -> float:
        """Both passes."""
        return self.forward + self.backward

    def fixed(self, quarter: "LayerSeconds") -> "LayerSeconds":
        """What does not grow with tokens, given also the measurement with a quarter of the tokens."""
        pairs = zip(self, quarter, strict=True)
        return LayerSeconds(*(min(max((4 * few - all_) / 3, 0.0), all_) for all_, few in pairs))

    def at_share(self, share: float, quarter: "LayerSeconds") -> "LayerSeconds":
        """With so many times the tokens, given also the measurement with a quarter of the tokens."""
        still = self.fixed(quarter)
        return LayerSeconds(*(part + (share - 1) * (part - rest) for part, rest in zip(self, still, strict=True)))


def choose_device() -> torch.device:
    """The current CUDA device, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def resolve_compute_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The dtype of the arithmetic: as named, or bfloat16 on GPUs that have it, float16 on older ones, float32 on CPU."""
    if name is not None:
        return DTYPES[name]
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16


def is_slow_on_cpu(dtype: torch.dtype) -> bool:
    """Whether this CPU has to convert each number of a dtype: products of 256 x 576 x 1,536 take 87 ms instead of 16."""
    short = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype)
    supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{short}_supported", None) if short else None
    return supported is not None and not supported()


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16` for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def read_vram(device: torch.device) -> Vram | None:
    """Memory of a CUDA device as PyTorch's allocator sees it; None on any other device. Does not synchronise."""
    if device.type != "cuda":
        return None
    return Vram(
        now_bytes=torch.cuda.memory_allocated(device),
        peak_bytes=torch.cuda.max_memory_allocated(device),
        total_bytes=torch.cuda.get_device_properties(device).total_memory,
    )


def count_retries(device: torch.device) -> int:
    """How often PyTorch's allocator has run against the limit of a CUDA device since the process began: each time it gave
    back all that it held in reserve, and asked again. 0 on any other device."""
    return 0 if device.type != "cuda" else torch.cuda.memory_stats(device).get("num_alloc_retries", 0)


def read_free_bytes(device: torch.device) -> int:
    """Bytes that this process can still allocate on a device, or on the CPU take without others being pushed out.

    On CUDA that is within the allocator's limit (see `limit_memory`), and its cache counts as free.
    """
    if device.type != "cuda":
        return int(min(psutil.virtual_memory().available, _read_group_free_bytes()))
    free_bytes, _ = torch.cuda.mem_get_info(device)
    cached_bytes = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(free_bytes, _allowed_bytes(device)) + cached_bytes


def _allowed_bytes(device: torch.device) -> int:
    """What the limit of a CUDA device's allocator leaves, beside what that has."""
    _, total_bytes = torch.cuda.mem_get_info(device)
    fraction = torch.cuda.get_per_process_memory_fraction(_index(device))
    return int(total_bytes * fraction) - torch.cuda.memory_reserved(device)


def describe_others(device: torch.device) -> str:
    """That other processes hold memory of a CUDA device, as a sentence with a space before it; nothing where they hold little,
    or where this process's own limit (`--vram`) is nearer than what they leave."""
    if device.type != "cuda":
        return ""
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    own_bytes = torch.cuda.memory_reserved(device) + CONTEXT_BYTES + _paged_bytes()
    others_bytes = total_bytes - free_bytes - own_bytes
    # A limit that was set by what was free lies a context and what is paged below that.
    if others_bytes < CONTEXT_BYTES or _allowed_bytes(device) + 2 * CONTEXT_BYTES < free_bytes:
        return ""
    held = f"{format_bytes(others_bytes)} of this card's {format_bytes(total_bytes)}"
    return f" Other processes hold some {held}, and {format_bytes(free_bytes)} is free."


def _paged_bytes() -> int:
    """What optimizers of this process keep in managed memory, which may lie on a CUDA device: in no figure of PyTorch's."""
    library = sys.modules.get("bitsandbytes")
    paged = library.functional.GlobalPageManager.get_instance().paged_tensors if library else ()
    return sum(state.nbytes for state in paged)


def memory_error(kind: type[Failure], message: str, hint: str, device: torch.device) -> Failure:
    """The error that a device's memory ran out; where others hold it, it says so, and to end them is what to do.

    Args:
        hint: What to do where nobody else holds any.
    """
    others = describe_others(device)
    ended = "End them (nvidia-smi lists them), or choose another card with CUDA_VISIBLE_DEVICES, and type the command again."
    return kind(message + others, ended if others else hint)


def waiting_room_bytes() -> int:
    """Of the host, what may wait there for this rank: its share of what all ranks there may take of free memory."""
    return int(HOST_SHARE * read_free_bytes(torch.device("cpu")) / int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _read_group_free_bytes() -> float:
    """What a container leaves of the host's memory, by Linux's control groups of version 2; infinite without a limit.
    What files take and nobody has used of late counts as free."""
    try:
        limit = (CONTROL_GROUP / "memory.max").read_text().strip()
        if limit == "max":
            return math.inf
        used = int((CONTROL_GROUP / "memory.current").read_text())
        lines = dict(line.split() for line in (CONTROL_GROUP / "memory.stat").read_text().splitlines())
        return max(0, int(limit) - used + int(lines.get("inactive_file", 0)))
    except (OSError, ValueError):
        return math.inf


def read_capacity_bytes(device: torch.device) -> int:
    """Bytes that this process can hold on a device in all: what is free, and on CUDA what its allocator has already."""
    if device.type != "cuda":
        return read_free_bytes(device)
    free_bytes, _ = torch.cuda.mem_get_info(device)
    return free_bytes + torch.cuda.memory_reserved(device)


def limit_memory(device: torch.device, limit_bytes: int) -> None:
    """Keeps PyTorch's allocator within so many bytes of a CUDA device, from before anything is loaded."""
    total_bytes = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit_bytes / total_bytes), _index(device))
    # Near a limit, pieces too small for the next tensor would be lost.
    torch._C._accelerator_setAllocatorSettings("expandable_segments:True")


def free_memory(device: torch.device) -> None:
    """Gives back what dropped tensors held, and on CUDA the allocator's unused blocks."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def list_versions() -> dict[str, str | None]:
    """Version of each library in use; None where it is not installed. Imports none of them."""
    return {"python": platform.python_version(), **{library: _find_version(library) for library in LIBRARIES}}


@cache  # 3 ms a library, asked for with every checkpoint of a run
def _find_version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None
