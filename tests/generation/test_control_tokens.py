"""Control tokens in answers: those of thoughts and calls of tools are written, and stop strings may hold them."""

import pytest

from qlora_cli.core.generation.requests import NO_MARKS, STOPPED, GrowingCompletion, Request, find_marks
from qlora_cli.core.generation.session import GenerationSession
from qlora_cli.core.prompts.formatting import Formatting, chat_formatting
from tests.conftest import make_tokenizer
from tests.generation.session_case import NEVER

CALLING = """{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}{% for m in messages %}\
{% if m.role == 'user' %}<ask>{{ m.content }}</ask>\
{% elif m.tool_calls %}<say><call>{{ m.tool_calls | map(attribute='function') | list | tojson }}<end>\
{% else %}<say>{{ m.content }}<end>{% endif %}{% endfor %}{% if add_generation_prompt %}<say>{% endif %}"""
CHANNELS = """{% for m in messages %}{% if m.role == 'user' %}<ask>{{ m.content }}</ask>\
{% else %}{% if m.thinking %}<say><in>think<as>{{ m.thinking }}<then>{% endif %}<say><in>final<as>{{ m.content }}<end>\
{% endif %}{% endfor %}{% if add_generation_prompt %}<say>{% endif %}"""
MARKS = ["<tools>", "</tools>", "<ask>", "</ask>", "<say>", "<call>", "<end>", "<in>", "<as>", "<then>", "<other>"]


@pytest.fixture(scope="module")
def tokenizer():
    made = make_tokenizer()
    made.add_special_tokens({"additional_special_tokens": MARKS})
    return made


def answer(tokenizer, text, *, marks=NO_MARKS, stop=()):
    """The completion whose tokens are those of a text, until it is finished."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    growing = GrowingCompletion(
        Request(0, [1], len(ids), marks=marks), tokenizer=tokenizer, end_ids=[NEVER], stop=tuple(stop)
    )
    for token in ids:
        if growing.push(token):
            break
    return growing.completion()


def test_a_call_of_a_tool_is_told_from_text(tokenizer):
    marks = find_marks(tokenizer, chat_formatting(CALLING))
    assert tokenizer.convert_ids_to_tokens(marks.tokens) == ["<call>"] and not marks.opening
    assert answer(tokenizer, '<call>[{"a": 1}]<other>', marks=marks).text == '<call>[{"a": 1}]'
    assert answer(tokenizer, '<call>[{"a": 1}]<other>').text == '[{"a": 1}]'


def test_a_thought_is_told_from_what_is_said_and_no_part_of_the_conversation(tokenizer):
    marks = find_marks(tokenizer, chat_formatting(CHANNELS))
    thought = "<in>think<as>hm<then><say><in>final<as>"
    assert answer(tokenizer, "<in>final<as>yes", marks=marks).text == "yes"
    assert answer(tokenizer, "<in>final", marks=marks).text == ""
    assert answer(tokenizer, "<in>fox", marks=marks).text == "<in>fox"
    assert answer(tokenizer, f"{thought}yes", marks=marks).text == f"{thought}yes"
    session = object.__new__(GenerationSession)
    session._marks, session.files, session.tokenizer = {None: marks}, None, tokenizer
    assert session.without_thought(f"{thought}yes", None) == "yes" == session.without_thought("yes", None)


@pytest.mark.parametrize("template", ["{% for m in messages %}<say>{{ m.content }}<end>{% endfor %}", None])
def test_nothing_is_written_where_the_format_knows_neither(tokenizer, template):
    formatting = chat_formatting(template) if template else Formatting(format="text", column="text")
    assert not find_marks(tokenizer, formatting).tokens


@pytest.mark.parametrize("stop", ["<other>", "<other>fox", "quick<other>"])
def test_a_stop_string_may_hold_control_tokens(tokenizer, stop):
    found = answer(tokenizer, "the quick<other>fox <say>ran", stop=[stop])
    assert (found.text, found.finish) == ("the " if stop.startswith("quick") else "the quick", STOPPED)
