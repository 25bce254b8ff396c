"""A scaling of positions through all commands: trained, resumed, merged and generated as of a model with it in config.json."""

import json
import os
import signal
from pathlib import Path

import pytest
from transformers import AutoConfig

from qlora_cli.artifacts import ADAPTER_WEIGHTS, RUN_RECORD, RUN_YAML
from qlora_cli.commands.generate import generate
from qlora_cli.commands.inspect import inspect
from qlora_cli.commands.merge import merge
from qlora_cli.commands.train import train
from qlora_cli.config import GenerateConfig, InspectConfig, MergeConfig, TrainConfig
from qlora_cli.config_file import read_config_file
from qlora_cli.core.models.files import resolve_model
from qlora_cli.core.rope_scaling import write_scaling
from qlora_cli.errors import AdapterError, CheckpointError, Interrupted
from qlora_cli.events import StepLogged
from tests.conftest import write_model

pytestmark = pytest.mark.usefixtures("short_runs")

LIMIT = 64  # of the models' positions; rows are up to twice as long


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Long rows; a model, and the same with the scaling in its config.json; a run of each."""
    place = tmp_path_factory.mktemp("rope")
    rows = [{"text": " ".join(f"{a} times {b} is {a * b}." for b in range(a, a + 12))} for a in range(12)]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("model", "by-hand"):
        write_model(place / name, "llama", max_position_embeddings=LIMIT)
    path = place / "by-hand" / "config.json"
    config = json.loads(path.read_text())
    scaled = resolve_model(str(place / "model"), rope_scaling="yarn:2").scaled_positions
    assert scaled is not None
    write_scaling(config, scaled)
    path.write_text(json.dumps(config))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QLORA_CACHE", str(place / "cache"))
        losses_of(settings_of(place, "by-hand"))
        yield place


def settings_of(place: Path, name: str, **changes) -> TrainConfig:
    given = {"data": (str(place / "rows.jsonl"),), "max_steps": 2, "max_length": 2 * LIMIT, "init": "default"}
    given |= {"gradient_accumulation_steps": 2, "rank": 4, "learning_rate": 5e-3, "eval_rows": 0}
    return TrainConfig(model=str(place / name), output=str(place / f"{name}-run"), **(given | changes))


def losses_of(config: TrainConfig, stop: int = 0) -> dict[int, float]:
    losses = {}

    def note(event) -> None:
        if isinstance(event, StepLogged):
            losses[event.step] = event.loss
            if event.step == stop:
                os.kill(os.getpid(), signal.SIGTERM)

    train(config, note)
    return losses


def test_every_command_goes_by_it(place):
    said: list = []
    by_hand = json.loads((place / "by-hand-run" / RUN_RECORD).read_text())
    config = settings_of(place, "model", rope_scaling="yarn:2", save_every=1)
    with pytest.raises(Interrupted):
        losses_of(config, stop=1)
    again = read_config_file(place / "model-run" / RUN_YAML, TrainConfig) | {"resume": True}
    with pytest.raises(CheckpointError, match="rope_scaling"):
        train(TrainConfig(**again | {"rope_scaling": None}), said.append)
    train(TrainConfig(**again), said.append)
    record = json.loads((place / "model-run" / RUN_RECORD).read_text())
    assert "rope_scaling" not in by_hand and record["rope_scaling"]["factor"] == 2
    assert record["training"]["final_loss"] == by_hand["training"]["final_loss"]
    runs = [place / f"{name}-run" for name in ("model", "by-hand")]
    assert len({(run / ADAPTER_WEIGHTS).read_bytes() for run in runs}) == 1
    assert inspect(InspectConfig(adapter=str(runs[0])), said.append)["rope_scaling"] == record["rope_scaling"]

    prompt = "7 times 8 is " * 10  # past the model's own limit
    asked = {"prompts": (prompt,), "max_new_tokens": 8, "temperature": 0.0, "raw": True}
    answers = [answer(adapter=str(run), **asked) for run in runs]
    assert answers[0] == answers[1]
    merged = MergeConfig(adapter=str(runs[0]), output=str(place / "merged"), verify=True, base="dequantized")
    merge(merged, said.append)
    positions = [AutoConfig.from_pretrained(place / name).rope_parameters for name in ("merged", "by-hand")]
    assert positions[0] == positions[1]
    assert answer(model=str(place / "merged"), **asked) == answers[0]
    assert f"rope_parameters': {positions[0]}" in (runs[0] / "README.md").read_text()
    with pytest.raises(AdapterError, match=r"by yarn, factor 2; here .* by linear, factor 4") as caught:
        answer(adapter=str(runs[0]), rope_scaling="linear:4", **asked)
    assert caught.value.hint == "Leave out --rope-scaling."


def answer(prompts, **settings) -> str:
    return generate(GenerateConfig(**settings), prompts, lambda event: None).answers[0]["answer"]
