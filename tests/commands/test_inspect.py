"""`inspect` says what is true of a model, an adapter, a run, a prepared set and this machine, ready for JSON."""

import errno
import json
import shlex
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from qlora_cli import artifacts
from qlora_cli.cli.app import main
from qlora_cli.cli.screens.models import of_a_model
from qlora_cli.commands.inspect import inspect
from qlora_cli.commands.prepare import prepare
from qlora_cli.commands.train import train
from qlora_cli.config import InspectConfig, PrepareConfig, TrainConfig
from qlora_cli.core.inspection.run_summary import summarise_metrics
from qlora_cli.core.merge.base import RefusedMerge
from qlora_cli.core.planning.suggestions import write_train_command
from qlora_cli.errors import AdapterError, ModelError, RunError, UsageError
from qlora_cli.settings.ranges import parse_memory
from qlora_cli.sizes import format_bytes

pytestmark = pytest.mark.usefixtures("short_runs")

SEVEN_B = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "architectures": ["LlamaForCausalLM"],
}


def look(**settings):
    """One inspection, checked to be plain JSON with drawable tables."""
    facts = inspect(InspectConfig(**settings), lambda event: None)
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
    for table in facts["tables"]:
        assert all(len(row) == len(table["columns"]) for row in table["rows"]), table["title"]
    return facts


def table_of(facts, title):
    table = next(table for table in facts["tables"] if table["title"].startswith(title))
    return [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]]


@pytest.fixture(scope="module")
def seven_b(tmp_path_factory) -> str:
    """A directory with nothing but a configuration in it."""
    directory = tmp_path_factory.mktemp("config-only")
    LlamaConfig(**SEVEN_B).save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module")
def run(tiny_model, tmp_path_factory) -> Path:
    """A finished run of four steps."""
    place = tmp_path_factory.mktemp("run")
    rows = [{"question": f"What is {a} + {a}?", "answer": f"It is {2 * a}."} for a in range(24)]
    (place / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QLORA_CACHE", str(place / "cache"))
        prepare(
            PrepareConfig(
                model=str(tiny_model("llama")), data=str(place / "sums.jsonl"), output=str(place / "prepared")
            ),
            lambda event: None,
        )
        train(
            TrainConfig(
                model=str(tiny_model("llama")),
                prepared=str(place / "prepared"),
                output=str(place / "out"),
                max_steps=4,
                gradient_accumulation_steps=2,
                learning_rate=5e-3,
                rank=4,
                alpha=8,
                eval_fraction=0.2,
                eval_every=2,
                max_length=64,
                base_cache=False,
            ),
            lambda event: None,
        )
    return place / "out"


# ---------------------------------------------------------------- models


def test_a_configuration_alone_is_enough(seven_b):
    facts = look(model=seven_b)
    assert facts["trainable_parameters"] == 39_976_960
    assert facts["total_parameters"] == 6_738_415_616 + 39_976_960
    assert facts["trainable_percent"] == pytest.approx(100 * 39_976_960 / 6_778_392_576)
    modules = {row["module"]: row for row in table_of(facts, "Modules")}
    assert modules["q_proj"]["parameters"] == 32 * 4096 * 4096
    assert modules["q_proj"]["count"] == 32
    assert sum(row["held_bytes"] for row in modules.values()) == facts["base_bytes"]
    assert facts["disk"]["weights_bytes"] == 2 * 6_738_415_616
    assert facts["training"]["peak_bytes"] > facts["base_bytes"]
    assert not any(table["title"] == "Weights" for table in facts["tables"])


def test_memory_on_this_cpu_is_compared_with_nothing(seven_b):
    if torch.cuda.is_available():
        pytest.skip("there is a card here, whose free memory is the limit")
    facts = look(model=seven_b)
    assert facts["vram_bytes"] is None and facts["fits"] is None
    ways = [row["peak_bytes"] for row in table_of(facts, "Ways")]
    assert ways == sorted(ways, reverse=True)


def test_what_fits_is_said_with_the_settings_that_make_it_fit(seven_b):
    facts = look(model=seven_b, vram="8GiB")
    assert facts["fits"] is True
    assert facts["training"]["device_bytes"] <= parse_memory("8GiB")
    assert int(facts["settings"]["gradient_checkpointing"]) > 0
    assert facts["next"] == [f"qlora train --model {seven_b} --data DATA --vram 8GiB"]
    smallest = facts["smallest_card"]
    assert smallest["streamed_layers"] == 32 and smallest["device_bytes"] < facts["training"]["device_bytes"] / 2
    assert "smallest_card" not in look(model=seven_b, vram="8GiB", stream=False)


def test_speed_is_bounded_by_arithmetic(seven_b):
    facts = look(model=seven_b, vram="80GiB")
    bounds = {row["card"]: row["tokens_per_second"] for row in table_of(facts, "Speed at most")}
    # Four operations a weight, a little for attention and adapters: 18,000 tokens a second were measured on an H200.
    assert 989e12 / (4.6 * 6.7e9) < bounds["H100, H200"] < 989e12 / (4 * 6.7e9)
    recomputed = look(model=seven_b, gradient_checkpointing="on")
    slower = {row["card"]: row["tokens_per_second"] for row in table_of(recomputed, "Speed at most")}
    assert all(slower[card] < 0.8 * bounds[card] for card in bounds)


def test_what_does_not_fit_gets_a_command_that_does(seven_b):
    facts = look(model=seven_b, vram="12GiB", gradient_checkpointing="off", max_length=4096, target_modules=("q_proj",))
    assert facts["fits"] is False
    assert facts["nearest"]["device_bytes"] <= parse_memory("12GiB")
    (command,) = facts["next"]
    words = shlex.split(command)
    assert words[:2] == ["qlora", "train"]
    assert words[words.index("--target-modules") + 1] == "q_proj"
    assert words[words.index("--vram") + 1] == "12GiB"
    checkpointing = words[words.index("--gradient-checkpointing") + 1]
    again = look(
        model=seven_b,
        vram="12GiB",
        gradient_checkpointing=checkpointing,
        max_length=int(words[words.index("--max-length") + 1]) if "--max-length" in words else None,
        target_modules=("q_proj",),
        offload_activations=True if "--offload-activations" in words else None,
        offload_embeddings=True if "--offload-embeddings" in words else None,
    )
    assert again["fits"] is True


@pytest.mark.slow
def test_a_model_too_large_for_any_setting_gets_no_command(seven_b):
    facts = look(model=seven_b, vram="1200MiB")
    assert facts["fits"] is False
    assert "nothing fits" in facts["nearest"]
    assert "next" not in facts


def test_the_exit_code_says_whether_it_fits(seven_b, capsys):
    assert main(["inspect", "--model", seven_b, "--vram", "2GiB", "--rank", "1", "--json"]) == 3  # lower ones are tried
    assert json.loads(capsys.readouterr().out)["fits"] is False
    assert main(["inspect", "--model", seven_b, "--vram", "80GiB", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["trainable_parameters"] == 39_976_960
    assert main(["inspect", "--model", seven_b, "--vram", "12"]) == 2


@pytest.mark.slow
def test_every_optimizer_and_engine_is_predicted(seven_b):
    eight_bit, full = (look(model=seven_b, optimizer=name) for name in ("adamw_8bit", "adamw"))
    assert full["optimizer_bytes"] == 8 * 39_976_960
    assert 3.9 < full["optimizer_bytes"] / eight_bit["optimizer_bytes"] < 4
    # On a card the plain engine recomputes every layer.
    fast, plain = (look(model=seven_b, engine=name, gradient_checkpointing="on") for name in ("fast", "plain"))
    assert plain["training"]["peak_bytes"] > fast["training"]["peak_bytes"]
    assert look(model=seven_b, engine="plain")["training"] == plain["training"]


def test_local_weights_are_surveyed(tiny_model):
    facts = look(model=str(tiny_model("qwen2", dtype="bfloat16")))
    weights = {(row["module"], row["dtype"]): row for row in table_of(facts, "Weights")}
    assert weights["q_proj", "BF16"]["stored_bytes"] == 2 * (2 * 64 * 64 + 2 * 64)  # two layers, weight and bias
    stored = sum(row["stored_bytes"] for row in weights.values())
    assert stored == 2 * (facts["total_parameters"] - facts["trainable_parameters"]) == facts["disk"]["weights_bytes"]
    assert facts["disk"]["download_bytes"] == 0
    assert ("weights", f"{format_bytes(stored)}, nothing to download") in of_a_model(facts).facts


@pytest.mark.parametrize(
    ("renamed", "why"),
    [
        ("weights.gone", "holds no safetensors weights"),
        ("pytorch_model.bin", "pickle weights only"),
        ("model-2.safetensors", "lacks 1 of the 2 weight files of its index"),
    ],
)
def test_weights_that_a_directory_lacks_are_told_before_a_run_misses_them(tiny_model, tmp_path, renamed, why):
    directory = shutil.copytree(tiny_model("llama"), tmp_path / "model")
    (directory / "model.safetensors").rename(directory / renamed)
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    screen = of_a_model(look(model=str(directory)))
    assert any(said.startswith("It cannot be trained as it is: ") and why in said for said in screen.sentences)
    assert dict(screen.facts)["weights"].endswith("which are missing here")


def test_a_merge_that_will_be_refused_is_told(tiny_model, monkeypatch):
    refused = RefusedMerge("A weight cannot be put back. Use the adapter unmerged.", original=False)
    monkeypatch.setattr("qlora_cli.core.inspection.model_summary.foresee_refusal", lambda *_: refused)
    facts = look(model=str(tiny_model("llama")))
    said = "A merge of its adapters will be refused: A weight cannot be put back. Use the adapter unmerged."
    screen = of_a_model(facts)
    assert said in screen.sentences and "to merge" not in dict(screen.facts)
    assert "to merge" in dict(of_a_model({**facts, "merges_original": True}).facts)


def test_a_directory_of_a_model_is_looked_at_like_model(tiny_model):
    model = str(tiny_model("qwen2", dtype="bfloat16"))
    assert inspect(InspectConfig(vram="8GiB"), print, [model]) == look(model=model, vram="8GiB")


def test_the_quantisation_error_is_shown_by_layer(tiny_model):
    facts = look(model=str(tiny_model("falcon")), quantization_error=True)
    rows = table_of(facts, "Relative error of nf4")
    assert [row["layer"] for row in rows] == [0, 1]
    assert all(0.05 < row["query_key_value"] < 0.15 for row in rows)
    assert 0.05 < facts["mean_quantization_error"] < 0.15


def test_a_model_whose_step_cannot_be_followed_is_still_counted(tiny_model, monkeypatch):
    from qlora_cli.core.planning import model_profile as model_facts

    def refuse(*_, **__):
        raise ModelError("The forward pass looks at numbers.")

    monkeypatch.setattr(model_facts, "trace_model", refuse)
    facts = look(model=str(tiny_model("llama")), vram="8GiB", rank=3)  # a profile of its own
    assert facts["trainable_parameters"] > 0
    assert "looks at numbers" in facts["memory"]
    assert "fits" not in facts


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"model": "/nowhere/model"}, ModelError),
        ({"model": "no-such-org/no-such-model"}, ModelError),
        ({"prepared": "/nowhere/rows"}, RunError),
        ({"adapter": "/nowhere/out"}, AdapterError),
        ({"adapter": "a", "prepared": "b"}, UsageError),
        ({"model": "a", "prepared": "b"}, UsageError),
    ],
)
def test_what_is_not_there_is_one_sentence(settings, error):
    with pytest.raises(error) as caught:
        look(**settings)
    assert "\n" not in caught.value.message
    assert caught.value.hint


def test_wrong_flags_are_refused(tiny_model, run):
    model = str(tiny_model("llama"))
    for flags in ({"vram": "12GiB"}, {"quantization_error": True}, {"adapter": str(run), "max_length": 512}):
        with pytest.raises(UsageError, match="is about a model"):
            look(**flags)
    with pytest.raises(AdapterError, match="v_porj"):
        look(model=model, target_modules=("q_proj", "v_porj"))
    with pytest.raises(UsageError):
        look(model=model, vram="twelve")


def test_what_4_bits_cost_on_rows_is_measured(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"question": f"What is {n}?", "answer": f"It is {n}."}) + "\n" for n in range(8))
    )
    facts = look(model=str(tiny_model("llama")), data=(str(rows),))
    cost = facts["four_bit_cost"]
    assert cost["rows"] == 8 and cost["tokens"] > 8 and cost["loss_in_16_bits"] != cost["loss_in_4_bits"]
    layers = table_of(facts, "Layers by what 4 bits change")
    assert len(layers) == 2 and layers[0]["error_percent"] > layers[1]["error_percent"] > 0
    eight, sixteen = table_of(facts, "These layers in more bits")
    assert (eight["bits"], sixteen["bits"]) == (8, 16) and 0 < eight["more_bytes"] < sixteen["more_bytes"]
    assert eight["won"] == pytest.approx(cost["loss_in_4_bits"] - eight["loss"])
    assert any(f"--data {rows}" in command for command in facts["next"])
    with pytest.raises(UsageError, match="is about a model"):
        look(data=(str(rows),))


def test_the_command_repeats_what_was_given_and_no_more():
    config = InspectConfig(
        model="org/a model", rank=8, double_quant=False, target_modules=("q_proj", "v_proj"), vram="12GiB", rslora=True
    )
    command = write_train_command(
        config, {"max_length": 512, "offload_activations": True, "gradient_checkpointing": "on"}
    )
    assert command.startswith("qlora train --model 'org/a model' --data DATA ")
    given = "--rank 8 --target-modules q_proj,v_proj --rslora --no-double-quant --vram 12GiB"
    changed = "--max-length 512 --offload-activations --gradient-checkpointing on"
    assert sorted(command.split()) == sorted(f"qlora train --model 'org/a model' --data DATA {given} {changed}".split())


# ---------------------------------------------------------------- runs and adapters


def test_a_checkpoint_says_what_its_run_recorded(run, tmp_path):
    checkpoint = max((run / artifacts.CHECKPOINTS).iterdir())
    facts = look(adapter=str(checkpoint))
    whole = look(adapter=str(run))
    assert (facts["kind"], whole["kind"]) == ("checkpoint", "run")
    assert facts["base"] == whole["base"] and facts["settings"] == whole["settings"]
    assert facts["total_parameters"] == whole["total_parameters"]
    assert facts["next"][0] == f'qlora generate --adapter {checkpoint} "Your question"'
    assert whole["next"][1] == f"qlora merge --adapter {run} --output merged"
    assert facts["progress"]["steps"] == 4 and facts["progress"]["best_eval_step"] in (2, 4)
    assert facts["progress"]["last_loss"] == whole["progress"]["last_loss"]
    moved = shutil.copytree(checkpoint, tmp_path / "moved")  # it holds its own record
    elsewhere = look(adapter=str(moved))
    assert (elsewhere["kind"], elsewhere["base"]) == ("checkpoint", whole["base"])


def test_a_run_says_what_it_is_and_what_produced_it(run, tiny_model):
    facts = look(adapter=str(run))
    base = AutoModelForCausalLM.from_pretrained(tiny_model("llama"))
    adapted = PeftModel.from_pretrained(base, str(run), is_trainable=True)
    trainable, total = adapted.get_nb_trainable_parameters()
    assert (facts["trainable_parameters"], facts["total_parameters"]) == (trainable, total)
    assert (facts["rank"], facts["alpha"], facts["scaling"]) == (4, 8, 2)
    assert set(facts["target_modules"]) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert facts["base"]["model"] == str(tiny_model("llama"))
    assert facts["base"]["weights_sha256"]
    assert facts["settings"]["learning_rate"] == 5e-3
    assert facts["versions"]["torch"] == torch.__version__

    lines = [json.loads(line) for line in (run / artifacts.METRICS).read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    progress = facts["progress"]
    assert (progress["steps"], progress["last_loss"], progress["best_loss"]) == (4, losses[-1], min(losses))
    assert progress["best_eval_loss"] == min(line["eval_loss"] for line in lines if "eval_loss" in line)
    assert progress["tokens"] == sum(line["tokens"] for line in lines if "tokens" in line)

    norms = table_of(facts, "Norm")
    assert [row["layer"] for row in norms] == [0, 1]
    delta = adapted.base_model.model.model.layers[1].self_attn.q_proj.get_delta_weight("default")
    assert norms[1]["q_proj"] == pytest.approx(float(delta.detach().norm()), rel=6e-3)  # three digits
    parts = table_of(facts, "Adapter")
    assert sum(row["parameters"] for row in parts) == trainable


def test_without_an_argument_the_run_in_out_is_looked_at(run, monkeypatch):
    monkeypatch.chdir(run.parent)
    facts = look()
    assert facts["kind"] == "run"
    assert facts["directory"] == "out"
    assert facts["rank"] == 4


def test_a_run_that_has_not_ended_shows_how_far_it_came(run, tmp_path):
    (tmp_path / "checkpoints" / "step-00000002").mkdir(parents=True)
    (tmp_path / "checkpoints" / ".step-00000004.tmp").mkdir()
    lines = (run / artifacts.METRICS).read_text().splitlines(keepends=True)
    (tmp_path / artifacts.METRICS).write_text("".join(lines[:2]) + lines[2][:20])  # killed while writing
    facts = look(adapter=str(tmp_path))
    assert facts["kind"] == "run"
    assert facts["progress"]["steps"] == 2
    assert facts["checkpoints"] == ["step-00000002"]
    assert "rank" not in facts


def test_a_run_in_training_names_its_process_and_no_resume(run, tmp_path, monkeypatch, capsys):
    going = shutil.copytree(run, tmp_path / "run")
    for name in (artifacts.ADAPTER_CONFIG, artifacts.ADAPTER_WEIGHTS, artifacts.RUN_RECORD):
        (going / name).unlink()
    monkeypatch.setattr("qlora_cli.core.inspection.run_summary.find_holder", lambda directory: 123)
    assert main(["inspect", str(going)]) == 0
    out, err = capsys.readouterr()
    assert f"{going} is a run that is being trained by process 123: 4 steps" in out and "--resume" not in err
    monkeypatch.undo()
    assert look(adapter=str(going))["next"][0] == f"qlora train --config {going}/run.yaml --resume --output {going}"


def test_a_folder_of_runs_names_them_beside_folders_that_are_closed(tmp_path, monkeypatch):
    for name in ("a run", "b", "closed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / artifacts.RUN_YAML).touch()
    stat = Path.stat

    def closed(path, **keywords):
        if path.parent.name == "closed":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return stat(path, **keywords)

    monkeypatch.setattr(Path, "stat", closed)  # as for everybody but root
    with pytest.raises(RunError, match=f"{tmp_path} is none") as caught:
        inspect(InspectConfig(), lambda event: None, [str(tmp_path)])
    assert caught.value.hint == f"Type: qlora inspect '{tmp_path}/a run' {tmp_path}/b"


def test_an_adapter_of_another_tool_is_read_without_its_base(run, tmp_path):
    for name in (artifacts.ADAPTER_CONFIG, artifacts.ADAPTER_WEIGHTS):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    config = json.loads((tmp_path / artifacts.ADAPTER_CONFIG).read_text())
    config["base_model_name_or_path"] = "someone/not-here"
    (tmp_path / artifacts.ADAPTER_CONFIG).write_text(json.dumps(config))
    facts = look(adapter=str(tmp_path))
    assert facts["kind"] == "adapter"
    assert facts["base_model"] == "someone/not-here"
    assert facts["total_parameters"] is None
    assert facts["trainable_parameters"] > 0


def test_the_base_of_an_adapter_can_be_named(run, tmp_path, tiny_model):
    for name in (artifacts.ADAPTER_CONFIG, artifacts.ADAPTER_WEIGHTS):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    facts = look(adapter=str(tmp_path), model=str(tiny_model("llama")))
    assert facts["total_parameters"] > facts["trainable_parameters"]


def test_damaged_adapter_weights_are_refused(run, tmp_path):
    for name in (artifacts.ADAPTER_CONFIG, artifacts.ADAPTER_WEIGHTS):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    content = (tmp_path / artifacts.ADAPTER_WEIGHTS).read_bytes()
    (tmp_path / artifacts.ADAPTER_WEIGHTS).write_bytes(content[: len(content) // 2])
    with pytest.raises(AdapterError):
        look(adapter=str(tmp_path))


def test_modules_trained_in_full_are_told_apart(tmp_path, run):
    tensors = load_file(run / artifacts.ADAPTER_WEIGHTS)
    tensors["base_model.model.lm_head.weight"] = torch.zeros(8, 4)
    save_file(tensors, tmp_path / artifacts.ADAPTER_WEIGHTS)
    (tmp_path / artifacts.ADAPTER_CONFIG).write_bytes((run / artifacts.ADAPTER_CONFIG).read_bytes())
    rows = {(row["module"], row["part"]): row["parameters"] for row in table_of(look(adapter=str(tmp_path)), "Adapter")}
    assert rows["lm_head", "in full"] == 32
    assert rows["q_proj", "lora_A"] == 2 * 4 * 64


def test_metrics_of_a_resumed_run_count_each_step_once():
    lines = [
        {"step": 1, "loss": 3.0, "tokens": 10, "step_seconds": 2.0, "peak_vram_bytes": None},
        {"step": 2, "loss": 2.0, "tokens": 10, "step_seconds": 2.0, "peak_vram_bytes": 7},
        {"step": 2, "loss": 2.5, "tokens": 10, "step_seconds": 1.0, "peak_vram_bytes": 9},
        {"step": 3, "loss": None, "tokens": 10, "step_seconds": 1.0, "peak_vram_bytes": 8},
        {"step": 2, "eval_loss": 4.0, "perplexity": 54.6},
    ]
    found = summarise_metrics(lines)
    assert (found["steps"], found["best_loss"], found["best_step"], found["last_loss"]) == (3, 2.5, 2, 2.5)
    assert (found["tokens"], found["training_seconds"], found["peak_vram_bytes"]) == (30, 4.0, 9)
    assert found["best_eval_loss"] == 4.0
    assert summarise_metrics([]) == {"steps": 0}


# ---------------------------------------------------------------- the rest


def test_a_prepared_set_repeats_what_prepare_said(run):
    facts = look(prepared=str(run.parent / "prepared"))
    manifest = json.loads((run.parent / "prepared" / artifacts.PREPARED_MANIFEST).read_text())
    assert facts["rows"] == manifest["rows"] == 24
    assert {name: facts.get(name) for name in manifest} == {**manifest, "sha256": None}  # the file's own digest


def test_with_nothing_to_read_the_machine_is_looked_at(tmp_path, monkeypatch):
    (tmp_path / "cache" / "prepared").mkdir(parents=True)
    (tmp_path / "cache" / "prepared" / "rows").write_bytes(b"x" * 1234)
    (tmp_path / "cache" / "base" / "digest").mkdir(parents=True)
    (tmp_path / "cache" / "base" / "digest" / "weights").write_bytes(b"x" * 99)
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    facts = look()
    assert facts["kind"] == "machine"
    assert facts["works"] is True
    assert facts["caches"] == {"bases_bytes": 99, "prepared_rows_bytes": 1234}
    assert facts["versions"]["peft"]
    checks = {row["name"]: row for row in table_of(facts, "Checks")}
    assert checks["4-bit step"]["works"] is True


def test_every_view_is_one_json_object_on_stdout(run, seven_b, tmp_path, monkeypatch, capsys):
    checkpoint = max((run / artifacts.CHECKPOINTS).iterdir())
    monkeypatch.chdir(tmp_path)  # where there is no run to look at
    views = {
        "model": ["--model", seven_b],
        "run": ["--adapter", str(run)],
        "checkpoint": ["--adapter", str(checkpoint)],
        "prepared rows": ["--prepared", str(run.parent / "prepared")],
        "machine": [],
    }
    for kind, words in views.items():
        assert main(["inspect", *words, "--json"]) == 0
        reported = capsys.readouterr()
        assert json.loads(reported.out)["kind"] == kind
        assert "→" not in reported.err  # the next command stands in the object


def test_a_base_that_one_card_cannot_hold_is_offered_sharded_over_as_few_as_can(seven_b):
    facts = look(model=seven_b, vram="4.1GiB", max_length=512, rank=1, stream=False)  # lower ranks would be tried too
    assert facts["fits"] is False
    shares = table_of(facts, "Base sharded over cards")
    assert [row["cards"] for row in shares] == [2, 4, 8]
    held = [facts["training"]["base_bytes"], *(row["base_bytes"] for row in shares)]
    assert all(later < 0.6 * earlier for earlier, later in pairwise(held))
    enough = next(row["cards"] for row in shares if row["device_bytes"] <= parse_memory("4.1GiB"))
    assert facts["nearest_with_more_cards"] == {"gpus": enough, "shard": True}
    assert f"--gpus {enough}" in facts["next"][-1] and "--shard" in facts["next"][-1]
    parts = [row["peak_bytes"] for row in table_of(facts, "Rows shared by cards")]
    assert facts["training"]["peak_bytes"] > parts[0] > parts[1] > parts[2]
    plain = look(model=seven_b, vram="4.1GiB", max_length=512, rank=1, engine="plain")
    assert "nearest_with_more_cards" not in plain


def test_a_model_says_what_of_it_is_in_4_bits_and_refuses_a_format_that_is_not_read(tiny_model, tmp_path):
    found = inspect(InspectConfig(model=str(tiny_model("gpt2"))), lambda event: None)
    assert 50 < found["four_bit_percent"] < 100
    table = next(table for table in found["tables"] if table["title"] == "Of the body in 16 bits")
    assert table["columns"] == ["why", "parameters"] and "norms, biases and other vectors" in table["rows"][0]
    directory = tmp_path / "model"
    shutil.copytree(tiny_model("llama"), directory)
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"quantised already, by gptq"):
        inspect(InspectConfig(model=str(directory)), lambda event: None)
