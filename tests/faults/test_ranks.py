"""Two processes that share each step: the same run as one process, one voice, one directory, and one end."""

import pytest

from tests.experts.expert_modules import write_expert_model

from .conftest import Outcome, Run, Zygote

DRAWING = {"dropout": 0.1, "neftune_noise_alpha": 5.0}
ALONE = {"dropout": 0.0, "optimizer": "adamw"}  # where dropout falls depends on how a step is shared


def train_as_two(zygote: Zygote, run: Run, **arguments) -> Outcome:
    function = "tests.faults.victims:train_as_ranks"
    return zygote.run(function, options=run.options, **{"world_size": 2, **arguments})


def same_numbers(left: Run, right: Run) -> bool:
    """Within the rounding that another order of adding brings."""
    pairs = list(zip(left.metrics(), right.metrics(), strict=True))
    numbers = [(a[name], b[name]) for a, b in pairs for name in a if a[name] is not None]
    alike = (a == (b if isinstance(b, str) else pytest.approx(b, rel=1e-4)) for a, b in numbers)
    return all(a.keys() == b.keys() for a, b in pairs) and all(alike)


@pytest.fixture(scope="module")
def single(zygote, make_run, tmp_path_factory) -> Run:
    run = make_run(tmp_path_factory.mktemp("single") / "out", **ALONE)
    assert zygote.train(run.options).code == 0
    return run


@pytest.mark.slow  # tests/commands/test_launchers.py has two that do
def test_two_processes_train_as_one_does_and_one_speaks(zygote, make_run, single, tmp_path):
    run = make_run(tmp_path / "out", **ALONE)
    done = train_as_two(zygote, run)
    assert "codes [0, 0]" in done.said, done.said
    assert done.said.count("RunStarted(") == 1 and done.said.count("StepLogged(") == 6
    assert same_numbers(run, single)
    assert {path.name for path in run.output.iterdir()} == {path.name for path in single.output.iterdir()}


def test_a_signal_to_one_stops_both_at_the_same_step_and_one_process_goes_on(zygote, make_run, single, tmp_path):
    run = make_run(tmp_path / "out", **ALONE)
    stopped = train_as_two(zygote, run, fault={"kind": "signalled", "step": 3}, faulty_rank=0)
    assert "codes [143, 143]" in stopped.said, stopped.said
    assert [int(path.name[5:]) for path in run.checkpoints] == [2, 3]
    done = zygote.train({**run.options, "resume": True})
    assert done.code == 0 and "first_step=4" in done.said, done.said
    assert same_numbers(run, single)


def test_memory_that_runs_out_on_one_repeats_the_step_on_both(zygote, make_run, single, tmp_path):
    run = make_run(tmp_path / "out", **ALONE)
    fault = {"kind": "out_of_memory", "above_tokens": 20, "from_step": 1}
    done = train_as_two(zygote, run, fault=fault, faulty_rank=0)
    assert "codes [0, 0]" in done.said and "Memory ran out" in done.said, done.said
    assert same_numbers(run, single)


def test_a_process_that_dies_does_not_leave_the_other_waiting_and_the_run_goes_on(zygote, make_run, single, tmp_path):
    run = make_run(tmp_path / "out", **ALONE)
    died = train_as_two(zygote, run, fault={"kind": "signalled", "step": 4, "number": 9}, faulty_rank=1)
    assert "codes [1, -9]" in died.said, died.said
    assert "Rank 1 of 2 (process " in died.said and "ended without a word" in died.said, died.said
    done = zygote.train({**run.options, "resume": True})
    assert done.code == 0 and same_numbers(run, single), done.said


@pytest.mark.parametrize(
    ("changes", "faulty_rank"),
    [
        ({}, 1),
        pytest.param({**DRAWING, "optimizer": "adamw", "context_parallel": 2}, 0, marks=pytest.mark.slow),
    ],
)
def test_two_processes_resumed_are_bit_for_bit_two_processes_never_stopped(
    zygote, make_run, tmp_path, changes, faulty_rank
):
    """Each with its own dropout and noise: the random state of every rank is in the checkpoint."""
    straight, run = (make_run(tmp_path / name, **changes) for name in ("straight", "out"))
    assert "codes [0, 0]" in train_as_two(zygote, straight).said
    stopped = train_as_two(zygote, run, fault={"kind": "signalled", "step": 3}, faulty_rank=faulty_rank)
    assert "codes [143, 143]" in stopped.said, stopped.said
    run.options["resume"] = True
    done = train_as_two(zygote, run)
    assert "codes [0, 0]" in done.said and "first_step=4" in done.said, done.said
    assert run.weights() == straight.weights() and run.metrics() == straight.metrics()


# ---------------------------------------------------------------- the base sharded over the ranks


@pytest.fixture
def tiny_base_bytes(load_tiny) -> int:
    """Of a whole base, absolute maxima of its blocks included."""
    base, _ = load_tiny("llama")
    return sum(p.nbytes + (p.quant_state.absmax.nbytes if hasattr(p, "quant_state") else 0) for p in base.parameters())


def held_bytes(done: Outcome) -> int:
    """What the rank that counts holds."""
    return int(done.said.split("held ")[1].split()[0])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param({"gradient_checkpointing": "on", "shard_offload": True}, marks=pytest.mark.slow),
        pytest.param({"double_quant": False, "gradient_checkpointing": "1"}, marks=pytest.mark.slow),
        pytest.param({"quant_type": "fp4", "packing": True, "max_length": 64}, marks=pytest.mark.slow),
    ],
)
def test_a_sharded_base_trains_as_a_whole_one_does(zygote, make_run, tiny_base_bytes, tmp_path, changes):
    """Bit for bit: what is gathered are the very bytes. A rank holds its half of them."""
    whole = make_run(tmp_path / "whole", **{**ALONE, **changes, "shard_offload": False})
    sharded = make_run(tmp_path / "sharded", **ALONE, shard=True, **changes)
    assert "codes [0, 0]" in train_as_two(zygote, whole).said
    done = train_as_two(zygote, sharded, fault={"kind": "counted"}, faulty_rank=1)
    assert "codes [0, 0]" in done.said and "base sharded over the cards" in done.said, done.said
    assert changes or held_bytes(done) < 0.51 * tiny_base_bytes
    assert sharded.metrics() == whole.metrics() and sharded.weights() == whole.weights()


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["gpt_neox", "gemma3", "falcon", "gpt2", "qwen2", "bloom", "opt"])
def test_any_architecture_can_be_sharded(zygote, make_run, tiny_model, tmp_path, architecture):
    changes = {**ALONE, "model": str(tiny_model(architecture)), "target_modules": None, "max_steps": 3}
    whole = make_run(tmp_path / "whole", **changes)
    sharded = make_run(tmp_path / "sharded", **changes, shard=True)
    for run in (whole, sharded):
        done = train_as_two(zygote, run)
        assert "codes [0, 0]" in done.said, done.said
    assert sharded.weights() == whole.weights() and sharded.metrics() == whole.metrics()


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["qwen3_moe", "gpt_oss"])
def test_experts_can_be_sharded(zygote, make_run, tmp_path, layout):
    write_expert_model(layout, tmp_path / "model")
    changes = {**ALONE, "model": str(tmp_path / "model"), "target_modules": None, "max_steps": 3}
    runs = [make_run(tmp_path / name, **changes) for name in ("one", "whole", "sharded")]
    runs[2].options["shard"] = True
    assert zygote.train(runs[0].options).code == 0
    for run in runs[1:]:
        done = train_as_two(zygote, run)
        assert "codes [0, 0]" in done.said, done.said
    assert runs[2].weights() == runs[1].weights() and runs[2].metrics() == runs[1].metrics()
    assert same_numbers(runs[2], runs[0])


@pytest.mark.slow  # of two above
def test_a_rank_of_three_holds_its_share_of_a_sharded_base_and_no_more(zygote, make_run, tiny_base_bytes, tmp_path):
    run = make_run(tmp_path / "out", **ALONE, shard=True, max_steps=1)
    run.options["gradient_accumulation_steps"] = 3
    done = train_as_two(zygote, run, world_size=3, fault={"kind": "counted"}, faulty_rank=1)
    assert held_bytes(done) < 0.35 * tiny_base_bytes


@pytest.mark.slow
def test_a_sharded_base_is_the_same_quantised_here_or_taken_from_the_copy_of_a_whole_one(zygote, make_run, tmp_path):
    runs = [make_run(tmp_path / name, **ALONE, base_cache=True, max_steps=2) for name in ("first", "sharded")]
    assert zygote.train(runs[0].options).code == 0  # keeps the copy
    quantised = make_run(tmp_path / "quantised", **ALONE, shard=True, max_steps=2)
    runs[1].options["shard"] = True
    reported = [train_as_two(zygote, run).said for run in (runs[1], quantised)]
    assert "Using the quantised base" in reported[0] and "Using the quantised base" not in reported[1]
    assert runs[1].weights() == quantised.weights()


@pytest.mark.slow
def test_a_sharded_run_keeps_a_copy_of_the_base_that_is_the_one_a_whole_run_keeps(zygote, make_run, tmp_path):
    changes = {**ALONE, "max_steps": 1, "quant_type": "fp4", "gradient_accumulation_steps": 3}
    sharded = make_run(tmp_path / "sharded", **changes, base_cache=True, shard=True)
    assert "codes [0, 0, 0]" in train_as_two(zygote, sharded, world_size=3).said
    copied = make_run(tmp_path / "copied", **changes, base_cache=True)
    reported = zygote.train(copied.options)
    assert reported.code == 0 and "Using the quantised base" in reported.said, reported.said
    quantised = make_run(tmp_path / "quantised", **changes)
    assert zygote.train(quantised.options).code == 0
    assert copied.weights() == quantised.weights() and copied.metrics() == quantised.metrics()


@pytest.mark.slow
def test_three_ranks_share_what_does_not_divide_by_three(zygote, make_run, tmp_path):
    """Shares are filled up, and a last step of few rows leaves ranks without any, which still take part."""
    changes = {**ALONE, "batch_size": 3, "gradient_accumulation_steps": 1, "max_steps": 11, "eval_rows": 4}
    whole, sharded = make_run(tmp_path / "whole", **changes), make_run(tmp_path / "sharded", **changes, shard=True)
    assert zygote.train(whole.options).code == 0
    done = train_as_two(zygote, sharded, world_size=3)
    assert "codes [0, 0, 0]" in done.said, done.said
    assert same_numbers(sharded, whole)


@pytest.mark.slow
def test_a_sharded_run_is_stopped_and_resumed_whole_by_one_process_and_back(zygote, make_run, single, tmp_path):
    run = make_run(tmp_path / "out", **ALONE, shard=True)
    stopped = train_as_two(zygote, run, fault={"kind": "signalled", "step": 2}, faulty_rank=1)
    assert "codes [143, 143]" in stopped.said, stopped.said
    alone = {**run.options, "resume": True, "shard": None}
    stopped = zygote.train(alone, {"kind": "signalled", "step": 4})
    assert stopped.code == 143 and "first_step=4" in stopped.said, stopped.said
    run.options["resume"] = True
    done = train_as_two(zygote, run)
    assert "codes [0, 0]" in done.said and "first_step=5" in done.said, done.said
    assert same_numbers(run, single)


@pytest.mark.slow
def test_a_rank_of_a_sharded_run_that_dies_ends_the_others(zygote, make_run, tmp_path):
    run = make_run(tmp_path / "out", **ALONE, shard=True)
    died = train_as_two(zygote, run, fault={"kind": "signalled", "step": 4, "number": 9}, faulty_rank=1)
    assert "codes [1, -9]" in died.said and "Rank 1 of 2" in died.said, died.said
    assert [int(path.name[5:]) for path in run.checkpoints] == [2, 3]  # the last whole step is saved


def test_memory_that_runs_out_in_a_sharded_run_ends_it_with_a_reason(zygote, make_run, tmp_path):
    run = make_run(tmp_path / "out", **ALONE, shard=True)
    fault = {"kind": "out_of_memory", "above_tokens": 20, "from_step": 1}
    done = train_as_two(zygote, run, fault=fault, faulty_rank=1)
    assert "codes [1, 1]" in done.said and "the other cards wait for it" in done.said, done.said


@pytest.mark.parametrize(
    ("changes", "says"),
    [({"shard": True}, "one process runs"), ({"shard": True, "dora": True}, "one process runs")],
)
def test_a_base_that_cannot_be_sharded_is_refused(zygote, make_run, tmp_path, changes, says):
    run = make_run(tmp_path / "out", **changes)
    refused = zygote.train(run.options)
    assert refused.code == 2 and says in refused.said


def test_a_layer_with_a_forward_pass_of_its_own_cannot_be_sharded(zygote, make_run, tmp_path):
    run = make_run(tmp_path / "out", **ALONE, shard=True, dora=True)
    refused = train_as_two(zygote, run)
    assert "codes [2, 2]" in refused.said and "plain LoRA adapters only" in refused.said


# ---------------------------------------------------------------- the tokens of each row shared by ranks


def test_ranks_that_share_tokens_are_stopped_and_one_goes_on_as_if_alone_all_along(zygote, make_run, single, tmp_path):
    run = make_run(tmp_path / "out", **ALONE, context_parallel=2)
    stopped = train_as_two(zygote, run, fault={"kind": "signalled", "step": 3}, faulty_rank=1)
    assert "codes [143, 143]" in stopped.said and "packs shared by 2 ranks" in stopped.said, stopped.said
    done = zygote.train({**run.options, "resume": True, "context_parallel": None})
    assert done.code == 0 and "first_step=4" in done.said, done.said
    assert "rounding.context_parallel" in done.said and same_numbers(run, single)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"packing": True, "max_length": 64},
        {"shard": True},
        {"shard_offload": True, "gradient_checkpointing": "on", "packing": True},
        {"rslora": True, "loraplus_lr_ratio": 4.0, "init": "calibrated", "sample_prompt": ("What is this?",)},
    ],
)
def test_ranks_that_share_tokens_train_as_one(zygote, make_run, tmp_path, changes):
    alone = make_run(tmp_path / "alone", **{**ALONE, **changes, "shard": None, "shard_offload": False})
    shared = make_run(tmp_path / "shared", **{**ALONE, **changes}, context_parallel=2)
    assert zygote.train(alone.options).code == 0
    done = train_as_two(zygote, shared)
    assert "codes [0, 0]" in done.said and "packs shared by 2 ranks" in done.said, done.said
    assert same_numbers(shared, alone)


@pytest.mark.slow
@pytest.mark.parametrize("shard", [None, True])
def test_groups_of_ranks_share_the_rows_of_a_step(zygote, make_run, tmp_path, shard):
    """Of an unfull last step a group may get nothing, and takes part all the same."""
    changes = {**ALONE, "init": "default", "max_steps": 8, "eval_rows": 3}
    single = make_run(tmp_path / "single", **changes)
    assert zygote.train(single.options).code == 0
    run = make_run(tmp_path / "out", **changes, context_parallel=2, shard=shard)
    done = train_as_two(zygote, run, world_size=4)
    assert "codes [0, 0, 0, 0]" in done.said, done.said
    assert same_numbers(run, single)


@pytest.mark.parametrize(
    ("world_size", "changes", "says"),
    [
        (1, {"context_parallel": 2}, "one process runs"),
        pytest.param(2, {"context_parallel": 2, "engine": "plain"}, "takes the fast engine", marks=pytest.mark.slow),
        pytest.param(3, {"context_parallel": 2}, "does not divide the 3 cards", marks=pytest.mark.slow),
        pytest.param(3, {"context_parallel": 3}, "cannot share 4 attention heads", marks=pytest.mark.slow),
    ],
)
def test_tokens_that_ranks_cannot_share_are_refused(zygote, make_run, tmp_path, world_size, changes, says):
    run = make_run(tmp_path / "out", **{**ALONE, "gradient_accumulation_steps": 6, **changes})
    refused = zygote.train(run.options) if world_size == 1 else train_as_two(zygote, run, world_size=world_size)
    ended = refused.code == 2 if world_size == 1 else f"codes {[2] * world_size}" in refused.said
    assert ended and says in refused.said, refused.said


@pytest.mark.slow
def test_memory_that_runs_out_where_tokens_are_shared_ends_the_run_with_a_reason(zygote, make_run, tmp_path):
    run = make_run(tmp_path / "out", **ALONE, context_parallel=2)
    fault = {"kind": "out_of_memory", "above_tokens": 10, "from_step": 1}
    done = train_as_two(zygote, run, fault=fault, faulty_rank=1)
    assert "codes [1, 1]" in done.said and "with --context-parallel the other cards wait" in done.said, done.said


@pytest.mark.slow
def test_a_rank_that_dies_ends_those_it_shares_tokens_with(zygote, make_run, tmp_path):
    run = make_run(tmp_path / "out", **ALONE, context_parallel=2)
    died = train_as_two(zygote, run, fault={"kind": "signalled", "step": 4, "number": 9}, faulty_rank=1)
    assert "codes [1, -9]" in died.said and "Rank 1 of 2" in died.said, died.said
    assert [int(path.name[5:]) for path in run.checkpoints] == [2, 3]  # the last whole step is saved


@pytest.mark.slow
def test_rows_that_are_padded_cannot_be_shared(zygote, make_run, tiny_model, tmp_path):
    run = make_run(tmp_path / "out", **ALONE, model=str(tiny_model("bloom")), target_modules=None, context_parallel=2)
    refused = train_as_two(zygote, run)
    assert "codes [2, 2]" in refused.said and "Cards cannot share this model" in refused.said, refused.said
