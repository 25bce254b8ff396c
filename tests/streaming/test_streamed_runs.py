"""A run whose base streams is the run whose base is whole: start, evaluation, samples, an interruption, and the end."""

from pathlib import Path

import pytest

from qlora_cli.commands.generate import generate
from qlora_cli.commands.merge import merge
from qlora_cli.commands.train import train
from qlora_cli.config import GenerateConfig, MergeConfig, TrainConfig
from qlora_cli.core.generation import base_loading
from qlora_cli.core.streaming import host_memory
from qlora_cli.errors import Interrupted, UsageError
from qlora_cli.events import Notice, RunStarted
from tests.commands.test_train import cache, data, metrics, run, short_run, stopping_at, weights  # noqa: F401


@pytest.fixture
def options(tiny_model, data, tmp_path):  # noqa: F811
    """Everything that reads weights: a calibrated start, dropout, evaluation, samples, what 4 bits cost."""
    return {
        **short_run(tiny_model, data, tmp_path),
        "model": str(tiny_model("llama", num_hidden_layers=5)),
        "max_steps": 5,
        "save_every": 2,
        "eval_every": 2,
        "sample_prompt": ("What is 1 + 2?",),
        "sample_every": 2,
        "resident_weights": False,
        "base_cache": True,
    }


def test_a_run_that_streams_gives_the_adapter_of_one_that_does_not(options, tmp_path):
    options |= {"max_steps": 1, "eval_rows": None, "eval_every": None, "sample_prompt": None, "sample_every": None}
    for stream in (False, True):
        run(options, output=str(tmp_path / str(stream)), stream=stream)
    assert weights(tmp_path / "True") == weights(tmp_path / "False")


@pytest.mark.slow
def test_an_interrupted_run_that_streams_ends_like_one_that_does_not(options, tmp_path):
    whole, output = tmp_path / "whole", Path(options["output"])
    expected = run(options, output=str(whole), stream=False)
    events: list = []
    with pytest.raises(Interrupted):
        train(TrainConfig(**options, stream=True), stopping_at(3, events))
    started = next(event for event in events if isinstance(event, RunStarted))
    assert "weights of 5 of 5 layers on the host" in started.engine
    result = run(options, resume=True, stream=True)
    assert weights(output) == weights(whole)
    assert metrics(output) == metrics(whole)
    assert result.gap == expected.gap is not None
    merged = [tmp_path / "merged", tmp_path / "merged-whole"]
    for place, made in zip(merged, (output, whole), strict=True):
        merge(MergeConfig(adapter=str(made), output=str(place)), [].append)
    first, second = (next(place.glob("*.safetensors")).read_bytes() for place in merged)
    assert first == second


@pytest.mark.slow
def test_answers_of_a_base_that_streams_are_those_of_a_whole_one(tiny_model, monkeypatch):
    model = str(tiny_model("llama", num_hidden_layers=5))
    prompts = ("What is 1 + 2?", "The quick brown fox")
    said: list = []

    def answers(engine, *, base_cache=False):
        config = GenerateConfig(model=model, temperature=0, max_new_tokens=12, engine=engine, base_cache=base_cache)
        return [each["answer"] for each in generate(config, prompts, said.append).answers]

    whole = [answers(engine) for engine in ("fast", "plain")]
    monkeypatch.setattr(base_loading, "count_streamed_layers", lambda *_: (4, 2**20))
    assert [answers(engine) for engine in ("fast", "plain")] == whole
    assert any("4 of 5 layers on the host" in event.text for event in said if isinstance(event, Notice))
    monkeypatch.setattr(host_memory, "read_free_bytes", lambda device: 2**30)
    assert [answers(engine, base_cache=True) for engine in ("fast", "plain")] == whole
    assert any("4 of 5 layers on the disk" in event.text for event in said if isinstance(event, Notice))


def test_what_cannot_stream_is_refused_before_anything_is_loaded(options):
    for other in ({"dora": True}, {"engine": "plain"}):
        with pytest.raises(UsageError, match="--stream"):
            run(options, stream=True, **other)
