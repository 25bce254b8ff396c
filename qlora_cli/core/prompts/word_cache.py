"""Word cache: texts to token ids, the same as the tokenizer gives but faster, as words that were met are looked up.

A fast tokenizer spends 1.7 µs on a token; a look-up takes a tenth of that, and prose repeats its words: `prepare` takes
0.40 of the processor time that it takes without (benchmarks/data.md).

Texts are cut where no token of the vocabulary reaches across, so that the pieces are tokenised independently: before a
word, and between letters or digits and punctuation.
"""

import re
from array import array
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any

from tokenizers import Tokenizer

from qlora_cli.core.prompts.foreign_tokenizer import encode_texts

LONGEST_WORD = 32  # letters; longer pieces, and whole texts, are not kept at all
MOST_WORDS = 2**15  # of each generation; two take about 20 MB
PROVED_BY, PROVED_LETTERS = 64, 2**14  # texts, and of each: the tokenizer's own answer decides whether cuts are trusted
BLOCK_LETTERS = 2**18  # of a long text that are cut into words at once: a word takes 100 times its letters meanwhile
MOST_UNCUT_LETTERS = 2**21  # that the tokenizer is given as one piece: it takes 150 bytes for each

Correction = Callable[[Tokenizer, list[str], list[list[int]]], list[list[int]]]
Ids = list[int] | array  # of 32 bits
Cut = re.Pattern[str]  # matches nothing, at each place of a cut

PUNCTUATION = r"[!-&(-/:-@\[-`{-~]"  # of ASCII; not the apostrophe, as some patterns take "don't" for one word
# What stands before a cut and right after it, which no token may hold side by side, and what must follow.
PLACES = [("[!-~]", " ", "[A-Za-z0-9]"), ("[A-Za-z0-9]", PUNCTUATION, ""), (PUNCTUATION, "[0-9]", "")]
BYTES = {f"<0x{byte:02X}>" for byte in range(256)}
LOCAL_STEPS = {
    "Sequence", "NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Replace", "Prepend", "ByteLevel", "Metaspace", "Split",
    "Digits", "Punctuation",
}  # fmt: skip


class _Words:
    """Pieces and their ids for one variant of a tokenizer; those not met for a while are forgotten.

    Two generations: when the younger is full it becomes the older, and a piece found only there moves back up. So
    the words of a language stay, and formulas and numbers, which seldom come again, pass through.
    """

    def __init__(self, backend: Tokenizer, correct: Correction, most_words: int) -> None:
        self._backend, self._correct, self._most_words = backend, correct, most_words
        # Tuples of numbers, which the garbage collector does not look through again and again.
        self._older: dict[str, tuple[int, ...]] = {}
        self.known: dict[str, tuple[int, ...]] = {}
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
        self.known.update(zip(unmet, map(tuple, self.tokenise(unmet)), strict=True))

    def tokenise(self, texts: list[str]) -> list[list[int]]:
        """The tokenizer's own answer."""
        encoded = encode_texts(self._backend, texts)
        return self._correct(self._backend, texts, [encoding.ids for encoding in encoded])


class WordCache:
    """Encodes texts with one tokenizer, in two variants: at the start of a row, and inside one.

    Args:
        cut: How texts may be cut into words, if they may.
        at_start: Tokenizer for the first words of a text at the start of a row.
        inside: Tokenizer for all other words; may be the same.
        correct: Called with the variant, texts and the ids of each; returns the ids to use.
        most_words: Words kept, twice over (see `_Words`).
        block_letters: Of a longer text that are cut into words at once.
        most_uncut_letters: That the tokenizer is given as one piece.
    """

    def __init__(
        self,
        cut: Cut | None,
        at_start: Tokenizer,
        inside: Tokenizer,
        correct: Correction,
        most_words: int = MOST_WORDS,
        block_letters: int = BLOCK_LETTERS,
        most_uncut_letters: int = MOST_UNCUT_LETTERS,
    ) -> None:
        self._inside = _Words(inside, correct, most_words)
        self._first = self._inside if at_start is inside else _Words(at_start, correct, most_words)
        self._cut, self._block_letters, self.most_uncut_letters = cut, block_letters, most_uncut_letters
        self._is_proved = False

    @property
    def is_cutting(self) -> bool:
        """Whether words are looked up, or whole texts are tokenised."""
        return self._cut is not None

    def encode(self, texts: Sequence[str], starts: Sequence[bool]) -> Sequence[Ids]:
        """The ids of each text, int32 numbers; `starts` says which of them stand at the start of a row."""
        if self._cut is not None and not self._is_proved:
            self._is_proved = True
            sample, sample_starts = [text[:PROVED_LETTERS] for text in texts[:PROVED_BY]], starts[:PROVED_BY]
            whole = self._encode_whole(sample, sample_starts)
            if self._encode_in_words(self._cut, sample, sample_starts) != whole:
                self._cut = None  # whatever was overlooked, the tokenizer's own answer counts
        if self._cut is None:
            return self._encode_whole(texts, starts)
        if all(len(text) <= self._block_letters for text in texts):
            return self._encode_in_words(self._cut, texts, starts)
        encoded: list[Ids] = []
        for text, start in zip(texts, starts, strict=True):
            ids = array("i")  # 4 bytes a token; a list of numbers that no other token shares takes 36
            for first, end in _blocks(self._cut, text, self._block_letters):
                ids.extend(self._encode_in_words(self._cut, [text[first:end]], [start and not first])[0])
            encoded.append(ids)
        return encoded

    def takes(self, text: str) -> bool:
        """Whether a text can be tokenised within bounded memory: all but one of millions of letters without a cut."""
        most = self.most_uncut_letters
        if len(text) <= most:
            return True
        return self._cut is not None and all(
            end - first <= most for first, end in _blocks(self._cut, text, self._block_letters)
        )

    def _encode_whole(self, texts: Sequence[str], starts: Sequence[bool]) -> list[list[int]]:
        both = list(zip(texts, starts, strict=True))
        first = iter(self._first.tokenise([text for text, start in both if start]))
        inside = iter(self._inside.tokenise([text for text, start in both if not start]))
        return [next(first if start else inside) for start in starts]

    def _encode_in_words(self, cut: Cut, texts: Sequence[str], starts: Sequence[bool]) -> list[list[int]]:
        pieces = list(map(cut.split, texts))
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
    model, added = description["model"], description["added_tokens"]
    if model["type"] not in ("BPE", "Unigram") or model.get("dropout"):
        return None
    ordinary = [token for token in added if not token["special"]]
    if any(token["lstrip"] or token["rstrip"] or token["single_word"] for token in ordinary):
        return None
    if not _types(description.get("normalizer")) | _types(description.get("pre_tokenizer")) <= LOCAL_STEPS:
        return None
    vocabulary = set(model["vocab"] if isinstance(model["vocab"], dict) else (piece for piece, _ in model["vocab"]))
    vocabulary |= {token["content"] for token in ordinary}
    places = PLACES[:1]
    if model["type"] == "BPE" and (model.get("byte_fallback") or not model.get("fuse_unk")):
        # No merge leads to a special token or to a byte, and no unknown letters become one.
        vocabulary -= {token["content"] for token in added if token["special"]} | BYTES
        places = PLACES
    tokens = re.sub("[Ġ▁]", " ", "\n".join(vocabulary))  # how byte-level and SentencePiece-like ones write a space
    places = [place for place in places if not re.search(place[0] + place[1], tokens)]
    if PLACES[0] not in places:
        return None  # pieces of several words seldom come again
    # Most letters are none that a cut stands before: asked first, it takes a tenth less time.
    first = "".join(after.strip("[]") for _, after, _ in places)
    return re.compile(f"(?=[{first}])(?:" + "|".join(f"(?={a}{then})(?<={b})" for b, a, then in places) + ")")


def _blocks(cut: Cut, text: str, letters: int) -> Iterator[tuple[int, int]]:
    """First and last place of the parts of a text, each of at least so many letters and up to the next cut."""
    first = 0
    while first < len(text):
        match = cut.search(text, first + letters)
        end = match.start() if match else len(text)
        yield first, end
        first = end


def _types(part: Any) -> set[str]:
    """Types of a normalizer or pre-tokenizer and of all it is made of."""
    if isinstance(part, list):
        return set().union(*map(_types, part))
    if not isinstance(part, dict) or "type" not in part:
        return set()
    return {part["type"]}.union(*(_types(inner) for inner in part.values() if isinstance(inner, list)))
