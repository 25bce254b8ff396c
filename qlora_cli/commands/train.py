"""A base model and rows in, a run directory out: adapter, tokenizer, settings, metrics, loss curve, model card."""

import time
from contextlib import ExitStack
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from qlora_cli.artifacts import CHECKPOINTS, RUN_YAML, TRACKER_LOGS
from qlora_cli.config import TrainConfig
from qlora_cli.config_file import write_config_file
from qlora_cli.core.data.dataset import PreparedRows
from qlora_cli.core.data.prepare import prepare_rows
from qlora_cli.core.data.sampler import BatchSampler
from qlora_cli.core.data.split import RowSubset, hold_out
from qlora_cli.core.device import choose_device, dtype_name, read_vram, resolve_compute_dtype
from qlora_cli.core.distributed.process_group import ProcessGroup
from qlora_cli.core.distributed.rank_monitor import monitoring
from qlora_cli.core.distributed.weight_shards import WeightShards
from qlora_cli.core.engine.decoder_layers import find_layers
from qlora_cli.core.engine.engine import install_engine
from qlora_cli.core.engine.fsdp import shard_base
from qlora_cli.core.engine.lm_head import find_decoder
from qlora_cli.core.engine.memory_plan import limit_memory
from qlora_cli.core.models.identity import identify_base
from qlora_cli.core.models.loading import load_base, load_config, load_tokenizer
from qlora_cli.core.models.lora import attach_adapter, save_adapter
from qlora_cli.core.planning.memory_estimate import estimate_disk
from qlora_cli.core.planning.planner import MemoryDecision
from qlora_cli.core.planning.run_plan import (
    adapter_settings,
    gather_run_facts,
    plan_is_for_card,
    plan_run_memory,
    planned_dtype,
    resolved_configuration,
)
from qlora_cli.core.prompts.encoder import encoder_of
from qlora_cli.core.runs.directory import claimed
from qlora_cli.core.runs.finish import write_record, write_run
from qlora_cli.core.runs.identity import run_identity
from qlora_cli.core.runs.results import TrainPlan, TrainResult
from qlora_cli.core.runs.run_logs import open_logs, tracking
from qlora_cli.core.runs.validate import check_ranks, check_settings
from qlora_cli.core.storage.checkpoint import list_checkpoints, remove_leftovers, reporting_disk_full, require_space
from qlora_cli.core.training.flat_parameters import TrainableParameters
from qlora_cli.core.training.lr_schedule import count_warmup_steps, learning_rate_schedule
from qlora_cli.core.training.optimizer import allocated_state_bytes, build_optimizer, choose_optimizer, state_bytes
from qlora_cli.core.training.resume import find_checkpoint, restore_adapter, restore_optimizer, restore_or_seed
from qlora_cli.core.training.state import TrainerState, read_trainer_state
from qlora_cli.core.training.trainer import Checkpointing, Trainer, TrainerSchedule
from qlora_cli.errors import DataError
from qlora_cli.events import Event, Report, RunStarted

SAVES_A_RUN = 10  # by default
# The others may wait for hours while one prepares the rows; what a dead rank would keep waiting is seen by `monitoring`.
EXCHANGE_TIMEOUT = timedelta(hours=24)
SMALL_FILES_BYTES = 2**24  # tokenizer, curve, metrics, random state: checked for before training


def train(config: TrainConfig, report: Report) -> TrainResult | TrainPlan:
    """Trains an adapter and writes the run directory. What is cheap to check is checked before the base is loaded.

    Returns:
        What the run came to; with `dry_run` what it would do, and nothing is written.

    Raises:
        QloraError: Any of its children.
    """
    check_settings(config)
    output = Path(config.output)
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision="no",  # the engine keeps the dtypes
        log_with=config.report_to,
        project_dir=str(output / TRACKER_LOGS),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=EXCHANGE_TIMEOUT)],
    )
    ranks = ProcessGroup(accelerator.process_index, accelerator.num_processes)
    if not ranks.is_main:
        report = report_nothing
    with ExitStack() as stack:
        stack.enter_context(monitoring(ranks, choose_device()))
        stack.enter_context(tracking(accelerator))
        check_ranks(config, ranks)
        if ranks.is_main:
            stack.enter_context(claimed(output, resume=config.resume, overwrite=config.overwrite))
            remove_leftovers(output / CHECKPOINTS)
        ranks.barrier()

        # Cheap: configuration, targets, rows, plan, checkpoint, disk.
        name, revision, trusted = config.model, config.model_revision, config.trust_remote_code
        assert name is not None
        model_config = load_config(name, revision, trust_remote_code=trusted)
        tokenizer = load_tokenizer(name, revision, trust_remote_code=trusted)
        device = choose_device()
        facts = gather_run_facts(config, model_config, device)
        trainable, total = facts.footprint.trainable_parameters, facts.footprint.total_parameters
        with accelerator.main_process_first():
            rows = open_rows(config, tokenizer, model_config, report)
        max_length = config.max_length or rows.manifest["max_length"]
        train_rows, eval_rows = hold_out(rows, fraction=config.eval_fraction, count=config.eval_rows, seed=config.seed)
        plan = plan_steps(config, train_rows, ranks, max_length)
        warmup_steps = count_warmup_steps(config.warmup_steps, config.warmup_ratio, plan.total_steps)
        memory = plan_run_memory(
            config,
            model_config,
            facts,
            max_length=max_length,
            lengths=train_rows.lengths,
            longest=plan.longest_micro_batches(),
            device=device,
            ranks=ranks,
            report=report,
        )
        optimizer_name = choose_optimizer(config.optimizer, device)
        compute_dtype = resolve_compute_dtype(config.compute_dtype, device)
        identity = checkpoint = None
        if config.resume or not config.dry_run:  # a dry run downloads no weights to tell a base by
            identity = run_identity(
                config,
                identify_base(
                    name,
                    revision,
                    quant_type=config.quant_type,
                    double_quant=config.double_quant,
                    compute_dtype=compute_dtype,
                ),
                rows.manifest["rows_sha256"],
                optimizer=optimizer_name,
                total_steps=plan.total_steps,
                warmup_steps=warmup_steps,
            )
            if config.resume:
                checkpoint = find_checkpoint(
                    output / CHECKPOINTS, identity, allow_changes=config.allow_changes, report=report
                )
        checkpoint_bytes = 4 * trainable + state_bytes(optimizer_name, trainable) + SMALL_FILES_BYTES
        standing = len(list_checkpoints(output / CHECKPOINTS))
        require_space(output, checkpoint_bytes * max(2, config.keep + config.keep_best + 2 - standing))
        if config.dry_run:
            dtype = dtype_name(planned_dtype(config, device))
            return TrainPlan(
                output=config.output,
                device="cuda" if plan_is_for_card(config, device) else "cpu",
                compute_dtype=dtype,
                rows=len(train_rows),
                held_out_rows=len(eval_rows),
                first_step=checkpoint.step + 1 if checkpoint else 1,
                total_steps=plan.total_steps,
                warmup_steps=warmup_steps,
                trainable_parameters=trainable,
                total_parameters=total,
                checkpoint_bytes=checkpoint_bytes,
                disk=estimate_disk(facts, optimizer=memory.plan.optimizer, kept_checkpoints=config.keep),
                vram_bytes=memory.plan.vram_bytes,
                fits=memory.plan.fits,
                settings={**memory.decided, "shard": memory.sharded, "token_budget": memory.plan.token_budget},
                memory=memory.predicted(),
                configuration=resolved_configuration(
                    config, memory, max_length=max_length, compute_dtype=dtype, warmup_steps=warmup_steps
                ),
                next=memory.commands,
            )
        assert identity is not None

        # Dear: the base, and on it the adapter, the engine and the optimizer.
        limit_bytes = memory.plan.allocator_bytes  # of what is free, where no limit was given
        if limit_bytes is not None and device.type == "cuda" and (config.vram or ranks.world_size == 1):
            limit_memory(device, limit_bytes)
        slices = WeightShards(ranks, on_host=config.shard_offload) if memory.sharded else None
        base, base_identity = load_base(
            name,
            revision=revision,
            trust_remote_code=trusted,
            quant_type=config.quant_type,
            double_quant=config.double_quant,
            compute_dtype=compute_dtype,
            device=device,
            cache=config.base_cache,
            slices=slices,
            report=report,
        )
        model = attach_adapter(base, **adapter_settings(config), seed=config.seed)
        if slices is not None:
            decoder = find_decoder(base)
            shard_base(base, decoder, find_layers(decoder), slices, device)
        loaded = read_vram(device)
        progress = TrainerState()
        if checkpoint:
            progress = read_trainer_state(checkpoint.path)
            restore_adapter(checkpoint, model)
        limits = [limit for limit in (progress.micro_batch_limit_tokens, memory.limit_tokens) if limit is not None]
        progress.micro_batch_limit_tokens = min(limits, default=None)
        largest = plan.longest_micro_batches(progress.micro_batch_limit_tokens)
        engine = install_engine(
            model,
            kind=config.engine,
            device=device,
            compute_dtype=compute_dtype,
            # Where the base is sharded no layer is measured by itself: what was predicted decides.
            **measures_of(memory.plan if slices is not None and device.type == "cuda" else config),
            compile=config.compile,
            max_tokens=max(int(train_rows.lengths[batch].sum()) for batch in largest),
            total_steps=plan.total_steps,  # of a resumed run too, whose steps are to be computed the same way
            optimizer_bytes=allocated_state_bytes(optimizer_name, trainable),
            report=report,
        )
        stack.callback(engine.close)
        parameters = TrainableParameters(model)
        optimizer = build_optimizer(optimizer_name, parameters, weight_decay=config.weight_decay)
        if checkpoint:
            restore_optimizer(checkpoint, optimizer, parameters, allow_changes=config.allow_changes, report=report)
        restore_or_seed(checkpoint, parameters, seed=config.seed, rank=ranks.rank)

        # From here on the directory is a run.
        def save(directory: Path) -> None:
            save_adapter(model, directory, base_name=base_identity.model)
            write_record(directory, base_identity, rows)  # a checkpoint can be used like a run, also once it is moved

        if ranks.is_main:
            write_config_file(config, output / RUN_YAML)
        log = open_logs(config, accelerator, output, progress.step, stack) if ranks.is_main else report_nothing
        place = str(device) if ranks.world_size == 1 else f"{ranks.world_size} × {device.type}"
        report(RunStarted(progress.step + 1, plan.total_steps, trainable, total, place, engine.describe()))
        loop = Trainer(
            model=model,
            engine=engine,
            rows=train_rows,
            eval_rows=eval_rows,
            plan=plan,
            eval_plan=plan_evaluation(config, eval_rows, ranks, max_length),
            parameters=parameters,
            optimizer=optimizer,
            optimizer_bytes=0 if checkpoint else allocated_state_bytes(optimizer_name, parameters.elements),
            learning_rate=learning_rate_schedule(
                config.scheduler, peak=config.learning_rate, warmup_steps=warmup_steps, total_steps=plan.total_steps
            ),
            max_grad_norm=config.max_grad_norm,
            scaled=compute_dtype == torch.float16,
            schedule=TrainerSchedule(
                eval_every=config.eval_every,
                save_every=config.save_every or -(-plan.total_steps // SAVES_A_RUN),
                keep=config.keep,
                keep_best=config.keep_best,
                patience=config.patience,
            ),
            saving=Checkpointing(output / CHECKPOINTS, identity, save, checkpoint_bytes),
            progress=progress,
            ranks=ranks,
            lockstep=slices is not None,
            report=report,
            log=log,
        )
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)  # what is told is the peak of training, not of loading
        started = time.perf_counter()
        loop.run()
        vram = read_vram(device)
        result = TrainResult(
            output=config.output,
            steps=loop.progress.step,
            total_steps=plan.total_steps,
            tokens=loop.progress.tokens,
            seconds=time.perf_counter() - started,
            final_loss=loop.progress.last_loss,
            eval_loss=loop.progress.last_eval_loss,
            best_eval_loss=loop.progress.best_loss,
            best_step=loop.progress.best_step,
            stopped_early=loop.progress.stopped_early,
            trainable_parameters=trainable,
            total_parameters=total,
            base_vram_bytes=ranks.all_reduce_max(loaded.now_bytes, device) if loaded else None,
            loading_vram_bytes=ranks.all_reduce_max(loaded.peak_bytes, device) if loaded else None,
            peak_vram_bytes=ranks.all_reduce_max(vram.peak_bytes, device) if vram else None,
        )
        if ranks.is_main:
            with reporting_disk_full(output, checkpoint_bytes):
                write_run(
                    output,
                    save_adapter=save,
                    best_step=result.best_step if config.keep_best else None,
                    tokenizer=tokenizer,
                    base=base_identity,
                    rows=rows,
                    settings=asdict(config),
                    training={name: value for name, value in result.to_dict().items() if name != "output"},
                    report=report,
                )
        ranks.barrier()
        return result


def report_nothing(event: Event) -> None:
    """The report of ranks that are not the main one."""


# ---------------------------------------------------------------- parts of the recipe


def measures_of(settings: TrainConfig | MemoryDecision) -> dict[str, Any]:
    """How a step keeps within memory: what the engine takes as given."""
    names = ("gradient_checkpointing", "offload_activations", "offload_embeddings", "resident_weights")
    return {name: getattr(settings, name) for name in names}


def open_rows(
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase, model_config: PreTrainedConfig, report: Report
) -> PreparedRows:
    """The rows to train on: prepared ones, or those of --data, prepared in the cache.

    Raises:
        DataError: The rows were prepared with another tokenizer, or there are none.
    """
    if config.prepared is None:
        return PreparedRows(prepare_rows(config, tokenizer, model_config, None, report).directory)
    rows = PreparedRows(config.prepared)
    prepared_with = rows.manifest["tokenizer"]
    if prepared_with["sha256"] != encoder_of(tokenizer).spec.sha256:
        raise DataError(
            f"The rows in {config.prepared} were prepared with another tokenizer ({prepared_with['name']}) than that "
            f"of {config.model}.",
            f"Prepare them anew: qlora prepare --model {config.model} --data ... --output {config.prepared}",
        )
    return rows


def plan_steps(config: TrainConfig, rows: RowSubset, ranks: ProcessGroup, max_length: int) -> BatchSampler:
    """The steps of the run."""
    return BatchSampler(
        rows.lengths,
        batch_size=config.batch_size,
        accumulation=config.gradient_accumulation_steps,
        packing=config.packing,
        max_length=max_length,
        seed=config.seed,
        epochs=config.epochs,
        max_steps=config.max_steps,
        ranks=ranks,
    )


def plan_evaluation(config: TrainConfig, rows: RowSubset, ranks: ProcessGroup, max_length: int) -> BatchSampler | None:
    """One pass over the held-out rows, if there are any."""
    if not len(rows):
        return None
    once = replace(config, gradient_accumulation_steps=ranks.world_size, epochs=1.0, max_steps=None)
    return plan_steps(once, rows, ranks, max_length)
