"""Promises of a conversation: what is remembered, what is not, and that a mistake ends nothing."""

import json

import pytest

from qlora_cli.core.generation.chat import Conversation, read_question, run_line
from qlora_cli.core.generation.requests import LENGTH, Completion, Request
from qlora_cli.core.prompts.formatting import Formatting
from qlora_cli.errors import DataError, UsageError
from qlora_cli.events import Caution, TextGenerated
from tests.generation.session_case import settings_of


class Echo:
    """A session whose answer to the first prompt is " word 0"; stops in mid-answer when asked to."""

    def __init__(self, *, format="chat", room=10**6):
        self.settings = settings_of(max_new_tokens=10)
        self.format, self.room = format, room
        self.selected = None
        self.prompts = []  # (prompt, its number, the adapter that answered)
        self.interrupt = False

    def formatting(self, adapter):
        return Formatting(format=self.format)

    def fits(self, prompt):
        return len(json.dumps(prompt)) <= self.room

    def request(self, index, prompt, adapter):
        if not self.fits(prompt):
            raise DataError("The prompt is too long.")
        self.asked = prompt
        return Request(index, [1], self.settings.max_new_tokens)

    def without_thought(self, answer, adapter):
        return answer

    def select(self, adapter):
        self.selected = adapter

    def end_ids(self, adapter):
        return {0}

    def answer(self, requests, end_ids, on_text):
        (request,) = requests
        self.prompts.append((self.asked, request.index, self.selected))
        on_text(request.index, " word")
        if self.interrupt:
            raise KeyboardInterrupt
        on_text(request.index, f" {request.index}")
        yield Completion(request.index, f" word {request.index}", (), LENGTH, 1)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


@pytest.fixture
def echo():
    return Echo()


@pytest.fixture
def conversation(echo):
    return Conversation(echo, "first", lambda piece: None)


def test_each_question_comes_with_all_before_it(conversation, echo):
    assert conversation.ask("a") == "word 0"
    conversation.ask("b")
    assert echo.prompts == [
        ([user("a")], 0, "first"),
        ([user("a"), assistant("word 0"), user("b")], 1, "first"),
    ]


def test_single_prompts_are_asked_alone():
    echo = Echo(format="prompt")
    conversation = Conversation(echo, "first", lambda piece: None)
    conversation.ask("a")
    conversation.ask("b")
    assert [prompt for prompt, _, _ in echo.prompts] == ["a", "b"]


def test_the_base_answers_the_same_question_and_is_not_remembered(conversation, echo):
    with pytest.raises(UsageError, match="no question"):
        conversation.ask_base()
    conversation.ask("a")
    conversation.ask("b")
    before = list(conversation.messages)
    conversation.ask_base()
    assert echo.prompts[-1] == ([*before[:2], user("b")], 1, None)
    conversation.ask_base("c")
    assert echo.prompts[-1] == ([*before, user("c")], 2, None)
    assert conversation.messages == before


def test_an_interrupted_answer_is_remembered_as_far_as_it_came(conversation, echo):
    echo.interrupt = True
    with pytest.raises(KeyboardInterrupt):
        conversation.ask("a")
    assert conversation.messages == [user("a"), assistant("word")]


def test_the_oldest_turns_are_forgotten_when_the_context_is_full(tmp_path):
    echo = Echo(room=200)
    conversation, events = Conversation(echo, "first", lambda piece: None), []
    for number in range(6):
        run_line(conversation, f"question {number}", events.append)
        assert echo.fits(echo.prompts[-1][0])
        assert echo.prompts[-1][0][-1] == user(f"question {number}")
        assert echo.prompts[-1][1] == number
    assert any(isinstance(event, Caution) and "forgotten" in event.text for event in events)
    run_line(conversation, f"/save {tmp_path / 'a.jsonl'}", events.append)
    assert f"without its first {conversation.forgotten} messages" in events[-1].text
    assert conversation.messages[0]["role"] == "user"


def test_nothing_is_forgotten_for_a_question_that_cannot_be_answered():
    echo = Echo(room=200)
    conversation = Conversation(echo, "first", lambda piece: None)
    conversation.ask("a")
    before = list(conversation.messages)
    with pytest.raises(DataError):
        conversation.ask("a" * 300)
    assert conversation.messages == before and not conversation.forgotten


def test_commands_do_what_they_say(conversation, echo, tmp_path):
    events = []
    for line in (
        "hi",
        "",
        "/base",
        "/adapter second",
        f"/save {tmp_path / 'a.jsonl'}",
        "/system Be brief.",
        f"/save {tmp_path / 'a.jsonl'}",
    ):
        run_line(conversation, line, events.append)
    assert conversation.adapter == echo.selected == "second"
    assert [adapter for _, _, adapter in echo.prompts] == ["first", None]
    assert [row["base"] for row in conversation.rows] == [False, True]
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    said = [user("hi"), assistant("word 0")]
    assert [row["messages"] for row in rows] == [said, [{"role": "system", "content": "Be brief."}, *said]]
    assert events.count(TextGenerated("", final=True)) == 2
    run_line(conversation, "/reset", events.append)
    assert conversation.messages == []
    for line, reported in (("/adaptor x", "is no command"), ("/adapter", "of what"), ("/save ", "of what")):
        with pytest.raises(UsageError, match=reported):
            run_line(conversation, line, events.append)
    with pytest.raises(UsageError, match="no conversation yet"):
        run_line(conversation, f"/save {tmp_path / 'b.jsonl'}", events.append)
    assert not (tmp_path / "b.jsonl").exists()
    run_line(conversation, "hi", events.append)
    with pytest.raises(DataError, match="is not a regular file"):
        run_line(conversation, f"/save {tmp_path}", events.append)


@pytest.mark.parametrize(
    "content",
    [
        b"my notes\n",
        b'{"important": true}\n',
        b'{"messages": "all of mine"}\n',
        b'{"messages": []}',  # and who knows what comes after it
        b"\x80\x00\n",
        b"[" * 100_000 + b"\n",
    ],
)
def test_a_file_of_others_is_not_added_to(conversation, tmp_path, content):
    path = tmp_path / "mine"
    path.write_bytes(content)
    run_line(conversation, "hi", lambda event: None)
    with pytest.raises(DataError, match="holds something else than conversations"):
        run_line(conversation, f"/save {path}", lambda event: None)
    assert path.read_bytes() == content
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match="leads nowhere"):
        run_line(conversation, f"/save {tmp_path / 'link'}", lambda event: None)
    assert not (tmp_path / "nowhere").exists()


def test_an_answer_is_asked_for_again_and_taken_back():
    session = Echo()
    conversation = Conversation(session, "out", lambda piece: None)
    events = []
    run_line(conversation, "/system Be brief.", events.append)
    run_line(conversation, "one", events.append)
    run_line(conversation, "/retry", events.append)
    system = {"role": "system", "content": "Be brief."}
    (first, number, _), (second, other, _) = session.prompts
    assert first == second == [system, user("one")] and number != other
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"]
    session.interrupt = True
    with pytest.raises(KeyboardInterrupt):
        run_line(conversation, "/retry", events.append)
    assert conversation.messages == [user("one"), assistant("word")]
    run_line(conversation, "/undo", events.append)
    assert conversation.messages == []
    for line in ("/undo", "/retry"):
        with pytest.raises(UsageError):
            run_line(conversation, line, events.append)
    run_line(conversation, "/help", events.append)
    assert any("/undo" in str(event) for event in events)


def test_a_system_message_needs_a_model_of_conversations():
    conversation = Conversation(Echo(format="prompt"), "out", lambda piece: None)
    with pytest.raises(UsageError, match="single prompts"):
        run_line(conversation, "/system Be brief.", lambda event: None)


@pytest.mark.parametrize(
    ("typed", "question"),
    [
        (["one"], "one"),
        (["one\\", "two"], "one\ntwo"),
        (['"""one', "two", '"""'], "one\ntwo"),
        (['"""', "  one", 'two"""'], "one\ntwo"),
        ([None], None),
    ],
)
def test_a_question_may_have_several_lines(typed, question):
    lines = iter(typed)
    assert read_question(lambda prompt: next(lines)) == question
    assert not list(lines)
