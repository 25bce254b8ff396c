"""Files of a model: what is missing, unsafe or not to be run is refused in one sentence."""

import json
import shutil

import pytest

from qlora_cli.core.models.files import resolve_model
from qlora_cli.errors import ModelError, UsageError


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("./nowhere", "No model directory"),
        ("org/absent", "not in the local hub cache"),
        ("a/b/c", "No model directory"),
    ],
)
def test_a_missing_model_is_one_sentence(model, message):
    with pytest.raises(ModelError, match=message) as error:
        resolve_model(model)
    assert error.value.hint


def test_pickle_weights_are_not_read(tiny_model, tmp_path):
    directory = shutil.copytree(tiny_model("llama"), tmp_path / "pickle")
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickle"):
        _ = resolve_model(str(directory)).weights


def test_code_of_a_model_is_run_neither_by_its_files_nor_by_an_unpinned_flag(tiny_model, tmp_path):
    directory = shutil.copytree(tiny_model("llama"), tmp_path / "code")
    config = json.loads((directory / "config.json").read_text())
    config |= {"model_type": "strange", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
    (directory / "config.json").write_text(json.dumps(config))
    proof = tmp_path / "executed"
    (directory / "evil.py").write_text(f"open({str(proof)!r}, 'w')")
    with pytest.raises(ModelError, match="not run"):
        _ = resolve_model(str(directory)).config
    with pytest.raises(UsageError, match="40-digit"):
        resolve_model("org/model", "main", trust_remote_code=True)
    assert not proof.exists()
