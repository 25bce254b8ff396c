"""Thoughts of answers: where a message holds them, and which of them are kept."""

import re
from collections.abc import Callable
from typing import Any

THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # fields of a message, as transformers knows them
TAGS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<reasoning>", "</reasoning>"),
    ("<thought>", "</thought>"),
    ("[THINK]", "[/THINK]"),
)
_OPENING = re.compile(
    "|".join(rf"\s*(?:{re.escape(tag)})?(.*?){re.escape(closing)}\s*" for tag, closing in TAGS), re.DOTALL
)
EMPTY = re.compile("|".join(rf"{re.escape(opening)}\s*{re.escape(closing)}" for opening, closing in TAGS))
_PROBES = ("Surely-17", "Certainly-43")  # a thought and an answer that no template writes by itself


def find_thought(text: str) -> re.Match[str] | None:
    """The thought that an answer opens with: tags and white space around it included, the one group that is set without."""
    if "</" not in text and "[/" not in text:
        return None
    return _OPENING.match(text)


def share_names(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its thought under the names that templates read, as transformers gives it to them."""
    thought = next((message[name] for name in THOUGHTS if message.get(name) is not None), None)
    if thought is None:
        return message
    return {"thinking": thought, **message, "reasoning_content": thought}


def keep_thoughts(messages: list[dict[str, Any]], wanted: str) -> list[dict[str, Any]]:
    """The messages with the thoughts that are wanted.

    Args:
        messages: role and content of each.
        wanted: keep (every one), last (that of the last answer) or drop (none).
    """
    if wanted == "keep":
        return messages
    answers = [i for i, message in enumerate(messages) if message.get("role") == "assistant"]
    kept = answers[-1:] if wanted == "last" else []
    return [
        _without_thought(message) if i in answers and i not in kept else message for i, message in enumerate(messages)
    ]


def _without_thought(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    thought = find_thought(content) if isinstance(content, str) else None
    rest = {key: value for key, value in message.items() if key not in THOUGHTS}
    return {**rest, "content": content[thought.end() :]} if thought and isinstance(content, str) else rest


def doubles_thoughts(attempt: Callable[[list[dict[str, Any]]], Any], template: str) -> set[bool]:
    """Before which answers a template writes a block of its own, though they open with a thought, but takes one by name:
    those whose thought has its opening tag (True), and those that have the closing one alone (False), as a model gives them
    whose prompt has the other (huggingface/trl#6361).

    Args:
        attempt: Prints a conversation, or returns why the template refuses it.
        template: Its source.
    """
    thought, answer = _PROBES
    question = {"role": "user", "content": "Hi"}
    for opening, closing in TAGS:
        if opening not in template:
            continue
        by_name = attempt(
            [question, share_names({"role": "assistant", "content": answer, "reasoning_content": thought})]
        )
        if not (isinstance(by_name, str) and thought in by_name and answer in by_name):
            continue
        doubled = set()
        for opened, begins in ((True, f"{opening}\n"), (False, "")):
            given = {"role": "assistant", "content": f"{begins}{thought}\n{closing}\n\n{answer}"}
            inline = attempt([question, given])
            if isinstance(inline, str) and any(inline.count(tag) > by_name.count(tag) for tag in (opening, closing)):
                doubled.add(opened)
        return doubled
    return set()


def name_thought(message: dict[str, Any], doubled: set[bool]) -> dict[str, Any]:
    """An answer that opens with a thought as one with a thought by name, if it is of those that `doubles_thoughts` found."""
    content = message.get("content")
    if message.get("role") != "assistant" or not isinstance(content, str) or message.get(THOUGHTS[0]):
        return message
    found = find_thought(content)
    if found is None or content.lstrip().startswith(tuple(opening for opening, _ in TAGS)) not in doubled:
        return message
    thought = next(group for group in found.groups() if group is not None).strip()
    return share_names({**message, "content": content[found.end() :], "reasoning_content": thought})
