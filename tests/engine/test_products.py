"""Engines whose linears are multiplied in 8 bits, emulated: chosen by the gate, recorded, repeated, and near bf16's."""

import json
from dataclasses import asdict

import pytest
import torch

from qlora_cli.core.engine.decoder_layers import find_layers
from qlora_cli.core.matmul import choice
from qlora_cli.core.matmul.choice import ProductTrial, trial_batch
from qlora_cli.core.models.structure import find_decoder, underlying_model
from qlora_cli.core.streaming.streamed_base import stream_base
from qlora_cli.errors import UsageError
from tests.conftest import most_slow
from tests.engine.test_engine import CPU, adapted, batch_of, install, step

FEW = ProductTrial(batch=batch_of())
WAYS = [{"resident_weights": False, "gradient_checkpointing": "on"}, {"resident_weights": False}]
ARCHITECTURES = ["llama", "gpt_neox", "falcon", "bloom", "qwen3", "gemma2", "phi"]


def texts(events):
    return " ".join(event.text for event in events)


@pytest.mark.parametrize("architecture", most_slow(ARCHITECTURES, ["bloom"]))
def test_loss_and_gradients_are_near_those_in_the_compute_dtype(load_tiny, architecture):
    model, batch = adapted(load_tiny, architecture), batch_of()
    plain_loss, plain, _ = step(model, batch, matmul="bf16")
    loss, found, engine = step(model, batch, trial=FEW, matmul="fp8")
    assert engine.products.kept == () and engine.products.worst_output < 0.7
    assert 0 < abs(loss - plain_loss) < 0.01 * plain_loss
    assert 1e-4 < (found - plain).norm() / plain.norm() < 0.2
    assert "linears multiplied in fp8" in engine.describe()


@pytest.mark.parametrize("change", most_slow(WAYS, WAYS[:1]))
def test_other_ways_to_hold_and_to_repeat_give_the_same(load_tiny, change):
    model, batch = adapted(load_tiny, "llama", dropout=0.2), batch_of()
    found = []
    for options in ({"resident_weights": True}, change):
        torch.manual_seed(3)
        found.append(step(model, batch, trial=FEW, matmul="fp8", **options)[:2])
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


def test_a_base_that_streams_is_chosen_for_and_multiplied_to_the_same_bits(load_tiny):
    model, found = adapted(load_tiny, "llama"), []
    options = {"matmul": "fp8", "resident_weights": False, "gradient_checkpointing": "on"}
    for streams in (False, True):
        if streams:  # through one buffer: nothing of another layer is ever there
            layers = find_layers(find_decoder(underlying_model(model)))
            stream_base(underlying_model(model), layers, CPU, streamed=len(layers), slots=1)
        loss, gradients, engine = step(model, batch_of(), trial=FEW, **options)
        found.append((loss, gradients, engine.products))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    assert found[0][2] == found[1][2] and found[0][2].matmul == "fp8"


@pytest.mark.slow
def test_bf16_and_auto_are_the_engine_without_the_choice(load_tiny):
    model, batch = adapted(load_tiny, "llama"), batch_of()
    for matmul in ("bf16", "auto"):
        assert step(model, batch, matmul=matmul)[2].products is None


def test_evaluation_is_in_the_compute_dtype(load_tiny):
    model, batch = adapted(load_tiny, "llama"), batch_of()
    losses = []
    for matmul in ("bf16", "fp8"):
        engine = install(model, trial=FEW, matmul=matmul, resident_weights=False)
        with torch.no_grad():
            losses.append(engine.loss(batch))
        engine.close()
    assert torch.equal(*losses)


def test_a_layer_that_does_not_pass_stays_and_is_named(load_tiny, monkeypatch):
    model, events = adapted(load_tiny, "llama"), []
    monkeypatch.setattr(choice, "MOST_ERROR", 0.0)
    engine = install(model, events=events, trial=FEW, matmul="fp8")
    engine.close()
    assert engine.products.matmul == "bf16" and "q_proj" in texts(events) and "In bf16 stay" in texts(events)
    kept = engine.products.kept
    monkeypatch.undo()
    recorded = json.loads(json.dumps({**asdict(engine.products), "matmul": "fp8", "kept": kept[:2]}))
    again = install(model, matmul="fp8", trial=ProductTrial(recorded=recorded, resumed=True))
    assert again.products.kept == kept[:2] and f"{len(kept) - 2} linears multiplied in fp8" in again.describe()
    again.close()


@pytest.mark.slow
def test_a_trial_adds_to_no_gradient_and_leaves_training_mode(load_tiny):
    model = adapted(load_tiny, "llama", dropout=0.5)
    batch = trial_batch([(row.numpy().astype("int32"), torch.zeros(len(row), dtype=torch.bool).numpy())
                         for row in torch.arange(600).view(2, 300) % 384])  # fmt: skip
    assert batch.tokens == 512 and batch.trained_tokens == 510
    engine = install(model, matmul="fp8", trial=ProductTrial(batch=batch))
    assert engine.products.tokens == 512 and model.training
    assert all(p.grad is None for p in model.parameters())
    engine.close()


def test_a_run_that_goes_on_by_auto_stays_as_it_was(load_tiny):
    model = adapted(load_tiny, "llama")
    for trial, expected in (
        (ProductTrial(resumed=True), None),
        (ProductTrial(resumed=True, recorded={"asked": "auto", "matmul": "fp8", "kept": []}), "fp8"),
        (ProductTrial(resumed=True, recorded={"asked": "fp8", "matmul": "fp8", "kept": []}), None),
    ):
        engine = install(model, matmul="auto", trial=trial)
        assert (engine.products and engine.products.matmul) == expected
        engine.close()


def test_what_cannot_be_is_said(load_tiny):
    with pytest.raises(UsageError, match="plain engine"):
        install(adapted(load_tiny, "llama"), kind="plain", matmul="fp8")
