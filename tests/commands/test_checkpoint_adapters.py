"""An adapter inside a checkpoint is merged and asked as its run held its base, not as is usual."""

import json
import shutil

import pytest

from qlora_cli import artifacts
from qlora_cli.commands.generate import generate
from qlora_cli.commands.merge import merge
from qlora_cli.commands.train import train
from qlora_cli.config import GenerateConfig, MergeConfig, TrainConfig
from qlora_cli.core.adapters.adapter_record import read_adapter_record
from qlora_cli.events import Caution


@pytest.fixture(scope="module")
def run(tiny_model, tmp_path_factory):
    """A run on a base in FP4 without double quantisation, whose last checkpoint is its adapter."""
    place = tmp_path_factory.mktemp("run")
    rows = [{"question": f"What is {a} + {a}?", "answer": f"It is {2 * a}."} for a in range(16)]
    (place / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QLORA_CACHE", str(place / "cache"))
        config = TrainConfig(
            model=str(tiny_model("llama")),
            data=str(place / "sums.jsonl"),
            output=str(place / "out"),
            quant_type="fp4",
            double_quant=False,
            max_steps=3,
            gradient_accumulation_steps=2,
            learning_rate=2e-2,
            base_cache=False,
        )
        train(config, lambda event: None)
    return place / "out"


@pytest.fixture(params=["in its run", "of an older version, in its run", "moved"])
def checkpoint(run, request, tmp_path):
    newest = max((run / artifacts.CHECKPOINTS).iterdir())
    if request.param == "in its run":
        return newest
    if request.param == "moved":
        return shutil.copytree(newest, tmp_path / "elsewhere")
    copied = shutil.copytree(run, tmp_path / "out") / artifacts.CHECKPOINTS / newest.name
    (copied / artifacts.RUN_RECORD).unlink()
    return copied


def test_a_checkpoint_knows_how_its_base_was_held(run, checkpoint):
    source, whole = read_adapter_record(checkpoint), read_adapter_record(run)
    assert source.base == whole.base and source.formatting == whole.formatting
    assert (source.base.quant_type, source.base.double_quant) == ("fp4", False)


def test_a_checkpoint_is_merged_and_asked_like_its_run(run, checkpoint, tmp_path):
    events: list = []
    weights, answers = [], []
    for adapter in (run, checkpoint):
        output = tmp_path / f"merged-{len(weights)}"
        merge(MergeConfig(adapter=str(adapter), output=str(output), verify=False), events.append)
        weights.append((output / "model.safetensors").read_bytes())
        asked = GenerateConfig(
            adapter=str(adapter), temperature=0, max_new_tokens=8, base_cache=False, engine="plain", seed=0
        )
        answers.append(generate(asked, ["What is 3 + 3?"], events.append).to_dict()["answers"][0])
    assert weights[0] == weights[1] and answers[0] == answers[1]
    assert not [event for event in events if isinstance(event, Caution)]
