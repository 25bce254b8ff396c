"""Text to ids: the tokenizer's own answer, whatever way it was reached; typed control tokens stay text."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from qlora_cli.core.prompts.encoder import TextEncoder, encoder_of
from qlora_cli.core.prompts.word_cache import WordCache, find_cut
from qlora_cli.errors import ModelError
from tests.conftest import TEXT
from tests.prompts.small_tokenizers import KINDS, byte_level, sentencepiece_like

WORDS = st.sampled_from(
    [
        "the",
        "quick",
        "Fox",
        "12",
        "3.5",
        "a,",
        "b.",
        "<<48/2=24>>",
        "naïve",
        "東京",
        "🙂",
        "\n",
        "\t",
        "</s>",
        "<s>",
        "<|endoftext|>",
        "<|im_end|>",
        "é",
        "don't",
        "x=1;",
        "",
    ]
)
TEXTS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=40),
    st.lists(WORDS, max_size=25).map(" ".join),
    st.lists(WORDS, max_size=25).map("".join),
    st.text("aZ's tLl9 1.-/\n\r\t  x", max_size=40),  # where patterns of pre-tokenizers have their corners
)


def encode(encoder, *runs):
    return encoder.encode_rows([[(run, False) for run in runs]])[0]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(text=TEXTS)
def test_a_text_at_the_start_gives_what_the_tokenizer_gives(kind, text):
    tokenizer = KINDS[kind]()
    encoder = encoder_of(tokenizer)
    if any(token in text for token in encoder.control_ids):
        return  # the tokenizer takes these for control tokens; the next test is about them
    assert encode(encoder, text) == [tokenizer(text, add_special_tokens=False)["input_ids"]]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(before=TEXTS, text=TEXTS)
def test_no_text_becomes_a_control_token_and_none_is_lost(kind, before, text):
    tokenizer = KINDS[kind]()
    encoder = encoder_of(tokenizer)
    runs = encode(encoder, "a" + before, text)
    ids = [token for run in runs for token in run]
    unknown = encoder.control_ids.get("<unk>")
    assert not {id for token, id in encoder.control_ids.items() if id != unknown} & set(ids)
    if kind not in ("neox", "unigram"):  # these write every text back exactly
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == "a" + before + text


@pytest.mark.parametrize("kind", ["llama", "llama_legacy", "byte_level", "llama_3", "neox"])
def test_typed_control_tokens_are_tokenised_as_any_text(kind):
    """As a tokenizer that never heard of them would do it, and not letter by letter."""
    encoder = encoder_of(KINDS[kind]())
    content = json.loads(encoder.spec.backend)
    content["added_tokens"] = [token for token in content["added_tokens"] if not token["special"]]
    ignorant = Tokenizer.from_str(json.dumps(content))
    for token in encoder.control_ids:
        text = f"the quick {token} fox"
        assert encode(encoder, text) == [ignorant.encode(text, add_special_tokens=False).ids]


@pytest.mark.parametrize("kind", ["llama", "llama_always", "llama_legacy"])
def test_a_continued_text_gets_no_space(kind):
    tokenizer = KINDS[kind]()
    encoder = encoder_of(tokenizer)
    whole, (first, second) = encode(encoder, "The quick brown"), encode(encoder, "The quick", " brown")
    assert first + second == whole[0]
    assert tokenizer.convert_ids_to_tokens(encode(encoder, "The", "quick")[1])[0][0] != "▁"


@pytest.mark.parametrize("kind", KINDS)
def test_words_are_looked_up_under_every_kind(kind):
    encoder = encoder_of(KINDS[kind]())
    assert encode(encoder, TEXT[1])
    assert encoder._words.is_cutting


@pytest.mark.parametrize(
    "change",
    [
        {"model": {"type": "WordPiece", "vocab": {}}},
        {"model": {"type": "BPE", "vocab": {}, "dropout": 0.1}},
        {"added_tokens": [{"content": "<x>", "special": False, "lstrip": False, "rstrip": True, "single_word": False}]},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"normalizer": {"type": "Strip"}},
        {"model": {"type": "BPE", "vocab": {"a▁b": 0}}, "pre_tokenizer": {"type": "Metaspace"}},
    ],
)
def test_tokenizers_that_look_across_words_are_not_cut(change):
    plain = {"model": {"type": "BPE", "vocab": {"▁a": 0}}, "added_tokens": [], "pre_tokenizer": {"type": "Metaspace"}}
    assert find_cut(plain).split("one two, 3") == ["one", " two", ",", " 3"]
    assert find_cut({**plain, **change}) is None


@pytest.mark.parametrize(
    ("change", "pieces"),
    [
        ({}, ["don't", " see", "(x", "-", "12", ",", " 3", ")."]),
        ({"vocab": {"a(": 0}}, ["don't", " see(x-", "12,", " 3)."]),
        ({"vocab": {"(1": 0}}, ["don't", " see", "(x", "-12", ",", " 3", ")."]),
        ({"vocab": {"ĠĠ": 0, "<s>": 1, "<0x0A>": 2}}, ["don't", " see", "(x", "-", "12", ",", " 3", ")."]),
        ({"fuse_unk": True}, ["don't", " see(x-12,", " 3)."]),
        ({"type": "Unigram", "vocab": [["▁a", 0.0]]}, ["don't", " see(x-12,", " 3)."]),
    ],
)
def test_texts_are_cut_where_no_token_reaches_across(change, pieces):
    control = {"content": "<s>", "special": True, "lstrip": False, "rstrip": False, "single_word": False}
    model = {"type": "BPE", "vocab": {"Ġa": 0}, **change}
    cut = find_cut({"model": model, "added_tokens": [control], "pre_tokenizer": {"type": "ByteLevel"}})
    assert cut is not None and cut.split("don't see(x-12, 3).") == pieces


def test_a_vocabulary_that_reaches_across_words_gets_whole_texts():
    from tokenizers import Tokenizer, models, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.train_from_iterator(TEXT * 8, trainers.BpeTrainer(vocab_size=300, special_tokens=["</s>"]))
    assert any(" " in token[1:] for token in tokenizer.get_vocab())
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    encoder = encoder_of(fast)
    assert not encoder._words.is_cutting
    assert encode(encoder, TEXT[1]) == [fast(TEXT[1], add_special_tokens=False)["input_ids"]]


def test_a_wrong_cut_is_noticed_on_the_first_texts():
    """Were the check of the vocabulary ever fooled, the first texts tell."""
    encoder = TextEncoder(encoder_of(sentencepiece_like("legacy")).spec)
    encoder._words._inside = encoder._words._first  # words inside a text would get another space
    whole = [encoder._at_start.encode(text, add_special_tokens=False).ids for text in TEXT]
    assert encoder._words.encode(TEXT, [True] * len(TEXT)) == whole
    assert not encoder._words.is_cutting


def test_words_are_forgotten_and_learnt_again():
    tokenizer = byte_level()
    backend = tokenizer.backend_tokenizer
    cut = find_cut(json.loads(backend.to_str()))
    cache = WordCache(cut, backend, backend, lambda backend, texts, ids: ids, most_words=8)
    for i in range(60):
        text = f"the quick fox{i} sees {i % 7} dogs and {i * 37} cats"
        assert cache.encode([text], [True]) == [tokenizer(text, add_special_tokens=False)["input_ids"]]
    words = cache._inside
    assert " sees" in words.known  # what comes again and again stays
    assert len(words.known) + len(words._older) < 40


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_text_is_tokenised_in_parts_as_it_is_as_a_whole(kind):
    encoder = encoder_of(KINDS[kind]())
    text = " ".join(TEXT * 3)
    backend = encoder._at_start
    cut = find_cut(json.loads(encoder.spec.backend))
    cache = WordCache(cut, backend, encoder._inside, encoder._without_control, block_letters=7, most_uncut_letters=60)
    whole = [backend.encode(text, add_special_tokens=False).ids]
    assert [list(ids) for ids in cache.encode([text], [True])] == whole
    assert cache.takes(text) == cache.is_cutting
    assert cache.takes("x" * 60) and not cache.takes("x" * 61)


@pytest.mark.parametrize(
    ("kind", "prefix"),
    [("llama", ["<s>"]), ("llama_legacy", ["<s>"]), ("unigram", ["<s>"]), ("byte_level", []), ("neox", [])],
)
def test_the_prefix_is_what_the_tokenizer_puts_by_itself(kind, prefix):
    encoder = encoder_of(KINDS[kind]())
    assert [encoder.control_ids[token] for token in prefix] == list(encoder.spec.prefix_ids)
    bos = encoder.spec.prefix_ids[:1]
    assert encoder.with_prefix([("a", True)])[: len(prefix)] == [(token, False) for token in bos]
    assert encoder.with_prefix([(token, False) for token in bos] + [("a", True)])[1:] == [("a", True)][: len(bos)]


def test_markup_is_split_at_control_tokens():
    encoder = encoder_of(byte_level())
    start, end = encoder.control_ids["<|im_start|>"], encoder.control_ids["<|im_end|>"]
    assert encoder.split_markup("<|im_start|>user\nhi <think><|im_end|>\n") == [start, "user\nhi <think>", end, "\n"]


def test_a_tokenizer_that_changes_is_described_anew():
    from tests.conftest import make_tokenizer

    tokenizer = make_tokenizer()
    before = encoder_of(tokenizer).spec.sha256
    assert encoder_of(tokenizer).spec.sha256 == before
    tokenizer.add_special_tokens({"eos_token": "<|padding|>"})
    assert encoder_of(tokenizer).spec.sha256 != before
    assert encoder_of(tokenizer).spec.eos_id == 1


def test_a_tokenizer_without_an_end_is_refused():
    from tests.conftest import make_tokenizer

    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="no end-of-text token"):
        encoder_of(tokenizer)
