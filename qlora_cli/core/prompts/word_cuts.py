"""A tokenizer.json in; a function that cuts texts into pieces which that tokenizer treats independently, out.

Two ways, both exact. An ASCII text under a byte-level tokenizer is cut by the tokenizer's own pattern, which Python's
`re` understands once its Unicode classes are written as the ASCII letters and digits in them. Any other text is cut
before a space that follows a printable ASCII character and precedes a letter or digit, where no token of the
vocabulary reaches across such a place.
"""

import re
from collections.abc import Callable
from typing import Any

Cut = Callable[[str], list[str]]

BEFORE_WORD = re.compile(r"(?<=[!-~])(?= [A-Za-z0-9])")
REACHES_ACROSS = re.compile(r"[!-~][Ġ▁ ]")  # how byte-level, SentencePiece-like and other vocabularies write a space
UNICODE_FORMS = {"NFC", "NFD", "NFKC", "NFKD"}  # normalisers that leave ASCII as it is
LOCAL_STEPS = UNICODE_FORMS | {
    "Sequence", "Lowercase", "Replace", "Prepend", "ByteLevel", "Metaspace", "Split", "Digits", "Punctuation",
}  # fmt: skip
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # of ByteLevel itself
ASCII_PARTS = {"L": "A-Za-z", "Lu": "A-Z", "Ll": "a-z", "N": "0-9", "Nd": "0-9", "Lt": "", "Lm": "", "Lo": "", "M": ""}


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
