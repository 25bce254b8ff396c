"""Prompts of an adapter whose vocabulary grew are read by its own tokenizer; then the bare base is gone, and that is said."""

import json
import shutil

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_cli.artifacts import ADAPTER_CONFIG
from qlora_cli.core.generation.session import GenerationSession
from qlora_cli.core.models.files import resolve_model
from qlora_cli.errors import AdapterError
from qlora_cli.events import report_nothing
from qlora_cli.settings.generation import GenerationSettings


def test_an_adapter_of_a_grown_vocabulary_is_asked_by_its_own_tokenizer(tiny_model, tmp_path):
    directory = tiny_model("llama")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory)
    tokenizer.add_tokens(["quokka"])
    new = tokenizer.convert_tokens_to_ids("quokka")
    model.resize_token_embeddings(max(new + 1, model.config.vocab_size + 1), mean_resizing=False)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    grown, plain = tmp_path / "grown", tmp_path / "plain"
    adapted.save_pretrained(grown, save_embedding_layers=True)
    tokenizer.save_pretrained(grown)
    base = AutoModelForCausalLM.from_pretrained(directory)
    get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained(plain)
    AutoTokenizer.from_pretrained(directory).save_pretrained(plain)
    for adapter in (grown, plain):
        config = json.loads((adapter / ADAPTER_CONFIG).read_text()) | {"base_model_name_or_path": str(directory)}
        (adapter / ADAPTER_CONFIG).write_text(json.dumps(config))
    settings = GenerationSettings(temperature=0.0, max_new_tokens=4, base_cache=False, compute_dtype="float32")
    session = GenerationSession(settings, report_nothing, files=resolve_model(str(directory)))
    request = session.request(0, "buy a quokka now", str(grown))
    assert request.ids.count(new) == 1
    assert new not in session.request(0, "buy a quokka now", str(plain)).ids
    assert new not in session.request(0, "buy a quokka now", None).ids
    session.select(None)
    session.select(str(grown))
    (answer,) = session.answer([request], session.end_ids(str(grown)))
    assert answer.finish in ("length", "end")
    with pytest.raises(AdapterError, match="its own embeddings"):
        session.select(None)


def test_an_end_past_the_vocabulary_is_said_once(tiny_model, tmp_path):
    directory = shutil.copytree(tiny_model("llama"), tmp_path / "model")
    (directory / "generation_config.json").write_text('{"eos_token_id": [0, 99999]}')
    settings = GenerationSettings(raw=True, base_cache=False, compute_dtype="float32")
    said = []
    session = GenerationSession(settings, said.append, files=resolve_model(str(directory)))
    session.select(None)
    assert session.end_ids(None) == session.end_ids(None) == {0, 99999}
    assert [event.text for event in said if "No answer can end in 99999" in event.text] == [said[-1].text]
