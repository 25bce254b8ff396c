"""`qlora merge` when something is wrong: refused before anything is written, taken up after an interruption."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qlora_cli.artifacts import MARK, PREPARED_MANIFEST, RUN_RECORD, sha256_of
from qlora_cli.commands.merge import scratch_directory
from qlora_cli.commands.prepare import prepare
from qlora_cli.config import PrepareConfig
from qlora_cli.core.data.dataset import PreparedRows, split_rows
from qlora_cli.core.merge.delta import read_deltas
from qlora_cli.core.merge.output_directory import find_place, unfinished_path
from qlora_cli.core.merge.verify import find_rows
from qlora_cli.core.merge.writer import JOURNAL
from qlora_cli.core.storage.temporaries import is_temporary
from qlora_cli.errors import AdapterError, DiskFull, MergeError, ModelError, QloraError, RunError, UsageError
from qlora_cli.events import Caution, Notice, Progress
from tests.commands.merge_case import Case, make_case
from tests.conftest import TEXT, make_tokenizer, most_slow


@pytest.fixture(scope="module")
def finished(tiny_model, tmp_path_factory) -> Case:
    """An adapter on a base of several shards. Not to be changed."""
    directory = tmp_path_factory.mktemp("finished")
    base = directory / "base"
    source = tiny_model("llama")
    AutoModelForCausalLM.from_pretrained(source).save_pretrained(base, max_shard_size="120KB")
    for path in source.glob("tokenizer*"):
        shutil.copy(path, base)
    return make_case(base, directory)


@pytest.fixture
def case(finished, tmp_path) -> Case:
    """A copy of it, to be changed at will."""
    shutil.copytree(finished.base, tmp_path / "base")
    shutil.copytree(finished.adapter, tmp_path / "adapter")
    record = json.loads((tmp_path / "adapter" / RUN_RECORD).read_text())
    record["base"]["model"] = str(tmp_path / "base")
    (tmp_path / "adapter" / RUN_RECORD).write_text(json.dumps(record))
    case = Case(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", finished.live)
    case.change_config(base_model_name_or_path=str(case.base))
    return case


def change_weights(path: Path, change) -> None:
    """Rewrites a safetensors file."""
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def other_base(case: Case) -> None:
    shard = next(case.base.glob("model-00001*"))
    change_weights(shard, lambda weights: next(iter(weights.values())).add_(1e-3))


def nan_in_adapter(case: Case) -> None:
    path = case.adapter / "adapter_model.safetensors"
    change_weights(path, lambda weights: next(iter(weights.values())).view(-1)[3:4].fill_(torch.nan))


def nan_in_base(case: Case) -> None:
    for shard in case.base.glob("*.safetensors"):
        change_weights(
            shard, lambda weights: [w.view(-1)[7:8].fill_(torch.inf) for n, w in weights.items() if "up" in n]
        )
    (case.adapter / RUN_RECORD).unlink()


def other_shapes(case: Case) -> None:
    config = json.loads((case.base / "config.json").read_text())
    (case.base / "config.json").write_text(json.dumps(config | {"intermediate_size": 192}))
    (case.adapter / RUN_RECORD).unlink()


def pickle_weights(case: Case) -> None:
    for path in case.base.glob("model*"):
        path.unlink()
    torch.save({}, case.base / "pytorch_model.bin")


def missing_weight(case: Case) -> None:
    index_path = case.base / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    name = "model.layers.0.mlp.up_proj.weight"
    change_weights(case.base / index["weight_map"].pop(name), lambda weights: weights.pop(name))
    index_path.write_text(json.dumps(index))
    (case.adapter / RUN_RECORD).unlink()


def quantised_base(case: Case) -> None:
    config = json.loads((case.base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (case.base / "config.json").write_text(json.dumps(config))


def unknown_tensor(case: Case) -> None:
    path = case.adapter / "adapter_model.safetensors"
    name = "base_model.model.model.layers.7.mlp.up_proj.lora_A.weight"
    change_weights(path, lambda weights: weights.update({name: torch.ones(4, 64)}))


def half_a_pair(case: Case) -> None:
    path = case.adapter / "adapter_model.safetensors"
    change_weights(path, lambda weights: weights.pop(next(name for name in weights if "lora_A" in name)))


# What is wrong → (how it comes about, the error, words of its message).
FAULTS = {
    "base of other weights": (other_base, AdapterError, "different weights"),
    "base of other shapes": (other_shapes, QloraError, "192"),
    "NaN in the adapter": (nan_in_adapter, AdapterError, "1 of 28 tensors .* NaN"),
    "infinity in the base": (nan_in_base, ModelError, r"up_proj\.weight of the base holds NaN or infinity"),
    "pickle weights": (pickle_weights, ModelError, "pickle"),
    "a weight missing from the base": (missing_weight, MergeError, r"layers\.0\.mlp\.up_proj"),
    "a base in 4 bits": (quantised_base, AdapterError, "a different configuration"),
    "a tensor for no module": (unknown_tensor, AdapterError, r"layers\.7"),
    "half a pair": (half_a_pair, AdapterError, "half of a pair"),
    "another kind of adapter": (lambda c: c.change_config(peft_type="IA3"), AdapterError, "IA3"),
    "an adapter on a changed base": (
        lambda c: c.change_config(init_lora_weights="pissa_niter_4"),
        AdapterError,
        "pissa_niter_4",
    ),
    "repeated layers": (lambda c: c.change_config(layer_replication=[[0, 2]]), AdapterError, "layer_replication"),
    "no adapter": (lambda c: shutil.rmtree(c.adapter), AdapterError, "no adapter"),
    "no base": (lambda c: shutil.rmtree(c.base), AdapterError, "which is not there"),
    "a shard missing": (lambda c: next(c.base.glob("model-00002*")).unlink(), ModelError, "lacks 1 of"),
    "a shard cut short": (lambda c: os.truncate(next(c.base.glob("model-00002*")), 5000), ModelError, "damaged"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_is_named_and_nothing_is_left(case, fault) -> None:
    bring_about, error, words = FAULTS[fault]
    bring_about(case)
    before = sorted(path for path in case.output.parent.rglob("*"))
    with pytest.raises(error, match=words) as caught:
        case.merge()
    assert caught.value.message.endswith((".", "?")) or ":" in caught.value.message
    assert sorted(path for path in case.output.parent.rglob("*")) == before


def test_an_output_in_use_is_kept_unless_it_may_be_replaced(case) -> None:
    case.output.mkdir()
    (case.output / "thesis.txt").write_text("mine")
    for flags in ({}, {"overwrite": True}):
        with pytest.raises(RunError, match="which qlora did not write"):
            case.merge(**flags)
    assert (case.output / "thesis.txt").read_text() == "mine"
    (case.output / "thesis.txt").unlink()
    case.merge()
    with pytest.raises(RunError, match="exists already"):
        case.merge()
    case.merge(overwrite=True)
    (case.output / MARK).unlink()  # as older versions left it
    case.merge(overwrite=True)
    assert (case.output / "config.json").exists()
    assert sorted(path.name for path in case.output.parent.iterdir()) == ["adapter", "base", "merged"]


def test_neither_the_adapter_nor_the_base_nor_what_is_around_them_is_merged_over(case) -> None:
    before = {path: sha256_of(path) for path in case.adapter.parent.rglob("*") if path.is_file()}
    for output in (case.adapter, case.base, case.adapter.parent):
        with pytest.raises(RunError, match="this command reads"):
            replace(case, output=output).merge(overwrite=True)
    assert {path: sha256_of(path) for path in case.adapter.parent.rglob("*") if path.is_file()} == before


def test_a_failed_merge_keeps_the_model_it_would_have_replaced(case) -> None:
    case.merge()
    before = {path.name: sha256_of(path) for path in case.output.iterdir()}
    with pytest.raises(MergeError):
        case.merge(overwrite=True, verify=True, max_kl=0.0, dtype="bfloat16")
    assert {path.name: sha256_of(path) for path in case.output.iterdir()} == before
    assert not unfinished_path(case.output).exists()


def test_a_name_that_is_no_repository_is_refused_first(case) -> None:
    with pytest.raises(UsageError, match="no repository name"):
        case.merge(push="just-a-name")


def test_the_recorded_base_is_reported_and_a_named_one_is_not(case) -> None:
    events: list = []
    case.merge(events)
    assert any(isinstance(e, Notice) and str(case.base) in e.text and "recorded" in e.text for e in events)
    moved = case.base.rename(case.base.with_name("moved"))
    events = []
    case.merge(events, model=str(moved), overwrite=True)  # the same weights in another place are the same base
    assert not any(isinstance(e, Notice) and "recorded" in e.text for e in events)


def test_what_an_adapter_of_other_tools_does_not_say_is_reported(case) -> None:
    (case.adapter / RUN_RECORD).unlink()
    events: list = []
    case.merge(events)
    assert any(isinstance(e, Caution) and "nf4 with double quantisation is assumed" in e.text for e in events)
    assert any(isinstance(e, Notice) and str(case.base) in e.text for e in events)


# ---------------------------------------------------------------- interruption


class Killed(BaseException):
    """Stands for a signal in the middle of the work."""


def interrupt(case: Case, after_files: int) -> None:
    """Merges until some files are finished, and dies in the next."""

    def report(event) -> None:
        if len(list(unfinished_path(case.output).glob("*.safetensors"))) > after_files:
            raise Killed

    with pytest.raises(Killed):
        case.merge(report=report)


def contents(directory: Path) -> dict[str, str]:
    return {path.name: sha256_of(path) for path in directory.glob("*.safetensors")}


def test_an_interrupted_merge_goes_on_with_the_files_it_finished(case) -> None:
    whole = Case(case.base, case.adapter, case.output.with_name("whole"), case.live)
    files = whole.merge().files
    assert files > 3
    interrupt(case, after_files=2)
    assert not case.output.exists()
    assert (unfinished_path(case.output) / JOURNAL).exists()
    (unfinished_path(case.output) / "chat_template.jinja").write_text("of another adapter")
    events: list = []
    result = case.merge(events)
    assert result.files_reused == 2
    assert contents(case.output) == contents(whole.output)
    assert {path.name for path in case.output.iterdir()} == {path.name for path in whole.output.iterdir()}
    progress = [e for e in events if isinstance(e, Progress)]
    assert progress[-1].done == progress[-1].total == result.total_bytes
    assert [e.done for e in progress] == sorted(e.done for e in progress)
    assert [path.name for path in case.output.glob(".*")] == [MARK]


DAMAGES = ["a flipped bit", "a cut", "a broken journal", "another adapter", "--no-resume"]


@pytest.mark.parametrize("damage", most_slow(DAMAGES, ["a flipped bit"]))
def test_files_that_no_longer_hold_are_made_anew(case, damage) -> None:
    interrupt(case, after_files=2)
    unfinished = unfinished_path(case.output)
    first = sorted(unfinished.glob("*.safetensors"))[0]
    settings, reused = {}, 1
    if damage == "a flipped bit":
        content = bytearray(first.read_bytes())
        content[-5] ^= 4
        first.write_bytes(content)
    elif damage == "a cut":
        os.truncate(first, first.stat().st_size - 1)
    elif damage == "a broken journal":
        (unfinished / JOURNAL).write_text('{"key": ')
        reused = 0
    elif damage == "another adapter":
        change_weights(
            case.adapter / "adapter_model.safetensors", lambda weights: [w.mul_(2) for w in weights.values()]
        )
        reused = 0
    else:
        settings, reused = {"resume": False}, 0
    assert case.merge(**settings).files_reused == reused
    whole = Case(case.base, case.adapter, case.output.with_name("whole"), case.live)
    whole.merge()
    assert contents(case.output) == contents(whole.output)


def test_a_killed_merge_leaves_no_model_and_goes_on(case, zygote, tmp_path) -> None:
    mark = tmp_path / "third file"
    arguments = {"adapter": str(case.adapter), "output": str(case.output), "mark": str(mark)}
    killed = zygote.run("tests.faults.victims:merge_and_stay", kill_when=(mark, 0), **arguments)
    assert killed.code == -9, killed.said
    assert not case.output.exists()
    whole = Case(case.base, case.adapter, case.output.with_name("whole"), case.live)
    whole.merge()
    assert case.merge().files_reused in (1, 2)  # the second may have been killed before it stood in the journal
    assert contents(case.output) == contents(whole.output)


def test_two_merges_to_one_place_do_not_meet(case) -> None:
    import fcntl

    unfinished_path(case.output).mkdir()
    with (unfinished_path(case.output) / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(RunError, match="Another process"):
            case.merge()
    assert case.merge().files_reused == 0


def test_a_full_disk_is_one_sentence_and_finished_files_stay(case, monkeypatch) -> None:
    pwrite, room = os.pwrite, [250_000]

    def filling(descriptor, content, offset):
        room[0] -= len(content)
        if room[0] < 0:
            raise OSError(28, "No space left on device")
        return pwrite(descriptor, content, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", filling)
        with pytest.raises(DiskFull, match="disk is full"):
            case.merge()
    assert not case.output.exists()
    assert case.merge().files_reused > 0


def test_a_disk_without_room_is_reported_before_anything_is_written(case, monkeypatch) -> None:
    usage = shutil.disk_usage(case.base)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000))
    with pytest.raises(DiskFull, match=r"9\.77 KiB free"):
        case.merge()
    assert not unfinished_path(case.output).exists()


# ---------------------------------------------------------------- verification


def test_the_figures_are_reported_and_stand_in_a_card_the_hub_can_read(case) -> None:
    from huggingface_hub import ModelCard

    events: list = []
    result = case.merge(events, verify=None, dtype="bfloat16")
    figures = result.verification
    assert figures is not None
    assert 0 < figures.kl_mean < 1e-3
    assert figures.greedy_agreement > 0.95
    assert figures.other_perplexity == pytest.approx(figures.reference_perplexity, rel=0.01)
    assert any(isinstance(e, Notice) and "Verified" in e.text and "built-in text" in e.text for e in events)
    card = ModelCard.load(case.output / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.base_model is None  # a local path
    assert f"{figures.kl_mean:.2e}" in card.text
    assert f"{figures.other_perplexity:.4f}" in card.text
    assert json.loads(json.dumps(result.to_dict()))["verification"]["tokens"] == figures.tokens


def test_held_out_rows_of_the_run_are_used_where_they_are(case, tmp_path) -> None:
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"text": text * n}) + "\n" for n in (14, 16) for text in TEXT)
    )
    directory = tmp_path / "prepared"
    data = {"data": str(tmp_path / "rows.jsonl"), "output": str(directory), "workers": 1}
    prepare(PrepareConfig(model=str(case.base), **data), lambda event: None)
    rows = PreparedRows(directory)
    record = json.loads((case.adapter / RUN_RECORD).read_text())
    record["data"] = {"prepared": str(directory), "rows_sha256": rows.manifest["rows_sha256"]}
    (case.adapter / RUN_RECORD).write_text(json.dumps(record))
    (case.adapter / "run.yaml").write_text("eval_rows: 3\nseed: 5\n")
    trained, held = split_rows(rows, fraction=0, count=3, seed=5)
    tokens = int(held.lengths.sum())
    assert 512 < tokens < 1024  # enough to compare on, and as many as are
    found, described = find_rows(case.adapter, None, least_tokens=tokens + 1)
    assert described == "held out from training and trained on"  # the three are too few by themselves
    expected = [subset[i][0].tolist() for subset in (held, trained) for i in range(len(subset))]
    assert [ids.tolist() for ids, _ in found] == expected
    result = case.merge(verify=True)
    assert result.verification.rows == 3
    assert result.verification.tokens == sum(int(held[i][1][1:].sum()) for i in range(3))
    assert "of 3 rows held out from training." in (case.output / "README.md").read_text()
    (case.adapter / "run.yaml").write_text("seed: 5\n")
    assert find_rows(case.adapter, None)[1] == "trained on"
    (directory / PREPARED_MANIFEST).write_text(json.dumps(rows.manifest | {"rows_sha256": "other"}))
    assert find_rows(case.adapter, make_tokenizer())[1] == "of a built-in text"  # not the rows of the run any more


def test_a_merge_that_is_not_the_trained_model_fails(case, monkeypatch) -> None:
    """A merge that forgot the scaling, which a look at the files would not show."""

    def without_scaling(*arguments):
        return {name: replace(delta, scaling=1.0) for name, delta in read_deltas(*arguments).items()}

    monkeypatch.setattr("qlora_cli.commands.merge.read_deltas", without_scaling)
    with pytest.raises(MergeError, match="not the trained one: mean KL"):
        case.merge(verify=True)
    assert not case.output.exists()
    assert not unfinished_path(case.output).exists()


@pytest.mark.parametrize("lossy", most_slow([{"base": "original"}, {"quantize": True}], [{"quantize": True}]))
def test_what_lossy_merges_lose_is_reported_and_refused_past_a_given_limit(case, lossy) -> None:
    events: list = []
    result = case.merge(events, verify=True, **lossy)
    assert result.verification.kl_mean > 1e-3
    if result.verification.kl_mean > 0.01:
        assert any(isinstance(e, Caution) and "Part of the fine-tune is lost" in e.text for e in events)
    with pytest.raises(MergeError, match=r"The limit is 0\.0001"):
        case.merge(verify=True, max_kl=1e-4, overwrite=True, **lossy)


def test_a_model_too_large_to_compare_is_merged_and_that_is_reported(case, monkeypatch) -> None:
    import psutil

    memory = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=2**20))
    events: list = []
    assert case.merge(events, verify=None).verification is None
    assert any(isinstance(e, Caution) and "is not compared" in e.text for e in events)
    assert "not compared" in (case.output / "README.md").read_text()


@pytest.mark.parametrize("architecture", most_slow(["llama", "qwen2", "gpt_neox"], ["qwen2"]))
def test_a_vocabulary_that_grew_is_compared_too(tiny_model, tmp_path, architecture) -> None:
    result = make_case(tiny_model(architecture), tmp_path, new_tokens=8).merge(verify=True)
    assert result.verification.kl_mean < 1e-5


def test_falcon_is_not_written_in_four_bits_that_transformers_would_not_read(tiny_model, tmp_path) -> None:
    case = make_case(tiny_model("falcon"), tmp_path)
    with pytest.raises(MergeError, match="FalconLinear"):
        case.merge(quantize=True)
    assert np.all(sorted(path.name for path in tmp_path.iterdir()) == ["adapter"])


def test_what_a_merge_needs_on_the_way_is_known_for_a_temporary(tmp_path, monkeypatch):
    """So that one that was killed is swept, and a merge into the working directory or a mount point finds it empty."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for output in (Path(), tmp_path / "new" / "merged"):
        place = find_place(output, overwrite=False, reads=())
        with scratch_directory(place) as scratch:
            assert scratch.parent == place.home and is_temporary(scratch.name)
            (scratch / "weights").touch()
            place.confirm()
        assert not scratch.exists()
