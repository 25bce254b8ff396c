"""A process that is one of a launch, as the environment says."""

import threading

import pytest

from qlora_cli.core.distributed.process_group import joining
from qlora_cli.errors import RunError
from qlora_cli.launch import is_silent_rank, launched_rank


def test_what_a_launch_left_in_the_environment_is_named_where_no_rank_can_be_joined(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(RunError, match=r"environment says WORLD_SIZE=4: no MASTER_ADDR\.") as error, joining(print):
        raise ValueError("no MASTER_ADDR.")
    assert error.value.hint.endswith("unset WORLD_SIZE")


def test_that_others_are_waited_for_is_said_where_there_are_any(monkeypatch):
    said = threading.Event()
    with joining(lambda event: said.set(), waited_seconds=0.01):
        assert not said.wait(0.1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with joining(lambda event: said.set(), waited_seconds=0.01):
        assert said.wait(10)


def test_a_rank_without_a_launch_is_a_variable_of_the_user_s(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for rank, size, launched in (("16", None, None), ("1", "2", 1), ("0", "1", 0), ("16", "1", None), ("a", "2", None)):
        monkeypatch.setenv("RANK", rank)
        if size is not None:
            monkeypatch.setenv("WORLD_SIZE", size)
        assert launched_rank() == launched and is_silent_rank() == (launched == 1)
