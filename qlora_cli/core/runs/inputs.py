"""Inputs of a training run: the base's configuration and tokenizer, and the rows of every step."""

import shlex
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from qlora_cli.artifacts import SPARE_ROWS
from qlora_cli.config import TrainConfig
from qlora_cli.core.data.dataset import MEMORY_SHARE, PreparedRows, RowSubset, count_shared, split_rows
from qlora_cli.core.data.prepare import prepare_cached_rows
from qlora_cli.core.data.sampler import BatchSampler
from qlora_cli.core.distributed.process_group import ProcessGroup
from qlora_cli.core.models.files import ModelFiles, resolve_model
from qlora_cli.core.planning.model_profile import ModelProfile
from qlora_cli.core.planning.recommendations import (
    advise_on_length,
    advise_on_rank,
    recommended_held_out_rows,
    recommended_learning_rate,
)
from qlora_cli.core.planning.run_plan import profile_run
from qlora_cli.core.prompts.encoder import encoder_of
from qlora_cli.core.runs.validate import check_held_out
from qlora_cli.core.training.lr_schedule import advise_on_rate
from qlora_cli.core.training.trainer import TrainingData
from qlora_cli.core.weights.stored_formats import stored_format
from qlora_cli.errors import DataError
from qlora_cli.events import Caution, Notice, Report, RunStarted
from qlora_cli.sizes import format_count


@dataclass(frozen=True)
class Run:
    """What every section of a run needs: the settings, and this process's part in it."""

    config: TrainConfig
    accelerator: Accelerator
    ranks: ProcessGroup
    device: torch.device
    report: Report  # of the main rank; the others report nothing

    @property
    def output(self) -> Path:
        """The run directory."""
        return Path(self.config.output)


@dataclass(frozen=True)
class RunInputs:
    """What a run reads before the base is loaded."""

    config: TrainConfig  # with what was left open and depends on base and rows: the learning rate, and what is held out
    files: ModelFiles  # of the base
    profile: ModelProfile  # of the base with its adapter
    rows: PreparedRows  # all of them
    data: TrainingData
    max_length: int

    def count_parameters(self) -> dict[str, int]:
        """Parameters trained, and those of base and adapter together, as the record keeps them."""
        footprint = self.profile.footprint
        return {"trainable": footprint.trainable_parameters, "total": footprint.total_parameters}

    def dealt_to(self, ranks: ProcessGroup) -> "RunInputs":
        """The same with the rows of each step dealt to these ranks."""
        data = deal_rows(self.config, self.data.rows, self.data.eval_rows, self.max_length, ranks)
        return replace(self, data=data)


def describe_start(run: Run, inputs: RunInputs, first_step: int, engine: str) -> RunStarted:
    """That training begins, as an event; `engine` as it describes itself."""
    footprint, world_size = inputs.profile.footprint, run.ranks.world_size
    return RunStarted(
        first_step=first_step,
        total_steps=inputs.data.sampler.total_steps,
        trainable_parameters=footprint.trainable_parameters,
        total_parameters=footprint.total_parameters,
        device=str(run.device) if world_size == 1 else f"{world_size} × {run.device.type}",
        engine=engine,
    )


def read_inputs(run: Run) -> RunInputs:
    """Reads a run's inputs; rows of --data are prepared in the cache.

    Raises:
        ModelError: There is no such base, or its tokenizer makes tokens that it has no embeddings for.
        AdapterError: The adapter cannot be attached to it.
        DataError: The rows cannot be read or trained on, or were prepared with another tokenizer.
        UsageError: A setting is about rows held out, and none are.
    """
    config = run.config
    assert config.model is not None
    files = resolve_model(
        config.model,
        config.model_revision,
        trust_remote_code=config.trust_remote_code,
        rope_scaling=config.rope_scaling,
        report=run.report,
    )
    stored_format(files.config, files.name)  # refuses what cannot be trained on before anything is downloaded
    profile = profile_run(config, files.held_config, run.device)
    with run.accelerator.main_process_first():
        if config.prepared is None:
            spare = run.output / SPARE_ROWS
            prepared = prepare_cached_rows(config, files.tokenizer, files.config, spare, run.report)
            rows = PreparedRows(prepared.directory, MEMORY_SHARE)
        else:
            rows = PreparedRows(config.prepared, MEMORY_SHARE)
            tokenizer = rows.manifest["tokenizer"]
            if tokenizer["sha256"] != encoder_of(files.tokenizer).spec.sha256:
                raise DataError(
                    f"The rows in {config.prepared} were prepared with another tokenizer ({tokenizer['name']}) than "
                    f"that of {files.name}.",
                    f"Prepare them anew: qlora prepare --model {shlex.quote(files.name)} --data ... "
                    f"--output {shlex.quote(str(config.prepared))}",
                )
            longest = int(rows.lengths.max(initial=0))
            # A run that was begun when only packs were refused goes on as it was.
            if config.max_length is not None and longest > config.max_length and not config.resume:
                raise DataError(
                    f"The longest row in {config.prepared} has {longest:,} tokens, and rows that are prepared are not cut: "
                    f"--max-length {config.max_length} is for shorter ones.",
                    f"Leave --max-length out, or prepare them anew: qlora prepare --model {shlex.quote(files.name)} "
                    f"--data ... --max-length {config.max_length} --output {shlex.quote(str(config.prepared))}",
                )
    files.check_token(rows.largest_id(), profile.vocabulary)
    max_length = config.max_length or rows.manifest["max_length"]
    settled = _settle(config, profile, rows, run.report)
    check_held_out(settled)
    train_rows, eval_rows = split_rows(
        rows, fraction=settled.eval_fraction or 0.0, count=settled.eval_rows, seed=config.seed
    )
    if len(eval_rows) and run.accelerator.is_main_process and (shared := count_shared(train_rows, eval_rows)):
        text = f"{shared} of {format_count(len(eval_rows), 'row')} held out {'is' if shared == 1 else 'are'} trained on as "
        run.report(Caution(f"{text}well: the data holds the same more than once, which flatters the evaluation loss."))
    data = deal_rows(config, train_rows, eval_rows, max_length, run.ranks)
    footprint, trained_tokens = profile.footprint, rows.manifest["trained_tokens"]
    advice = [advise_on_rank(config.rank, footprint.trainable_parameters, trained_tokens)]
    if config.max_steps is None:
        advice.append(advise_on_length(data.sampler.total_steps, config.epochs))
    for text in filter(None, advice):
        run.report(Notice(text))
    return RunInputs(settled, files, profile, rows, data, max_length)


def deal_rows(
    config: TrainConfig, train_rows: RowSubset, eval_rows: RowSubset, max_length: int, ranks: ProcessGroup
) -> TrainingData:
    """Which rows each step takes, and this rank of them; ranks that share tokens take the same.

    Raises:
        UsageError: They cannot be dealt out evenly.
    """
    sample = partial(
        BatchSampler,
        batch_size=config.batch_size,
        packing=config.packing,
        max_length=max_length,
        seed=config.seed,
        ranks=ranks.of_rows,
    )
    accumulation, groups = config.gradient_accumulation_steps, ranks.of_rows.world_size
    sampler = sample(train_rows.lengths, accumulation=accumulation, epochs=config.epochs, max_steps=config.max_steps)
    eval_sampler = None
    if len(eval_rows):
        eval_sampler = sample(eval_rows.lengths, accumulation=groups, epochs=1.0, max_steps=None)
    return TrainingData(train_rows, sampler, eval_rows, eval_sampler)


def _settle(config: TrainConfig, profile: ModelProfile, rows: PreparedRows, report: Report) -> TrainConfig:
    """The configuration with the learning rate and what is held out, as recommended where they were left open."""
    usual = recommended_learning_rate(profile.footprint.total_parameters)
    rate, fraction, count = config.learning_rate or usual, config.eval_fraction, config.eval_rows
    if advice := advise_on_rate(rate, usual, config.optimizer):
        report(Caution(advice))
    if fraction is None:
        fraction = 0.0
        if count is None and recommended_held_out_rows(len(rows)):
            documents, sizes = np.unique(rows.records, return_counts=True)
            if held_out := recommended_held_out_rows(len(rows), int(sizes.max())):
                count, said = held_out, f"{held_out} of the {len(rows):,} rows are held out for evaluation"
                said += "; --eval-fraction 0 trains on all of them."
            else:
                said = f"No rows are held out for evaluation: they are of {format_count(len(documents), 'document')}, "
                said += "each of which stays together; --eval-rows holds out whole ones."
            report(Notice(said))
    return replace(config, learning_rate=rate, eval_fraction=fraction, eval_rows=count)
