"""Each setting of `train` changed in turn between a run and its continuation: refused by name, or shown not to matter."""

import json
import os
import resource
import shutil
import signal
from dataclasses import MISSING, fields
from pathlib import Path

import pytest

from qlora_cli.artifacts import ADAPTER_WEIGHTS, CHECKPOINTS, METRICS, RUN_YAML
from qlora_cli.commands import train as train_command
from qlora_cli.commands.prepare import prepare
from qlora_cli.commands.train import train
from qlora_cli.config import PrepareConfig, TrainConfig
from qlora_cli.core.device import list_versions
from qlora_cli.core.runs import identity
from qlora_cli.core.storage.checkpoint import MANIFEST, list_checkpoints, manifest_digest
from qlora_cli.errors import CheckpointError, Interrupted, QloraError
from qlora_cli.events import Notice, StepLogged
from qlora_cli.settings.setting import CALL, FREE, RESOLVED, RESUME, ROUNDING, SAME, type_of
from tests.conftest import most_slow

pytestmark = pytest.mark.usefixtures("short_runs")

CLOCK = ("step_seconds", "tokens_per_second", "peak_vram_bytes")
CLASSES = {option.name: option.metadata["resume"] for option in fields(TrainConfig)}
COMPARED = sorted(name for name, kind in CLASSES.items() if kind not in (CALL, None))
SOME_OF_EACH = {name for kind in RESUME for name in [other for other in COMPARED if CLASSES[other] == kind][::20]}


def test_every_setting_says_what_it_means_for_a_run_that_goes_on():
    assert {name for name, kind in CLASSES.items() if kind not in RESUME} == set(), "give each `setting(...)` a resume="


@pytest.fixture(scope="module")
def place(tiny_model, tmp_path_factory) -> Path:
    """Rows, and a run that was stopped after its second step of four beside one that was not."""
    place = tmp_path_factory.mktemp("resume")
    for name, sign in (("rows", "+"), ("others", "-")):
        rows = [
            {"question": f"What is {a} {sign} {b}?", "answer": f"It is {a + b}."} for a in range(5) for b in range(5)
        ]
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "chat.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QLORA_CACHE", str(place / "cache"))
        options = settings_of(place, tiny_model)
        prepare(PrepareConfig(model=options["model"], data=options["data"], output=str(place / "prepared")), print)
        train(TrainConfig(**options, output=str(place / "straight")), lambda event: None)
        with pytest.raises(Interrupted):
            train(TrainConfig(**options, output=str(place / "stopped")), stop_after_two)
        yield place


def settings_of(place: Path, tiny_model) -> dict:
    return {
        "model": str(tiny_model("llama")),
        "data": str(place / "rows.jsonl"),
        "max_steps": 4,
        "batch_size": 2,
        "gradient_accumulation_steps": 2,
        "eval_rows": 4,
        "eval_every": 2,
        "rank": 4,
        "learning_rate": 5e-3,
        "packing": True,
    }


def stop_after_two(event) -> None:
    if isinstance(event, StepLogged) and event.step == 2:
        os.kill(os.getpid(), signal.SIGTERM)


def other_value(option, place: Path, tiny_model, given):
    """Another value of a setting than the run had; a text that is no choice has to be named here."""
    texts = {
        "model": str(tiny_model("llama", seed=5)),
        "data": str(place / "others.jsonl"),
        "model_revision": "main",
        "split": "test",
        "revision": "main",
        "text_column": "question",
        "prompt_column": "answer",
        "completion_column": "question",
        "messages_column": "question",
        "template": "{question} Well. {answer}",
        "chat_template": str(place / "chat.jinja"),
        "gradient_checkpointing": "on",
        "vram": "64GiB",
        "prepared": str(place / "prepared"),
        "output": str(place / "elsewhere"),
        "engine": "plain",
        "report_to": None,  # trackers are tried in test_train
        "target_modules": ("q_proj",),
        "modules_to_save": ("embed_tokens",),
        "exclude_modules": ("q_proj",),
        "template_setting": ("name=value",),
        "role": ("bard=assistant",),
        "sample_prompt": ("What is one?",),
        "rank_pattern": ("q_proj=8",),
        "alpha_pattern": ("q_proj=8",),
        "compile": False,  # as by default here; compiling takes a compiler
        "on_bad_row": "skip",
        "gpus": 1,
        "loraplus_lr_ratio": 16.0,
        "max_length": 96,
        "rope_scaling": "linear:2",
    }
    if option.name in texts:
        return texts[option.name]
    kind, _ = type_of(option)
    choices = option.metadata["choices"]
    if choices:
        return next(choice for choice in choices if choice not in (given, option.default))
    assert kind in (bool, int, float), f"give {option.name} another value here"
    if kind is bool:
        return not given
    return (given or 0) + 3 if kind is int else (given / 2 if given else 0.5)


def numbers(output: Path) -> list[dict]:
    """What is measured of a run; answers to --sample-prompt are said, not measured."""
    lines = [json.loads(line) for line in (output / METRICS).read_text().splitlines()]
    lines = [line for line in lines if "answer" not in line]
    return [{name: value for name, value in line.items() if name not in CLOCK} for line in lines]


@pytest.mark.parametrize("name", most_slow(COMPARED, SOME_OF_EACH))
def test_a_setting_that_changes_is_refused_by_name_or_does_not_matter(place, tiny_model, tmp_path, monkeypatch, name):
    monkeypatch.setenv("QLORA_CACHE", str(place / "cache"))
    option = next(option for option in fields(TrainConfig) if option.name == name)
    options = settings_of(place, tiny_model)
    assert option.default is not MISSING
    changed = {**options, "output": str(tmp_path / "out")}
    shutil.copytree(place / "stopped", tmp_path / "out")
    changed[name] = other_value(option, place, tiny_model, options.get(name, option.default))
    if name == "output":
        shutil.move(tmp_path / "out", changed["output"])
    if name == "prepared":
        changed["data"] = None
    if name in ("epochs", "warmup_ratio"):
        changed["max_steps"] = None if name == "epochs" else 4
    events: list = []
    try:
        train(TrainConfig(**changed, resume=True), events.append)
    except CheckpointError as error:
        assert CLASSES[name] in (SAME, RESOLVED), error.message
        assert CLASSES[name] == RESOLVED or f"settings.{name}: " in error.message
        assert "--allow-changes" in error.hint
        return
    except QloraError as error:  # what cannot be at all is refused for itself
        assert CLASSES[name] != FREE, error.message
        return
    assert CLASSES[name] != SAME
    output, straight = Path(changed["output"]), place / "straight"
    if CLASSES[name] == ROUNDING:
        (notice,) = [event for event in events if isinstance(event, Notice) and "another way" in event.text]
        assert f"rounding.{name}: " in notice.text
        for a, b in zip(numbers(output), numbers(straight), strict=True):
            assert a == pytest.approx(b, rel=1e-3)
    else:
        assert CLASSES[name] in (FREE, RESOLVED)
        assert numbers(output) == numbers(straight)
        assert (output / ADAPTER_WEIGHTS).read_bytes() == (straight / ADAPTER_WEIGHTS).read_bytes()


def test_a_checkpoint_of_a_version_that_compared_less_goes_on(place, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_CACHE", str(place / "cache"))
    shutil.copytree(place / "stopped", tmp_path / "out")
    for checkpoint in list_checkpoints(tmp_path / "out" / CHECKPOINTS):
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        identity = manifest["identity"]
        for key in ("batches", "rounding"):
            del identity[key]
        for key in ("max_length", "patience", "eval_every", "keep_best", "rope_scaling"):
            del identity["settings"][key]
        del manifest["sha256"]
        (checkpoint / MANIFEST).write_text(json.dumps({**manifest, "sha256": manifest_digest(manifest)}))
    options = {**settings_of(place, tiny_model), "output": str(tmp_path / "out"), "resume": True}
    with pytest.raises(CheckpointError, match=r"settings\.rank"):
        train(TrainConfig(**{**options, "rank": 8}), lambda event: None)
    with pytest.raises(CheckpointError, match=r"settings\.rope_scaling: None → "):  # there was none then
        train(TrainConfig(**{**options, "rope_scaling": "linear:2"}), lambda event: None)
    train(TrainConfig(**options), lambda event: None)
    assert numbers(tmp_path / "out") == numbers(place / "straight")


def test_a_run_that_goes_on_with_another_version_of_a_library_says_so(place, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_CACHE", str(place / "cache"))
    shutil.copytree(place / "stopped", tmp_path / "out")
    versions = {**list_versions(), "torch": "1.0", "datasets": "1.0"}
    monkeypatch.setattr(identity, "list_versions", lambda: versions)
    events: list = []
    options = {**settings_of(place, tiny_model), "output": str(tmp_path / "out"), "resume": True}
    train(TrainConfig(**options), events.append)
    (said,) = [event.text for event in events if isinstance(event, Notice) and "another way" in event.text]
    assert f"(rounding.torch: {list_versions()['torch']!r} → '1.0')" in said


def test_a_disk_that_is_full_as_a_run_goes_on_leaves_its_settings_whole(place, tiny_model, tmp_path, monkeypatch):
    """They were emptied first, and what went on with them asked for a model."""
    output = shutil.copytree(place / "stopped", tmp_path / "out")
    settings = (output / RUN_YAML).read_bytes()
    options = {**settings_of(place, tiny_model), "output": str(output), "resume": True}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    begin = train_command.begin_run

    def begin_and_fill(*arguments):
        begun = begin(*arguments)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(settings) // 2, limits[1]))
        return begun

    monkeypatch.setattr(train_command, "begin_run", begin_and_fill)
    try:
        with pytest.raises(OSError):
            train(TrainConfig(**options), lambda event: None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert (output / RUN_YAML).read_bytes() == settings
