"""A run's memory is planned for the rows it has, refused where it cannot end well, and never on a CPU."""

import shlex
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers

from qlora_cli.config import TrainConfig
from qlora_cli.core.distributed.process_group import ProcessGroup
from qlora_cli.core.planning.run_plan import RunPlan, measure_rows, plan_run_memory, profile_run, resolved_configuration
from qlora_cli.errors import DoesNotFit, UsageError
from qlora_cli.sizes import format_bytes

MIB = 2**20
pytestmark = pytest.mark.usefixtures("short_runs")
CARD, CPU = torch.device("cuda", 0), torch.device("cpu")
MODEL = transformers.LlamaConfig(
    vocab_size=8192, hidden_size=1024, num_hidden_layers=8, num_attention_heads=8, intermediate_size=2816
)
LENGTHS = np.full(8, 16000, dtype=np.int32)
CONFIG = TrainConfig(
    model="org/model", data="rows.jsonl", batch_size=4, gradient_accumulation_steps=2, compute_dtype="bfloat16"
)


class Cards(ProcessGroup):
    """Ranks that all have the same card."""

    def all_reduce_max(self, value, device):
        return value


def plan(
    device=CARD, events=None, longest=((0, 1, 2, 3),), lengths=LENGTHS, model=MODEL, ranks=None, **changes
) -> RunPlan:
    config = replace(CONFIG, **changes)
    return plan_run_memory(
        config,
        model,
        profile_run(config, model, device),
        lengths=measure_rows(config, config.max_length or 16384, lengths, longest),
        device=device,
        ranks=ranks or ProcessGroup(),
        report=(events if events is not None else []).append,
    )


def least_bytes(**changes) -> int:
    return plan(dry_run=True, vram="1MiB", **changes).plan.memory.device_bytes


def test_what_fits_stays_as_it_was_asked_for():
    memory = plan(vram="40GiB")
    assert memory.plan.fits and memory.limit_tokens is None and memory.commands == ()
    assert memory.largest_tokens == memory.plan.token_budget == 64000
    assert memory.plan.settings["gradient_checkpointing"] == "off"


def test_micro_batches_are_limited_where_memory_is_short():
    whole = plan(vram="40GiB", gradient_checkpointing="off", resident_weights=False)
    short = plan(vram=f"{whole.plan.memory.device_bytes // MIB - 100}MiB", gradient_checkpointing="off")
    assert short.plan.fits
    assert 16000 <= short.limit_tokens < 64000


def test_padded_rows_count_with_their_padding():
    uneven = np.array([16000, 10, 10, 10], dtype=np.int32)
    sizes = {engine: plan(vram="40GiB", engine=engine, lengths=uneven).largest_tokens for engine in ("fast", "plain")}
    assert sizes == {"fast": 16030, "plain": 64000}


@pytest.mark.parametrize("prepared", [None, "some rows"])
def test_a_run_that_cannot_end_well_is_refused_with_a_command_that_can(prepared):
    rows = {"data": None, "prepared": prepared} if prepared else {}
    limit_mib = int(least_bytes() * 0.94) // MIB
    with pytest.raises(DoesNotFit) as caught:
        plan(vram=f"{limit_mib}MiB", **rows)
    assert caught.value.exit_code == 3
    assert format_bytes(least_bytes()) in caught.value.message and format_bytes(limit_mib * MIB) in caught.value.message
    words = shlex.split(caught.value.hint.removeprefix("Type: "))
    assert words[words.index("--max-length") + 1] == "8000"
    assert words[words.index("--vram") + 1] == f"{limit_mib}MiB"
    if prepared:  # rows too long already are prepared anew
        assert words[:2] == ["qlora", "prepare"] and words[words.index("--output") + 1] == "some rows-8000"
        assert words[words.index("--prepared") + 1] == "some rows-8000"
    else:
        assert words[words.index("--data") + 1] == "rows.jsonl"
    shorter = plan(vram=f"{limit_mib}MiB", lengths=LENGTHS // 2, max_length=8000, batch_size=1, longest=((0,),))
    assert shorter.plan.fits


def test_where_nothing_fits_the_error_says_so():
    with pytest.raises(DoesNotFit) as caught:
        plan(vram="100MiB")
    assert "Nothing fits" in caught.value.hint


def test_a_dry_run_says_instead_of_refusing():
    memory = plan(vram="1500MiB", dry_run=True)
    assert memory.plan.fits is False
    assert len(memory.commands) == 1 and "--dry-run" not in memory.commands[0]
    assert plan(CPU, vram="1500MiB", dry_run=True).plan == memory.plan  # where there is no card, for one of that size


def test_a_run_on_the_cpu_is_never_refused():
    events: list = []
    memory = plan(CPU, events, vram="2MiB")
    assert memory.plan.fits is None and memory.limit_tokens is None
    assert "no GPU here" in events[0].text
    assert not events[1:]


def test_a_dry_run_on_the_cpu_reports_the_host_s_memory():
    memory = plan(CPU, dry_run=True)
    assert memory.plan.vram_bytes is None
    assert memory.predicted()["context_bytes"] == 0 < memory.predicted()["peak_bytes"]
    assert memory.plan.settings["optimizer"] == "adamw"


def test_a_model_that_cannot_be_followed_says_why():
    memory = plan(vram="40GiB")
    blind = replace(
        memory, plan=replace(memory.plan, memory=None), profile=replace(memory.profile, untraced="it must not")
    )
    assert blind.predicted() == "cannot be predicted: it must not"


def test_the_resolved_configuration_has_no_open_choice_left():
    content = resolved_configuration(CONFIG, plan(vram="40GiB"), max_length=16000)
    assert content["max_length"] == 16000 and content["optimizer"] == "paged_adamw_8bit"
    assert {"resume", "dry_run"}.isdisjoint(content)
    open_choices = ("gradient_checkpointing", "offload_activations", "offload_embeddings", "resident_weights")
    assert not any(content[name] in (None, "auto") for name in open_choices)


def test_a_size_without_a_unit_is_refused():
    with pytest.raises(UsageError):
        plan(vram="12")


@pytest.mark.slow  # tests/commands/test_inspect.py has it offered
def test_the_base_is_sharded_where_one_card_cannot_hold_it_and_two_can():
    deep = transformers.LlamaConfig(**{**MODEL.to_dict(), "num_hidden_layers": 32})
    short = {"model": deep, "lengths": np.full(8, 64, dtype=np.int32), "longest": ((0,),), "max_length": 64}
    leanest = {"gradient_checkpointing": "on", "offload_activations": True, "dry_run": True}
    whole, sharded = (
        plan(vram="1MiB", ranks=Cards(0, 2), shard=shard, **short, **leanest).plan.memory.device_bytes
        for shard in (False, True)
    )
    assert sharded < whole - 64 * MIB
    reported: list = []
    between = f"{(sharded + whole) // 2 // MIB}MiB"
    chosen = plan(vram=between, events=reported, ranks=Cards(0, 2), **short, **leanest)
    assert chosen.sharded and chosen.plan.fits and chosen.plan.memory.device_bytes == sharded
    assert "sharded over 2 cards" in reported[-1].text
    for changes in ({"shard": False}, {"ranks": Cards(0, 1)}, {"engine": "plain"}, {"vram": "40GiB"}):
        assert not plan(**{"vram": between, "ranks": Cards(0, 2), **short, **leanest, **changes}).sharded


def test_cards_share_rows_where_one_cannot_hold_the_longest():
    """Unasked as many as it takes; what each holds grows with its part of the tokens."""
    leanest = {"gradient_checkpointing": "on", "offload_activations": True, "dry_run": True, "batch_size": 1}
    leanest["tile_tokens"] = 0  # which cards do not share
    long = {"lengths": np.full(8, 65536, dtype=np.int32), "longest": ((0,),), "max_length": 65536}
    one, two, four = (
        plan(vram="1MiB", ranks=Cards(0, 4, size), context_parallel=size, shard=False, **long, **leanest).plan.memory
        for size in (1, 2, 4)
    )
    held = [memory.activation_bytes + memory.working_bytes for memory in (one, two, four)]
    assert 0.45 < held[1] / held[0] < 0.65 and 0.45 < held[2] / held[1] < 0.65
    reported: list = []
    between = f"{(one.device_bytes + two.device_bytes) // 2 // MIB}MiB"
    chosen = plan(vram=between, events=reported, ranks=Cards(0, 4), shard=False, **long, **leanest)
    assert chosen.context == 2 and chosen.plan.fits
    assert "2 cards share the tokens of each row" in reported[-1].text
    for changes in ({"context_parallel": 1}, {"ranks": Cards(0, 1)}, {"engine": "plain"}, {"vram": "40GiB"}):
        assert (
            plan(**{"vram": between, "ranks": Cards(0, 4), "shard": False, **long, **leanest, **changes}).context == 1
        )
