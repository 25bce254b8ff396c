"""Word cache: texts to token ids, the same as the tokenizer gives but faster, as words that were met are looked up.

A fast tokenizer spends 1.7 µs on a token; a look-up takes a tenth of that, and prose repeats its words: `prepare` takes
0.40 of the processor time that it takes without (benchmarks/data.md).

Texts are cut into pieces that the tokenizer treats independently, in one of two ways, both exact. An ASCII text under a
byte-level tokenizer is cut by the tokenizer's own pattern, which Python's `re` understands once its Unicode classes are
written as the ASCII letters and digits in them. Any other text is cut before a space that follows a printable ASCII
character and precedes a letter or digit, where no token of the vocabulary reaches across such a place.
"""

import re
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

from tokenizers import Tokenizer

LONGEST_WORD = 32  # letters; longer pieces, and whole texts, are not kept at all
MOST_WORDS = 2**15  # of each generation; two take about 20 MB
PROVED_BY = 64  # texts compared with the tokenizer's own answer before the cuts are trusted

Correction = Callable[[Tokenizer, list[str], list[list[int]]], list[list[int]]]
Cut = Callable[[str], list[str]]

BEFORE_WORD = re.compile(r"(?<=[!-~])(?= [A-Za-z0-9])")
REACHES_ACROSS = re.compile(r"[!-~][Ġ▁ ]")  # how byte-level, SentencePiece-like and other vocabularies write a space
UNICODE_FORMS = {"NFC", "NFD", "NFKC", "NFKD"}  # normalisers that leave ASCII as it is
LOCAL_STEPS = UNICODE_FORMS | {
    "Sequence", "Lowercase", "Replace", "Prepend", "ByteLevel", "Metaspace", "Split", "Digits", "Punctuation",
}  # fmt: skip
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # of ByteLevel itself
ASCII_PARTS = {"L": "A-Za-z", "Lu": "A-Z", "Ll": "a-z", "N": "0-9", "Nd": "0-9", "Lt": "", "Lm": "", "Lo": "", "M": ""}


class _Words:
    """Pieces and their ids for one variant of a tokenizer; those not met for a while are forgotten.

    Two generations: when the younger is full it becomes the older, and a piece found only there moves back up. So
    the words of a language stay, and formulas and numbers, which seldom come again, pass through.
    """

    def __init__(self, backend: Tokenizer, correct: Correction, most_words: int) -> None:
        self._backend, self._correct, self._most_words = backend, correct, most_words
        self._older: dict[str, list[int]] = {}
        self.known: dict[str, list[int]] = {}
        self._passing: list[str] = []  # in `known` until the next batch only

    def learn(self, pieces: set[str]) -> None:
        """Makes `known` hold the ids of all these pieces."""
        for piece in self._passing:
            del self.known[piece]
        if len(self.known) > self._most_words:
            self._older, self.known = self.known, {}
        missing = pieces.difference(self.known)
        remembered = missing.intersection(self._older)
        self.known.update((piece, self._older[piece]) for piece in remembered)
        unmet = list(missing.difference(remembered))
        self._passing = [piece for piece in unmet if len(piece) > LONGEST_WORD]
        self.known.update(zip(unmet, self.tokenise(unmet), strict=True))

    def tokenise(self, texts: list[str]) -> list[list[int]]:
        """The tokenizer's own answer."""
        # Not encode_batch_fast: it leaves the offsets out, but in tokenizers 0.23 it takes 1.6 times as long.
        encoded = self._backend.encode_batch(texts, add_special_tokens=False)
        return self._correct(self._backend, texts, [encoding.ids for encoding in encoded])


class WordCache:
    """Encodes texts with one tokenizer, in two variants: at the start of a row, and inside one.

    Args:
        cut: How texts may be cut into words, if they may.
        at_start: Tokenizer for the first words of a text at the start of a row.
        inside: Tokenizer for all other words; may be the same.
        correct: Called with the variant, texts and the ids of each; returns the ids to use.
        most_words: Words kept, twice over (see `_Words`).
    """

    def __init__(
        self,
        cut: Cut | None,
        at_start: Tokenizer,
        inside: Tokenizer,
        correct: Correction,
        most_words: int = MOST_WORDS,
    ) -> None:
        self._inside = _Words(inside, correct, most_words)
        self._first = self._inside if at_start is inside else _Words(at_start, correct, most_words)
        self._cut = cut
        self._is_proved = False

    @property
    def is_cutting(self) -> bool:
        """Whether words are looked up, or whole texts are tokenised."""
        return self._cut is not None

    def encode(self, texts: Sequence[str], starts: Sequence[bool]) -> list[list[int]]:
        """The ids of each text; `starts` says which of them stand at the start of a row."""
        if self._cut is not None and not self._is_proved:
            self._is_proved = True
            sample, sample_starts = texts[:PROVED_BY], starts[:PROVED_BY]
            whole = self._encode_whole(sample, sample_starts)
            if self._encode_in_words(self._cut, sample, sample_starts) != whole:
                self._cut = None  # whatever was overlooked, the tokenizer's own answer counts
        if self._cut is None:
            return self._encode_whole(texts, starts)
        return self._encode_in_words(self._cut, texts, starts)

    def _encode_whole(self, texts: Sequence[str], starts: Sequence[bool]) -> list[list[int]]:
        both = list(zip(texts, starts, strict=True))
        first = iter(self._first.tokenise([text for text, start in both if start]))
        inside = iter(self._inside.tokenise([text for text, start in both if not start]))
        return [next(first if start else inside) for start in starts]

    def _encode_in_words(self, cut: Cut, texts: Sequence[str], starts: Sequence[bool]) -> list[list[int]]:
        pieces = list(map(cut, texts))
        rest = pieces
        if self._first is not self._inside:
            both = list(zip(pieces, starts, strict=True))
            self._first.learn({words[0] for words, start in both if start and words})
            rest = [words[1:] if start else words for words, start in both]
        self._inside.learn(set(chain.from_iterable(rest)))
        first, word = self._first.known.__getitem__, self._inside.known.__getitem__
        return [
            [*first(words[0]), *chain.from_iterable(map(word, words[1:]))]
            if start and words
            else list(chain.from_iterable(map(word, words)))
            for words, start in zip(pieces, starts, strict=True)
        ]


def find_cut(description: dict[str, Any]) -> Cut | None:
    """How texts may be cut for this tokenizer; None if they may not.

    Args:
        description: The tokenizer.json, parsed; special tokens are taken for text (see `encoding`).
    """
    model = description["model"]
    if model["type"] not in ("BPE", "Unigram") or model.get("dropout"):
        return None
    ordinary = [token for token in description["added_tokens"] if not token["special"]]
    if any(token["lstrip"] or token["rstrip"] or token["single_word"] for token in ordinary):
        return None
    vocabulary = model["vocab"] if isinstance(model["vocab"], dict) else (piece for piece, _ in model["vocab"])
    steps = _types(description.get("normalizer")) | _types(description.get("pre_tokenizer"))
    reaches_across = any(map(REACHES_ACROSS.search, (*vocabulary, *(token["content"] for token in ordinary))))
    by_word = None if reaches_across or not steps <= LOCAL_STEPS else BEFORE_WORD.split
    pattern = _own_pattern(description)
    if pattern is None:
        return by_word
    contents = [re.escape(token["content"]) for token in ordinary]
    holds_ordinary = re.compile("|".join(contents) or "(?!)").search  # added tokens are cut out before the pattern

    def cut(text: str) -> list[str]:
        if text.isascii() and not holds_ordinary(text):
            pieces = pattern.findall(text)
            if sum(map(len, pieces)) == len(text):
                return pieces
        return by_word(text) if by_word else [text]

    return cut


def _own_pattern(description: dict[str, Any]) -> re.Pattern[str] | None:
    """The pattern by which a byte-level tokenizer cuts ASCII texts, if it has one that `re` can follow."""
    if not _types(description.get("normalizer")) <= UNICODE_FORMS | {"Sequence"}:
        return None
    first = description.get("pre_tokenizer") or {}
    steps = first["pretokenizers"] if first.get("type") == "Sequence" else [first]
    if any(step.get("add_prefix_space") for step in steps):
        return None
    match steps:
        case [{"type": "ByteLevel", "use_regex": True}]:
            return _in_ascii(GPT2_PATTERN)
        case [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "use_regex": False},
        ]:
            return _in_ascii(pattern)
    return None


def _in_ascii(pattern: str) -> re.Pattern[str] | None:
    """A pattern with Unicode classes as one for ASCII texts; None where it uses more than those."""
    written = ""
    is_in_class = False
    for part in re.findall(r"\\p\{\w+\}|\\.|.", pattern, re.DOTALL):
        if part.startswith(r"\p{"):
            letters = ASCII_PARTS.get(part[3:-1])
            if letters is None or (not letters and not is_in_class):
                return None
            part = letters if is_in_class else f"[{letters}]"
        elif part in (r"\P", r"\p", "&") or (part == "[" and is_in_class):
            return None  # negated classes, intersections, classes within classes
        elif part in "[]":
            is_in_class = part == "["
        written += part
    try:
        compiled = re.compile(written, re.ASCII)
    except re.error:
        return None
    return compiled if not compiled.groups else None  # findall would give the groups


def _types(part: Any) -> set[str]:
    """Types of a normalizer or pre-tokenizer and of all it is made of."""
    if isinstance(part, list):
        return set().union(*map(_types, part))
    if not isinstance(part, dict) or "type" not in part:
        return set()
    return {part["type"]}.union(*(_types(inner) for inner in part.values() if isinstance(inner, list)))
