"""Chat messages in over a pipe, rendered text with the assistant's turns marked out; a process of its own.

A chat template is a program that came with a model: it may loop for ever or fill the memory. So it runs here, where
memory is limited and the parent stops the process when an answer is late. Loads jinja2 and the standard library only.
"""

import json
import re
import resource
import sys
from collections.abc import Callable
from datetime import datetime
from multiprocessing.connection import Connection
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY_BYTES = 2**29  # address space of this process
PROBE = "Certainly-42"  # an answer that no template writes by itself
# Unicode noncharacters, set aside for use inside a program: they stand for control tokens that somebody typed.
MARKS = [chr(code) for code in range(0xFDD0, 0xFDF0)]

Piece = tuple[str, bool, int]  # text, whether it is a control token of the template, number of the assistant turn or -1
Message = dict[str, Any]


class RenderError(Exception):
    """A conversation that the template refuses, or whose turns cannot be told apart."""


class _Generation(Extension):
    """Accepts {% generation %} blocks, which mark the assistant's words in some templates, and prints what they hold."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _raise(message: str) -> None:
    raise RenderError(message)


class ChatRenderer:
    """One chat template, compiled.

    Args:
        template: Jinja source.
        names: bos_token, eos_token and so on, which templates print.
        control_tokens: Every control token of the tokenizer.
        date: ISO date that strftime_now sees, so that a prompt is the same on the day of training and years later.
    """

    def __init__(self, template: str, names: dict[str, str], control_tokens: list[str], date: str | None) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = lambda value, indent=None, **_: json.dumps(
            value, ensure_ascii=False, indent=indent
        )
        environment.globals["raise_exception"] = _raise
        if date is not None:
            environment.globals["strftime_now"] = datetime.fromisoformat(date).strftime
        try:
            self._template = environment.from_string(template)
        except TemplateError as error:
            raise RenderError(f"the chat template does not compile: {error}") from error
        self._names = names
        longest_first = sorted(control_tokens, key=len, reverse=True)
        self._control_tokens = control_tokens
        self._control = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._dropped_suffix = ""
        self._probe()

    def _probe(self) -> None:
        """Learns the template's habits from conversations of its own."""
        user, assistant = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": PROBE}
        try:
            prompt = self._render([user], None, generation=True)
            whole = self._render([user, assistant], None)
        except RenderError as error:
            raise RenderError(f"the chat template refuses a user's question and an answer: {error}") from error
        if not whole.startswith(prompt):
            # It opens an answer at generation with what an answer in the history does not begin with (a <think> tag).
            common = next(i for i, (a, b) in enumerate(zip(prompt + "\0", whole + "\1", strict=False)) if a != b)
            self._dropped_suffix = prompt[common:]
        self._merges_system = self._try([{"role": "system", "content": "Be kind"}, user, assistant]) is None
        history = self._try([user, assistant, user]) or whole
        stop = self._control.search(history, history.find(PROBE) + len(PROBE)) if PROBE in history else None
        self._turn_end = stop[0] if stop else None

    def _try(self, messages: list[Message]) -> str | None:
        """A conversation rendered, or None where the template refuses it."""
        try:
            return self._render(messages, None)
        except RenderError:
            return None

    def lay_out(
        self, messages: list[Message], tools: list[Any] | None, *, required: str, prompt_only: bool
    ) -> list[Piece]:
        """Renders a conversation and tells the assistant's turns from the rest.

        Args:
            messages: role and content (and what else the template knows) of each.
            tools: Descriptions of tools, for templates that list them.
            required: Turns that must be found: "all", "last" or "none".
            prompt_only: Render up to where the next answer starts.

        Returns:
            Pieces in order; a turn's piece runs from where generation would start to where it would stop.

        Raises:
            RenderError: The template refuses the conversation, or rewrites earlier turns.
        """
        everything = json.dumps(messages, ensure_ascii=False, default=str)
        mark = next((m for m in MARKS if m not in everything), None)
        if mark is None:
            raise RenderError("a message holds every one of the noncharacters U+FDD0 to U+FDEF")
        typed = re.compile(f"{mark}([0-9]+){mark}")
        messages = self._mark(messages, mark)
        if self._merges_system:
            messages = _merge_system(messages)
        text = self._prompt(messages, tools) if prompt_only else self._render(messages, tools)
        turns = [i for i, message in enumerate(messages) if message.get("role") == "assistant"]
        spans: list[tuple[int, int, int]] = []
        for number, position in enumerate(turns):
            is_last = number == len(turns) - 1 and not prompt_only
            if span := self._find_turn(text, messages, tools, position, spans[-1][1] if spans else 0, is_last):
                spans.append((*span, number))
            elif required == "all" or (required == "last" and is_last):
                raise RenderError(
                    f"the chat template rewrites earlier turns, so answer {number + 1} cannot be told from the rest"
                )
        return self._cut(text, spans, typed)

    def _find_turn(
        self, text: str, messages: list[Message], tools: list[Any] | None, position: int, after: int, is_last: bool
    ) -> tuple[int, int] | None:
        prompt = self._prompt(messages[:position], tools)
        if not text.startswith(prompt) or len(prompt) < after:
            return None
        start, end = len(prompt), None
        if is_last:
            end = len(text)
        elif self._turn_end and self._turn_end in text[start:]:
            end = text.index(self._turn_end, start) + len(self._turn_end)
        else:
            so_far = self._render(messages[: position + 1], tools)
            end = len(so_far) if text.startswith(so_far) else None
        if end is None:
            return None
        # Space after the token that ends the turn belongs to what follows it.
        answer = text[start:end]
        trimmed = answer.rstrip()
        ends_in_control = any(trimmed.endswith(token) for token in self._control_tokens)
        return start, start + len(trimmed) if ends_in_control else end

    def _cut(self, text: str, spans: list[tuple[int, int, int]], typed: re.Pattern[str]) -> list[Piece]:
        pieces: list[Piece] = []
        at = 0
        for start, end, number in [*spans, (len(text), len(text), -1)]:
            pieces += self._split(text[at:start], -1, typed)
            pieces += self._split(text[start:end], number, typed)
            at = end
        return pieces

    def _split(self, text: str, turn: int, typed: re.Pattern[str]) -> list[Piece]:
        pieces: list[Piece] = []
        at = 0
        for match in self._control.finditer(text):
            if at < match.start():
                pieces.append((self._unmark(text[at : match.start()], typed), False, turn))
            pieces.append((match[0], True, turn))
            at = match.end()
        if at < len(text):
            pieces.append((self._unmark(text[at:], typed), False, turn))
        return pieces

    def _mark(self, value: Any, mark: str) -> Any:
        """The same messages with every control token that they hold replaced by a mark and its number."""
        if isinstance(value, str):
            if not self._control.search(value):
                return value
            return self._control.sub(lambda match: f"{mark}{self._control_tokens.index(match[0])}{mark}", value)
        if isinstance(value, list):
            return [self._mark(item, mark) for item in value]
        if isinstance(value, dict):
            return {key: self._mark(item, mark) for key, item in value.items()}
        return value

    def _unmark(self, text: str, typed: re.Pattern[str]) -> str:
        return typed.sub(lambda match: self._control_tokens[int(match[1])], text)

    def _prompt(self, messages: list[Message], tools: list[Any] | None) -> str:
        return self._render(messages, tools, generation=True).removesuffix(self._dropped_suffix)

    def _render(self, messages: list[Message], tools: list[Any] | None, *, generation: bool = False) -> str:
        try:
            return self._template.render(
                messages=messages, tools=tools, add_generation_prompt=generation, **self._names
            )
        except RenderError:
            raise
        except MemoryError:
            raise RenderError(f"the chat template takes more than {MEMORY_BYTES // 2**20} MiB of memory") from None
        except RecursionError:
            raise RenderError("the chat template never stops calling itself") from None
        except Exception as error:  # a template can fail in every way that a program can
            raise RenderError(f"the chat template fails: {type(error).__name__}: {error}") from error


def _merge_system(messages: list[Message]) -> list[Message]:
    """For a template without system turns: their text opens the next user turn."""
    merged: list[Message] = []
    waiting = ""
    for message in messages:
        if message.get("role") == "system":
            waiting += f"{message.get('content')}\n\n"
        elif waiting and message.get("role") == "user":
            merged.append({**message, "content": f"{waiting}{message.get('content')}"})
            waiting = ""
        else:
            merged.append(message)
    return merged


def serve(connection: Any) -> None:
    """Answers requests until the pipe closes: first (template, names, control tokens, date), then conversations."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    def answer(work: Callable[[], Any]) -> Any:
        try:
            result: tuple[str, Any] = ("ok", work())
        except RenderError as error:
            result = ("error", str(error))
        except MemoryError:
            result = ("error", f"the chat template takes more than {MEMORY_BYTES // 2**20} MiB of memory")
        connection.send(result)
        return result

    try:
        template, names, control_tokens, date = connection.recv()
        renderer: list[ChatRenderer] = []
        answer(lambda: renderer.append(ChatRenderer(template, names, control_tokens, date)))
        while True:
            for messages, tools, required, prompt_only in connection.recv():
                answer(lambda: renderer[0].lay_out(messages, tools, required=required, prompt_only=prompt_only))  # noqa: B023
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        return


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
