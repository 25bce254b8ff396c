"""Trains a LoRA adapter on a base in 4 bits and writes the run directory: adapter, tokenizer, settings, metrics, card."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from qlora_cli.artifacts import ADAPTER_WEIGHTS, CHECKPOINTS, RUN_YAML, TRACKER_LOGS, find_run_record, write_bytes
from qlora_cli.config import TrainConfig
from qlora_cli.config_file import as_yaml
from qlora_cli.core.adapters.adapter_facts import read_adapter, require_unchanged
from qlora_cli.core.adapters.lora import PeftModel, adapter_state, attach_adapter, load_adapter_state, save_adapter
from qlora_cli.core.calibration.initialization import FROM_THE_BASE, StartInputs, initialize_adapter
from qlora_cli.core.candidates.four_bit_gap import measure_held_out
from qlora_cli.core.device import choose_device, limit_memory, read_vram
from qlora_cli.core.distributed.context_group import share_tokens
from qlora_cli.core.distributed.process_group import ProcessGroup, joining
from qlora_cli.core.distributed.rank_monitor import monitoring
from qlora_cli.core.distributed.weight_shards import WeightShards
from qlora_cli.core.engine.decoder_layers import find_layers
from qlora_cli.core.engine.engine import Engine, install_engine
from qlora_cli.core.engine.fsdp import shard_base
from qlora_cli.core.generation.samples import SamplePrompts, make_requests
from qlora_cli.core.matmul.choice import ProductTrial, has_products, record_of, trial_batch
from qlora_cli.core.models.files import context_length
from qlora_cli.core.models.identity import BaseIdentity
from qlora_cli.core.models.loading import load_base
from qlora_cli.core.models.structure import find_decoder
from qlora_cli.core.prompts.formatting import Formatting
from qlora_cli.core.runs.decisions import Decisions, decide, describe_plan, products_in_8_bits_pay, report_uncompiled
from qlora_cli.core.runs.directory import begin_run, claimed_output
from qlora_cli.core.runs.finish import describe_result, find_best, write_record, write_run
from qlora_cli.core.runs.identity import run_identity
from qlora_cli.core.runs.inputs import Run, RunInputs, describe_start, read_inputs
from qlora_cli.core.runs.metrics import MetricsFile
from qlora_cli.core.runs.results import TrainPlan, TrainResult, read_result
from qlora_cli.core.runs.tracking import closing_tracker, logging_report, start_tracker
from qlora_cli.core.runs.validate import check, check_ranks, report_idle
from qlora_cli.core.storage.checkpoint import Checkpoint, list_checkpoints, read_tensors
from qlora_cli.core.storage.disk_space import reporting_disk_full
from qlora_cli.core.streaming.streamed_base import stream_base
from qlora_cli.core.training.accumulation import ModelReplica
from qlora_cli.core.training.flat_parameters import TrainableParameters
from qlora_cli.core.training.lr_schedule import learning_rate_schedule
from qlora_cli.core.training.optimizer import allocated_state_bytes, build_optimizer
from qlora_cli.core.training.progress import TrainerState
from qlora_cli.core.training.reporting import RunReporter
from qlora_cli.core.training.resume import find_shared_checkpoint, report_rate, restore_or_seed, state_to_go_on_from
from qlora_cli.core.training.state import Checkpointing, load_optimizer
from qlora_cli.core.training.trainer import Optimization, Trainer
from qlora_cli.errors import CheckpointError
from qlora_cli.events import Caution, Notice, Report, Vram, report_nothing

SAVES_A_RUN = 10  # by default
# The others may wait for hours while one prepares the rows; what a dead rank would keep waiting is seen by `monitoring`.
EXCHANGE_TIMEOUT = timedelta(hours=24)


@dataclass(frozen=True)
class StartingPoint:
    """Where the run begins: at its first step, or after a checkpoint."""

    identity: dict[str, Any]  # empty in a dry run
    checkpoint: Checkpoint | None
    state: TrainerState


@dataclass(frozen=True)
class LoadedModel:
    """The base on the device, with its adapter."""

    model: PeftModel
    base: BaseIdentity
    weight_shards: WeightShards | None  # where the base is sharded over the ranks
    vram: Vram | None  # right after loading; None on the CPU
    started: dict[str, Any]  # what is recorded of the adapter's start, the arithmetic and merging where not plain
    save_adapter: Callable[[Path], None]  # with the run's record, so that a moved checkpoint can be used like a run


def train(config: TrainConfig, report: Report) -> TrainResult | TrainPlan:
    """Trains an adapter and writes the run directory; with `dry_run` only says what it would do, and writes nothing.

    What is cheap to check is checked before the base is loaded.

    Raises:
        QloraError: Any of its children.
    """
    check(config)
    with joining(report):
        accelerator = Accelerator(
            cpu=not torch.cuda.is_available(),
            mixed_precision="no",  # the engine keeps the dtypes
            log_with=config.report_to,
            project_dir=str(Path(config.output) / TRACKER_LOGS),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=EXCHANGE_TIMEOUT)],
        )
    ranks = ProcessGroup(accelerator.process_index, accelerator.num_processes, config.context_parallel or 1)
    run = Run(config, accelerator, ranks, choose_device(), report if ranks.is_main else report_nothing)
    with ExitStack() as stack:
        stack.enter_context(monitoring(ranks, run.device))
        stack.enter_context(closing_tracker(accelerator, run.report))
        check_ranks(config, ranks)
        report_idle(config, run.report)
        if ranks.is_main:
            stack.enter_context(claimed_output(config, run.report))
        ranks.barrier()
        ended = read_result(run.output) if config.resume and not config.dry_run else None
        tracked = ranks.is_main and config.report_to and not config.dry_run
        if tracked and ended is None:
            start_tracker(config, accelerator)  # before rows are read or weights downloaded
        inputs = read_inputs(run)
        decisions = decide(run, inputs)
        run = replace(run, config=(config := inputs.config), ranks=replace(ranks, context=decisions.memory.context))
        if run.ranks != ranks:
            ranks, inputs = run.ranks, inputs.dealt_to(run.ranks)
        formatting = Formatting.from_dict(inputs.rows.manifest["formatting"])
        context, tokenizer = context_length(inputs.files.config), inputs.files.tokenizer
        requests = make_requests(config.sample_prompt or (), formatting, tokenizer, context)
        if ended is not None and is_complete(run, inputs, decisions, ended):
            return ended
        start = find_start(run, inputs, decisions)
        if config.dry_run:
            return describe_plan(run, inputs, decisions, first_step=start.state.step + 1)
        if tracked and not accelerator.trackers:
            start_tracker(config, accelerator)
        loaded = load_model(run, inputs, decisions, start.checkpoint)
        engine = start_engine(run, inputs, decisions, start, loaded)
        stack.callback(engine.close)
        loaded.started.pop("matmul", None)  # where the settings changed
        loaded.started.update(record_of(engine.products))
        optimization = start_optimization(run, inputs, decisions, start, loaded)
        # From here on the directory is a run.
        logged, run_id = run.report, ""
        if ranks.is_main:
            run_id = begin_run(run.output, start.checkpoint.run if start.checkpoint else None, run.report)
            write_bytes(run.output / RUN_YAML, as_yaml(config).encode())
            metrics = MetricsFile(run.output, last_step=start.state.step)
            stack.callback(metrics.close)
            logged = logging_report(run.report, metrics, accelerator)
        run.report(describe_start(run, inputs, start.state.step + 1, engine.describe()))
        samples = SamplePrompts(requests, formatting, tokenizer, loaded.model, engine, run.device)
        sampled = bool(requests) and ranks.is_main
        if sampled and loaded.weight_shards is not None:
            run.report(Caution("The sample prompts are not answered: the base is sharded."))
            sampled = False
        trainer = Trainer(
            replica=ModelReplica(loaded.model, engine, ranks, lockstep=decisions.memory.lockstep),
            data=inputs.data,
            optimization=optimization,
            eval_every=config.eval_every,
            patience=config.patience,
            checkpointing=Checkpointing(
                root=run.output / CHECKPOINTS,
                identity=start.identity,
                save_adapter=loaded.save_adapter,
                needed_bytes=decisions.checkpoint_bytes,
                every=config.save_every or -(-inputs.data.sampler.total_steps // SAVES_A_RUN),
                keep=config.keep,
                keep_best=config.keep_best,
                run_id=run_id,
                report=run.report,
            ),
            reporter=RunReporter(logged, deferred=run.device.type == "cuda"),
            state=start.state,
            ask_samples=samples.ask if sampled else None,
            sample_every=config.sample_every,
        )
        if run.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(run.device)  # what is reported is the peak of training, not of loading
        started = time.perf_counter()
        trainer.run()
        result = describe_result(run, inputs, loaded.vram, trainer.state, time.perf_counter() - started)
        best = find_best(run, result.best_step) if ranks.is_main else None
        if best:
            result = replace(result, eval_loss=result.best_eval_loss)
            if loaded.weight_shards is None:
                load_adapter_state(loaded.model, read_tensors(best, ADAPTER_WEIGHTS))
        kept = best.step if best else result.steps
        for event in samples.ask(kept) if sampled and kept != trainer.sampled_step else ():
            logged(event)
        engine.close()
        if ranks.is_main:
            if loaded.weight_shards is None:
                measured = inputs.files, inputs.data.eval_rows, inputs.profile.vocabulary
                held_out = measure_held_out(loaded.model, *measured, run.report)
                result = replace(result, gap=asdict(held_out) if held_out else None)
            with reporting_disk_full(run.output, decisions.checkpoint_bytes):
                write_run(run, inputs, loaded.base, loaded.save_adapter, result, loaded.started, best)
        ranks.barrier()
        return result


# ---------------------------------------------------------------- load


def load_model(run: Run, inputs: RunInputs, decisions: Decisions, checkpoint: Checkpoint | None) -> LoadedModel:
    """Loads the base in 4 bits, sharded where that was decided, with the adapter of the checkpoint, or a fresh one."""
    config, memory = run.config, decisions.memory
    limit_bytes = memory.plan.allocator_bytes  # of what is free, where no limit was given
    if limit_bytes is not None and run.device.type == "cuda" and (config.vram or run.ranks.world_size == 1):
        limit_memory(run.device, limit_bytes)
    weight_shards = WeightShards(run.ranks, on_host=config.shard_offload) if memory.sharded else None
    streamed = memory.plan.measures.streamed
    shards = WeightShards(run.ranks, on_host=True, in_copy=memory.on_disk) if streamed else weight_shards
    dtype = decisions.compute_dtype
    base, identity = load_base(inputs.files, config, compute_dtype=dtype, device=run.device, weight_shards=shards)
    decoder = find_decoder(base)
    if streamed:
        stream_base(base, find_layers(decoder), run.device, streamed=streamed, report=run.report)
    model = attach_adapter(base, config, seed=config.seed, report=run.report)
    if checkpoint:
        load_adapter_state(model, read_tensors(checkpoint, ADAPTER_WEIGHTS))
        record = find_run_record(checkpoint.path)
        started = {name: value for name, value in record.items() if name in ("start", "matmul")}
    else:
        started = start_adapter(run, inputs, model, identity, sharded=weight_shards is not None)
    if (scaling := inputs.files.scaled_positions) is not None:
        started["rope_scaling"] = scaling
    if decisions.refused_merge is not None:
        started |= decisions.refused_merge.to_dict()
    if weight_shards is not None:
        shard_base(base, decoder, find_layers(decoder), weight_shards, run.device)
    if run.ranks.context > 1:
        share_tokens(base, decoder, run.ranks, run.device)

    def save(directory: Path) -> None:
        save_adapter(model, directory, base_name=identity.model)
        write_record(directory, identity, inputs.rows, parameters=inputs.count_parameters(), **started)

    return LoadedModel(model, identity, weight_shards, read_vram(run.device), started, save)


def start_adapter(
    run: Run, inputs: RunInputs, model: PeftModel, identity: BaseIdentity, *, sharded: bool
) -> dict[str, Any]:
    """Starts a fresh adapter as the settings ask, the same on every rank; what is recorded of that, nothing where plainly."""
    if sharded:
        if run.config.init in FROM_THE_BASE:
            run.report(Caution(f"The adapter starts plainly, without --init {run.config.init}: the base is sharded."))
        return {}
    start = StartInputs(
        files=inputs.files,
        identity=identity,
        rows=inputs.data.rows,
        seed=run.config.seed,
        device=run.device,
        cached=run.config.base_cache and run.ranks.world_size == 1,
    )
    facts = initialize_adapter(model, run.config, start, run.report)
    if run.ranks.world_size > 1:
        for tensor in adapter_state(model).values():
            run.ranks.all_reduce_sum(tensor.detach() if run.ranks.is_main else tensor.detach().zero_())
    return {} if facts is None else {"start": asdict(facts)}


def start_engine(
    run: Run, inputs: RunInputs, decisions: Decisions, start: StartingPoint, loaded: LoadedModel
) -> Engine:
    """Prepares the model for steps of the largest micro-batch."""
    config, memory = run.config, decisions.memory
    sizes, sampler = inputs.profile.footprint, inputs.data.sampler
    largest = sampler.longest_micro_batches(start.state.micro_batch_limit_tokens)
    max_tokens = max(int(inputs.data.rows.lengths[batch].sum()) for batch in largest)
    together = bool(memory.lockstep) and run.device.type == "cuda"
    first = sampler.step(start.state.step + 1).micro_batches if start.state.step == 0 else []
    trial = ProductTrial(
        batch=trial_batch([inputs.data.rows[i] for i in first[0]]) if first else None,
        recorded=loaded.started.get("matmul"),
        resumed=start.checkpoint is not None,
        pays=products_in_8_bits_pay(inputs, memory, max_tokens)
        and not run.ranks.all_reduce_max(int(not has_products(run.device, decisions.compute_dtype)), run.device),
        largest=lambda found: torch.stack(
            [each["found"] for each in run.ranks.all_gather({"found": found}, run.device)]
        ).amax(0),
    )
    engine = install_engine(
        loaded.model,
        # Where ranks compute a layer together none is measured by itself: what was predicted decides.
        replace(config, **(memory.plan.settings if together else memory.plan.tiling)),
        device=run.device,
        compute_dtype=decisions.compute_dtype,
        max_tokens=max_tokens,
        total_steps=sampler.total_steps,  # of a resumed run too, whose steps are to be computed the same way
        optimizer_bytes=allocated_state_bytes(
            decisions.optimizer, sizes.trainable_parameters, memory.plan.measures.waiting_states
        ),
        trial=trial,
        report=run.report,
    )
    report_uncompiled(run, memory, engine)
    return engine


# ---------------------------------------------------------------- resume


def find_start(run: Run, inputs: RunInputs, decisions: Decisions) -> StartingPoint:
    """Identifies the run, and with --resume finds the checkpoint from which it goes on.

    Raises:
        CheckpointError: No checkpoint verifies, or it is of another run.
    """
    config, checkpoint = run.config, None
    identity: dict[str, Any] = {}
    if config.resume or not config.dry_run:  # a dry run downloads no weights to identify a base by
        identity = run_identity(run, inputs, decisions)
    if config.resume:
        root = run.output / CHECKPOINTS
        checkpoint = find_shared_checkpoint(
            root,
            identity,
            allow_changes=config.allow_changes,
            ranks=run.ranks,
            device=run.device,
            report=run.report,
        )
    state = state_to_go_on_from(checkpoint, identity, config.patience, run.report)
    limits = [state.micro_batch_limit_tokens, decisions.memory.limit_tokens]
    state.micro_batch_limit_tokens = min((limit for limit in limits if limit is not None), default=None)
    return StartingPoint(identity, checkpoint, state)


def is_complete(run: Run, inputs: RunInputs, decisions: Decisions, ended: TrainResult) -> bool:
    """Whether a run has ended with the steps asked for, or the patience, so that nothing is left to do.

    Raises:
        CheckpointError: It was another run; or more steps are asked for, and its checkpoints are gone.
        AdapterError: Nothing is left to do, and its adapter is damaged.
    """
    saved = list_checkpoints(run.output / CHECKPOINTS)
    if inputs.data.sampler.total_steps != ended.total_steps:
        if saved:
            return False
        raise CheckpointError(
            f"The run in {run.output} ended after step {ended.steps:,}, and has no checkpoint to go on from.",
            "Choose another --output, or start anew with --overwrite.",
        )
    start = find_start(replace(run, report=report_nothing), inputs, decisions) if saved else None
    if start is not None and start.checkpoint:
        start.checkpoint.close()
        if ended.stopped_early and not start.state.stopped_early:
            return False
    read_adapter(run.output)
    require_unchanged(run.output, run.report)
    run.report(Notice(f"The run in {run.output} has ended, after step {ended.steps:,}: nothing is left to do."))
    return True


def start_optimization(
    run: Run, inputs: RunInputs, decisions: Decisions, start: StartingPoint, loaded: LoadedModel
) -> Optimization:
    """Builds the optimizer; its state and the random generators are those of the starting point.

    Raises:
        CheckpointError: The saved state does not fit, and without --allow-changes it may not start fresh.
    """
    config, checkpoint = run.config, start.checkpoint
    assert config.learning_rate is not None  # settled with the inputs
    parameters = TrainableParameters(loaded.model, config.loraplus_lr_ratio)
    share = decisions.memory.plan.measures.waiting_states
    decay = config.weight_decay
    own = config.engine == "fast"
    waits: dict[str, Any] = {"on_host": run.report, "waiting_share": share} if share else {}
    optimizer = build_optimizer(decisions.optimizer, parameters, weight_decay=decay, own_kernel=own, **waits)
    unallocated_bytes = allocated_state_bytes(decisions.optimizer, parameters.elements, share)
    if checkpoint:
        try:
            load_optimizer(checkpoint, optimizer, parameters)
            unallocated_bytes *= share > 0  # pieces of such a state come to the card with the first update
        except CheckpointError as error:
            if not config.allow_changes:
                raise
            optimizer.state.clear()
            run.report(Caution(f"The optimizer starts without its state: {error.message}"))
    restore_or_seed(checkpoint, parameters.device, seed=config.seed, rank=run.ranks.rank)
    rate = learning_rate_schedule(
        config.scheduler,
        peak=config.learning_rate,
        warmup_steps=decisions.warmup_steps,
        total_steps=inputs.data.sampler.total_steps,
    )
    if checkpoint:
        checkpoint.close()
        if config.allow_changes and checkpoint.step < inputs.data.sampler.total_steps:
            report_rate(run.output, checkpoint.step, rate(checkpoint.step + 1), run.report)
    return Optimization(
        parameters=parameters,
        optimizer=optimizer,
        unallocated_bytes=unallocated_bytes,
        learning_rate=rate,
        max_grad_norm=config.max_grad_norm,
        scaled=decisions.compute_dtype == torch.float16,
    )
