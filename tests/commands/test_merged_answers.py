"""A merged model answers as base and adapter did, formatted alike, through the same command."""

from dataclasses import asdict

import torch

from qlora_cli.artifacts import FORMAT, RUN_RECORD, write_json
from qlora_cli.commands.generate import generate
from qlora_cli.commands.merge import merge
from qlora_cli.config import GenerateConfig, MergeConfig
from qlora_cli.core.adapters.lora import attach_adapter, save_adapter
from qlora_cli.core.prompts.formatting import Formatting
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
    assert answers[0]["new_tokens"] > 1
    assert any("not quantised" in getattr(event, "text", "") for event in reported)
