"""`train` end to end on a tiny model: what a run directory holds, how a run goes on, and what is refused and when."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import accelerate.tracking
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_cli import artifacts
from qlora_cli.artifacts import ADAPTER_WEIGHTS, CHECKPOINTS, METRICS, MODEL_CARD, RUN_RECORD, RUN_YAML
from qlora_cli.cli.app import main
from qlora_cli.commands.generate import generate
from qlora_cli.commands.prepare import prepare
from qlora_cli.commands.train import train
from qlora_cli.config import GenerateConfig, PrepareConfig, TrainConfig
from qlora_cli.config_file import read_config_file
from qlora_cli.core.candidates.four_bit_gap import measure_held_out
from qlora_cli.core.engine.fast import FastEngine
from qlora_cli.core.merge.base import RefusedMerge
from qlora_cli.core.models.files import resolve_model
from qlora_cli.core.models.loading import load_base
from qlora_cli.core.runs import decisions
from qlora_cli.core.runs.directory import claimed
from qlora_cli.core.storage.checkpoint import checkpoint_path, list_checkpoints
from qlora_cli.core.storage.safetensors_header import read_header
from qlora_cli.errors import (
    AdapterError,
    CheckpointError,
    DataError,
    DiskFull,
    Interrupted,
    ModelError,
    QloraError,
    RunError,
    UsageError,
)
from qlora_cli.events import Caution, CheckpointSaved, EvaluationLogged, Notice, RunStarted, SampleAnswered, StepLogged
from qlora_cli.settings.groups import QuantizationSettings
from tests.conftest import most_slow

pytestmark = pytest.mark.usefixtures("short_runs")

CLOCK = ("step_seconds", "tokens_per_second", "peak_vram_bytes")  # what the machine decides


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QLORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    rows = [{"question": f"What is {a} + {b}?", "answer": f"It is {a + b}."} for a in range(6) for b in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def options(tiny_model, data, tmp_path):
    """Settings of a short run with everything in it that could go out of step."""
    return short_run(tiny_model, data, tmp_path)


def short_run(tiny_model, data, place):
    return {
        "model": str(tiny_model("llama")),
        "data": str(data),
        "output": str(place / "out"),
        "max_steps": 9,
        "batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 5e-3,
        "dropout": 0.1,
        "rank": 4,
        "target_modules": ("q_proj", "down_proj"),
        "eval_rows": 6,
        "eval_every": 4,
        "save_every": 2,
        "base_cache": False,
    }


@pytest.fixture(scope="module")
def straight(tiny_model, data, tmp_path_factory):
    """Directory of a finished run with the settings of `options`; not to be written in."""
    settings = short_run(tiny_model, data, tmp_path_factory.mktemp("straight"))
    run(settings)
    return Path(settings["output"])


def run(options: dict, events: list | None = None, **changes):
    return train(TrainConfig(**{**options, **changes}), (events if events is not None else []).append)


def stopping_at(step: int, events: list):
    """A report that asks the run to stop when it hears of a step."""

    def report(event):
        events.append(event)
        if isinstance(event, StepLogged) and event.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return report


def metrics(output: Path, *, without: tuple[str, ...] = CLOCK) -> list[dict]:
    lines = [json.loads(line) for line in (output / METRICS).read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in without} for line in lines]


def weights(output: Path) -> bytes:
    return (output / ADAPTER_WEIGHTS).read_bytes()


# ---------------------------------------------------------------- the contract


@pytest.fixture(scope="module")
def finished(tiny_model, data, tmp_path_factory):
    """One finished run, its result and its events; not to be written in."""
    output = tmp_path_factory.mktemp("run") / "out"
    events: list = []
    config = TrainConfig(
        model=str(tiny_model("llama")),
        data=str(data),
        output=str(output),
        epochs=2,
        batch_size=4,
        gradient_accumulation_steps=1,
        learning_rate=2e-2,
        eval_fraction=0.1,
        base_cache=False,
    )
    return output, train(config, events.append), events


def test_a_run_leaves_what_the_contract_names_and_no_pickle(finished):
    output, result, _ = finished
    names = {path.name for path in output.iterdir()}
    assert names >= {
        "adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "run.yaml", "README.md", "loss.png", "report.html", "metrics.jsonl", "qlora.json", "checkpoints",
    }  # fmt: skip
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    for path in output.rglob("*"):
        assert path.suffix not in {".bin", ".pt", ".pth", ".pkl", ".ckpt"}
        assert not path.name.startswith(".") or path.name in (artifacts.LOCK, artifacts.MARK)
    assert result.steps == result.total_steps and result.output == str(output)


def test_a_run_s_tokenizer_has_the_chat_template_that_was_trained_with(tiny_model, tmp_path):
    turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    own = {"model": str(tiny_model("llama")), "data": str(tmp_path / "rows.jsonl"), "output": str(tmp_path / "out")}
    train(TrainConfig(**own, max_steps=1, init="default", base_cache=False), lambda event: None)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    assert text == "### User:\nWhy?\n\n### Assistant:\nSo.<|endoftext|>\n\n"


def test_metrics_hold_exactly_the_promised_fields(finished):
    output, result, events = finished
    lines = metrics(output, without=())
    steps = [line for line in lines if "loss" in line]
    evaluations = [line for line in lines if "eval_loss" in line]
    assert [line["step"] for line in steps] == list(range(1, result.steps + 1))
    for line in steps:
        assert set(line) == {
            "step", "loss", "learning_rate", "grad_norm", "tokens", "step_seconds", "tokens_per_second",
            "peak_vram_bytes",
        }  # fmt: skip
        assert line["peak_vram_bytes"] is None or torch.cuda.is_available()
    assert [set(line) for line in evaluations] == [{"step", "eval_loss", "perplexity"}] * 2  # one an epoch
    assert steps[-1]["loss"] < 0.7 * steps[0]["loss"]
    assert sum(line["tokens"] for line in steps) == result.tokens
    reported = [e for e in events if isinstance(e, StepLogged)]
    assert [e.loss for e in reported] == [line["loss"] for line in steps]
    started = next(e for e in events if isinstance(e, RunStarted))
    assert (started.first_step, started.total_steps) == (1, result.steps)
    assert started.trainable_parameters == result.trainable_parameters


def test_peft_loads_the_adapter_and_transformers_the_tokenizer(finished, tiny_model):
    output, _, _ = finished
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model("llama")), output)
    assert any(p.abs().sum() > 0 for n, p in model.named_parameters() if "lora_B" in n)
    ids = AutoTokenizer.from_pretrained(output)("What is 1 + 2?").input_ids
    assert ids == AutoTokenizer.from_pretrained(tiny_model("llama"))("What is 1 + 2?").input_ids


def test_every_checkpoint_is_an_adapter_too_and_the_last_is_the_final_one(finished, tiny_model):
    output, _, _ = finished
    last = list_checkpoints(output / CHECKPOINTS)[-1]
    base, _ = load_base(
        resolve_model(str(tiny_model("llama"))),
        QuantizationSettings(base_cache=False),
        compute_dtype=torch.float32,
        device=torch.device("cpu"),
    )
    PeftModel.from_pretrained(base, last)
    assert weights(last) == weights(output)


def test_the_record_says_what_generation_and_merging_need(finished, tiny_model):
    output, result, _ = finished
    record = artifacts.find_run_record(output)
    assert record["base"]["model"] == str(tiny_model("llama")) and len(record["base"]["weights_sha256"]) == 64
    assert record["formatting"]["format"] == "prompt"
    assert record["training"]["final_loss"] == result.final_loss
    assert record["versions"]["torch"] and Path(record["data"]["prepared"]).is_dir()


def test_the_card_has_metadata_and_no_local_path(finished, tiny_model, data, tmp_path_factory):
    output, _, _ = finished
    text = (output / MODEL_CARD).read_text()
    card = ModelCard(text)
    assert card.data.library_name == "peft" and {"lora", "qlora"} <= set(card.data.tags)
    assert card.data.base_model is None
    for private in (str(tiny_model("llama")), str(data), str(output), os.environ["QLORA_CACHE"], data.name):
        assert private not in text


def test_the_card_names_a_base_and_data_of_the_hub(tiny_model):
    from qlora_cli.core.runs.model_card import write_card

    held = {"quant_type": "nf4", "double_quant": True, "compute_dtype": "bfloat16"}
    text = write_card(
        base="org/model",
        dataset="org/rows",
        settings={"rank": 8},
        results={"steps": 3},
        held=held,
        example="~~~ Q: a",
        merging=[],
    )
    data = ModelCard(text).data
    assert (data.base_model, data.datasets, data.library_name) == ("org/model", ["org/rows"], "peft")
    assert "base_model:adapter:org/model" in data.tags and "| rank | 8 |" in text


def test_after_a_run_on_a_base_that_no_merge_takes_only_what_works_is_said(options, monkeypatch, capsys):
    refused = RefusedMerge("It is rearranged as it loads.", original=True)
    monkeypatch.setattr(decisions, "foresee_refusal", lambda files, lora: refused)
    few = {"max_steps": 1, "eval_rows": None, "eval_every": None, "save_every": 1}
    run(options, **few)
    output = Path(options["output"])
    for place in (output, checkpoint_path(output / CHECKPOINTS, 1)):
        answer, merge = artifacts.ways_to_use(place)
        assert answer.startswith("qlora generate") and merge.endswith("--base original")
    assert main(["inspect", str(output)]) == 0
    told = " ".join("".join(capsys.readouterr()).split())
    assert "A merge of it will be refused: It is rearranged as it loads." in told and "--base original" in told
    assert "qlora merge --adapter . --output merged --base original" in (output / MODEL_CARD).read_text()
    refused = replace(refused, original=False)
    run(options, **few, overwrite=True)
    assert len(artifacts.ways_to_use(output)) == 1 and "qlora merge" not in (output / MODEL_CARD).read_text()


def test_what_is_left_open_is_settled_by_base_and_rows_and_recorded(options, tmp_path, monkeypatch):
    """The rate by the base's size; of a thousand rows 2 % are held out, on which the cost of 4 bits is told at the end."""
    monkeypatch.setattr("qlora_cli.commands.train.measure_held_out", measure_held_out)
    rows = tmp_path / "many.jsonl"
    rows.write_text("".join(json.dumps({"question": f"{n}?", "answer": f"{n}."}) + "\n" for n in range(1000)))
    left_open = {name: value for name, value in options.items() if name not in ("eval_rows", "learning_rate")}
    events: list = []
    settings = {**left_open, "data": str(rows), "max_steps": None, "epochs": 0.02, "eval_every": None}
    settings["keep_best"] = True  # what is held out by default is enough for it
    result = train(TrainConfig(**settings), events.append)
    said = " ".join(event.text for event in events if isinstance(event, Notice))
    assert "20 of the 1,000 rows are held out" in said and "in all teach little" in said
    recorded = read_config_file(Path(options["output"]) / RUN_YAML, TrainConfig)
    assert recorded["learning_rate"] == 2e-4 and recorded["eval_rows"] == 20
    gap = json.loads((Path(options["output"]) / RUN_RECORD).read_text())["training"]["gap"]
    assert gap == result.gap and gap["tokens"] > 20 and result.eval_loss is not None
    assert {gap["four_bits"], gap["adapter"]} != {gap["sixteen_bits"]}


def test_one_long_document_is_trained_on_whole_unless_some_of_it_is_asked_for(options, tmp_path):
    document = tmp_path / "document.jsonl"
    document.write_text(json.dumps({"text": "one and two make three. " * 1500}))
    left_open = {name: value for name, value in options.items() if name not in ("eval_rows", "eval_every")}
    settings = {**left_open, "data": str(document), "max_length": 16, "overlong": "split", "dry_run": True}
    events: list = []
    plan = train(TrainConfig(**settings), events.append).to_dict()
    assert plan["rows"] > 1000 and plan["held_out_rows"] == 0
    assert any("they are of 1 document, each of which" in event.text for event in events if isinstance(event, Notice))


def test_the_cards_snippet_runs_to_the_answer_that_generate_gives(finished, capsys):
    output = finished[0]
    card = (output / MODEL_CARD).read_text()
    assert "### Question:\nYour question\n\n### Answer:" in card
    (snippet,) = re.findall("```python\n(.*?)```", card, re.DOTALL)
    capsys.readouterr()
    exec(snippet.replace("path/to/this/adapter", str(output)), {})
    settings = GenerateConfig(
        adapter=str(output), temperature=0, repetition_penalty=1.0, max_new_tokens=100, engine="plain", base_cache=False
    )
    (answer,) = generate(settings, ["Your question"], [].append).answers
    printed = capsys.readouterr().out.strip()
    assert printed and printed == answer["answer"].strip()


def test_run_yaml_repeats_the_run_bit_for_bit(straight, tmp_path):
    again = TrainConfig(**{**read_config_file(straight / RUN_YAML, TrainConfig), "output": str(tmp_path / "again")})
    train(again, [].append)
    assert weights(straight) == weights(tmp_path / "again") and metrics(straight) == metrics(tmp_path / "again")


def test_prepared_rows_train_as_the_same_data_does(straight, options, tmp_path):
    prepare(PrepareConfig(model=options["model"], data=options["data"], output=str(tmp_path / "p")), [].append)
    run(options, data=None, prepared=str(tmp_path / "p"))
    assert weights(straight) == weights(Path(options["output"]))


def test_training_and_saving_make_no_network_call(options, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)

    def refuse(*arguments, **keywords):
        raise AssertionError(f"network call to {arguments}")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    run(options)


@pytest.mark.parametrize("engine", most_slow(["fast", "plain"], ["plain"]))
def test_packing_and_every_engine_train(options, engine):
    events: list = []
    result = run(options, events, engine=engine, packing=True, max_length=64, max_steps=3)
    assert result.steps == 3
    assert next(e for e in events if isinstance(e, RunStarted)).engine.startswith(engine)


def test_a_tracker_gets_the_numbers_and_no_path_and_writes_nothing_to_stdout(options, monkeypatch, capfd):
    tensorboard = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    started = accelerate.tracking.TensorBoardTracker.start

    def start(self):
        started(self)
        print("View the run at https://localhost")
        os.write(1, b"written by a process of its own")

    monkeypatch.setattr("accelerate.tracking.TensorBoardTracker.start", start)
    run(options, report_to="tensorboard")
    written = capfd.readouterr()
    assert written.out == "" and "View the run" in written.err and "process of its own" in written.err
    logs = Path(options["output"]) / artifacts.TRACKER_LOGS
    found = tensorboard.EventAccumulator(str(logs / "qlora"))
    found.Reload()
    assert [s.step for s in found.Scalars("loss")] == list(range(1, 10))
    assert [s.step for s in found.Scalars("eval_loss")] == [4, 8, 9]
    for path in logs.rglob("*"):
        assert path.is_dir() or options["model"].encode() not in path.read_bytes()


def test_sample_prompts_are_answered_before_during_and_after_and_change_nothing(straight, options):
    asked = {"sample_prompt": ("What is 1 + 2?", "What is 5 + 7?"), "sample_every": 6}
    events: list = []
    run(options, events, **asked, engine="fast")
    output = Path(options["output"])
    assert weights(output) == weights(straight)
    samples = [event for event in events if isinstance(event, SampleAnswered)]
    assert [(event.step, event.prompt) for event in samples] == [
        (step, prompt) for step in (0, 6, 9) for prompt in asked["sample_prompt"]
    ]
    settings = GenerateConfig(
        adapter=str(output), temperature=0, repetition_penalty=1.0, max_new_tokens=64, engine="plain", base_cache=False
    )
    answers = generate(settings, asked["sample_prompt"], [].append).answers
    assert [event.answer for event in samples[-2:]] == [answer["answer"] for answer in answers]
    assert [line for line in metrics(output) if "eval_loss" in line or "loss" in line] == metrics(straight)
    page = (output / artifacts.REPORT_PAGE).read_text()
    assert "<h2>Samples</h2>" in page and "What is 5 + 7?" in page and "<th>before</th>" in page
    asked["sample_prompt"] = asked["sample_prompt"][:1]
    with pytest.raises(Interrupted):
        train(TrainConfig(**options | asked | {"overwrite": True}), stopping_at(5, []))
    run(options, resume=True, **asked)
    steps = [line["step"] for line in metrics(output) if "answer" in line]
    assert steps == [0, 6, 9]


# ---------------------------------------------------------------- going on


@pytest.mark.parametrize(
    "changes",
    most_slow(
        [{}, {"matmul": "fp8"}, {"engine": "plain", "packing": True, "max_length": 48, "optimizer": "lion_8bit"}], [{}]
    ),
)
def test_an_interrupted_run_goes_on_bit_for_bit(options, tmp_path, changes):
    options |= changes
    run(options, output=str(tmp_path / "straight"), keep_best=True)
    events: list = []
    with pytest.raises(Interrupted) as caught:
        train(TrainConfig(**options, keep_best=True), stopping_at(5, events))
    assert caught.value.exit_code == 143
    output = Path(options["output"])
    assert not (output / ADAPTER_WEIGHTS).exists()
    with (output / METRICS).open("a") as stream:
        stream.write('{"step": 6, "loss": 1.0}\n{"step": 7, "lo')  # told after the checkpoint, and cut short
    events.clear()
    run(options, events, resume=True, keep_best=True)
    assert next(e for e in events if isinstance(e, RunStarted)).first_step == 6
    recorded = json.loads((output / RUN_RECORD).read_text()).get("matmul", {})
    assert recorded.get("matmul") == changes.get("matmul")
    assert metrics(output) == metrics(tmp_path / "straight")
    assert weights(output) == weights(tmp_path / "straight")


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", ["paged_adamw_8bit", "adamw"])
def test_on_a_gpu_a_resumed_run_is_the_same_run_within_the_noise_of_two_equal_ones(options, tmp_path, optimizer):
    options |= {"optimizer": optimizer, "max_steps": 30, "packing": True, "save_every": 5}
    for name in ("straight", "again"):
        run(options, output=str(tmp_path / name))
    with pytest.raises(Interrupted):
        train(TrainConfig(**options), stopping_at(17, []))
    run(options, resume=True)
    straight, again, resumed = (
        torch.cat([t.flatten() for t in load_file(Path(directory) / ADAPTER_WEIGHTS).values()])
        for directory in (tmp_path / "straight", tmp_path / "again", options["output"])
    )
    noise, difference = (straight - again).abs().max().item(), (straight - resumed).abs().max().item()
    print(f"{optimizer}: two equal runs differ by at most {noise:.2e}, a resumed one by {difference:.2e}")
    assert difference <= 2 * noise


@pytest.mark.slow
def test_resuming_a_finished_run_writes_the_same_adapter_again(options):
    run(options)
    before = weights(Path(options["output"]))
    (Path(options["output"]) / ADAPTER_WEIGHTS).unlink()
    result = run(options, resume=True)
    assert weights(Path(options["output"])) == before and result.steps == 9 and result.final_loss is not None


def test_resuming_a_finished_run_changes_nothing(options, monkeypatch):
    pytest.importorskip("tensorboard")
    first = run(options)
    output = Path(options["output"])

    def standing() -> dict:
        files = [path for path in output.rglob("*") if path.is_file() and path.name != artifacts.LOCK]
        return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}

    before, events = standing(), []
    monkeypatch.setattr("qlora_cli.commands.train.load_base", lambda *_, **__: pytest.fail("the base was loaded"))
    again = run(options, events, resume=True, report_to="tensorboard")
    assert again == first and [e for e in events if isinstance(e, Notice)][-1].text.endswith("nothing is left to do.")
    with pytest.raises(CheckpointError, match="learning_rate"):
        run(options, resume=True, learning_rate=1e-3)
    shutil.rmtree(output / CHECKPOINTS)
    assert run(options, resume=True) == first
    with pytest.raises(CheckpointError, match="no checkpoint to go on from"):
        run(options, resume=True, max_steps=11)
    assert standing() == {path: facts for path, facts in before.items() if CHECKPOINTS not in path.parts}


def test_resume_without_a_checkpoint_starts_at_step_1_and_says_so(options):
    events: list = []
    run(options, events, resume=True, max_steps=1)
    assert any("starts at step 1" in e.text for e in events if isinstance(e, Notice))


@pytest.fixture(scope="module")
def stopped(tiny_model, data, tmp_path_factory):
    """A run that was stopped after step 5."""
    options = short_run(tiny_model, data, tmp_path_factory.mktemp("stopped"))
    with pytest.raises(Interrupted):
        train(TrainConfig(**options), stopping_at(5, []))
    return options["output"]


@pytest.fixture
def interrupted(options, stopped):
    """Settings of a run that was stopped after step 5, and is this test's own."""
    shutil.copytree(stopped, options["output"])
    return options


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rank": 8}, "settings.rank: 4 → 8"),
        ({"quant_type": "fp4"}, "base.quant_type: 'nf4' → 'fp4'"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ({"learning_rate": 1e-3}, "settings.learning_rate: 0.005 → 0.001"),
                ({"max_steps": 12}, "settings.total_steps: 9 → 12"),
                ({"optimizer": "sgd"}, "settings.optimizer: 'adamw' → 'sgd'"),
                ({"seed": 1}, "settings.seed: 42 → 1"),
                ({"matmul": "fp8"}, "settings.matmul: 'auto' → 'fp8'"),
                ({"train_on": "all"}, "data: "),
                ({"gradient_accumulation_steps": 3}, "settings.batches_per_step: 2 → 3"),
            )
        ),
    ],
)  # fmt: skip
def test_another_setting_is_refused_and_named(interrupted, changes, named):
    with pytest.raises(CheckpointError) as caught:
        run(interrupted, resume=True, **changes)
    assert named in caught.value.message and "--allow-changes" in caught.value.hint


def test_another_base_is_refused_and_named(interrupted, tiny_model):
    with pytest.raises(CheckpointError, match=r"base\.weights_sha256"):
        run(interrupted, resume=True, model=str(tiny_model("llama", seed=5)))


def test_a_base_that_was_edited_between_the_sampled_bytes_is_refused_and_named(interrupted, tmp_path):
    edited = shutil.copytree(interrupted["model"], tmp_path / "edited")
    (weights_file,) = edited.glob("*.safetensors")
    content = bytearray(weights_file.read_bytes())
    descriptor, header = read_header(weights_file)
    os.close(descriptor)
    entry = max(header.entries.values(), key=lambda entry: entry.total_bytes)
    assert entry.total_bytes > 4 * 4096
    place = entry.start + entry.total_bytes // 2 - 64  # between the first 4 KiB and those from the middle on
    content[place : place + 64] = bytes(64)
    weights_file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"base\.content_sha256") as caught:
        run(interrupted, resume=True, model=str(edited))
    assert "weights_sha256" not in caught.value.message


def test_the_same_base_and_data_elsewhere_are_the_same_run(interrupted, tmp_path):
    shutil.copytree(interrupted["model"], tmp_path / "moved")
    shutil.copy(interrupted["data"], tmp_path / "moved.jsonl")
    result = run(interrupted, resume=True, model=str(tmp_path / "moved"), data=str(tmp_path / "moved.jsonl"), keep=5)
    assert result.steps == 9


def test_allowed_changes_are_said_and_an_optimizer_that_does_not_fit_starts_fresh(interrupted):
    events: list = []
    result = run(
        interrupted, events, resume=True, allow_changes=True, optimizer="lion", learning_rate=1e-3, max_steps=11
    )
    cautions = " ".join(e.text for e in events if isinstance(e, Caution))
    assert "settings.learning_rate: 0.005 → 0.001" in cautions and "optimizer starts without its state" in cautions
    assert "The learning rate was 0.00346 in step 5 and is 0.000655 in the next." in cautions
    assert result.steps == 11


@pytest.mark.slow  # tests/faults/test_damage.py has one
def test_where_no_step_is_left_nothing_is_said_of_the_next_one_s_rate(interrupted):
    events: list = []
    assert run(interrupted, events, resume=True, allow_changes=True, max_steps=4).steps == 5
    assert not [e for e in events if isinstance(e, Caution) and "learning rate" in e.text]


def test_damaged_checkpoints_are_named_and_the_older_used(interrupted):
    root = Path(interrupted["output"]) / CHECKPOINTS
    assert [path.name for path in list_checkpoints(root)] == ["step-00000004", "step-00000005"]
    (checkpoint_path(root, 5) / "optimizer.safetensors").unlink()
    events: list = []
    run(interrupted, events, resume=True)
    cautions = [e.text for e in events if isinstance(e, Caution)]
    assert any("step-00000005" in text and "optimizer.safetensors is missing" in text for text in cautions)
    assert next(e for e in events if isinstance(e, RunStarted)).first_step == 5


def test_with_no_checkpoint_that_verifies_nothing_starts_over_by_itself(interrupted):
    root = Path(interrupted["output"]) / CHECKPOINTS
    for path in list_checkpoints(root):
        (path / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match="None of the 2 checkpoints") as caught:
        run(interrupted, resume=True)
    assert "--overwrite" in caught.value.hint


# ---------------------------------------------------------------- the best adapter


# Too high a rate: the held-out loss falls for two steps and rises again.
WORSENING = {
    "init": "default",
    "target_modules": None,
    "learning_rate": 2e-2,
    "scheduler": "constant",
    "max_steps": 3,
    "eval_every": 1,
    "keep_best": True,
}


def test_keep_best_keeps_the_adapter_of_the_lowest_evaluation_loss(options, monkeypatch):
    monkeypatch.setattr("qlora_cli.commands.train.measure_held_out", measure_held_out)
    events: list = []
    result = run(options, events, **WORSENING, save_every=100)
    output = Path(options["output"])
    losses = {e.step: e.eval_loss for e in events if isinstance(e, EvaluationLogged)}
    assert result.best_step == min(losses, key=losses.get) != 3, "the case needs a run that gets worse"
    assert weights(output) == weights(checkpoint_path(output / CHECKPOINTS, result.best_step))
    assert weights(output) != weights(checkpoint_path(output / CHECKPOINTS, 3))
    assert result.eval_loss == losses[result.best_step], "the figures are of the adapter that is kept"
    assert result.gap["adapter"] == pytest.approx(result.eval_loss, abs=1e-4)


def test_with_keep_best_the_last_samples_are_of_the_adapter_that_is_kept(options):
    events: list = []
    result = run(options, events, **WORSENING, sample_prompt=("What is 1 + 2?",))
    samples = [event for event in events if isinstance(event, SampleAnswered)]
    assert [event.step for event in samples] == [0, result.best_step] and result.best_step < result.steps
    settings = GenerateConfig(
        adapter=options["output"],
        temperature=0,
        repetition_penalty=1.0,
        max_new_tokens=64,
        engine="plain",
        base_cache=False,
    )
    assert samples[-1].answer == generate(settings, ("What is 1 + 2?",), [].append).answers[0]["answer"]
    assert [line["answer"] for line in metrics(Path(options["output"])) if "answer" in line][-1] == samples[-1].answer


def test_a_run_that_stopped_early_goes_on_with_more_patience_and_not_without(options):
    changes = WORSENING | {"max_steps": 6, "patience": 1}
    first = run(options, **changes)
    assert first.stopped_early and first.steps < 6
    assert run(options, **changes, resume=True) == first
    with pytest.raises(CheckpointError, match="stopped early, after 1 evaluation without") as caught:
        run(options, **changes | {"max_steps": 8}, resume=True, allow_changes=True)
    assert "--patience 2" in caught.value.hint
    again = run(options, **changes | {"patience": 9}, resume=True, allow_changes=True)
    assert again.steps == 6 and not again.stopped_early


def test_patience_that_ends_with_the_last_step_is_no_early_stop(options):
    assert not run(options, **WORSENING | {"patience": 1}).stopped_early


def test_losses_of_other_rows_held_out_are_compared_with_none_of_before(options):
    assert run(options, **WORSENING).best_step < 3
    events: list = []
    result = run(options, events, **WORSENING | {"max_steps": 4, "eval_rows": 12}, resume=True, allow_changes=True)
    assert result.best_step == 4
    assert any("lowest loss starts anew" in e.text for e in events if isinstance(e, Caution))


def test_a_damaged_best_checkpoint_is_said_and_the_last_adapter_kept(options):
    output = Path(options["output"])
    events: list = []

    def damage(event):
        events.append(event)
        if isinstance(event, CheckpointSaved) and event.step == 3:
            for path in list_checkpoints(output / CHECKPOINTS)[:-1]:
                (path / ADAPTER_WEIGHTS).write_bytes(b"")

    train(TrainConfig(**{**options, **WORSENING}), damage)
    assert any("is lost" in e.text and ADAPTER_WEIGHTS in e.text for e in events if isinstance(e, Caution))
    assert weights(output) == weights(checkpoint_path(output / CHECKPOINTS, 3))


# ---------------------------------------------------------------- what is refused, and leaves nothing


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"model": None}, UsageError, "--model"),
        ({"model": "/no/such/model"}, ModelError, "/no/such/model"),
        ({"data": "/no/such/rows.jsonl"}, QloraError, "/no/such/rows.jsonl"),
        ({"data": None}, UsageError, "--prepared"),
        ({"prepared": "also"}, UsageError, "--prepared"),
        ({"prepared": "/no/such", "data": None}, RunError, "/no/such"),
        ({"prompt_column": "nowhere"}, QloraError, "nowhere"),
        ({"target_modules": ("q_proj", "v_porj")}, AdapterError, "v_porj"),
        ({"rank": 0}, UsageError, "--rank"),
        ({"batch_size": 0}, UsageError, "--batch-size"),
        ({"max_steps": 0}, UsageError, "--max-steps"),
        ({"save_every": 0}, UsageError, "--save-every"),
        ({"learning_rate": -1.0}, UsageError, "--learning-rate"),
        ({"eval_fraction": 1.0, "eval_rows": None}, UsageError, "--eval-fraction"),
        ({"eval_rows": 48}, DataError, "48"),
        ({"eval_rows": None, "patience": 2, "eval_every": None}, UsageError, "--patience"),
        ({"gpus": 2}, UsageError, "torchrun"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_said_before_the_base_is_loaded_and_leaves_nothing(
    options, changes, error, text, monkeypatch
):
    monkeypatch.setattr("qlora_cli.commands.train.load_base", lambda *_, **__: pytest.fail("the base was loaded"))
    with pytest.raises(error) as caught:
        run(options, **changes)
    assert text in f"{caught.value.message} {caught.value.hint}"
    assert not Path(options["output"]).exists()


def test_empty_data_is_refused_and_leaves_nothing(options, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError):
        run(options, data=str(tmp_path / "empty.jsonl"))
    assert not Path(options["output"]).exists()


def test_rows_of_another_tokenizer_are_refused(options, tmp_path):
    prepare(PrepareConfig(model=options["model"], data=options["data"], output=str(tmp_path / "p")), [].append)
    shutil.copytree(options["model"], tmp_path / "other")
    tokenizer = json.loads((tmp_path / "other" / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:-5]
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(DataError, match="another tokenizer") as caught:
        run(options, data=None, prepared=str(tmp_path / "p"), model=str(tmp_path / "other"))
    assert "qlora prepare" in caught.value.hint


@pytest.mark.parametrize("packing", [False, True])
def test_prepared_rows_longer_than_max_length_are_refused(options, tmp_path, packing):
    rows = prepare(PrepareConfig(model=options["model"], data=options["data"], output=str(tmp_path / "p")), [].append)
    with pytest.raises(DataError, match="rows that are prepared are not cut") as caught:
        run(options, data=None, prepared=str(tmp_path / "p"), max_length=8, packing=packing)
    assert "--max-length 8" in caught.value.hint and rows.directory in caught.value.hint
    assert not Path(options["output"]).exists()


def test_a_tracker_that_is_not_installed_is_said_with_what_to_type(options, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="--report-to wandb") as caught:
        run(options, report_to="wandb")
    assert "pip install wandb" in caught.value.hint


@pytest.mark.parametrize("fails_in", ["start", "store_init_configuration"])
def test_a_tracker_that_cannot_start_is_said_before_anything_is_read(options, monkeypatch, fails_in):
    pytest.importorskip("tensorboard")

    def refuse(self, *arguments):
        raise RuntimeError("api_key not configured\nmore lines")

    monkeypatch.setattr(f"accelerate.tracking.TensorBoardTracker.{fails_in}", refuse)
    monkeypatch.setattr("qlora_cli.commands.train.read_inputs", lambda *_, **__: pytest.fail("something was read"))
    with pytest.raises(UsageError, match="tensorboard cannot start: api_key not configured") as caught:
        run(options, report_to="tensorboard")
    assert "\n" not in caught.value.message and "--report-to" in caught.value.hint
    assert not Path(options["output"]).exists()


@pytest.mark.parametrize("asked", [True, None, False])
def test_layers_that_are_not_compiled_as_was_asked_are_told(options, asked):
    """As of a model of which a token has several hidden states, on a card."""
    said: list = []
    run = SimpleNamespace(config=TrainConfig(**options, compile=asked), device=torch.device("cuda"), report=said.append)
    engines = [SimpleNamespace(compiled=compiled, describe=lambda: "fast") for compiled in (True, False)]
    for engine in engines:
        decisions.report_uncompiled(run, SimpleNamespace(lockstep=""), engine)
    assert [event.text.partition(":")[0] for event in said] == ["--compile does nothing"] * bool(asked)


def test_a_dry_run_starts_no_tracker(options):
    pytest.importorskip("tensorboard")
    run(options, report_to="tensorboard", dry_run=True)
    assert not Path(options["output"]).exists()


def test_too_little_space_is_said_before_the_base_is_loaded(options, monkeypatch):
    monkeypatch.setattr("qlora_cli.commands.train.load_base", lambda *_, **__: pytest.fail("the base was loaded"))
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    with pytest.raises(DiskFull, match="are needed") as caught:
        run(options)
    assert caught.value.exit_code == 74 and not Path(options["output"]).exists()


def test_a_directory_that_holds_a_run_is_left_alone(interrupted):
    before = {path: path.read_bytes() for path in Path(interrupted["output"]).rglob("*") if path.is_file()}
    with pytest.raises(RunError, match="holds a run already, saved at step 5") as caught:
        run(interrupted)
    assert "--resume" in caught.value.hint and "--overwrite" in caught.value.hint
    assert {p: p.read_bytes() for p in Path(interrupted["output"]).rglob("*") if p.is_file()} == before


def test_overwrite_removes_the_run_and_nothing_else(interrupted):
    output = Path(interrupted["output"])
    (output / "notes.txt").write_text("mine")
    run(interrupted, overwrite=True, max_steps=3, seed=7)
    assert (output / "notes.txt").read_text() == "mine"
    assert [path.name for path in list_checkpoints(output / CHECKPOINTS)] == ["step-00000002", "step-00000003"]
    assert [line["step"] for line in metrics(output) if "loss" in line] == [1, 2, 3]


def test_a_directory_with_other_files_is_refused_even_with_overwrite(options):
    output = Path(options["output"])
    output.mkdir()
    (output / "README.md").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(RunError, match="holds other files"):
            run(options, overwrite=overwrite)
    assert (output / "README.md").read_text() == "mine"


def test_an_output_that_cannot_be_written_is_said(options, tmp_path):
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(RunError, match="cannot be written"):
            run(options, output=str(output))


def test_a_lock_keeps_a_second_run_out_and_falls_with_its_process(options, tmp_path):
    output = Path(options["output"])
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom qlora_cli.core.runs.directory import claimed\n"
        "with claimed(Path(sys.argv[1]), resume=False, overwrite=False):\n    print('held', flush=True)\n"
        "    time.sleep(1200)\n"
    )
    holder = subprocess.Popen([sys.executable, "-c", script, str(output)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunError, match=rf"Another process \({holder.pid}\) is writing to"):
            run(options)
    finally:
        holder.kill()
        holder.wait()
    with claimed(output, resume=False, overwrite=False):
        pass


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(options, monkeypatch):
    monkeypatch.setattr("qlora_cli.commands.train.load_base", lambda *_, **__: pytest.fail("the base was loaded"))
    plan = run(options, dry_run=True, target_modules=None, max_steps=None, epochs=2.0).to_dict()
    assert (plan["rows"], plan["held_out_rows"], plan["total_steps"], plan["first_step"]) == (42, 6, 22, 1)
    assert plan["trainable_parameters"] > 0 and plan["settings"]["optimizer"] in ("adamw", "paged_adamw_8bit")
    assert plan["memory"]["peak_bytes"] > plan["memory"]["base_bytes"] > 0
    assert plan["configuration"]["rank"] == 4 and plan["configuration"]["gradient_checkpointing"] == "off"
    assert json.loads(json.dumps(plan)) == {**plan}
    assert not Path(options["output"]).exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, ()),
        ({"eval_every": 10}, ("--eval-every 10 is more than the run's 9 steps",)),
        ({"keep_best": True, "patience": 1}, ()),
        (
            {"keep_best": True, "eval_every": 9},
            ("--keep-best does nothing: it takes 1 evaluation before", "--eval-every 8"),
        ),
        (
            {"patience": 2},
            ("--patience does nothing: it takes 3 evaluations", "the run has 2. --eval-every 2 makes more"),
        ),
        ({"patience": 8, "eval_every": 1}, ("--patience does nothing: it takes 9 evaluations",)),
        ({"sample_prompt": ("Why?",), "sample_every": 10}, ("--sample-every 10 is more than the run's 9 steps",)),
        ({"warmup_steps": 9}, ("The warm-up takes all of the run's 9 steps",)),
        ({"warmup_ratio": 1.0}, ("The warm-up takes all of the run's 9 steps",)),
        ({"learning_rate": 0.3}, ("--learning-rate 0.3 is far from the 0.0002",)),
    ],
)
def test_what_a_run_s_steps_do_not_come_to_is_said_before_it_begins(options, changes, said):
    events: list = []
    run(options, events, **changes, dry_run=True)
    cautions = [e.text for e in events if isinstance(e, Caution)]
    assert len(cautions) == bool(said) and all(each in cautions[0] for each in said)


def test_a_dry_run_needs_no_weights_and_says_whether_a_card_suffices(options, tmp_path, capsys):
    bare = tmp_path / "bare"
    shutil.copytree(options["model"], bare, ignore=shutil.ignore_patterns("*.safetensors"))
    plan = run(options, model=str(bare), dry_run=True, vram="40GiB").to_dict()
    assert plan["fits"] is True and plan["device"] == "cuda" and "next" not in plan
    assert plan["memory"]["device_bytes"] <= plan["vram_bytes"] == 40 * 2**30
    assert plan["configuration"]["compute_dtype"] == "bfloat16"
    with pytest.raises(ModelError):  # it is the weights that are missing
        run(options, model=str(bare))

    words = ["train", "--model", str(bare), "--data", options["data"], "--output", options["output"], "--dry-run"]
    assert main([*words, "--vram", "10MiB", "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["fits"] is False
    assert main([*words, "--vram", "20GiB"]) == 0
    said = capsys.readouterr().out
    assert "bare would train 3 steps" in said and "It cannot be trained as it is: " in said


def test_micro_batches_stay_within_the_planned_tokens_and_resume_keeps_them(options, monkeypatch):
    planned = decisions.plan_run_memory

    def short_of_memory(*arguments, **settings):
        memory = planned(*arguments, **settings)
        return replace(memory, plan=replace(memory.plan, token_budget=70))

    seen: list[int] = []
    forward = FastEngine.loss
    monkeypatch.setattr(FastEngine, "loss", lambda self, batch: seen.append(batch.tokens) or forward(self, batch))
    settings = {"max_steps": 2, "save_every": 1, "eval_rows": None, "eval_every": None, "dropout": 0.0}
    run(options, **settings)
    whole, largest = metrics(Path(options["output"])), max(seen)
    monkeypatch.setattr(decisions, "plan_run_memory", short_of_memory)
    seen.clear()
    events: list = []
    with pytest.raises(Interrupted):
        train(TrainConfig(**{**options, **settings}, overwrite=True), stopping_at(1, events))
    monkeypatch.setattr(decisions, "plan_run_memory", planned)  # as where another program has ended since
    run(options, **settings, resume=True)
    assert max(seen) <= 70 < largest
    split = metrics(Path(options["output"]))
    assert [line["tokens"] for line in split] == [line["tokens"] for line in whole]
    assert [line["loss"] for line in split] == pytest.approx([line["loss"] for line in whole], rel=1e-4)


def test_a_run_on_the_cpu_is_not_refused_for_a_gpu_s_memory(options):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    events: list = []
    assert run(options, events, max_steps=1, vram="1MiB").steps == 1
    assert any(isinstance(event, Notice) and "--vram" in event.text for event in events)


def test_run_yaml_names_no_flag_of_one_invocation_only(options):
    run(options, max_steps=1)
    content = yaml.safe_load((Path(options["output"]) / RUN_YAML).read_text())
    assert not {"resume", "overwrite", "allow_changes", "dry_run"} & content.keys()
    assert json.loads((Path(options["output"]) / RUN_RECORD).read_text())["format"] == artifacts.FORMAT
