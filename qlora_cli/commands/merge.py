"""`qlora merge`: an adapter and its base as one plain transformers checkpoint, compared with base + adapter."""

import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer

from qlora_cli import __version__
from qlora_cli.artifacts import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CHAT_TEMPLATE,
    MODEL_CARD,
    find_run_record,
    run_of,
    temporary_beside,
)
from qlora_cli.config import MergeConfig
from qlora_cli.core.adapters.adapter_facts import read_adapter
from qlora_cli.core.adapters.adapter_record import find_adapter, read_adapter_record
from qlora_cli.core.adapters.fitting import fitted_adapter
from qlora_cli.core.adapters.lora import report_unchanged
from qlora_cli.core.adapters.shared_layers import one_delta_each
from qlora_cli.core.candidates.choice import DEQUANTIZED, ORIGINAL, Choice, choose_base
from qlora_cli.core.device import DTYPES, choose_device, dtype_name
from qlora_cli.core.export.gguf import GgufFile, require_converter, write_gguf
from qlora_cli.core.export.modelfile import MODELFILE, write_modelfile
from qlora_cli.core.generation.requests import closing_ids
from qlora_cli.core.merge.base import Base, find_base, with_biases
from qlora_cli.core.merge.checkpoint_files import (
    add_end_marks,
    copy_checkpoint_files,
    find_tokenizer,
    write_chat_template,
    write_config,
    write_index,
)
from qlora_cli.core.merge.compare_models import Comparison
from qlora_cli.core.merge.delta import read_deltas
from qlora_cli.core.merge.model_card import write_merged_card
from qlora_cli.core.merge.output_directory import find_place, unfinished_directory, unfinished_path
from qlora_cli.core.merge.plan import MergeOptions, MergePlan, MergePlanner
from qlora_cli.core.merge.push import check_upload, push_model
from qlora_cli.core.merge.verify import can_verify, require_same, verify_merge
from qlora_cli.core.merge.writer import choose_workers, write_files
from qlora_cli.core.models.files import has_tokenizer
from qlora_cli.core.models.structure import linear_names
from qlora_cli.core.models.weight_names import map_names, renamer
from qlora_cli.core.prompts.formatting import Formatting, default_formatting, template_to_serve
from qlora_cli.core.runs.validate import report_idle
from qlora_cli.core.storage.content_digest import content_digests
from qlora_cli.core.storage.disk_space import require_space
from qlora_cli.core.storage.ownership import Place
from qlora_cli.core.storage.safetensors_file import TensorFile
from qlora_cli.core.storage.temporaries import holding
from qlora_cli.core.weights.checkpoint import Checkpoint
from qlora_cli.errors import DataError, MergeError
from qlora_cli.events import Caution, Report
from qlora_cli.settings.groups import QuantizationSettings

SMALL_FILES_BYTES = 2**25  # tokenizer, configuration, card


@dataclass(frozen=True)
class MergeResult:
    """What a merge came to."""

    output: str
    base_model: str
    base: str  # dequantized or original
    kept: float | None  # share of the fine-tune's gain that is left in 4 bits; None where not measured
    base_losses: dict[str, float] | None  # nats a token: live, dequantized, original; None where not measured
    dtype: str
    quantized: bool
    total_bytes: int
    files: int
    files_reused: int  # finished by an interrupted merge
    restored_weights: int
    changed_weights: int
    merge_seconds: float
    verification: Comparison | None
    pushed_to: str | None
    gguf: GgufFile | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields."""
        return asdict(self)


def merge(config: MergeConfig, report: Report) -> MergeResult:
    """Merges an adapter into its base, file by file, and compares the result with base + adapter.

    Raises:
        QloraError: In one sentence; whatever can be checked is checked before anything is written.
    """
    report_idle(config, report)
    adapter_directory, output = find_adapter(Path(config.adapter), report), Path(config.output)
    source = read_adapter_record(adapter_directory, report)
    if config.push:
        check_upload(config.push)
    if config.format == "gguf":
        require_converter(quantize=config.quantize)
    reads = [adapter_directory, run_of(adapter_directory), Path(config.model or source.name_base()[0]).expanduser()]
    place = find_place(output, overwrite=config.overwrite, reads=reads)
    with ExitStack() as stack:
        base = find_base(source, config, report)
        fitted = stack.enter_context(fitted_adapter(adapter_directory, base.model, base.files))
        facts = read_adapter(fitted)
        base = with_biases(base, facts, renamer(base.model))
        adapter = stack.enter_context(TensorFile(fitted / ADAPTER_WEIGHTS))
        report_unchanged(((name, adapter.read(name)) for name in adapter.entries), adapter_directory, report)
        options = choose_options(config, base, choose_device())
        files = stack.enter_context(Checkpoint(base.files.weights, base.stored, options.device)).files
        keep_tied = bool(facts.config.get("ensure_weight_tying"))
        deltas = one_delta_each(read_deltas(facts, base.model, renamer(base.model)), base.model, adapter)
        names = map_names((name for file in files for name in file.entries), base.model)

        def make_planner(options: MergeOptions) -> tuple[MergePlanner, MergePlan]:
            held = (base.stored, base.new_biases, base.skipped)
            planner = MergePlanner(files, names, base.model, deltas, adapter, options, *held)
            return planner, planner.plan(keep_tied=keep_tied)

        plan = make_planner(options)[1]
        verifies = can_verify(plan, base, facts, options, report) if config.verify is None else config.verify
        tokenizer = find_tokenizer(base.files, adapter_directory, plan.vocabulary or base.vocabulary, report)
        require_space(place.path, missing_bytes(place, plan))
        scratch = stack.enter_context(scratch_directory(place))
        choice = choose_base(config, source, base, make_planner, options, scratch, report)
        options = replace(options, restore=choice.base == DEQUANTIZED)
        plan = make_planner(options)[1]
        if choice.rounded:
            plan = choice.rounded.put_into(plan)
        with unfinished_directory(place, shown=config.output, resume=config.resume) as directory:
            started = time.perf_counter()
            key = merge_key(choice, base, adapter_directory, options, report)
            reused = write_weights(plan, directory, options, key, report)
            seconds = time.perf_counter() - started
            write_config(directory, base, plan, options)
            copy_checkpoint_files(base.files.directory, tokenizer, adapter_directory, directory)
            formatting = find_run_record(adapter_directory).get("formatting")
            if formatting and has_tokenizer(directory):
                trained, merged = Formatting.from_dict(formatting), replace(base.files, directory=directory)
                add_end_marks(directory, closing_ids(merged.tokenizer, trained))
                template = template_to_serve(trained, merged.tokenizer)
                if template and adapter_directory / CHAT_TEMPLATE not in tokenizer.get(adapter_directory, ()):
                    write_chat_template(directory, template)
            write_index(directory, [file.name for file in plan.files])
            comparison = rows = gguf = None
            if verifies:
                comparison, rows = verify_merge(directory, adapter_directory, base, plan, options, report)
                faithful = options.restore and not options.pack and not base.rounds_otherwise
                require_same(
                    comparison,
                    rows,
                    faithful=faithful,
                    max_kl=config.max_kl,
                    report=report,
                    chosen=bool(choice.losses),
                )
            data = find_run_record(adapter_directory).get("data") or {}
            card = write_merged_card(base, options, data, comparison, rows, choice.card_lines())
            (directory / MODEL_CARD).write_text(card, encoding="utf-8")
            if config.format == "gguf":
                gguf = export_gguf(directory, find_run_record(adapter_directory), config.gguf_type, report)
    return MergeResult(
        output=config.output,
        base_model=base.files.name,
        base=DEQUANTIZED if options.restore else ORIGINAL,
        kept=choice.kept,
        base_losses=dict(choice.losses) or None,
        dtype=dtype_name(options.dtype),
        quantized=config.quantize,
        total_bytes=plan.total_bytes,
        files=len(plan.files),
        files_reused=len(reused),
        restored_weights=plan.restored,
        changed_weights=plan.changed,
        merge_seconds=seconds,
        verification=comparison,
        pushed_to=push_model(output, config.push, public=config.public) if config.push else None,
        gguf=gguf,
    )


def export_gguf(directory: Path, record: dict[str, Any], kind: str, report: Report) -> GgufFile:
    """Writes `model.gguf` and `Modelfile` beside a merged checkpoint; `record` is the run's.

    Raises:
        MergeError: The converter does not know the model, or a number came out another.
    """
    written = write_gguf(directory, kind, report)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    formatting = record.get("formatting")
    trained = Formatting.from_dict(formatting) if formatting else default_formatting(tokenizer)
    longest = (record.get("data") or {}).get("max_length")  # not there in records of before
    try:
        text = write_modelfile(trained, tokenizer, longest if isinstance(longest, int) else 0)
        (directory / MODELFILE).write_text(text, encoding="utf-8")
    except DataError as error:  # a template of several columns: Ollama gives one prompt
        report(Caution(f"No {MODELFILE} is written: {error.message.rstrip('.')}."))
    return written


# ---------------------------------------------------------------- options


def choose_options(config: MergeConfig, base: Base, device: torch.device) -> MergeOptions:
    """How weights are merged. A base stored in 32 or 64 bits is merged to the dtype it was trained in.

    Raises:
        MergeError: transformers could not load a 4-bit checkpoint of this architecture.
    """
    linears = [base.model.get_submodule(name) for name in linear_names(base.model)]
    subclass = next((m for m in linears if isinstance(m, nn.Linear) and type(m) is not nn.Linear), None)
    if config.quantize and subclass is not None:
        raise MergeError(
            f"transformers loads no 4-bit checkpoint of this model: it leaves its {type(subclass).__name__} in 16 bits.",
            "Leave --quantize out; qlora generate --adapter answers in 4 bits, beside the base.",
        )
    compute_dtype, stored = DTYPES[base.identity.compute_dtype], base.stored_dtype
    dtype = DTYPES[config.dtype] if config.dtype else stored if stored.itemsize == 2 else compute_dtype
    return MergeOptions(
        restore=config.base != ORIGINAL,
        quantization=QuantizationSettings(quant_type=base.identity.quant_type, double_quant=base.identity.double_quant),
        compute_dtype=compute_dtype,
        dtype=dtype,
        pack=config.quantize,
        device=device,
    )


# ---------------------------------------------------------------- files


def missing_bytes(output: Place, plan: MergePlan) -> int:
    """Bytes that a merge has yet to write, beside what an interrupted one left."""
    written_bytes = sum(path.stat().st_blocks * 512 for path in unfinished_path(output).glob("*.safetensors"))
    return plan.total_bytes + SMALL_FILES_BYTES - written_bytes


@contextmanager
def scratch_directory(place: Place) -> Iterator[Path]:
    """A directory for rounded weights on the output's disk, where one can be made there."""
    scratch = temporary_beside(place.home / place.path.name)
    try:
        scratch.mkdir(parents=True)
    except OSError:  # what is written there fails later, and says so
        with tempfile.TemporaryDirectory(prefix="qlora-rounded-") as elsewhere:
            yield Path(elsewhere)
        return
    try:
        with holding(scratch):
            yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def merge_key(choice: Choice, base: Base, adapter: Path, options: MergeOptions, report: Report) -> str:
    """A digest of all that the merged weights depend on."""
    parts = {
        "version": __version__,
        "base": asdict(base.identity) | {"model": None},
        "method": DEQUANTIZED if options.restore else ORIGINAL,
        "dtype": dtype_name(options.dtype),
        "pack": options.pack,
        "rounded": choice.rounded.digest if choice.rounded else None,
        "device": options.device.type,
        "adapter": content_digests([adapter / name for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)], report),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def write_weights(plan: MergePlan, directory: Path, options: MergeOptions, key: str, report: Report) -> list[str]:
    """Writes every weight file; returns the names of those that an interrupted merge of the same key had finished.

    Raises:
        MergeError: The GPU has no memory for it.
    """
    workers = choose_workers(plan.files, max(file.header.total_bytes for file in plan.files), options.device)
    try:
        return write_files(plan.files, directory, key=key, workers=workers, report=report)
    except torch.OutOfMemoryError as error:
        raise MergeError(
            "The GPU has no memory left to merge on.", "Put CUDA_VISIBLE_DEVICES= before the command."
        ) from error
