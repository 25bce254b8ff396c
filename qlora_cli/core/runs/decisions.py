"""Decisions of a training run: what the settings leave open, decided before the base is loaded."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch

from qlora_cli.artifacts import CHECKPOINTS
from qlora_cli.config import TrainConfig
from qlora_cli.core.device import dtype_name, is_slow_on_cpu, resolve_compute_dtype
from qlora_cli.core.engine.engine import Engine
from qlora_cli.core.matmul.arithmetic import takes_long
from qlora_cli.core.merge.base import RefusedMerge, foresee_refusal
from qlora_cli.core.planning.memory_estimate import estimate_disk
from qlora_cli.core.planning.run_plan import (
    RunPlan,
    measure_rows,
    plan_is_for_card,
    plan_run_memory,
    planned_dtype,
    resolved_configuration,
)
from qlora_cli.core.runs.inputs import Run, RunInputs
from qlora_cli.core.runs.results import TrainPlan
from qlora_cli.core.storage.checkpoint import list_checkpoints
from qlora_cli.core.storage.disk_space import require_space
from qlora_cli.core.training.lr_schedule import count_warmup_steps
from qlora_cli.core.training.optimizer import choose_optimizer, state_bytes
from qlora_cli.events import Caution, Notice
from qlora_cli.sizes import format_count

SMALL_FILES_BYTES = 2**24  # tokenizer, curve, metrics, random state: checked for before training
OFTEN = 9  # evaluations before the last step, where more are proposed


@dataclass(frozen=True)
class Decisions:
    """What the settings leave open, decided before the base is loaded."""

    memory: RunPlan
    optimizer: str
    compute_dtype: torch.dtype
    warmup_steps: int
    checkpoint_bytes: int
    refused_merge: RefusedMerge | None  # where the base takes none


def decide(run: Run, inputs: RunInputs) -> Decisions:
    """Decides what the settings leave open, and checks that checkpoints will fit the disk.

    Raises:
        DoesNotFit: The step does not fit this machine's card.
        DiskFull: The disk has no room for the checkpoints that are kept and the one being written.
    """
    config, footprint, data = run.config, inputs.profile.footprint, inputs.data
    memory = plan_run_memory(
        config,
        inputs.files.held_config,
        inputs.profile,
        lengths=measure_rows(
            config,
            inputs.max_length,
            data.rows.lengths,
            data.sampler.longest_micro_batches(),
            data.sampler.largest_step_tokens(),
        ),
        device=run.device,
        ranks=run.ranks,
        report=run.report,
    )
    data.sampler.joined_tokens = memory.joined_tokens
    optimizer = choose_optimizer(config.optimizer, run.device)
    trainable = footprint.trainable_parameters
    checkpoint_bytes = 4 * trainable + state_bytes(optimizer, trainable) + SMALL_FILES_BYTES
    kept_checkpoints = len(list_checkpoints(run.output / CHECKPOINTS))
    require_space(run.output, checkpoint_bytes * max(2, config.keep + config.keep_best + 2 - kept_checkpoints))
    total_steps = data.sampler.total_steps
    warmup_steps = count_warmup_steps(config.warmup_steps, config.warmup_ratio, total_steps)
    for text in describe_unreached(config, inputs, warmup_steps):
        run.report(Caution(text))
    if config.compile and run.device.type == "cpu":
        run.report(Notice("Layers are not compiled on a CPU: --compile does nothing."))
    if (refused := foresee_refusal(inputs.files, config)) is not None:
        run.report(Caution(f"qlora merge will refuse what is trained here: {refused.why}"))
    compute_dtype = resolve_compute_dtype(config.compute_dtype, run.device)
    if run.device.type == "cpu" and is_slow_on_cpu(compute_dtype):
        run.report(
            Notice(
                f"This CPU has no instructions for {dtype_name(compute_dtype)} and takes some five times as long as for "
                "float32: leave --compute-dtype out."
            )
        )
    return Decisions(
        memory=memory,
        optimizer=optimizer,
        compute_dtype=compute_dtype,
        warmup_steps=warmup_steps,
        checkpoint_bytes=checkpoint_bytes,
        refused_merge=refused,
    )


def describe_unreached(config: TrainConfig, inputs: RunInputs, warmup_steps: int) -> Iterator[str]:
    """What was asked for and a run of these steps does not come to, each as a sentence."""
    sampler = inputs.data.sampler
    total_steps, run_steps = sampler.total_steps, f"the run's {format_count(sampler.total_steps, 'step')}"
    given = config.warmup_steps or config.warmup_ratio not in (0, TrainConfig.warmup_ratio)
    if given and config.scheduler == "constant":
        yield "--scheduler constant does without warm-up; constant_with_warmup takes --warmup-steps or -ratio."
    elif given and warmup_steps == total_steps > 1:
        yield f"The warm-up takes all of {run_steps}: the learning rate rises to the end."
    if config.sample_prompt and config.sample_every and config.sample_every > total_steps:
        yield f"--sample-every {config.sample_every:,} is more than {run_steps}: prompts are asked before and after alone."
    if inputs.data.eval_sampler is None:
        return
    if config.eval_every and config.eval_every > total_steps:
        yield f"--eval-every {config.eval_every:,} is more than {run_steps}: it is evaluated at its end alone."
    for flag, needed in (("--keep-best", int(config.keep_best)), ("--patience", (config.patience or -1) + 1)):
        found = len(list(islice(sampler.evaluated_steps(config.eval_every), needed)))
        if found < needed:
            often = (total_steps - 1) // max(needed, OFTEN) or (total_steps - 1) // needed
            way = f" --eval-every {often} makes more." if often else ""
            takes = (
                f"it takes {format_count(needed, 'evaluation')} before the last step, and the run has {found or 'none'}"
            )
            yield f"{flag} does nothing: {takes}.{way}"


def products_in_8_bits_pay(inputs: RunInputs, memory: RunPlan, max_tokens: int) -> bool:
    """Whether trying `--matmul fp8` unasked pays in a run whose largest micro-batch has so many tokens: it is long, and does
    not share tokens among cards, where that was not measured."""
    total_tokens = inputs.data.sampler.total_steps * max_tokens
    return memory.context == 1 and takes_long(inputs.profile.met_numel, total_tokens)


def report_uncompiled(run: Run, memory: RunPlan, engine: Engine) -> None:
    """Reports that layers are not compiled although that was asked for, where it is found out with the model alone: not on
    a CPU, nor where cards share it, which is said elsewhere."""
    if run.config.compile and not engine.compiled and run.device.type != "cpu" and not memory.lockstep:
        run.report(
            Caution(f"--compile does nothing: layers of this model are not compiled as they run ({engine.describe()}).")
        )


def describe_plan(run: Run, inputs: RunInputs, decisions: Decisions, first_step: int) -> TrainPlan:
    """What the run would do, for --dry-run."""
    config, memory = run.config, decisions.memory
    dtype = dtype_name(planned_dtype(config, run.device))
    return TrainPlan(
        output=config.output,
        device="cuda" if plan_is_for_card(config, run.device) else "cpu",
        compute_dtype=dtype,
        rows=len(inputs.data.rows),
        held_out_rows=len(inputs.data.eval_rows),
        first_step=first_step,
        total_steps=inputs.data.sampler.total_steps,
        warmup_steps=decisions.warmup_steps,
        trainable_parameters=inputs.profile.footprint.trainable_parameters,
        total_parameters=inputs.profile.footprint.total_parameters,
        checkpoint_bytes=decisions.checkpoint_bytes,
        disk=estimate_disk(
            inputs.profile,
            is_local=inputs.files.is_local,
            optimizer=memory.plan.optimizer,
            kept_checkpoints=config.keep,
        ),
        vram_bytes=memory.plan.vram_bytes,
        fits=memory.plan.fits,
        settings={
            **memory.plan.settings,
            **memory.plan.elsewhere,
            "shard": memory.sharded,
            "context_parallel": memory.context,
            "token_budget": memory.plan.token_budget,
        },
        memory=memory.predicted(),
        configuration=resolved_configuration(
            config, memory, max_length=inputs.max_length, compute_dtype=dtype, warmup_steps=decisions.warmup_steps
        ),
        next=memory.commands,
        missing_weights=inputs.files.missing_weights,
    )
