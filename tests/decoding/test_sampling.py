"""Sampling promises: transformers' filters, a draw that depends on seed and prompt alone, and no hidden NaN."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from qlora_cli.core.decoding.sampling import NOT_A_NUMBER, check_sampling, choose_tokens, draw_uniforms
from qlora_cli.errors import UsageError
from qlora_cli.settings.generation import SamplingSettings
from tests.generation.session_case import settings_of

VOCABULARY = 50


def transformers_distribution(logits: torch.Tensor, sampling: SamplingSettings, ids: torch.Tensor) -> torch.Tensor:
    """Probabilities (vocabulary,) that transformers would sample from."""
    steps = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        steps.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    steps.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        steps.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        steps.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        steps.append(MinPLogitsWarper(sampling.min_p))
    return steps(ids[None], logits[None].clone()).softmax(-1)[0]


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    temperature=st.floats(0.2, 3),
    top_k=st.sampled_from([0, 1, 5, 200]),
    top_p=st.sampled_from([1.0, 0.9, 0.5]),
    min_p=st.sampled_from([0.0, 0.1]),
    penalty=st.sampled_from([1.0, 1.5]),
)
def test_the_distribution_is_that_of_transformers(seed, temperature, top_k, top_p, min_p, penalty):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(VOCABULARY, generator=generator)
    ids = torch.randint(0, VOCABULARY, (8,), generator=generator)
    sampling = settings_of(repetition_penalty=penalty, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    expected = transformers_distribution(logits, sampling, ids)
    draws = 4000
    seen = torch.zeros(1, VOCABULARY, dtype=torch.bool).index_fill(1, ids, True)
    uniforms = (torch.arange(draws) + 0.5) / draws  # evenly spread: shares come out exact to 1/draws a token
    chosen = choose_tokens(logits.expand(draws, -1), sampling, uniforms, seen.expand(draws, -1))
    shares = torch.bincount(chosen, minlength=VOCABULARY) / draws
    torch.testing.assert_close(shares, expected, atol=1.5 / draws, rtol=0)


def test_greedy_takes_the_likeliest_after_the_penalty():
    logits = torch.tensor([[2.0, 1.9, -1.0]])
    seen = torch.tensor([[True, False, False]])
    assert choose_tokens(logits, settings_of()).tolist() == [0]
    assert choose_tokens(logits, settings_of(repetition_penalty=1.2), None, seen).tolist() == [1]


@given(uniform=st.sampled_from([0.0, 0.5, 1 - 2**-24]))
@settings(deadline=None)
def test_rounding_never_steps_past_what_was_kept(uniform):
    logits = torch.zeros(1, 1000)
    logits[0, :3] = 20
    for sampling in (settings_of(temperature=1.0, top_k=3), settings_of(temperature=1.0, top_p=0.99)):
        assert choose_tokens(logits, sampling, torch.tensor([uniform])).item() < 3


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_recognised(bad):
    logits = torch.randn(2, VOCABULARY)
    logits[1, 7] = bad
    for sampling in (settings_of(), settings_of(temperature=1.0)):
        chosen = choose_tokens(logits, sampling, torch.tensor([0.3, 0.3]))
        assert chosen[0] != NOT_A_NUMBER and chosen[1] == NOT_A_NUMBER


def test_a_prompt_draws_the_same_numbers_whatever_else_is_answered():
    first, again, other = draw_uniforms(1, 5, 10), draw_uniforms(1, 5, 20), draw_uniforms(1, 6, 10)
    assert torch.equal(first, again[:10])
    assert not torch.equal(first, other)
    assert not torch.equal(first, draw_uniforms(2, 5, 10))


@pytest.mark.parametrize(
    ("setting", "flag"),
    [
        ({"temperature": -1}, "--temperature"),
        ({"top_p": 0}, "--top-p"),
        ({"top_p": 1.5}, "--top-p"),
        ({"top_k": -1}, "--top-k"),
        ({"min_p": 2}, "--min-p"),
        ({"repetition_penalty": 0}, "--repetition-penalty"),
        ({"temperature": float("nan")}, "--temperature"),
    ],
)
def test_a_value_out_of_range_is_named(setting, flag):
    with pytest.raises(UsageError, match=flag):
        check_sampling(settings_of(**setting))
