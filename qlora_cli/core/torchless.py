"""Commands that do without torch: it is left out of the process, and what needs it after all is asked of another one.

Importing torch costs two thirds of the time that `prepare` of a small file takes, and transformers imports it with the
first configuration although a tokenizer needs none of it. With None in its place in `sys.modules` (see Python's `import`
statement) every library takes it for not installed. It cannot be taken back within the process, hence only the command
line does so, never a function called from Python.
"""

import importlib
import json
import sys
from typing import Any

from qlora_cli.errors import QloraError, first_line

ASK = "import sys; from qlora_cli.core.torchless import answer; answer(*sys.argv[1:])"


def leave_torch_out() -> None:
    """From here on this process has no torch, unless it was imported already."""
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]


def is_left_out() -> bool:
    """Whether this process has no torch."""
    return sys.modules.get("torch", ...) is None


def ask_with_torch(function: str, *arguments: str) -> Any:
    """What a function returns for texts, JSON-ready; called in a process of its own.

    Args:
        function: `module:name`.

    Raises:
        QloraError: It failed.
    """
    import subprocess

    command = [sys.executable, "-c", ASK, function, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise QloraError(f"{function} failed: {first_line(RuntimeError(done.stderr.strip().splitlines()[-1]))}")
    return json.loads(done.stdout.splitlines()[-1])


def answer(function: str, *arguments: str) -> None:
    """The other end: prints what the function returns."""
    module, _, name = function.partition(":")
    print(json.dumps(getattr(importlib.import_module(module), name)(*arguments)))
