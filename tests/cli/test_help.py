"""Help is quick, complete, and made from the settings alone."""

import json
import os
import re
import subprocess
import sys
from dataclasses import fields

import pytest

from qlora_cli.config import GenerateConfig, InspectConfig, MergeConfig, PrepareConfig, TrainConfig
from qlora_cli.settings.setting import flag_of

CONFIGS = {
    "prepare": PrepareConfig,
    "train": TrainConfig,
    "merge": MergeConfig,
    "generate": GenerateConfig,
    "inspect": InspectConfig,
}
HEAVY = {"torch", "transformers", "peft", "datasets", "bitsandbytes", "accelerate", "numpy", "pandas", "pyarrow"}
HEAVY |= {"matplotlib", "safetensors", "huggingface_hub", "tokenizers", "triton", "rich", "yaml", "jinja2"}
LIST_MODULES = """
import json, sys
from qlora_cli.cli.app import main
codes = [main(line) for line in json.loads(sys.argv[1])]
print("MODULES " + " ".join(sorted({name.partition(".")[0] for name in sys.modules})))
sys.exit(max(codes))
"""


def run_python(*arguments, **kwargs):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, **kwargs)


def test_help_loads_no_heavy_library():
    lines = [["--help"], *([name, "--help"] for name in CONFIGS), ["--version"], []]
    done = run_python("-c", LIST_MODULES, json.dumps(lines))
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.rpartition("MODULES ")[2].split())
    assert "qlora_cli" in loaded
    assert not loaded & HEAVY


@pytest.mark.parametrize("name", CONFIGS)
def test_every_setting_has_its_flag_and_its_help(name):
    text = run_python("-m", "qlora_cli", name, "--help", env={**os.environ, "COLUMNS": "80"}).stdout
    assert max(len(line) for line in text.splitlines()) <= 80
    words = " ".join(text.split())
    for field in fields(CONFIGS[name]):
        for flag in flag_of(field).split("/"):
            assert re.search(rf"(^|\s){re.escape(flag)}[\s,]", text), f"{flag} is missing, or broken in two"
        assert field.metadata["help"] in words
        for choice in field.metadata["choices"] or ():
            assert choice in words
        if field.default not in (None, True, False):
            assert f"[default: {field.default}" in words


def test_version_names_the_package():
    from qlora_cli import __version__

    assert run_python("-m", "qlora_cli", "--version").stdout == f"qlora {__version__}\n"


def test_completion_offers_commands_flags_and_choices():
    def complete(line):
        words = line.split(" ")
        environment = {**os.environ, "_QLORA_COMPLETE": "complete_bash", "COMP_WORDS": line}
        environment["COMP_CWORD"] = str(len(words) - 1)
        done = run_python("-c", "import sys; from qlora_cli.__main__ import main; sys.exit(main())", env=environment)
        return done.stdout.split()

    assert complete("qlora tr") == ["train"]
    assert "--target-modules" in complete("qlora train --tar")
    assert complete("qlora train --quant-type ") == ["nf4", "fp4"]
