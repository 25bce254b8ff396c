"""From Python: what the package offers, without importing what only a command needs."""

import logging
import subprocess
import sys
import warnings

import pytest
from huggingface_hub import utils as hub
from transformers.utils import logging as bars

import qlora_cli
from qlora_cli import InspectConfig, QloraError, TrainConfig, inspect, train
from qlora_cli.cli.quiet import quiet_call
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


def test_libraries_are_silent_while_a_function_runs_and_nobody_else_is(tiny_model, tmp_path, capfd, caplog):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "One and one make two."}\n' * 4)

    def report(event):
        if isinstance(event, Notice):
            logging.getLogger("mine").warning("heard")
            logging.getLogger("bitsandbytes.backends").warning("noise")
            warnings.warn_explicit("noise", UserWarning, "linear.py", 1, module="torch.nn.linear")
            print("heard")

    config = TrainConfig(model=str(tiny_model()), data=str(rows), output=str(tmp_path / "out"), max_steps=1)
    capfd.readouterr()  # what building the model says
    with pytest.warns(UserWarning, match="mine"):
        train(config, report)
        warnings.warn("mine", stacklevel=1)
    out, err = capfd.readouterr()
    assert set(out.split()) == {"heard"} and not err
    assert {record.message for record in caplog.records} == {"heard"}
    assert bars.is_progress_bar_enabled() and logging.getLogger("bitsandbytes").level == logging.NOTSET


def test_a_look_at_a_run_imports_no_library_to_silence_it(tmp_path):
    (tmp_path / "run.yaml").write_text("model: m\nrank: 8\nlearning_rate: 0.0002\nquant_type: nf4\noutput: out\n")
    code = "import sys, qlora_cli as q; q.inspect(q.InspectConfig(adapter=sys.argv[1])); print('transformers' in sys.modules)"
    command = [sys.executable, "-c", code, str(tmp_path)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "False\n"


def test_after_the_last_call_libraries_are_as_they_were(monkeypatch):
    loggers = {name: logging.getLogger(name) for name in ("torch", "transformers", "peft")}
    before = {name: logger.level for name, logger in loggers.items()}
    filters = [*warnings.filters]
    monkeypatch.delenv("TRANSFORMERS_VERBOSITY", raising=False)
    hub.disable_progress_bars()  # of the hub alone, by the caller
    try:
        for logger in loggers.values():
            logger.setLevel(logging.NOTSET)  # as before they are imported
        first, second = quiet_call(), quiet_call()
        first.__enter__()
        loggers["torch"].setLevel(logging.WARNING)  # as its import does
        second.__enter__()  # of another thread
        first.__exit__(None, None, None)
        assert loggers["peft"].level == logging.ERROR and not bars.is_progress_bar_enabled()
        second.__exit__(None, None, None)
        levels = {name: logger.level for name, logger in loggers.items()}
        assert levels == {"torch": logging.WARNING, "transformers": logging.WARNING, "peft": logging.NOTSET}
        assert hub.are_progress_bars_disabled() and bars.is_progress_bar_enabled() and warnings.filters == filters
    finally:
        hub.enable_progress_bars()
        for name, logger in loggers.items():
            logger.setLevel(before[name])
