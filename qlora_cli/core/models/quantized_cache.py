"""Cache of quantised bases on the local disk, verified as they are read back.

A copy is one safetensors file and a manifest under ~/.cache/qlora/base/KEY (QLORA_CACHE moves the root). The key
covers all that decides a single bit of it. Files are written whole or not at all; every byte is compared with the
manifest's SHA-256 while it is read.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora_cli.artifacts import cache_root, read_json
from qlora_cli.core.distributed.weight_shards import WeightShards
from qlora_cli.core.experts.four_bit_experts import FourBitExperts, pack_experts
from qlora_cli.core.models.account import plan_packing
from qlora_cli.core.models.files import ModelFiles
from qlora_cli.core.models.packing import share_weights
from qlora_cli.core.models.quantization import restored_linear
from qlora_cli.core.models.structure import build_empty
from qlora_cli.core.storage.disk_space import free_disk_bytes
from qlora_cli.core.storage.hashed_file import PIECE_BYTES, HashedFile, write_hashed_file
from qlora_cli.core.storage.publish import atomic_directory
from qlora_cli.core.storage.temporaries import sweep
from qlora_cli.core.untrusted import is_ours
from qlora_cli.core.weights.mapped_file import MappedFile
from qlora_cli.errors import RunError, first_line
from qlora_cli.events import Caution, Notice, Report, report_nothing
from qlora_cli.launch import is_silent_rank

FORMAT = 1  # raised when an older copy cannot be read
WEIGHTS, MANIFEST = "base.safetensors", "base.json"
SPARE_BYTES = 2 * 2**30  # room left on the disk beside a copy
COPY = "_qlora_copy"  # in a model's `__dict__`: the file in which its packed weights lie; None where they do not
FOUR_BIT = "quant_state.bitsandbytes__"  # how the state of a packed weight begins, behind "weight."
HOST = torch.device("cpu")


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


def save_base(
    model: Any,
    facts: Mapping[str, Any],
    report: Report = report_nothing,
    weight_shards: WeightShards | None = None,
    piece_bytes: int = PIECE_BYTES,
    stamps: Mapping[str, list[int]] | None = None,
) -> None:
    """Keeps a copy of a quantised base, before an adapter is attached, unless there is one or the disk is short.

    Args:
        model: As `load_base` made it.
        facts: See `base_directory`.
        report: Receives why no copy could be kept; the work goes on without.
        weight_shards: Where the model holds this rank's share only: all ranks call, and the main one writes what it gathers.
        piece_bytes: Of the file, covered by one digest.
        stamps: `ModelFiles.weight_stamps` of what was quantised.
    """
    directory = base_directory(facts)
    is_main = weight_shards.ranks.is_main if weight_shards else not is_silent_rank()
    shapes = {
        name: _whole_shape(model, name, tensor) if weight_shards else tensor for name, tensor in _tensors_of(model)
    }
    wanted = is_main and not _is_file(directory / MANIFEST) and _has_room(directory.parent, shapes.values(), report)
    if weight_shards:
        wanted = bool(weight_shards.ranks.all_reduce_max(int(wanted), model.device))
    if not wanted:
        return
    values = (
        weight_shards.gather(tensor, shapes[name], model.device) if weight_shards and shapes[name].is_meta else tensor
        for name, tensor in _tensors_of(model)
    )
    try:
        if is_main:
            with atomic_directory(directory) as temporary:
                with (temporary / WEIGHTS).open("wb") as stream:
                    digests = write_hashed_file(stream, shapes, values, piece_bytes=piece_bytes)
                manifest = {
                    "format": FORMAT,
                    "facts": dict(facts),
                    "weights": dict(stamps or {}),
                    "hashed_bytes": piece_bytes,
                    "sha256": digests,
                }
                (temporary / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    except (OSError, RunError) as error:  # a convenience only: never a reason to stop
        report(Caution(f"The quantised base could not be kept in {directory.parent}: {first_line(error).rstrip('.')}."))
    for _ in values:
        pass  # every rank takes part in what is gathered, whether it or the main one writes or not


def _has_room(directory: Path, tensors: Iterable[Tensor], report: Report) -> bool:
    total_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if free_disk_bytes(directory) >= total_bytes + SPARE_BYTES:
            return True
    except OSError as error:
        report(Caution(f"The quantised base cannot be kept in {directory}: {error.strerror}."))
        return False
    report(Notice(f"The quantised base is not kept in {directory}: the disk is nearly full."))
    return False


def _is_file(path: Path) -> bool:
    """Whether a file can be seen; a cache that others may not enter holds nothing for them."""
    try:
        return path.is_file()
    except OSError:
        return False


def _whole_shape(model: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """A tensor on the meta device as it is once gathered, for one that ranks hold shares of; any other as it is."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner) if owner in dict(model.named_modules()) else None
    if isinstance(module, FourBitExperts):
        return module.whole(leaf, tensor)
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
    # With what undoes the packing of one that is tied: `….weight.absmax`.
    yield from (
        (n, t) for n, t in state.items() if n not in tied and n.rpartition(".weight.")[0] + ".weight" not in tied
    )
    yield from ((name, tensor) for name, tensor in model.named_buffers() if name not in state)


def restore_base(
    facts: Mapping[str, Any],
    files: ModelFiles,
    compute_dtype: torch.dtype,
    device: torch.device,
    weight_shards: WeightShards | None = None,
) -> Any | None:
    """The base whose copy is here, bit for bit; None where there is none. A damaged copy is reported and removed.

    Args:
        facts: See `base_directory`.
        files: Of the model; their `report` receives what is read.
        compute_dtype: Of its arithmetic.
        device: On which every tensor is.
        weight_shards: Keep this rank's share of each packed weight and its constants only.
    """
    directory = base_directory(facts)
    sweep(directory.parent)
    if not _is_file(directory / MANIFEST):
        return None
    if not all(is_ours(path) for path in (directory, directory / MANIFEST, directory / WEIGHTS)):
        files.report(Caution(f"The copy of the quantised base in {directory} may be another user's and is not taken."))
        return None
    try:
        manifest = read_json(directory / MANIFEST)
        if (kept := manifest.get("weights")) and files.weight_stamps not in ({}, kept):
            raise RunError("the model's files were written since, or another copy of the model was used last.")
        tensors, copy = _read(directory / WEIGHTS, manifest, device, weight_shards)
        model = build_empty(files.config, trust_remote_code=files.trust_remote_code)
        _blank_experts(model, tensors, facts, compute_dtype)
        _fill(model, tensors, compute_dtype, device)
    except (RunError, OSError, ValueError, KeyError, AttributeError) as error:
        reason = first_line(error).rstrip(".")
        files.report(Caution(f"The copy of the quantised base in {directory} is made anew: {reason}."))
        error.__traceback__ = None  # it holds what was read, on the device that is about to be filled again
        shutil.rmtree(directory, ignore_errors=True)
        return None
    model.__dict__[COPY] = copy
    files.report(Notice(f"Using the quantised base kept in {directory.parent}."))
    return model


def _read(
    path: Path, manifest: Mapping[str, Any], device: torch.device, weight_shards: WeightShards | None
) -> tuple[dict[str, Tensor], MappedFile | None]:
    """Every tensor of the file, verified, on the device; with shards `in_copy` packed weights are the file's own bytes.

    Raises:
        RunError: A byte is not what was written.
    """
    copy = MappedFile(path) if weight_shards and weight_shards.in_copy else None
    with HashedFile(path, manifest["sha256"], int(manifest["hashed_bytes"])) as file:
        packed = {name.split(f".{FOUR_BIT}")[0] for name in file.entries if f".weight.{FOUR_BIT}" in name}
        sharded = {name for weight in packed for name in (weight, f"{weight}.absmax")}
        sharded |= {name for stack in _stacks_in(file.entries) for name in (stack, f"{stack}_absmax")}
        tensors, parts = {}, []
        for name, entry in file.entries.items():
            if copy is not None and name in sharded:
                tensors[name] = copy.tensor(entry.start, entry.dtype, entry.shape)
            elif weight_shards and name in sharded:
                elements = entry.elements
                first, last = weight_shards.bounds(elements)
                tensors[name] = weight_shards.blank(elements, entry.dtype, device)
                parts.append((entry.start + first * entry.dtype.itemsize, tensors[name][: last - first]))
            else:
                home = HOST if FOUR_BIT in name else device  # the state itself is read by the host
                tensors[name] = torch.empty(entry.shape, dtype=entry.dtype, device=home)
                parts.append((entry.start, tensors[name]))
        file.fill(parts, device)
    return tensors, copy


def _stacks_in(names: Iterable[str]) -> set[str]:
    """Names of the stacks of experts among those of a copy's tensors."""
    names = set(names)
    return {name.removesuffix("_absmax") for name in names if name.endswith("_absmax")} & names


def _blank_experts(model: Any, names: Iterable[str], facts: Mapping[str, Any], compute_dtype: torch.dtype) -> None:
    """Gives modules of experts whose stacks are in a copy the room for them, without memory."""
    for owner in {name.rpartition(".")[0] for name in _stacks_in(names)}:
        pack_experts(
            model.get_submodule(owner),
            compute_dtype=compute_dtype,
            quant_type=facts["quant_type"],
            double_quant=facts["double_quant"],
            device=torch.device("meta"),
        )


def _fill(model: Any, tensors: dict[str, Tensor], compute_dtype: torch.dtype, device: torch.device) -> None:
    """Puts tensors into a model on the meta device.

    Raises:
        RunError: The model has another structure than the one that was saved.
    """
    names = [key.split(f".weight.{FOUR_BIT}")[0] for key in tensors if f".weight.{FOUR_BIT}" in key]
    shared = plan_packing(model).shared
    packed = {name: {"": tensors.pop(f"{name}.weight")} for name in names}
    for key in list(tensors):
        name, _, ending = key.rpartition(".weight.")
        if name in packed:
            packed[name][f".{ending}"] = tensors.pop(key)
    for name, parts in packed.items():
        bias = tensors.pop(f"{name}.bias", None)
        model.set_submodule(name, restored_linear(compute_dtype, device, parts, bias))
    share_weights(model, {other: name for other, name in shared.items() if name.removesuffix(".weight") in names})
    for name, tensor in tensors.items():
        owner_name, _, leaf = name.rpartition(".")
        owner = model.get_submodule(owner_name)
        if leaf in owner._parameters:
            made = nn.Parameter(tensor, requires_grad=False)
            made.__dict__.update(owner._parameters[leaf].__dict__)  # of a stack of experts, the weights it stands for
            owner._parameters[leaf] = made
        elif leaf in owner._buffers:
            owner._buffers[leaf] = tensor
        else:
            raise RunError(f"the model has no {name} any more.")
    # What is in the copy twice, the model had twice, whatever its configuration says of tied embeddings.
    lacking = {name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter.is_meta}
    model.tie_weights(missing_keys=lacking)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta:
            raise RunError(f"{name} is not in it.")
