"""A conversation in normal form: what every row of chats becomes before a chat template prints it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qlora_cli.core.records.dialogues import split_dialogue
from qlora_cli.core.records.messages import Message, holds_messages, read_messages, turns_of, with_flags
from qlora_cli.core.records.parts import system_text
from qlora_cli.core.records.record import BadField, Record, decode_nested, describe_type, says_nothing, why_unread
from qlora_cli.core.records.tools import calls_in, read_tools, without_padding, wrap_call


@dataclass(frozen=True)
class Conversation:
    """Messages and what else a chat template is given with them.

    Attributes:
        messages: `role`, `content` (text, never null), and what else the data has; `tool_calls` is there only where
            there are calls, and their arguments are objects.
        trained: For each message, whether the data says that it is trained (see `TRAINED_KEYS`), or says nothing (None);
            what is no answer of the assistant is not trained in any case.
        asked: For each message, whether it is of the prompt of a prompt and completion: its answers are context.
        tools: Descriptions of tools, or None.
        documents: For templates that print documents, or None.
        settings: Variables of the template that this row sets itself (`chat_template_kwargs`).
    """

    messages: list[Message]
    trained: list[bool | None]
    asked: list[bool]
    tools: list[Record] | None = None
    documents: list[Record] | None = None
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ConversationColumns:
    """Which columns of a record hold its conversation: what is there is joined in the order of these attributes.

    Attributes:
        system: Text of a system turn.
        messages: The turns, or those before the question; also as one text (see `split_dialogue`).
        history: Pairs of earlier questions and answers.
        prompt: The question, as text or as messages.
        addition: Text that belongs to the question, such as Alpaca's `input`, or messages before it.
        answer: The answer, as text or as messages; if these begin with what comes before, they are the whole.
        tools: Descriptions of tools.
        documents: Documents.
        settings: Variables of the template.
        roles: Names of roles in this data → names that chat templates know.
        ending: Control token, as text, that every answer ends in; it is taken off, as the chat template has its own.
        trained: Which of the messages are trained (see `with_flags`).
    """

    system: str | None = None
    messages: str | None = None
    history: str | None = None
    prompt: str | None = None
    addition: str | None = None
    answer: str | None = None
    tools: str | None = None
    documents: str | None = None
    settings: str | None = None
    roles: Mapping[str, str] = field(default_factory=dict)
    ending: str | None = None
    trained: str | None = None


def read_conversation(record: Record, columns: ConversationColumns, *, is_prompt: bool = False) -> Conversation:
    """The conversation of one record.

    Args:
        record: A row of data, or a prompt.
        columns: Where it is.
        is_prompt: The answer is still to be made, and its column need not be there.

    Raises:
        BadField: A column is missing, or holds no messages, tools or documents.
    """
    reader = _Reader(columns.roles)
    if columns.messages is not None:
        turns = _required(record, columns.messages)
        if isinstance(turns, str) and turns_of(turns) is None:
            turns = _split_text(turns, columns.messages)
        if columns.trained is not None and not is_prompt:  # which need not have the messages that it counts
            turns = with_flags(turns, record.get(columns.trained), columns.trained, columns.roles)
        reader.add(turns, columns.messages, asked=columns.answer is not None)
    if history := _history(record, columns.history):
        reader.add(history, columns.history)
    if columns.prompt is not None:
        question = _required(record, columns.prompt)
        addition = record.get(columns.addition) if columns.addition else None
        if addition and holds_messages(addition):
            reader.add(addition, columns.addition, asked=True)
        elif isinstance(question, str) and isinstance(addition, str) and addition.strip():
            question = f"{question}\n{addition}" if question.strip() else addition
        reader.add(question, columns.prompt, role="user", asked=True)
    if columns.answer is not None and not is_prompt:
        answer = _required(record, columns.answer)
        if columns.tools and (calls := calls_in(answer)):
            answer = {"role": "assistant", "tool_calls": calls}
        reader.add_answer(answer, columns.answer)
    if not reader.messages:
        raise BadField(f"field {columns.messages or columns.prompt!r}: has no messages")
    _add_system(reader, record.get(columns.system) if columns.system else None, columns.system)
    tools = read_tools(record.get(columns.tools), columns.tools) if columns.tools else None
    tools = _tools_of_turns(reader.messages, tools)
    messages = reader.messages
    if columns.ending:
        messages = [_without_ending(message, columns.ending) for message in messages]
    if tools:
        tools, messages = without_padding(tools, messages)
    return Conversation(
        messages,
        reader.trained,
        reader.asked,
        tools,
        _documents(record, columns.documents),
        _settings(record, columns.settings),
    )


class _Reader:
    """Messages gathered from one column after another."""

    def __init__(self, roles: Mapping[str, str]) -> None:
        self.messages: list[Message] = []
        self.trained: list[bool | None] = []
        self.asked: list[bool] = []
        self._roles = roles

    def add(self, value: Any, column: str | None, role: str | None = None, *, asked: bool = False) -> None:
        """Appends a column's messages; text is a message of this role. Asked are those that the prompt consists of."""
        messages, trained = self._read(value, column, role)
        self.messages += messages
        self.trained += trained
        self.asked += [asked] * len(messages)

    def add_answer(self, value: Any, column: str) -> None:
        """Appends the answer, or takes its messages for the whole where they begin with what came before."""
        messages, trained = self._read(value, column, "assistant")
        before, said = _without_system(self.messages), _without_system(messages)
        shared = next((i for i, (a, b) in enumerate(zip(before, said, strict=False)) if a != b), 0)
        if shared and before[shared][0] == "assistant":  # the same conversation with another answer, which counts
            spoken = [i for i, message in enumerate(self.messages) if message["role"] != "system"]
            del self.messages[spoken[shared] :], self.trained[spoken[shared] :], self.asked[spoken[shared] :]
            before = before[:shared]
        repeated = len(before) if said[: len(before)] == before else 0
        if said and repeated == len(said):  # both hold the same conversation, and nothing says what of it is context
            self.asked = [False] * len(self.asked)
        if repeated and len(said) < len(messages):
            systems = [[m["content"].strip() for m in of if m["role"] == "system"] for of in (self.messages, messages)]
            if systems[0] not in ([], systems[1]):
                raise BadField(f"field {column!r} differs in its system turn from the messages before it")
            asked = iter([a for a, m in zip(self.asked, self.messages, strict=True) if m["role"] != "system"])
            self.asked = [message["role"] != "system" and next(asked, False) for message in messages]
            self.messages, self.trained = messages, trained
        else:
            self.messages += messages[repeated:]
            self.trained += trained[repeated:]
            self.asked += [False] * (len(messages) - repeated)

    def _read(self, value: Any, column: str | None, role: str | None) -> tuple[list[Message], list[bool | None]]:
        if role is not None and isinstance(value, str) and not holds_messages(value):
            return [{"role": role, "content": value}], [None]
        try:
            return read_messages(value, self._roles, first=len(self.messages) + 1)
        except BadField as reason:
            raise BadField(f"field {column!r}: {reason}") from None


def _without_system(messages: list[Message]) -> list[tuple[str, str, list[Any]]]:
    """Who says and calls what, apart from system turns, by which two columns are compared."""
    return [
        (message["role"], message["content"].strip(), list(map(_called, message.get("tool_calls", []))))
        for message in messages
        if message["role"] != "system"
    ]


def _called(call: Record) -> tuple[Any, Record]:
    """What a call calls and with what, without its id and without what Arrow padded it with."""
    function = wrap_call(call)["function"]
    arguments = function.get("arguments") or {}
    return function.get("name"), {name: value for name, value in arguments.items() if value is not None}


def _required(record: Record, column: str) -> Any:
    if column not in record:
        names = ", ".join(map(repr, record)) or "nothing"
        raise BadField(f"field {column!r} is missing (it has {names})")
    return record[column]


def _split_text(text: str, column: str) -> list[Message]:
    if (turns := split_dialogue(text)) is None:
        if reason := why_unread(text):
            raise BadField(f"field {column!r}: is text that {reason}")
        raise BadField(
            f"field {column!r}: is text, no list of messages, nor turns under names like 'Human:' and 'Assistant:'"
        )
    return list(turns)


def _history(record: Record, column: str | None) -> Any:
    """Earlier questions and answers: a list of pairs, or messages."""
    value = record.get(column) if column else None
    return decode_nested(value) if isinstance(value, str) else value


def _add_system(reader: _Reader, text: Any, column: str | None) -> None:
    text = system_text(text, f"field {column!r}")
    if text is None or (isinstance(text, str) and says_nothing(text)):
        return
    if not isinstance(text, str):
        raise BadField(f"field {column!r} is {describe_type(text)}, not text")
    first = reader.messages[0]
    if first["role"] != "system":
        reader.messages.insert(0, {"role": "system", "content": text})
        reader.trained.insert(0, None)
        reader.asked.insert(0, False)
    elif first["content"].strip() != text.strip():
        raise BadField(f"field {column!r} differs from the system turn that the conversation has")


def _tools_of_turns(messages: list[Message], tools: list[Record] | None) -> list[Record] | None:
    """The tools of a conversation, which a turn (ChatGLM's system turn) may describe instead of a column.

    Raises:
        BadField: It describes others than the column, or than another turn.
    """
    for number, message in enumerate(messages, start=1):
        own = read_tools(message["tools"], "tools") if "tools" in message else None
        if own and tools and own != tools:
            raise BadField(f"message {number} describes other tools than those that the conversation has already")
        tools = own or tools
    return tools


def _without_ending(message: Message, ending: str) -> Message:
    said = message["content"].rstrip()
    is_ended = message["role"] == "assistant" and said.endswith(ending)
    return {**message, "content": said.removesuffix(ending)} if is_ended else message


def _documents(record: Record, column: str | None) -> list[Record] | None:
    value = record.get(column) if column else None
    value = decode_nested(value) if isinstance(value, str) else value
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise BadField(f"field {column!r} is no list of documents (objects)")
    return value


def _settings(record: Record, column: str | None) -> dict[str, Any]:
    value = record.get(column) if column else None
    value = decode_nested(value) if isinstance(value, str) else value
    if not value:
        return {}
    if not isinstance(value, dict):
        raise BadField(f"field {column!r} is {describe_type(value)}, not an object of template settings")
    return value
