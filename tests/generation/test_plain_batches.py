"""Prompts that transformers' own generate answers in a batch are answered as each alone, or one after another."""

import pytest
from transformers import LlamaConfig, LlamaForCausalLM, RwkvConfig, RwkvForCausalLM

from qlora_cli.core.generation.requests import make_request
from qlora_cli.core.generation.session import GenerationSession
from tests.generation.session_case import settings_of

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64}
MODELS = {
    "rwkv": (RwkvForCausalLM, RwkvConfig(**SIZES, attention_hidden_size=32, context_length=64)),  # mixes its rows up
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES, num_attention_heads=2)),
}


class Words:
    """A tokenizer whose tokens are the letters with these numbers."""

    def decode(self, ids, **_):
        return "".join(chr(65 + int(number)) for number in ids)


@pytest.mark.parametrize("name", MODELS)
def test_answers_of_a_batch_are_those_of_each_alone(name):
    kind, config = MODELS[name]
    model, said = kind(config).eval(), []
    settings = settings_of(engine="plain", batch_size=8)
    session = GenerationSession(settings, said.append, model=model, tokenizer=Words())
    prompts = [[5, 9, 30], [7, 8, 9, 10, 11, 12, 13, 3], [1], [4, 4, 40, 41, 42]]
    requests = [make_request(i, ids, max_new_tokens=8, context=None) for i, ids in enumerate(prompts)]
    alone = [next(iter(session.answer([request], set()))).ids for request in requests]
    assert not said
    together = {answer.index: answer.ids for answer in session.answer(requests, set())}
    assert [together[i] for i in range(4)] == alone
    assert [event.text.startswith("Prompts are answered one after another") for event in said] == [True] * (
        name == "rwkv"
    )
