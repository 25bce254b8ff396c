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


# A key of YAML, an argument or a field of code.
_KEY = re.compile(r"^(?P<indent>[ \t]*)(?P<name>[a-z_][\w.-]*)\??:", re.MULTILINE)
INSTRUCTION_END = "[/INST]"  # of Llama 2 and Mistral
KEYS_BEFORE = 3  # an answer that make its heading one of them; "context:" and "title:" may stand before a question


class _Heading(NamedTuple):
    text: str
    role: str
    style: tuple[str, str]  # what stands around the name
    start: int
    end: int


def headings_of(text: str) -> tuple[str, str] | None:
    """The headings of the first question of a dialogue and of the answer to it; None where a text is none."""
    asked, answered = _first_of_each(_find(text))
    return (asked.text, answered.text) if asked and answered else None


def opening_of(text: str) -> str | None:
    """The heading of an answer that a text ends in, under which it is still to come; None where it ends in none."""
    if text.rstrip().endswith(INSTRUCTION_END):
        return INSTRUCTION_END
    last = next(reversed(_find(text)), None)
    return last.text if last and last.role == "assistant" and not text[last.end :].strip() else None


def are_keys(text: str) -> bool:
    """Whether the headings of a text that may be a dialogue are rather keys of YAML, or names in code, among others."""
    asked, answered = _first_of_each(_find(text))
    if asked is None or answered is None or asked.style != ("", ":") or not asked.text.islower():
        return False
    indent = text[asked.start : asked.end].partition(asked.text)[0]
    keys = [key for key in _KEY.finditer(text) if key["indent"] == indent and key["name"] not in NAMES]
    return bool(keys) if indent else sum(key.start() < answered.start for key in keys) >= KEYS_BEFORE


def _first_of_each(found: list[_Heading]) -> tuple[_Heading | None, _Heading | None]:
    asked = next((heading for heading in found if heading.role == "user"), None)
    replies = (h for h in found if asked and h.role == "assistant" and h.style == asked.style and h.start > asked.start)
    return asked, next(replies, None)


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
