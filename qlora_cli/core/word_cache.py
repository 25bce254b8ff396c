"""Texts in, token ids out, the same as the tokenizer gives but faster: words that were met before are looked up.

A fast tokenizer spends 1.7 µs on a token; a look-up takes a tenth of that. Prose repeats its words, so a text is cut
before a space that follows a printable ASCII character and precedes a letter or digit, and each piece is tokenised
once. That is exact where no token of the vocabulary reaches across such a cut, which is checked, on the vocabulary
first and then on the first real texts; other tokenizers get whole texts.
"""

import re
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

from tokenizers import Tokenizer

CUT = re.compile(r"(?<=[!-~])(?= [A-Za-z0-9])")
REACHES_ACROSS = re.compile(r"[!-~][Ġ▁ ]")  # how byte-level, SentencePiece-like and other vocabularies write a space
LOCAL_STEPS = {
    "Sequence", "NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Replace", "Prepend", "ByteLevel", "Metaspace", "Split",
    "Digits", "Punctuation",
}  # fmt: skip
LONGEST_WORD = 24  # longer pieces are formulas and addresses, which do not come again
MOST_WORDS = 2**16  # about 20 MB
PROVED_BY = 64  # texts compared with the tokenizer's own answer before the cuts are trusted


class WordCache:
    """Encodes texts with one tokenizer, in two variants: at the start of a row, and inside one.

    Args:
        description: The tokenizer.json, parsed.
        at_start: Tokenizer for the first words of a text at the start of a row.
        inside: Tokenizer for all other words; may be the same.
        correct: Called with the variant, a piece and its ids; returns the ids to use.
    """

    def __init__(
        self,
        description: dict[str, Any],
        at_start: Tokenizer,
        inside: Tokenizer,
        correct: Callable[[Tokenizer, str, list[int]], list[int]],
    ) -> None:
        self._at_start, self._inside, self._correct = at_start, inside, correct
        self._words: dict[str, list[int]] = {}
        self._first_words = self._words if at_start is inside else {}
        self.is_cutting = _is_local(description)
        self._proved = 0

    def encode(self, texts: Sequence[str], starts: Sequence[bool]) -> list[list[int]]:
        """The ids of each text; `starts` says which of them stand at the start of a row."""
        if self.is_cutting and self._proved < PROVED_BY:
            self._prove(texts[:PROVED_BY], starts[:PROVED_BY])
        cut = CUT.split if self.is_cutting else lambda text: [text]
        pieces = [cut(text) for text in texts]
        heads = {words[0] for words, start in zip(pieces, starts, strict=True) if start}
        tails = set(
            chain.from_iterable(words[1:] if start else words for words, start in zip(pieces, starts, strict=True))
        )
        self._learn(self._first_words, self._at_start, heads)
        self._learn(self._words, self._inside, tails)
        first, word = self._first_words.__getitem__, self._words.__getitem__
        encoded = [
            [*first(words[0]), *chain.from_iterable(map(word, words[1:]))]
            if start
            else list(chain.from_iterable(map(word, words)))
            for words, start in zip(pieces, starts, strict=True)
        ]
        self._forget(self._first_words, heads)
        self._forget(self._words, tails)
        return encoded

    def _learn(self, known: dict[str, list[int]], backend: Tokenizer, pieces: set[str]) -> None:
        missing = list(pieces.difference(known))
        # Not encode_batch_fast: without offsets, but in tokenizers 0.23 it takes 1.6 times as long.
        for piece, encoding in zip(missing, backend.encode_batch(missing, add_special_tokens=False), strict=True):
            known[piece] = self._correct(backend, piece, encoding.ids)

    def _forget(self, known: dict[str, list[int]], pieces: set[str]) -> None:
        if not self.is_cutting or len(known) > MOST_WORDS:
            known.clear()
        else:
            for piece in pieces:
                if len(piece) > LONGEST_WORD:
                    known.pop(piece, None)

    def _prove(self, texts: Sequence[str], starts: Sequence[bool]) -> None:
        """Compares with the tokenizer's own answer; a difference ends the cutting for good."""
        self._proved = PROVED_BY
        in_words = self.encode(texts, starts)
        self.is_cutting = False
        if in_words == self.encode(texts, starts):
            self.is_cutting, self._proved = True, self._proved + len(texts)


def _is_local(description: dict[str, Any]) -> bool:
    """Whether no token can reach across a cut, and no rule looks across it."""
    model = description["model"]
    if model["type"] not in ("BPE", "Unigram") or model.get("dropout"):
        return False
    vocabulary = model["vocab"] if isinstance(model["vocab"], dict) else (piece for piece, _ in model["vocab"])
    if any(map(REACHES_ACROSS.search, vocabulary)):
        return False
    for token in description["added_tokens"]:
        if not token["special"] and (
            token["lstrip"] or token["rstrip"] or token["single_word"] or REACHES_ACROSS.search(token["content"])
        ):
            return False
    steps = _steps(description.get("normalizer")) | _steps(description.get("pre_tokenizer"))
    return steps <= LOCAL_STEPS


def _steps(part: Any) -> set[str]:
    """Types of a normalizer or pre-tokenizer and of all it is made of."""
    if isinstance(part, list):
        return set().union(*map(_steps, part))
    if not isinstance(part, dict) or "type" not in part:
        return set()
    return {part["type"]}.union(*(_steps(inner) for inner in part.values() if isinstance(inner, list)))
