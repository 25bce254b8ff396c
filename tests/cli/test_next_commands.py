"""What is said to type next works when it is pasted, and a variable of the environment that is no setting is said."""

import json
import shlex

import pytest

from qlora_cli.artifacts import ADAPTER_CONFIG, CHECKPOINTS, PREPARED_MANIFEST, RUN_YAML
from qlora_cli.cli.app import main
from qlora_cli.cli.command_line.declared import OTHER_VARIABLES
from qlora_cli.core.adapters.adapter_facts import read_adapter
from qlora_cli.core.distributed.rank_monitor import LAUNCHER
from qlora_cli.errors import AdapterError
from tests.cli.conftest import Answer


def next_commands(capsys):
    """The words of each command that stderr says to type."""
    lines = [line.removeprefix("→ ").removeprefix("Type: ") for line in capsys.readouterr().err.splitlines()]
    return [shlex.split(line) for line in lines if line.startswith("qlora ")]


@pytest.mark.parametrize(
    ("line", "flag"),
    [("train -m m -d d", "--adapter"), ("merge -a a", "--model"), ("prepare -m 'my model' -d d", "--prepared")],
)
def test_names_with_spaces_are_quoted_in_the_next_command(run_with, capsys, line, flag):
    run_with([*shlex.split(line), "--output", "my 'out'", "--verbose"], lambda config, report: Answer())
    commands = next_commands(capsys)
    assert commands
    for words in commands:
        assert words[words.index(flag) + 1] == "my 'out'"
        assert flag == "--model" or "--model" not in words or words[words.index("--model") + 1] == "my model"


def test_resume_without_a_model_names_the_settings_of_the_run(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my out").mkdir()
    (tmp_path / "my out" / RUN_YAML).write_text("model: m\n")
    assert main(["train", "--resume", "--output", "my out"]) == 2
    assert next_commands(capsys) == [["qlora", "train", "--config", f"my out/{RUN_YAML}", "--resume"]]


def test_resume_of_a_moved_run_does_not_start_anew_where_it_was(run_with, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings_file = tmp_path / "moved here" / RUN_YAML
    (settings_file.parent / CHECKPOINTS).mkdir(parents=True)
    settings_file.write_text("model: m\ndata: d\noutput: former\n")
    line, begun = ["train", "--config", str(settings_file), "--resume"], []

    def command(config, report):
        begun.append(config.output)
        return Answer()

    assert run_with(line, command) == 2 and not begun
    said = next_commands(capsys)
    assert said == [["qlora", *line, "--output", str(settings_file.parent)]]
    assert run_with(said[0][1:], command) == 0 and begun == [str(settings_file.parent)]
    (tmp_path / "former" / CHECKPOINTS).mkdir(parents=True)  # the run that the settings name is there
    assert run_with(line, command) == 0 and begun[1:] == ["former"]


def test_a_variable_that_is_no_setting_is_said(run_with, capsys, monkeypatch):
    for name in ("QLORA_RNAK", "qlora_alpha", "QLORA_RANK", *OTHER_VARIABLES):
        monkeypatch.setenv(name, "8")
    assert LAUNCHER in OTHER_VARIABLES
    assert run_with(["train", "-m", "m", "-d", "d"], lambda config, report: Answer()) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "is no setting" in line]
    assert said == [
        "warning: QLORA_RNAK in the environment is no setting; QLORA_RANK is one.",
        "warning: qlora_alpha in the environment is no setting; QLORA_ALPHA is one.",
    ]


def test_what_is_no_adapter_is_called_what_it_is(tmp_path):
    for name, file in (("rows of mine", PREPARED_MANIFEST), ("model", "config.json"), ("other", "notes.txt")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text(json.dumps({}))
    said = {}
    for name in ("rows of mine", "model", "other", "absent", "other/notes.txt"):
        with pytest.raises(AdapterError) as caught:
            read_adapter(tmp_path / name)
        said[name] = (str(caught.value).partition(": ")[2], caught.value.hint)
    assert said["rows of mine"] == ("it holds prepared rows.", f"They go by: --prepared '{tmp_path}/rows of mine'")
    assert said["model"] == ("it holds a whole model.", f"That goes by: --model {tmp_path}/model")
    assert said["other"][0] == f"{ADAPTER_CONFIG} is missing."
    assert said["absent"][0] == "there is no such directory."
    assert said["other/notes.txt"][0] == "it is a file, and an adapter is a directory."
