"""Plan of a conversation's shape: which rows it becomes, where the answers stand in them, and what the template leaves out."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from qlora_cli.core.prompts.chat.check import LEFT_OUT, Fault, check_row, writes_empty_thought
from qlora_cli.core.prompts.chat.parts import MarkedConversation, Marker, Message
from qlora_cli.core.prompts.chat.printer import ChatPrinter, RenderError
from qlora_cli.core.prompts.chat.skeleton import Place, Skeleton

CHANGED = "the chat template changes what stands before an answer once the answer is there"
Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """How a conversation is to become rows.

    Attributes:
        trained: Answers to train, counted from 0 among the answers.
        unfold: Whether each answer gets a row of its own where the template prints earlier ones otherwise than when
            they were given; if not, they are taken as the whole conversation shows them.
        in_place: Whether the one row has to be that of the whole conversation (every token is trained).
        prompt_only: Print up to where the next answer starts.
    """

    trained: tuple[int, ...]
    unfold: bool = True
    in_place: bool = False
    prompt_only: bool = False

    @property
    def key(self) -> tuple[Any, ...]:
        """All of it, for comparing."""
        return self.trained, self.unfold, self.in_place, self.prompt_only


@dataclass(frozen=True, slots=True)
class PlannedRow:
    """One row.

    Attributes:
        upto: Messages in it.
        skeleton: The template's own words in it.
        turns: (start, end, number of the answer) of each answer found, in order.
        answer: Set where the prompt is printed otherwise once the answer is there: the row is the prompt as at
            generation, and then what this rendering, with the answer, holds from this place on.
        stop: Control token that the model has to say after the last turn, where the template itself prints none.
    """

    upto: int
    skeleton: Skeleton
    turns: tuple[tuple[Place, Place, int], ...]
    answer: tuple[Skeleton, Place] | None = None
    stop: str | None = None


@dataclass
class Plan:
    """What becomes of every conversation of one shape.

    Attributes:
        rows: One, or one for each answer.
        unfolded: Whether each answer has a row of its own.
        faults: What the template leaves out or puts elsewhere.
        rewrite: What has to be done to the messages first.
        moved: Whether that moves what system or developer turns say.
        void: Answers of which nothing is printed.
        hollow: Whether a trained answer begins with an empty thought that the template writes.
    """

    rows: list[PlannedRow]
    unfolded: bool = False
    faults: list[Fault] = field(default_factory=list)
    rewrite: Callable[[list[Message]], list[Message]] = list
    moved: bool = False
    void: set[int] = field(default_factory=set)
    hollow: bool = False


class Planner:
    """Plans one conversation: prints it and its beginnings, with marks in place of words, and compares.

    Args:
        printer: The template.
        marker: Marks conversations for it.
        tools: Given to the template.
        settings: Template variables.
        options: What is asked.
        by_words: Find the words themselves instead of marks.
    """

    def __init__(
        self,
        printer: ChatPrinter,
        marker: Marker,
        tools: list[Any] | None,
        settings: dict[str, Any],
        options: PlanOptions,
        *,
        by_words: bool = False,
    ) -> None:
        self._printer, self._marker, self._tools, self._settings = printer, marker, tools, settings
        self._options, self._by_words = options, by_words

    def plan(self, messages: list[Message]) -> Plan:
        """The plan, with system and developer turns put where the template prints them.

        Raises:
            RenderError: The template refuses the conversation, or an answer cannot be told from its prompt.
        """
        best: Plan | None = None
        refusal: RenderError | None = None
        for rewrite, moves in _rewrites(messages):
            rewritten = rewrite(messages)
            origins = [m["number"] for m in rewrite([{**m, "number": i} for i, m in enumerate(messages)])]
            try:
                plan = self._plan(rewritten)
            except RenderError as error:
                refusal = refusal or error
                continue
            lost_instructions = any(f.message >= 0 and _instructs(rewritten[f.message]) for f in plan.faults)
            plan.rewrite, plan.moved = rewrite, moves
            plan.faults = [replace(f, message=origins[f.message]) if f.message >= 0 else f for f in plan.faults]
            if not lost_instructions:
                return plan
            best = best or plan
        if best is None:
            assert refusal is not None
            raise refusal
        return best

    def _plan(self, messages: list[Message]) -> Plan:
        mark = self._marker.keep if self._by_words else self._marker.mark
        self._conversation: MarkedConversation = mark(messages)
        self._printed: dict[tuple[int, bool], str | RenderError] = {}
        self._spans: tuple[Skeleton | None, dict[int, list[Span]]] = (None, {})  # of the marks of each message
        self._answers: list[int] = []  # numbers of the messages that are answers
        whole = len(messages)
        if self._options.prompt_only:
            text = self._print(whole, generation=True)
            if isinstance(text, RenderError):
                raise text
            return self._checked([PlannedRow(whole, self._skeleton(text), ())], unfolded=False)
        text = self._print(whole)
        self._answers = [i for i, message in enumerate(messages) if message.get("role") == "assistant"]
        trained = [self._answers[number] for number in self._options.trained]
        if isinstance(text, str):
            skeleton = self._skeleton(text)
            found = {i: span for i in self._answers if (span := self._find_turn(skeleton, i, whole)) is not None}
            missing = set(trained) - found.keys()
            if self._options.in_place or all(self._is_greeting(i) for i in missing):
                return self._checked([self._row(skeleton, found, whole)], unfolded=False)
        elif self._options.in_place:
            raise text
        return self._checked([self._row_of_answer(i) for i in trained if not self._is_greeting(i)], unfolded=True)

    def _is_greeting(self, turn: int) -> bool:
        """Whether nobody spoke before it and the template knows no prompt for it: it can only be context."""
        asked = any(message.get("role") in ("user", "tool") for message in self._conversation.messages[:turn])
        return not asked and isinstance(self._print(turn, generation=True), RenderError)

    def _checked(self, rows: list[PlannedRow], *, unfolded: bool) -> Plan:
        plan = Plan(rows, unfolded)
        for row in rows:
            turns = [(self._answers[number], start, end) for start, end, number in row.turns]
            spans = {turn: (_start_in(row, start), _start_in(row, end)) for turn, start, end in turns}
            trained = set(spans) & {self._answers[number] for number in self._options.trained}
            if unfolded:
                trained &= {row.upto - 1}
            faults = check_row(
                self._conversation, row.skeleton, row.upto, spans, trained, self._tools, self._marker.doubled
            )
            own = {turn: spans[turn] for turn in trained}
            plan.hollow |= writes_empty_thought(self._conversation, row.skeleton, own)
            plan.faults = list(dict.fromkeys([*plan.faults, *faults]))
            plan.void |= {self._answers.index(turn) for turn in trained if faults and self._is_void(turn, faults)}
        return plan

    def _is_void(self, turn: int, faults: list[Fault]) -> bool:
        own = {part.name for part in self._conversation.parts if part.message == turn and part.kind != "id"}
        own |= {plain.name for plain in self._conversation.plain if plain.message == turn}
        lost = {fault.name for fault in faults if fault.message == turn and fault.problem == LEFT_OUT}
        return bool(own) and own <= lost

    def _row(
        self, skeleton: Skeleton, spans: dict[int, Span], upto: int, answer: tuple[Skeleton, Place] | None = None
    ) -> PlannedRow:
        turns = tuple(
            (skeleton.place_of(start), skeleton.place_of(end), self._answers.index(turn))
            for turn, (start, end) in sorted(spans.items())
        )
        stop = self._missing_stop(upto) if upto - 1 in spans else None
        return PlannedRow(upto, skeleton, turns, answer, stop)

    def _row_of_answer(self, answer: int) -> PlannedRow:
        """The row that ends with an answer, as when it was given."""
        upto = answer + 1
        text = self._print(upto)
        if isinstance(text, RenderError):
            raise text
        skeleton = self._skeleton(text)
        earlier = [i for i in self._answers if i < upto]
        found = {i: span for i in earlier if (span := self._find_turn(skeleton, i, upto)) is not None}
        if answer in found:
            return self._row(skeleton, found, upto)
        prompt = self._print(answer, generation=True)
        start = None if isinstance(prompt, RenderError) else self._align(prompt, skeleton, answer)
        if start is None or isinstance(prompt, RenderError):
            raise RenderError(CHANGED)
        joined = self._skeleton(prompt + self._printer.trim(text[start:]))
        span = (len(prompt), len(joined.text))
        return self._row(joined, {answer: span}, upto, (skeleton, skeleton.place_of(start)))

    def _find_turn(self, skeleton: Skeleton, turn: int, upto: int) -> Span | None:
        """What lies between where generation would start and where it would stop, if it is printed as when given."""
        start = self._find_start(skeleton, turn)
        end = None if start is None else self._find_end(skeleton, turn, start, upto)
        if start is None or end is None:
            return None
        if any(p < start or end < q for p, q in self._marks_of(skeleton, turn)):
            return None
        return start, end

    def _find_start(self, skeleton: Skeleton, turn: int) -> int | None:
        prompt = self._print(turn, generation=True)
        if isinstance(prompt, str) and skeleton.text.startswith(prompt):
            return len(prompt)
        low, high = self._gap_before(skeleton, turn)
        header = self._printer.header
        opened = skeleton.text.rfind(header, low, high) if header else -1
        if isinstance(prompt, RenderError):  # it cannot be printed up to here (nothing stands before a greeting)
            return opened + len(header) if opened >= 0 else None
        before = self._conversation.messages[turn - 1] if turn else {}
        if before.get("role") == "assistant" and header and opened < 0 and low:
            return low  # printed as one turn with the answer before it
        return None

    def _gap_before(self, skeleton: Skeleton, turn: int) -> Span:
        """From the last mark of earlier messages to the first of this turn."""
        own = self._marks_of(skeleton, turn)
        high = min((start for start, _ in own), default=len(skeleton.text))
        low = max((end for t in range(turn) for _, end in self._marks_of(skeleton, t) if end <= high), default=0)
        return low, high

    def _find_end(self, skeleton: Skeleton, turn: int, start: int, upto: int) -> int | None:
        text = skeleton.text
        last_mark = max((end for _, end in self._marks_of(skeleton, turn)), default=start)
        if turn == upto - 1:
            return start + len(self._printer.trim(text[start:]))
        alone = self._print(turn + 1)
        if isinstance(alone, RenderError):
            return self._first_control(text, max(last_mark, start))
        if not alone.startswith(text[:start]):
            return None if self._options.unfold else self._first_control(text, max(last_mark, start))
        answer = self._printer.trim(alone[start:])
        if text.startswith(answer, start):
            end = start + len(answer)
            return self._with_next_control(text, max(last_mark, start), end)
        # More may be printed after the last message of all than after others.
        own = self._marks_of(self._skeleton(alone), turn)
        closed = self._first_control(alone, max((end for _, end in own), default=start))
        if closed is not None and text.startswith(alone[start:closed], start):
            return closed
        return None if self._options.unfold else self._first_control(text, max(last_mark, start))

    def _with_next_control(self, text: str, last_mark: int, end: int) -> int:
        """The end of a turn that no mark of its own closes: what the next one opens with is what has to be said."""
        if self._is_closed(text[last_mark:end]):
            return end
        at = end + len(text[end:]) - len(text[end:].lstrip())
        following = self._printer.control.match(text, at)
        return following.end() if following else end

    def _is_closed(self, tail: str) -> bool:
        """Whether what follows the last words of a turn holds a stop mark; </tool_call> is none where answers have none."""
        controls = self._printer.control.findall(tail)
        return bool(controls) and (self._printer.closes or not controls[-1].startswith(("</", "[/")))

    def _missing_stop(self, upto: int) -> str | None:
        """The control token that would follow a call that the row ends in, if the call has no stop mark of its own."""
        messages = self._conversation.messages
        alone = self._print(upto)
        if not messages[upto - 1].get("tool_calls") or isinstance(alone, RenderError):
            return None
        own = self._marks_of(self._skeleton(alone), upto - 1)
        last_mark = max((end for _, end in own), default=0)
        if self._is_closed(alone[last_mark:]):
            return None
        given = messages[upto : upto + 1] or [{"role": "tool", "name": "probe", "content": "Yes"}]
        longer = self._printer.attempt([*messages[:upto], *given], self._tools, self._settings)
        if isinstance(longer, RenderError) or not longer.startswith(alone.rstrip()):
            return None
        at = len(alone.rstrip())
        following = self._printer.control.match(longer, at + len(longer[at:]) - len(longer[at:].lstrip()))
        return following[0] if following else None

    def _first_control(self, text: str, after: int) -> int | None:
        found = self._printer.control.search(text, after)
        return found.end() if found else None

    def _align(self, prompt: str, skeleton: Skeleton, answer: int) -> int | None:
        """Where an answer starts in a rendering whose beginning is not the prompt: after the same words as there."""
        low, high = self._gap_before(skeleton, answer)
        before = self._skeleton(prompt).literals[-1]
        if before and skeleton.text.startswith(before, low):
            return low + len(before)
        header = self._printer.header
        opened = skeleton.text.rfind(header, low, high) if header else -1
        return opened + len(header) if opened >= 0 else None

    def _marks_of(self, skeleton: Skeleton, message: int) -> list[Span]:
        if self._spans[0] is not skeleton:
            self._spans = (skeleton, defaultdict(list))
            for number, start, end in zip(skeleton.marks, skeleton.starts, skeleton.ends, strict=True):
                if (part := self._conversation.parts[number]).kind != "id":
                    self._spans[1][part.message].append((start, end))
        return self._spans[1].get(message, [])

    def _skeleton(self, text: str) -> Skeleton:
        if self._by_words:
            own_words = self._printer.control.sub(lambda match: "\0" * len(match[0]), text)
            lows = {i: self._low(text, i) for i in range(len(self._conversation.messages))}
            return Skeleton.of_words(text, own_words, self._conversation.parts, lows)
        return Skeleton.of_marked(text, self._marker.pattern)

    def _low(self, text: str, message: int) -> int:
        """From where on a message may stand: what is printed without it comes before."""
        is_answer = self._conversation.messages[message].get("role") == "assistant"
        prompt = self._print(message, generation=True) if is_answer else ""
        if isinstance(prompt, str) and prompt and text.startswith(prompt):
            return len(prompt)
        before = self._print(message) if message else ""
        if isinstance(before, RenderError):
            return 0
        return next(i for i, (a, b) in enumerate(zip(before + "\0", text + "\1", strict=False)) if a != b)

    def _print(self, upto: int, *, generation: bool = False) -> str | RenderError:
        key = (upto, generation)
        if key not in self._printed:
            try:
                messages = self._conversation.messages[:upto]
                self._printed[key] = self._printer.print(messages, self._tools, self._settings, generation=generation)
            except RenderError as error:
                self._printed[key] = error
        return self._printed[key]


def _start_in(row: PlannedRow, place: Place) -> int:
    ends = (0, *row.skeleton.ends)
    return ends[place[0]] + place[1]


def _instructs(message: Message) -> bool:
    return message.get("role") in ("system", "developer")


def _rewrites(messages: list[Message]) -> list[tuple[Callable[[list[Message]], list[Message]], bool]]:
    """What to try on a conversation, in order, and whether it moves what system turns say."""
    found: list[tuple[Callable[[list[Message]], list[Message]], bool]] = [(list, False)]
    if any(message.get("role") == "developer" for message in messages):
        found.append((name_system, True))
    if any(_instructs(message) for message in messages):
        found += [(merge_later_instructions, True), (merge_instructions, True)]
    return found


def name_system(messages: list[Message]) -> list[Message]:
    """Developer turns become system turns, for a template that knows no others."""
    return [{**message, "role": "system"} if message.get("role") == "developer" else message for message in messages]


def merge_later_instructions(messages: list[Message]) -> list[Message]:
    """System turns but one at the very start go into user turns."""
    first = [message for message in messages[:1] if _instructs(message)]
    return name_system(first) + merge_instructions(messages[len(first) :])


def merge_instructions(messages: list[Message]) -> list[Message]:
    """For a template without system turns: their text opens the next user turn, or ends the one before an answer."""
    merged: list[Message] = []
    waiting: list[Message] = []
    for message in messages:
        if _instructs(message):
            waiting.append(message)
            continue
        if waiting and message.get("role") == "user":
            message = {**message, "content": "\n\n".join(str(m.get("content")) for m in [*waiting, message])}
        elif waiting and merged and merged[-1].get("role") == "user":
            merged[-1] = {
                **merged[-1],
                "content": "\n\n".join(str(m.get("content")) for m in [merged[-1], *waiting]),
            }
        else:
            merged += waiting
        waiting = []
        merged.append(message)
    return merged + waiting
