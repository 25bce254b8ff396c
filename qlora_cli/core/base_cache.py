"""A quantised base in, a verified copy on the local disk; from there the same base again, without quantising.

A copy is one safetensors file and a manifest under ~/.cache/qlora/base/KEY (QLORA_CACHE moves the root). The key
covers all that decides a single bit of it. Files are written whole or not at all; every byte is compared with the
manifest's SHA-256 while it is read.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from qlora_cli.artifacts import atomic_directory, read_json
from qlora_cli.core.slices import Slices
from qlora_cli.errors import DiskFull, QloraError, RunError
from qlora_cli.events import Caution, Notice, Report

FORMAT = 1  # raised when an older copy cannot be read
WEIGHTS, MANIFEST = "base.safetensors", "base.json"
HASHED_BYTES = 32 * 2**20  # covered by one digest, so that several threads share the hashing
ALIGNED_BYTES = 256
SPARE_BYTES = 2 * 2**30  # room left on the disk beside a copy
THREADS = min(8, os.cpu_count() or 1)
FOUR_BIT = "quant_state.bitsandbytes__"  # how the state of a packed weight begins, behind "weight."
DTYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.bool: "BOOL",
    torch.float64: "F64",
}
TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}

MakeLinear = Callable[[dict[str, Tensor], Tensor | None], nn.Module]


def cache_root() -> Path:
    """Where this project keeps what can be made again."""
    return Path(os.environ.get("QLORA_CACHE") or "~/.cache/qlora").expanduser()


def base_directory(facts: Mapping[str, Any]) -> Path:
    """Where the copy of a base is, or would be.

    Args:
        facts: All that decides its content beside the versions: digests of configuration and weights, quantisation
            settings, dtype and device type.
    """
    minor = {name: version(name).split("+")[0].rsplit(".", 1)[0] for name in ("bitsandbytes", "transformers")}
    content = json.dumps({"format": FORMAT, **minor, **facts}, sort_keys=True)
    return cache_root() / "base" / hashlib.sha256(content.encode()).hexdigest()[:32]


def cache_size_bytes() -> int:
    """Bytes that all copies take."""
    return sum(path.stat().st_size for path in (cache_root() / "base").glob("*/*") if path.is_file())


# ---------------------------------------------------------------- writing


def save_base(model: Any, facts: Mapping[str, Any], report: Report | None = None, slices: Slices | None = None) -> None:
    """Keeps a copy of a quantised base, unless there is one or the disk is short.

    Args:
        model: As `load_base` made it, before an adapter is attached.
        facts: See `base_directory`.
        report: Told when no copy could be kept: the work goes on without.
        slices: Of which the model holds this rank's: then all ranks come here, and the main one writes what it gathers.
    """
    directory = base_directory(facts)
    is_main = slices.ranks.is_main if slices else os.environ.get("RANK", "0") == "0"
    shapes = {name: _whole_shape(model, name, tensor) if slices else tensor for name, tensor in _tensors_of(model)}
    wanted = is_main and not directory.exists() and _has_room(directory.parent, shapes.values(), report)
    if slices:
        wanted = bool(slices.ranks.highest(int(wanted), model.device))
    if not wanted:
        return
    values = (
        slices.gather(tensor, shapes[name], model.device) if slices and shapes[name].is_meta else tensor
        for name, tensor in _tensors_of(model)
    )
    try:
        if is_main:
            with atomic_directory(directory, replace=True) as temporary:
                with (temporary / WEIGHTS).open("wb") as stream:
                    digests = _write(stream, shapes, values)
                manifest = {
                    "format": FORMAT,
                    "facts": dict(facts),
                    "hashed_bytes": HASHED_BYTES,
                    "sha256": digests,
                    "generation_config": model.generation_config.to_dict(),
                }
                (temporary / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    except (DiskFull, OSError) as error:  # a convenience only: never a reason to stop
        if report:
            report(Caution(f"The quantised base could not be kept in {directory.parent}: {error}"))
    for _ in values:
        pass  # every rank takes part in what is gathered, whether it or the main one writes or not


def _has_room(directory: Path, tensors: Iterable[Tensor], report: Report | None) -> bool:
    total_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    directory.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(directory).free >= total_bytes + SPARE_BYTES:
        return True
    if report:
        report(Notice(f"The quantised base is not kept in {directory}: the disk is nearly full."))
    return False


def _whole_shape(model: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """A tensor on the meta device as it is once gathered, for one that ranks hold shares of; any other as it is."""
    match = re.fullmatch(r"(.+)\.weight(\.absmax)?", name)
    state = getattr(model.get_submodule(match[1]).weight, "quant_state", None) if match else None
    if match is None or state is None:
        return tensor
    elements = state.shape.numel()
    shape = (-(-elements // state.blocksize),) if match[2] else (-(-elements // 2), 1)
    return torch.empty(shape, dtype=tensor.dtype, device="meta")


def _tensors_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer once, packed weights with what undoes the packing."""
    own = {name for name, _ in model.named_parameters()}
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - own
    state = model.state_dict()
    yield from ((name, tensor) for name, tensor in state.items() if name not in tied)
    yield from ((name, tensor) for name, tensor in model.named_buffers() if name not in state)


def _write(stream: BinaryIO, shapes: Mapping[str, Tensor], values: Iterator[Tensor]) -> list[str]:
    """Writes a safetensors file, each tensor aligned, one in memory at a time; returns the digests of its pieces.

    Args:
        stream: To write to.
        shapes: Of every tensor, in order; these themselves, or ones on the meta device.
        values: The tensors in the same order.
    """
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in shapes.items():
        gap = -end % ALIGNED_BYTES
        if gap:  # the format has no holes: an unnamed tensor fills this one
            header[f"__gap_{end}"] = {"dtype": "U8", "shape": [gap], "data_offsets": [end, end + gap]}
        start, end = end + gap, end + gap + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % ALIGNED_BYTES)
    hashing = _Hashing(stream)
    hashing.write(len(text).to_bytes(8, "little") + text)
    written = 0
    for tensor in values:
        gap = -written % ALIGNED_BYTES
        raw = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data
        hashing.write(bytes(gap))
        hashing.write(raw)
        written += gap + raw.nbytes
    return hashing.finish()


class _Hashing:
    """A stream that keeps a digest of every HASHED_BYTES."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self._digest, self._room = stream, hashlib.sha256(), HASHED_BYTES
        self._digests: list[str] = []

    def write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        self._stream.write(view)
        while len(view):
            part, view = view[: self._room], view[self._room :]
            self._digest.update(part)
            self._room -= len(part)
            if not self._room:
                self._digests.append(self._digest.hexdigest())
                self._digest, self._room = hashlib.sha256(), HASHED_BYTES

    def finish(self) -> list[str]:
        return [*self._digests, self._digest.hexdigest()]


# ---------------------------------------------------------------- reading


def restore_base(
    facts: Mapping[str, Any],
    build: Callable[[], Any],
    make_linear: MakeLinear,
    device: torch.device,
    report: Report | None = None,
    slices: Slices | None = None,
) -> Any | None:
    """The base whose copy is here; None where there is none that can be used.

    A damaged copy is told and removed.

    Args:
        facts: See `base_directory`.
        build: Gives the model on the meta device, unquantised.
        make_linear: Makes a 4-bit linear of a packed weight (under ""), what undoes the packing (under the ending each
            has in a checkpoint, such as ".absmax") and a bias.
        device: Where it goes.
        report: Told what is read.
        slices: Keep this rank's share of each packed weight and its constants only.

    Returns:
        The model, every tensor on `device`, bit for bit the one that was saved.
    """
    directory = base_directory(facts)
    if not (directory / MANIFEST).is_file():
        return None
    try:
        manifest = read_json(directory / MANIFEST)
        tensors = _read(directory / WEIGHTS, manifest, device, slices)
        model = build()
        _fill(model, tensors, make_linear)
    except (RunError, OSError, ValueError, KeyError, AttributeError) as error:
        if report:
            told = error.message if isinstance(error, QloraError) else str(error)
            report(Caution(f"The copy of the quantised base in {directory} is made anew: {told}"))
        shutil.rmtree(directory, ignore_errors=True)
        return None
    model.generation_config = GenerationConfig.from_dict(manifest["generation_config"])
    if report:
        report(Notice(f"Using the quantised base kept in {directory.parent}."))
    return model


def _read(path: Path, manifest: Mapping[str, Any], device: torch.device, slices: Slices | None) -> dict[str, Tensor]:
    """Every tensor of the file, on the device, while other threads verify its bytes.

    Raises:
        RunError: A byte is not what was written.
    """
    size = path.stat().st_size
    with path.open("rb") as stream, ThreadPoolExecutor(THREADS) as pool:
        descriptor = stream.fileno()
        piece = int(manifest["hashed_bytes"])
        starts = range(0, size, piece)
        if len(manifest["sha256"]) != len(starts) + (size % piece == 0):
            raise RunError(f"{path.name} has another length than was written.")
        found = pool.map(lambda start: hashlib.sha256(os.pread(descriptor, piece, start)).hexdigest(), starts)
        header_bytes = int.from_bytes(os.pread(descriptor, 8, 0), "little")
        if header_bytes > size:
            raise RunError(f"{path.name} is damaged.")
        header = json.loads(os.pread(descriptor, header_bytes, 8))
        packed = {name.split(f".{FOUR_BIT}")[0] for name in header if f".weight.{FOUR_BIT}" in name}
        spread = {name for weight in packed for name in (weight, f"{weight}.absmax")} if slices else set()

        def load(name: str) -> Tensor:
            entry = header[name]
            start, end = entry["data_offsets"]
            raw = torch.empty(end - start, dtype=torch.uint8)
            view = raw.numpy().data
            done = 0
            while done < end - start:
                count = os.preadv(descriptor, [view[done:]], 8 + header_bytes + start + done)
                if not count:
                    raise RunError(f"{path.name} is shorter than its header says.")
                done += count
            tensor = raw.view(TORCH_DTYPES[entry["dtype"]]).reshape(entry["shape"])
            if FOUR_BIT in name:  # the state itself is read by the host
                return tensor
            if slices and name in spread:
                tensor = slices.keep(tensor)
                return tensor if slices.on_host else tensor.to(device)
            return tensor.to(device)

        names = [name for name in header if not name.startswith("__")]
        tensors = dict(zip(names, pool.map(load, names), strict=True))
        for number, (digest, expected) in enumerate(zip(found, manifest["sha256"], strict=False)):
            if digest != expected:
                raise RunError(f"{path.name} is damaged after byte {number * piece:,}.")
    return tensors


def _fill(model: Any, tensors: dict[str, Tensor], make_linear: MakeLinear) -> None:
    """Puts tensors into a model on the meta device.

    Raises:
        RunError: The model has another structure than the one that was saved.
    """
    for state_name in [name for name in tensors if f".weight.{FOUR_BIT}" in name]:
        name = state_name.split(f".weight.{FOUR_BIT}")[0]
        prefix = f"{name}.weight"
        endings = [key for key in tensors if key.startswith(f"{prefix}.")]
        packed = {key.removeprefix(prefix): tensors.pop(key) for key in endings}
        packed[""] = tensors.pop(prefix)
        model.set_submodule(name, make_linear(packed, tensors.pop(f"{name}.bias", None)))
    for name, tensor in tensors.items():
        owner_name, _, leaf = name.rpartition(".")
        owner = model.get_submodule(owner_name)
        if leaf in owner._parameters:
            owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
        elif leaf in owner._buffers:
            owner._buffers[leaf] = tensor
        else:
            raise RunError(f"the model has no {name} any more.")
    model.tie_weights()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta:
            raise RunError(f"{name} is not in it.")
