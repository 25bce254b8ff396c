"""Incremental detokenisation: text as soon as it is certain, whole characters only, nothing of a stop string.

`tokenizers.decoders.DecodeStream` is no substitute (0.23, tried on 10,600 token sequences of five tokenizers): it repeats the
prompt where that ends inside a character, drops text before an unfinished character at the end, holds back bytes that
never make one, and raises "Invalid prefix" on some byte-fallback tokens.
"""

from collections.abc import Collection, Sequence
from typing import Any

from qlora_cli.core.prompts.encoder import encoder_of

BROKEN = "\ufffd"  # the replacement character: bytes that are no character (yet)
LONGEST_CHARACTER_TOKENS = 4  # UTF-8 bytes of one character, in tokens of a byte each


class TextStream:
    """The text of one answer as it grows, token by token.

    A token is decoded together with the ones before it, because it may hold a part of a character, or a space only
    when it does not come first. Text is returned once no later token can change it.

    Args:
        tokenizer: Anything with transformers' `decode`.
        before: Ids of the prompt: its end decides how the answer begins.
        stop: Strings at which the answer ends; none of them is returned.
        strip: Whether spaces and line ends before the answer's first letter are left out.
        marks: Control tokens that are written out; the others are not.

    Attributes:
        text: All that was returned.
        stopped: Whether a stop string has come.
    """

    def __init__(
        self,
        tokenizer: Any,
        before: Sequence[int] = (),
        stop: Sequence[str] = (),
        *,
        strip: bool = False,
        marks: Collection[int] = (),
    ) -> None:
        self.tokenizer = tokenizer
        self._hidden = set(encoder_of(tokenizer).control_ids.values()) - set(marks) if marks else None
        self._strip = strip
        self.stop = tuple(text for text in stop if text)
        self.stopped = False
        self.text = ""
        self._ids: list[int] = []
        self._start = 0  # the window that is decoded: ids[start:]; the text of ids[start:read] was returned
        self._taken = 0  # characters of the window's text that were returned
        for count in range(1, min(len(before), 2 * LONGEST_CHARACTER_TOKENS) + 1):
            self._ids = list(before[-count:])
            text = self._decode()
            self._taken = len(text)
            if text and not text.startswith(BROKEN):  # a window must not begin inside a character
                break
        else:
            self._ids, self._taken = [], 0
        self._read = len(self._ids)
        self._held = ""  # may be the beginning of a stop string

    def _decode(self) -> str:
        hidden, ids = self._hidden, self._ids[self._start :]
        if hidden is not None:
            ids = [token for token in ids if token not in hidden]
        return self.tokenizer.decode(ids, skip_special_tokens=hidden is None, clean_up_tokenization_spaces=False)

    def push(self, token: int) -> str:
        """Takes the next token and returns the text that is now certain, often empty."""
        self._ids.append(token)
        window = self._decode()
        certain = window.rstrip(BROKEN)
        if len(window) > len(certain) and len(self._ids) - self._read >= 4 * LONGEST_CHARACTER_TOKENS:
            certain = window  # no character is that long: these bytes are none
        piece = certain[self._taken :]
        if certain == window and piece:  # a clean end: start the next window at this token's text
            self._start, self._read = self._read, len(self._ids)
            self._taken = len(self._decode())
        else:
            self._taken += len(piece)
        return self._release(piece)

    def finish(self) -> str:
        """Returns what was held back; an unfinished character is dropped."""
        rest, self._held = self._held, ""
        self.text += rest
        return rest

    def _release(self, piece: str) -> str:
        if self.stopped:
            return ""
        text = self._held + piece
        if self._strip:
            text = text.lstrip()
            self._strip = not text
        found = [at for stop in self.stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            self._held, out = "", text[: min(found)]
        else:
            keep = max((_overlap(text, stop) for stop in self.stop), default=0)
            self._held, out = text[len(text) - keep :], text[: len(text) - keep]
        self.text += out
        return out


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
