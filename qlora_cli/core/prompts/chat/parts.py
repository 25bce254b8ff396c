"""Parts of a conversation: what its messages say, each replaced by a mark of its own, so that it is found again.

A conversation with marks in place of its words is its shape: all that a template can tell apart but the words
themselves. What is worked out for one shape holds for every conversation of it.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from qlora_cli.core.prompts.chat.thoughts import THOUGHTS, find_thought

Message = dict[str, Any]

IDS = ("id", "tool_call_id")
SHORTEST_ID = 6  # letters; shorter ones stay as they are
MARK_LETTERS = ("Zq", "Zj", "Zx", "Qz", "Jq", "Xq")
_TAG = re.compile(r"</?[A-Za-z_][\w.:-]*>|\[/?[A-Z_]+\]|<\|[^<>|\s]+\|>")


@dataclass(frozen=True, slots=True)
class Part:
    """What was replaced by one mark.

    Attributes:
        message: Number of its message, from 0.
        kind: text, thought, call or id.
        name: What it is, for a sentence: "the text", "argument 'lake' of call 1 (get_depth)".
        value: Its words, without the white space around them.
    """

    message: int
    kind: str
    name: str
    value: str

    def forms(self) -> Iterator[str]:
        """The ways in which a template may write the words: as they are, in JSON, in ASCII JSON, in Python."""
        yield self.value
        yield json.dumps(self.value, ensure_ascii=False)[1:-1]
        yield json.dumps(self.value)[1:-1]
        yield repr(self.value)[1:-1]


@dataclass(frozen=True, slots=True)
class Plain:
    """What stands in a conversation unmarked and must be printed all the same: names, keys, numbers.

    Attributes:
        message: Number of its message; -1 for what the tools are.
        name: What it is, for a sentence.
        forms: The ways in which a template may write it.
    """

    message: int
    name: str
    forms: tuple[str, ...]


@dataclass
class MarkedConversation:
    """A conversation with marks, and what they stand for.

    Attributes:
        messages: With a mark in place of every text.
        parts: In order of the marks' numbers.
        plain: What stays unmarked.
    """

    messages: list[Message] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    plain: list[Plain] = field(default_factory=list)


class Marker:
    """Marks conversations for one template.

    Texts are cut at the tags that the template's own source holds (a template that looks for </think> must find it),
    and white space stays where it is, so that a template that strips texts strips the marked ones alike.
    """

    def __init__(self, template: str, beside: str = "") -> None:
        """Chooses letters for the marks that neither the template nor what is `beside` it holds. `doubled` finds an opening
        tag of the template's that stands twice."""
        letters = next((pair for pair in MARK_LETTERS if pair not in template and pair not in beside), MARK_LETTERS[0])
        self._letters = letters
        self.pattern = re.compile(f"{letters}([0-9]+)q+")
        tags = sorted(set(_TAG.findall(template)), key=len, reverse=True)
        self._tags = re.compile("(" + "|".join(map(re.escape, tags)) + ")") if tags else None
        opening = [tag for tag in tags if tag[1] not in "/|"]
        self.doubled = re.compile("(" + "|".join(map(re.escape, opening)) + r")\s*\1") if opening else None

    def mark(self, messages: list[Message]) -> MarkedConversation:
        """The same conversation with a mark in place of every text."""
        marked = MarkedConversation()
        ids: dict[str, str] = {}
        for number, message in enumerate(messages):
            marked.messages.append(self._mark_message(message, number, marked, ids))
        return marked

    def keep(self, messages: list[Message]) -> MarkedConversation:
        """The same conversation as it is, with the parts that its marks would have stood for."""
        marked = self.mark(messages)
        marked.messages = messages
        return marked

    def _mark_message(self, message: Message, number: int, marked: MarkedConversation, ids: dict[str, str]) -> Message:
        replaced: dict[str, str] = {}  # the same thought under several names is one part

        def replace(text: str, kind: str, name: str) -> str:
            if kind == "thought":
                if text not in replaced:
                    replaced[text] = self._mark_text(text, number, kind, name, marked)
                return replaced[text]
            return self._mark_text(text, number, kind, name, marked)

        result: Message = {}
        for key, value in message.items():
            if key in THOUGHTS and isinstance(value, str):
                result[key] = replace(value, "thought", "the thought")
            elif key == "content" and isinstance(value, str):
                result[key] = self._mark_content(value, message, replace)
            elif key == "tool_calls" and isinstance(value, list):
                result[key] = [
                    self._mark_call(call, number, order, marked, ids) for order, call in enumerate(value, start=1)
                ]
            elif key in IDS and isinstance(value, str):
                result[key] = self._mark_id(value, number, marked, ids)
            else:
                result[key] = value
        return result

    def _mark_content(self, text: str, message: Message, replace: Callable[[str, str, str], str]) -> str:
        """An assistant's text may open with a thought between tags."""
        thought = find_thought(text) if message.get("role") == "assistant" else None
        if thought is None:
            return replace(text, "text", "the text")
        end = len(text[: thought.end()].rstrip())
        return replace(text[:end], "thought", "the thought") + replace(text[end:], "text", "the text")

    def _mark_text(self, text: str, number: int, kind: str, name: str, marked: MarkedConversation) -> str:
        if self._tags is None:
            return self._mark_piece(text, number, kind, name, marked)
        pieces = self._tags.split(text)
        return "".join(
            piece if place % 2 else self._mark_piece(piece, number, kind, name, marked)
            for place, piece in enumerate(pieces)
        )

    def _mark_piece(self, text: str, number: int, kind: str, name: str, marked: MarkedConversation) -> str:
        core = text.strip()
        if not core:
            return text
        start = text.index(core)
        mark = f"{self._letters}{len(marked.parts)}q"
        marked.parts.append(Part(number, kind, name, core))
        return text[:start] + mark + text[start + len(core) :]

    def _mark_id(self, value: str, number: int, marked: MarkedConversation, ids: dict[str, str]) -> str:
        """Templates compare ids, and some count their letters: a mark as long, the same for the same id."""
        if len(value) < SHORTEST_ID:
            return value
        if value not in ids:
            ids[value] = f"{self._letters}{len(marked.parts)}".ljust(len(value), "q")
            marked.parts.append(Part(number, "id", "an id", value))
        return ids[value]

    def _mark_call(self, call: Any, number: int, order: int, marked: MarkedConversation, ids: dict[str, str]) -> Any:
        if not isinstance(call, dict):
            return call
        inner_call = call.get("function")
        function: dict[str, Any] = inner_call if isinstance(inner_call, dict) else call
        name = f"call {order}"
        if isinstance(function.get("name"), str):
            name += f" ({function['name']})"
            marked.plain.append(Plain(number, f"the name of {name}", (function["name"],)))
        result: dict[str, Any] = {}
        for key, value in call.items():
            if key == "function" and isinstance(value, dict):
                result[key] = {
                    inner: self._mark_arguments(item, number, name, marked) if inner == "arguments" else item
                    for inner, item in value.items()
                }
            elif key == "arguments" and function is call:
                result[key] = self._mark_arguments(value, number, name, marked)
            elif key in IDS and isinstance(value, str):
                result[key] = self._mark_id(value, number, marked, ids)
            else:
                result[key] = value
        return result

    def _mark_arguments(self, value: Any, number: int, call: str, marked: MarkedConversation, path: str = "") -> Any:
        where = f"argument {path!r} of {call}" if path else f"the arguments of {call}"
        if isinstance(value, str):
            return self._mark_text(value, number, "call", where, marked)
        if isinstance(value, dict):
            result = {}
            for key, item in value.items():
                inner = f"{path}.{key}" if path else str(key)
                marked.plain.append(Plain(number, f"argument {inner!r} of {call}", _forms_of(key)))
                result[key] = self._mark_arguments(item, number, call, marked, inner)
            return result
        if isinstance(value, list):
            return [self._mark_arguments(item, number, call, marked, path) for item in value]
        marked.plain.append(Plain(number, where, _forms_of(value)))
        return value


def plain_of_tools(tools: list[Any] | None) -> list[Plain]:
    """What the schemas of tools say: names, descriptions, parameters and allowed values."""
    found: dict[tuple[str, ...], Plain] = {}

    def add(name: str, value: Any) -> None:
        forms = _forms_of(value)
        found.setdefault(forms, Plain(-1, name, forms))

    def walk(value: Any, tool: str) -> None:
        if isinstance(value, list):
            for item in value:
                walk(item, tool)
        if not isinstance(value, dict):
            return
        for key, item in value.items():
            if key in ("name", "description") and isinstance(item, str) and item.strip():
                add(f"the {key} {item[:40]!r} of {tool}", item.strip())
            elif key == "properties" and isinstance(item, dict):
                for parameter, schema in item.items():
                    add(f"parameter {parameter!r} of {tool}", parameter)
                    walk(schema, tool)
            elif key == "enum" and isinstance(item, list):
                for allowed in item:
                    add(f"the allowed value {allowed!r} of {tool}", allowed)
            else:
                walk(item, tool)

    for number, tool in enumerate(tools or [], start=1):
        function = tool.get("function") if isinstance(tool, dict) else None
        named = function if isinstance(function, dict) else tool
        name = named.get("name") if isinstance(named, dict) else None
        walk(tool, f"tool {number} ({name})" if name else f"tool {number}")
    return list(found.values())


def _forms_of(value: Any) -> tuple[str, ...]:
    """The ways in which a template may write a value that is no marked text: as it is, in JSON or in Python."""
    if isinstance(value, str):
        return tuple(dict.fromkeys(Part(0, "", "", value).forms()))
    text = json.dumps(value, ensure_ascii=False, default=str)
    forms = [text, str(value)]
    if isinstance(value, float) and value.is_integer():
        forms.append(str(int(value)))
    return tuple(dict.fromkeys(forms))
