"""Record of an adapter: the base it was trained on, and how prompts were formatted in its training."""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path

from qlora_cli.artifacts import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CHECKPOINTS,
    MERGE_RECORD,
    RUN_RECORD,
    RUN_YAML,
    find_run_record,
    is_run,
    read_json,
)
from qlora_cli.core.adapters.adapter_facts import AdapterFacts, read_adapter, require_unchanged, way_on
from qlora_cli.core.models.files import ModelFiles
from qlora_cli.core.models.identity import BaseIdentity
from qlora_cli.core.prompts.formatting import Formatting
from qlora_cli.core.rope_scaling import describe_scaling
from qlora_cli.core.storage.checkpoint import list_checkpoints, newest_valid, step_of
from qlora_cli.core.storage.temporaries import heal
from qlora_cli.errors import AdapterError, RunError
from qlora_cli.events import Caution, Notice, Report


@dataclass(frozen=True)
class AdapterRecord:
    """An adapter, and what its run recorded where it did."""

    directory: Path
    facts: AdapterFacts  # what its own files say
    base: BaseIdentity | None
    formatting: Formatting | None
    rope_scaling: str | None = None  # of the base's positions in training, in place of its own

    def name_base(self) -> tuple[str, str | None]:
        """Model and revision of the base it was trained on.

        Raises:
            AdapterError: It does not say, or names a directory that is not there.
        """
        base = self.base.model if self.base is not None else self.facts.base_model
        if base is None:
            raise AdapterError(
                f"The adapter in {self.directory} does not say which base it belongs to.",
                "Name the base with --model.",
            )
        heal(Path(base))
        if Path(base).is_absolute() and not Path(base).is_dir():
            raise AdapterError(
                f"The adapter in {self.directory} was made on {base}, which is not there.",
                "Name the base with --model.",
            )
        return base, self.base.revision if self.base is not None else None

    def require_base(self, files: ModelFiles) -> None:
        """Checks that a model has the configuration and weights of the base in training, wherever it lies. Of an adapter
        made elsewhere only the base's name is known: another one is said.

        Raises:
            AdapterError: It does not.
        """
        if self.base is None:
            self._compare_names(files)
            return
        scaled = None if self.rope_scaling is None else json.loads(self.rope_scaling)
        if files.scaled_positions != scaled:
            given = files.rope_scaling is not None or self.rope_scaling is None
            raise AdapterError(
                f"The adapter in {self.directory} was trained with {describe_scaling(scaled)}; here {files.name} has "
                f"{describe_scaling(files.scaled_positions)}.",
                "Leave out --rope-scaling." if given else f"Add: --rope-scaling {shlex.quote(str(self.rope_scaling))}",
            )
        for field, what in (("config_sha256", "a different configuration"), ("weights_sha256", "different weights")):
            if getattr(files, field) != getattr(self.base, field):
                if files.name == self.base.model or files.directory.resolve() == Path(self.base.model).resolve():
                    hint = "Put back what it was trained on, or name a copy of that with --model."
                    if files.commit is not None and self.base.revision is not None:
                        hint = f"Add: --model-revision {shlex.quote(self.base.revision)}"
                    raise AdapterError(
                        f"The adapter in {self.directory} was trained on {files.name} as it was; now that has {what}.",
                        hint,
                    )
                raise AdapterError(
                    f"The adapter in {self.directory} was trained on {self.base.model}; {files.name} has {what}.",
                    f"Give the base it was trained on: --model {shlex.quote(self.base.model)}",
                )

    def _compare_names(self, files: ModelFiles) -> None:
        named, here = self.facts.base_model, Path(files.name).expanduser().resolve()
        if named is None or Path(named).name in (here.name, "") or f"models--{named.replace('/', '--')}" in here.parts:
            return
        files.report(
            Notice(
                f"The adapter in {self.directory} was made on {named} and nothing is known of its weights: whether those "
                f"of {files.name} are the same is not checked."
            )
        )


def find_adapter(directory: Path, report: Report) -> Path:
    """Where the adapter of a run lies: in its directory once training has ended, else in the newest checkpoint that verifies.

    A run that ended, was resumed for more steps and stopped has not ended. What is taken, and what is not, is reported.

    Args:
        directory: A run, one of its checkpoints, or a PEFT adapter; the last two are returned as they are.

    Raises:
        AdapterError: Training was stopped before it wrote a checkpoint, or none verifies.
        RunError: The run's record cannot be read.
    """
    saved = list_checkpoints(directory / CHECKPOINTS)
    has_ended, last_step = (directory / ADAPTER_CONFIG).is_file(), 0
    if has_ended:
        steps = (find_run_record(directory).get("training") or {}).get("steps")
        if not saved or not isinstance(steps, int) or step_of(saved[-1]) <= steps:
            return directory
        last_step = steps
    elif not is_run(directory):
        return directory  # what reads it says what is missing
    checkpoint, skipped = newest_valid(directory / CHECKPOINTS, (ADAPTER_CONFIG, ADAPTER_WEIGHTS))
    for bad in skipped:
        report(Caution(f"Skipped the checkpoint {bad.path}: {bad.reason}."))
    if checkpoint is not None:
        checkpoint.close()
        if checkpoint.step > last_step:
            report(
                Notice(
                    f"Training in {directory} has not ended: the adapter is that of its newest checkpoint, after step "
                    f"{checkpoint.step:,}."
                )
            )
            return checkpoint.path
    if has_ended:
        return directory
    raise AdapterError(
        f"There is no adapter in {directory} yet: "
        + ("none of its checkpoints verifies." if skipped else "training was stopped before its first checkpoint."),
        f"Go on with it: qlora train --config {shlex.quote(str(directory / RUN_YAML))} --resume",
    )


def read_adapter_record(directory: Path, report: Report) -> AdapterRecord:
    """What an adapter says of itself.

    Raises:
        AdapterError: There is none, it cannot be read, or its weights are not what its run wrote.
        RunError: Its run record cannot be read.
    """
    facts = read_adapter(directory)
    require_unchanged(directory, report)
    record = find_run_record(directory)
    if not record and (directory / RUN_YAML).is_file():
        report(
            Caution(
                f"{directory} is a run without its {RUN_RECORD}: how its base was held and its prompts were formatted is "
                f"not known, and what is usual is assumed. {way_on(directory)}"
            )
        )
    base, formatting = record.get("base"), record.get("formatting")
    try:
        return AdapterRecord(
            directory,
            facts,
            BaseIdentity.from_dict(base) if base else None,
            Formatting.from_dict(formatting) if formatting else None,
            json.dumps(record["rope_scaling"]) if record.get("rope_scaling") else None,
        )
    except ValueError as error:
        raise AdapterError(
            f"The {RUN_RECORD} of the adapter in {directory} is no record of a run: {error}.",
            "Remove it, and name the base with --model.",
        ) from error


def read_merge_record(model_directory: Path) -> tuple[bool, Formatting | None]:
    """Whether a model was merged by `qlora merge`, and how prompts were formatted in its training.

    Raises:
        RunError: The record cannot be read.
    """
    path = model_directory / MERGE_RECORD
    if not path.is_file():
        return False, None
    try:
        formatting = dict(read_json(path)).get("formatting")
        return True, Formatting.from_dict(formatting) if formatting else None
    except (ValueError, TypeError) as error:
        raise RunError(f"{path} is no record of a merge: {error}.", "Remove it, and generate with --raw.") from error
