"""What each command imports: nothing that it does not need, and nothing at all before a mistake is said."""

import gc
import json
import os
import subprocess
import sys

import pytest

from qlora_cli.cli.app import main
from qlora_cli.cli.waiting import uncollected
from tests.hub import PROJECT

LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "datasets", "numpy", "pyarrow", "huggingface_hub")
HEAVY = (*LIBRARIES, "pydantic", "rich.console")
SCRIPT = """
import json, sys
from qlora_cli.cli.app import main
lines, heavy = map(json.loads, sys.argv[1:])
codes, names = [], []
for line in lines:
    sys.argv = ["qlora", *line]
    print("TYPED", file=sys.stderr)
    codes.append(main())
    names.append([name for name in heavy if sys.modules.get(name)])
print("LOADED", json.dumps([codes, names]))
"""


def loaded(lines, cwd) -> tuple[list[int], list[set[str]], list[str]]:
    """Of command lines run one after another in a process of their own: exit codes; what was imported after each; stderr."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(lines), json.dumps(HEAVY)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
    )
    assert done.returncode == 0, done.stderr
    codes, names = json.loads(done.stdout.rpartition("LOADED ")[2])
    return codes, [set(after) for after in names], done.stderr.split("TYPED\n")[1:]


@pytest.fixture(scope="module")
def adapter(tiny_model, tmp_path_factory):
    """A directory with a base, an adapter on it, and rows."""
    import torch
    from safetensors.torch import save_file

    place = tmp_path_factory.mktemp("startup")
    names = [f"base_model.model.model.layers.0.self_attn.q_proj.lora_{part}.weight" for part in "AB"]
    (place / "out").mkdir()
    shapes = {names[0]: (4, 64), names[1]: (64, 4)}
    save_file({name: torch.ones(shape) for name, shape in shapes.items()}, place / "out" / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj"],
        "base_model_name_or_path": "m",
    }
    (place / "out" / "adapter_config.json").write_text(json.dumps(config))
    rows = [{"question": f"What is {a} + {a}?", "answer": f"It is {2 * a}."} for a in range(20)]
    (place / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


def test_prepare_tokenises_without_torch_and_says_at_once_what_is_loaded(adapter, tiny_model, monkeypatch):
    monkeypatch.chdir(adapter)
    prepare = ["prepare", "--model", str(tiny_model("llama")), "--data", "sums.jsonl", "--output"]
    assert main([*prepare, "here"]) == 0
    looks = [["--adapter", "out"], [], ["--prepared", "here"], ["--adapter", "out", "--json"]]
    codes, names, said = loaded([*(["inspect", *look] for look in looks), [*prepare, "prepared"]], adapter)
    assert codes == [0] * 5
    assert not names[1], "to show what is written"
    assert not names[3] & {"torch", "transformers", "peft", "bitsandbytes", "datasets", "huggingface_hub"}
    assert not names[4] & {"torch", "peft", "bitsandbytes", "datasets"}
    assert said[4].splitlines()[0] == "Loading transformers and pyarrow."


@pytest.mark.slow
def test_a_row_past_a_table_of_positions_is_refused_without_torch(adapter, tiny_model):
    """A process of its own is asked, which costs its imports."""
    past = ["prepare", "--model", str(tiny_model("gpt2")), "--data", "sums.jsonl", "--max-length", "513"]
    codes, names, said = loaded([past], adapter)
    assert codes == [2] and "past the 512 positions that the model has" in said[0]
    assert said[0].index("PyTorch is asked") < said[0].index("error:")
    assert not names[0] & {"torch", "peft", "bitsandbytes", "datasets"}


def test_mistakes_are_said_before_anything_is_imported(tmp_path):
    lines = [
        ["train", "--rank", "0"],
        ["train", "--model", "m"],
        ["train", "--model", "m", "--data", "d", "--keep-best", "--eval-fraction", "0"],
        ["train", "--model", "m", "--data", "d", "--report-to", "trackio"],
        ["prepare", "--model", "m"],
        ["generate", "hello"],
        ["generate", "hello", "--model", "m", "--temperature", "-1"],
        ["merge", "--max-kl", "-1"],
        ["inspect", "--model", "m", "--vram", "12"],
    ]
    codes, names, said = loaded(lines, tmp_path)
    assert codes == [2] * len(lines)
    assert not any(names)
    assert not any("Loading" in text for text in said)


def test_what_is_not_there_or_taken_is_said_before_libraries_are_imported(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    (tmp_path / "rows.jsonl").touch()
    lines = [
        ["merge", "--adapter", "absent"],
        ["generate", "hello", "--adapter", "absent"],
        ["generate", "--model", "m", "--input", "absent.jsonl", "--output", "answers.jsonl"],
        ["train", "--model", "m", "--prepared", "absent"],
        ["train", "--model", "m", "--data", "absent.jsonl"],
        ["train", "--model", "m", "--data", "absent*.jsonl"],
        ["train", "--model", "m", "--data", "rows.jsonl"],
        ["inspect", "--model", "./absent"],
    ]
    codes, names, said = loaded(lines, tmp_path)
    assert codes == [1] * len(lines)
    assert not names[-1] & {"torch", "transformers", "peft", "bitsandbytes", "datasets"}
    assert not any("Loading" in text for text in said)


def test_no_garbage_is_looked_for_while_importing():
    with uncollected():
        assert not gc.isenabled()
    assert gc.isenabled()
