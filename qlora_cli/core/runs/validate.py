"""Validation of settings before libraries are imported: of one beside another, and of the files that they name."""

import importlib.util
import os
import shlex
from dataclasses import Field, fields
from functools import singledispatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_cli.artifacts import CHECKPOINTS, RUN_YAML, is_prepared, is_run
from qlora_cli.config import GenerateConfig, PrepareConfig, TrainConfig
from qlora_cli.errors import UsageError
from qlora_cli.events import Caution, Report
from qlora_cli.settings.groups import DataSettings
from qlora_cli.settings.setting import describe_idle, flag_of, is_given

if TYPE_CHECKING:
    from qlora_cli.core.distributed.process_group import ProcessGroup

PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX")}  # of a tracker, where its name is not the only one


@singledispatch
def check(config: Any) -> None:
    """Checks what one setting says of another.

    Raises:
        UsageError: A setting is missing, needs another one, or a package that is not installed.
    """


@check.register
def _check_prepare(config: PrepareConfig) -> None:
    if config.model is None:
        raise UsageError("No model was given, so there is no tokenizer.", "Add: --model ORG/NAME (or a directory).")
    if not config.data:
        raise UsageError("No data was given.", "Add: --data FILE (or a folder, a glob, or a hub dataset).")


@check.register
def _check_train(config: TrainConfig) -> None:
    if config.model is None:
        recorded = Path(config.output) / RUN_YAML
        way = f"Type: {_resume_with(recorded)}" if config.resume and recorded.is_file() else None
        raise UsageError("No base model was named.", way or "Add --model with a hub id or a directory.")
    if config.resume and config.overwrite:
        raise UsageError("--resume goes on with a run, and --overwrite removes it.", "Give one of them.")
    if (config.data is None) == (config.prepared is None):
        raise UsageError(
            "Training takes rows from one place.", "Give either --data or --prepared (written by qlora prepare)."
        )
    if config.eval_rows is not None or config.eval_fraction is not None:  # else it depends on how many rows there are
        check_held_out(config)
    tracker = config.report_to
    if tracker and not any(map(importlib.util.find_spec, PACKAGES.get(tracker, (tracker,)))):
        raise UsageError(
            f"--report-to {tracker} needs a package that is not installed.", f"Type: pip install {tracker}"
        )


def check_held_out(config: TrainConfig) -> None:
    """Checks that rows are held out where the settings are about them.

    Raises:
        UsageError: None are.
    """
    for name in ("keep_best", "patience", "eval_every"):
        if getattr(config, name) and not (config.eval_rows or config.eval_fraction):
            raise UsageError(
                f"--{name.replace('_', '-')} needs rows to evaluate on.", "Add --eval-fraction 0.1 or --eval-rows 100."
            )


@check.register
def _check_generate(config: GenerateConfig) -> None:
    if config.model is None and config.adapter is None:
        raise UsageError("generate needs a model.", "Add --adapter DIR of a run, or --model ID for the bare base.")
    if (config.input is None) != (config.output is None):
        raise UsageError("--input and --output go together.", "Give both, or a prompt on the command line.")
    if config.output == "-":
        raise UsageError(
            "--output is the file of answers, and - is no file.",
            "Name one; a prompt on the command line, or - for one from stdin, is answered on stdout.",
        )


def check_resumed(settings_file: Path | None, output: Path) -> None:
    """Checks that `--resume` with the settings of a run goes on with that run, which may have been moved since, or be named
    from another working directory: nothing would be found at `output`, and training would start anew there.

    Raises:
        UsageError: The run's checkpoints lie beside the settings, and none where these have the output.
    """
    if settings_file is None or settings_file.name != RUN_YAML:
        return
    run = settings_file.parent
    if not (run / CHECKPOINTS).is_dir() or (output / CHECKPOINTS).is_dir():
        return
    raise UsageError(
        f"{settings_file} names the output {output}, which holds no checkpoint; those of its run are in {run}.",
        f"Type: {_resume_with(settings_file)} --output {shlex.quote(str(run))}",
    )


def _resume_with(settings_file: Path) -> str:
    return f"qlora train --config {shlex.quote(str(settings_file))} --resume"


def check_places(config: Any) -> None:
    """Checks that what the settings name for reading is there, that something may be written where they say, and a run to
    its directory, as far as no library of tensors is needed to look.

    Raises:
        QloraError: As the command would, once it has imported that library.
    """
    try:
        Path.cwd()  # without one torch ends the process when it is imported
    except FileNotFoundError as error:
        raise UsageError(
            "The current directory is not there any more: it was removed, or made anew under its name.",
            'Type: cd "$PWD", or cd to another one, and the command again.',
        ) from error
    adapter, prepared, prompts = (getattr(config, name, None) for name in ("adapter", "prepared", "input"))
    model = getattr(config, "model", None)
    if model and not (Path(model).expanduser() / "config.json").is_file():
        from qlora_cli.core.models.hub import find_directory

        find_directory(model)
    if adapter and not is_run(Path(adapter)):
        from qlora_cli.core.adapters.adapter_facts import read_adapter

        read_adapter(Path(adapter))
    if prepared and not is_prepared(Path(prepared)):
        from qlora_cli.core.data.dataset import PreparedRows

        PreparedRows(prepared)
    if prompts and not Path(prompts).exists():
        from qlora_cli.core.generation.batch_file import read_prompts

        read_prompts(Path(prompts))
    data = getattr(config, "data", None) or ()
    if not all(place.exists() and not is_prepared(place) for place in (Path(name).expanduser() for name in data)):
        from qlora_cli.core.data.data_sets import read_data_sets
        from qlora_cli.core.data.sources import require_data

        for data_set in read_data_sets(data):
            require_data(data_set.name)
    output = None if getattr(config, "dry_run", False) else getattr(config, "output", None)
    if output:
        from qlora_cli.core.storage.ownership import require_writable, resolve

        require_writable(Path(output), resolve(Path(output)))
    if isinstance(config, TrainConfig) and output and Path(output).exists():
        from qlora_cli.core.runs.directory import require_free

        require_free(Path(config.output), resume=config.resume, overwrite=config.overwrite)


def list_given(config: Any) -> list[Field]:
    """Settings that have another value than their default."""
    return [option for option in fields(config) if is_given(option, config)]


def report_idle(config: Any, report: Report) -> None:
    """Reports the settings that were given and do nothing beside the others; of those of rows, preparing them says it."""
    given = list_given(config)
    rows = {option.name for option in fields(DataSettings)}
    for option in given:
        if option.name not in rows and (sentence := describe_idle(option, config)):
            report(Caution(sentence))
    prepared = [flag_of(option) for option in given if option.name in rows - {"max_length"}]
    if prepared and getattr(config, "prepared", None):
        verb = "does" if len(prepared) == 1 else "do"
        report(Caution(f"{', '.join(prepared)} {verb} nothing: rows of --prepared are as qlora prepare has made them."))


def check_ranks(config: TrainConfig, ranks: "ProcessGroup") -> None:
    """Checks that the processes started are those asked for.

    Raises:
        UsageError: They are not.
    """
    from qlora_cli.core.planning.run_plan import may_be_sharded

    sharded = config.shard or config.shard_offload
    if sharded and ranks.world_size == 1:
        raise UsageError(
            "--shard shards the base over several cards, and one process runs.", "Add --gpus 2, or leave --shard out."
        )
    if sharded and not may_be_sharded(config):
        raise UsageError(
            "--shard takes the fast engine and plain LoRA adapters only.",
            "Leave out --engine, --dora and --modules-to-save.",
        )
    if config.stream and (ranks.world_size > 1 or not may_be_sharded(config)):
        raise UsageError(
            "--stream takes one card, the fast engine and plain LoRA adapters only.",
            "Leave out --gpus, --engine, --dora and --modules-to-save, or shard the base with --shard.",
        )
    if config.context_parallel and config.context_parallel > 1:
        _check_context(config.context_parallel, config, ranks)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.world_size))
    if config.gpus is not None and config.gpus != here:
        raise UsageError(
            f"--gpus {config.gpus} was asked for, and {here} process{'es run' if here > 1 else ' runs'} on this machine.",
            "Leave --gpus out where torchrun or accelerate starts the processes.",
        )


def _check_context(size: int, config: TrainConfig, ranks: "ProcessGroup") -> None:
    if ranks.world_size == 1:
        raise UsageError(
            f"--context-parallel {size} shares the tokens of each row by {size} cards, and one process runs.",
            f"Add --gpus {size}, or leave --context-parallel out.",
        )
    if ranks.world_size % size:
        fitting = [n for n in range(2, ranks.world_size + 1) if ranks.world_size % n == 0]
        raise UsageError(
            f"--context-parallel {size} does not divide the {ranks.world_size} cards.",
            f"Use one of {', '.join(map(str, fitting))}.",
        )
    if config.engine != "fast":
        raise UsageError("--context-parallel takes the fast engine.", "Leave out --engine.")
