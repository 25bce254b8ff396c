"""Chat templates: the limited child process that renders conversations (`chat.renderer`)."""

import atexit
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from functools import lru_cache
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import qlora_cli
from qlora_cli.core.prompts.chat.printer import MEMORY_BYTES
from qlora_cli.core.prompts.chat.renderer import Rendered, Request
from qlora_cli.core.records.record import BadField
from qlora_cli.errors import DataError

# What the child runs: isolated from the environment, with nothing but this package in reach.
CHILD = (
    "import sys; sys.path.insert(0, sys.argv[1]);"
    "from qlora_cli.core.prompts.chat.renderer import serve_descriptor; serve_descriptor(int(sys.argv[2]))"
)
PACKAGES = str(Path(qlora_cli.__file__).parents[1])
RENDER_CPU_SECONDS = 10.0  # of the processor, for one conversation; a real template takes far less than a millisecond

# For a tokenizer without a chat template: plain text, no new tokens, every answer closed by the end-of-text token.
FALLBACK_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{ '### Assistant:\\n' + message['content'] + eos_token + '\\n\\n' }}
{%- elif message['role'] == 'user' -%}
{{ '### User:\\n' + message['content'] + '\\n\\n' }}
{%- elif message['role'] == 'system' -%}
{{ message['content'] + '\\n\\n' }}
{%- else -%}
{{ '### ' + message['role'] | capitalize + ':\\n' + message['content'] + '\\n\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '### Assistant:\\n' }}{%- endif -%}
"""


class _Died(Exception):
    """How the child came to its end."""


class ChatProcess:
    """One child process that renders one template; replaced by another after it had to be stopped."""

    def __init__(
        self,
        template: str,
        names: dict[str, str],
        control_tokens: Sequence[str],
        date: str | None,
        cpu_seconds: float = RENDER_CPU_SECONDS,
    ) -> None:
        """Starts the child and compiles the template.

        Args:
            template: Jinja source.
            names: bos_token, eos_token and so on.
            control_tokens: Every control token of the tokenizer.
            date: ISO date that the template sees as today.
            cpu_seconds: Processor time that a conversation may take. Not by the clock: a busy machine is no loop.

        Raises:
            DataError: The template does not compile, refuses an ordinary conversation, or does not come to an end.
        """
        self._setup = (template, names, list(control_tokens), date, cpu_seconds)
        self._start()

    def _start(self) -> None:
        self._connection, theirs = Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-c", CHILD, PACKAGES, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={"PATH": os.environ.get("PATH", "")},
                start_new_session=True,  # a Ctrl-C in a conversation stops the answer, not this process
            )
        self._connection.send(self._setup)
        try:
            kind, message = self._receive()
        except _Died as death:
            kind, message = "dead", str(death)
        if kind != "ok":
            self.close()
            raise DataError(f"{message[0].upper()}{message[1:]}.", "Give another one with --chat-template FILE.")

    def _receive(self) -> Any:
        """The child's next answer; waits as long as the child lives.

        Raises:
            _Died: It does no longer, and how that came.
        """
        try:
            return self._connection.recv()
        except (EOFError, ConnectionResetError):
            code = self._process.wait()
            self._connection.close()
        if code == -signal.SIGPROF:
            raise _Died(f"the chat template did not come to an end within {self._setup[-1]:g} seconds")
        raise _Died(f"the chat template takes more than {MEMORY_BYTES // 2**20} MiB of memory")

    def render(self, requests: Sequence[Request]) -> list[Rendered | BadField]:
        """Renders conversations, each to one row or several; those that cannot be come back as the reason why.

        Raises:
            DataError: The template loops for ever or fills the memory.
        """
        if not requests:
            return []
        if self._connection.closed:
            self._start()
        self._connection.send(list(requests))
        try:
            answers = self._receive()
        except _Died as death:
            problem = str(death)
            raise DataError(
                f"{problem[0].upper()}{problem[1:]}.", "Give another one with --chat-template FILE."
            ) from None
        return [answer if kind == "ok" else BadField(answer) for kind, answer in answers]

    def close(self) -> None:
        """Ends the child."""
        self._connection.close()
        self._process.kill()
        self._process.wait()


@lru_cache(maxsize=8)
def chat_process(
    template: str, names: tuple[tuple[str, str], ...], control_tokens: tuple[str, ...], date: str | None
) -> ChatProcess:
    """The process that renders this template for a tokenizer's names and control tokens, one for each in use.

    Raises:
        DataError: The template cannot be used.
    """
    process = ChatProcess(template, dict(names), control_tokens, date)
    atexit.register(process.close)
    return process
