"""Streaming promises: the pieces make the whole text, no character comes in halves, nothing of a stop string shows."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from qlora_cli.core.generation.detokenizer import BROKEN, TextStream
from tests.conftest import make_tokenizer


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """Llama-2-like: words begin with ▁, unknown characters fall back to bytes, the first space of a text is dropped."""
    words = ["<unk>", "<s>", "</s>", "▁", "▁the", "▁fox", "a", "b", "c"]
    vocabulary = [(word, -float(i)) for i, word in enumerate(words)] + [(f"<0x{i:02X}>", -99.0) for i in range(256)]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


TOKENIZERS = {"bytes": make_tokenizer(), "sentencepiece": sentencepiece_tokenizer()}
TEXT = st.text(alphabet=st.sampled_from("abc the fox 東京é🙂👩‍👩‍👧\n"), max_size=30)


def stream(tokenizer, prompt, answer, stop=(), **arguments):
    """All pieces of an answer, in order."""
    text = TextStream(tokenizer, prompt, stop, **arguments)
    pieces = []
    for token in answer:
        pieces.append(text.push(token))
        if text.stopped:
            break
    pieces.append(text.finish())
    assert "".join(pieces) == text.text
    return pieces


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(deadline=None, max_examples=60)
@given(prompt=TEXT, answer=TEXT)
def test_pieces_join_to_the_text_and_no_character_is_cut(kind, prompt, answer):
    tokenizer = TOKENIZERS[kind]
    before = tokenizer.encode(prompt, add_special_tokens=False)
    ids = tokenizer.encode(prompt + answer, add_special_tokens=False)
    if ids[: len(before)] != before:  # the tokenizer joins the two: then the answer is a text of its own
        before, ids, prompt = [], tokenizer.encode(answer, add_special_tokens=False), ""
    pieces = stream(tokenizer, before, ids[len(before) :])
    assert not any(BROKEN in piece for piece in pieces)
    if prompt:
        assert "".join(pieces) == answer
    else:
        assert "".join(pieces) == tokenizer.decode(ids)


def test_an_unfinished_character_at_the_end_is_dropped():
    tokenizer = TOKENIZERS["bytes"]
    ids = tokenizer.encode("a🙂")
    assert "".join(stream(tokenizer, [], ids[:-1])) == "a"


def test_bytes_that_never_make_a_character_do_not_hold_up_the_answer():
    tokenizer = TOKENIZERS["bytes"]
    (bad,) = (tokenizer.convert_tokens_to_ids("ÿ"),)  # how byte-level BPE writes the byte 0xFF
    rest = tokenizer.encode(" the fox")
    assert "".join(stream(tokenizer, [], [bad] * 40 + rest)).endswith("the fox")
    assert any(stream(tokenizer, [], [bad] * 40)[:-1])


@settings(deadline=None, max_examples=100)
@given(
    answer=st.text(alphabet="abcXY 東", max_size=25),
    stop=st.lists(st.text(alphabet="abXY東", min_size=1, max_size=4), max_size=3),
)
def test_an_answer_ends_before_the_first_stop_string_even_across_tokens(answer, stop):
    tokenizer = TOKENIZERS["bytes"]
    pieces = stream(tokenizer, [], tokenizer.encode(answer, add_special_tokens=False), tuple(stop))
    # The first to be complete ends it: "YX" ends at the stop string "X", whatever "YXX" might still have come of it.
    found = [(at + len(text), at) for text in stop if (at := answer.find(text)) >= 0]
    assert "".join(pieces) == (answer[: min(found)[1]] if found else answer)


def test_text_waits_only_while_it_may_become_a_stop_string():
    tokenizer = TOKENIZERS["bytes"]
    text = TextStream(tokenizer, [], ("ab!",))
    pieces = [text.push(token) for token in tokenizer.encode("xab")]
    assert "".join(pieces) == "x"
    assert text.push(tokenizer.encode("c")[0]) == "abc"


def test_blanks_before_the_answer_can_be_left_out():
    tokenizer = TOKENIZERS["bytes"]
    ids = tokenizer.encode(" \n the fox ")
    assert "".join(stream(tokenizer, [], ids, strip=True)) == "the fox "
    assert "".join(stream(tokenizer, [], ids)) == " \n the fox "
