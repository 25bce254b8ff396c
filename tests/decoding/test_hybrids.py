"""Models with layers of a state are decoded row by row too, token for token as transformers does."""

import pytest
import torch

from qlora_cli.core.decoding.decoder import Decoder, Prompt, why_not_stepwise
from tests.conftest import most_slow
from tests.decoding.hybrid_models import HYBRIDS, load_hybrid
from tests.decoding.test_decoder import answers_of, make_prompts, make_requests, open_session
from tests.generation.session_case import NEVER, generate_with_transformers, settings_of

CPU = torch.device("cpu")
VOCABULARY = 256
FEW = ("qwen3_5_text", "lfm2", "bamba")
PENALTY = 1.4  # keeps a random model from repeating itself


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory):
    built = {}

    def build(name):
        if name not in built:
            built[name] = load_hybrid(tmp_path_factory.mktemp(name) / "model", name, device=CPU)
        return built[name]

    return build


def shorten(prompts):
    return [[token % VOCABULARY for token in ids] for ids in prompts]


@pytest.mark.parametrize("name", most_slow(HYBRIDS, FEW))
def test_answers_are_those_of_transformers_whoever_shares_the_batch(hybrid, name):
    """Prompts shorter and longer than a convolution's window, rows that are refilled, two prompts of one length."""
    model = hybrid(name)
    assert why_not_stepwise(model) is None
    prompts, new_tokens = shorten(make_prompts((5, 19, 2, 19))), (6, 3, 7, 4)
    expected = [generate_with_transformers(model, p, n, PENALTY) for p, n in zip(prompts, new_tokens, strict=True)]
    found, _, _ = answers_of(model, make_requests(prompts, new_tokens), batch_size=3, repetition_penalty=PENALTY)
    assert [found[i] for i in range(len(prompts))] == expected
    assert len({token for ids in expected for token in ids}) > 8


def test_a_state_is_that_of_its_row_alone(hybrid):
    """Prompts given in one call, of lengths in no order, into rows that held something else."""
    model = hybrid("qwen3_5_text")
    prompts = shorten(make_prompts((3, 11, 3)))
    decoder = Decoder(model, rows=4, capacity=24, sampling=settings_of())
    decoder.prefill([0, 1, 2, 3], [Prompt(ids) for ids in shorten(make_prompts((9, 9, 4, 2)))])
    decoder.step()
    decoder.reset()
    rows = (2, 0, 3)
    answers = [[token] for token in decoder.prefill(rows, [Prompt(ids) for ids in prompts]).wait()]
    for _ in range(3):
        chosen = decoder.step().wait()
        for row, answer in zip(rows, answers, strict=True):
            answer.append(chosen[row])
    assert answers == [generate_with_transformers(model, ids, 4) for ids in prompts]


def test_how_it_was_decoded_is_said_and_can_be_switched_off(hybrid):
    model = hybrid("lfm2")
    requests = make_requests(shorten(make_prompts((4,))), (3,))
    answers, paths = [], []
    for settings in ({}, {"engine": "plain"}):
        session = open_session(model, **settings)
        answers.append([list(answer.ids) for answer in session.answer(requests, [NEVER])])
        paths.append(session.path)
    assert answers[0] == answers[1]
    assert paths[0].startswith("own steps") and "--engine plain was given" in paths[1]


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"layer_types": ["linear_attention", "compressed_sparse_attention"]}, "compressed_sparse_attention layers"),
        ({"layer_types": None}, "no list of keys and values"),
    ],
)
def test_layers_of_another_kind_are_left_to_transformers(hybrid, monkeypatch, change, reason):
    model = hybrid("qwen3_5_text")
    config = model.get_base_model().config
    for name, value in change.items():
        monkeypatch.setattr(config, name, value)
    assert reason in why_not_stepwise(model)


def test_a_state_outside_the_cache_is_left_to_transformers():
    from transformers import MiniMaxConfig, MiniMaxForCausalLM

    sizes = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2, "num_experts_per_tok": 1}
    kinds = ["linear_attention", "full_attention"]
    model = MiniMaxForCausalLM(MiniMaxConfig(**sizes, **heads, layer_types=kinds))
    assert "keeps a state outside transformers' cache" in why_not_stepwise(model)
