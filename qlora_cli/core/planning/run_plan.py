"""Memory plan of a run: how it will keep within memory, or why it cannot, before anything is loaded."""

import math
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig

from qlora_cli.config import InspectConfig, TrainConfig
from qlora_cli.core.device import describe_others, read_free_bytes, resolve_compute_dtype
from qlora_cli.core.distributed.context_group import require_even_heads
from qlora_cli.core.distributed.process_group import ProcessGroup
from qlora_cli.core.models.structure import values_by_layer
from qlora_cli.core.planning.memory_estimate import copied_bytes, streamed_base_bytes
from qlora_cli.core.planning.model_profile import ModelProfile, profile_model
from qlora_cli.core.planning.planner import MemoryDecision, RowLengths, plan_training, read_limit_bytes
from qlora_cli.core.planning.suggestions import certainly_too_large, suggest_fit, write_train_command
from qlora_cli.core.streaming.host_memory import why_on_disk
from qlora_cli.errors import DoesNotFit
from qlora_cli.events import Caution, Notice, Report
from qlora_cli.settings.setting import recorded_fields
from qlora_cli.sizes import format_bytes


@dataclass(frozen=True)
class RunPlan:
    """What a run will take, and how it keeps within what there is."""

    profile: ModelProfile
    plan: MemoryDecision
    largest_tokens: int  # in a micro-batch, by the settings as they were given
    commands: tuple[str, ...]  # to type instead, where it does not fit
    sharded: bool  # whether the base is sharded over the cards
    context: int = 1  # cards that share the tokens of each row
    on_disk: bool = False  # whether layers that stream wait on the disk: the host has no memory for them

    @property
    def lockstep(self) -> str:
        """The flag by which ranks compute every pass together; none where each computes by itself."""
        return "--shard" if self.sharded else "--context-parallel" if self.context > 1 else ""

    @property
    def limit_tokens(self) -> int | None:
        """Most tokens a micro-batch may hold; None where all of them may stay as they are."""
        return self.plan.token_budget if self.plan.token_budget < self.largest_tokens else None

    @property
    def joined_tokens(self) -> int | None:
        """Tokens up to which micro-batches of a step are joined; None where they stay as they are."""
        return self.plan.token_budget if self.plan.token_budget > self.largest_tokens else None

    def predicted(self) -> dict[str, Any] | str:
        """Predicted bytes, or why there are none."""
        if self.plan.memory is None:
            return f"cannot be predicted: {self.profile.untraced}"
        return self.plan.memory.to_dict()


def plan_is_for_card(config: TrainConfig, device: torch.device) -> bool:
    """Whether a GPU is planned for: this machine's, or in a dry run with `--vram` one of that size."""
    return device.type == "cuda" or (config.dry_run and config.vram is not None)


def planned_dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    """The compute dtype here; where there is no card, a planned one computes in bfloat16."""
    elsewhere = "bfloat16" if plan_is_for_card(config, device) and device.type != "cuda" else None
    return resolve_compute_dtype(config.compute_dtype or elsewhere, device)


def profile_run(config: TrainConfig, model_config: PreTrainedConfig, device: torch.device) -> ModelProfile:
    """Counts the model with its adapter, and follows its forward pass where memory will be predicted.

    Raises:
        ModelError: The configuration is no causal language model.
        AdapterError: The adapter cannot be attached.
    """
    return profile_model(
        model_config,
        config,
        config,
        compute_dtype=planned_dtype(config, device),
        engine=config.engine,
        trust_remote_code=config.trust_remote_code,
        traced=config.dry_run or device.type == "cuda",
    )


def measure_rows(
    config: TrainConfig,
    max_length: int,
    row_lengths: np.ndarray,
    longest: Sequence[Sequence[int]],
    largest_step_tokens: int | None = None,
) -> RowLengths:
    """Lengths of a run's rows.

    Args:
        max_length: Tokens in the longest row allowed, and in a pack.
        row_lengths: (rows,) tokens of each row.
        longest: The largest micro-batches, as row indices; padding counts where rows are padded.
        largest_step_tokens: Of a step of the optimizer.
    """
    batches = [row_lengths[list(rows)] for rows in longest]
    padded = config.engine == "plain"
    largest_tokens = max(len(batch) * batch.max() if padded else batch.sum() for batch in batches)
    return RowLengths(max_length, int(row_lengths.max()), int(largest_tokens), largest_step_tokens)


def plan_run_memory(
    config: TrainConfig,
    model_config: PreTrainedConfig,
    profile: ModelProfile,
    *,
    lengths: RowLengths,
    device: torch.device,
    ranks: ProcessGroup,
    report: Report,
) -> RunPlan:
    """Decides what was left open, before anything is downloaded or loaded. The engine refines it on the device.

    The smallest card and the largest micro-batch of all ranks decide; `lengths` are of this rank's rows.

    Raises:
        DoesNotFit: On this machine's card, nothing that was left open makes it fit. A dry run says so in its plan.
        UsageError: `--vram` is no amount of memory.
    """
    for_card = plan_is_for_card(config, device)
    vram_bytes = None
    if for_card:
        vram_bytes = -ranks.all_reduce_max(-read_limit_bytes(config.vram, device), device)
    elif config.vram is not None:
        report(Notice("--vram is about a GPU's memory: there is no GPU here, and the host's is not limited."))
    here_tokens = lengths.largest_batch_tokens or lengths.batch_tokens(config.batch_size)
    largest_tokens = ranks.all_reduce_max(here_tokens, device)
    lengths = replace(lengths, largest_batch_tokens=largest_tokens)
    plan_with = partial(
        plan_training,
        profile,
        config,
        lengths,
        vram_bytes=vram_bytes,
        on_cuda=for_card,
        shard_offload=config.shard_offload,
        may_stream=may_be_sharded(config) and ranks.world_size == 1,
    )
    plan, sharded, context = _choose_cards(plan_with, config, attention_heads(model_config), ranks, report)
    if context != ranks.context:  # fewer groups of ranks are dealt the rows of a step
        largest_tokens = replace(lengths, largest_batch_tokens=None).batch_tokens(config.batch_size)
    on_disk = bool(plan.measures.streamed) and _wait_on_disk(config, profile, plan, report)
    if share := plan.measures.waiting_states:
        part = "The" if share == 1 else f"{share:.0%} of the"
        report(Notice(f"{part} optimizer's state waits in host memory, and passes through the card with each update."))
    waits = plan.measures.offload_activations or share
    if plan.memory is not None and waits and not config.dry_run:
        free_bytes = read_free_bytes(torch.device("cpu"))
        if plan.memory.host_bytes > free_bytes:
            text = f"What waits on the host takes {format_bytes(plan.memory.host_bytes)}, of which it has "
            less = "shorter rows take" if plan.measures.offload_activations else "a lower rank takes"
            report(Caution(f"{text}{format_bytes(free_bytes)} free: {less} less."))
    commands: tuple[str, ...] = ()
    if plan.fits is False:
        assert vram_bytes is not None and plan.memory is not None
        found = suggest_fit(
            profile,
            config,
            lengths,
            vram_bytes=vram_bytes,
            rank=config.rank,
            profile_with_rank=lambda rank: profile_run(replace(config, rank=rank), model_config, device),
        )
        commands = write_commands(config, found[0]) if found else ()
        if certainly_too_large(plan) and not config.dry_run:
            raise DoesNotFit(
                f"Training needs {format_bytes(plan.memory.device_bytes)} at the least, "
                f"and {format_bytes(vram_bytes)} may be taken.{'' if config.vram else describe_others(device)}",
                f"Type: {' && '.join(commands)}"
                if commands
                else "Nothing fits: take a smaller model or a larger card.",
            )
    return RunPlan(profile, plan, largest_tokens, commands, sharded, context, on_disk)


def attention_heads(model_config: PreTrainedConfig) -> int:
    """Heads of a model's attention, or what the counts of its layers have in common; 0 where it has none."""
    return math.gcd(*(count or 0 for count in values_by_layer(model_config.get_text_config(), "num_attention_heads")))


def context_sizes(heads: int, cards: int) -> list[int]:
    """How many of so many cards may share the tokens of each row: what divides both, and the attention heads."""
    return [n for n in range(2, cards + 1) if cards % n == 0 and heads and heads % n == 0]


def _choose_cards(
    plan_with: Callable[..., MemoryDecision], config: TrainConfig, heads: int, ranks: ProcessGroup, report: Report
) -> tuple[MemoryDecision, bool, int]:
    """How several cards share a base and the tokens of rows: as asked for, else as little as makes a step fit.

    Returns:
        The plan; whether the base is sharded; how many cards share the tokens of each row.

    Raises:
        UsageError: Cards cannot share attention's heads as was asked for.
    """
    if ranks.context > 1:
        require_even_heads(heads or 1, ranks.context)
    sharded, asked = bool(config.shard or config.shard_offload), ranks.context
    world = ranks.world_size
    plan = plan_with(shards=world if sharded else 1, context=asked)
    shards = (sharded, True) if can_be_sharded(config, ranks) and config.shard is None else (sharded,)
    sizes = context_sizes(heads, world) if config.context_parallel is None and config.engine == "fast" else []
    for size, shard in product((asked, *sizes), dict.fromkeys(shards)):
        if plan.fits is not False:
            break
        found = plan_with(shards=world if shard else 1, context=size)
        if not found.fits:
            continue
        if shard and not sharded:
            report(Notice(f"The base is sharded over {world} cards: one cannot hold it and a step."))
        if size != asked:
            report(Notice(f"{size} cards share the tokens of each row: one cannot hold the longest."))
        return found, shard, size
    return plan, sharded, asked


def _wait_on_disk(config: TrainConfig, profile: ModelProfile, plan: MemoryDecision, report: Report) -> bool:
    """Whether layers that stream have to wait on the disk; where they wait is said."""
    _, waiting_bytes = streamed_base_bytes(profile, plan.measures)
    short = None if config.dry_run else why_on_disk(waiting_bytes)
    where = short or f"in {format_bytes(waiting_bytes)} of host memory"
    report(
        Notice(
            f"The weights of {plan.measures.streamed} of {len(profile.layer_bytes)} layers wait {where} and stream to "
            f"where they are used, {format_bytes(copied_bytes(profile, plan.measures))} a micro-batch of up to "
            f"{plan.token_budget:,} tokens."
        )
    )
    return short is not None


def may_be_sharded(config: TrainConfig | InspectConfig) -> bool:
    """Whether these settings allow a base that is not whole on a card: sharded and gathered layer by layer as it
    computes, or streamed from the host."""
    return config.engine == "fast" and not config.dora and not config.modules_to_save


def can_be_sharded(config: TrainConfig, ranks: ProcessGroup) -> bool:
    """Whether there is also more than one card to hold it."""
    return ranks.world_size > 1 and may_be_sharded(config)


def write_commands(config: TrainConfig, changes: dict[str, Any]) -> tuple[str, ...]:
    """What to type for other settings; rows prepared for longer ones are prepared anew."""
    if config.prepared is None or "max_length" not in changes:
        return (write_train_command(config, changes),)
    length = changes["max_length"]
    shorter = f"{config.prepared}-{length}"
    model, output = shlex.quote(str(config.model)), shlex.quote(shorter)
    prepare = f"qlora prepare --model {model} --data DATA --max-length {length} --output {output}"
    return prepare, write_train_command(replace(config, prepared=shorter), changes)


def resolved_configuration(config: TrainConfig, memory: RunPlan, **known: Any) -> dict[str, Any]:
    """Every setting that `run.yaml` keeps, with what was left open as decided by `memory`, or `known` otherwise."""
    given = {name: getattr(config, name) for name in recorded_fields(TrainConfig)}
    return given | memory.plan.settings | known
