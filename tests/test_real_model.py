"""The whole road on a small real model, whose 4-bit error and answers mean something: prepare to answers, both merges."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from qlora_cli.artifacts import ADAPTER_WEIGHTS
from qlora_cli.commands.generate import generate
from qlora_cli.commands.merge import merge
from qlora_cli.commands.prepare import prepare
from qlora_cli.commands.train import train
from qlora_cli.config import GenerateConfig, MergeConfig, PrepareConfig, TrainConfig
from qlora_cli.events import Notice, StepLogged, TextGenerated, report_nothing

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "small_model.py"
CODES = ["blue heron", "red maple", "grey otter", "green finch", "white birch", "black swan"]
FEW_LAYERS = 3


@pytest.fixture(scope="module")
def smollm(tmp_path_factory) -> Path:
    """SmolLM2-135M-Instruct as a checkpoint, where its package is at hand."""
    specification = importlib.util.spec_from_file_location("small_model", SCRIPT)
    script = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(script)
    source = script.find_gguf()
    if source is None:
        pytest.skip(f"{script.PACKAGE} is not installed, and {script.GGUF_ENVIRONMENT} names no file")
    directory = tmp_path_factory.mktemp("smollm") / "model"
    script.write_checkpoint(source, directory)
    return directory


@pytest.fixture(scope="module")
def few_layers(smollm) -> Path:
    """Its first layers with the embeddings: real weights, in a tenth of the time."""
    directory = smollm.parent / "few_layers"
    shutil.copytree(smollm, directory, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((directory / "config.json").read_text())
    config["num_hidden_layers"] = FEW_LAYERS
    (directory / "config.json").write_text(json.dumps(config))
    kept = {
        name: value
        for name, value in load_file(smollm / "model.safetensors").items()
        if not name.startswith("model.layers.") or int(name.split(".")[2]) < FEW_LAYERS
    }
    save_file(kept, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def trained(model: Path, place: Path, **options) -> tuple[TrainConfig, list]:
    """A run of a few steps on conversations in the model's own chat template, and its events."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"What is the code of room {number}?"},
                {"role": "assistant", "content": code},
            ]
        }
        for number, code in enumerate(CODES)
    ]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepared = str(place / "prepared")
    prepare(PrepareConfig(model=str(model), data=str(place / "rows.jsonl"), output=prepared), report_nothing)
    config = TrainConfig(
        model=str(model),
        prepared=prepared,
        output=str(place / "run"),
        batch_size=2,
        gradient_accumulation_steps=1,
        learning_rate=1e-3,
        warmup_steps=0,
        **options,
    )
    events: list = []
    train(config, events.append)
    return config, events


def test_a_real_model_is_tuned_from_a_calibrated_start_merged_by_measurement_and_asked(smollm, tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    config, _ = trained(smollm, tmp_path, rank=4, max_steps=2, eval_rows=2)
    record = json.loads((tmp_path / "run" / "qlora.json").read_text())
    gap, start = record["training"]["gap"], record["start"]
    assert gap["adapter"] < gap["sixteen_bits"] < gap["four_bits"]
    assert start["init"] == "calibrated" and start["left"] == 0 and start["answered"] > 0.2

    merged = merge(MergeConfig(adapter=config.output, output=str(tmp_path / "merged"), verify=False), report_nothing)
    assert merged.base == min(("dequantized", "original"), key=lambda name: merged.base_losses[name])
    assert merged.base_losses["dequantized"] == pytest.approx(merged.base_losses["live"], abs=0.02)

    said: list = []
    asked = GenerateConfig(model=str(tmp_path / "merged"), max_new_tokens=6, temperature=0.0)
    generate(asked, ["What is the code of room 1?"], said.append)
    assert "".join(event.text for event in said if isinstance(event, TextGenerated)).strip()


def test_a_merge_in_4_bits_keeps_what_real_weights_were_taught(few_layers, tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    config, events = trained(few_layers, tmp_path, rank=8, max_steps=9)
    losses = [event.loss for event in events if isinstance(event, StepLogged)]
    assert losses[-1] < 0.9 * losses[0]
    packed = MergeConfig(adapter=config.output, output=str(tmp_path / "packed"), quantize=True, verify=False)
    said: list = []
    merge(packed, said.append)  # fails below --min-kept
    assert any("of the gain is kept" in event.text for event in said if isinstance(event, Notice))
    held = sum(path.stat().st_size for path in (tmp_path / "packed").glob("*.safetensors"))
    assert held < (few_layers / "model.safetensors").stat().st_size and (tmp_path / "run" / ADAPTER_WEIGHTS).is_file()
