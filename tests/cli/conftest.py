"""A command line run in this process, its function replaced by one that the test gives."""

import os
import sys
import types
from dataclasses import dataclass, field
from typing import Any

import pytest

from qlora_cli.cli import app as commands
from qlora_cli.cli.waiting import loading_sign


@dataclass
class Answer:
    """What a command returns where it is no plain dictionary."""

    content: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return self.content


@pytest.fixture
def run_with(monkeypatch):
    """`run_with(arguments, command)`: exit code of a command line whose command is the function `command(config, *rest)`."""

    def run(arguments, command):
        for name, value in (("RANK", "0"), ("WORLD_SIZE", "1")):  # --gpus starts no processes: this is one already
            monkeypatch.setenv(name, os.environ.get(name, value))
        module = types.ModuleType(arguments[0])
        setattr(module, arguments[0], lambda *given, **_: command(*given))
        package = __import__("qlora_cli.commands", fromlist=["commands"])
        name = arguments[0]
        monkeypatch.setitem(sys.modules, f"qlora_cli.commands.{name}", module)
        monkeypatch.setattr(package, name, module, raising=False)
        monkeypatch.setattr(commands, "check", lambda config: None)  # which belongs to the command
        monkeypatch.setattr(commands, "begin_look_up", lambda *_: None)  # of models that there are none of
        monkeypatch.setattr(commands, "loading_sign", lambda libraries, silent: loading_sign(None, silent=True))
        return commands.main([str(argument) for argument in arguments])

    return run


@pytest.fixture
def config_of(run_with):
    """`config_of(arguments)`: the configuration that a command line makes."""

    def build(arguments):
        seen = []

        def command(config, *rest):
            seen.append(config)
            return {} if arguments[0] == "inspect" else Answer()

        assert run_with(arguments, command) == 0
        return seen[0]

    return build
