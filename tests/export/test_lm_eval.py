"""What the README says of lm-eval, run on a toy task: the adapter on its base, as PEFT loads it, and a merged model."""

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec

import pytest
import yaml

from tests.commands.generation_case import write_run
from tests.hub import PROJECT

README = (PROJECT / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed: pip install lm-eval")
def test_lm_eval_takes_an_adapter_and_a_model_as_the_readme_says(tiny_model, tmp_path):
    base = tiny_model("llama")
    (tmp_path / "out").mkdir()
    write_run(tmp_path / "out", base)
    (tmp_path / "merged").symlink_to(base)
    rows = [{"question": f"What is {n} + {n}?", "choices": [str(2 * n), "fish"], "answer": 0} for n in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "toy",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
    }
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "toy.yaml").write_text(yaml.safe_dump(task))
    lines = re.findall("^lm_eval (.*)$", README, re.MULTILINE)
    assert len(lines) == 2
    for number, line in enumerate(lines):
        typed = line.replace("EleutherAI/pythia-410m", str(base)).replace("arc_easy", "toy").split()
        more = ["--include_path", "tasks", "--device", "cpu", "--output_path", f"found-{number}"]
        done = subprocess.run(
            [sys.executable, "-m", "lm_eval", *typed, *more],
            cwd=tmp_path,
            env={**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        (found,) = (tmp_path / f"found-{number}").rglob("results*.json")
        assert 0 <= json.loads(found.read_text())["results"]["toy"]["acc,none"] <= 1
