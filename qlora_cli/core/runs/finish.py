"""Finished run: its result, and adapter, tokenizer, run record, model card and loss curve in the run directory."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qlora_cli import __version__
from qlora_cli.artifacts import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    BAD_ROWS,
    CHECKPOINTS,
    FORMAT,
    MODEL_CARD,
    RUN_RECORD,
    sha256_of,
    ways_to_merge,
    write_bytes,
    write_json,
)
from qlora_cli.config import TrainConfig
from qlora_cli.core.adapters.adapter_facts import settings_digest
from qlora_cli.core.data.dataset import PreparedRows
from qlora_cli.core.device import list_versions, read_vram
from qlora_cli.core.merge.checkpoint_files import write_chat_template
from qlora_cli.core.models.files import save_tokenizer
from qlora_cli.core.models.identity import BaseIdentity
from qlora_cli.core.models.model_card import hub_dataset
from qlora_cli.core.prompts.formatting import Formatting, template_to_serve
from qlora_cli.core.rope_scaling import changed_positions
from qlora_cli.core.runs.directory import finished_files
from qlora_cli.core.runs.inputs import Run, RunInputs
from qlora_cli.core.runs.metrics import draw_loss_curve
from qlora_cli.core.runs.model_card import write_card, write_example
from qlora_cli.core.runs.report_page import write_report_page
from qlora_cli.core.runs.results import TrainResult
from qlora_cli.core.storage.checkpoint import Checkpoint, checkpoint_path, verify_checkpoint
from qlora_cli.core.training.progress import TrainerState
from qlora_cli.core.training.state import REQUIRED_FILES
from qlora_cli.errors import CheckpointError
from qlora_cli.events import Caution, Notice, Vram
from qlora_cli.settings.setting import recorded_fields


def describe_result(
    run: Run, inputs: RunInputs, loaded: Vram | None, state: TrainerState, seconds: float
) -> TrainResult:
    """What the run came to; `loaded` is the memory right after loading. Every rank takes part, for the card that holds most."""

    def highest(value_bytes: int | None) -> int | None:
        return None if value_bytes is None else run.ranks.all_reduce_max(value_bytes, run.device)

    vram, footprint = read_vram(run.device), inputs.profile.footprint
    return TrainResult(
        output=run.config.output,
        steps=state.step,
        total_steps=inputs.data.sampler.total_steps,
        tokens=state.tokens,
        seconds=seconds,
        final_loss=state.last_loss,
        eval_loss=state.last_eval_loss,
        best_eval_loss=state.best_loss,
        best_step=state.best_step,
        stopped_early=state.stopped_early,
        trainable_parameters=footprint.trainable_parameters,
        total_parameters=footprint.total_parameters,
        base_vram_bytes=highest(loaded.now_bytes if loaded else None),
        loading_vram_bytes=highest(loaded.peak_bytes if loaded else None),
        peak_vram_bytes=highest(vram.peak_bytes if vram else None),
    )


def write_run(
    run: Run,
    inputs: RunInputs,
    base: BaseIdentity,
    save_adapter: Callable[[Path], None],
    result: TrainResult,
    started: dict[str, Any],
    best: Checkpoint | None,
) -> None:
    """Writes the files that make a directory of checkpoints and metrics a finished run. No network call is made.

    `save_adapter` writes the trained adapter, as it is now, into a directory; that of `best`, from `find_best`, is kept
    instead. `started` is what is recorded of the adapter's start, and of merging it.
    """
    output, rows = run.output, inputs.rows
    if (rows.directory / BAD_ROWS).is_file():
        write_bytes(output / BAD_ROWS, (rows.directory / BAD_ROWS).read_bytes())
    data = rows.manifest["data"]
    training = {name: value for name, value in result.to_dict().items() if name != "output"}
    settings = {f.name: getattr(run.config, f.name) for f in recorded_fields(TrainConfig).values()}
    counts = {name: value for name, value in rows.manifest.items() if isinstance(value, (int, float, str))}
    title = f"{settings['model']} on {data['source']}"
    draw_loss_curve(output, title=f"Loss of {title}")
    write_report_page(output, title=title, results=training, settings=settings, data={**data, **counts})
    formatting = Formatting.from_dict(rows.manifest["formatting"])
    with finished_files(output) as directory:
        save_tokenizer(inputs.files, directory)
        if template := template_to_serve(formatting, inputs.files.tokenizer):
            write_chat_template(directory, template)
        if best is None:
            save_adapter(directory)
        else:
            for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG):
                (directory / name).write_bytes(best.read(name))
        digest = sha256_of(directory / ADAPTER_WEIGHTS)
        write_record(directory, base, rows, training=training, adapter_sha256=digest, **started)
        card = write_card(
            base=base.model if base.revision else None,  # a directory has no revision, and its path stays private
            dataset=hub_dataset(data),
            settings=asdict(run.config),
            results=training,
            held=asdict(base),
            example=write_example(formatting, inputs.files.tokenizer),
            merging=ways_to_merge(started, ".", "merged"),
            positions=changed_positions(inputs.files.config) if inputs.files.rope_scaling else None,
        )
        (directory / MODEL_CARD).write_text(card, encoding="utf-8")


def write_record(directory: Path, base: BaseIdentity, rows: PreparedRows, **more: Any) -> None:
    """Writes what has to be known to use the adapter in a directory beside it: its base, how that was held, how prompts
    were formatted."""
    data = {**rows.manifest["data"], **{name: rows.manifest[name] for name in ("max_length", "rows_sha256")}}
    record = {
        "format": FORMAT,
        "qlora_version": __version__,
        "base": asdict(base),
        "data": {**data, "prepared": str(rows.directory.absolute())},
        "formatting": rows.manifest["formatting"],
        "adapter_config_sha256": settings_digest(directory),
        **more,
        "versions": list_versions(),
    }
    write_json(directory / RUN_RECORD, record)


def find_best(run: Run, step: int | None) -> Checkpoint | None:
    """The checkpoint of the best evaluation, where its adapter is to be kept; None, with a caution, where it is damaged: the
    run must not be lost too."""
    if not run.config.keep_best or not step:
        return None
    try:
        best = verify_checkpoint(checkpoint_path(run.output / CHECKPOINTS, step), REQUIRED_FILES)
    except CheckpointError as error:
        run.report(
            Caution(f"The best adapter, of step {step}, is lost ({error.message}): the last one is kept instead.")
        )
        return None
    run.report(Notice(f"The adapter kept is that of step {step}, which had the lowest evaluation loss."))
    return best
