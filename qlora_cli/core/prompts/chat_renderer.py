"""Chat template renderer: conversations to text with the assistant's turns marked; a process of its own.

A chat template is a program that came with a model: it may loop for ever or fill the memory. So it runs here, where
memory and processor time are limited. Loads jinja2 and the standard library only.
"""

import json
import re
import resource
import signal
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

# Text, whether it is a control token of the template, number of the assistant turn or -1.
RenderedSpan = tuple[str, bool, int]
RenderedRow = tuple[list[RenderedSpan], bool]  # a row, and whether only its last turn counts
Message = dict[str, Any]


class RenderError(Exception):
    """A conversation that the template refuses, or whose turns cannot be found."""


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
        self._wants_parts = False
        self._turn_end: str | None = None
        self._probe()

    def _probe(self) -> None:
        """Finds out what the template supports, and how it ends turns, by rendering small conversations."""
        user, assistant = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": PROBE}
        refusal = self._try([user, assistant])
        if isinstance(refusal, RenderError) or PROBE not in refusal:
            self._wants_parts = True  # contents as lists of parts, as templates of models that see pictures do
        whole = self._try([user, assistant])
        if isinstance(whole, RenderError):
            reason = refusal if isinstance(refusal, RenderError) else whole
            raise RenderError(f"the chat template refuses a user's question and an answer: {reason}")
        if PROBE not in whole:
            raise RenderError("the chat template leaves out what the assistant says")
        prompt = self._print([user], None, generation=True)
        if not whole.startswith(prompt):
            # It opens an answer at generation with what an answer in the history does not begin with (a <think> tag).
            common = next(i for i, (a, b) in enumerate(zip(prompt + "\0", whole + "\1", strict=False)) if a != b)
            self._dropped_suffix = prompt[common:]
        with_system = self._try([{"role": "system", "content": "Be kind"}, user, assistant])
        self._merges_system = isinstance(with_system, RenderError)
        history = self._try([user, assistant, user])
        if isinstance(history, str) and PROBE in history:
            self._turn_end = self._find_turn_end(whole.rpartition(PROBE)[2].rstrip(), history.partition(PROBE)[2])

    def _find_turn_end(self, after_last: str, after_earlier: str) -> str | None:
        """What closes an answer: what follows the last one, if it follows earlier ones too, or one control token."""
        if self._control.search(after_last) and after_earlier.startswith(after_last):
            return after_last
        stop = self._control.search(after_earlier)
        return stop[0] if stop else None

    def _try(self, messages: list[Message]) -> str | RenderError:
        """A conversation rendered, or why the template refuses it."""
        try:
            return self._print(messages, None)
        except RenderError as error:
            return error

    def render(
        self, messages: list[Message], tools: list[Any] | None, *, required: str, prompt_only: bool
    ) -> list[RenderedRow]:
        """Renders a conversation and finds the assistant's turns in it.

        Where a template shows an answer differently once another follows (without its reasoning, mostly), and so
        earlier answers cannot be found, each answer gets a row of its own that ends with it, as at generation.

        Args:
            messages: role and content (and what else the template knows) of each.
            tools: Descriptions of tools, for templates that list them.
            required: Turns that must be found: "all", "last" or "none".
            prompt_only: Render up to where the next answer starts.

        Returns:
            One row or several, each as spans in order; a turn is what lies between where generation would start and
            where it would stop.

        Raises:
            RenderError: The template refuses the conversation, or even the last answer cannot be found.
        """
        everything = json.dumps(messages, ensure_ascii=False, default=str)
        mark = next((m for m in MARKS if m not in everything), None)
        if mark is None:
            raise RenderError("a message holds every one of the noncharacters U+FDD0 to U+FDEF")
        messages = self._mark(messages, mark)
        if self._merges_system:
            messages = _merge_system(messages)
        turns = [i for i, message in enumerate(messages) if message.get("role") == "assistant"]
        spans, missing = self._render_row(messages, tools, turns, mark, prompt_only=prompt_only)
        if not missing or required == "none" or (required == "last" and turns[-1] not in missing):
            return [(spans, False)]
        rows: list[RenderedRow] = []
        for turn in turns if required == "all" else turns[-1:]:
            spans, missing = self._render_row(
                messages[: turn + 1], tools, [i for i in turns if i <= turn], mark, prompt_only=False
            )
            if turn in missing:
                raise RenderError("the chat template changes what stands before an answer once the answer is there")
            if messages[turn]["content"].strip() or messages[turn].get("tool_calls"):
                rows.append((spans, True))
        return rows

    def _render_row(
        self, messages: list[Message], tools: list[Any] | None, turns: list[int], mark: str, *, prompt_only: bool
    ) -> tuple[list[RenderedSpan], set[int]]:
        """One row's spans, and the turns that were not found."""
        text = self._print(messages, tools, generation=prompt_only)
        found: list[tuple[int, int, int]] = []  # start, end, number of the turn
        missing = set()
        for number, turn in enumerate(turns):
            is_last = turn == len(messages) - 1
            if place := self._find_turn(text, messages, tools, turn, found[-1][1] if found else 0, is_last):
                found.append((*place, number))
            else:
                missing.add(turn)
        return self._cut(text, found, re.compile(f"{mark}([0-9]+){mark}")), missing

    def _find_turn(
        self, text: str, messages: list[Message], tools: list[Any] | None, position: int, after: int, is_last: bool
    ) -> tuple[int, int] | None:
        prompt = self._print(messages[:position], tools, generation=True)
        if not text.startswith(prompt) or len(prompt) < after:
            return None
        start, end = len(prompt), None
        if is_last:
            end = len(text)
        elif self._turn_end and self._turn_end in text[start:]:
            end = text.index(self._turn_end, start) + len(self._turn_end)
        else:
            so_far = self._print(messages[: position + 1], tools)
            end = len(so_far) if text.startswith(so_far) else None
        if end is None:
            return None
        # Space after the token that ends the turn belongs to what follows it.
        answer = text[start:end]
        trimmed = answer.rstrip()
        ends_in_control = any(trimmed.endswith(token) for token in self._control_tokens)
        return start, start + len(trimmed) if ends_in_control else end

    def _cut(self, text: str, turns: list[tuple[int, int, int]], typed: re.Pattern[str]) -> list[RenderedSpan]:
        spans: list[RenderedSpan] = []
        at = 0
        for start, end, number in [*turns, (len(text), len(text), -1)]:
            spans += self._split(text[at:start], -1, typed)
            spans += self._split(text[start:end], number, typed)
            at = end
        return spans

    def _split(self, text: str, turn: int, typed: re.Pattern[str]) -> list[RenderedSpan]:
        spans: list[RenderedSpan] = []
        at = 0
        for match in self._control.finditer(text):
            if at < match.start():
                spans.append((self._unmark(text[at : match.start()], typed), False, turn))
            spans.append((match[0], True, turn))
            at = match.end()
        if at < len(text):
            spans.append((self._unmark(text[at:], typed), False, turn))
        return spans

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

    def _print(self, messages: list[Message], tools: list[Any] | None, *, generation: bool = False) -> str:
        if self._wants_parts:
            messages = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
        try:
            text = self._template.render(
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
        return text.removesuffix(self._dropped_suffix) if generation else text


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
    """Answers requests until the pipe closes: first what ChatRenderer takes and the limit, then conversations.

    Past the limit of processor time, for one conversation, the system ends the process with SIGPROF, whatever it is at.
    """
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)

    def answer(work: Callable[[], Any]) -> Any:
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        try:
            result: tuple[str, Any] = ("ok", work())
        except RenderError as error:
            result = ("error", str(error))
        except MemoryError:
            result = ("error", f"the chat template takes more than {MEMORY_BYTES // 2**20} MiB of memory")
        signal.setitimer(signal.ITIMER_PROF, 0)
        connection.send(result)
        return result

    try:
        template, names, control_tokens, date, cpu_seconds = connection.recv()
        renderer: list[ChatRenderer] = []
        answer(lambda: renderer.append(ChatRenderer(template, names, control_tokens, date)))
        while True:
            for messages, tools, required, prompt_only in connection.recv():
                answer(lambda: renderer[0].render(messages, tools, required=required, prompt_only=prompt_only))  # noqa: B023
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        return


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
