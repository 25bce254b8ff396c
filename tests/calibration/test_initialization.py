"""A calibrated start brings the 4-bit model nearer to the original one, on every architecture, and repeats exactly."""

import shutil
from dataclasses import asdict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaModel

from qlora_cli.core.adapters.lora import adapter_state, attach_adapter
from qlora_cli.core.calibration import initialization
from qlora_cli.core.calibration.activation_stream import ActivationStream
from qlora_cli.core.calibration.initialization import StartInputs, initialize_adapter
from qlora_cli.core.models.files import resolve_model
from qlora_cli.core.models.loading import load_base, load_unquantized
from qlora_cli.events import Caution, Notice, report_nothing
from qlora_cli.settings.groups import LoraSettings
from tests.conftest import ARCHITECTURES, most_slow
from tests.training.training_case import MemoryRows

CPU = torch.device("cpu")
ROWS, FEW = MemoryRows(count=48), MemoryRows(count=16)


def start(tiny_model, load_tiny, architecture, *, rows=FEW, cached=False, report=report_nothing, **lora):
    """The adapted base, started, with what was said of it."""
    base, identity = load_tiny(architecture)
    settings = LoraSettings(**{"rank": 8, **lora})
    model = attach_adapter(base, settings, seed=1).eval()
    files = resolve_model(str(tiny_model(architecture)))
    inputs = StartInputs(files, identity, rows, 7, CPU, cached)
    return model, initialize_adapter(model, settings, inputs, report)


def divergence(model, original) -> float:
    """Mean KL of the model from the original on the rows."""
    total = 0.0
    for ids in ROWS.ids[:8]:
        batch = torch.from_numpy(ids.astype(np.int64))[None]
        with torch.no_grad():
            want, got = (F.log_softmax(m(input_ids=batch).logits[0].float(), dim=-1) for m in (original, model))
        total += float((want.exp() * (want - got)).sum(-1).mean())
    return total / 8


@pytest.mark.parametrize("architecture", most_slow(ARCHITECTURES, ("llama", "gpt2")))
def test_calibrated_answers_most_of_the_4_bit_error_and_leaves_the_base(tiny_model, load_tiny, architecture):
    original = load_unquantized(resolve_model(str(tiny_model(architecture))), dtype=torch.float32, device=CPU)
    plain, nothing = start(tiny_model, load_tiny, architecture, init="default")
    assert nothing is None
    before = {name: p.clone() for name, p in plain.named_parameters() if not p.requires_grad}
    model, facts = start(tiny_model, load_tiny, architecture, rows=ROWS, init="calibrated")
    assert facts.left == 0 and facts.rows >= 40 and 0.3 < facts.answered <= 1
    assert divergence(model, original) < 0.7 * divergence(plain, original)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("init", ["loftq", "eva"])
def test_other_starts_from_the_base(tiny_model, load_tiny, init):
    original = load_unquantized(resolve_model(str(tiny_model("llama"))), dtype=torch.float32, device=CPU)
    plain, _ = start(tiny_model, load_tiny, "llama", init="default")
    model, facts = start(tiny_model, load_tiny, "llama", init=init)
    assert facts.adapted == 14
    if init == "loftq":
        assert divergence(model, original) < divergence(plain, original)
    else:  # A spans what the rows show most of; B is zero, and the model as it was
        assert divergence(model, original) == divergence(plain, original)
        a = next(value for name, value in adapter_state(model).items() if "lora_A" in name)
        torch.testing.assert_close(a @ a.T, torch.eye(8), rtol=0, atol=1e-4)


def test_dora_starts_where_plain_lora_does(tiny_model, load_tiny):
    plain, _ = start(tiny_model, load_tiny, "llama")
    dora, _ = start(tiny_model, load_tiny, "llama", dora=True)
    batch = torch.from_numpy(ROWS.ids[0].astype(np.int64))[None]
    with torch.no_grad():
        torch.testing.assert_close(dora(input_ids=batch).logits, plain(input_ids=batch).logits, rtol=1e-3, atol=1e-3)


def test_the_same_rows_and_base_start_the_same_from_the_cache_and_anew(tiny_model, load_tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path))
    states = []
    for cached in (False, True, True):
        model, facts = start(tiny_model, load_tiny, "llama", cached=cached)
        states.append((adapter_state(model), asdict(facts)))
    assert len(list((tmp_path / "start").iterdir())) == 1
    for state, facts in states[1:]:
        assert facts == states[0][1]
        assert all(torch.equal(state[name], value) for name, value in states[0][0].items())
    kept = next((tmp_path / "start").glob("*/start.safetensors"))
    kept.write_bytes(kept.read_bytes()[:-1] + b"\0")
    model, _ = start(tiny_model, load_tiny, "llama", cached=True)  # damaged: made anew
    assert all(torch.equal(adapter_state(model)[name], value) for name, value in states[0][0].items())


def test_a_start_is_kept_for_the_number_of_threads_that_made_it(tiny_model, load_tiny, tmp_path, monkeypatch):
    """Not made by two threads in truth: where others take the processors, small sums then wait for seconds."""
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path))
    for count in (1, 2, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=count: count)
        start(tiny_model, load_tiny, "llama", cached=True, init="loftq")
    assert len(list((tmp_path / "start").iterdir())) == 2


@pytest.mark.parametrize("trouble", ["a file", "removed", "another user's"])
def test_a_cache_that_cannot_be_used_costs_time_and_never_the_run(
    tiny_model, load_tiny, tmp_path, monkeypatch, trouble
):
    root, events = tmp_path / "cache", []
    monkeypatch.setenv("QLORA_CACHE", str(root))
    if trouble == "a file":
        root.write_text("")
    elif trouble == "removed":
        save = initialization.save_file

        def save_after_removal(*arguments):
            save(*arguments)
            shutil.rmtree(root)

        monkeypatch.setattr(initialization, "save_file", save_after_removal)
    else:
        start(tiny_model, load_tiny, "llama", cached=True, init="loftq")
        (kept,) = root.glob("start/*")
        kept.chmod(0o777)
    _, facts = start(tiny_model, load_tiny, "llama", cached=True, report=events.append, init="loftq")
    assert facts is not None
    assert any(isinstance(event, Caution) and "start" in event.text for event in events)


def test_a_base_stored_in_4_bits_starts_plainly_and_says_so(tiny_model, load_tiny, tmp_path):
    base, identity = load_tiny("llama")
    stored = tmp_path / "stored"
    base.save_pretrained(stored)
    files = resolve_model(str(stored))
    settings, events = LoraSettings(rank=4), []
    again, _ = load_base(files, settings_of_quantization(), compute_dtype=torch.float32, device=CPU)
    model = attach_adapter(again, settings, seed=1)
    assert initialize_adapter(model, settings, StartInputs(files, identity, FEW, 7, CPU, False), events.append) is None
    assert any(isinstance(event, Notice) and "starts plainly" in event.text for event in events)
    assert all(not value.any() for name, value in adapter_state(model).items() if "lora_B" in name)


def settings_of_quantization():
    from qlora_cli.settings.groups import QuantizationSettings

    return QuantizationSettings(base_cache=False)


@pytest.mark.parametrize("where", most_slow(["memory", "layer", "model"], ["memory", "model"]))
def test_layers_that_cannot_be_walked_start_plainly_and_say_so(tiny_model, load_tiny, monkeypatch, where):
    """Whatever the model's own code raises, as xlm's of a mask, rwkv's of its weights, longcat_flash's of a name."""

    def fail(*_, **__):
        raise torch.OutOfMemoryError if where == "memory" else KeyError("what it\nwants")

    place = {"memory": (ActivationStream, "outputs"), "layer": (LlamaMLP, "forward"), "model": (LlamaModel, "forward")}
    monkeypatch.setattr(*place[where], fail)
    events: list = []
    model, facts = start(tiny_model, load_tiny, "llama", report=events.append)
    (said,) = [event.text for event in events if isinstance(event, Caution) and "starts plainly" in event.text]
    assert facts is None and ("memory" in said) == (where == "memory") and ("KeyError" in said) == (where != "memory")
    assert all(not value.any() for name, value in adapter_state(model).items() if "lora_B" in name)
