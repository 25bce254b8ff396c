"""The whole road on a small real model, whose 4-bit error and answers mean something: prepare to answers, both merges.

Two of its layers, with the embeddings, go the whole way within a minute on one core; the whole model does in the slow tests.
"""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from qlora_cli.commands.generate import generate
from qlora_cli.commands.merge import merge
from qlora_cli.commands.prepare import prepare
from qlora_cli.commands.train import train
from qlora_cli.config import GenerateConfig, MergeConfig, PrepareConfig, TrainConfig
from qlora_cli.events import Notice, StepLogged, TextGenerated, report_nothing

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "small_model.py"
CODES = ["blue heron", "red maple", "grey otter", "green finch", "white birch", "black swan"]
FEW_LAYERS = 2


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
    """Its first layers with the embeddings."""
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
        warmup_steps=0,
        **{"learning_rate": 1e-3, **options},
    )
    events: list = []
    train(config, events.append)
    return config, events


@pytest.fixture(scope="module")
def run(few_layers, tmp_path_factory):
    """A run on the first layers: its settings, and its events."""
    place = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QLORA_CACHE", str(place / "cache"))
        yield trained(few_layers, place, rank=8, max_steps=9, learning_rate=2e-3)


def merge_and_ask(config: TrainConfig, place: Path) -> None:
    """Merges by measurement, within what is lost on the way, and has the merged model answer."""
    merged = merge(MergeConfig(adapter=config.output, output=str(place / "merged"), verify=False), report_nothing)
    assert merged.base == min(("dequantized", "original"), key=lambda name: merged.base_losses[name])
    assert merged.base_losses["dequantized"] == pytest.approx(merged.base_losses["live"], abs=0.02)
    said: list = []
    asked = GenerateConfig(model=str(place / "merged"), max_new_tokens=4, temperature=0.0)
    generate(asked, ["What is the code of room 1?"], said.append)
    assert "".join(event.text for event in said if isinstance(event, TextGenerated)).strip()


def test_a_few_steps_from_a_calibrated_start_teach_it(run):
    config, events = run
    losses = [event.loss for event in events if isinstance(event, StepLogged)]
    assert losses[-1] < 0.9 * losses[0]
    start = json.loads((Path(config.output) / "qlora.json").read_text())["start"]
    assert start["init"] == "calibrated" and start["left"] == 0 and start["answered"] > 0.2


def test_it_is_merged_by_measurement_and_asked(run, tmp_path):
    merge_and_ask(run[0], tmp_path)


def test_a_merge_in_4_bits_keeps_what_it_was_taught(run, few_layers, tmp_path):
    packed = MergeConfig(
        adapter=run[0].output,
        output=str(tmp_path / "packed"),
        quantize=True,
        base="dequantized",
        min_kept=0.96,
        verify=False,
    )
    said: list = []
    result = merge(packed, said.append)
    assert result.kept > 0.96
    assert any("of the gain is kept" in event.text for event in said if isinstance(event, Notice))
    held = sum(path.stat().st_size for path in (tmp_path / "packed").glob("*.safetensors"))
    assert held < (few_layers / "model.safetensors").stat().st_size


@pytest.mark.slow
def test_the_whole_model_s_losses_show_what_4_bits_cost_and_what_the_adapter_won(smollm, tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    config, _ = trained(smollm, tmp_path, rank=4, max_steps=2, eval_rows=2)
    record = json.loads((tmp_path / "run" / "qlora.json").read_text())
    gap, start = record["training"]["gap"], record["start"]
    assert gap["adapter"] < gap["sixteen_bits"] < gap["four_bits"]
    assert start["init"] == "calibrated" and start["left"] == 0 and start["answered"] > 0.2
    merge_and_ask(config, tmp_path)
