"""Chats to rows: conversations rendered, checked, and cut into runs of text and control tokens, each trained or not."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from qlora_cli.core.prompts.chat.parts import Message
from qlora_cli.core.prompts.chat.renderer import Rendered, RenderedSpan, Request
from qlora_cli.core.prompts.chat.thoughts import THOUGHTS, share_names
from qlora_cli.core.prompts.chat_template import chat_process
from qlora_cli.core.prompts.encoder import Run, TextEncoder
from qlora_cli.core.prompts.prompt_template import listed, move_spaces
from qlora_cli.core.records.conversation import Conversation, ConversationColumns, read_conversation
from qlora_cli.core.records.messages import KNOWN_ROLES, PART_KEYS, ROLE_KEYS, TRAINED_KEYS
from qlora_cli.core.records.record import NOTHING, BadField, Blank, Record
from qlora_cli.core.records.tools import in_call_order

if TYPE_CHECKING:
    from qlora_cli.core.prompts.formatting import Formatting


# Keys of messages that are read, or that only say which message it is.
KNOWN_KEYS = {*ROLE_KEYS, *TRAINED_KEYS, *THOUGHTS, "content", "tool_calls", "function_call", "tools"}
KNOWN_KEYS |= {"id", "tool_call_id", "type"}
SETTINGS_COLUMN = "chat_template_kwargs"  # as vLLM and others call a row's own variables of the template


class ChatFormatter:
    """Formats conversations, and prompts, under the chat templates of one Formatting for one tokenizer.

    Args:
        formatting: Of the format chat.
        encoder: The tokenizer.
        on_lost_content: stop (what a template leaves out makes a record bad) or warn (it is counted).
        counts: Counted up: unanswered, unfolded, moved, lost_text, unread_KEY and so on (see `TokenisedChunk`).

    Raises:
        DataError: A chat template cannot be used.
    """

    def __init__(
        self, formatting: "Formatting", encoder: TextEncoder, on_lost_content: str, counts: Counter[str]
    ) -> None:
        assert formatting.template is not None
        self.formatting = formatting
        self._encoder = encoder
        self._on_lost_content = on_lost_content
        self._counts = counts
        columns = formatting.conversation or ConversationColumns(messages=formatting.column, tools="tools")
        self._columns = replace(columns, settings=columns.settings or SETTINGS_COLUMN)
        known = re.findall(r"""["']([\w -]+)["']""", formatting.template + (formatting.tool_template or ""))
        self._roles = KNOWN_ROLES | set(known)
        self._words = formatting.template_words()
        names = tuple(sorted(encoder.spec.names.items()))
        self._processes = [
            chat_process(template, names, tuple(encoder.control_ids), formatting.date)
            for template in (formatting.template, formatting.tool_template or formatting.template)
        ]

    def prompt_runs(self, prompt: "str | Record | list[Record]") -> list[Run]:
        """The runs of a prompt up to where the answer starts.

        Raises:
            BadField: It is no conversation, or one that the template refuses.
        """
        column = str(self._columns.messages or self._columns.prompt)
        if isinstance(prompt, dict) and column not in prompt:
            given = next((name for name in ("messages", "prompt") if name in prompt), None)
            if given is None:
                raise BadField(f"it has no {column!r} (it has {listed(prompt)})")
            prompt = {**prompt, column: prompt[given]}
        elif not isinstance(prompt, dict):
            prompt = {column: prompt}
        if column == self._columns.messages and isinstance(prompt[column], str):
            prompt = {**prompt, column: [{"role": "user", "content": prompt[column]}]}
        conversation = self._conversation(prompt, is_prompt=True)
        # One of the data ends in the answer, which is to be given anew: no model speaks twice in a row.
        asked = [i for i, message in enumerate(conversation.messages, start=1) if message["role"] != "assistant"]
        if not asked:
            raise BadField(f"field {column!r}: has no question")
        conversation = replace(conversation, messages=conversation.messages[: asked[-1]])
        (rendered,) = self._render([self._request(conversation, "prompt", ())])
        if isinstance(rendered, BadField):
            raise rendered
        ((spans, _),) = rendered.rows
        return self._runs_of(spans, lambda turn: False)

    def format_records(self, records: Sequence[Record], train_on: str) -> list[list[list[Run]] | BadField | Blank]:
        """The rows of each record, or why there are none (see `RowFormatter.format_records`)."""
        requests: list[Request | BadField | Blank] = []
        for record in records:
            try:
                requests.append(self._training_request(record, train_on))
            except (BadField, Blank) as reason:
                requests.append(reason)
        answers = iter(self._render([request for request in requests if isinstance(request, Request)]))
        return [
            self._chat_rows(next(answers), request, train_on) if isinstance(request, Request) else request
            for request in requests
        ]

    def faults_of(self, record: Record, train_on: str) -> list[str]:
        """What the template leaves out of a record, as sentences without their subject; nothing of one without rows."""
        try:
            (rendered,) = self._render([self._training_request(record, train_on)])
        except (BadField, Blank):
            return []
        return [] if isinstance(rendered, BadField) else [sentence for _, sentence in rendered.faults]

    def find_call_ends(self) -> set[int]:
        """Control tokens that end an answer which calls a tool."""
        return {self._encoder.control_ids[text] for text, is_control in self._render_call()[-1:] if is_control}

    def find_marks(self) -> tuple[set[int], list[Run]]:
        """Control tokens that mark what in an answer is a thought or a call of a tool, and the runs with which an answer
        begins that is neither, where control tokens are among them."""
        asked: Message = {"role": "user", "content": "a"}
        said: Message = {"role": "assistant", "content": "b"}
        plain = self._render_answer([asked, said])
        thinking = self._render_answer([asked, share_names({**said, "reasoning_content": "c"})])
        marks = {text for text, is_control in (*thinking, *self._render_call()) if is_control}
        last_text = max((i for i, (_, is_control) in enumerate(plain) if not is_control), default=0)
        closing = {text for text, is_control in plain[last_text:] if is_control}
        opening: list[Run] = [
            (self._encoder.control_ids[text] if is_control else text, False) for text, is_control in plain[:last_text]
        ]
        is_marked = any(is_control for _, is_control in plain[:last_text]) and plain[last_text][0] == said["content"]
        return {self._encoder.control_ids[text] for text in marks - closing}, opening if is_marked else []

    def _render_call(self) -> list[tuple[str, bool]]:
        function = {"name": "find", "description": "Find", "parameters": {"type": "object", "properties": {"a": {}}}}
        call = {"id": "abc123def", "type": "function", "function": {"name": "find", "arguments": {"a": "b"}}}
        calling: Message = {"role": "assistant", "content": "", "tool_calls": [call]}
        messages: list[Message] = [{"role": "user", "content": "a"}, calling]
        tools: list[Record] = [{"type": "function", "function": function}]
        return self._render_answer(messages, tools)

    def _render_answer(self, messages: list[Message], tools: list[Record] | None = None) -> list[tuple[str, bool]]:
        """The answer of a conversation of two turns, text and whether it is a control token; empty where it has no row."""
        (rendered,) = self._render([Request(messages, tools, self.formatting.template_settings, (0,))])
        if isinstance(rendered, BadField) or rendered.faults or not rendered.rows:
            return []
        return [(text, is_control) for text, is_control, turn in rendered.rows[-1][0] if turn == 0]

    def _training_request(self, record: Record, train_on: str) -> Request:
        conversation = self._conversation(record, is_prompt=False)
        messages = conversation.messages
        self._counts.update(
            {f"unread_{key}" for message in messages if len(message) > 2 for key in self._unread(message)}
        )
        said = zip(conversation.trained, messages, strict=True)
        weighed = any(is_trained and message["role"] != "assistant" for is_trained, message in said)
        self._counts["weighed"] += weighed and train_on != "all"
        answers = _answers(messages)
        if not any(_says_something(messages[i]) for i in answers):
            raise Blank("no answer")
        asked = [False] * len(messages) if train_on == "all" else conversation.asked
        trained = [number for number, i in enumerate(answers) if conversation.trained[i] is not False and not asked[i]]
        trained = trained[-1:] if train_on == "last" else trained
        if not any(_says_something(messages[answers[number]]) for number in trained):
            raise Blank("no answer that the data lets be trained")
        self._counts["unanswered"] += answers[-1] + 1 < len(messages)
        upto = answers[trained[-1]] + 1
        if upto < len(messages):
            conversation = replace(conversation, messages=messages[:upto])
        return self._request(conversation, "whole" if train_on == "all" else "rows", tuple(trained))

    def _unread(self, message: Message) -> list[str]:
        """Keys of a message that hold something, and that neither the reader nor the template knows: what else may be its
        content, and the name of one who is no tool, too."""
        known = {*KNOWN_KEYS, "name"} if message["role"] == "tool" else KNOWN_KEYS
        others = {key: value for key, value in message.items() if key not in known and value not in NOTHING}
        return [
            key
            for key, value in others.items()
            if (value != message["content"] if key in PART_KEYS else key not in self._words)
        ]

    def _request(self, conversation: Conversation, mode: str, trained: tuple[int, ...]) -> Request:
        return Request(
            [share_names(message) for message in conversation.messages],
            conversation.tools,
            {**(self.formatting.template_settings or {}), **conversation.settings},
            trained,
            mode,
            self.formatting.thoughts,
            conversation.documents,
        )

    def _conversation(self, record: Record, *, is_prompt: bool) -> Conversation:
        """A record's conversation; a role that neither chat templates in general nor this one know stops it.

        A template that prints no ids leaves it to the order which result is whose: that of the calls, then.
        """
        conversation = read_conversation(record, self._columns, is_prompt=is_prompt)
        for number, message in enumerate(conversation.messages, start=1):
            if (role := message["role"]) not in self._roles:
                raise BadField(
                    f"message {number} has the role {role!r}, which the chat template does not know; "
                    f"say whose it is, such as --role {role}=assistant"
                )
        if "tool_call_id" in self._words or not any("tool_calls" in message for message in conversation.messages):
            return conversation
        ordered = in_call_order(conversation.messages)
        self._counts["reordered"] += ordered != conversation.messages
        return replace(conversation, messages=ordered)

    def _chat_rows(
        self, rendered: Rendered | BadField, request: Request, train_on: str
    ) -> list[list[Run]] | BadField | Blank:
        if isinstance(rendered, BadField):
            return rendered
        if rendered.faults and self._on_lost_content == "stop":
            return _bad_field([sentence for _, sentence in rendered.faults])
        self._counts.update({f"lost_{kind}" for kind, _ in rendered.faults})
        self._counts["unfolded"] += rendered.unfolded and len(rendered.rows) > 1
        self._counts["moved"] += rendered.moved
        self._counts["hollow"] += rendered.hollow
        answers = _answers(request.messages)
        rows = []
        for spans, trained in rendered.rows:
            if any(_says_something(request.messages[answers[number]]) for number in trained):
                rows.append(self._chat_row(spans, {*trained, -1} if train_on == "all" else {*trained}))
        return rows or Blank("no answer")

    def _chat_row(self, spans: list[RenderedSpan], trained: set[int]) -> list[Run]:
        """A row of which these answers are trained; -1 stands for what is no answer."""
        last = max(trained)
        while spans[-1][2] != last:  # what a template prints after the last answer
            spans.pop()
        return self._encoder.close(self._runs_of(spans, trained.__contains__))

    def _render(self, requests: Sequence[Request]) -> list[Rendered | BadField]:
        """What became of each, by the template for tools where it has tools."""
        rendered: dict[int, Rendered | BadField] = {}
        for has_tools in (False, True):
            mine = [i for i, request in enumerate(requests) if bool(request.tools) == has_tools]
            answers = self._processes[has_tools].render([requests[i] for i in mine])
            rendered.update(zip(mine, answers, strict=True))
        return [rendered[i] for i in range(len(requests))]

    def _runs_of(self, spans: Sequence[RenderedSpan], trained: Callable[[int], bool]) -> list[Run]:
        """A rendered chat's spans as runs, one for each stretch of text of the same turn.

        Spaces right before an answer go to the answer, as in PromptTemplate. White space beside control tokens that
        take it along is left out, as the tokenizer leaves it out.
        """
        runs: list[Run] = []
        previous = -1
        for text, is_control, turn in self._encoder.strip_beside_control(spans):
            spaces = move_spaces(runs) if turn >= 0 and turn != previous else ""
            if not is_control:
                runs.append((spaces + text, trained(turn)))
            else:
                if spaces:
                    runs.append((spaces, trained(turn)))
                runs.append((self._encoder.control_ids[text], trained(turn)))
            previous = turn
        if previous < 0:
            move_spaces(runs)  # a prompt that ends here
        return runs


def _answers(messages: list[Message]) -> list[int]:
    """Numbers of the messages that are answers."""
    return [i for i, message in enumerate(messages) if message["role"] == "assistant"]


def _says_something(message: Message) -> bool:
    thought = message.get("reasoning_content")
    return bool(
        message["content"].strip() or message.get("tool_calls") or (isinstance(thought, str) and thought.strip())
    )


def _bad_field(faults: list[str]) -> BadField:
    """What the template does to a conversation, as the reason why it is refused, and the flags with which it is not."""
    shown = "; ".join(faults[:3]) + (f"; and {len(faults) - 3} more" if len(faults) > 3 else "")
    ways = "Take another template, --chat-template FILE, or train such rows all the same: --on-lost-content warn."
    if any("thought" in fault for fault in faults):
        ways = f"Leave thoughts out: --thoughts drop. Or {ways[0].lower()}{ways[1:]}"
    return BadField(f"the chat template {shown}", ways)
