"""`merge --base auto` measures what each base costs before it writes, as the written models show, and takes the better one."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qlora_cli.artifacts import MODEL_CARD
from qlora_cli.commands.merge import merge
from qlora_cli.commands.train import train
from qlora_cli.config import MergeConfig, TrainConfig
from qlora_cli.core.candidates.choice import Choice
from qlora_cli.core.merge.compare_models import choose_rows
from qlora_cli.core.merge.verify import find_rows
from qlora_cli.core.models.files import resolve_model
from qlora_cli.core.models.loading import load_base, load_unquantized
from qlora_cli.errors import MergeError
from qlora_cli.events import Notice, report_nothing
from qlora_cli.settings.groups import QuantizationSettings
from tests.conftest import ARCHITECTURES, write_model

pytestmark = pytest.mark.usefixtures("short_runs")


@pytest.fixture(scope="module", params=["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def trained(request, tiny_model, tmp_path_factory):
    """The settings of a merge of a short run with rows held out."""
    folder = tmp_path_factory.mktemp("auto")
    rows = [{"question": f"What is {a} + {b}?", "answer": f"It is {a + b}."} for a in range(6) for b in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = TrainConfig(
        model=str(tiny_model(request.param)),
        data=str(folder / "rows.jsonl"),
        output=str(folder / "run"),
        max_steps=6,
        gradient_accumulation_steps=2,
        learning_rate=5e-3,
        eval_rows=24,
        rank=4,
    )
    train(run, report_nothing)
    return MergeConfig(adapter=run.output, output=str(folder / "merged"), dtype="float32", overwrite=True, verify=False)


def test_the_losses_are_those_of_the_written_models_and_the_lower_one_is_written(trained, tmp_path):
    events: list = []
    result = merge(trained, events.append)
    losses = result.base_losses
    assert set(losses) == {"live", "dequantized", "original"}
    assert losses["dequantized"] == pytest.approx(losses["live"], abs=1e-4)
    assert result.base == min(("dequantized", "original"), key=lambda name: losses[name])
    said = [event.text for event in events if isinstance(event, Notice)]
    assert any(f"{losses['original']:.4f}" in text and "held out" in text for text in said)
    card = (Path(trained.output) / MODEL_CARD).read_text()
    assert all(f"{loss:.4f}" in card for loss in losses.values())
    for base in ("dequantized", "original"):
        written = replace(trained, base=base, output=str(tmp_path / base))
        named = merge(written, report_nothing)
        assert named.base == base and named.base_losses is None
        assert loss_on(written, trained) == pytest.approx(losses[base], abs=2e-4)


def loss_on(written: MergeConfig, trained: MergeConfig) -> float:
    files = resolve_model(written.output)
    device = torch.device("cpu")
    rows = choose_rows(find_rows(Path(trained.adapter), files.tokenizer)[0], vocabulary=512, device=device)
    if written.quantize:
        model = load_base(files, QuantizationSettings(), compute_dtype=torch.float32, device=device)[0]
    else:
        model = load_unquantized(files, dtype=torch.float32, device=device)
    total, tokens = 0.0, 0
    for ids, wanted in rows:
        batch = torch.from_numpy(ids.astype("int64"))[None]
        logits = torch.log_softmax(model(input_ids=batch).logits[0, :-1].float(), dim=-1)
        places = torch.from_numpy(wanted[1:].copy())
        total -= float(logits[places].gather(1, batch[0, 1:][places].unsqueeze(1)).sum())
        tokens += int(places.sum())
    return total / tokens


@pytest.mark.slow
def test_in_4_bits_the_rounded_model_is_the_measured_one_and_what_it_keeps_is_told(trained, tmp_path):
    packed = replace(trained, quantize=True, output=str(tmp_path / "packed"), min_kept=-9.0)
    events: list = []
    result = merge(packed, events.append)
    losses = result.base_losses
    assert set(losses) == {"untuned", "live", "dequantized", "original"} and result.quantized
    best = min(("dequantized", "original"), key=lambda name: losses[name])
    assert result.base == best
    assert result.kept == pytest.approx((losses["untuned"] - losses[best]) / (losses["untuned"] - losses["live"]))
    assert any("of the gain is kept" in event.text for event in events if isinstance(event, Notice))
    again = merge(replace(packed, base="dequantized", output=str(tmp_path / "again")), report_nothing)
    assert again.base_losses["dequantized"] == pytest.approx(losses["dequantized"], abs=1e-6)
    assert loss_on(replace(packed, output=str(tmp_path / "again")), trained) == pytest.approx(
        losses["dequantized"], abs=2e-3
    )
    assert not list(tmp_path.glob(".qlora-rounded-*"))


def test_what_rounding_keeps_is_a_share_of_the_gain_where_there_is_one():
    losses = {"untuned": 3.0, "live": 1.0, "dequantized": 1.5, "original": 2.0}
    choice = Choice("dequantized", losses, 100, "held out")
    assert choice.kept == 0.75 and choice.describe().endswith("; 75.0 % of the gain is kept")
    assert "| kept of the gain in 4 bits | 75.0 % |" in choice.card_lines()
    assert Choice("original", losses).kept == 0.5
    for others in (losses | {"live": 2.995}, {"live": 1.0, "original": 2.0}):
        unknown = Choice("original", others)
        assert unknown.kept is None and "gain" not in unknown.describe() + "".join(unknown.card_lines())
    assert Choice("original").card_lines() == []


def test_rounding_that_keeps_too_little_fails_and_writes_nothing(trained, tmp_path):
    packed = replace(trained, quantize=True, output=str(tmp_path / "packed"), min_kept=1.5)
    with pytest.raises(MergeError, match="150 % of --min-kept"):
        merge(packed, report_nothing)
    assert not list(tmp_path.iterdir())


def test_without_the_run_s_rows_the_weights_trained_against_are_taken_and_that_is_said(trained, tmp_path):
    record = Path(trained.adapter) / "qlora.json"
    kept = record.read_text()
    record.write_text(json.dumps({**json.loads(kept), "data": {}}))
    try:
        events: list = []
        result = merge(replace(trained, output=str(tmp_path / "merged")), events.append)
    finally:
        record.write_text(kept)
    assert result.base == "dequantized" and result.base_losses is None
    assert any("not at hand" in event.text for event in events if isinstance(event, Notice))


def test_of_a_checkpoint_that_is_rearranged_as_it_loads_nothing_is_measured_and_that_is_said(tmp_path, monkeypatch):
    shape = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "head_dim": 16}
    cycles = {"num_hidden_layers": 1, "H_cycles": 1, "L_cycles": 1, "L_bp_cycles": [1]}
    monkeypatch.setitem(ARCHITECTURES, "hrm_text", ("HrmTextConfig", {**shape, **cycles}))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": f"Row {number}."}) + "\n" for number in range(8)))
    run = {"model": str(write_model(tmp_path / "base", "hrm_text")), "data": str(tmp_path / "rows.jsonl")}
    train(TrainConfig(output=str(tmp_path / "run"), max_steps=1, rank=4, **run), report_nothing)
    events: list = []
    result = merge(
        MergeConfig(adapter=str(tmp_path / "run"), output=str(tmp_path / "merged"), verify=False), events.append
    )
    assert result.base == "dequantized" and result.base_losses is None
    assert any("is rearranged as it is loaded" in event.text for event in events if isinstance(event, Notice))
