"""Typical mistakes of those who come from another tool or type in haste, each with the line that they get."""

import json
import shlex
from pathlib import Path

import pytest

from qlora_cli.artifacts import ADAPTER_CONFIG, CHECKPOINTS, PREPARED_MANIFEST, RUN_YAML
from qlora_cli.cli.app import main
from qlora_cli.cli.command_line.declared import OTHER_VARIABLES
from qlora_cli.core.adapters.adapter_facts import read_adapter
from qlora_cli.core.distributed.rank_monitor import LAUNCHER
from qlora_cli.errors import AdapterError
from qlora_cli.settings.peer_names import COMMANDS, PEERS
from qlora_cli.settings.setting import flag_of
from tests.cli.conftest import Answer

# What is typed → what is wrong, and what to type next.
MISTAKES = {
    "train --lr 1e-4": ("No such option: --lr", "--learning-rate"),
    "train --lora-r 8": ("No such option: --lora-r", "--rank"),
    "train --lora_alpha 8": ("No such option: --lora_alpha", "--alpha"),
    "train --bs 4": ("No such option: --bs", "--batch-size"),
    "train --per-device-train-batch-size 4": ("No such option", "--batch-size"),
    "train --epoch 3": ("No such option: --epoch", "--epochs"),
    "train --num_train_epochs 3": ("No such option: --num_train_epochs", "--epochs"),
    "train --model-name-or-path m": ("No such option", "--model"),
    "train --dataset d": ("No such option: --dataset", "--data"),
    "train --output-dir o": ("No such option: --output-dir", "--output"),
    "train --max-seq-length 512": ("No such option", "--max-length"),
    "train --optim adamw": ("No such option: --optim", "--optimizer"),
    "train --save-steps 10": ("No such option: --save-steps", "--save-every"),
    "train --val-size 0.1": ("No such option: --val-size", "--eval-fraction"),
    "train --resume-from-checkpoint c": ("No such option", "--resume"),
    "train --rnak 8": ("No such option: --rnak", "--rank"),
    "train --load-in-4bit": ("No such option", "The base is always held in 4 bits: leave it out."),
    "train --use-flash-attention-2": ("No such option", "Fast attention is on by itself"),
    "train --temperature 1": ("No such option", "--temperature is a setting of: qlora generate"),
    "train --push-to-hub": ("No such option", "qlora merge --help"),
    "train --rank x": ("'x' is not a whole number", "--rank 16"),
    "train --rank 1.5": ("'1.5' is not a whole number", "--rank 16"),
    "train --rank 0": ("--rank is 0.", "Use 1 to 8,192."),
    "train --learning-rate fast": ("'fast' is not a number", "2e-4"),
    "train --dropout 1": ("--dropout is 1.0.", "below 1"),
    "train --compute-dtype bf16": ("'bf16' is not one of", "--compute-dtype bfloat16"),
    "train --optimizer adamw_torch": ("'adamw_torch' is not one of", "--optimizer adamw"),
    "train --quant-type int8": ("'int8' is not one of", "--quant-type nf4"),
    "train --format alpaca": ("'alpaca' is not one of", "--format prompt"),
    "train --vram 12": ("--vram is '12'.", "12GiB"),
    "train": ("No base model was named.", "--model"),
    "train -m m": ("Training takes rows from one place.", "--data"),
    "train -m m -d d --keep-best --eval-fraction 0": ("--keep-best needs rows", "--eval-fraction 0.1"),
    "train --early-stopping-patience 3": ("No such option: --early-stopping-patience", "--patience"),
    "train --load-best-model-at-end": ("No such option: --load-best-model-at-end", "--keep-best"),
    "train --shuffle": ("No such option: --shuffle", "--seed"),
    "train --eval-batch-size 4": ("No such option: --eval-batch-size", "leave it out"),
    "train -m m -d d --resume --overwrite": ("--overwrite removes it", "one of them"),
    "train -c gpt-neox": ("no configuration file gpt-neox", "gpt-neox-20b-english-quotes"),
    "train -c -": ("no configuration file -.", "choose one of: qlora train --list-recipes"),
    "train -c lr.yaml": ("unknown setting lr", "learning_rate"),
    "train -c list.yaml": ("holds a list", "setting: value"),
    "train -c text.yaml": ("rank should be a whole number, found 'eight'", "as 16"),
    "train -c .": (". is a directory", "--config list.yaml"),
    "train --model m --rank": ("'--rank' requires an argument", "qlora train --help"),
    "train ORG/NAME rows.jsonl": ("extra argument", "Did you mean: --model ORG/NAME --data rows.jsonl"),
    "train —model m": ("extra argument", "two hyphens, and no longer dash: --model"),
    "train --model m –-data rows.jsonl": ("extra argument", "two hyphens, and no longer dash: --data"),
    "merge run": ("extra argument", "Did you mean: --adapter run"),
    "generate -a run two words": ("extra argument", "in quotes"),
    "prepare -c train.yaml": ("rank is a setting of qlora train, and this is qlora prepare.", "train.yaml --dry-run"),
    "inspect -c train.yaml": (
        "max_steps is a setting of qlora train",
        "Type: qlora train --config train.yaml --dry-run",
    ),
    "train --adapter run": ("No such option: --adapter", "--resume goes on with it"),
    "generate -a run --chat --input rows.jsonl": ("more than one was given", 'generate --adapter out "Your question"'),
    "chat run": ("extra argument", "Did you mean: --adapter run"),
    "prepare -m m": ("No data was given.", "--data"),
    "prepare --answer-column a": ("No such option: --answer-column", "--completion-column"),
    "prepare --num-proc 4": ("No such option: --num-proc", "--workers"),
    "generate hello": ("generate needs a model.", "--adapter DIR"),
    "generate -a out --prompt hello": ("No such option: --prompt", "argument"),
    "generate --max-length 30 hello": ("No such option: --max-length", "--max-new-tokens"),
    "chat --temp 1": ("No such option: --temp", "--temperature"),
    "merge --gguf": ("No such option: --gguf", "--format"),
    "serve": ("No such command 'serve'.", "vllm serve merged"),
    "export": ("No such command 'export'.", "--format gguf"),
    "finetune": ("No such command 'finetune'.", "qlora train"),
    "tran": ("No such command 'tran'.", "qlora train"),
    "inspect --adpter out": ("No such option: --adpter", "--adapter"),
    "frobnicate": ("No such command 'frobnicate'.", "qlora --help"),
}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_gets_what_was_wrong_and_what_to_type(line, tmp_path, monkeypatch, capsys):
    (tmp_path / "lr.yaml").write_text("lr: 1e-4\n")
    (tmp_path / "list.yaml").write_text("- 8\n")
    (tmp_path / "text.yaml").write_text("rank: eight\n")
    (tmp_path / "train.yaml").write_text("rank: 8\nmax_steps: 9\n")
    (tmp_path / "rows.jsonl").touch()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / RUN_YAML).touch()
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(line)) == 2
    out, err = capsys.readouterr()
    wrong, following = MISTAKES[line]
    assert out == "" and len(err.splitlines()) == 2
    assert err.startswith("error: ") and wrong in err.splitlines()[0]
    assert err.splitlines()[1].startswith("→ ") and following in err.splitlines()[1]


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        ("train --model run --data rows.jsonl", "--adapter run"),
        ("train --model rows --data rows.jsonl", "--prepared rows"),
        ("train --model m --data rows", "qlora train --model ... --prepared rows"),
        ("train --model m --prepared rows.jsonl", "qlora prepare --model ... --data rows.jsonl"),
        ("train --model m --prepared run", "--adapter run"),
        ("merge --adapter m", "qlora generate --model m"),
        ("inspect rows.jsonl", "qlora prepare --model MODEL --data rows.jsonl"),
        ("inspect .", "qlora inspect run"),
        ("inspect ORG/NAME", "qlora inspect --model ORG/NAME"),
    ],
)
def test_what_stands_behind_the_wrong_flag_is_named_with_the_right_one(line, meant, tmp_path, monkeypatch, capsys):
    for place in ("m/config.json", f"rows/{PREPARED_MANIFEST}", f"run/{RUN_YAML}", "rows.jsonl"):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(line)) == 1
    assert capsys.readouterr().err.splitlines()[-1].endswith(meant)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("train --data a.txt --model hub/models--org--m", "→ Type: --model hub/models--org--m/snapshots/01"),
        ("train --data a.txt --model https://huggingface.co/org/m/tree/main", "→ Type: --model org/m"),
        ("train --data a.txt --model .", "→ Give --model a transformers checkpoint."),
        ("train --data a.txt --model org/m", "checkpoint; if the hub's org/m is meant, rename that directory."),
        ("train --data a.txt --model weights", "it holds GGUF, which is not trained on."),
        ("train --data a.txt --model run", "Other commands: --adapter run"),
        ("train --data a.txt --model gone", "gone is a link that leads nowhere."),
        ("train --model m --data gone", "gone is a link that leads nowhere."),
        ("train --model m --data https://huggingface.co/datasets/org/rows", "→ Type: --data org/rows"),
        ("train --model m --data hf://datasets/org/rows/train.jsonl", "→ Type: --data org/rows"),
        ("train --model m --data file:///tmp/my%20rows.jsonl", "→ Type: --data '/tmp/my rows.jsonl'"),
        (
            "train --model m --data https://host/rows.jsonl",
            "→ Addresses are not read: download what is there. Check --data.",
        ),
        (
            "train --data a.txt --model s3://bucket/m",
            "→ Addresses are not read: download what is there. Check the path",
        ),
        ("train --model m --data https://huggingface.co/datasets/squad", "→ Type: --data squad"),
        ("train --data a.txt --model https://huggingface.co/spaces/org/demo", "Check the path, or give a hub id"),
        ("generate hi --adapter run/adapter_model.safetensors", "→ Type: --adapter run"),
        ("merge --adapter theirs", "→ Type: --adapter theirs/checkpoint-1000"),
        ("merge --adapter apple", "only adapters.safetensors, as mlx-lm writes it, is there"),
        ("inspect run/run.yaml", "→ Type: qlora inspect run"),
        ("inspect hub/models--org--m", "→ Type: qlora inspect hub/models--org--m/snapshots/01"),
    ],
)
def test_a_place_near_the_one_that_was_meant_is_told_from_it(line, says, tmp_path, monkeypatch, capsys):
    """A file of it, the folder above it, its address, a link to where it was, or what another tool writes."""
    run = [f"run/{name}" for name in ("run.yaml", "config.json", "adapter_config.json", "adapter_model.safetensors")]
    theirs = [f"theirs/checkpoint-{step}/adapter_config.json" for step in (1000, 500)]
    apple = ["apple/adapter_config.json", "apple/adapters.safetensors"]
    snapshot = "hub/models--org--m/snapshots/01/config.json"
    for place in (*run, *theirs, *apple, snapshot, "m/config.json", "weights/m.gguf", "a.txt"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_text("{}")
    (tmp_path / "org" / "m").mkdir(parents=True)
    (tmp_path / "gone").symlink_to("elsewhere")
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(line)) == 1
    assert says in capsys.readouterr().err


def test_a_settings_file_is_named_for_what_it_says_and_not_for_what_is_typed(tiny_model, tmp_path, monkeypatch, capsys):
    (tmp_path / "rows.jsonl").write_text('{"body": "A lake."}\n')
    (tmp_path / "own.yaml").write_text("text_column: quote\n")
    monkeypatch.chdir(tmp_path)
    line = ["prepare", "-c", "own.yaml", "--model", str(tiny_model("gpt_neox")), "--data", "rows.jsonl"]
    assert main(line) == 2
    assert "no column 'quote'; the data has 'body'. own.yaml says text_column: quote." in capsys.readouterr().err
    assert main([*line, "--text-column", "text"]) == 2
    assert "own.yaml" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "content", "says"),
    [
        ("train", "data: rows.jsonl\nmodel: m\nprepared: rows\n", "data: rows.jsonl, prepared: rows"),
        ("train --model m", "data: rows.jsonl\npatience: 3\neval_rows: 0\n", "eval_rows: 0, patience: 3"),
        ("train --model m", "data: rows.jsonl\noutput: rows.jsonl\n", "output: rows.jsonl"),
        ("prepare --data rows.jsonl", "model: rows.jsonl\n", "model: rows.jsonl"),
        ("generate x", "adapter: empty\n", "adapter: empty"),
        ("train --model m", "prepared: nope\nformat: prompt\n", "prepared: nope"),
        ("train", "prepared: nope\nmodel: m\n", "prepared: nope"),
    ],
)
def test_a_settings_file_is_named_for_what_is_refused_before_anything_is_loaded(
    line, content, says, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    for name in ("empty", "m"):
        (tmp_path / name).mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    (tmp_path / "own.yaml").write_text(content)
    assert main([*line.split(), "--config", "own.yaml"]) in (1, 2)
    assert f"own.yaml says {says}." in capsys.readouterr().err


def test_every_name_of_a_peer_leads_to_a_setting_that_there_is():
    from dataclasses import fields

    from qlora_cli import config

    kinds = [getattr(config, f"{name}Config") for name in ("Prepare", "Train", "Merge", "Generate", "Inspect")]
    known = {field.name for kind in kinds for field in fields(kind)} | {"as_json", "config_file", "quiet", "debug"}
    assert {setting for settings in PEERS.values() for setting in settings} <= known | {"sample_prompt"}
    assert not {"prepare", "train", "merge", "generate", "inspect", "chat"} & set(COMMANDS)
    assert all(flag_of(field).startswith("--") for kind in kinds for field in fields(kind))


def test_the_schema_of_a_settings_file_allows_what_train_writes_and_no_more(capsys):
    from qlora_cli.config import TrainConfig
    from qlora_cli.settings.setting import recorded_fields

    assert main(["train", "--print-schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert set(schema["properties"]) == set(recorded_fields(TrainConfig)) and not schema["additionalProperties"]
    assert schema["properties"]["rank"] == {
        "description": "LoRA rank r.",
        "type": "integer",
        "minimum": 1,
        "maximum": 8192,
        "default": 16,
    }
    assert schema["properties"]["quant_type"]["enum"] == ["nf4", "fp4"]


def test_recipes_are_the_files_of_the_examples(capsys, monkeypatch):
    from qlora_cli.config_file import list_recipes
    from tests.hub import PROJECT

    monkeypatch.setenv("COLUMNS", "50")
    assert main(["train", "--list-recipes"]) == 0
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 50
    examples = {path.stem: path for path in (PROJECT / "examples").glob("*.yaml")}
    assert set(examples) == set(list_recipes())
    for name, path in list_recipes().items():
        assert name in said and examples[name].resolve() == path.resolve()


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
    for name in ("QLORA_RNAK", "qlora_alpha", "QLORA_RANK", *(OTHER_VARIABLES - {LAUNCHER})):
        monkeypatch.setenv(name, "8")
    assert LAUNCHER in OTHER_VARIABLES
    assert run_with(["train", "-m", "m", "-d", "d"], lambda config, report: Answer()) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "is no setting" in line]
    assert said == [
        "warning: QLORA_RNAK in the environment is no setting; QLORA_RANK is one.",
        "warning: qlora_alpha in the environment is no setting; QLORA_ALPHA is one.",
    ]
    monkeypatch.setenv(LAUNCHER, "8")  # which has said it, before it started this rank
    assert run_with(["train", "-m", "m", "-d", "d"], lambda config, report: Answer()) == 0
    assert "is no setting" not in capsys.readouterr().err


def test_a_checkpoint_that_is_no_longer_kept_is_told_from_the_last_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for step in (4, 12):
        (tmp_path / f"out/checkpoints/step-{step:08}").mkdir(parents=True)
        (tmp_path / f"out/checkpoints/step-{step:08}" / ADAPTER_CONFIG).write_text("{}")
    for line in ("merge --adapter", "generate hi --adapter", "inspect"):
        assert main([*line.split(), "out/checkpoints/step-00000002"]) == 1
        assert capsys.readouterr().err.splitlines()[-1].endswith(" out/checkpoints/step-00000012")


def test_what_is_no_adapter_is_called_what_it_is(tmp_path):
    for name, file in (("rows of mine", PREPARED_MANIFEST), ("model", "config.json"), ("other", "notes.txt")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text(json.dumps({}))
    said = {}
    for name in ("rows of mine", "model", "other", "absent", "other/notes.txt"):
        with pytest.raises(AdapterError) as caught:
            read_adapter(tmp_path / name)
        said[name] = (str(caught.value).partition(": ")[2], caught.value.hint)
    way = f"Train on them with: qlora train --model ... --prepared '{tmp_path}/rows of mine'"
    assert said["rows of mine"] == ("it holds prepared rows.", way)
    assert said["model"] == ("it holds a whole model.", f"Ask it with: qlora generate --model {tmp_path}/model")
    assert said["other"][0] == f"{ADAPTER_CONFIG} is missing."
    assert said["absent"][0] == "there is no such directory."
    with pytest.raises(AdapterError) as caught:
        read_adapter(Path("org/adapter"))
    assert caught.value.hint.endswith("hf download org/adapter --local-dir adapter")
    assert said["other/notes.txt"][0] == "it is a file, and an adapter is a directory."


@pytest.mark.parametrize("line", ["inspect", "generate --adapter out hello", "train --model base --data rows.jsonl"])
def test_a_current_directory_that_was_removed_is_said(line, tmp_path, monkeypatch, capsys):
    """Before torch is imported, which ends the process there."""
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert main(line.split()) == 2
    assert capsys.readouterr().err.endswith(
        "error: The current directory is not there any more: it was removed, or made anew under its name.\n"
        '→ Type: cd "$PWD", or cd to another one, and the command again.\n'
    )
