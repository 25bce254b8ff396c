"""Decoding promises: transformers' own answers, token for token, whoever shares the batch and whenever a row is refilled."""

import pytest
import torch

from qlora_cli.core.adapters.lora import attach_adapter, save_adapter
from qlora_cli.core.decoding.cpu_linears import unpack_linears
from qlora_cli.core.decoding.decoder import Decoder, Prompt, why_not_stepwise
from qlora_cli.core.generation.requests import ENDED, LENGTH, STOPPED, find_end_ids, make_request
from qlora_cli.core.generation.session import GenerationSession
from qlora_cli.core.models.files import resolve_model
from qlora_cli.core.models.loading import load_base
from qlora_cli.core.models.structure import underlying_model
from qlora_cli.core.prompts.formatting import Formatting, default_formatting
from qlora_cli.errors import DataError, ModelError
from qlora_cli.settings.groups import LoraSettings, QuantizationSettings
from tests.adapted import draw_b
from tests.conftest import make_tokenizer, most_slow
from tests.generation.session_case import NEVER, generate_with_transformers, settings_of

LENGTHS = (5, 41, 19, 8, 30, 2)  # of prompts: some longer than the sliding windows, some far shorter
ARCHITECTURES = {
    **{name: (name, {}) for name in ("llama", "qwen3", "phi", "phi3", "gpt_neox", "falcon", "mistral")},
    # A random model with tied embeddings repeats itself.
    **{name: (name, {"tie_word_embeddings": False}) for name in ("qwen2", "gemma2", "gemma3", "gpt2", "opt", "bloom")},
    "mistral with a window": ("mistral", {"sliding_window": 16}),
    "falcon with ALiBi": ("falcon", {"alibi": True}),
}


@pytest.fixture(scope="module")
def tuned(tiny_model):
    """`tuned(name)`: a 4-bit base of an architecture with an adapter that changes its answers."""
    built = {}

    def build(name):
        if name not in built:
            architecture, changes = ARCHITECTURES[name]
            base, _ = load_base(
                resolve_model(str(tiny_model(architecture, **changes))),
                QuantizationSettings(base_cache=False),
                compute_dtype=torch.float32,
                device=torch.device("cpu"),
            )
            built[name] = draw_b(attach_adapter(base, LoraSettings(rank=4, alpha=16)), seed=0).eval()
        return built[name]

    return build


def make_prompts(lengths=LENGTHS):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(2, 380, (length,), generator=generator).tolist() for length in lengths]


def make_requests(prompts, new_tokens):
    return [
        make_request(index, ids, max_new_tokens=count, context=512)
        for index, (ids, count) in enumerate(zip(prompts, new_tokens, strict=True))
    ]


def open_session(model, report=lambda event: None, **settings):
    return GenerationSession(settings_of(**settings), report, model=model, tokenizer=make_tokenizer())


def answers_of(model, requests, *, end_ids=(NEVER,), on_text=None, **settings):
    """Ids of each answer, by index, and the answers."""
    events = []
    found = list(open_session(model, events.append, **settings).answer(requests, end_ids, on_text))
    assert sorted(answer.index for answer in found) == [request.index for request in requests]
    return {answer.index: list(answer.ids) for answer in found}, found, events


@pytest.mark.parametrize("name", most_slow(ARCHITECTURES, ("gpt_neox", "falcon", "bloom")))
def test_greedy_answers_are_those_of_transformers(tuned, name):
    model = tuned(name)
    assert why_not_stepwise(model) is None
    prompts, new_tokens = make_prompts(), (14, 9, 20, 3, 12, 1)
    # The penalty keeps a random model from repeating itself, so that every step can go wrong.
    expected = [generate_with_transformers(model, p, n, 1.4) for p, n in zip(prompts, new_tokens, strict=True)]
    assert len({token for ids in expected for token in ids}) > 25
    together, _, _ = answers_of(model, make_requests(prompts, new_tokens), batch_size=3, repetition_penalty=1.4)
    assert [together[i] for i in range(len(prompts))] == expected
    alone, _, _ = answers_of(model, make_requests(prompts[:2], new_tokens[:2]), repetition_penalty=1.4)
    assert [alone[0], alone[1]] == expected[:2]


def test_the_plain_path_gives_the_same_answers(tuned):
    model, prompts, new_tokens = tuned("llama"), make_prompts(), (14, 9, 20, 3, 12, 1)
    for sampling in ({"repetition_penalty": 1.4}, {"temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.1}):
        requests = make_requests(prompts, new_tokens)
        own, _, _ = answers_of(model, requests, batch_size=4, end_ids=[5, 6], **sampling)
        plain, _, _ = answers_of(model, requests, batch_size=4, end_ids=[5, 6], engine="plain", **sampling)
        assert own == plain


def test_sampled_answers_depend_on_seed_and_prompt_but_not_on_the_batch(tuned):
    model, prompts, sampling = tuned("qwen3"), make_prompts(), {"temperature": 1.0, "top_p": 0.95}
    requests = make_requests(prompts, [12] * len(prompts))
    first, _, _ = answers_of(model, requests, seed=3, **sampling)
    second, _, _ = answers_of(model, requests, batch_size=4, seed=3, **sampling)
    part, _, _ = answers_of(model, requests[3:], batch_size=2, seed=3, **sampling)
    other, _, _ = answers_of(model, requests, batch_size=4, seed=4, **sampling)
    assert first == second
    assert part == {index: first[index] for index in part}
    assert first != other


def test_an_answer_ends_at_end_tokens_stop_strings_and_its_length(tuned):
    model, ids = tuned("llama"), make_prompts()[0]
    free, (whole,), _ = answers_of(model, make_requests([ids], [20]), repetition_penalty=1.4)
    assert whole.finish == LENGTH and len(whole.ids) == 20
    end = free[0][7]
    ended, (answer,), _ = answers_of(model, make_requests([ids], [20]), repetition_penalty=1.4, end_ids=[end])
    assert ended[0] == free[0][: free[0].index(end)] and answer.finish == ENDED
    stop = whole.text[4:7]
    pieces = []
    _, (answer,), _ = answers_of(
        model,
        make_requests([ids], [20]),
        repetition_penalty=1.4,
        stop=(stop,),
        on_text=lambda index, piece: pieces.append(piece),
    )
    assert answer.text == whole.text[: whole.text.index(stop)] == "".join(pieces) and answer.finish == STOPPED


def test_two_answers_one_after_another_share_a_decoder(tuned):
    model = tuned("llama")
    prompts = make_prompts((60, 4))
    expected = [generate_with_transformers(model, ids, 6) for ids in prompts]
    session, found, decoders = open_session(model), [], set()
    for request in make_requests(prompts, [6, 6]):
        (answer,) = session.answer([request], [NEVER])
        found.append(list(answer.ids))
        decoders.add(session.decoder)
    assert found == expected and len(decoders) == 1


def test_the_adapter_can_be_left_out(tuned, load_tiny, tmp_path):
    model = tuned("llama")
    save_adapter(model, tmp_path, base_name="llama")
    requests = make_requests(make_prompts(), [12] * len(LENGTHS))
    base, _ = load_tiny("llama")
    session = open_session(base, batch_size=8)

    def answer(adapter):
        session.select(adapter)
        return sorted(answer.ids for answer in session.answer(requests, [NEVER]))

    tuned_answers = answer(str(tmp_path))
    assert tuned_answers == sorted(tuple(generate_with_transformers(model, r.ids, 12)) for r in requests)
    with model.disable_adapter():
        expected = sorted(tuple(generate_with_transformers(model, r.ids, 12)) for r in requests)
    assert answer(None) == expected != tuned_answers
    assert answer(str(tmp_path)) == tuned_answers


def test_fewer_rows_are_tried_when_memory_is_short(tuned, monkeypatch):
    model, prompts = tuned("llama"), make_prompts()
    expected = [generate_with_transformers(model, ids, 8) for ids in prompts]
    prefill = Decoder.prefill

    def short_of_memory(self, rows, prompts):
        if self.cache.rows > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return prefill(self, rows, prompts)

    monkeypatch.setattr(Decoder, "prefill", short_of_memory)
    found, _, events = answers_of(model, make_requests(prompts, [8] * 6), batch_size=6)
    assert [found[i] for i in range(6)] == expected
    assert "going on with 1" in events[-1].text

    def no_memory(self, rows, prompts):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Decoder, "prefill", no_memory)
    with pytest.raises(ModelError, match="no room"):
        answers_of(model, make_requests(prompts, [8] * 6), batch_size=6)


@pytest.mark.parametrize("engine", ["fast", "plain"])
def test_output_that_is_no_number_is_an_error(tuned, engine):
    model = tuned("qwen3")
    weight = underlying_model(model).get_output_embeddings().weight
    kept = weight.data.clone()
    weight.data[3] = float("nan")
    try:
        with pytest.raises(ModelError, match="not a number"):
            answers_of(model, make_requests(make_prompts()[:1], [5]), engine=engine)
    finally:
        weight.data.copy_(kept)


def test_rows_that_are_not_in_use_change_nothing(tuned):
    model, (ids, *_) = tuned("gemma2"), make_prompts()
    expected = generate_with_transformers(model, ids, 10)
    decoder = Decoder(model, rows=4, capacity=24, sampling=settings_of())
    found = decoder.prefill([2], [Prompt(ids)]).wait()
    for _ in range(9):
        found.append(decoder.step().wait()[2])
    assert found == expected


def test_models_that_keep_another_state_take_the_plain_path():
    from transformers import GPTNeoConfig, GPTNeoForCausalLM, MambaConfig, MambaForCausalLM

    mamba = MambaForCausalLM(MambaConfig(vocab_size=16, hidden_size=8, num_hidden_layers=1, state_size=4))
    assert why_not_stepwise(mamba)
    neo = GPTNeoForCausalLM(
        GPTNeoConfig(vocab_size=16, hidden_size=8, num_layers=1, num_heads=2, attention_types=[[["local"], 1]])
    )
    assert "attention code of its own" in why_not_stepwise(neo)


@pytest.mark.parametrize("arguments", [{}, {"compute_dtype": torch.bfloat16, "quant_type": "fp4"}])
def test_unpacked_weights_give_the_same_logits_bit_for_bit(load_tiny, arguments):
    base, _ = load_tiny("opt", **arguments)  # with biases
    ids = torch.arange(2, 30)[None]
    with torch.no_grad():
        packed = base(input_ids=ids).logits
        assert not unpack_linears(base, free_bytes=1000) and torch.equal(base(input_ids=ids).logits, packed)
        assert unpack_linears(base) and torch.equal(base(input_ids=ids).logits, packed)
        layer = base.model.decoder.layers[0].fc1
        assert layer.weight.dtype == torch.uint8 and layer.forward.__name__ == "forward"
        model = attach_adapter(base, LoraSettings(rank=2, alpha=4)).eval()
        assert torch.equal(model(input_ids=ids).logits, packed)  # B is zero


# ---------------------------------------------------------------- requests


def test_a_prompt_longer_than_the_context_is_refused_and_a_long_answer_is_cut():
    with pytest.raises(DataError, match="600 tokens and the model reads at most 512"):
        make_request(0, [1] * 600, max_new_tokens=5, context=512)
    with pytest.raises(DataError, match="empty"):
        make_request(0, [], max_new_tokens=5, context=512)
    assert make_request(0, [1] * 500, max_new_tokens=50, context=512).max_new_tokens == 12
    assert make_request(0, [1] * 500, max_new_tokens=50, context=None).max_new_tokens == 50


def test_end_tokens_include_what_closed_the_answers_in_training(tuned, tiny_model):
    tokenizer = resolve_model(str(tiny_model("llama"))).tokenizer
    model = tuned("llama")
    assert find_end_ids(model, tokenizer, default_formatting(tokenizer)) == {0}
    template = "{% for m in messages %}{{ m['content'] + '<|padding|>' }}{% endfor %}"
    chat = Formatting(format="chat", column="messages", template=template)
    assert find_end_ids(model, tokenizer, chat) == {0, 1}
    pair = Formatting(format="prompt", prompt_column="q", completion_column="a", template="{q}\n{a}<|padding|>")
    assert find_end_ids(model, tokenizer, pair) == {0, 1}
