"""A command line becomes exactly the settings it names, over a settings file, over the defaults."""

from dataclasses import fields, replace
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_cli.artifacts import ADAPTER_CONFIG
from qlora_cli.cli.app import main
from qlora_cli.commands.inspect import inspect
from qlora_cli.config import GenerateConfig, InspectConfig, TrainConfig
from qlora_cli.core.runs.validate import report_idle
from qlora_cli.errors import AdapterError, RunError
from qlora_cli.events import Caution, Notice
from qlora_cli.settings.ranges import Memory, Words
from qlora_cli.settings.setting import flag_of, type_of
from tests.cli.conftest import Answer


def test_no_flags_give_the_defaults(config_of):
    assert config_of(["train"]) == TrainConfig()


def test_flags_give_their_fields_and_no_others(config_of):
    line = "train --model m --rank 8 --alpha 4 --no-double-quant --packing --learning-rate 1e-5 --no-compile --resume"
    made = config_of([*line.split(), "--compute-dtype", "float16", "--target-modules", "q_proj, v_proj"])
    assert made == TrainConfig(
        model="m",
        rank=8,
        alpha=4.0,
        double_quant=False,
        packing=True,
        learning_rate=1e-5,
        target_modules=("q_proj", "v_proj"),
        compute_dtype="float16",
        compile=False,
        resume=True,
    )


def test_a_repeated_flag_keeps_commas_and_spaces(config_of):
    made = config_of(["generate", "hello", "--stop", "one, two", "--stop", "\n\n"])
    assert made == GenerateConfig(stop=("one, two", "\n\n"))


def test_the_home_directory_is_meant_by_a_tilde_wherever_it_is_written(config_of, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.yaml").write_text("prepared: ~/rows\n")
    made = config_of(["train", "--config=~/run.yaml", "--output=~/out", "--sample-prompt=~/ what?"])
    assert made == TrainConfig(prepared=f"{tmp_path}/rows", output=f"{tmp_path}/out", sample_prompt=("~/ what?",))
    assert TrainConfig(data=("~/a.jsonl",)).data == (f"{tmp_path}/a.jsonl",)


def test_a_setting_answers_to_its_former_name(config_of, tmp_path):
    settings_file = tmp_path / "run.yaml"
    settings_file.write_text("shape: chat\n")
    assert config_of(["train", "--config", settings_file]) == TrainConfig(format="chat")
    assert config_of(["train", "--config", settings_file, "--shape", "text"]) == TrainConfig(format="text")
    assert config_of(["train", "--config", settings_file, "--format", "tokens"]) == TrainConfig(format="tokens")


def test_flags_override_the_settings_file_which_overrides_the_defaults(config_of, tmp_path):
    settings_file = tmp_path / "run.yaml"
    settings_file.write_text(yaml.safe_dump({"rank": 8, "alpha": 64, "packing": True, "target_modules": ["a", "b"]}))
    made = config_of(["train", "--config", settings_file, "--alpha", "16", "--no-packing"])
    assert made == TrainConfig(rank=8, alpha=16.0, packing=False, target_modules=("a", "b"))


def test_what_is_typed_goes_over_what_a_settings_file_says_of_the_same(config_of, tmp_path, capsys):
    settings_file = tmp_path / "run.yaml"
    settings_file.write_text("max_steps: 20\nwarmup_steps: 2\neval_rows: 9\ntext_column: quote\n")
    typed = ["--epochs", "3", "--warmup-ratio", "0.1", "--eval-fraction", "0", "--template", "{a} {b}"]
    made = config_of(["train", "--config", settings_file, *typed])
    assert made == TrainConfig(epochs=3.0, warmup_ratio=0.1, eval_fraction=0.0, template="{a} {b}")
    assert "--eval-fraction is taken in place of the 'eval_rows' of --config." in capsys.readouterr().err
    settings_file.write_text("epochs: 3\nwarmup_ratio: 0.03\n")
    assert config_of(["train", "--config", settings_file, "--max-steps", "2"]) == TrainConfig(max_steps=2)
    assert config_of(["train", "--config", settings_file, "--warmup-steps", "2"]).epochs == 3.0
    assert "warmup_ratio" not in capsys.readouterr().err  # the default, as a run.yaml has it


def test_a_setting_that_does_nothing_beside_another_is_said():
    said = []
    report_idle(TrainConfig(epochs=3, max_steps=5, eval_fraction=0.0, eval_rows=9), said.append)
    assert [each.text for each in said] == ["--epochs does nothing beside --max-steps."]


def test_settings_of_a_model_that_is_not_looked_at_are_said(tmp_path, monkeypatch):
    said = []
    with pytest.raises(RunError, match="is not there"):
        inspect(InspectConfig(rank=3, vram="3GiB"), said.append, [str(tmp_path / "run")])
    assert [each.text for each in said] == [f"--vram, --rank do nothing: {tmp_path / 'run'} is looked at as it is."]
    monkeypatch.chdir(tmp_path)  # the run in the default directory is looked at where nothing is named
    Path("out").mkdir()
    Path("out", ADAPTER_CONFIG).write_text("{}")
    with pytest.raises(AdapterError, match="is needed: it is missing"):
        inspect(InspectConfig(rank=3), said.append)
    assert said[-1].text == "--rank does nothing: out is looked at as it is."


@pytest.mark.parametrize(("typed", "other"), [("prepared", "data"), ("data", "prepared")])
def test_rows_that_are_typed_take_the_place_of_those_of_a_settings_file(config_of, tmp_path, capsys, typed, other):
    settings_file, values = tmp_path / "run.yaml", {"data": ("rows.jsonl",), "prepared": "rows"}
    settings_file.write_text(yaml.safe_dump({"rank": 8, other: values[other] if other == "prepared" else ["a.jsonl"]}))
    value = values[typed] if typed == "prepared" else values[typed][0]
    made = config_of(["train", "--config", settings_file, f"--{typed}", value])
    assert made == TrainConfig(rank=8, **{typed: values[typed]})
    said = capsys.readouterr()
    assert f"--{typed} is taken in place of the '{other}' of --config." in said.out + said.err
    both = config_of(["train", "--config", settings_file, "--data", "rows.jsonl", "--prepared", "rows"])
    assert both == TrainConfig(rank=8, **values)  # which `check` refuses
    assert "in place of" not in capsys.readouterr().err


def test_a_flag_that_repeats_the_default_still_overrides_the_settings_file(config_of, tmp_path):
    settings_file = tmp_path / "run.yaml"
    settings_file.write_text("rank: 8\n")
    assert config_of(["train", "--config", settings_file, "--rank", "16"]) == TrainConfig()


def test_short_flags_and_variables_of_the_environment_are_settings(config_of, monkeypatch, tmp_path, capsys):
    settings_file = tmp_path / "run.yaml"
    settings_file.write_text("rank: 8\nalpha: 64\nseed: 1\n")
    monkeypatch.setenv("QLORA_RANK", "4")
    monkeypatch.setenv("QLORA_PACKING", "true")
    monkeypatch.setenv("QLORA_SEED", "5")
    made = config_of(["train", "-m", "m", "-d", "a", "-d", "b", "-o", "o", "-c", settings_file, "--seed", "7"])
    assert made == TrainConfig(model="m", data=("a", "b"), output="o", rank=4, alpha=64.0, seed=7, packing=True)
    assert "From the environment: QLORA_PACKING=true, QLORA_RANK=4." in capsys.readouterr().err


def test_a_switch_of_the_environment_is_true_or_false(config_of, monkeypatch, capsys):
    monkeypatch.setenv("QLORA_PACKING", "ja")
    assert main(["train"]) == 2 and "'ja' is neither true nor false" in capsys.readouterr().err
    monkeypatch.setenv("QLORA_PACKING", "Off")
    assert config_of(["train"]) == TrainConfig()


def test_a_place_that_the_environment_names_is_said_to_come_from_there(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QLORA_DATA", "nope.json")
    assert main(["prepare", "-m", "org/name"]) == 1
    assert (
        "There is no file or folder nope.json. QLORA_DATA=nope.json stands in the environment."
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("value", ["abc", "0"])
def test_what_is_wrong_in_the_environment_is_said_to_stand_there(config_of, monkeypatch, capsys, value):
    monkeypatch.setenv("QLORA_RANK", value)
    assert main(["train", "-m", "m", "-d", "d"]) == 2
    assert f" QLORA_RANK={value} stands in the environment." in capsys.readouterr().err
    assert main(["train", "-m", "m", "-d", "d", "--rank", "0"]) == 2
    assert "QLORA_RANK" not in capsys.readouterr().err
    monkeypatch.delenv("QLORA_RANK")
    monkeypatch.setenv("QLORA_OUTPUT", "kept")
    for typed in (["-o", ""], ["-o\t"], ["--output="]):
        assert main(["train", "-m", "m", "-d", "d", *typed]) == 2
        assert "QLORA_OUTPUT" not in capsys.readouterr().err


def test_a_flag_given_several_times_is_said_to_count_once(config_of, capsys, monkeypatch):
    rank = ["--rank", "4"]
    typed = ["-m", "m", "-d", "a", "-d", "b", *rank, "--target-modules", "q", "--target-modules=v", *rank]
    assert config_of(["train", *typed]).target_modules == ("v",)
    warning = "warning: --target-modules was given several times, and the last one counts: v"
    assert [line for line in capsys.readouterr().err.splitlines() if "several times" in line] == [warning]
    assert main(["--", "train", *typed]) == 0 and warning in capsys.readouterr().err
    both = [
        "--stream",
        "--no-stream",
        "--no-packing",
        "--packing",
        "--dora",
        "--dora",
    ]  # a switch and its opposite, too
    assert config_of(["train", "-m", "m", "-d", "d", *both]).stream is False
    said = [line.partition("given")[0] + line.rpartition(": ")[2] for line in capsys.readouterr().err.splitlines()]
    assert [line for line in said if "was" in line] == [
        "warning: --stream was --no-stream",
        "warning: --packing was --packing",
    ]
    monkeypatch.setenv("QLORA_LAUNCHER", "1")  # which has said it, before it started this rank
    assert main(["train", *typed]) == 0 and "several times" not in capsys.readouterr().err


def test_a_recipe_goes_by_its_name(config_of):
    assert config_of(["train", "-c", "pythia-410m-lamini-docs"]).model == "EleutherAI/pythia-410m"


def test_quiet_leaves_warnings_and_the_log_has_all(run_with, capsys, tmp_path):
    def command(config, report):
        report(Notice("a fact"))
        report(Caution("a worry"))
        return Answer({"steps": 3})

    log = tmp_path / "run.log"
    assert run_with(["train", "-q", "--log-file", log], command) == 0
    out, err = capsys.readouterr()
    assert "steps" in out and err == "warning: a worry\n"
    assert [line.split(" ", 2)[2] for line in log.read_text().splitlines()] == ["a fact", "warning: a worry"]
    assert run_with(["train", "-q", "--log-file", log], command) == 0 and len(log.read_text().splitlines()) == 4
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "mine"}\n')
    assert run_with(["train", "-q", "--log-file", rows], command) == 2
    assert "rows.jsonl holds something else than a log" in capsys.readouterr().err
    assert rows.read_text() == '{"text": "mine"}\n'


def _typed(field, value) -> list[str]:
    """The words that a user types for one field's value."""
    flag, _, off = flag_of(field).partition("/")
    if isinstance(value, bool):
        return [flag if value else off]
    if isinstance(value, tuple):
        if field.metadata["repeated"]:
            return [word for item in value for word in (flag, item)]
        return [flag, ",".join(value)]
    return [flag, str(value)]


words = st.text("abcdefghij_.0", min_size=1, max_size=8)


@st.composite
def train_settings(draw):
    """Some fields of a training configuration with values that are not their defaults."""
    chosen = draw(st.lists(st.sampled_from(fields(TrainConfig)), unique_by=lambda field: field.name, max_size=12))
    values = {}
    for field in chosen:
        kind, allowed = type_of(field)[0], field.metadata["range"]
        if field.metadata["choices"]:
            values[field.name] = draw(st.sampled_from(field.metadata["choices"]))
        elif kind is bool:
            values[field.name] = draw(st.booleans()) if "/" in flag_of(field) else True
        elif kind is float:
            values[field.name] = draw(
                st.floats(allowed.low, allowed.high, exclude_min=allowed.open_low, exclude_max=allowed.open_high)
            )
        elif kind is int:
            values[field.name] = draw(st.integers(allowed.low, allowed.high))
        elif not isinstance(allowed, Words):
            values[field.name] = "12GiB" if isinstance(allowed, Memory) else "12"
        elif kind is str:
            values[field.name] = draw(words)
        else:
            values[field.name] = tuple(draw(st.lists(words, min_size=1, max_size=3)))
    return values


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=train_settings())
def test_any_settings_survive_the_command_line(config_of, values):
    by_name = {field.name: field for field in fields(TrainConfig)}
    typed = [word for name, value in values.items() for word in _typed(by_name[name], value)]
    assert config_of(["train", *typed]) == replace(TrainConfig(), **values)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "--rank", "x"], "'--rank'"),
        (["train", "--quant-type", "int8"], "'int8' is not one of 'nf4', 'fp4'"),
        (["train", "--rnak", "8"], "--rnak"),
        (["trian"], "Type: qlora train"),
        (["train", "--rank"], "--rank"),
        (["generate", "--model", "m"], "PROMPT"),
        (["generate", "hello"], "--adapter DIR"),
        (["generate", "hello", "--chat", "--model", "m"], "PROMPT"),
        (["train", "--config", "absent.yaml"], "absent.yaml"),
    ],
)
def test_a_wrong_command_line_is_one_sentence_and_exit_code_2(arguments, says, capsys, tmp_path, monkeypatch):
    from qlora_cli.cli import app as commands

    monkeypatch.chdir(tmp_path)
    assert commands.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert says in err
    assert err.startswith("error: ") and len(err.splitlines()) == 2 and err.splitlines()[1].startswith("→ ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "says"),
    [("rnak: 8\n", "rnak"), ("rank: eight\n", "rank"), ("- 8\n", "list"), ("a: [\n", "line 2"), ("rank: 8.5\n", "8.5")],
)
def test_a_wrong_settings_file_is_named(content, says, capsys, tmp_path):
    from qlora_cli.cli import app as commands

    path = tmp_path / "run.yaml"
    path.write_text(content)
    assert commands.main(["train", "--config", str(path)]) == 2
    err = capsys.readouterr().err
    assert str(path) in err and says in err and "Traceback" not in err


LINES = st.lists(
    st.one_of(
        st.sampled_from(["--rank", "8", "-m", "model", "--packing", "--no-packing", "--packing=x", "--dora", "--data", "a:0.3",
                         "-d", "b,c", "--target-modules", "q_proj, v_proj", "--learning-rate=1e-4", "--shape", "text", "-q",
                         "--json", "--verbose", "--log-file", "log", "-c", "run.yaml", "--debug", "-o", "-", "--", "-h", "-mx",
                         "--rnak", "--quant-type", "fp4", "--chat", "--stop", "x", "--raw", "--adapter=", "--seed", "-1", ""]),
        st.text("ab -=", max_size=4),
    ),
    max_size=7,
)  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(name=st.sampled_from(["train", "generate", "inspect", "chat"]), words=LINES)
def test_what_is_read_plainly_is_what_typer_reads(name, words):
    from qlora_cli.cli.app import COMMANDS
    from qlora_cli.cli.command_line.plain import read_plainly
    from qlora_cli.cli.command_line.program import run_program
    from qlora_cli.errors import UsageError

    def reading(read):
        try:
            return read()
        except UsageError as error:
            return error.message, error.hint

    seen = []
    recording = replace(COMMANDS[name], run=lambda typed: seen.append(typed) or 0)
    plain = reading(lambda: read_plainly(recording, [name, *words]))
    if plain is not None:
        typers = reading(lambda: run_program({**COMMANDS, name: recording}, [name, *words]))
        assert plain == seen[0] if seen else isinstance(plain, tuple) and isinstance(typers, tuple)
