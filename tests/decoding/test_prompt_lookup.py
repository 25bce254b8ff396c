"""Prompt look-up changes no answer: greedy or sampled, at its end, in a stream, at the end of the context."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlora_cli.core.decoding.decoder import Decoder
from qlora_cli.core.decoding.prompt_lookup import LEAST, LONGEST, NOTHING, WIDTH, PromptLookUp
from qlora_cli.core.generation.requests import ENDED, LENGTH, STOPPED, make_request
from qlora_cli.errors import ModelError
from tests.conftest import most_slow
from tests.decoding.hybrid_models import load_hybrid
from tests.decoding.test_decoder import (
    ARCHITECTURES,
    make_prompts,
    open_session,
    tuned,  # noqa: F401 - a fixture
)
from tests.generation.session_case import NEVER, generate_with_transformers

CPU = torch.device("cpu")


def answers_of(model, prompts, counts, *, end_ids=(NEVER,), session=None, **settings):
    """Ids, text and end of each answer with the pieces it came in, and the session."""
    session = session or open_session(model, **settings)
    found = []
    for index, (ids, count) in enumerate(zip(prompts, counts, strict=True)):
        pieces = []
        request = make_request(index, ids, max_new_tokens=count, context=512)
        (answer,) = session.answer([request], end_ids, lambda _, piece, pieces=pieces: pieces.append(piece))
        found.append((list(answer.ids), answer.text, answer.finish, pieces))
    return found, session


@pytest.fixture
def oracle(monkeypatch):
    """`oracle(prompt, answer)`: guesses are what that answer says, one in four wrong; each step takes them."""

    def install(prompt, answer):
        whole = torch.tensor([*prompt, *answer, *[NOTHING] * 2 * WIDTH])
        wrong = torch.rand(len(whole), generator=torch.Generator().manual_seed(3)) < 0.25
        told = torch.where(wrong, (whole + 1).clamp(max=300), whole)
        monkeypatch.setattr(PromptLookUp, "guess", lambda self, last: told[int(last) + 1 :][: WIDTH - 1])
        monkeypatch.setattr(Decoder, "_takes_guesses", lambda self: True)

    return install


@pytest.mark.parametrize("name", most_slow(ARCHITECTURES, ("gemma2", "falcon with ALiBi", "mistral with a window")))
def test_guesses_right_and_wrong_leave_the_answers_of_transformers(tuned, oracle, name):  # noqa: F811
    model, (ids,) = tuned(name), make_prompts((19,))
    expected = generate_with_transformers(model, ids, 24, 1.4)  # the penalty keeps a random model from repeating itself
    oracle(ids, expected)
    (found,), session = answers_of(model, [ids], [24], prompt_lookup="on", repetition_penalty=1.4)
    assert found[0] == expected and found[2] == LENGTH
    assert session.decoder.guessed_right > 10 and session.decoder.guessed_steps < 14
    assert f"{session.decoder.guessed_right} tokens guessed rightly" in session.path


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.2},
        pytest.param({"temperature": 0.7, "top_k": 20}, marks=pytest.mark.slow),
    ],
)
def test_what_is_looked_up_changes_no_answer(tuned, settings):  # noqa: F811
    """Two prompts one after another in one row, of which the second finds nothing of the first."""
    model, (ids, other) = tuned("llama"), make_prompts((41, 8))
    prompts, counts = [ids * 2, other * 3], (30, 20)
    without, _ = answers_of(model, prompts, counts, prompt_lookup="off", **settings)
    found, session = answers_of(model, prompts, counts, prompt_lookup="on", **settings)
    assert found == without
    assert session.decoder.guessed_right or settings


def test_an_answer_ends_inside_guesses_as_without(tuned, oracle):  # noqa: F811
    model, (ids,) = tuned("llama"), make_prompts((5,))
    sampling = {"repetition_penalty": 1.4}
    (whole,), _ = answers_of(model, [ids], [20], **sampling)
    oracle(ids, whole[0])
    ends = [({"end_ids": [whole[0][n]]}, ENDED) for n in (1, 12)]
    ends += [({"stop": (whole[1][n : n + 3],)}, STOPPED) for n in (9,)]
    for given_, end in ends:
        without, _ = answers_of(model, [ids], [20], **given_, **sampling)
        found, _ = answers_of(model, [ids], [20], prompt_lookup="on", **given_, **sampling)
        assert found == without and found[0][2] == end
    for count in (1, 7, 8):
        (found,), _ = answers_of(model, [ids], [count], prompt_lookup="on", **sampling)
        assert (found[0], found[2]) == (whole[0][:count], LENGTH)


def test_the_end_of_the_context_is_reached_without_a_step_past_it(tuned, oracle):  # noqa: F811
    model, (ids,) = tuned("opt"), make_prompts((490,))  # with an embedding for each of 512 places
    expected = generate_with_transformers(model, ids, 22, 1.4)
    oracle(ids, expected)
    (found,), session = answers_of(model, [ids], [60], prompt_lookup="on", repetition_penalty=1.4)
    assert found[0] == expected and found[2] == LENGTH and session.decoder.guessed_right


def test_output_that_is_no_number_is_an_error(tuned, oracle):  # noqa: F811
    model, (ids,) = tuned("llama"), make_prompts((5,))
    (whole,), _ = answers_of(model, [ids], [8])
    oracle(ids, whole[0])
    weight = model.get_base_model().get_output_embeddings().weight
    kept = weight.data.clone()
    session = open_session(model, prompt_lookup="on")
    answers_of(model, [ids], [8], session=session)
    weight.data[3] = float("nan")
    try:
        with pytest.raises(ModelError, match="not a number"):
            answers_of(model, [ids], [8], session=session)
    finally:
        weight.data.copy_(kept)


def test_rows_together_and_layers_with_a_state_go_without(tuned, tmp_path):  # noqa: F811
    model = load_hybrid(tmp_path / "model", "lfm2", device=CPU)
    settings = open_session(model).settings
    for base, rows, reason in ((model, 1, "layers with a state"), (tuned("llama"), 2, "several rows at once")):
        decoder = Decoder(base, rows=rows, capacity=24, sampling=settings, look_up=True)
        assert decoder.look_up is None and f"no prompt look-up: {reason}" in decoder.describe()
    _, session = answers_of(tuned("llama"), make_prompts((5,)), [3])  # auto, where bits are not known to be the same
    assert session.decoder.look_up is None


def test_kernels_that_do_not_run_here_are_left_to_torch():
    """Compiled they need a GPU: on a CPU they raise, and are not used."""
    assert PromptLookUp(20, CPU, fused=True).guess(torch.tensor([0])).tolist() == [NOTHING] * (WIDTH - 1)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.lists(st.integers(0, 3), max_size=12))
def test_the_latest_of_the_longest_matches_is_continued(ids, stale):
    def ending_alike(place):  # tokens that agree, of those that end at this place and at the last one
        pairs = zip(reversed(ids[: place + 1]), reversed(ids), strict=False)
        return next((n for n, (a, b) in enumerate(pairs) if a != b), place + 1)

    look_up = PromptLookUp(60, CPU)
    look_up.start(
        torch.tensor([*ids, *stale]), len(ids) + len(stale), torch.tensor(1)
    )  # an answer before, in the same row
    look_up.start(torch.tensor(ids), len(ids) - 1, torch.tensor(ids[-1:]))
    last = len(ids) - 1
    found = {place: min(LONGEST, ending_alike(place)) for place in range(last)}
    best = max(found, key=lambda place: (found[place], place), default=None)
    guessed = look_up.guess(torch.tensor([last])).tolist()
    if best is None or found[best] < LEAST:
        assert guessed == [NOTHING] * (WIDTH - 1)
    else:
        assert guessed == [ids[best + 1 + n % (last - best)] for n in range(WIDTH - 1)]
