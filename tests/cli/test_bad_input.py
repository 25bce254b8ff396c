"""Bad input ends in one clear sentence, its exit code, and a directory that is as it was."""

import json
import re

import pytest

from qlora_cli.cli import app as commands


@pytest.fixture
def place(tmp_path, tiny_model, monkeypatch):
    """A working directory with rows, a model, and a model of the same shape with other weights."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path.parent / "cache"))
    rows = [{"text": f"Row {i} says that {i} is {i}."} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.jsonl").write_text('{"text": "whole"}\n{"text": "cut sh')
    (tmp_path / "base").symlink_to(tiny_model("gpt_neox"))
    (tmp_path / "other").symlink_to(tiny_model("gpt_neox", seed=1))
    return tmp_path


@pytest.fixture
def run(place):
    """A finished run of two steps on `base`, in `run`."""
    line = "train --model base --data rows.jsonl --output run --max-steps 2 --batch-size 1 --json"
    assert commands.main([*line.split(), "--gradient-accumulation-steps", "1"]) == 0
    return place / "run"


def tree(directory):
    """Every path below with its content, links followed no further."""
    return {p: p.read_bytes() if p.is_file() else None for p in sorted(directory.rglob("*"))}


def fails(line, capsys, *says):
    """Runs a command that has to fail with these words in its sentence; a wrong flag is 2, the rest 1."""
    capsys.readouterr()
    assert commands.main(line.split()) == (2 if "--text-column" in line else 1), f"{line} ended otherwise"
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err and "Unexpected" not in err
    reported = err[err.index("error: ") :].splitlines()
    assert len(reported) <= 2, reported
    assert len(reported) == 1 or reported[1].startswith("→ ")
    for words in says:
        assert words in reported[0], reported[0]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("train --model absent/model --data rows.jsonl", ["absent/model"]),
        ("train --model ./absent --data rows.jsonl", ["absent"]),
        ("train --model base --data absent.jsonl", ["absent.jsonl"]),
        ("train --model base --data -", ["There is no file or folder -."]),  # names that no hub takes
        ("prepare --model base --data x--y", ["There is no file or folder x--y."]),
        ("inspect --model mödel", ["No model directory at mödel."]),
        ("train --model base --data rows.jsonl --text-column quote", ["quote"]),
        ("train --model base --data empty.jsonl", ["empty.jsonl"]),
        ("train --model base --data broken.jsonl", ["broken.jsonl", "2"]),
        ("train --model base --data rows.jsonl --target-modules query_key_valeu", ["query_key_valeu"]),
        ("train --model base --prepared absent", ["absent"]),
        ("prepare --model absent/model --data rows.jsonl", ["absent/model"]),
        ("prepare --model base --data absent.jsonl", ["absent.jsonl"]),
        ("prepare --model base --data rows.jsonl --text-column quote", ["quote"]),
        ("prepare --model base --data empty.jsonl", ["empty.jsonl"]),
        ("prepare --model base --data broken.jsonl", ["broken.jsonl", "2"]),
        ("generate --adapter absent hello", ["absent"]),
        ("generate --model absent/model hello", ["absent/model"]),
        ("generate --model base --input absent.jsonl --output answers.jsonl", ["absent.jsonl"]),
        ("merge --adapter absent", ["absent"]),
        ("inspect --model absent/model", ["absent/model"]),
        ("inspect --adapter absent", ["absent"]),
        ("inspect --prepared absent", ["absent"]),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(place, capsys, line, says):
    before = tree(place)
    fails(line, capsys, *says)
    assert tree(place) == before


def test_an_adapter_on_another_base_of_the_same_shape_is_refused(run, place, capsys):
    for line in ("generate --adapter run --model other hello", "merge --adapter run --model other --output merged"):
        before = tree(place)
        fails(line, capsys, "adapter in run was trained on", "weights")
        assert tree(place) == before


def test_an_output_that_holds_another_run_is_left_alone(run, place, capsys):
    before = tree(place)
    fails("train --model base --data rows.jsonl --output run --max-steps 2", capsys, "run")
    fails("prepare --model base --data rows.jsonl --output run", capsys, "run")
    fails("merge --adapter run --output run", capsys, "run")
    assert tree(place) == before


def test_the_hint_says_what_to_type(place, capsys):
    commands.main(["train", "--model", "base", "--data", "rows.jsonl", "--target-modules", "query_key_valeu"])
    err = capsys.readouterr().err
    assert re.search(r"^→ .*query_key_value", err, re.MULTILINE)
