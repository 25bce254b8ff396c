"""Promises of a conversation: what is remembered, what is not, and that a mistake ends nothing."""

import json

import pytest

from qlora_cli.core.generation.chat import Conversation, obey
from qlora_cli.errors import DataError, UsageError
from qlora_cli.events import Caution, TextGenerated


class Echo:
    """A voice that repeats its prompt; stops in mid-answer when asked to."""

    def __init__(self, *, history=True, room=10**6):
        self.history, self.room, self.adapter = history, room, "first"
        self.prompts = []
        self.interrupt = False

    def remembers(self):
        return self.history

    def fits(self, prompt):
        return len(json.dumps(prompt)) <= self.room

    def say(self, prompt, *, turn, base, tell):
        self.prompts.append((prompt, turn, base))
        tell(" heard")
        if self.interrupt:
            raise KeyboardInterrupt
        tell(f" {turn}")

    def switch(self, directory):
        self.adapter = directory


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


@pytest.fixture
def echo():
    return Echo()


@pytest.fixture
def conversation(echo):
    return Conversation(echo, lambda piece: None)


def test_each_question_comes_with_all_before_it(conversation, echo):
    assert conversation.ask("a") == "heard 0"
    conversation.ask("b")
    assert echo.prompts == [
        ([user("a")], 0, False),
        ([user("a"), assistant("heard 0"), user("b")], 1, False),
    ]


def test_single_prompts_are_asked_alone():
    echo = Echo(history=False)
    conversation = Conversation(echo, lambda piece: None)
    conversation.ask("a")
    conversation.ask("b")
    assert [prompt for prompt, _, _ in echo.prompts] == ["a", "b"]


def test_the_base_answers_the_same_question_and_is_not_remembered(conversation, echo):
    with pytest.raises(UsageError, match="no question"):
        conversation.base()
    conversation.ask("a")
    conversation.ask("b")
    before = list(conversation.messages)
    conversation.base()
    assert echo.prompts[-1] == ([*before[:2], user("b")], 1, True)
    conversation.base("c")
    assert echo.prompts[-1] == ([*before, user("c")], 2, True)
    assert conversation.messages == before


def test_an_interrupted_answer_is_remembered_as_far_as_it_came(conversation, echo):
    echo.interrupt = True
    with pytest.raises(KeyboardInterrupt):
        conversation.ask("a")
    assert conversation.messages == [user("a"), assistant("heard")]


def test_the_oldest_turns_are_forgotten_when_the_context_is_full():
    echo = Echo(room=200)
    conversation, events = Conversation(echo, lambda piece: None), []
    for number in range(6):
        obey(conversation, f"question {number}", events.append)
        assert echo.fits(echo.prompts[-1][0])
        assert echo.prompts[-1][0][-1] == user(f"question {number}")
        assert echo.prompts[-1][1] == number
    assert any(isinstance(event, Caution) and "forgotten" in event.text for event in events)
    assert conversation.messages[0]["role"] == "user"


def test_commands_do_what_they_say(conversation, echo, tmp_path):
    events = []
    for line in (
        "hi",
        "",
        "/base",
        "/adapter second",
        f"/save {tmp_path / 'a.jsonl'}",
        f"/save {tmp_path / 'a.jsonl'}",
    ):
        obey(conversation, line, events.append)
    assert echo.adapter == "second"
    assert [base for _, _, base in echo.prompts] == [False, True]
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert rows == [{"messages": [user("hi"), assistant("heard 0")]}] * 2
    assert events.count(TextGenerated("", final=True)) == 2
    obey(conversation, "/reset", events.append)
    assert conversation.messages == []
    for line, reported in (("/adaptor x", "is no command"), ("/adapter", "of what"), ("/save ", "of what")):
        with pytest.raises(UsageError, match=reported):
            obey(conversation, line, events.append)
    with pytest.raises(DataError, match="cannot be written"):
        obey(conversation, f"/save {tmp_path}", events.append)
