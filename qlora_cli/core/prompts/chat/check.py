"""Check of a rendered row: all that its messages hold is in it, once, in order, in the turn that it belongs to."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Any

from qlora_cli.core.prompts.chat.parts import MarkedConversation, Part, Plain, plain_of_tools
from qlora_cli.core.prompts.chat.skeleton import Skeleton
from qlora_cli.core.prompts.chat.thoughts import EMPTY

Span = tuple[int, int]
LEFT_OUT = "leaves out"


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that a message holds and the row does not, or not where it belongs.

    Attributes:
        message: Number of the message, from 0; -1 for the tools.
        kind: text, thought, call or tool, for counting.
        name: What it is: "call 1 (get_depth)".
        problem: What became of it: "leaves out", "prints twice".
        place: Where it is instead, for a sentence.
    """

    message: int
    kind: str
    name: str
    problem: str = LEFT_OUT
    place: str = ""

    def __str__(self) -> str:
        whose = f" of message {self.message + 1}" if self.message >= 0 else ""
        return f"{self.problem} {self.name}{whose}{self.place}"


def check_row(
    conversation: MarkedConversation,
    skeleton: Skeleton,
    upto: int,
    spans: dict[int, Span],
    trained: set[int],
    tools: list[Any] | None,
    doubled: re.Pattern[str] | None = None,
) -> list[Fault]:
    """What is wrong with a row.

    Args:
        conversation: What it was made of.
        skeleton: What the template printed.
        upto: Messages in the row.
        spans: Number of a message → where its turn starts and ends in `skeleton.text`, for the answers.
        trained: Answers that the row is for: of others, a template may leave the thoughts out.
        tools: Descriptions that were given to the template.
        doubled: Finds an opening tag of the template's that stands twice.
    """
    faults = list(_check_parts(conversation.parts, skeleton, upto, spans, trained))
    faults += _check_order(conversation, skeleton)
    faults += _check_wrappers(conversation, skeleton, spans, trained, doubled)
    own_words = _without_marks(skeleton)
    outside = own_words
    for start, end in spans.values():
        outside = outside[:start] + "\0" * (end - start) + outside[end:]
    for plain in conversation.plain:
        if plain.message < upto:
            start, end = spans.get(plain.message, (0, len(own_words)))
            if not _holds(own_words[start:end], plain):
                faults.append(Fault(plain.message, "call", plain.name))
    for plain in plain_of_tools(tools):
        if not _holds(outside, plain):
            faults.append(Fault(-1, "tool", plain.name))
    return faults


def _check_parts(
    parts: list[Part], skeleton: Skeleton, upto: int, spans: dict[int, Span], trained: set[int]
) -> Iterator[Fault]:
    printed = Counter(skeleton.marks)
    for number, part in enumerate(parts):
        if part.message >= upto or part.kind == "id":
            continue
        if not printed[number]:
            if part.kind != "thought" or part.message in trained:
                yield Fault(part.message, part.kind, part.name)
        elif printed[number] > 1:
            yield Fault(part.message, part.kind, part.name, "prints twice")
    for number, start, end in zip(skeleton.marks, skeleton.starts, skeleton.ends, strict=True):
        part = parts[number]
        if part.kind == "id":
            continue
        around = next((turn for turn, (low, high) in spans.items() if low <= start and end <= high), None)
        if part.message in spans and around != part.message:
            yield Fault(part.message, part.kind, part.name, "prints", " outside of its turn")
        elif part.message not in spans and around is not None:
            yield Fault(part.message, part.kind, part.name, "prints", f" as words of message {around + 1}")


def _check_order(conversation: MarkedConversation, skeleton: Skeleton) -> Iterator[Fault]:
    """Texts come in the order of their messages, but for those of system turns, which some templates print later."""
    latest = -1
    for number in skeleton.marks:
        part = conversation.parts[number]
        role = conversation.messages[part.message].get("role")
        if part.kind != "text" or role in ("system", "developer"):
            continue
        if number < latest:
            yield Fault(part.message, "text", part.name, "prints", " after that of a later message")
        latest = max(latest, number)


def writes_empty_thought(conversation: MarkedConversation, skeleton: Skeleton, spans: dict[int, Span]) -> bool:
    """Whether one of these answers begins with an empty thought that its message does not hold; see `_has_empty_thought`."""
    if EMPTY.search(skeleton.text) is None:
        return False
    return any(_has_empty_thought(conversation, skeleton, turn, span) for turn, span in spans.items())


def _has_empty_thought(conversation: MarkedConversation, skeleton: Skeleton, turn: int, span: Span) -> bool:
    """Whether an answer begins with an empty thought that its message does not hold, or goes on behind one that the prompt
    opens."""
    own = [
        start for n, start in zip(skeleton.marks, skeleton.starts, strict=True) if conversation.parts[n].message == turn
    ]
    high = min([*own, span[1]])
    low = max((end for end in skeleton.ends if end <= span[0]), default=0)
    found = [match for match in EMPTY.finditer(skeleton.text, low, high) if match.end() > span[0]]
    return bool(found) and EMPTY.search(str(conversation.messages[turn].get("content"))) is None


def _check_wrappers(
    conversation: MarkedConversation,
    skeleton: Skeleton,
    spans: dict[int, Span],
    trained: set[int],
    doubled: re.Pattern[str] | None,
) -> Iterator[Fault]:
    """Tags that a message's words stand between already, and an empty thought before an answer that has one."""
    parts = conversation.parts
    if doubled is not None:
        for match in doubled.finditer(skeleton.text):
            inside = (n for n, start in zip(skeleton.marks, skeleton.starts, strict=True) if start >= match.end())
            part = next((parts[number] for number in inside if parts[number].kind != "id"), None)
            content = str(conversation.messages[part.message].get("content")).lstrip() if part else ""
            if part and content.startswith(match[1]) and not doubled.match(content):
                yield Fault(part.message, part.kind, part.name, f"writes {match[1]} once more around")
    thinking = {part.message: part for part in parts if part.kind == "thought"}
    for turn in trained & thinking.keys():
        if _has_empty_thought(conversation, skeleton, turn, spans[turn]):
            yield Fault(turn, "thought", thinking[turn].name, "writes an empty thought before")


def _without_marks(skeleton: Skeleton) -> str:
    blanks = ("\0" * (end - start) for start, end in zip(skeleton.starts, skeleton.ends, strict=True))
    return "".join(chain.from_iterable(zip_longest(skeleton.literals, blanks, fillvalue="")))


def _holds(text: str, plain: Plain) -> bool:
    """Whether a value is printed, and not as a piece of a longer word."""
    for form in plain.forms:
        if form in text:
            before = r"(?<!\w)" if form[:1].isalnum() else ""
            after = r"(?!\w)" if form[-1:].isalnum() else ""
            if re.search(before + re.escape(form) + after, text):
                return True
    return False
