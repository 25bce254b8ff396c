"""From Python: what the package offers, without importing what only a command needs."""

import subprocess
import sys

import pytest

import qlora_cli
from qlora_cli import InspectConfig, QloraError, TrainConfig, inspect, train
from qlora_cli.events import Notice


def test_names_cost_nothing_until_a_function_is_called():
    code = "import sys, qlora_cli; from qlora_cli import *; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
    assert {"train", "TrainConfig", "QloraError"} <= set(dir(qlora_cli))
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        qlora_cli.nothing_of_the_kind  # noqa: B018


def test_events_come_to_the_callback_and_errors_say_what_to_do(tiny_model, tmp_path):
    events = []
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "One and one make two."}\n' * 4)
    config = TrainConfig(model=str(tiny_model()), data=str(rows), output=str(tmp_path / "out"), dry_run=True)
    assert train(config, events.append).total_steps == 1
    assert any(isinstance(event, Notice) for event in events)
    with pytest.raises(QloraError) as caught:
        train(TrainConfig(model=str(tmp_path / "none"), data=str(rows)), events.append)
    assert caught.value.message and caught.value.hint


def test_progress_is_written_where_no_callback_is_given(tiny_model, capsys):
    facts = inspect(InspectConfig(model=str(tiny_model("llama"))))
    assert facts["kind"] == "model"
    out, err = capsys.readouterr()
    assert not out and "Traceback" not in err
