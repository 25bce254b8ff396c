"""Files of a model: what is missing, unsafe or not to be run is refused in one sentence."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest
import transformers
from transformers import AutoTokenizer, Gemma3Config

from qlora_cli.artifacts import TOKENIZER_NAMES
from qlora_cli.core.models.files import ModelFiles, resolve_model, save_tokenizer
from qlora_cli.core.models.hub import check_blobs
from qlora_cli.core.weights.stored_formats import stored_format
from qlora_cli.errors import ModelError, UsageError
from qlora_cli.events import report_nothing


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("./nowhere", "No model directory"),
        ("org/absent", "not in the local hub cache"),
        ("a/b/c", "No model directory"),
        ("pyproject.toml", "pyproject.toml is a file."),
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


def test_weights_in_the_hub_s_cache_are_here_once_all_of_them_are(tiny_model, tmp_path):
    files = ModelFiles("org/model", shutil.copytree(tiny_model("llama"), tmp_path / "snapshot"), "0" * 40)
    single = files.directory / "model.safetensors"
    assert files.is_local
    single.rename(files.directory / "model-00001-of-00002.safetensors")
    assert not files.is_local
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (files.directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert not files.is_local
    shutil.copy(files.directory / weight_map["a"], files.directory / weight_map["b"])
    assert files.is_local


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


def test_a_wrapper_s_language_model_says_how_it_is_stored(tmp_path):
    held = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    Gemma3Config(text_config={"quantization_config": held}).save_pretrained(tmp_path)
    config = resolve_model(str(tmp_path)).config
    with pytest.raises(ModelError, match="quantised already, by compressed-tensors"):
        stored_format(config, "org/model")
    outer = {"quant_method": "fp8", "weight_block_size": [128, 128]}  # which transformers takes
    content = json.loads((tmp_path / "config.json").read_text()) | {"quantization_config": outer}
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert resolve_model(str(tmp_path)).config.quantization_config == outer


@pytest.mark.parametrize(
    ("architecture", "settings", "same"),
    [("llama", {}, True), ("qwen2", {}, False), ("gpt2", {"backend": None, "tokenizer_class": None}, False)],
)
def test_a_tokenizer_beside_no_configuration_is_that_of_the_model(tiny_model, tmp_path, architecture, settings, same):
    """transformers looks into config.json for a class that is not named, or is named wrongly."""
    base, run = shutil.copytree(tiny_model(architecture), tmp_path / "base"), tmp_path / "run"
    run.mkdir()
    named = json.loads((base / "tokenizer_config.json").read_text()) | settings
    named = {name: value for name, value in named.items() if value is not None and (same or name != "eos_token")}
    (base / "tokenizer_config.json").write_text(json.dumps(named))
    (base / "chat_template.jinja").write_text("{{ messages[0].content }}")
    save_tokenizer(resolve_model(str(base)), run)
    wanted, found = (AutoTokenizer.from_pretrained(directory) for directory in (base, run))
    text = "7 of 1024 layers"
    assert found(text).input_ids == wanted(text).input_ids
    assert (found.eos_token, found.chat_template) == (wanted.eos_token, wanted.chat_template)
    assert same == ((run / "tokenizer_config.json").read_bytes() == (base / "tokenizer_config.json").read_bytes())


def test_a_chat_template_that_the_processor_alone_has_is_the_model_s(tiny_model, tmp_path):
    base, run = shutil.copytree(tiny_model("llama"), tmp_path / "base"), tmp_path / "run"
    run.mkdir()
    (base / "chat_template.json").write_text(json.dumps({"chat_template": "{{ messages[0].content }}"}))
    files = resolve_model(str(base))
    assert files.tokenizer.chat_template == "{{ messages[0].content }}"
    save_tokenizer(files, run)
    assert AutoTokenizer.from_pretrained(run).chat_template == files.tokenizer.chat_template
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (run / name).read_bytes() == (base / name).read_bytes()
    (base / "chat_template.jinja").write_text("of the tokenizer")
    assert resolve_model(str(base)).tokenizer.chat_template == "of the tokenizer"


def test_a_file_of_the_hub_s_cache_that_was_changed_after_it_arrived_is_named(tiny_model, tmp_path):
    """The cache's own form: a link to a file that is called by its SHA-256."""
    content = (tiny_model("llama") / "model.safetensors").read_bytes()
    blob, link = tmp_path / hashlib.sha256(content).hexdigest(), tmp_path / "model.safetensors"
    blob.write_bytes(content)
    link.symlink_to(blob)
    check_blobs([link], "org/model", report_nothing, all_of_them=True)
    check_blobs([link], "org/model", report_nothing)
    blob.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    for all_of_them in (False, True):
        with pytest.raises(ModelError, match="changed or damaged since it was downloaded"):
            check_blobs([link], "org/model", report_nothing, all_of_them=all_of_them)


def test_a_file_that_nobody_has_looked_at_yet_is_read_only_where_all_are(tmp_path):
    (tmp_path / ("0" * 64)).write_bytes(b"another one's download")
    check_blobs([tmp_path / ("0" * 64)], "org/model", report_nothing)
    with pytest.raises(ModelError, match="changed or damaged"):
        check_blobs([tmp_path / ("0" * 64)], "org/model", report_nothing, all_of_them=True)


def test_every_file_that_a_tokenizer_of_transformers_names_is_known():
    modules = Path(transformers.__file__).parent.glob("models/*/tokenization_*.py")
    tables = [re.search(r"VOCAB_FILES_NAMES = \{(.*?)\}", path.read_text(), re.DOTALL) for path in modules]
    named = {name for table in tables if table for name in re.findall(r': "([^"]+)"', table[1])}
    assert len(named) > 20 and named <= set(TOKENIZER_NAMES)
