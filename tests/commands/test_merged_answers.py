"""A merged model answers as base and adapter did, formatted alike, through the same command."""

import json
import shutil
from dataclasses import asdict, replace

import pytest
import torch

from qlora_cli.artifacts import FORMAT, RUN_RECORD, write_json
from qlora_cli.commands.generate import generate
from qlora_cli.commands.merge import merge
from qlora_cli.config import GenerateConfig, MergeConfig
from qlora_cli.core.adapters.lora import attach_adapter, save_adapter
from qlora_cli.core.merge.checkpoint_files import add_end_marks
from qlora_cli.core.prompts.formatting import Formatting
from qlora_cli.events import Caution
from qlora_cli.settings.groups import LoraSettings


def test_a_merged_model_gives_the_adapters_greedy_answer_in_the_trained_format(load_tiny, tiny_model, tmp_path):
    base, identity = load_tiny("llama")
    adapted = attach_adapter(base, LoraSettings(rank=4, alpha=32))
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.1)
    run, merged = tmp_path / "run", tmp_path / "merged"
    run.mkdir()
    save_adapter(adapted, run, base_name=str(tiny_model("llama")))
    formatting = Formatting(
        format="prompt",
        prompt_column="question",
        completion_column="answer",
        template="Question: {question}\nAnswer: {answer}",
    )
    write_json(run / RUN_RECORD, {"format": FORMAT, "base": asdict(identity), "formatting": formatting.to_dict()})
    reported: list = []
    merge(MergeConfig(adapter=str(run), output=str(merged), verify=False), reported.append)
    settings = {"temperature": 0.0, "max_new_tokens": 12, "base_cache": False}
    answers = [
        generate(GenerateConfig(**source, **settings), ["What is 12 * 7?"], reported.append).answers[0]
        for source in ({"adapter": str(run)}, {"model": str(merged)})
    ]
    assert answers[0] == answers[1]
    assert not any("changes nothing" in getattr(event, "text", "") for event in reported)
    assert answers[0]["new_tokens"] > 1
    assert any("not quantised" in getattr(event, "text", "") for event in reported)
    assert (merged / "generation_config.json").read_bytes() == (
        tiny_model("llama") / "generation_config.json"
    ).read_bytes()


def test_a_merge_of_a_chat_ends_answers_at_the_mark_that_closed_them(load_tiny, tiny_model, tmp_path):
    """For transformers and vLLM, which know of no formatting: the base ends at its end of text alone."""
    base, identity = load_tiny("llama")
    run, merged = tmp_path / "run", tmp_path / "merged"
    run.mkdir()
    save_adapter(attach_adapter(base, LoraSettings(rank=2)), run, base_name=str(tiny_model("llama")))
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|padding|>{% endfor %}"
    formatting = Formatting(format="chat", column="messages", template=template)
    write_json(run / RUN_RECORD, {"format": FORMAT, "base": asdict(identity), "formatting": formatting.to_dict()})
    reported: list = []
    merge(MergeConfig(adapter=str(run), output=str(merged), base="original", verify=False), reported.append)
    generate(GenerateConfig(adapter=str(run), max_new_tokens=1, base_cache=False), ["a"], reported.append)
    untrained = f"The adapter in {run} changes nothing: B of every pair is zero, as before training."
    assert [event.text for event in reported if isinstance(event, Caution)].count(untrained) == 2
    assert json.loads((merged / "generation_config.json").read_text())["eos_token_id"] == [0, 1]
    bare = shutil.copytree(tiny_model("llama"), tmp_path / "bare", ignore=shutil.ignore_patterns("*token*"))
    config = MergeConfig(adapter=str(run), model=str(bare), output=str(merged), base="original", verify=False)
    merge(replace(config, overwrite=True), reported.append)
    assert (merged / "generation_config.json").read_bytes() == (bare / "generation_config.json").read_bytes()


@pytest.mark.parametrize(("before", "after"), [(0, [0, 7]), ([0, 5], [0, 5, 7]), (None, 7), (7, 7), ([7, 0], [7, 0])])
@pytest.mark.parametrize("written", [True, False])
def test_end_marks_are_added_to_those_there_are(tmp_path, before, after, written):
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": before, "pad_token_id": 3, "vocab_size": 9}))
    if written:
        as_configured = {"_from_model_config": True} if after != before else {}
        content = as_configured | {"eos_token_id": before, "top_k": 2}
        (tmp_path / "generation_config.json").write_text(json.dumps(content))
    add_end_marks(tmp_path, {7})
    if not written and after == before:
        assert not (tmp_path / "generation_config.json").exists()  # transformers makes itself the same
    else:
        found = json.loads((tmp_path / "generation_config.json").read_text())
        assert found == {"eos_token_id": after} | ({"top_k": 2} if written else {"pad_token_id": 3})
