"""Console of a command: progress on stderr, the result on stdout, as one object there with --json."""

import contextlib
import json
import re
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TextIO

from qlora_cli.cli.screens.drawing import columns_of_terminal, draw_screen, wrap
from qlora_cli.cli.streams import UnwrittenOutput
from qlora_cli.cli.visible import CONTROLS, visible, visible_event
from qlora_cli.cli.waiting import draws_on
from qlora_cli.cli.wrapping import MarkdownBlocks, WordWrap
from qlora_cli.errors import QloraError, RankLost
from qlora_cli.events import Caution, Event, RowShown, TextGenerated
from qlora_cli.launch import is_silent_rank, launched_rank

if TYPE_CHECKING:
    from qlora_cli.cli.line_view import LineView
    from qlora_cli.cli.live_view import LiveView

COMMAND = re.compile(
    r"([^:]*: )?(qlora|pip|python) (?!.*, or ).*"
)  # a hint that is one, and no sentence that names one


def has_live_view() -> bool:
    """Whether both streams are terminals that may be drawn on."""
    return draws_on(sys.stderr) and draws_on(sys.stdout)


class Console:
    """What a command writes to: its `report` takes the command's events. Streams are those at construction.

    Args:
        as_json: Whether the result is printed as JSON, and nothing else goes to stdout.
        quiet: Whether of all that is reported warnings alone are drawn.
        verbose: Whether all facts of a result are drawn.
        log: Also gets all that is reported, a line each.
        markdown: Whether answers on a terminal are drawn as Markdown.
        before: Called before anything is drawn, as to take a sign off the screen.
    """

    def __init__(
        self,
        *,
        as_json: bool,
        quiet: bool = False,
        verbose: bool = False,
        log: TextIO | None = None,
        markdown: bool = False,
        before: Callable[[], None] = lambda: None,
    ) -> None:
        self.as_json = as_json
        self.quiet = quiet
        self.verbose = verbose
        self._log = _line_view(log) if log is not None else None
        self._before = before
        self.silent = is_silent_rank()  # of several ranks the first one writes
        self._stdout = sys.stdout
        self._talks = False  # whether a conversation is held on this terminal
        self._next: list[str] = []
        kind = MarkdownBlocks if markdown and draws_on(self._stdout) else WordWrap
        self._wrap = kind(columns_of_terminal) if self._stdout.isatty() else None
        self._unended = False  # whether an answer has begun that has not ended
        self._live = has_live_view()
        self._shown: LiveView | LineView | None = None
        self._stderr = sys.stderr

    def __enter__(self) -> "Console":
        return self

    def __exit__(self, *_: object) -> None:
        self._close_view()
        if self._unended and self._wrap is not None:  # what ended it is told on a line of its own
            print(self._wrap.end(), file=self._stdout, flush=True)
        if self._talks:
            self._echo_typing(True)

    @property
    def _view(self) -> "LiveView | LineView":
        """What progress is drawn by, made when there is something to draw: rich takes a while to import."""
        if self._shown is None:
            if self._live:
                from qlora_cli.cli.live_view import live_view

                self._shown = live_view()
            else:
                self._shown = _line_view(self._stderr)
        return self._shown

    def _close_view(self) -> None:
        if self._shown is not None:
            self._shown.close()

    @staticmethod
    def _echo_typing(shown: bool) -> None:
        from qlora_cli.cli.live_view import echo_typing

        echo_typing(shown)

    def report(self, event: Event) -> None:
        """Draws one event; generated text goes to stdout as it is."""
        if self.silent:
            return
        self._before()
        event = visible_event(event)
        if self._log is not None:
            self._log.show(event)
        match event:
            case _ if self.quiet and not isinstance(event, Caution | TextGenerated | RowShown):
                return
            case TextGenerated(text, final):
                if not self.as_json:
                    self._close_view()
                    self._unended = not final
                    if self._wrap is not None:
                        text = self._wrap.feed(text) + (self._wrap.end() if final else "")
                    print(text, end="\n" if final else "", file=self._stdout, flush=True)
                    if failure := getattr(self._stdout, "failure", None):
                        raise UnwrittenOutput(failure)  # nobody reads the rest of the answer
            case RowShown():
                from qlora_cli.cli.results import draw_row, make_console

                self._close_view()
                draw_row(make_console(sys.stderr if self.as_json else self._stdout), event)
            case _:
                self._view.show(event)

    def suggest(self, command: str) -> None:
        """Keeps a command to type next, shown under the result."""
        self._next.append(command)

    def show_result(self, result: Any) -> None:
        """Prints what the command returned: facts and tables, or JSON; text that was streamed is not repeated."""
        if self.silent:
            return
        self._close_view()
        if self.as_json:
            print(to_json(result), file=self._stdout, flush=True)
        elif result is not None:
            draw_screen(self._stdout, visible(result), verbose=self.verbose)
        reported = () if self.as_json or not isinstance(result, dict) else result.get("next", ())
        for command in () if self.quiet else (*reported, *self._next):
            print(f"→ {visible(command)}", file=sys.stderr)

    def read_line(self, prompt: str) -> str:
        """One line of a conversation, with line editing where stdin is a terminal.

        Raises:
            EOFError: The input ended.
        """
        self._close_view()
        if not (sys.stdin.isatty() and self._stdout.isatty()):
            print(prompt, end="", file=sys.stderr, flush=True)
            line = sys.stdin.readline()
            if not line:
                raise EOFError
            return line.rstrip("\n")
        import readline  # noqa: F401 - input() edits lines and remembers them once this is imported

        self._echo_typing(True)
        try:
            with contextlib.redirect_stdout(self._stdout):  # input() edits only on the real one
                return input(prompt)
        finally:
            self._talks = True
            self._echo_typing(False)  # until the answer is there


def _line_view(stream: TextIO) -> "LineView":
    from qlora_cli.cli.line_view import LineView

    return LineView(stream)


def _wrapped(text: str, before: int) -> str:
    """A sentence on a terminal broken between words, its first line behind so many columns; elsewhere as it is."""
    if not sys.stderr.isatty():
        return text
    return "\n".join(wrap(" " * before + text, columns_of_terminal()))[before:]


def to_json(value: Any) -> str:
    """One JSON object; a number that JSON does not have becomes null."""
    finite = json.loads(json.dumps(value), parse_constant=lambda name: None)
    text = json.dumps(finite, ensure_ascii=False, indent=2)
    return CONTROLS.sub(
        lambda match: f"\\u{ord(match[0]):04x}", text
    )  # as JSON has it: what reads it gets the same text


def show_error(error: QloraError, *, as_json: bool) -> None:
    """One sentence on stderr and what to type next; with --json also one object on stdout."""
    error.message, error.hint = visible(error.message), visible(error.hint)
    rank = launched_rank() or 0
    named = not rank or isinstance(error, RankLost)
    message = error.message if named else f"rank {rank}: {error.message}"
    red, cyan, plain = ("\x1b[1;31m", "\x1b[36m", "\x1b[0m") if has_live_view() else ("", "", "")
    print(f"{red}error: {plain}{_wrapped(message, 7)}", file=sys.stderr)
    if error.hint:
        whole = COMMAND.fullmatch(error.hint)  # in one piece, to be copied
        print(f"{cyan}→ {plain}{error.hint if whole else _wrapped(error.hint, 2)}", file=sys.stderr)
    if as_json and not rank:
        print(to_json({"error": error.message, "hint": error.hint, "exit_code": error.exit_code}))
