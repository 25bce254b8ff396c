"""Chat template renderer: conversations to rows of spans with the assistant's turns marked; a process of its own.

A chat template is a program that came with a model: it may loop for ever or fill the memory. So it runs here, where
memory and processor time are limited. Loads jinja2 and the standard library only.
"""

import gc
import json
import resource
import signal
from collections import OrderedDict
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from qlora_cli.core.prompts.chat.control_marks import ControlMarks
from qlora_cli.core.prompts.chat.parts import Marker, Message, Part
from qlora_cli.core.prompts.chat.plan import Plan, PlannedRow, Planner, PlanOptions
from qlora_cli.core.prompts.chat.printer import MEMORY_BYTES, ChatPrinter, RenderError
from qlora_cli.core.prompts.chat.skeleton import Skeleton, position_of
from qlora_cli.core.prompts.chat.thoughts import doubles_thoughts, keep_thoughts, name_thought

MOST_PLANS = 256  # shapes of conversations kept

# Text, whether it is a control token of the template, and the number of the answer, from 0 among the answers, or -1.
RenderedSpan = tuple[str, bool, int]


class Request(NamedTuple):
    """One conversation and what is asked of it.

    Attributes:
        messages: role and content (and what else the template knows) of each.
        tools: Descriptions of tools, for templates that list them.
        settings: Template variables.
        trained: Answers to train, counted from 0 among the answers.
        mode: "rows" (an answer may get a row of its own), "whole" (one row, of which every token is trained) or
            "prompt" (up to where the next answer starts).
        thoughts: keep, last or drop.
        documents: For templates that print documents.
    """

    messages: list[Message]
    tools: list[Any] | None = None
    settings: dict[str, Any] | None = None
    trained: tuple[int, ...] = ()
    mode: str = "rows"
    thoughts: str = "keep"
    documents: list[Any] | None = None


class Rendered(NamedTuple):
    """What became of a conversation.

    Attributes:
        rows: Spans in order, and the answers to train in each.
        unfolded: Whether each answer has a row of its own.
        faults: (kind, sentence) of what the template leaves out or prints elsewhere.
        moved: Whether system or developer turns were put elsewhere.
        hollow: Whether a trained answer without a thought is given an empty one.
    """

    rows: list[tuple[list[RenderedSpan], tuple[int, ...]]]
    unfolded: bool = False
    faults: tuple[tuple[str, str], ...] = ()
    moved: bool = False
    hollow: bool = False


_Text = tuple[str, list[tuple[int, int, int]]]  # a row's text, and (start, end, number) of each answer in it


class _OtherShape(Exception):
    """A conversation that is not printed as others of its shape: the template looks at the words themselves."""


class ChatRenderer:
    """One chat template, with what is known of the conversations that it has printed.

    Args:
        template: Jinja source.
        names: bos_token, eos_token and so on, which templates print.
        control_tokens: Every control token of the tokenizer.
        date: ISO date that strftime_now sees.

    Raises:
        RenderError: The template cannot be used.
    """

    def __init__(self, template: str, names: dict[str, str], control_tokens: list[str], date: str | None) -> None:
        self._printer = ChatPrinter(template, names, control_tokens, date)
        self._source = template
        self._marker = Marker(template)
        self._control_marks = ControlMarks(control_tokens, self._printer.control)
        self._doubles_thoughts = doubles_thoughts(self._printer.attempt, template)
        self._plans: OrderedDict[str, Plan] = OrderedDict()

    def render(self, request: Request) -> Rendered:
        """Renders a conversation, finds the assistant's turns in it, and checks that nothing of it is lost.

        Where a template shows an answer differently once another follows (without its thought, mostly), each answer
        gets a row of its own that ends with it, as at generation.

        Raises:
            RenderError: The template refuses the conversation, or an answer cannot be told from its prompt.
        """
        mark, (messages, tools, settings) = self._control_marks.mark_all(
            [
                request.messages,
                request.tools or None,
                {"documents": request.documents or None, **(request.settings or {})},
            ]
        )
        options = PlanOptions(
            request.trained,
            unfold=request.thoughts == "keep",
            in_place=request.mode == "whole",
            prompt_only=request.mode == "prompt",
        )
        conversation = _Conversation(self._prepare(messages, request.thoughts), tools, settings, options)
        try:
            plan, texts = self._carry_out(conversation, self._marker)
        except _OtherShape:
            # The template looks at the words themselves.
            plan = Planner(self._printer, self._marker, *conversation[1:], by_words=True).plan(conversation.messages)
            texts = self._texts_of(plan, conversation, self._marker.mark(plan.rewrite(conversation.messages)).parts)
        rows = []
        for text, turns in texts:
            own = turns[-1:] if plan.unfolded else turns
            trained = {turn for _, _, turn in own} & set(request.trained) - plan.void
            rows.append((self._cut(text, turns, mark), tuple(sorted(trained))))
        faults = tuple((fault.kind, self._control_marks.unmark(str(fault), mark)) for fault in plan.faults)
        return Rendered(rows, plan.unfolded, faults, plan.moved, plan.hollow)

    def _prepare(self, messages: list[Message], thoughts: str) -> list[Message]:
        """The messages in the form that the template reads, with the thoughts that are wanted."""
        messages = keep_thoughts(messages, thoughts)
        if self._doubles_thoughts:
            messages = [name_thought(message, self._doubles_thoughts) for message in messages]
        if any("tool_calls" in message for message in messages) and self._printer.wants_text:
            messages = [write_arguments(message) for message in messages]
        return messages

    def _carry_out(self, conversation: "_Conversation", marker: Marker) -> tuple[Plan, list[_Text]]:
        """The plan of a conversation's shape, and the texts of its rows."""
        marked = marker.mark(conversation.messages)
        key = repr((marked.messages, *conversation[1:3], conversation.options.key))  # half the time of JSON
        plan = self._plans.get(key) if marker is self._marker else None
        if plan is None:
            everything = json.dumps(conversation[:3], ensure_ascii=False, default=str)
            if marker is self._marker and marker.pattern.search(everything):
                return self._carry_out(
                    conversation, Marker(self._source, everything)
                )  # it holds what looks like a mark
            plan = Planner(self._printer, marker, *conversation[1:]).plan(conversation.messages)
            if marker is self._marker:
                self._plans[key] = plan
                if len(self._plans) > MOST_PLANS:
                    self._plans.popitem(last=False)
        else:
            self._plans.move_to_end(key)
        as_given = plan.rewrite is list
        parts = marked.parts if as_given else marker.mark(plan.rewrite(conversation.messages)).parts
        return plan, self._texts_of(plan, conversation, parts)

    def _texts_of(self, plan: Plan, conversation: "_Conversation", parts: list[Part]) -> list[_Text]:
        messages = plan.rewrite(conversation.messages)
        return [self._carry_out_row(row, messages, conversation, parts) for row in plan.rows]

    def _carry_out_row(
        self, row: PlannedRow, messages: list[Message], conversation: "_Conversation", parts: list[Part]
    ) -> _Text:
        _, tools, settings, options = conversation
        text = self._printer.print(messages[: row.upto], tools, settings, generation=options.prompt_only)
        if row.answer is not None:
            skeleton, place = row.answer
            answer = text[position_of(place, _match(skeleton, text, parts)) :]
            prompt = self._printer.print(messages[: row.upto - 1], tools, settings, generation=True)
            text = prompt + self._printer.trim(answer)
        ends = _match(row.skeleton, text, parts)
        turns = [(position_of(start, ends), position_of(end, ends), turn) for start, end, turn in row.turns]
        if row.stop is not None:
            begin, stop, turn = turns[-1]
            text = text[:stop] + row.stop
            turns[-1] = (begin, len(text), turn)
        return text, turns

    def _cut(self, text: str, turns: list[tuple[int, int, int]], mark: str) -> list[RenderedSpan]:
        spans: list[RenderedSpan] = []
        at = 0
        for start, end, turn in [*turns, (len(text), len(text), -1)]:
            spans += self._control_marks.split(text[at:start], -1, mark)
            spans += self._control_marks.split(text[start:end], turn, mark)
            at = end
        return spans


class _Conversation(NamedTuple):
    messages: list[Message]
    tools: list[Any] | None
    settings: dict[str, Any]
    options: PlanOptions


def _match(skeleton: Skeleton, text: str, parts: list[Part]) -> list[int]:
    ends = skeleton.match(text, parts)
    if ends is None:
        raise _OtherShape
    return ends


def write_arguments(message: Message) -> Message:
    """The message with the arguments of its calls as JSON text, for a template that joins them to its own words."""

    def write(value: Any) -> Any:
        if isinstance(value, list):
            return [write(item) for item in value]
        if not isinstance(value, dict):
            return value
        return {
            key: json.dumps(item, ensure_ascii=False)
            if key == "arguments" and not isinstance(item, str)
            else write(item)
            for key, item in value.items()
        }

    return {**message, "tool_calls": write(message["tool_calls"])} if "tool_calls" in message else message


def serve(connection: Any) -> None:
    """Answers requests until the pipe closes: first what ChatRenderer takes and the limit, then lists of conversations.

    Past the limit of processor time, for one conversation, the system ends the process with SIGPROF, whatever it is at.
    The answers of a list go back together: one at a time they took a third of the time of it all.
    """
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)

    def answer(work: Callable[[], Any]) -> tuple[str, Any]:
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        try:
            result: tuple[str, Any] = ("ok", work())
        except RenderError as error:
            result = ("error", str(error))
        except MemoryError:
            result = ("error", f"the chat template takes more than {MEMORY_BYTES // 2**20} MiB of memory")
        signal.setitimer(signal.ITIMER_PROF, 0)
        return result

    try:
        template, names, control_tokens, date, cpu_seconds = connection.recv()
        kind, renderer = answer(lambda: ChatRenderer(template, names, control_tokens, date))
        connection.send((kind, "" if kind == "ok" else renderer))
        gc.freeze()  # what stays is not looked through again
        while True:
            connection.send([answer(lambda: renderer.render(request)) for request in connection.recv()])  # noqa: B023
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        return


def serve_descriptor(descriptor: int) -> None:
    """Serves the pipe with this file descriptor; what a child process runs."""
    serve(Connection(descriptor))
