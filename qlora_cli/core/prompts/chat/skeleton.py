"""Skeleton of a rendered conversation: the template's own words, and the places where those of the messages stand."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from qlora_cli.core.prompts.chat.parts import Part

KINDS = ("thought", "text", "call", "id")  # in the order in which most templates print them
Place = tuple[int, int]  # after how many marks of the skeleton, and how many letters further on


@dataclass(frozen=True, slots=True)
class Skeleton:
    """A conversation as a template printed it with marks.

    Attributes:
        text: As printed.
        literals: (marks + 1,) the template's own words around the marks.
        marks: (marks,) number of the part that each stands for, in the order printed.
        starts: (marks,) where each begins in `text`.
        ends: (marks,) where each ends.
    """

    text: str
    literals: tuple[str, ...]
    marks: tuple[int, ...]
    starts: tuple[int, ...]
    ends: tuple[int, ...]

    @classmethod
    def of_marked(cls, text: str, pattern: re.Pattern[str]) -> "Skeleton":
        """Reads a conversation that was printed with marks."""
        found = list(pattern.finditer(text))
        return cls._of(text, [int(match[1]) for match in found], [m.start() for m in found], [m.end() for m in found])

    @classmethod
    def of_words(cls, text: str, parts: Sequence[Part]) -> "Skeleton":
        """Finds the parts in a conversation that was printed without marks, one after the other.

        For templates that look at the words themselves and so print marks otherwise. A part that does not stand after
        the one before it is looked for among those of its message, and then from the start; ids are left to the
        template's own words.
        """
        found: list[tuple[int, int, int]] = []
        in_order = sorted(range(len(parts)), key=lambda n: (parts[n].message, KINDS.index(parts[n].kind), n))
        at = low = 0  # end of the part before, and of the messages before
        message = -1
        for number in in_order:
            part = parts[number]
            if part.kind == "id":
                continue
            if part.message != message:
                message, low = part.message, at
            place = _find(text, part, at) or _find_free(text, part, found, low) or _find_free(text, part, found, 0)
            if place is not None:
                found.append((*place, number))
                at = max(at, place[1])
        found.sort()
        return cls._of(text, [n for _, _, n in found], [s for s, _, _ in found], [e for _, e, _ in found])

    @classmethod
    def _of(cls, text: str, marks: list[int], starts: list[int], ends: list[int]) -> "Skeleton":
        borders = [(0, 0), *zip(starts, ends, strict=True), (len(text), len(text))]
        literals = tuple(text[before[1] : after[0]] for before, after in pairwise(borders))
        return cls(text, literals, tuple(marks), tuple(starts), tuple(ends))

    def place_of(self, position: int) -> Place:
        """A position in `text` that is not within a mark, as a place."""
        before = sum(end <= position for end in self.ends)
        return before, position - (self.ends[before - 1] if before else 0)

    def match(self, text: str, parts: Sequence[Part]) -> list[int] | None:
        """Where each mark ends in the same conversation with its own words; None if it is not the same.

        Returns:
            (marks + 1,) positions in `text`, of which the first is 0.
        """
        if not text.startswith(self.literals[0]):
            return None
        ends = [0]
        at = len(self.literals[0])
        for number, literal in zip(self.marks, self.literals[1:], strict=True):
            part = parts[number]
            for form in (part.value,) if text.startswith(part.value + literal, at) else part.forms():
                end = at + len(form)
                if text.startswith(form, at) and text.startswith(literal, end):
                    break
            else:
                return None
            ends.append(end)
            at = end + len(literal)
        return ends if at == len(text) else None


def position_of(place: Place, ends: list[int]) -> int:
    """A place in a text that was matched."""
    return ends[place[0]] + place[1]


def _find(text: str, part: Part, at: int) -> tuple[int, int] | None:
    for form in part.forms():
        start = text.find(form, at)
        if start >= 0:
            return start, start + len(form)
    return None


def _find_free(text: str, part: Part, taken: list[tuple[int, int, int]], at: int) -> tuple[int, int] | None:
    """The first place of a part, from here on, that no other part holds."""
    while place := _find(text, part, at):
        if all(place[1] <= start or end <= place[0] for start, end, _ in taken):
            return place
        at = place[0] + 1
    return None
