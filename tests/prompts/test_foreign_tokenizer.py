"""Tokenizers made to harm: expressions that take for ever or fill the memory end in a sentence; real ones are taken."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qlora_cli.core.prompts.encoder import encoder_of
from qlora_cli.core.prompts.foreign_tokenizer import encode_texts, refuse_growth
from qlora_cli.errors import ModelError
from tests.conftest import SHARED_DATA

PANICS = [r"(a+)+$", r"(a|aa)+$", r"^(([a-z])+.)+[A-Z]([a-z])+$"]


def splitting(expression: str) -> Tokenizer:
    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "</s>": 1, "a": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(expression), "isolated")
    return backend


def wrapped(backend: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", eos_token="</s>")


@pytest.mark.parametrize("expression", PANICS)
def test_an_expression_that_gives_up_is_a_sentence(expression):
    """The library's panic is no Exception: as it is, it would pass everything that catches one."""
    encoder = encoder_of(wrapped(splitting(expression)))
    with pytest.raises(ModelError, match="gives up on a text"):
        encoder.encode_rows([[("a" * 40 + "!", True)]])


def test_an_expression_that_stays_below_what_the_library_counts_is_stopped(tmp_path):
    """In a process of its own, which ends although the library works on."""
    splitting(r"[ab]*[ac]*[ad]*\W").save(str(tmp_path / "tokenizer.json"))
    code = (
        "import sys; from tokenizers import Tokenizer\n"
        "from qlora_cli.core.prompts.foreign_tokenizer import encode_texts\n"
        "try: encode_texts(Tokenizer.from_file(sys.argv[1]), ['a' * 5000], seconds=0.2)\n"
        "except Exception as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "tokenizer.json")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
    )
    assert done.returncode == 0 and "does not come to an end with 1 texts of up to 5,000 letters" in done.stdout


def replacing(*pairs) -> dict:
    steps = [normalizers.Replace(pattern, content) for pattern, content in pairs]
    backend = splitting("x")
    backend.normalizer = normalizers.Sequence(steps)
    return json.loads(backend.to_str())


@pytest.mark.parametrize(
    "pairs",
    [
        [("a", "aa")] * 40,
        [("a", "b" * 10_000), ("b", "c" * 10_000)],
        [(Regex("a"), "aaaaaaaaaaaaaaaa")] * 8,
        [(Regex(""), "x")] * 30,
        [(Regex("(?=a)"), "aa")] * 20,
    ],
)
def test_replacements_that_fill_the_memory_are_refused_before_any_text(pairs):
    description = replacing(*pairs)
    with pytest.raises(ModelError, match="times as long"):
        refuse_growth(description)
    with pytest.raises(ModelError, match="times as long"):
        encoder_of(wrapped(Tokenizer.from_str(json.dumps(description))))


def test_replacements_that_tokenizers_make_are_taken():
    refuse_growth(replacing((" ", "▁"), ("``", '"'), (Regex(r"\s+"), " "), (Regex(" {2,}"), "▁"), ("\n", "</n>")))
    refuse_growth(replacing(*[(Regex("[“”„]"), '"'), (Regex("…"), "...")] * 8))
    if SHARED_DATA.is_dir():
        refuse_growth(json.loads((SHARED_DATA / "gpt-neox-tokenizer.json").read_text()))


def test_what_a_tokenizer_cannot_encode_is_a_sentence():
    backend = Tokenizer(models.WordLevel({"a": 0}, unk_token="[UNK]"))
    with pytest.raises(ModelError, match="gives up on a text"):
        encode_texts(backend, ["b"])
    assert encode_texts(backend, []) == [] and [e.ids for e in encode_texts(backend, ["a"])] == [[0]]
