"""Runs beside each other: which went lowest, what differs, and their losses in one picture."""

import json

import pytest

from qlora_cli.artifacts import METRICS, RUN_YAML
from qlora_cli.cli.app import main
from qlora_cli.core.runs.comparison import name_runs


@pytest.fixture
def runs(tmp_path):
    """Three directories of runs that have not ended, of 40 steps, with losses of their own."""
    for name, rank, factor, alpha in (("a", 8, 1.0, "32"), ("b", 16, 0.5, "32"), ("c", 16, 2.0, "32.0")):
        (tmp_path / name).mkdir()
        settings = f"model: m\nrank: {rank}\nalpha: {alpha}\nlearning_rate: 0.0002\noutput: {name}\n"
        (tmp_path / name / RUN_YAML).write_text(settings)
        lines = [
            {"step": n, "loss": factor * (4 - n / 20), "tokens": 100, "step_seconds": 0.5, "peak_vram_bytes": 2**30}
            for n in range(1, 41)
        ]
        lines.append({"step": 40, "eval_loss": factor * 2.1})
        (tmp_path / name / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_runs_are_compared_in_a_table_and_a_picture(runs, capsys, monkeypatch):
    monkeypatch.chdir(runs)
    assert main(["inspect", "a", "b", "c", "--picture", "losses.png"]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[0] == "b has the lowest held-out loss: 1.0500."
    assert "Not ended: a, b, c." in lines
    table = {line.split("  ")[0].strip(): line.split()[-3:] for line in lines if line.strip()}
    assert table["loss"] == ["2.0000", "1.0000", "4.0000"] and table["rank"] == ["8", "16", "16"]
    assert table["best of it"] == ["2.1000", "1.0500", "4.2000"] and table["steps"] == ["40", "40", "40"]
    assert "learning rate" not in out and "output" not in out
    assert (runs / "losses.png").read_bytes().startswith(b"\x89PNG")
    assert main(["inspect", "a", "c", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [run["best_held_out_loss"] for run in found["runs"]] == [2.1, 4.2] and found["differing"] == {
        "rank": ["8", "16"]
    }


def test_runs_of_one_name_are_told_apart_by_their_place(tmp_path):
    assert name_runs([tmp_path / "x" / "out", tmp_path / "y" / "out"]) == ["x/out", "y/out"]
    assert name_runs([tmp_path / "x", tmp_path / "y"]) == ["x", "y"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (["a", "b", "--picture", "losses.bmp"], "ends in none of .png, .svg, .pdf"),
        (["a", "nowhere"], "There is no run in nowhere"),
        (["model", "a"], "model holds a model, and only runs are shown beside each other."),
        (["a", "--picture", "losses.png"], "qlora inspect RUN RUN --picture losses.png"),
        (["a", "--model", "m"], "Type: qlora inspect a"),
    ],
)
def test_what_cannot_be_compared_is_said(runs, capsys, monkeypatch, line, says):
    monkeypatch.chdir(runs)
    (runs / "model").mkdir()
    (runs / "model" / "config.json").write_text("{}")
    assert main(["inspect", *line]) != 0
    assert says in capsys.readouterr().err and not (runs / "losses.png").exists()


def test_one_run_is_described(runs, capsys, monkeypatch):
    monkeypatch.chdir(runs)
    assert main(["inspect", "a"]) == 0
    assert capsys.readouterr().out.startswith("a is a run that has not ended: 40 steps, loss 2.0000")
