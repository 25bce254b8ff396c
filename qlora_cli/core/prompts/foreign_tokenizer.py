"""Tokenizer that came with a model, at work: bounded in time and growth, and what it raises is one sentence.

Its regular expressions may go back and forth for hours over one text. Oniguruma gives up after 10 million steps of one
match (0.2 s) and the Rust library then panics; an expression that stays below takes as many at each letter, 20 s for 300.
"""

import re
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from tokenizers import Encoding, Tokenizer

from qlora_cli.errors import ModelError, first_line

CALL_SECONDS = 60.0  # of processor time, for the texts of one call, whatever their length
LETTERS_A_SECOND = 50_000  # on top: a real tokenizer takes some millions
MOST_GROWTH = 2**20  # of a text, letters out for a letter in; real ones replace a letter by one or two
HINT = "Use the tokenizer.json that the model was published with."


def encode_texts(backend: Tokenizer, texts: Sequence[str], seconds: float = CALL_SECONDS) -> list[Encoding]:
    """The encodings of texts, without special tokens.

    The library works in another thread, without Python's lock: this one waits, and goes on without it in the end.

    Args:
        seconds: Of processor time, beside what the length of the texts is given.

    Raises:
        ModelError: It does not come to an end, or gives up.
    """
    if not texts:
        return []
    done: list[Any] = []

    def work() -> None:
        try:
            # Not encode_batch_fast: it leaves the offsets out, but in tokenizers 0.23 it takes 1.6 times as long.
            done.append(backend.encode_batch(list(texts), add_special_tokens=False))
        except BaseException as error:
            done.append(error)

    worker = threading.Thread(target=work, daemon=True)
    until = time.process_time() + seconds + sum(map(len, texts)) / LETTERS_A_SECOND
    worker.start()
    while not done and worker.is_alive():
        worker.join(max(until - time.process_time(), 0.05))
        if not done and time.process_time() > until:
            longest = max(map(len, texts))
            raise ModelError(
                f"The tokenizer does not come to an end with {len(texts)} texts of up to {longest:,} letters: its "
                "regular expressions take too long.",
                HINT,
            )
    (result,) = done
    if not isinstance(result, BaseException):
        return result
    if type(result) is Exception or type(result).__name__ == "PanicException":  # both of the Rust library
        raise ModelError(f"The tokenizer gives up on a text: {first_line(result)}", HINT) from None
    raise result


def refuse_growth(description: dict[str, Any]) -> None:
    """Checks that no text becomes a multiple of itself that fills the memory.

    Args:
        description: The tokenizer.json, parsed.

    Raises:
        ModelError: What it puts in for letters, again and again, does.
    """
    growth = 1.0
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        for step in _replacements(description.get(part)):
            growth *= max(_growth(step), 1.0)
    if growth > MOST_GROWTH:
        raise ModelError(
            f"The tokenizer replaces letters by others that make a text up to {growth:,.0f} times as long.", HINT
        )


def _replacements(part: Any) -> Iterator[dict[str, Any]]:
    if isinstance(part, dict):
        if part.get("type") == "Replace":
            yield part
        part = list(part.values())
    if isinstance(part, list):
        for item in part:
            yield from _replacements(item)


def _growth(step: dict[str, Any]) -> float:
    """How many letters a replacement may put in for one."""
    content, pattern = str(step.get("content") or ""), step.get("pattern") or {}
    text = pattern.get("String")
    if isinstance(text, str) and text:
        return len(content) / len(text)
    return len(content) + (len(content) > 0 and not _takes_a_letter(str(pattern.get("Regex") or "")))


def _takes_a_letter(expression: str) -> bool:
    """Whether each match is one letter long at least; not known is no."""
    if not expression or re.search(r"\(\?[=!<]|\\[bBAzZG]|[\^$]", expression):
        return False
    try:
        return re.match(expression, "") is None
    except re.error:
        return False
