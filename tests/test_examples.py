"""Every settings file in examples/ says what its tutorial says, and trains two steps on a tiny model of its architecture."""

import json
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from qlora_cli.artifacts import ADAPTER_CONFIG, METRICS, RUN_YAML
from qlora_cli.cli import app as commands
from qlora_cli.config import TrainConfig

ROOT = Path(__file__).resolve().parents[1]
SETTINGS_FILES = sorted((ROOT / "examples").glob("*.yaml"))
ARCHITECTURE = {"gpt": "gpt_neox", "pythia": "gpt_neox", "falcon": "falcon", "llama": "llama"}

# One row with the columns of each data set that comes from the hub.
ROWS = {
    "Abirate/english_quotes": {"quote": "Be the change.", "author": "Anonymous", "tags": ["change"]},
    "kotzeje/lamini_docs.jsonl": {"question": "What is a token?", "answer": "A piece of a word."},
    "mlabonne/guanaco-llama2-1k": {"text": "<s>[INST] What is a token? [/INST] A piece of a word. </s>"},
}

# What each tutorial states, as `train --config` takes it.
TUTORIALS = {
    "gpt-neox-20b-english-quotes": {
        "model": "EleutherAI/gpt-neox-20b",
        "data": "Abirate/english_quotes",
        "rank": 8,
        "alpha": 32,
        "dropout": 0.05,
        "target_modules": ["query_key_value"],
        "batch_size": 1,
        "gradient_accumulation_steps": 8,
        "warmup_steps": 2,
        "max_steps": 20,
        "learning_rate": 2e-4,
        "optimizer": "paged_adamw_8bit",
    },
    "falcon-7b-shop-faq": {"model": "tiiuae/falcon-7b", "rank": 16, "target_modules": ["query_key_value"]},
    "falcon-7b-custom": {"model": "tiiuae/falcon-7b", "rank": 16, "target_modules": ["query_key_value"]},
    "pythia-410m-lamini-docs": {"model": "EleutherAI/pythia-410m", "data": "kotzeje/lamini_docs.jsonl"},
    "llama-2-7b-chat-guanaco": {
        "data": "mlabonne/guanaco-llama2-1k",
        "rank": 64,
        "alpha": 16,
        "dropout": 0.1,
        "compute_dtype": "float16",
        "double_quant": False,
        "optimizer": "paged_adamw_32bit",
        "batch_size": 4,
        "scheduler": "cosine",
        "warmup_ratio": 0.03,
        "weight_decay": 0.001,
        "max_grad_norm": 0.3,
        "eval_fraction": 0.1,
        "eval_every": 25,
        "report_to": "tensorboard",
    },
}


def test_there_is_one_settings_file_a_tutorial():
    assert {settings_file.stem for settings_file in SETTINGS_FILES} == set(TUTORIALS)


@pytest.mark.parametrize("settings_file", SETTINGS_FILES, ids=lambda settings_file: settings_file.stem)
def test_a_settings_file_says_what_its_tutorial_says(settings_file):
    written = yaml.safe_load(settings_file.read_text())
    for name, value in TUTORIALS[settings_file.stem].items():
        found = float(written[name]) if name == "learning_rate" else written[name]  # 2e-4 is a word to YAML
        assert found == value, name


@pytest.mark.slow  # lines of the README do as much in make test: tests/test_readme_lines.py
@pytest.mark.parametrize("settings_file", SETTINGS_FILES, ids=lambda settings_file: settings_file.stem)
def test_a_settings_file_trains_two_steps(settings_file, tiny_model, tmp_path, monkeypatch, capsys):
    from qlora_cli.commands import train as training
    from qlora_cli.core.models.quantization import is_4bit
    from qlora_cli.core.models.structure import linear_names

    loaded = []

    def load_base(*arguments, **options):
        loaded.append(load(*arguments, **options)[0])
        return loaded[-1], load.identity

    def load(*arguments, **options):
        model, load.identity = original(*arguments, **options)
        return model, load.identity

    original = training.load_base
    monkeypatch.setattr(training, "load_base", load_base)
    monkeypatch.chdir(ROOT)  # paths in these files start at the project's directory
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    settings = yaml.safe_load(settings_file.read_text())
    arguments = ["train", "--config", str(settings_file), "--json", "--max-steps", "2"]
    arguments += ["--output", str(tmp_path / "out")]
    arguments += ["--model", str(tiny_model(ARCHITECTURE[settings_file.stem.partition("-")[0]]))]
    if settings["data"] in ROWS:
        rows = tmp_path / "rows.jsonl"
        rows.write_text((json.dumps(ROWS[settings["data"]]) + "\n") * 40)
        arguments += ["--data", str(rows)]

    code = commands.main(arguments)
    out, err = capsys.readouterr()
    assert code == 0, err
    assert json.loads(out)["steps"] == 2

    run = tmp_path / "out"
    losses = [line["loss"] for line in map(json.loads, (run / METRICS).read_text().splitlines()) if "loss" in line]
    assert len(losses) == 2 and all(loss > 0 for loss in losses)
    adapter = json.loads((run / ADAPTER_CONFIG).read_text())
    assert (adapter["r"], adapter["lora_alpha"]) == (settings["rank"], settings["alpha"])
    assert adapter["lora_dropout"] == settings["dropout"]
    if "target_modules" in settings:
        names = {name.rpartition(".")[2] for name in adapter["target_modules"]}
        assert names == set(settings["target_modules"])
    written = yaml.safe_load((run / RUN_YAML).read_text())
    assert written.keys() == {field.name for field in fields(TrainConfig) if field.metadata["recorded"]}
    same = settings.keys() - {"model", "data", "output", "max_steps", "epochs", "learning_rate"}
    assert {name: written[name] for name in same} == {name: settings[name] for name in same}
    if settings.get("report_to") == "tensorboard":
        assert list(run.rglob("events.out.tfevents.*"))

    (base,) = loaded
    linears = [name for name in linear_names(base) if "lora_" not in name]
    assert linears and all(is_4bit(base.get_submodule(name)) for name in linears if name.endswith("base_layer"))
    if "falcon" in settings_file.stem:
        assert sum(is_4bit(module) for module in base.modules()) == 4 * base.config.num_hidden_layers
