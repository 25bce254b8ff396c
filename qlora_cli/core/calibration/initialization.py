"""Initialization of a fresh adapter as the settings ask, kept in a cache by all that decides it."""

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from qlora_cli import __version__
from qlora_cli.artifacts import cache_root, read_json, sha256_of, write_json
from qlora_cli.core.adapters.lora import PeftModel, adapter_state, load_adapter_state
from qlora_cli.core.adapters.original_weights import OriginalWeights
from qlora_cli.core.adapters.shared_layers import apart
from qlora_cli.core.calibration.adapter_start import StartFacts, answer_weight_errors, calibrate_adapter
from qlora_cli.core.calibration.rows import batch_rows, choose_calibration_rows
from qlora_cli.core.data.dataset import RowSubset
from qlora_cli.core.device import free_memory
from qlora_cli.core.models.files import ModelFiles
from qlora_cli.core.models.identity import BaseIdentity
from qlora_cli.core.storage.disk_space import free_disk_bytes
from qlora_cli.core.storage.publish import atomic_directory
from qlora_cli.core.storage.temporaries import sweep
from qlora_cli.core.untrusted import is_ours
from qlora_cli.errors import ModelError, QloraError, RunError, first_line
from qlora_cli.events import Caution, Notice, Report
from qlora_cli.settings.groups import LoraSettings

FORMAT = 1  # raised when the same settings give other numbers
WEIGHTS, FACTS = "start.safetensors", "start.json"
FROM_THE_BASE = ("calibrated", "eva", "loftq")  # the others are PEFT's own, without a look at the weights
SPARE_BYTES = 2**30  # room left on the disk beside what is kept


@dataclass(frozen=True)
class StartInputs:
    """What an adapter may be started from."""

    files: ModelFiles  # of the base
    identity: BaseIdentity
    rows: RowSubset  # trained on
    seed: int
    device: torch.device
    cached: bool  # whether what was made is kept, and what was kept is used


def initialize_adapter(model: PeftModel, lora: LoraSettings, inputs: StartInputs, report: Report) -> StartFacts | None:
    """Sets A and B of a fresh adapter; None, and why is said, where it starts plainly.

    On the CPU the result is the same to the bit each time, made or kept, by the same number of threads: they share out
    the sums, whose order rounds.
    """
    if lora.init not in FROM_THE_BASE:
        return None
    if getattr(inputs.files.config, "quantization_config", None) is not None:
        report(
            Notice(
                f"The adapter starts plainly: {inputs.files.name} is stored quantised, and --init {lora.init} needs "
                "the 16-bit weights that they were made from."
            )
        )
        return None
    chosen = (
        [] if lora.init == "loftq" else choose_calibration_rows(inputs.rows, seed=inputs.seed, device=inputs.device)
    )
    batches = batch_rows(inputs.rows, chosen)
    fresh = {name: value.detach().cpu().clone() for name, value in adapter_state(model).items()}
    directory = _cache_directory(lora, inputs, batches)
    facts = _restore(model, directory, report) if inputs.cached else None
    if facts is None:
        facts = _make(model, lora, inputs, batches, report)
        if facts is None:
            load_adapter_state(model, fresh)
            return None
        if inputs.cached:
            _keep(model, directory, facts, report)
    report(Notice(describe_start(facts)))
    return facts


def describe_start(facts: StartFacts) -> str:
    """One sentence on how an adapter started."""
    where = f"{facts.rows} training rows of {facts.tokens:,} tokens" if facts.rows else "the weights alone"
    answered = "" if facts.answered is None else f": it answers {100 * facts.answered:.0f} % of the 4-bit error there"
    left = f"; {facts.left} linear layers start plainly" if facts.left else ""
    return f"The adapter starts from {where} (--init {facts.init}){answered}{left}."


def _make(
    model: PeftModel, lora: LoraSettings, inputs: StartInputs, batches: list[Tensor], report: Report
) -> StartFacts | None:
    base: Any = model.get_base_model()
    training = model.training
    model.eval()
    try:
        with OriginalWeights(inputs.files) as originals:
            if lora.init == "loftq":
                return answer_weight_errors(base, originals, report)
            return calibrate_adapter(base, originals, batches, lora.init, report)
    except torch.OutOfMemoryError:
        reason = "there is no memory left for one layer's original weights beside the base"
    except ModelError as error:
        reason = error.message
    finally:
        model.train(training)
    free_memory(inputs.device)
    report(Caution(f"The adapter starts plainly, without --init {lora.init}: {reason}"))
    return None


# ---------------------------------------------------------------- cache


def _cache_directory(lora: LoraSettings, inputs: StartInputs, batches: list[Tensor]) -> Path:
    digest = hashlib.sha256()
    for batch in batches:
        digest.update(str(tuple(batch.shape)).encode())
        digest.update(batch.numpy().tobytes())
    settings = {name: getattr(lora, name) for name in LoraSettings.__dataclass_fields__}
    facts = {
        "format": FORMAT,
        "version": __version__,
        "torch": torch.__version__,
        "base": {**asdict(inputs.identity), "model": None, "revision": None},
        "files": inputs.files.weight_stamps,
        "rows": digest.hexdigest(),
        "lora": settings,
        "seed": inputs.seed,
        "device": inputs.device.type,
        **({"threads": torch.get_num_threads()} if inputs.device.type == "cpu" else {}),
    }
    key = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:32]
    return cache_root() / "start" / key


def _restore(model: PeftModel, directory: Path, report: Report) -> StartFacts | None:
    """The start kept there; None where there is none. A damaged one is reported and removed, another user's not taken."""
    sweep(directory.parent)
    try:
        if not (directory / FACTS).is_file():
            return None
        if not all(is_ours(path) for path in (directory, directory / FACTS, directory / WEIGHTS)):
            report(Caution(f"The adapter's start in {directory} may be another user's and is not taken."))
            return None
        content, weights = read_json(directory / FACTS), (directory / WEIGHTS).read_bytes()
        if hashlib.sha256(weights).hexdigest() != content["sha256"]:
            raise RunError("it was changed.")
        load_adapter_state(model, load(weights))
        return StartFacts(**content["facts"])
    except (QloraError, SafetensorError, OSError, KeyError, TypeError) as error:
        report(Caution(f"The adapter's start kept in {directory} is made anew: {first_line(error)}"))
        shutil.rmtree(directory, ignore_errors=True)
        return None


def _keep(model: PeftModel, directory: Path, facts: StartFacts, report: Report) -> None:
    state = apart(adapter_state(model))
    total_bytes = sum(value.nbytes for value in state.values())
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        if free_disk_bytes(directory.parent) < total_bytes + SPARE_BYTES:
            return
        with atomic_directory(directory) as temporary:
            save_file(state, temporary / WEIGHTS)
            write_json(temporary / FACTS, {"sha256": sha256_of(temporary / WEIGHTS), "facts": asdict(facts)})
    except (OSError, QloraError, SafetensorError) as error:  # a convenience only
        report(
            Caution(f"The adapter's start could not be kept in {directory.parent}: {first_line(error).rstrip('.')}.")
        )
