"""Settings that matter only with conversations, several data sets or experts, changed in turn before `--resume`: refused.

`test_resume_settings.py` changes every setting of a run on one file of questions, where these come to the same.
"""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from qlora_cli.commands.train import train
from qlora_cli.config import TrainConfig
from qlora_cli.errors import CheckpointError, Interrupted
from qlora_cli.events import StepLogged
from tests.conftest import most_slow
from tests.experts.expert_modules import write_expert_model

pytestmark = pytest.mark.usefixtures("short_runs")

TEMPLATE = (
    "{{ style }}{% for m in messages %}{{ m.role }}: "
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}\n{% endfor %}"
)
CHANGES: dict[str, dict[str, Any]] = {
    "conversations": {
        "role": ("bard=user", "poet=assistant"),
        "thoughts": "drop",
        "template_setting": ("style=rich",),
        "train_on": "last",
        "chat_template": "other.jinja",
    },
    "several sets": {
        "data": ("one.jsonl", "two.jsonl:0.25"),  # another share
        "data ": ("two.jsonl:0.5", "one.jsonl"),  # another order
        "data  ": ("one.jsonl",),
        "data   ": ("one.jsonl", "two.jsonl"),
        "data    ": ("one.jsonl", "three.jsonl:0.5"),
        "limit": 10,
    },
    "experts": {
        "adapt_experts": {"adapt_experts": False, "expert_rank": None},
        "expert_rank": 3,
        "rank_pattern": ("q_proj=3",),
        "alpha_pattern": ("q_proj=9",),
        "exclude_modules": ("v_proj",),
        "init": "gaussian",
    },
}


@pytest.fixture(scope="module")
def stopped(tiny_model, tmp_path_factory):
    """`stopped(name)`: the settings of a run that was stopped after its first step, in a folder with all they name."""
    place = tmp_path_factory.mktemp("resume")
    started: dict[str, dict[str, Any]] = {}
    rows = [{"question": f"What is {a} + {b}?", "answer": f"{a + b}."} for a in range(4) for b in range(5)]
    for name, kept in (("one", rows[:12]), ("two", rows[12:]), ("three", [*rows[12:-1], rows[0]])):
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    chats = [
        [
            {"role": "user", "content": row["question"]},
            {"role": "bard", "content": row["answer"], "reasoning_content": "I add."},
            {"role": "user", "content": "Sure?"},
            {"role": "poet", "content": "Yes.", "reasoning_content": "It is so."},
        ]
        for row in rows
    ]
    (place / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    (place / "chat.jinja").write_text(TEMPLATE)
    (place / "other.jinja").write_text("A chat. " + TEMPLATE)
    write_expert_model("qwen3_moe", place / "moe")
    own: dict[str, dict[str, Any]] = {
        "conversations": {
            "data": ("chats.jsonl",),
            "role": ("bard=assistant", "poet=assistant"),
            "template_setting": ("style=plain",),
            "chat_template": "chat.jinja",
        },
        "several sets": {"data": ("one.jsonl", "two.jsonl:0.5")},
        "experts": {
            "model": "moe",
            "data": ("one.jsonl",),
            "adapt_experts": True,
            "expert_rank": 2,
            "rank_pattern": ("q_proj=2",),
            "alpha_pattern": ("q_proj=8",),
        },
    }
    common = {"model": str(tiny_model("llama")), "max_steps": 2, "batch_size": 2, "gradient_accumulation_steps": 1}

    def stop(event) -> None:
        if isinstance(event, StepLogged):
            os.kill(os.getpid(), signal.SIGTERM)

    def of(name: str) -> dict[str, Any]:
        if name not in started:
            options = {**common, "rank": 4, "init": "default", "output": name, **own[name]}
            with pytest.raises(Interrupted):
                train(TrainConfig(**options), stop)
            started[name] = options
        return started[name]

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("QLORA_CACHE", str(place / "cache"))
        yield of


@pytest.mark.parametrize(
    ("name", "setting", "value"),
    most_slow(
        EVERY := [(name, *change) for name, changes in CHANGES.items() for change in changes.items()], EVERY[::3]
    ),
)
def test_what_matters_is_refused_by_name(stopped, name, setting, value):
    options = stopped(name)
    changes = value if isinstance(value, dict) else {setting.strip(): value}
    before = contents_of(name)
    with pytest.raises(CheckpointError) as caught:
        train(TrainConfig(**{**options, **changes, "resume": True}), lambda event: None)
    assert "--allow-changes" in caught.value.hint
    assert (f"settings.{setting}: " if name == "experts" else "data: ") in caught.value.message
    assert contents_of(name) == before


def contents_of(name: str) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in Path(name).rglob("*") if path.is_file() and path.name != ".lock"}
