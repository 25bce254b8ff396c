"""Environment check: devices, drivers and versions of this machine, whether 4-bit training works, and what mends it."""

import platform
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from huggingface_hub import constants as hub_constants
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from qlora_cli.artifacts import cache_root
from qlora_cli.core.adapters.lora import attach_adapter
from qlora_cli.core.data.packing import collate
from qlora_cli.core.data.prepare import cache_directory
from qlora_cli.core.device import choose_device, dtype_name, list_versions, read_free_bytes, resolve_compute_dtype
from qlora_cli.core.engine.engine import install_engine
from qlora_cli.core.inspection.weight_stats import table
from qlora_cli.core.models.files import resolve_model
from qlora_cli.core.models.loading import load_base
from qlora_cli.core.models.quantization import dequantized_weight, four_bit_linears
from qlora_cli.core.models.quantized_cache import cache_size_bytes
from qlora_cli.core.storage.disk_space import free_disk_bytes
from qlora_cli.errors import first_line
from qlora_cli.settings.groups import LoraSettings, QuantizationSettings, StepSettings
from qlora_cli.sizes import format_bytes

DRIVER_FILE = Path("/proc/driver/nvidia/version")
CARD_NODE = Path("/dev/nvidiactl")
ENOUGH_DISK_BYTES = 20 * 2**30  # a 7B model in 16 bits with its 4-bit copy
FIXES = {
    "cuda": "pip install --force-reinstall bitsandbytes, then: python -m bitsandbytes",
    "cpu": "pip install --upgrade bitsandbytes torch",
}
FAST_ENGINE_FIX = "Train with --engine plain; on a card look at triton above."
TOLERANCE = 4  # roundings of the compute dtype


@dataclass(frozen=True)
class Check:
    """One thing that was tried: whether it works, what was found, and what to type where it does not."""

    name: str
    works: bool
    found: str
    fix: str | None = None


def read_driver(driver_file: Path = DRIVER_FILE) -> str | None:
    """Version of the NVIDIA kernel driver, None without one."""
    if not driver_file.is_file():
        return None
    words = driver_file.read_text(encoding="utf-8").split()
    return next((word for word in words if word.count(".") >= 1 and word.replace(".", "").isdigit()), None)


def list_devices() -> list[dict[str, Any]]:
    """Every CUDA device: name, compute capability, memory in bytes, whether it computes in bfloat16."""
    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free_bytes, total_bytes = torch.cuda.mem_get_info(index)
        devices.append(
            {
                "device": f"cuda:{index}",
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "total_bytes": total_bytes,
                "free_bytes": free_bytes,
                "bfloat16": properties.major >= 8,
            }
        )
    return devices


def describe_machine() -> dict[str, Any]:
    """Facts of the host, JSON-ready."""
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpus": psutil.cpu_count(logical=True),
        "host_memory_bytes": psutil.virtual_memory().total,
        "host_available_bytes": read_free_bytes(torch.device("cpu")),
        "driver": read_driver(),
        "cuda": torch.version.cuda,
    }


def measure_directory(directory: Path) -> int:
    """Bytes of all files below a directory."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file() and not path.is_symlink())


def check_environment(device: torch.device, compute_dtype: torch.dtype, directory: Path) -> list[Check]:
    """Tries what training needs: 4-bit arithmetic on a device, and room where runs would be written."""
    return [
        Check("python", True, platform.python_version()),  # pip installs this on no older one
        check_card(),
        check_triton(device),
        check_4bit_step(device, compute_dtype),
        check_fast_engine(device, compute_dtype),
        check_disk("hub cache", Path(hub_constants.HF_HUB_CACHE)),
        check_disk("working directory", directory),
    ]


def check_card(driver_file: Path = DRIVER_FILE, card_node: Path = CARD_NODE) -> Check:
    """Whether PyTorch sees a CUDA card, and if not, which of driver, build or card is missing."""
    if torch.cuda.is_available():
        return Check("cuda", True, f"{torch.cuda.device_count()} × {torch.cuda.get_device_name(0)}")
    driver = read_driver(driver_file)
    if torch.version.cuda is None and (driver or card_node.exists()):
        found = f"the driver ({driver}) is there, but PyTorch {torch.__version__} was built for the CPU"
        fix = "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu130"
    elif torch.version.cuda is None:
        found, fix = "no NVIDIA card or driver", "Small models train on the CPU; others need a card."
    elif driver is None:
        found, fix = "no NVIDIA driver", "Install the NVIDIA driver, or pass the card into the container."
    else:
        found = f"driver {driver} is there, but PyTorch's CUDA {torch.version.cuda} finds no usable card"
        fix = "Update the driver, or look at CUDA_VISIBLE_DEVICES and: nvidia-smi"
    return Check("cuda", False, found, fix)


def check_triton(device: torch.device) -> Check:
    """Whether the compiler behind the fast kernels is there; the CPU does without."""
    found = list_versions()["triton"]
    if device.type != "cuda":
        return Check("triton", True, found or "not needed on the CPU")
    if found is None:
        return Check("triton", False, "not installed: only --engine plain works", "pip install triton")
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return Check("triton", False, f"{found}, but there is no C compiler", "apt-get install gcc")
    return Check("triton", True, found)


def check_disk(name: str, directory: Path) -> Check:
    """Whether a disk has room for a 7B model."""
    free_bytes = free_disk_bytes(directory)
    found = f"{format_bytes(free_bytes)} free at {directory}"
    if free_bytes >= ENOUGH_DISK_BYTES:
        return Check(name, True, found)
    return Check(name, False, found, "Free some space; HF_HOME moves the hub cache to another disk.")


def check_4bit_step(device: torch.device, compute_dtype: torch.dtype) -> Check:
    """Runs a tiny model in 4 bits forward and backward, and compares a linear with its dequantised weight."""
    where = f"on {device} in {dtype_name(compute_dtype)}"
    try:
        error, norm = run_4bit_step(device, compute_dtype)
    except Exception as failure:  # whatever a broken installation raises is the finding
        return Check("4-bit step", False, f"fails {where}: {_describe(failure)}", FIXES[device.type])
    if not error < TOLERANCE * torch.finfo(compute_dtype).eps:
        return Check("4-bit step", False, f"a 4-bit linear {where} is off by {error:.2g}", FIXES[device.type])
    if not 0 < norm < float("inf"):
        return Check("4-bit step", False, f"the adapter's gradient {where} has norm {norm}", FIXES[device.type])
    return Check("4-bit step", True, f"forward and backward work {where}")


def check_fast_engine(device: torch.device, compute_dtype: torch.dtype) -> Check:
    """Runs a step of the fast engine and compares its loss with the plain one's."""
    where = f"on {device} in {dtype_name(compute_dtype)}"
    try:
        fast, plain = run_engine_steps(device, compute_dtype)
    except Exception as failure:  # as above
        return Check("fast engine", False, f"fails {where}: {_describe(failure)}", FAST_ENGINE_FIX)
    if not abs(fast - plain) <= TOLERANCE * torch.finfo(compute_dtype).eps * abs(plain):
        return Check("fast engine", False, f"its loss {where} is {fast:.6g}, not {plain:.6g}", FAST_ENGINE_FIX)
    return Check("fast engine", True, f"agrees with the plain one {where}")


def _describe(failure: Exception) -> str:
    return f"{type(failure).__name__}: {first_line(failure)}"


@contextmanager
def tiny_base(device: torch.device, compute_dtype: torch.dtype) -> Iterator[PreTrainedModel]:
    """A random model of one layer, loaded in 4 bits as any other."""
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    with tempfile.TemporaryDirectory() as directory:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            LlamaForCausalLM(config).save_pretrained(directory)
        base, _ = load_base(
            resolve_model(directory), QuantizationSettings(base_cache=False), compute_dtype=compute_dtype, device=device
        )
        yield base


def run_4bit_step(device: torch.device, compute_dtype: torch.dtype) -> tuple[float, float]:
    """A forward and backward pass through bitsandbytes and PEFT.

    Returns:
        Relative error of one 4-bit linear against its dequantised weight, and the norm of the adapter's gradient.
    """
    with tiny_base(device, compute_dtype) as base:
        _, linear = next(four_bit_linears(base))
        inputs = torch.linspace(-1, 1, 4 * 64, device=device, dtype=compute_dtype).view(4, 64)
        exact = inputs.double() @ dequantized_weight(linear).double().T
        error = float((linear(inputs).double() - exact).norm() / exact.norm())
        model = attach_adapter(base, LoraSettings(rank=4, alpha=8))
        tokens = torch.arange(32, device=device)[None]
        model(input_ids=tokens, labels=tokens).loss.backward()
        gradients = [p.grad.float().norm() for p in model.parameters() if p.grad is not None]
    return error, float(torch.stack(gradients).norm())


def run_engine_steps(device: torch.device, compute_dtype: torch.dtype) -> tuple[float, float]:
    """Losses in nats of the same two packed rows, with a backward pass, by the fast engine and by the plain one."""
    rows = [(np.arange(length, dtype=np.int32), np.ones(length, dtype=bool)) for length in (20, 30)]
    losses = []
    for kind in ("fast", "plain"):
        with tiny_base(device, compute_dtype) as base:
            model = attach_adapter(base, LoraSettings(rank=4, alpha=8)).train()
            engine = install_engine(
                model,
                StepSettings(engine=kind, compile=False),
                device=device,
                compute_dtype=compute_dtype,
                max_tokens=50,
                total_steps=1,
                report=lambda event: None,
            )
            loss = engine.loss(collate(rows, [0, 1]).to(device))
            loss.backward()
            losses.append(float(loss.detach()))
            engine.close()
    return losses[0], losses[1]


def describe_environment(compute_dtype_name: str | None) -> dict[str, Any]:
    """Devices, drivers, versions, caches, and whether 4-bit training works here."""
    device = choose_device()
    compute_dtype = resolve_compute_dtype(compute_dtype_name, device)
    checks = check_environment(device, compute_dtype, Path.cwd())
    devices = list_devices()
    return {
        "kind": "machine",
        "works": all(check.works for check in checks if check.name != "cuda"),
        **describe_machine(),
        "cache": str(cache_root()),
        "caches": {"bases_bytes": cache_size_bytes(), "prepared_rows_bytes": measure_directory(cache_directory())},
        "versions": list_versions(),
        "tables": [
            *([table("Devices", devices)] if devices else []),
            table("Checks", [asdict(check) for check in checks]),
        ],
    }
