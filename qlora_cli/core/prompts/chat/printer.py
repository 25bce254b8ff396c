"""Chat template printer: one Jinja template compiled and run as transformers does, and what it can print, found by trying."""

import json
import re
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import concat

from qlora_cli.core.prompts.chat.parts import Message

MEMORY_BYTES = 2**29  # address space of the process that runs templates
PROBE = "Certainly-42"  # an answer that no template writes by itself
_CLOSING = re.compile(r"</\w|\[/\w")


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


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The filter of transformers' templates: no HTML escapes, arguments in this order."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class ChatPrinter:
    """One chat template, compiled.

    Args:
        template: Jinja source.
        names: bos_token, eos_token and so on, which templates print.
        control_tokens: Every control token of the tokenizer.
        date: ISO date that strftime_now sees, so that a prompt is the same on the day of training and years later.

    Attributes:
        control: Finds control tokens.
        header: What is printed at generation after the last message to open an answer, where that can be told.
        closes: Whether an answer ends in a control token of its own, or in that which opens the next turn.

    Raises:
        RenderError: The template does not compile, or cannot print a question and an answer.
    """

    def __init__(self, template: str, names: dict[str, str], control_tokens: list[str], date: str | None) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise
        if date is not None:
            environment.globals["strftime_now"] = datetime.fromisoformat(date).strftime
        try:
            self._template = environment.from_string(template)
        except TemplateError as error:
            raise RenderError(f"the chat template does not compile: {str(error).rstrip('.')}") from error
        self._globals = dict(self._template.globals)
        self._names = names
        longest_first = sorted(control_tokens, key=len, reverse=True)
        self.control = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._control_tokens = tuple(control_tokens)
        self._openings: dict[str, str] = {}  # settings → what is left out of a prompt
        self._wants_parts = False
        self._wants_text: bool | None = None
        self._probe()

    def _probe(self) -> None:
        """Finds out what the template supports, and how it opens and closes answers, by small conversations."""
        user, assistant = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": PROBE}
        refusal = self.attempt([user, assistant])
        if isinstance(refusal, RenderError) or PROBE not in refusal:
            self._wants_parts = True  # contents as lists of parts, as templates of models that see pictures do
        whole = self.attempt([user, assistant])
        if isinstance(whole, RenderError):
            reason = refusal if isinstance(refusal, RenderError) else whole
            raise RenderError(f"the chat template refuses a user's question and an answer: {reason}")
        if PROBE not in whole:
            raise RenderError("the chat template leaves out what the assistant says")
        self.closes = self.control.search(whole.rpartition(PROBE)[2]) is not None
        question, prompt = self.attempt([user]), self.print([user], None, generation=True)
        self.header = prompt[len(question) :] if isinstance(question, str) and prompt.startswith(question) else ""

    def trim(self, answer: str) -> str:
        """An answer without the white space after the control token that ends it: that belongs to what follows."""
        trimmed = answer.rstrip()
        return trimmed if trimmed.endswith(self._control_tokens) else answer

    def attempt(self, messages: list[Message], tools: Any = None, settings: Any = None) -> str | RenderError:
        """A conversation printed, or why the template refuses it."""
        try:
            return self.print(messages, tools, settings)
        except RenderError as error:
            return error

    def print(
        self,
        messages: list[Message],
        tools: list[Any] | None,
        settings: dict[str, Any] | None = None,
        *,
        generation: bool = False,
    ) -> str:
        """A conversation as the template prints it; at generation, up to where the answer starts.

        Raises:
            RenderError: The template refuses it, or fails.
        """
        text = self._run(messages, tools, settings or {}, generation=generation)
        return text.removesuffix(self._opening(settings or {})) if generation else text

    def _opening(self, settings: dict[str, Any]) -> str:
        """What opens an answer at generation, but not in the history (a <think> tag).

        It is left out of prompts, in training and at generation. A block that is closed again (an empty thought) says
        what kind of answer is wanted and stays.
        """
        key = json.dumps(settings, sort_keys=True, default=str)
        if key not in self._openings:
            user = {"role": "user", "content": "Hi"}
            prompt = self._run([user], None, settings, generation=True)
            whole = self._run([user, {"role": "assistant", "content": PROBE}], None, settings, generation=False)
            common = next(i for i, (a, b) in enumerate(zip(prompt + "\0", whole + "\1", strict=False)) if a != b)
            opening = prompt[common:]
            question = self.attempt([user], None, settings)
            added = prompt[len(question) :] if isinstance(question, str) and prompt.startswith(question) else prompt
            is_opening = added.endswith(opening) and not _CLOSING.search(opening)
            self._openings[key] = opening if is_opening else ""
        return self._openings[key]

    def _run(
        self, messages: list[Message], tools: list[Any] | None, settings: dict[str, Any], *, generation: bool
    ) -> str:
        if self._wants_parts:
            messages = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
        variables = {
            **self._globals,
            **self._names,
            "documents": None,
            **settings,
            "messages": messages,
            "tools": tools,
            "add_generation_prompt": generation,
        }
        try:
            # What Template.render does, but for a copy of the globals at every call, a fifth of the time.
            return concat(self._template.root_render_func(self._template.new_context(variables, shared=True)))
        except RenderError:
            raise
        except MemoryError:
            raise RenderError(f"the chat template takes more than {MEMORY_BYTES // 2**20} MiB of memory") from None
        except RecursionError:
            raise RenderError("the chat template never stops calling itself") from None
        except Exception as error:  # a template can fail in every way that a program can
            raise RenderError(f"the chat template fails: {type(error).__name__}: {error}") from error

    @property
    def wants_text(self) -> bool:
        """Whether the arguments of calls have to be JSON text, or an object."""
        if self._wants_text is None:
            printed = [self._probe_call(arguments) for arguments in ({"key": PROBE}, json.dumps({"key": PROBE}))]
            as_object, as_text = (text if isinstance(text, str) and PROBE in text else "" for text in printed)
            # Printed by Python ('key') it was meant to be text; so it was if an object makes the template fail.
            self._wants_text = bool(as_text) and (not as_object or f"'key': '{PROBE}'" in as_object)
        return self._wants_text

    def _probe_call(self, arguments: Any) -> str | RenderError:
        function = {"name": "probe", "arguments": arguments}
        call = {"id": "abc123def", "type": "function", "function": function}
        result = {"role": "tool", "name": "probe", "tool_call_id": "abc123def", "content": "Yes"}
        question = {"role": "user", "content": "Hi"}
        calling = {"role": "assistant", "content": "", "tool_calls": [call]}
        printed = self.attempt([question, calling, result, {"role": "assistant", "content": "Ok"}])
        return self.attempt([question, calling]) if isinstance(printed, RenderError) else printed
