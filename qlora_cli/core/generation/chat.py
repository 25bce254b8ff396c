"""What a user types turn by turn in, what the model is asked out: history, and the commands of a chat."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from qlora_cli.errors import DataError, UsageError
from qlora_cli.events import Caution, Notice, Report, TextGenerated

Message = dict[str, str]
COMMANDS = "/base [QUESTION], /adapter DIR, /reset, /save FILE, /exit"


class ChatBackend(Protocol):
    """Who answers in a conversation."""

    def remembers(self) -> bool:
        """Whether earlier turns can be part of a prompt: they cannot where single prompts were trained."""
        ...

    def fits(self, prompt: Any) -> bool:
        """Whether a prompt leaves room for an answer in the model's context."""
        ...

    def say(self, prompt: Any, *, turn: int, base: bool, tell: Callable[[str], None]) -> None:
        """Answers a prompt, piece by piece; `base` turns the adapter off."""
        ...

    def switch(self, directory: str) -> None:
        """Speaks with another adapter from now on."""
        ...


class Conversation:
    """Turns of one user with one model.

    Args:
        voice: Who answers.
        tell: Told each piece of an answer.
    """

    def __init__(self, backend: ChatBackend, tell: Callable[[str], None]) -> None:
        self.backend, self.tell = backend, tell
        self.messages: list[Message] = []  # user and assistant in turn
        self.forgotten = 0  # messages that the context had no room for, all in all

    def ask(self, text: str) -> str:
        """Answers a question and remembers both, the answer as far as it came when it is interrupted.

        Raises:
            DataError: The question alone is longer than the context.
        """
        question = {"role": "user", "content": text}
        turn = len(self.messages) // 2 + self.forgotten // 2
        self._make_room(question)
        heard: list[str] = []
        try:
            self._say([*self.messages, question], turn, base=False, heard=heard)
        finally:
            answer = "".join(heard).strip()
            if answer:
                self.messages += [question, {"role": "assistant", "content": answer}]
        return answer

    def base(self, text: str = "") -> str:
        """Lets the untuned model answer the same, or another, question; nothing of it is remembered.

        Raises:
            UsageError: There is no question yet.
        """
        before, question = self.messages, {"role": "user", "content": text}
        turn = len(before) // 2 + self.forgotten // 2
        if not text:
            if not before:
                raise UsageError("There is no question yet for the base to answer.", "Ask one, or type: /base QUESTION")
            before, question, turn = before[:-2], before[-2], turn - 1
        heard: list[str] = []
        self._say([*before, question], turn, base=True, heard=heard)
        return "".join(heard).strip()

    def switch_adapter(self, directory: str) -> None:
        """Goes on with another adapter; the history stays.

        Raises:
            AdapterError: There is none, or it belongs to another base.
        """
        self.backend.switch(directory)

    def reset(self) -> None:
        """Forgets everything."""
        self.messages, self.forgotten = [], 0

    def save(self, path: Path) -> None:
        """Appends the conversation to a JSON Lines file, in the form that training takes.

        Raises:
            DataError: The file cannot be written.
        """
        line = json.dumps({"messages": self.messages}, ensure_ascii=False)
        try:
            with path.open("a", encoding="utf-8") as stream:
                stream.write(line + "\n")
        except OSError as error:
            raise DataError(f"{path} cannot be written: {error.strerror}.", "Type: /save FILE") from error

    def _prompt(self, messages: list[Message]) -> Any:
        return messages if self.backend.remembers() else messages[-1]["content"]

    def _make_room(self, question: Message) -> None:
        """Forgets the oldest turns until the rest fits the model's context."""
        while self.messages and not self.backend.fits(self._prompt([*self.messages, question])):
            del self.messages[:2]
            self.forgotten += 2

    def _say(self, messages: list[Message], turn: int, *, base: bool, heard: list[str]) -> None:
        def tell(piece: str) -> None:
            heard.append(piece)
            self.tell(piece)

        self.backend.say(self._prompt(messages), turn=turn, base=base, tell=tell)


def obey(conversation: Conversation, line: str, report: Report) -> None:
    """Does what one line of a conversation says.

    Raises:
        QloraError: It cannot be done; the conversation is as it was.
    """
    command, _, rest = line.partition(" ")
    match command, rest.strip():
        case "", _:
            return
        case "/base", question:
            conversation.base(question)
            report(TextGenerated("", final=True))
        case "/adapter", directory if directory:
            conversation.switch_adapter(directory)
            report(Notice(f"{directory} answers from now on."))
        case "/reset", _:
            conversation.reset()
            report(Notice("The conversation begins anew."))
        case "/save", path if path:
            conversation.save(Path(path).expanduser())
            report(Notice(f"Added to {path}."))
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
