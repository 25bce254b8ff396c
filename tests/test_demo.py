"""The parts of `make demo`: its rows are sound, and its base is a model that the commands take."""

import importlib.util
import json
import sys
from pathlib import Path

import torch

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def load_example(name):
    specification = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module  # where dataclasses look their module up
    specification.loader.exec_module(module)
    return module


def test_every_question_has_one_answer():
    rows = [json.loads(line) for line in (EXAMPLES / "data" / "python_questions.jsonl").read_text().splitlines()]
    assert 100 <= len(rows) <= 200
    assert len({row["question"] for row in rows}) == len(rows)
    for row in rows + json.loads((EXAMPLES / "data" / "shop_faq.json").read_text()):
        assert row.keys() == {"question", "answer"} and row["question"].strip() and row["answer"].endswith(".")


def test_what_the_demo_asks_is_taught():
    demo = load_example("demo")
    for road in (demo.REAL, demo.MADE_HERE):
        assert set(road.questions) <= {row["question"] for row in demo.read_rows(road)}


def test_where_the_package_cannot_be_had_a_base_made_here_steps_in_and_says_so(monkeypatch, capsys, tmp_path):
    demo = load_example("demo")
    made = tmp_path / demo.MADE_HERE.base / "model.safetensors"
    made.parent.mkdir(parents=True)
    made.touch()
    monkeypatch.setattr(demo, "ROOT", tmp_path)
    monkeypatch.setattr(demo, "run_example", lambda name, directory: 1)
    assert demo.choose_road() is demo.MADE_HERE
    assert "Instead a small llama" in capsys.readouterr().out
    monkeypatch.setattr(demo, "run_example", lambda name, directory: 0)
    assert demo.choose_road() is demo.REAL


def test_the_base_is_built_from_what_ships_with_python(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    load_example("demo_base").build_base(tmp_path, steps=3)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    text = "The with statement is used to wrap the execution of a block."
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text and len(ids) < len(text) / 2
    assert model.config.eos_token_id == tokenizer.eos_token_id == 0
    with torch.no_grad():
        assert torch.isfinite(model(input_ids=torch.tensor([ids])).logits).all()
