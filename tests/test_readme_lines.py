"""The three lines at the top of the README, as written, in an empty directory and offline."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import write_model

README = Path(__file__).resolve().parents[1] / "README.md"
LINES = [
    "qlora train --model EleutherAI/gpt-neox-20b --data Abirate/english_quotes",
    'qlora generate --adapter out/ "Ask not what your country"',
    "qlora inspect",
]
COMMIT = {"models--EleutherAI--gpt-neox-20b": "a" * 40, "datasets--Abirate--english_quotes": "b" * 40}
QUOTES = [
    ("Be yourself; everyone else is already taken.", "Oscar Wilde", ["be-yourself", "honesty"]),
    ("A room without books is like a body without a soul.", "Marcus Tullius Cicero", ["books", "soul"]),
    ("You only live once, but if you do it right, once is enough.", "Mae West", ["humor", "life"]),
    ("In three words I can sum up everything I've learned about life: it goes on.", "Robert Frost", ["life"]),
]


def lay_snapshot(hub: Path, name: str) -> Path:
    """An empty snapshot as huggingface_hub's cache keeps it; returns its directory."""
    (hub / name / "refs").mkdir(parents=True)
    (hub / name / "refs" / "main").write_text(COMMIT[name])
    snapshot = hub / name / "snapshots" / COMMIT[name]
    snapshot.mkdir(parents=True)
    return snapshot


@pytest.fixture(scope="module")
def new_machine(tmp_path_factory):
    """An empty working directory and the environment of a machine whose hub cache holds both names."""
    home = tmp_path_factory.mktemp("home")
    hub = home / "huggingface" / "hub"
    write_model(lay_snapshot(hub, "models--EleutherAI--gpt-neox-20b"), "gpt_neox", dtype="float16")
    quotes = lay_snapshot(hub, "datasets--Abirate--english_quotes") / "quotes.jsonl"
    with quotes.open("w", encoding="utf-8") as stream:
        for quote, author, tags in QUOTES * 8:
            print(json.dumps({"quote": f"“{quote}”", "author": author, "tags": tags}, ensure_ascii=False), file=stream)
    scripts = home / "bin"
    scripts.mkdir()
    script = scripts / "qlora"  # the entry point of pyproject.toml, whether or not the package is installed
    script.write_text(f"#!{sys.executable}\nfrom qlora_cli.__main__ import main\nmain()\n")
    script.chmod(0o755)
    environment = {
        **os.environ,
        "HOME": str(home),
        "HF_HOME": str(home / "huggingface"),
        "HF_HUB_OFFLINE": "1",
        "QLORA_CACHE": str(home / "cache"),
        "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(README.parent),
    }
    for name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_DATASETS_OFFLINE", "XDG_CACHE_HOME"):
        environment.pop(name, None)
    return tmp_path_factory.mktemp("work"), environment


def test_the_lines_stand_in_the_readme():
    text = README.read_text()
    assert "\n".join(LINES) in text.replace("\n    ", "\n")


def test_the_lines_work_as_written(new_machine):
    directory, environment = new_machine
    results = []
    for line in LINES:
        done = subprocess.run(
            shlex.split(line), cwd=directory, env=environment, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr and "Warning" not in done.stderr
        results.append(done)
    trained, generated, inspected = results

    assert "quote" in trained.stderr  # the text column is named
    run = directory / "out"
    for name in ("adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "run.yaml", "README.md"):
        assert (run / name).is_file(), name
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    for step, line in enumerate(map(json.loads, (run / "metrics.jsonl").read_text().splitlines()), start=1):
        assert line["step"] == step and line["loss"] > 0 and line["tokens"] > 0
        assert line.keys() >= {"learning_rate", "grad_norm", "step_seconds", "tokens_per_second", "peak_vram_bytes"}

    assert generated.stdout
    assert "EleutherAI/gpt-neox-20b" in generated.stderr  # the base that the run recorded is named
    assert "out" in inspected.stdout and "EleutherAI/gpt-neox-20b" in inspected.stdout


def test_inspect_in_an_empty_directory_tells_about_the_machine(new_machine, tmp_path):
    _, environment = new_machine
    done = subprocess.run(
        ["qlora", "inspect", "--json"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "torch" in json.dumps(json.loads(done.stdout))
    assert not list(tmp_path.iterdir())
