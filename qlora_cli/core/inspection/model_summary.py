"""Summary of a model before anything of it is trained: counts, what is in 4 bits, predicted memory and speed; JSON-ready."""

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch

from qlora_cli.config import InspectConfig, TrainConfig
from qlora_cli.core.data.prepare import choose_max_length
from qlora_cli.core.device import choose_device, resolve_compute_dtype
from qlora_cli.core.inspection.weight_stats import group_tensors, list_tensors, table, tabulate_layers
from qlora_cli.core.merge.base import foresee_refusal
from qlora_cli.core.models.files import resolve_model
from qlora_cli.core.models.structure import build_empty
from qlora_cli.core.planning.memory_estimate import (
    copied_bytes,
    estimate_disk,
    estimate_generation,
    estimate_merging,
)
from qlora_cli.core.planning.model_profile import ModelProfile, profile_model
from qlora_cli.core.planning.planner import MemoryDecision, RowLengths, plan_training, read_limit_bytes
from qlora_cli.core.planning.roofline import bound_speed, bound_streaming
from qlora_cli.core.planning.run_plan import attention_heads, context_sizes, may_be_sharded
from qlora_cli.core.planning.suggestions import suggest_fit, write_train_command
from qlora_cli.core.training.optimizer import choose_optimizer, state_bytes
from qlora_cli.core.weights.stored_formats import stored_format
from qlora_cli.events import Report

CARDS = (2, 4, 8)  # over which a base may be sharded, and which may share the tokens of rows
# Ways to train that a table compares, from the fastest to the leanest → (gradient_checkpointing, what offloads, stream).
WAYS = {
    "nothing recomputed": ("off", False, False),
    "every layer recomputed": ("on", False, False),
    "and offloaded to the host": ("on", True, False),
    "and the base streamed from it": ("on", True, True),
}


def describe_model(config: InspectConfig, report: Report) -> dict[str, Any]:
    """Counts, bytes and predicted memory from the configuration alone; with local weights, what they are.

    Raises:
        UsageError: A setting makes no sense.
        ModelError: The model is not there, or is no causal language model.
        AdapterError: The adapter cannot be attached.
    """
    assert config.model is not None
    device = choose_device()
    files = resolve_model(
        config.model,
        config.model_revision,
        trust_remote_code=config.trust_remote_code,
        rope_scaling=config.rope_scaling,
        report=report,
    )
    model_config = files.config
    stored = stored_format(model_config, config.model)
    # What would be rented is a card that computes in bfloat16, whatever this machine has.
    compute_dtype = resolve_compute_dtype(config.compute_dtype or "bfloat16", device)

    def profile_with_rank(rank: int) -> ModelProfile:
        return profile_model(
            files.held_config,
            replace(config, rank=rank),
            config,
            compute_dtype=compute_dtype,
            engine=config.engine,
            trust_remote_code=config.trust_remote_code,
        )

    model = profile_with_rank(config.rank)
    footprint = model.footprint
    optimizer = config.optimizer or choose_optimizer(None, torch.device("cuda"))
    facts = {
        "kind": "model",
        "model": config.model,
        "model_type": model_config.model_type,
        "total_parameters": footprint.total_parameters,
        "trainable_parameters": footprint.trainable_parameters,
        "trainable_percent": footprint.trainable_percent,
        "four_bit_percent": 100 * model.packing.share,
        "base_bytes": footprint.base_bytes,
        "adapter_bytes": footprint.adapter_bytes,
        "optimizer_bytes": state_bytes(optimizer, footprint.trainable_parameters),
    }
    if stored is not None:
        facts["stored"] = f"quantised already, by {stored.method}" + (f" ({stored.quant_type})" * stored.is_four_bit)
    if (missing := files.missing_weights) is not None:
        facts["missing_weights"] = missing
    if (refused := foresee_refusal(files, config)) is not None:
        facts |= refused.to_dict()
    tables = [table("Modules", [asdict(row) for row in footprint.rows])]
    rest = [{"why": reason, "parameters": count} for reason, count in model.packing.rest().items()]
    if rest:
        tables.append(table("Of the body in 16 bits", rest))
    if model.trace is None:
        facts["memory"] = f"cannot be predicted: {model.untraced}"
    else:
        max_length = choose_max_length(config.max_length, model_config, report)
        sizes = context_sizes(attention_heads(model_config), max(CARDS)) if config.engine == "fast" else []
        here = files.is_local
        predicted, predicted_tables = _predict(config, model, profile_with_rank, max_length, sizes, is_local=here)
        facts |= predicted
        tables += predicted_tables
    if config.quantization_error:
        from qlora_cli.core.inspection.quantization_error import measure_quantization_error

        errors = measure_quantization_error(
            build_empty(model_config, trust_remote_code=config.trust_remote_code),
            files.weights,
            config,
            compute_dtype=compute_dtype,
            device=device,
            report=report,
        )
        facts["mean_quantization_error"] = sum(error.value for error in errors) / max(1, len(errors))
        tables.append(tabulate_layers(f"Relative error of {config.quant_type}", errors))
    if config.data:
        from qlora_cli.core.inspection.four_bit_cost import measure_four_bit_cost

        measured, measured_tables = measure_four_bit_cost(
            config, files, vocabulary=model.vocabulary, device=device, report=report
        )
        facts |= measured
        tables += measured_tables
    reads_weights = files.commit is None or config.quantization_error
    entries = [entry for _, entry in list_tensors(files.directory).values()] if reads_weights else []
    if groups := group_tensors(entries):
        tables.append(table("Weights", groups))
    return {**facts, "tables": tables}


def _predict(
    config: InspectConfig,
    model: ModelProfile,
    profile_with_rank: Callable[[int], ModelProfile],
    max_length: int,
    sharing: list[int],
    *,
    is_local: bool,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Facts on training, generation and merging; and tables of ways to train and of speed."""
    device = choose_device()
    vram_bytes = read_limit_bytes(config.vram, device) if config.vram is not None or device.type == "cuda" else None
    lengths = RowLengths(max_length)
    plan = plan_training(model, config, lengths, vram_bytes=vram_bytes, may_stream=may_be_sharded(config))
    assert plan.memory is not None and plan.flops_per_token is not None
    sharded = {
        cards: plan_training(model, config, lengths, vram_bytes=vram_bytes, shards=cards)
        for cards in (CARDS if may_be_sharded(config) else ())
    }
    shared = {
        cards: plan_training(model, config, lengths, vram_bytes=vram_bytes, context=cards)
        for cards in CARDS
        if cards in sharing
    }
    facts: dict[str, Any] = {
        "vram_bytes": vram_bytes,
        "fits": plan.fits,
        "settings": {
            "max_length": max_length,
            "rank": config.rank,
            **plan.settings,
            **plan.elsewhere,
            "token_budget": plan.token_budget,
        },
        "flops_per_token": plan.flops_per_token,
        "training": plan.memory.to_dict(),
        "generation": estimate_generation(model, rows=1, row_tokens=max_length),
        "merging": estimate_merging(model),
        "disk": estimate_disk(model, is_local=is_local, optimizer=plan.optimizer, kept_checkpoints=TrainConfig.keep),
    }
    if plan.fits is False:
        assert vram_bytes is not None
        nearest = suggest_fit(
            model, config, lengths, vram_bytes=vram_bytes, rank=config.rank, profile_with_rank=profile_with_rank
        )
        facts |= _suggest(config, nearest, sharded, shared)
    else:
        facts["next"] = [write_train_command(config, {})]
    least = plan_training(model, config, lengths, vram_bytes=1, may_stream=may_be_sharded(config))
    if least.streaming and least.memory is not None and least.memory.device_bytes < plan.memory.device_bytes:
        names = ("device_bytes", "host_bytes")
        held = {name: getattr(least.memory, name) for name in names}
        facts["smallest_card"] = {**held, **least.streaming, "token_budget": least.token_budget}
    streaming = plan if plan.streaming else least
    streamed = [bound_streaming(copied_bytes(model, streaming.measures), streaming.token_budget)]
    return facts, [
        _tabulate_ways(config, model, lengths),
        *_tabulate_cards("Base sharded over cards, for each of them", sharded),
        *_tabulate_cards("Rows shared by cards, for each of them", shared),
        bound_speed(plan.flops_per_token),
        *(streamed if streaming.streaming else []),
    ]


def _suggest(
    config: InspectConfig,
    nearest: tuple[dict[str, Any], MemoryDecision] | None,
    sharded: dict[int, MemoryDecision],
    shared: dict[int, MemoryDecision],
) -> dict[str, Any]:
    """What to do where a model does not fit: the nearest settings, or the fewest cards, with their commands."""
    facts: dict[str, Any] = {}
    commands = []
    if nearest is None:
        facts["nearest"] = "nothing fits: take a smaller model or a larger card"
    else:
        changes, decision = nearest
        assert decision.memory is not None
        facts["nearest"] = {**changes, "device_bytes": decision.memory.device_bytes}
        commands.append(write_train_command(config, changes))
    ways = [(cards, {"gpus": cards, "shard": True}) for cards, each in sharded.items() if each.fits]
    if nearest is None or "max_length" in nearest[0]:  # else one card holds these rows
        ways += [(cards, {"gpus": cards, "context_parallel": cards}) for cards, each in shared.items() if each.fits]
    if ways:
        _, facts["nearest_with_more_cards"] = min(ways, key=lambda way: way[0])
        commands.append(write_train_command(config, facts["nearest_with_more_cards"]))
    return {**facts, "next": commands} if commands else facts


def _tabulate_ways(config: InspectConfig, model: ModelProfile, lengths: RowLengths) -> dict[str, Any]:
    """Memory of ways to train, from the fastest to the leanest."""
    ways = []
    for name, (checkpointing, offload, stream) in WAYS.items():
        if stream and not may_be_sharded(config):
            continue
        way = replace(
            config,
            gradient_checkpointing=checkpointing,
            offload_activations=offload,
            offload_embeddings=offload,
            stream=stream,
        )
        memory = plan_training(model, way, lengths, vram_bytes=None).memory
        assert memory is not None
        ways.append({"way": name, "peak_bytes": memory.peak_bytes, "device_bytes": memory.device_bytes})
    return table("Ways to train", ways)


def _tabulate_cards(title: str, plans: dict[int, MemoryDecision]) -> list[dict[str, Any]]:
    """Memory of each of so many cards; no table where there is no plan."""
    names = ("base_bytes", "peak_bytes", "device_bytes")
    each_card = [
        {"cards": cards, **{name: getattr(each.memory, name) for name in names}} for cards, each in plans.items()
    ]
    return [table(title, each_card)] if each_card else []
