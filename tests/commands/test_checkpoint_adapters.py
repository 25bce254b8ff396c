"""An adapter inside a checkpoint is merged and asked as its run held its base, not as is usual."""

import json
import shutil

import pytest

from qlora_cli import artifacts
from qlora_cli.commands.generate import generate
from qlora_cli.commands.merge import merge
from qlora_cli.commands.train import train
from qlora_cli.config import GenerateConfig, MergeConfig, TrainConfig
from qlora_cli.config_file import read_config_file
from qlora_cli.core.adapters.adapter_record import find_adapter, read_adapter_record
from qlora_cli.core.inspection.run_summary import describe_run
from qlora_cli.core.runs import directory
from qlora_cli.errors import AdapterError, ModelError
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


def flip(path):
    """Changes a bit of a tensor: the header parses."""
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def edit(path, **changes):
    """Changes entries of a JSON file; those given as None are taken out."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({n: value for n, value in content.items() if changes.get(n, n) is not None}))


@pytest.mark.parametrize("command", ["generate", "merge"])
def test_weights_that_are_not_what_the_run_wrote_are_refused_until_they_are_said_to_be_meant(run, tmp_path, command):
    copied = shutil.copytree(run, tmp_path / "out")
    flip(copied / artifacts.ADAPTER_WEIGHTS)

    def read():
        if command == "merge":
            return merge(MergeConfig(adapter=str(copied), output=str(tmp_path / "merged"), verify=False), print)
        return read_adapter_record(find_adapter(copied, print), print)

    with pytest.raises(AdapterError, match=f"{artifacts.ADAPTER_WEIGHTS} is not what its run wrote") as refused:
        read()
    newest = max((copied / artifacts.CHECKPOINTS).iterdir())
    assert refused.value.hint.endswith(f"same adapter is whole in --adapter {newest}")
    flip(newest / artifacts.ADAPTER_WEIGHTS)
    with pytest.raises(AdapterError, match=f"{newest / artifacts.ADAPTER_WEIGHTS} is not what"):
        read_adapter_record(newest, print)
    edit(copied / artifacts.RUN_RECORD, adapter_sha256=None)
    assert read()


def test_settings_of_an_adapter_that_its_run_did_not_write_are_refused_but_for_where_its_base_lies(run, tmp_path):
    copied = shutil.copytree(run, tmp_path / "out")
    settings = copied / artifacts.ADAPTER_CONFIG
    edit(settings, base_model_name_or_path="/moved/base", revision="main")
    assert read_adapter_record(copied, print)
    edit(settings, lora_alpha=64)
    with pytest.raises(AdapterError, match=f"{settings} is not what its run wrote") as refused:
        read_adapter_record(copied, print)
    newest = max((copied / artifacts.CHECKPOINTS).iterdir())
    assert refused.value.hint.endswith(f"same adapter is whole in --adapter {newest}")
    edit(newest / artifacts.ADAPTER_CONFIG, lora_alpha=64)
    with pytest.raises(AdapterError, match=f"{newest / artifacts.ADAPTER_CONFIG} is not what"):
        read_adapter_record(newest, print)
    edit(copied / artifacts.RUN_RECORD, adapter_config_sha256=None)
    assert read_adapter_record(copied, print).facts.alpha == 64


@pytest.mark.parametrize("damage", [flip, cut])
def test_a_damaged_adapter_names_the_checkpoint_that_has_the_same_and_not_a_later_one(run, tmp_path, damage):
    """As where --keep-best took an earlier one than the last."""
    copied = shutil.copytree(run, tmp_path / "out")
    earlier = sorted((copied / artifacts.CHECKPOINTS).iterdir())[-2]
    for name in (artifacts.ADAPTER_WEIGHTS, artifacts.ADAPTER_CONFIG):
        shutil.copy(earlier / name, copied / name)
    edit(copied / artifacts.RUN_RECORD, adapter_sha256=artifacts.sha256_of(copied / artifacts.ADAPTER_WEIGHTS))
    damage(copied / artifacts.ADAPTER_WEIGHTS)
    with pytest.raises(AdapterError) as refused:
        read_adapter_record(copied, print)
    assert refused.value.hint.endswith(f"same adapter is whole in --adapter {earlier}")
    flip(earlier / artifacts.ADAPTER_WEIGHTS)
    with pytest.raises(AdapterError) as refused:
        read_adapter_record(copied, print)
    newest = max((copied / artifacts.CHECKPOINTS).iterdir())
    assert refused.value.hint.endswith(f"of step 3 is whole in --adapter {newest}")


@pytest.mark.parametrize("damage", [flip, cut])
def test_a_damaged_run_that_has_ended_is_not_said_to_be_whole(run, tmp_path, damage):
    copied = shutil.copytree(run, tmp_path / "out")
    settings = read_config_file(copied / artifacts.RUN_YAML, TrainConfig)
    config = TrainConfig(**settings | {"output": str(copied), "resume": True})
    said: list = []
    assert train(config, said.append).steps == 3 and "nothing is left to do" in said[-1].text
    damage(copied / artifacts.ADAPTER_WEIGHTS)
    with pytest.raises(AdapterError) as refused:
        train(config, print)
    assert "same adapter is whole in --adapter" in refused.value.hint


@pytest.mark.parametrize(
    ("name", "damage", "read"),
    [
        (artifacts.ADAPTER_WEIGHTS, flip, {"rank", "base", "settings", "progress"}),
        (artifacts.ADAPTER_WEIGHTS, cut, {"base", "settings", "progress"}),
        (artifacts.ADAPTER_CONFIG, cut, {"base", "settings", "progress"}),
        (artifacts.RUN_RECORD, cut, {"settings", "progress"}),
        (artifacts.RUN_YAML, lambda path: path.write_bytes(b"a: [\xff"), {"rank", "base", "progress"}),
    ],
)
def test_what_can_be_read_of_a_damaged_run_is_told_with_what_cannot(run, tmp_path, name, damage, read):
    copied = shutil.copytree(run, tmp_path / "out")
    assert "damaged" not in describe_run(copied, None)
    damage(copied / name)
    facts = describe_run(copied, None)
    assert read <= facts.keys() and facts["next"] == []
    assert name in facts["damaged"][0] or str(copied) in facts["damaged"][0]


def test_a_run_that_ends_once_more_and_dies_is_that_of_its_newest_checkpoint(run, tmp_path, monkeypatch):
    """Not new weights beside the record of the old ones."""
    copied, said = shutil.copytree(run, tmp_path / "out"), []

    def die(source, target):
        if target.name == artifacts.RUN_RECORD:
            raise KeyboardInterrupt
        source.replace(target)

    monkeypatch.setattr(directory, "replace_file", die)
    with pytest.raises(KeyboardInterrupt), directory.finished_files(copied) as collected:
        for name in (artifacts.ADAPTER_CONFIG, artifacts.ADAPTER_WEIGHTS, artifacts.RUN_RECORD):
            (collected / name).write_bytes(b"new")
    assert find_adapter(copied, said.append) == max((copied / artifacts.CHECKPOINTS).iterdir())
    assert "has not ended" in said[0].text


@pytest.mark.parametrize("name", [artifacts.RUN_RECORD, artifacts.ADAPTER_WEIGHTS])
def test_a_run_that_lost_a_file_names_the_checkpoint_that_has_it(run, tmp_path, name):
    """Without its record prompts would be formatted otherwise than in training, and without a word."""
    copied, said = shutil.copytree(run, tmp_path / "out"), []
    (copied / name).unlink()
    try:
        read_adapter_record(copied, said.append)
        (text,) = (event.text for event in said)
    except AdapterError as error:
        text = error.hint
    newest = max((copied / artifacts.CHECKPOINTS).iterdir())
    assert text.endswith(f"The same adapter is whole in --adapter {newest}")


def test_a_tokenizer_that_cannot_be_read_stops_a_merge_before_anything_is_written(run, tmp_path):
    copied = shutil.copytree(run, tmp_path / "out")
    cut(copied / "tokenizer.json")
    with pytest.raises(ModelError, match=f"The tokenizer of {copied} cannot be read"):
        merge(MergeConfig(adapter=str(copied), output=str(tmp_path / "merged")), print)
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
