"""Skeleton of a rendered conversation: the template's own words, and the places where those of the messages stand."""

import re
from bisect import bisect_right
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
    def of_words(cls, text: str, own_words: str, parts: Sequence[Part], lows: dict[int, int]) -> "Skeleton":
        """Finds the parts in a conversation that was printed without marks, one after the other.

        For templates that look at the words themselves and so print marks otherwise. A part that does not stand after
        the one before it is looked for among those of its message, and then from the start; ids are left to the
        template's own words.

        Args:
            text: As printed.
            own_words: The same with what no part can be (control tokens) blotted out.
            parts: What to find.
            lows: Number of a message → from where on it may stand.
        """
        found: list[tuple[int, int, int]] = []
        at = 0  # end of the part before
        message = -1
        for number in sorted(range(len(parts)), key=lambda n: (parts[n].message, KINDS.index(parts[n].kind), n)):
            part = parts[number]
            if part.kind == "id":
                continue
            low = lows.get(part.message, 0)
            at = max(low, at) if part.message == message else low
            message = part.message
            place = next((p for start in (at, low, 0) if (p := _find(own_words, part, found, start))), None)
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
        before = bisect_right(self.ends, position)
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


def _find(text: str, part: Part, taken: list[tuple[int, int, int]], at: int) -> tuple[int, int] | None:
    """The first place of a part, from here on, that no other part holds."""
    for form in dict.fromkeys(part.forms()):
        start = text.find(form, at)
        while start >= 0:
            end = start + len(form)
            if all(end <= low or high <= start for low, high, _ in taken):
                return start, end
            start = text.find(form, start + 1)
    return None
