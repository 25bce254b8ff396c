"""A conversation at the terminal: its history, and the commands that a user may type."""

import errno
import json
import os
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import Any

from qlora_cli.core.generation.session import GenerationSession
from qlora_cli.core.storage.ownership import may_write_file
from qlora_cli.errors import DataError, RunError, UsageError
from qlora_cli.events import Caution, Notice, Report, TextGenerated

Message = dict[str, str]
_FIRST_LINE_BYTES = 64 * 2**20  # looked at, of a file that a conversation is added to
COMMANDS = "/help, /system TEXT, /retry, /undo, /base [QUESTION], /adapter DIR, /reset, /save FILE, /exit"
HELP = (
    ("/system TEXT", "what the model is told before the conversation; alone it takes that away"),
    ("/retry", "another answer to the last question"),
    ("/undo", "takes back the last question and its answer"),
    ("/base [QUESTION]", "the untuned model answers the same question, or another"),
    ("/adapter DIR", "another adapter answers from now on"),
    ("/reset", "forgets the conversation"),
    ("/save FILE", "adds the conversation to a JSON Lines file"),
    ("/exit", "leaves, as Ctrl-D does"),
)
BLOCK = '"""'  # lines between two of them are one question; so is a line with the next where a backslash ends it
RETRY_STRIDE = 2**32  # between the numbers of the answers to one question, by which their random draws differ


class Conversation:
    """Turns of one user with one model.

    Args:
        session: Answers the prompts.
        adapter: The adapter at first; None for the bare base.
        on_text: Called with each piece of an answer.

    Attributes:
        messages: What was said, user and assistant in turn, as far as it is remembered.
        forgotten: Messages that the context had no room for.
        rows: Every finished answer, as `Completion.to_row` has it.

    Raises:
        QloraError: Base or adapter cannot be loaded.
    """

    def __init__(self, session: GenerationSession, adapter: str | None, on_text: Callable[[str], None]) -> None:
        self.session, self.adapter, self._on_text = session, adapter, on_text
        self.messages: list[Message] = []
        self.forgotten = 0
        self.system = ""
        self.rows: list[dict[str, Any]] = []
        self._retries = 0  # of the last question
        session.select(adapter)

    @property
    def _turn(self) -> int:
        return (len(self.messages) + self.forgotten) // 2

    def ask(self, text: str) -> str:
        """Answers a question and remembers both, the answer as far as it came when it is interrupted.

        Raises:
            DataError: The question alone is longer than the context.
        """
        question = {"role": "user", "content": text}
        self._make_room(question)
        self._retries = 0
        return self._ask(question)

    def _ask(self, question: Message) -> str:
        pieces: list[str] = []
        try:
            self._answer([*self.messages, question], self._turn + RETRY_STRIDE * self._retries, pieces)
        finally:
            answer = "".join(pieces).strip()
            # An answer's thought is not a part of what it said.
            if said := self.session.without_thought(answer, self.adapter):
                self.messages += [question, {"role": "assistant", "content": said}]
        return answer

    def retry(self) -> str:
        """Another answer to the last question, in the place of the one before.

        Raises:
            UsageError: There is no question yet.
        """
        question, answer = self.undo()
        self._retries += 1
        try:
            return self._ask(question)
        except BaseException:
            if not self.messages or self.messages[-2] is not question:
                self.messages += [question, answer]  # none came: the one before stays
            raise

    def undo(self) -> tuple[Message, Message]:
        """Takes back the last question and its answer, and returns them.

        Raises:
            UsageError: There is none.
        """
        if not self.messages:
            raise UsageError("There is no question yet.", "Ask one first.")
        question, answer = self.messages[-2:]
        del self.messages[-2:]
        return question, answer

    def ask_base(self, text: str = "") -> str:
        """Lets the untuned model answer the same, or another, question; nothing of it is remembered.

        Raises:
            UsageError: There is no question yet.
        """
        before, question, turn = self.messages, {"role": "user", "content": text}, self._turn
        if not text:
            if not before:
                raise UsageError("There is no question yet for the base to answer.", "Ask one, or type: /base QUESTION")
            before, question, turn = before[:-2], before[-2], turn - 1
        pieces: list[str] = []
        self._answer([*before, question], turn, pieces, base=True)
        return "".join(pieces).strip()

    def switch_adapter(self, directory: str) -> None:
        """Goes on with another adapter; the history stays.

        Raises:
            AdapterError: There is none, or it belongs to another base.
        """
        self.session.select(directory)
        self.adapter = directory

    def reset(self) -> None:
        """Forgets everything."""
        self.messages, self.forgotten = [], 0

    def save(self, path: Path) -> None:
        """Appends the conversation, as far as it is remembered, to a JSON Lines file, in the form that training takes.

        Raises:
            UsageError: There is none yet.
            DataError: The file holds something else, or cannot be written.
        """
        if not self.messages:
            raise UsageError("There is no conversation yet to save.", "Ask something first.")
        content = {"messages": [*self._system_turn(), *self.messages]}
        line = json.dumps(content, ensure_ascii=False).encode() + b"\n"
        hint = "Type: /save FILE, with a new file or one of conversations"
        try:
            path = may_write_file(path, [Path(self.adapter)] if self.adapter else [])
            with path.open("a+b", buffering=0) as stream:
                end = stream.seek(0, os.SEEK_END)
                if end and not _holds_conversations(stream, end):
                    raise DataError(f"{path} holds something else than conversations.", hint)
                try:
                    if stream.write(line) < len(line):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                except OSError:
                    stream.truncate(end)
                    raise
        except RunError as error:
            raise DataError(error.message, hint) from error
        except OSError as error:
            raise DataError(f"{path} cannot be written: {error.strerror}.", hint) from error

    def _prompt(self, messages: list[Message]) -> Any:
        """All messages for a model trained on chats; the last alone for one trained on single prompts."""
        is_chat = self.session.formatting(self.adapter).format == "chat"
        return [*self._system_turn(), *messages] if is_chat else messages[-1]["content"]

    def _system_turn(self) -> list[Message]:
        return [{"role": "system", "content": self.system}] if self.system else []

    def tell(self, system: str) -> None:
        """Sets what the model is told before the conversation; an empty text takes it away.

        Raises:
            UsageError: The model was not trained on conversations.
        """
        if system and self.session.formatting(self.adapter).format != "chat":
            raise UsageError("This model was trained on single prompts, which have no system message.", None)
        self.system = system

    def _make_room(self, question: Message) -> None:
        """Forgets the oldest turns until the rest fits the model's context.

        Raises:
            DataError: The question cannot be answered alone; nothing is forgotten for it.
        """
        self.session.request(0, self._prompt([question]), self.adapter)
        while self.messages and not self._fits([*self.messages, question]):
            del self.messages[:2]
            self.forgotten += 2

    def _fits(self, messages: list[Message]) -> bool:
        """Whether an answer has room for at least half of what --max-new-tokens allows."""
        try:
            request = self.session.request(0, self._prompt(messages), self.adapter)
        except DataError:  # no room at all
            return False
        return 2 * request.max_new_tokens >= self.session.settings.max_new_tokens

    def _answer(self, messages: list[Message], turn: int, pieces: list[str], *, base: bool = False) -> None:
        """Answers the last message; `base` leaves the adapter out. The text goes to `pieces` as it comes."""

        def on_text(index: int, piece: str) -> None:
            pieces.append(piece)
            self._on_text(piece)

        prompt = self._prompt(messages)
        request = self.session.request(turn, prompt, self.adapter)
        self.session.select(None if base else self.adapter)
        for answer in self.session.answer([request], self.session.end_ids(self.adapter), on_text):
            self.rows.append({**answer.to_row(prompt), "base": base})


def _holds_conversations(stream: FileIO, end: int) -> bool:
    """Whether a file begins with the line of a conversation and ends with a whole line."""
    stream.seek(0)
    first = stream.read(_FIRST_LINE_BYTES).partition(b"\n")[0]
    stream.seek(end - 1)
    try:
        return isinstance(json.loads(first)["messages"], list) and stream.read(1) == b"\n"
    except (ValueError, KeyError, TypeError, RecursionError):
        return False


def read_question(read_line: Callable[[str], str | None]) -> str | None:
    """A question of one line, or of several: between two of `BLOCK`, or each but the last with a backslash at its end.

    Args:
        read_line: Given a prompt to show, the next line; None or EOFError at the end.
    """
    line = read_line("> ")
    if line is None:
        return None
    if line.strip().startswith(BLOCK):
        lines = [line.strip().removeprefix(BLOCK)]
        while not lines[-1].rstrip().endswith(BLOCK):
            following = read_line("… ")
            if following is None:
                break
            lines.append(following)
        return "\n".join(lines).strip().removesuffix(BLOCK).strip()
    lines = [line]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        following = read_line("… ")
        if following is None:
            break
        lines.append(following)
    return "\n".join(lines)


def run_line(conversation: Conversation, line: str, report: Report) -> None:
    """Runs one line of a conversation: a command, or a question.

    Raises:
        QloraError: It cannot be done; the conversation is as it was.
    """
    command, _, rest = line.partition(" ")
    match command, rest.strip():
        case "", _:
            return
        case "/base", question:
            conversation.ask_base(question)
            report(TextGenerated("", final=True))
        case "/adapter", directory if directory:
            conversation.switch_adapter(directory)
            report(Notice(f"{directory} answers from now on."))
        case "/help", _:
            for typed, meaning in HELP:
                report(Notice(f"{typed}: {meaning}"))
            report(
                Notice(f"Lines between two {BLOCK} are one question; so are two lines with a backslash between them.")
            )
        case "/system", text:
            conversation.tell(text)
            report(Notice("The model is told so from now on." if text else "The model is told nothing beforehand."))
        case "/retry", _:
            conversation.retry()
            report(TextGenerated("", final=True))
        case "/undo", _:
            taken, _ = conversation.undo()
            report(Notice(f"Taken back: {taken['content']}"))
        case "/reset", _:
            conversation.reset()
            report(Notice("The conversation begins anew."))
        case "/save", path if path:
            conversation.save(Path(path).expanduser())
            lost = f", without its first {conversation.forgotten} messages, which are forgotten"
            report(Notice(f"Added to {path}{lost if conversation.forgotten else ''}."))
        case "/adapter" | "/save", _:
            raise UsageError(
                f"{command} of what?", "Type: /adapter DIR" if command == "/adapter" else "Type: /save FILE"
            )
        case _ if line.startswith("/"):
            raise UsageError(f"{line} is no command.", f"There are: {COMMANDS}.")
        case _:
            forgotten = conversation.forgotten
            conversation.ask(line)
            report(TextGenerated("", final=True))
            if conversation.forgotten > forgotten:
                report(Caution("The conversation is longer than the model's context: its oldest turns are forgotten."))
