"""Dialogues: conversations written as one text, each turn under the name of who says it ("Human: ... Assistant: ...")."""

import re
from typing import NamedTuple

NAMES = {
    **dict.fromkeys(("human", "user", "prompter", "question", "instruction", "q"), "user"),
    **dict.fromkeys(("assistant", "chatgpt", "gpt", "chatbot", "bot", "ai", "answer", "response", "a"), "assistant"),
    **dict.fromkeys(("function response", "tool", "observation"), "tool"),
    "system": "system",
}
_WHO = "|".join(sorted(NAMES, key=len, reverse=True))
# "Human:", "**User:**", "<bot>:" and "[|AI|]" begin a line; "### Human:" and "USER:" may stand within one (Guanaco, Vicuna).
_HEADING = re.compile(
    rf"(?P<before>\#{{2,6}}[ ]?|^[ \t]*(?:\*\*|<|\[\|)?|(?<=[\s>])(?=(?-i:USER|ASSISTANT|HUMAN|GPT):))"
    rf"(?P<who>{_WHO})(?P<after>\*\*:|>?[ ]?:(?:\*\*)?|\|\]:?)",
    re.IGNORECASE | re.MULTILINE,
)
_OPTION_B = re.compile(r"^[ \t]*(?:\*\*)?B ?:", re.IGNORECASE | re.MULTILINE)  # the "A:" above it is an option, too


class _Heading(NamedTuple):
    text: str
    role: str
    style: tuple[str, str]  # what stands around the name
    start: int
    end: int


def headings_of(text: str) -> tuple[str, str] | None:
    """The headings of the first question of a dialogue and of the answer to it; None where a text is none."""
    found = _find(text)
    asked = next((heading for heading in found if heading.role == "user"), None)
    replies = (h for h in found if asked and h.role == "assistant" and h.style == asked.style and h.start > asked.start)
    answered = next(replies, None)
    return (asked.text, answered.text) if asked and answered else None


def split_dialogue(text: str) -> list[dict[str, str]] | None:
    """The turns of a dialogue as messages, without white space around them; None where a text is none.

    Turns begin at the two headings that its first question and answer have, and at those of tools and system texts that are
    written alike: others, such as an "Answer:" within what an "Assistant:" says, are words. What stands before the first is a
    system text, and a heading at the end, under which nothing is said, is none.
    """
    if (both := headings_of(text)) is None:
        return None
    found = _find(text)
    styles = {heading.style for heading in found if heading.text in both}
    borders = [h for h in found if h.text in both or (h.role in ("tool", "system") and h.style in styles)]
    turns = [("system", text[: borders[0].start])] if text[: borders[0].start].strip() else []
    ends = [*(heading.start for heading in borders[1:]), len(text)]
    turns += [(heading.role, text[heading.end : end]) for heading, end in zip(borders, ends, strict=True)]
    said = [{"role": role, "content": content.strip()} for role, content in turns]
    return said if said[-1]["content"] else said[:-1]


def _find(text: str) -> list[_Heading]:
    found = [(match, match["who"].lower()) for match in _HEADING.finditer(text)]
    if any(who == "a" for _, who in found) and _OPTION_B.search(text):
        found = [(match, who) for match, who in found if who != "a"]
    return [
        _Heading(match[0].strip(), NAMES[who], (match["before"].strip(), match["after"]), *match.span())
        for match, who in found
    ]
