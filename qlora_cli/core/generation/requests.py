"""Generation requests and their completions: a tokenised prompt, its answer while it grows, and the finished answer."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qlora_cli.core.decoding.sampling import NOT_A_NUMBER
from qlora_cli.core.generation.detokenizer import TextStream
from qlora_cli.core.prompts.encoder import encoder_of
from qlora_cli.core.prompts.formatting import Formatting, PromptTemplate, RowFormatter
from qlora_cli.errors import DataError, ModelError

ENDED = "end"  # the model's own end of answer
STOPPED = "stop"  # a stop string
LENGTH = "length"  # as many tokens as were allowed


@dataclass(frozen=True)
class Marks:
    """Control tokens within answers.

    Attributes:
        tokens: Those that mark thoughts and calls of tools, which are written.
        opening: Tokens with which an answer begins that is neither, which are not.
    """

    tokens: frozenset[int] = frozenset()
    opening: tuple[int, ...] = ()


NO_MARKS = Marks()


@dataclass(frozen=True)
class Request:
    """A prompt to answer.

    Attributes:
        index: Its number among all prompts of the command; with the seed it decides what is sampled.
        ids: The formatted prompt.
        max_new_tokens: At least 1.
        strip: Whether blanks before the answer are left out of its text.
        marks: Control tokens within its answer.
    """

    index: int
    ids: Sequence[int]
    max_new_tokens: int
    strip: bool = False
    marks: Marks = NO_MARKS


@dataclass(frozen=True)
class Completion:
    """A finished answer; `ids` are its tokens without the one that ended it."""

    index: int
    text: str
    ids: tuple[int, ...]
    finish: str  # ENDED, STOPPED or LENGTH
    prompt_tokens: int

    def to_row(self, prompt: Any, adapter: str | None = None) -> dict[str, Any]:
        """The answer beside its prompt, JSON-ready; `adapter` is the prompt's own, where it names one."""
        row = {"prompt": prompt, "answer": self.text, "finish": self.finish}
        if adapter is not None:
            row["adapter"] = adapter
        return {**row, "prompt_tokens": self.prompt_tokens, "new_tokens": len(self.ids)}


def make_request(
    index: int,
    ids: Sequence[int],
    *,
    max_new_tokens: int,
    context: int | None,
    strip: bool = False,
    marks: Marks = NO_MARKS,
) -> Request:
    """A request that fits the model's context; the answer is cut shorter where it must be.

    Raises:
        DataError: The prompt is empty, or leaves no room for an answer.
    """
    if not ids:
        raise DataError("The prompt is empty.", 'Type: qlora generate --adapter out "Your question"')
    if context is not None and len(ids) >= context:
        raise DataError(
            f"The prompt has {len(ids):,} tokens and the model reads at most {context:,}.", "Shorten the prompt."
        )
    room = max_new_tokens if context is None else min(max_new_tokens, context - len(ids))
    return Request(index, ids, room, strip, marks)


def find_end_ids(model: Any, tokenizer: Any, formatting: Formatting) -> set[int]:
    """Tokens that end an answer: the end of text, the model's own choices, and what closed the answers in training."""
    own = model.generation_config.eos_token_id
    found = {encoder_of(tokenizer).spec.eos_id, *(own if isinstance(own, list) else [own])} - {None}
    return found | closing_ids(tokenizer, formatting)


def closing_ids(tokenizer: Any, formatting: Formatting) -> set[int]:
    """The control tokens that closed answers in training, calls of tools included."""
    encoder = encoder_of(tokenizer)
    if formatting.format == "chat":
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        formatting = replace(formatting, column="messages", conversation=None)
        record: dict[str, Any] = {"messages": turns}
    elif formatting.format == "prompt":
        fields = PromptTemplate(formatting.template or "", formatting.completion_column or "", encoder).fields
        record = dict.fromkeys(fields, "a")
    else:
        return set()
    formatter = RowFormatter(formatting, encoder)
    (rows,) = formatter.format_records([record], "last")
    assert isinstance(rows, list)
    row = rows[-1]
    last_text = max(position for position, (content, _) in enumerate(row) if isinstance(content, str))
    closing = next((content for content, _ in row[last_text + 1 :] if isinstance(content, int)), None)
    return formatter.find_call_ends() | ({closing} if closing is not None else set())


def find_marks(tokenizer: Any, formatting: Formatting) -> Marks:
    """How answers under a formatting are marked."""
    encoder = encoder_of(tokenizer)
    tokens, opening = RowFormatter(formatting, encoder).find_marks()
    ids = tuple(token for run in encoder.encode_rows([opening])[0] for token in run) if opening else ()
    return Marks(frozenset(tokens), ids)


def not_a_number() -> ModelError:
    """The error for logits that are not finite."""
    return ModelError(
        "The model's output is not a number.", "Try another --compute-dtype, or an earlier checkpoint of the run."
    )


class GrowingCompletion:
    """An answer while it grows, token by token.

    Args:
        end_ids: Tokens that end an answer.
        stop: Strings that do.
        on_text: Called with the request's index and each piece of text.
        said: Characters that an answer to the same request, which was given up, handed to `on_text`: not again.

    Attributes:
        said: Likewise, with those of this one.
        launched: Tokens whose computation was launched; some may still be on their way from the device.
        finish: Why it ended; None while it grows.
    """

    def __init__(
        self,
        request: Request,
        *,
        tokenizer: Any,
        end_ids: Collection[int],
        stop: Sequence[str] = (),
        on_text: Callable[[int, str], None] | None = None,
        said: int = 0,
    ) -> None:
        self.request = request
        self.said = said
        self._characters = 0
        self.launched = 0
        self.finish: str | None = None
        self._ids: list[int] = []
        self.end_ids = end_ids
        self._opening: list[int] | None = [] if request.marks.opening else None  # of it so far; None behind it
        marks = set(request.marks.tokens)
        if stop:  # a stop string may hold control tokens, and is found in what is written
            own = encoder_of(tokenizer).control_ids
            marks |= {token for text, token in own.items() if any(text in each for each in stop)}
        self._stream = TextStream(tokenizer, request.ids, stop, strip=request.strip, marks=marks)
        self._on_text = on_text

    def push(self, token: int) -> bool:
        """Takes the next token; returns whether the answer is finished.

        Raises:
            ModelError: The token stands for logits that are not finite.
        """
        if token == NOT_A_NUMBER:
            raise not_a_number()
        if token in self.end_ids:
            self.finish = ENDED
        else:
            self._ids.append(token)
            for each in self._behind_opening(token):
                self._emit(self._stream.push(each))
            if self._stream.stopped:
                self.finish = STOPPED
            elif len(self._ids) >= self.request.max_new_tokens:
                self.finish = LENGTH
        if self.finish is not None:
            self._emit(self._stream.finish())
        return self.finish is not None

    def _behind_opening(self, token: int) -> Sequence[int]:
        """Tokens to write now: none while the answer begins as `Marks.opening`, all so far where it turns out not to."""
        if self._opening is None:
            return (token,)
        begun, opening = [*self._opening, token], self.request.marks.opening
        if tuple(begun) != opening[: len(begun)]:
            self._opening = None
            return begun
        self._opening = begun if len(begun) < len(opening) else None
        return ()

    def _emit(self, piece: str) -> None:
        self._characters += len(piece)
        fresh = min(len(piece), self._characters - self.said)
        if fresh > 0 and self._on_text is not None:
            self._on_text(self.request.index, piece[-fresh:])
            self.said = self._characters

    def completion(self) -> Completion:
        """The finished answer."""
        assert self.finish is not None
        request = self.request
        return Completion(request.index, self._stream.text, tuple(self._ids), self.finish, len(request.ids))


StartCompletion = Callable[..., GrowingCompletion]  # of a Request, and what was said of it
