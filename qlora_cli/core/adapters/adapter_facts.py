"""Facts of an adapter: what its own files say, read without its base."""

import hashlib
import json
import os
import re
import shlex
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_cli.artifacts import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CHECKPOINTS,
    RUN_RECORD,
    describe_place,
    find_near,
    find_run_record,
    is_model,
    is_prepared,
    run_of,
)
from qlora_cli.core.storage.checkpoint import (
    list_checkpoints,
    newest_valid,
    recorded_digest,
    step_of,
    verify_checkpoint,
)
from qlora_cli.core.storage.content_digest import content_digests
from qlora_cli.core.storage.safetensors_header import read_header
from qlora_cli.core.untrusted import check_adapter_config, check_expressions
from qlora_cli.errors import AdapterError, CheckpointError, ModelError, RunError
from qlora_cli.events import Report, report_nothing
from qlora_cli.settings.ranges import HUB_ID

PREFIX = "base_model.model."  # of the names of all tensors that PEFT saves
ADAPTER_PART = re.compile(r"\.lora_.*$")
NUMBERS = ("F64", "F32", "F16", "BF16")  # in which adapters are stored
MAGNITUDES = (".lora_magnitude_vector", ".lora_magnitude_vector.weight")  # of DoRA, as PEFT calls them in its versions
BASE_SETTINGS = ("base_model_name_or_path", "revision")  # of adapter_config.json: where its base lies may change
# Of kinds of LoRA that are in effect for some tokens of a prompt alone, as PEFT's own `generate` tells its layers: told
# nothing, those of activated LoRA leave every answer the base's.
OF_SOME_TOKENS = {"alora_invocation_tokens": "aLoRA", "arrow_config": "Arrow"}
WRAPPER = re.compile(r"\.(base_layer|original_module|modules_to_save\.[^.]+)\b")


@dataclass(frozen=True)
class AdapterFacts:
    """What an adapter's own files say, without its base."""

    rank: int
    alpha: float
    scaling: float  # factor on B @ A
    dropout: float
    target_modules: tuple[str, ...]
    base_model: str | None
    rslora: bool
    dora: bool
    modules_to_save: tuple[str, ...]
    tensors: Mapping[str, tuple[tuple[int, ...], str]]  # name → (shape, safetensors dtype)
    config: Mapping[str, Any]  # adapter_config.json

    def scaling_of(self, module: str, rank: int) -> float:
        """The factor on B @ A of one module's pair of this rank: `alpha_pattern` gives modules their own."""
        patterns = self.config.get("alpha_pattern") or {}
        alpha = next((a for key, a in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), self.alpha)
        return float(alpha) / (rank**0.5 if self.rslora else rank)


def way_to_a_place(name: str) -> str:
    """What to do where a base has no place for a tensor of an adapter."""
    if name.startswith(PREFIX) and not re.search(r"\.lora_\w+\.\w+\.weight$", name):
        return "Give the base it was trained on with --model."
    return f"PEFT calls such a tensor {PREFIX}… .lora_A.weight: save the adapter with its save_pretrained."


def _no_adapter(directory: Path) -> AdapterError:
    """That there is none, and what is there instead."""
    way = "Train one with: qlora train, or give --adapter the right directory."
    near = find_near(directory, ADAPTER_CONFIG)
    meant = f"Type: --adapter {shlex.quote(str(near))}" if near else None
    if not directory.exists():
        if HUB_ID.fullmatch(str(directory)) and len(directory.parts) == 2:
            name = shlex.quote(directory.name)
            way += f" One of the hub is downloaded before: hf download {shlex.quote(str(directory))} --local-dir {name}"
        return AdapterError(f"There is no adapter in {directory}: there is no such directory.", meant or way)
    if directory.is_file():
        found, way = "it is a file, and an adapter is a directory", meant or "Give --adapter the directory of a run."
    elif is_prepared(directory) or is_model(directory):
        found, way = describe_place(directory) or ("", way)
    else:
        found, way = f"{ADAPTER_CONFIG} is missing", meant or way
    return AdapterError(f"There is no adapter in {directory}: {found}.", way)


def read_adapter(directory: Path) -> AdapterFacts:
    """Reads what an adapter directory says of itself.

    Raises:
        AdapterError: No adapter there, pickle weights only, or files that cannot be read.
    """
    config_path, weights_path = directory / ADAPTER_CONFIG, directory / ADAPTER_WEIGHTS
    if not config_path.is_file():
        raise _no_adapter(directory)
    if not weights_path.is_file():
        pickle = next(directory.glob("adapter_model*.bin"), None)
        found = f"only {pickle.name}, a pickle file, is there and is not read" if pickle else "it is missing"
        hint = "Save the adapter as safetensors." if pickle else way_on(directory)
        if other := next(directory.glob("adapters.*"), None):
            found = f"only {other.name}, as mlx-lm writes it, is there and is not read"
            hint = "Convert it to PEFT's names, or train it again with: qlora train"
        raise AdapterError(f"{weights_path} is needed: {found}.", hint)
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
        kind = config.get("peft_type")
        of_some_tokens = next((called for name, called in OF_SOME_TOKENS.items() if config.get(name)), None)
        if kind != "LORA" or of_some_tokens:
            raise AdapterError(
                f"The adapter in {directory} is of the kind {of_some_tokens or kind}.",
                "Only LoRA and DoRA adapters are read, in effect for every token.",
            )
        check_adapter_config(config, directory)
        descriptor, header = read_header(weights_path)
        os.close(descriptor)
        tensors = {name: (entry.shape, entry.dtype_name) for name, entry in sorted(header.entries.items())}
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
    except (ValueError, KeyError, TypeError, AttributeError, OSError, ModelError, RecursionError) as error:
        reason = str(error).rstrip(".")
        raise AdapterError(f"The adapter in {directory} cannot be read: {reason}.", way_on(directory)) from error
    _check_tensors(tensors, config, weights_path)
    check_expressions(config, {name.split(".lora_", 1)[0] for name in tensors}, directory)
    _check_ranks(tensors, config, weights_path)
    rslora = bool(config.get("use_rslora"))
    targets = config.get("target_modules") or ()
    return AdapterFacts(
        rank=rank,
        alpha=alpha,
        scaling=alpha / (rank**0.5 if rslora else rank),
        dropout=float(config.get("lora_dropout") or 0),
        target_modules=(targets,) if isinstance(targets, str) else tuple(sorted(targets)),
        base_model=config.get("base_model_name_or_path"),
        rslora=rslora,
        dora=bool(config.get("use_dora")),
        modules_to_save=tuple(config.get("modules_to_save") or ()),
        tensors=tensors,
        config=config,
    )


def settings_digest(directory: Path) -> str:
    """SHA-256 of an adapter's settings but for where its base lies, in hexadecimal."""
    config = json.loads((directory / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    known = {name: value for name, value in config.items() if name not in BASE_SETTINGS}
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def require_unchanged(directory: Path, report: Report) -> None:
    """Compares an adapter that can be read with the digests that its run recorded; those of other programs have none.

    Raises:
        AdapterError: Weights or settings are not what the run wrote.
        RunError: The run's record cannot be read, or the weights are being written.
    """
    weights, record = directory / ADAPTER_WEIGHTS, directory / RUN_RECORD
    expected, in_manifest = _recorded_weights(directory)
    changed, keep = weights, f'remove "adapter_sha256" from {record}'
    if in_manifest:
        keep = f"copy {ADAPTER_CONFIG}, {ADAPTER_WEIGHTS} and {RUN_RECORD} into a directory of their own"
    if expected is None or content_digests([weights], report) == [expected]:
        settings = find_run_record(directory).get("adapter_config_sha256") if record.is_file() else None
        if settings in (None, settings_digest(directory)):
            return
        changed, keep = directory / ADAPTER_CONFIG, f'remove "adapter_config_sha256" from {record}'
    way = way_on(directory)
    raise AdapterError(
        f"{changed} is not what its run wrote: it was damaged, or changed by another program.",
        f"If that was meant, {keep}. If not, {way[0].lower()}{way[1:]}",
    )


def _recorded_weights(directory: Path) -> tuple[str | None, bool]:
    """SHA-256 of an adapter's weights as its run recorded it, and whether that is in the manifest of a checkpoint."""
    in_manifest = recorded_digest(directory, ADAPTER_WEIGHTS)
    if in_manifest is not None or not (directory / RUN_RECORD).is_file():
        return in_manifest, in_manifest is not None
    return find_run_record(directory).get("adapter_sha256"), False


def way_on(directory: Path) -> str:
    """What to do about an adapter that is damaged: which checkpoint of its run has it whole, or else another one."""
    needed, root = (ADAPTER_CONFIG, ADAPTER_WEIGHTS), run_of(directory) / CHECKPOINTS
    weights, expected = directory / ADAPTER_WEIGHTS, None
    with suppress(RunError):  # the record is damaged too
        expected = _recorded_weights(directory)[0]
    with suppress(RunError, OSError):
        if expected is None and weights.is_file():
            expected = content_digests([weights], report_nothing)[0]  # where something else of it is damaged
    for path in list_checkpoints(root):
        if recorded_digest(path, ADAPTER_WEIGHTS) != expected:
            continue
        try:
            verify_checkpoint(path, needed).close()
        except CheckpointError:
            continue
        return f"The same adapter is whole in --adapter {shlex.quote(str(path))}"
    whole, _ = newest_valid(root, needed)
    if whole is not None:
        whole.close()
        return f"That of step {step_of(whole.path):,} is whole in --adapter {shlex.quote(str(whole.path))}"
    return "Train it again, or copy it again from where it was made."


def _check_tensors(tensors: Mapping[str, tuple[tuple[int, ...], str]], config: Mapping[str, Any], path: Path) -> None:
    """Refuses a file that a save went wrong with: PEFT would load it as an adapter that changes nothing, or another.

    Saved from sharded weights, a file of 40 bytes without any tensor is what other trainers leave (peft#2892).
    """
    codes = [f"{name} is stored as {dtype}" for name, (_, dtype) in tensors.items() if dtype not in NUMBERS]
    if codes:
        raise AdapterError(f"{codes[0]} in {path}, which is not read.", "Save the adapter in 32 or 16 bits.")
    wrong = None if tensors else "it holds no tensors at all"
    if empty := [name for name, (shape, _) in tensors.items() if 0 in shape]:
        wrong = f"{len(empty)} of its tensors are empty, first {empty[0]}, as one of sharded weights saves them"
    for name, (shape, _) in tensors.items():
        other = _other_half(name)
        if other is None:
            continue
        module, _, half = name.partition(".lora_")
        # Of BD-LoRA's halves blocks alone are stored, which have another rank.
        is_checked = half.startswith(("A", "embedding_A")) and not config.get("use_bdlora")
        if other not in tensors:
            wrong = wrong or f"{name} is half of a pair"
        elif is_checked and shape[:1] != tensors[other][0][1:2]:
            wrong = wrong or f"{name} and its other half are of different ranks, {shape} and {tensors[other][0]}"
        elif config.get("use_dora") and not any(f"{module}{ending}" in tensors for ending in MAGNITUDES):
            wrong = wrong or f"use_dora is set, and {module} has no magnitudes"
    if wrong is not None:
        raise AdapterError(f"{path} is no whole adapter: {wrong}.", way_on(path.parent))


def _check_ranks(tensors: Mapping[str, tuple[tuple[int, ...], str]], config: Mapping[str, Any], path: Path) -> None:
    """Refuses pairs of other ranks than the settings beside them say: their scaling is not known, and PEFT loads none such.

    Those of stacks of experts, whose ranks lie beside each other, and of BD-LoRA's blocks are not looked at.
    """
    if config.get("use_bdlora") or config.get("target_parameters"):
        return
    given = config.get("rank_pattern") or {}  # of some a pattern a module: compiled once
    patterns = [(re.compile(rf"(.*\.)?({key})$"), rank) for key, rank in given.items()]
    for name, (shape, _) in tensors.items():
        half = re.search(r"\.lora_(?:embedding_A$|A\.)", name)
        if half is None or ".experts." in name:
            continue
        module = name[: half.start()].removeprefix(PREFIX)
        rank = next((own for pattern, own in patterns if pattern.match(module)), int(config["r"]))
        if shape[0] != rank:
            raise AdapterError(
                f"{name} is of rank {shape[0]}, and {path.with_name(ADAPTER_CONFIG)} makes it {rank}.",
                "Give both files as one save wrote them: the rank decides how an adapter is scaled.",
            )


def _other_half(name: str) -> str | None:
    """Of A the name of B and the other way round; None for what is neither."""
    match = re.search(r"\.lora_(embedding_)?([AB])(?=\.|$)(?!\.bias)", name)
    if match is None:
        return None
    return f"{name[: match.start(2)]}{'B' if match[2] == 'A' else 'A'}{name[match.end(2) :]}"


def base_name(name: str) -> str:
    """A module's or parameter's name without what PEFT puts around it; an adapter's part has its module's name."""
    return WRAPPER.sub("", ADAPTER_PART.sub("", name.removeprefix(PREFIX)))
