"""Control tokens in answers: those that stand for a call of a tool are written, and stop strings may hold them."""

import pytest

from qlora_cli.core.generation.requests import STOPPED, GrowingCompletion, Request, find_call_marks
from qlora_cli.core.prompts.formatting import Formatting, chat_formatting
from tests.conftest import make_tokenizer
from tests.generation.session_case import NEVER

CALLING = """{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}{% for m in messages %}\
{% if m.role == 'user' %}<ask>{{ m.content }}</ask>\
{% elif m.tool_calls %}<say><call>{{ m.tool_calls | map(attribute='function') | list | tojson }}<end>\
{% else %}<say>{{ m.content }}<end>{% endif %}{% endfor %}{% if add_generation_prompt %}<say>{% endif %}"""
MARKS = ["<tools>", "</tools>", "<ask>", "</ask>", "<say>", "<call>", "<end>", "<other>"]


@pytest.fixture(scope="module")
def tokenizer():
    made = make_tokenizer()
    made.add_special_tokens({"additional_special_tokens": MARKS})
    return made


def answer(tokenizer, text, *, marks=frozenset(), stop=()):
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
    marks = find_call_marks(tokenizer, chat_formatting(CALLING))
    assert tokenizer.convert_ids_to_tokens(marks) == ["<call>"]
    assert answer(tokenizer, '<call>[{"a": 1}]<other>', marks=marks).text == '<call>[{"a": 1}]'
    assert answer(tokenizer, '<call>[{"a": 1}]<other>').text == '[{"a": 1}]'


@pytest.mark.parametrize("template", ["{% for m in messages %}<say>{{ m.content }}<end>{% endfor %}", None])
def test_nothing_is_written_where_the_format_knows_no_calls(tokenizer, template):
    formatting = chat_formatting(template) if template else Formatting(format="text", column="text")
    assert not find_call_marks(tokenizer, formatting)


@pytest.mark.parametrize("stop", ["<other>", "<other>fox", "quick<other>"])
def test_a_stop_string_may_hold_control_tokens(tokenizer, stop):
    found = answer(tokenizer, "the quick<other>fox <say>ran", stop=[stop])
    assert (found.text, found.finish) == ("the " if stop.startswith("quick") else "the quick", STOPPED)
