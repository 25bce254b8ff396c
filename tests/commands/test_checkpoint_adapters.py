"""An adapter inside a checkpoint is merged and asked as its run held its base, not as is usual."""

import json
import shutil

import pytest

from qlora_cli import artifacts
from qlora_cli.commands.generate import generate
from qlora_cli.commands.merge import merge
from qlora_cli.commands.train import train
from qlora_cli.config import GenerateConfig, MergeConfig, TrainConfig
from qlora_cli.core.adapters.adapter_record import find_adapter, read_adapter_record
from qlora_cli.core.inspection.run_summary import describe_run
from qlora_cli.errors import AdapterError
from qlora_cli.events import Caution, Notice

pytestmark = pytest.mark.usefixtures("short_runs")


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


@pytest.fixture(
    params=[
        pytest.param("in its run", marks=pytest.mark.slow),
        pytest.param("of an older version, in its run", marks=pytest.mark.slow),
        pytest.param("moved", marks=pytest.mark.slow),
        "newest of a stopped run",
    ]
)
def checkpoint(run, request, tmp_path):
    newest = max((run / artifacts.CHECKPOINTS).iterdir())
    if request.param == "in its run":
        return newest
    if request.param == "moved":
        return shutil.copytree(newest, tmp_path / "elsewhere")
    stopped = shutil.copytree(run, tmp_path / "out")
    if request.param == "newest of a stopped run":
        for name in (artifacts.ADAPTER_CONFIG, artifacts.ADAPTER_WEIGHTS, artifacts.RUN_RECORD):
            (stopped / name).unlink()
        return stopped
    copied = stopped / artifacts.CHECKPOINTS / newest.name
    (copied / artifacts.RUN_RECORD).unlink()
    return copied


def test_a_checkpoint_knows_how_its_base_was_held(run, checkpoint):
    source, whole = read_adapter_record(find_adapter(checkpoint, print), print), read_adapter_record(run, print)
    assert source.base == whole.base and source.formatting == whole.formatting
    assert (source.base.quant_type, source.base.double_quant) == ("fp4", False)


def merge_and_ask(adapter, output):
    """The merged weights, an answer, and what was said."""
    events: list = []
    merge(MergeConfig(adapter=str(adapter), output=str(output), verify=False), events.append)
    asked = GenerateConfig(
        adapter=str(adapter), temperature=0, max_new_tokens=8, base_cache=False, engine="plain", seed=0
    )
    answer = generate(asked, ["What is 3 + 3?"], events.append).to_dict()["answers"][0]
    return (output / "model.safetensors").read_bytes(), answer, events


@pytest.fixture(scope="module")
def of_the_run(run, tmp_path_factory):
    return merge_and_ask(run, tmp_path_factory.mktemp("merged") / "run")


def test_a_checkpoint_is_merged_and_asked_like_its_run(of_the_run, checkpoint, tmp_path):
    weights, answer, events = merge_and_ask(checkpoint, tmp_path / "merged")
    assert (weights, answer) == of_the_run[:2]
    assert not [event for event in [*events, *of_the_run[2]] if isinstance(event, Caution)]
    said = [event for event in events if isinstance(event, Notice) and "has not ended" in event.text]
    assert len(said) == (2 if checkpoint.name == "out" else 0)


def test_a_run_that_went_on_past_its_adapter_and_was_stopped_is_asked_as_it_is_now(run, tmp_path):
    stopped, said = shutil.copytree(run, tmp_path / "out"), []
    assert find_adapter(stopped, said.append) == stopped and not said
    record = json.loads((stopped / artifacts.RUN_RECORD).read_text())
    record["training"]["steps"] = 2
    (stopped / artifacts.RUN_RECORD).write_text(json.dumps(record))
    newest = max((stopped / artifacts.CHECKPOINTS).iterdir())
    assert find_adapter(stopped, said.append) == newest and "after step 3" in said[0].text
    (newest / artifacts.ADAPTER_WEIGHTS).write_bytes(b"")
    said.clear()
    assert find_adapter(stopped, said.append) == stopped and "Skipped" in said[0].text


def test_a_run_stopped_before_its_first_checkpoint_says_how_to_go_on(run, tmp_path):
    (tmp_path / artifacts.RUN_YAML).write_text("")
    with pytest.raises(AdapterError, match="before its first checkpoint") as caught:
        generate(GenerateConfig(adapter=str(tmp_path)), ["What is 3 + 3?"], print)
    assert caught.value.hint == f"Go on with it: qlora train --config {tmp_path / artifacts.RUN_YAML} --resume"


@pytest.mark.parametrize("command", ["generate", "merge", "inspect"])
def test_weights_that_are_not_what_the_run_wrote_are_refused_until_they_are_said_to_be_meant(run, tmp_path, command):
    copied = shutil.copytree(run, tmp_path / "out")
    weights, record = copied / artifacts.ADAPTER_WEIGHTS, copied / artifacts.RUN_RECORD
    content = bytearray(weights.read_bytes())
    content[-9] ^= 1  # of a tensor: the header parses
    weights.write_bytes(content)

    def read():
        if command == "inspect":
            return describe_run(copied, None)
        if command == "merge":
            return merge(MergeConfig(adapter=str(copied), output=str(tmp_path / "merged"), verify=False), print)
        return read_adapter_record(find_adapter(copied, print), print)

    with pytest.raises(AdapterError, match=f"{artifacts.ADAPTER_WEIGHTS} is not what its run wrote") as refused:
        read()
    newest = max((copied / artifacts.CHECKPOINTS).iterdir())
    assert refused.value.hint.endswith(f"the same adapter is whole in --adapter {newest}")
    damaged = newest / artifacts.ADAPTER_WEIGHTS
    damaged.write_bytes(content)
    with pytest.raises(AdapterError, match=f"{damaged} is not what"):
        read_adapter_record(newest, print)
    facts = json.loads(record.read_text())
    del facts["adapter_sha256"]
    record.write_text(json.dumps(facts))
    assert read()
