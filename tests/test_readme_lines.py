"""What the README tells to type works as written, offline: its first three lines, and every other one after them."""

import functools
import io
import json
import os
import re
import shlex
import sys
from unittest import mock

import pytest
from accelerate.state import AcceleratorState
from huggingface_hub import constants

from qlora_cli.cli.app import main
from qlora_cli.commands import train
from qlora_cli.core.candidates.four_bit_gap import measure_held_out
from qlora_cli.core.distributed import launcher
from tests.faults.victims import ForkedRanks
from tests.hub import PROJECT, lay_model, lay_quotes, lay_rows

README = (PROJECT / "README.md").read_text(encoding="utf-8")
FIRST_LINES = [
    "qlora train --model EleutherAI/gpt-neox-20b --data Abirate/english_quotes",
    'qlora generate --adapter out/ "Ask not what your country"',
    "qlora inspect",
]
OTHER_LINES = [line.strip() for line in README.splitlines() if line.startswith("    ") and "qlora " in line]
OTHER_LINES = [line for line in OTHER_LINES if line not in FIRST_LINES]


def type_lines(first: str, others: str, cells: list[str], cache: str, said: str, environment: dict[str, str]) -> None:
    """Runs the lines in their directories in this process; `said`.out and `said`.err have where each begins.

    Ranks are forked from it. tests/commands/test_launchers.py has them started as they are, in the long form.
    """
    for number, ending in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{said}.{ending}", os.O_WRONLY | os.O_CREAT), number)
    os.environ.update(environment)
    constants.HF_HUB_CACHE, constants.HF_HUB_OFFLINE = cache, True
    os.chdir(first)
    with mock.patch.object(train, "measure_held_out", measure_held_out):  # which a zygote's runs leave out
        for line in FIRST_LINES:
            run_line(line)
    os.chdir(others)
    for line in OTHER_LINES:
        run_line(line)
    names: dict = {}
    for cell in cells:
        exec(cell, names)


def run_line(line: str) -> None:
    """One line, with fewer steps and tokens than the README has: that is all that is not as written."""
    typed, _, command = line.rpartition("| ")
    sys.stdin = io.StringIO(typed and shlex.split(typed)[1])
    for stream in (sys.stderr, sys.stdout):
        print(f"$ {line}", file=stream, flush=True)
    words = shlex.split(command, comments=True)[1:]
    if words[0] == "train" and not {"--max-steps", "--resume", "--dry-run"} & {*words} and "out/run.yaml" not in words:
        words += ["--max-steps", "2"]
    elif words[0] == "generate":
        words += ["--max-new-tokens", "8"]
    if "--gpus" in words:
        launcher.start_processes = functools.partial(ForkedRanks, None)
        AcceleratorState._reset_state(reset_partial_state=True)  # the ranks are of a group of their own
    code = main(words)
    assert code == 0, f"{line} ended with {code}"


@pytest.fixture(scope="module")
def typed(tmp_path_factory, zygote):
    """Where the first lines, and all others, were typed; what the first printed on stdout and on stderr, line by line.

    With a hub cache that holds small models and data under the names.
    """
    home = tmp_path_factory.mktemp("home")
    hub = home / "hub"
    lay_model(hub, "EleutherAI/gpt-neox-20b", "gpt_neox")
    lay_model(hub, "EleutherAI/pythia-410m", "gpt_neox")
    lay_model(hub, "tiiuae/falcon-7b", "falcon")
    lay_model(hub, "NousResearch/Llama-2-7b-chat-hf", "llama")
    lay_quotes(hub)
    lay_rows(hub, "kotzeje/lamini_docs.jsonl", "lamini_docs.jsonl", [{"question": "What?", "answer": "That."}] * 20)
    chat = {"text": "<s>[INST] What is a token? [/INST] A piece of a word. </s>"}
    lay_rows(hub, "mlabonne/guanaco-llama2-1k", "train.jsonl", [chat] * 40)
    first, others = (tmp_path_factory.mktemp(name) for name in ("first", "others"))
    (others / "examples").symlink_to(PROJECT / "examples")
    (others / "prompts.jsonl").write_text('{"prompt": "What does len() return?"}\n"And abs()?"\n')
    cells = json.loads((PROJECT / "examples" / "notebook.ipynb").read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    done = zygote.run(
        "tests.test_readme_lines:type_lines",
        first=str(first),
        others=str(others),
        cells=code,
        cache=str(hub),
        said=str(home / "said"),
        environment={
            "HOME": str(home),
            "QLORA_CACHE": str(home / "cache"),
            "HF_HUB_OFFLINE": "1",
            "ACCELERATE_USE_CPU": "1",
        },
    )
    out, err = ((home / f"said.{ending}").read_text() for ending in ("out", "err"))
    assert done.code == 0, err[-3000:]
    parts = (re.split(r"^\$ .*\n", text, flags=re.M)[1 : len(FIRST_LINES) + 1] for text in (out, err))
    return first, others, *parts


def test_the_first_lines_stand_in_the_readme():
    assert "    " + "\n    ".join(FIRST_LINES) in README


def test_the_first_lines_work_as_written(typed, zygote):
    directory, _, (_, generated, inspected), said = typed
    for noise in (
        "Traceback",
        "Warning",
        "Failed to load",
        "it/s",
    ):  # of the libraries, which the zygote imported as commands do
        assert not any(noise in text for text in (*said, zygote.said_while_importing))
    trained, named, _ = said

    assert "quote" in trained  # the text column is named
    run = directory / "out"
    for name in ("adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "run.yaml", "README.md"):
        assert (run / name).is_file(), name
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    for step, line in enumerate(map(json.loads, (run / "metrics.jsonl").read_text().splitlines()), start=1):
        assert line["step"] == step and line["loss"] > 0 and line["tokens"] > 0
        assert line.keys() >= {"learning_rate", "grad_norm", "step_seconds", "tokens_per_second", "peak_vram_bytes"}

    assert generated.strip()
    assert "EleutherAI/gpt-neox-20b" in named  # the base that the run recorded is named
    assert "EleutherAI/gpt-neox-20b" in inspected


def test_inspect_in_an_empty_directory_tells_about_the_machine(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["inspect", "--json"]) == 0
    assert "torch" in json.dumps(json.loads(capsys.readouterr().out))
    assert not list(tmp_path.iterdir())


def test_every_other_line_and_the_notebook_work_as_written(typed):
    assert len(OTHER_LINES) > 15
    _, directory, _, _ = typed
    assert (directory / "notebook-merged" / "config.json").is_file()
    assert len((directory / "answers.jsonl").read_text().splitlines()) == 2
