"""Packs, steps and micro-batches: full, fair, complete, and the same mathematics however rows are laid."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_cli.core.data.packing import IGNORED, collate, pack_best_fit, plan_epoch, split_micro_batch
from qlora_cli.core.prompts.encoder import encoder_of
from qlora_cli.errors import DataError
from tests.conftest import SHARED_DATA
from tests.prompts.small_tokenizers import neox

LENGTHS = st.lists(st.integers(1, 64), min_size=1, max_size=120)


def random_rows(lengths, seed=0):
    random = np.random.default_rng(seed)
    return [(random.integers(0, 300, n).astype(np.int32), random.random(n) < 0.6) for n in lengths]


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS)
def test_packing_keeps_every_row_once_and_wastes_no_pack(lengths):
    packs = pack_best_fit(lengths, 64)
    assert sorted(row for pack in packs for row in pack) == list(range(len(lengths)))
    sizes = sorted(sum(lengths[row] for row in pack) for pack in packs)
    assert sizes[-1] <= 64
    assert len(sizes) == 1 or sizes[0] + sizes[1] > 64  # no two packs could have been one


@settings(max_examples=30, deadline=None)
@given(lengths=LENGTHS)
def test_packing_is_best_fit_decreasing(lengths):
    """As many packs as the plain algorithm makes, one row at a time."""
    room: list[int] = []
    for length in sorted(lengths, reverse=True):
        fits = [left for left in room if left >= length]
        left = min(fits) if fits else 64
        if fits:
            room.remove(left)
        room.append(left - length)
    assert len(pack_best_fit(lengths, 64)) == len(room)


def test_a_row_longer_than_a_pack_is_refused():
    with pytest.raises(DataError, match="65 tokens does not fit a pack of 64"):
        pack_best_fit([1, 65], 64)


def test_gsm8k_fills_at_least_98_percent_of_2048():
    neox()  # skips where it is absent
    lines = (SHARED_DATA / "gsm8k_train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [[(f"{row['question']}\n{row['answer']}", True), (0, True)] for row in map(json.loads, lines)]
    lengths = np.array([sum(map(len, runs)) for runs in encoder_of(neox()).encode_rows(rows)])
    packs = pack_best_fit(lengths, 2048)
    assert lengths.sum() / (2048 * len(packs)) > 0.98
    steps = plan_epoch(
        lengths, batch_size=2, accumulation=2, packing=True, max_length=2048, seed=0, epoch=0, token_budget=4096
    )
    filled = [lengths[micro].sum() for (step,) in steps[:-1] for micro in step]
    assert np.mean(filled) / 4096 > 0.98


@settings(max_examples=60, deadline=None)
@given(
    lengths=LENGTHS,
    batch_size=st.integers(1, 4),
    accumulation=st.integers(1, 4),
    packing=st.booleans(),
    world_size=st.integers(1, 4),
    budget=st.none() | st.integers(64, 256),
    epoch=st.integers(0, 3),
)
def test_an_epoch_is_complete_fair_and_within_budget(
    lengths, batch_size, accumulation, packing, world_size, budget, epoch
):
    arguments = {
        "batch_size": batch_size,
        "accumulation": accumulation * world_size,
        "packing": packing,
        "max_length": 64,
        "seed": 7,
        "epoch": epoch,
        "world_size": world_size,
        "token_budget": budget,
    }
    steps = plan_epoch(lengths, **arguments)
    assert steps == plan_epoch(lengths, **arguments)
    rows = [row for step in steps for share in step for micro in share for row in micro]
    assert sorted(rows) == list(range(len(lengths)))
    assert all(len(step) == world_size for step in steps)
    assert all(len({len(share) for share in step}) == 1 for step in steps[:-1])
    allowed = budget or batch_size * 64
    for micro in (micro for step in steps for share in step for micro in share):
        assert micro and sum(lengths[row] for row in micro) <= allowed
    if not packing:
        sizes = [sum(len(micro) for share in step for micro in share) for step in steps]
        assert all(size == batch_size * accumulation * world_size for size in sizes[:-1])


@settings(max_examples=30, deadline=None)
@given(lengths=LENGTHS, packing=st.booleans(), batch_size=st.integers(1, 4), epoch=st.integers(0, 3))
def test_a_step_holds_the_same_rows_however_many_ranks_share_it(lengths, packing, batch_size, epoch):
    arguments = {"batch_size": batch_size, "accumulation": 4, "packing": packing, "max_length": 64, "seed": 7}
    plans = [
        [
            sorted(row for share in step for micro in share for row in micro)
            for step in plan_epoch(lengths, world_size=world_size, epoch=epoch, **arguments)
        ]
        for world_size in (1, 2, 4)
    ]
    assert plans[0] == plans[1] == plans[2]


def test_epochs_and_seeds_differ_in_their_order():
    lengths = np.random.default_rng(0).integers(20, 60, 200)
    arguments = {"batch_size": 2, "accumulation": 2, "max_length": 64}
    for packing in (False, True):
        plans = [
            plan_epoch(lengths, packing=packing, seed=seed, epoch=epoch, **arguments)
            for seed, epoch in ((0, 0), (0, 1), (1, 0))
        ]
        assert plans[0] != plans[1] != plans[2] != plans[0]


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_ranks_get_the_same_tokens_within_two_percent(world_size, packing):
    lengths = np.random.default_rng(1).lognormal(5, 0.4, 6000).astype(int).clip(8, 1024)
    arguments = {"batch_size": 2, "packing": packing, "max_length": 1024, "seed": 0, "epoch": 0}
    steps = plan_epoch(lengths, world_size=world_size, accumulation=4 * world_size, **arguments)
    tokens = np.array([[lengths[np.concatenate(share)].sum() for share in step] for step in steps]).T  # (ranks, steps)
    totals = tokens.sum(axis=1)
    assert totals.max() / totals.min() < 1.02
    spread = tokens.max(axis=0) / tokens.mean(axis=0)  # a step waits for its slowest rank
    assert np.median(spread) < 1.02
    assert np.mean(spread) < 1.02


def test_rows_of_a_step_are_of_similar_length_and_laid_together():
    lengths = np.random.default_rng(2).integers(8, 512, 4096)
    steps = plan_epoch(lengths, batch_size=4, accumulation=4, packing=False, max_length=512, seed=0, epoch=0)
    padded = sum(len(micro) * lengths[micro].max() for (step,) in steps for micro in step)
    at_random = np.random.default_rng(0).permutation(lengths).reshape(-1, 4)
    assert padded / lengths.sum() < 1.1
    assert at_random.max(axis=1).sum() * 4 / lengths.sum() > 1.5  # what grouping saves
    short = plan_epoch(np.full(64, 100), batch_size=4, accumulation=4, packing=False, max_length=512, seed=0, epoch=0)
    assert [len(step) for (step,) in short] == [1] * 4  # 1,600 tokens in one launch instead of four


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=8))
def test_rows_are_laid_end_to_end_and_padded_alike(lengths):
    rows = random_rows(lengths)
    batch = collate(rows, range(10, 10 + len(rows)))
    assert batch.row_indices == tuple(range(10, 10 + len(rows)))
    assert batch.tokens == sum(lengths) == batch.input_ids.shape[1]
    assert batch.max_seqlen == max(lengths)
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.input_ids.dtype == batch.labels.dtype == batch.position_ids.dtype == torch.int64
    padded_ids, mask, padded_labels = batch.padded()
    assert padded_ids.shape == mask.shape == padded_labels.shape == (len(rows), max(lengths))
    for i, (ids, trained) in enumerate(rows):
        span = slice(*batch.cu_seqlens[i : i + 2].tolist())
        expected = np.where(trained, ids, IGNORED)
        expected[0] = IGNORED  # or a shifted loss would predict it from the row before
        assert batch.input_ids[0, span].tolist() == padded_ids[i, : len(ids)].tolist() == ids.tolist()
        assert batch.labels[0, span].tolist() == padded_labels[i, : len(ids)].tolist() == expected.tolist()
        assert batch.position_ids[0, span].tolist() == list(range(len(ids)))
        assert mask[i].tolist() == [1] * len(ids) + [0] * (max(lengths) - len(ids))
        assert (padded_labels[i, len(ids) :] == IGNORED).all()
    assert batch.trained_tokens == int((batch.labels != IGNORED).sum())


def test_collating_leaves_the_rows_as_they_are():
    row = (np.arange(3, dtype=np.int32), np.ones(3, bool))
    collate([row], [0])
    assert row[1].all()


def test_moving_keeps_everything():
    batch = collate(random_rows([3, 5]), [0, 1])
    moved = batch.to("meta")
    assert moved.input_ids.device.type == moved.cu_seqlens.device.type == "meta"
    assert (moved.tokens, moved.row_indices) == (batch.tokens, batch.row_indices)


def step_loss(model, rows, step):
    """Mean loss over the trained tokens of a step, and its gradient, laid as the plan says."""
    batches = [collate([rows[i] for i in micro], micro) for micro in step]
    trained = sum(batch.trained_tokens for batch in batches)
    model.zero_grad()
    total = 0.0
    for batch in batches:
        input_ids, mask, labels = batch.padded()
        logits = model(input_ids=input_ids, attention_mask=mask).logits[:, :-1].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / trained
        loss.backward()
        total += loss.item()
    return total, torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def test_the_loss_is_the_same_however_a_step_is_split(tiny_model):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model("gpt_neox"), dtype=torch.float32)
    lengths = [31, 5, 17, 40]
    rows = random_rows(lengths)
    results = []
    for batch_size, accumulation in ((4, 1), (2, 2), (1, 4)):
        ((step,),) = plan_epoch(
            lengths,
            batch_size=batch_size,
            accumulation=accumulation,
            packing=False,
            max_length=48,
            seed=0,
            epoch=0,
        )
        results.append((len(step), *step_loss(model, rows, step)))
    assert [count for count, _, _ in results] == [1, 1, 2]
    results.append((4, *step_loss(model, rows, [[i] for i in range(4)])))
    for _, loss, gradient in results[1:]:
        assert abs(loss - results[0][1]) < 1e-6
        torch.testing.assert_close(gradient, results[0][2], atol=1e-6, rtol=1e-4)


def test_a_micro_batch_splits_into_even_halves():
    lengths = [10, 20, 30, 40, 50]
    first, second = split_micro_batch([0, 2, 3, 4], lengths)
    assert sorted(first + second) == [0, 2, 3, 4]
    assert abs(sum(lengths[i] for i in first) - sum(lengths[i] for i in second)) <= 10
    with pytest.raises(DataError, match="cannot be split"):
        split_micro_batch([3], lengths)
