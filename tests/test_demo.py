"""The parts of `make demo`: its rows are sound, and its base is a model that the commands take."""

import importlib.util
import json
from pathlib import Path

import torch

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def load_example(name):
    specification = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_every_question_has_one_answer():
    rows = [json.loads(line) for line in (EXAMPLES / "data" / "python_questions.jsonl").read_text().splitlines()]
    assert 100 <= len(rows) <= 200
    assert len({row["question"] for row in rows}) == len(rows)
    for row in rows + json.loads((EXAMPLES / "data" / "shop_faq.json").read_text()):
        assert row.keys() == {"question", "answer"} and row["question"].strip() and row["answer"].endswith(".")
    assert set(load_example("demo").QUESTIONS) <= {row["question"] for row in rows}


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
