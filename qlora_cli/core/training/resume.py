"""Resume: the checkpoint from which a run goes on, and the random state with which it does."""

from pathlib import Path
from typing import Any

import torch

from qlora_cli.artifacts import read_metrics
from qlora_cli.core.distributed.process_group import ProcessGroup
from qlora_cli.core.storage.checkpoint import Checkpoint, checkpoint_path, differences, newest_valid, verify_checkpoint
from qlora_cli.core.training.progress import TrainerState, read_trainer_state
from qlora_cli.core.training.rng_state import restore_random_state
from qlora_cli.core.training.state import REQUIRED_FILES, read_random_state
from qlora_cli.errors import CheckpointError
from qlora_cli.events import Caution, Notice, Report
from qlora_cli.sizes import format_count

ABSENT = ("rope_scaling",)  # None in a run saved before there was such a setting
RATE_JUMP = 1.5  # from one step to the next, more than any schedule takes behind its warm-up
HELD_OUT_BY = ("eval_rows", "eval_fraction", "seed")  # which rows of the data are
RANK_STRIDE = 1_000_003  # between the seeds of two ranks


def find_checkpoint(root: Path, identity: dict[str, Any], *, allow_changes: bool, report: Report) -> Checkpoint | None:
    """The newest checkpoint that verifies, of this very run; None where none was written yet.

    What was skipped and why, and with `allow_changes` what differs, is reported.

    Raises:
        CheckpointError: None of those in `root` verifies, or its identity differs and changes were not allowed.
    """
    checkpoint, skipped = newest_valid(root, REQUIRED_FILES)
    for bad in skipped:
        report(Caution(f"Skipped the checkpoint {bad.path}: {bad.reason}."))
    if checkpoint is None:
        if skipped:
            raise CheckpointError(
                f"None of the {len(skipped)} checkpoints in {root} verifies; of the newest, {skipped[0].reason}.",
                "Start anew with --overwrite.",
            )
        report(Notice(f"There is no checkpoint in {root} yet: training starts at step 1."))
        return None
    differing, rounding = _compare(checkpoint.identity, identity)
    if differing:
        if not allow_changes:
            raise CheckpointError(
                f"The run saved in {checkpoint.path} was another one: {differing}.",
                "Restore these settings, add --allow-changes to go on all the same, or --overwrite to start anew.",
            )
        report(Caution(f"Going on with changes: {differing}."))
    if rounding:
        report(Notice(f"Steps are computed another way from here on ({rounding}), which changes the last bits."))
    report(Notice(f"Going on after step {checkpoint.step}, from {checkpoint.path}."))
    return checkpoint


def find_shared_checkpoint(
    root: Path,
    identity: dict[str, Any],
    *,
    allow_changes: bool,
    ranks: ProcessGroup,
    device: torch.device,
    report: Report,
) -> Checkpoint | None:
    """`find_checkpoint` of the main rank, for all: a read error that only one meets must not part them.

    Raises:
        CheckpointError: As there; or this rank cannot read what the main one chose.
    """
    found = find_checkpoint(root, identity, allow_changes=allow_changes, report=report) if ranks.is_main else None
    step = ranks.all_reduce_max(found.step if found else 0, device)
    if ranks.is_main or not step:
        return found
    path = checkpoint_path(root, step)
    try:
        return verify_checkpoint(path, REQUIRED_FILES)
    except CheckpointError as error:
        raise CheckpointError(
            f"Rank {ranks.rank} cannot read {path}, from which the others go on: {error.message}.",
            "Check that every machine sees the same --output.",
        ) from error


def state_to_go_on_from(
    checkpoint: Checkpoint | None, identity: dict[str, Any], patience: int | None, report: Report
) -> TrainerState:
    """How far the run has come, as settings that were changed leave it: a greater patience lets a run go on that has
    stopped early, and losses of other rows are compared with none of before.

    Raises:
        CheckpointError: It stopped early, and more or fewer steps are asked for without more patience.
    """
    if checkpoint is None:
        return TrainerState()
    state, before, now = read_trainer_state(checkpoint), checkpoint.identity["settings"], identity["settings"]
    changed = {name for name in (*HELD_OUT_BY, "total_steps") if before.get(name, now[name]) != now[name]}
    others = checkpoint.identity.get("data") != identity["data"] or not changed.isdisjoint(HELD_OUT_BY)
    if state.best_step is not None and others:
        state.best_loss, state.best_step, state.evaluations_since_best = None, None, 0
        report(
            Caution("Other rows are held out than before, and may have been trained on: the lowest loss starts anew.")
        )
    state.stopped_early &= state.runs_out_of(patience)
    if state.stopped_early and "total_steps" in changed:
        raise CheckpointError(
            f"The run saved in {checkpoint.path} stopped early, after {format_count(state.evaluations_since_best, 'evaluation')} "
            f"without a lower loss: --patience {patience} leaves it no further steps.",
            f"Add --patience {state.evaluations_since_best + 1}, or more, to go on.",
        )
    return state


def report_rate(root: Path, step: int, rate: float, report: Report) -> None:
    """Says where the learning rate after a changed run's `step` is far from the rate there: a schedule of other steps
    goes on where it would be by then, and a decay that is stretched goes up."""
    before = next((line.get("learning_rate") for line in read_metrics(root) if line["step"] == step), None)
    if before and not RATE_JUMP > rate / before > 1 / RATE_JUMP:
        report(Caution(f"The learning rate was {before:.3g} in step {step:,} and is {rate:.3g} in the next."))


def _compare(saved: dict[str, Any], now: dict[str, Any]) -> tuple[str, str]:
    """What makes it another run, and what changes the order of its arithmetic only, each as clauses."""
    found = differences(saved, _known(now, saved))
    rounding = [clause for clause in found if clause.startswith("rounding.")]
    others = [clause for clause in found if clause not in rounding]
    causes = [clause for clause in others if not clause.startswith("batches:")]  # other batches follow from these
    return "; ".join(causes or others), "; ".join(rounding)


def _known(identity: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
    """An identity without what was not compared yet when a checkpoint was saved, but for settings that none had then."""
    return {
        key: _known(value, saved[key]) if isinstance(value, dict) and isinstance(saved.get(key), dict) else value
        for key, value in identity.items()
        if key in saved or (key in ABSENT and value is not None)
    }


def restore_or_seed(checkpoint: Checkpoint | None, device: torch.device, *, seed: int, rank: int) -> None:
    """Puts the random state of this rank back, or seeds it where none was saved, every rank differently."""
    saved = read_random_state(checkpoint, rank) if checkpoint else None
    if saved is not None:
        restore_random_state(saved, device)
    else:
        torch.manual_seed(seed + RANK_STRIDE * rank + (checkpoint.step if checkpoint else 0))
