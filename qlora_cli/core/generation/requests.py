"""A tokenised prompt and its tokens one by one in; the text of an answer, and why it ended, out."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_cli.core.decoding.sampling import NOT_A_NUMBER
from qlora_cli.core.generation.detokenizer import TextStream
from qlora_cli.errors import ModelError

ENDED = "end"  # the model's own end of answer
STOPPED = "stop"  # a stop string
LENGTH = "length"  # as many tokens as were allowed


@dataclass(frozen=True)
class Request:
    """A prompt to answer.

    Attributes:
        index: Its number among all prompts of the command; with the seed it decides what is sampled.
        ids: The formatted prompt.
        max_new_tokens: At least 1.
        strip: Whether blanks before the answer are left out of its text.
    """

    index: int
    ids: Sequence[int]
    max_new_tokens: int
    strip: bool = False


@dataclass(frozen=True)
class Completion:
    """A finished answer; `ids` are its tokens without the one that ended it."""

    index: int
    text: str
    ids: tuple[int, ...]
    finish: str  # ENDED, STOPPED or LENGTH
    prompt_tokens: int


def not_a_number() -> ModelError:
    """The error for logits that are not finite."""
    return ModelError(
        "The model's output is not a number.", "Try another --compute-dtype, or an earlier checkpoint of the run."
    )


class GrowingCompletion:
    """An answer while it grows.

    Args:
        request: What is answered.
        tokenizer: Turns ids into text.
        end_ids: Tokens that end an answer.
        stop: Strings that end an answer.
        on_text: Told each piece of text with the request's index.
    """

    def __init__(
        self,
        request: Request,
        tokenizer: Any,
        *,
        end_ids: Collection[int],
        stop: Sequence[str] = (),
        on_text: Callable[[int, str], None] | None = None,
    ) -> None:
        self.request = request
        self.asked = 0  # tokens the device was asked for
        self.finish: str | None = None
        self._ids: list[int] = []
        self._end_ids = end_ids
        self._stream = TextStream(tokenizer, request.ids, stop, strip=request.strip)
        self._on_text = on_text

    @property
    def fully_asked(self) -> bool:
        """Whether the device need not be asked for more."""
        return self.asked >= self.request.max_new_tokens or self.finish is not None

    def push(self, token: int) -> bool:
        """Takes the next token; returns whether the answer is finished.

        Raises:
            ModelError: The token stands for logits that are not finite.
        """
        if token == NOT_A_NUMBER:
            raise not_a_number()
        if token in self._end_ids:
            self.finish = ENDED
        else:
            self._ids.append(token)
            self._tell(self._stream.push(token))
            if self._stream.stopped:
                self.finish = STOPPED
            elif len(self._ids) >= self.request.max_new_tokens:
                self.finish = LENGTH
        if self.finish is not None:
            self._tell(self._stream.finish())
        return self.finish is not None

    def _tell(self, piece: str) -> None:
        if piece and self._on_text is not None:
            self._on_text(self.request.index, piece)

    def answer(self) -> Completion:
        """The finished answer."""
        assert self.finish is not None
        request = self.request
        return Completion(request.index, self._stream.text, tuple(self._ids), self.finish, len(request.ids))
