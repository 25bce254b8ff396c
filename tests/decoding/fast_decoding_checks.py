"""Checks of decoding over fused kernels, run by tests/kernels/test_triton.py: interpreted on a CPU, for real on a GPU."""

from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from qlora_cli.core.adapters.lora import attach_adapter, save_adapter
from qlora_cli.core.decoding import fused_layers, prefill
from qlora_cli.core.decoding.decoder import PaddedPrompts, Prompt, pad_prompts
from qlora_cli.core.decoding.fused_layers import FastLayers
from qlora_cli.core.decoding.graph_decoder import FastModel, GraphDecoder, Guesses
from qlora_cli.core.decoding.prefill import MOST_GRAPHS, MOST_TOKENS, PrefillGraphs, bucket_length
from qlora_cli.core.decoding.prompt_lookup import NOTHING, WIDTH, PromptLookUp
from qlora_cli.core.generation.continuous_batching import answer_all
from qlora_cli.core.generation.requests import GrowingCompletion, Request
from qlora_cli.core.generation.session import GenerationSession
from qlora_cli.core.models.files import resolve_model
from qlora_cli.core.models.loading import load_base
from qlora_cli.core.models.quantization import dequantized_weight
from qlora_cli.core.models.structure import underlying_model
from qlora_cli.kernels.decode import gemv
from qlora_cli.settings.groups import LoraSettings, QuantizationSettings
from tests.adapted import draw_b
from tests.conftest import make_tokenizer, most_slow, write_model
from tests.decoding.hybrid_models import HYBRIDS, load_hybrid
from tests.generation.session_case import NEVER, generate_with_transformers, settings_of

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
COUNT = 12 if ON_GPU else 2  # tokens of an answer, where any will do
WIDE = {"hidden_size": 128, "intermediate_size": 256}  # wide enough for weights to be stacked
LEAST = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2}
ARCHITECTURES = {
    "llama": ("llama", WIDE if ON_GPU else {**LEAST, "num_hidden_layers": 1}),
    "gemma2": ("gemma2", {"tie_word_embeddings": False}),
    "falcon": ("falcon", {} if ON_GPU else {"num_hidden_layers": 1}),
    **(
        {
            **{name: (name, {}) for name in ("gpt_neox", "mistral", "qwen3", "phi", "phi3")},
            **{n: (n, {"tie_word_embeddings": False}) for n in ("qwen2", "gemma3", "gpt2", "opt", "bloom")},
            "mistral with a window": ("mistral", {"sliding_window": 16}),
            "falcon with ALiBi": ("falcon", {"alibi": True}),
        }
        if ON_GPU
        else {}
    ),
}


# With ALiBi some versions of transformers make the mask from numbers on the host.
MAY_NOT_BE_CAPTURED = ("bloom", "falcon with ALiBi")
SAMPLING = settings_of(repetition_penalty=1.4)  # keeps a random model from repeating itself


def load(tmp_path, name, rank=4, dtype=torch.float32):
    architecture, changes = ARCHITECTURES[name]
    directory = write_model(tmp_path / "model", architecture, **changes)
    base, _ = load_base(
        resolve_model(str(directory)), QuantizationSettings(base_cache=False), compute_dtype=dtype, device=DEVICE
    )
    model = attach_adapter(base, LoraSettings(rank=rank, alpha=16)).eval()
    draw_b(model, seed=0)
    return model


def prompts(lengths=(5, 19, 9)):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(2, 380, (length,), generator=generator).tolist() for length in lengths]


def own_answer(model, ids, count):
    return generate_with_transformers(model, ids, count, SAMPLING.repetition_penalty)


def answer_with(open_decoder, questions, counts, rows):
    requests = [Request(i, ids, n) for i, (ids, n) in enumerate(zip(questions, counts, strict=True))]

    def start(request, said=0):
        return GrowingCompletion(request, tokenizer=make_tokenizer(), end_ids=[NEVER], said=said)

    answers = answer_all(requests, start, open_decoder, rows, seed=0, report=print)
    found = {answer.index: list(answer.ids) for answer in answers}
    return [found[i] for i in range(len(questions))]


def fast_answers(fast, questions, counts, rows):
    made = []

    def open_decoder(rows, capacity):
        made.append(GraphDecoder(fast, rows=rows, capacity=capacity, sampling=SAMPLING))
        return made[-1]

    return answer_with(open_decoder, questions, counts, rows), made[-1]


@pytest.mark.parametrize("name", ARCHITECTURES if ON_GPU else most_slow(ARCHITECTURES, ["falcon"]))
def test_answers_are_those_of_transformers(tmp_path, name):
    model = load(tmp_path, name)
    counts, questions = ((24, 40, 16), prompts()) if ON_GPU else ((3, 2), prompts((2, 5)))
    expected = [own_answer(model, ids, count) for ids, count in zip(questions, counts, strict=True)]
    weights = {n: dequantized_weight(m) for n, m in model.named_modules() if hasattr(m, "quant_state")}
    fast = FastModel(model)
    try:
        for rows in (1, 2) if ON_GPU else (2,):  # the interpreter takes seconds an answer; one row: the tests below
            found, decoder = fast_answers(fast, questions, counts, rows)
            assert found == expected
            if ON_GPU:
                assert not decoder.reason or name in MAY_NOT_BE_CAPTURED
                assert bool(decoder.graphs) is not bool(decoder.reason)
        # Where transformers gives gemma2 an attention that knows no soft cap, ours is another and not used.
        differs = name == "gemma2" and underlying_model(model).config._attn_implementation != "eager"
        assert fast.attention.usable is (name not in ("falcon", "falcon with ALiBi", "bloom") and not differs)
    finally:
        fast.close()
    assert own_answer(model, questions[0], 3) == expected[0][:3]  # the model is as it was
    for n, m in model.named_modules():
        if n in weights:
            assert torch.equal(dequantized_weight(m), weights[n])


@pytest.mark.parametrize("name", HYBRIDS if ON_GPU else most_slow(HYBRIDS[:1], ()))  # interpreted it takes 20 s
def test_layers_with_a_state_are_stepped_in_the_same_graph(tmp_path, name):
    model = load_hybrid(tmp_path / "model", name, device=DEVICE)
    counts, lengths = ((24, 40, 16), (5, 19, 2)) if ON_GPU else ((2,), (2,))
    questions = [[token % 256 for token in ids] for ids in prompts(lengths)]
    expected = [own_answer(model, ids, count) for ids, count in zip(questions, counts, strict=True)]
    fast = FastModel(model)
    try:
        for rows in (1, 2) if ON_GPU else (1,):
            found, decoder = fast_answers(fast, questions, counts, rows)
            assert found == expected
            assert not ON_GPU or (decoder.graphs and not decoder.reason), decoder.reason
    finally:
        fast.close()
    assert own_answer(model, questions[0], 2) == expected[0][:2]  # the model is as it was


def test_what_is_fused_is_described_and_layers_with_one_input_become_one_product(tmp_path):
    model = load(tmp_path, "llama")
    (ids,) = prompts((3,))
    expected = [own_answer(model, ids, 2)]
    fast = FastModel(model)
    assert fast_answers(fast, [ids], (2,), 1)[0] == expected
    layers = len(model.get_base_model().model.layers)
    assert (
        fast.describe()
        == f"{7 * layers} linear layers in {4 * layers} products, norms, rotary embeddings and gates, fused attention"
    )
    assert {len(stack.sites) for stack in fast.linears.stacks} == {1, 2, 3}
    again = FastModel(model)  # finds the weights side by side already
    packed = [stack.weight.packed.data_ptr() for stack in fast.linears.stacks]
    assert [stack.weight.packed.data_ptr() for stack in again.linears.stacks] == packed


@pytest.mark.slow
def test_adapters_change_under_a_captured_graph(tmp_path):
    model = load(tmp_path, "llama")
    (ids,) = prompts((2,))
    fast = FastModel(model)
    first, decoder = fast_answers(fast, [ids], (COUNT,), 1)

    def answer():
        decoder.reset()
        return answer_with(lambda *size: decoder, [ids], (COUNT,), 1)

    with model.disable_adapter():
        fast.refresh()
        base = answer()
    draw_b(model, seed=1)
    fast.refresh()
    other = answer()
    draw_b(model, seed=0)
    fast.refresh()
    assert answer() == first
    fast.close()
    with model.disable_adapter():
        assert base == [own_answer(model, ids, COUNT)]
    draw_b(model, seed=1)
    assert other == [own_answer(model, ids, COUNT)]
    assert first != base != other


@pytest.mark.slow
def test_long_prompts_take_the_dequantising_product(tmp_path):
    model = load(tmp_path, "llama")
    questions = prompts((100 if ON_GPU else gemv.MAX_TOKENS + 1,))
    expected = [own_answer(model, questions[0], COUNT)]
    fast = FastModel(model)
    assert fast_answers(fast, questions, (COUNT,), 1)[0] == expected


@pytest.mark.slow
def test_a_module_that_computes_something_else_is_left_alone(tmp_path):
    model = load(tmp_path, "llama")
    kind = type(model.get_base_model().model.norm)
    for module in model.modules():
        if type(module) is kind:
            module.forward = lambda x, module=module: 0.5 * kind.forward(module, x)
    questions = prompts((3,))
    expected = [own_answer(model, questions[0], COUNT)]
    fast = FastModel(model)
    assert fast_answers(fast, questions, (COUNT,), 1)[0] == expected
    assert "norms" not in fast.describe()


@pytest.mark.slow
def test_adapters_that_pefts_own_forward_applies_are_switched_too(tmp_path):
    model = load(tmp_path, "llama")
    fast = FastModel(model)
    assert not fast.adapters_elsewhere
    fast.close()
    model.add_adapter("dora", LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"], use_dora=True))
    model.set_adapter("dora")
    draw_b(model, seed=2)
    (ids,), dora = prompts((3,)), tmp_path / "dora"
    expected = {str(dora): own_answer(model.eval(), ids, COUNT)}
    with model.disable_adapter():
        expected[None] = own_answer(model, ids, COUNT)
    dora.mkdir()
    save_adapter(model, dora, base_name="llama", name="dora")
    files, quantization = resolve_model(str(tmp_path / "model")), QuantizationSettings(base_cache=False)
    base, _ = load_base(files, quantization, compute_dtype=torch.float32, device=DEVICE)
    session = GenerationSession(SAMPLING, print, model=base, tokenizer=make_tokenizer(), fused=True)
    decoders = []
    for adapter in (str(dora), None, str(dora), str(dora)):
        session.select(adapter)
        (answer,) = session.answer([Request(0, ids, COUNT)], [NEVER])
        assert list(answer.ids) == expected[adapter]
        decoders.append(session.decoder)
    # Captured graphs hold an adapter that PEFT applies: the decoder is given up when it changes, and only then.
    assert decoders[2] is decoders[3] and len({id(decoder) for decoder in decoders}) == 3
    assert decoders[0].fast.adapters_elsewhere and expected[str(dora)] != expected[None]


@pytest.mark.skipif(not ON_GPU, reason="only a GPU captures graphs")
def test_a_model_that_waits_for_the_device_is_stepped(tmp_path):
    model = load(tmp_path, "llama")
    expected = [own_answer(model, prompts()[0], 6)]
    layer = model.get_base_model().model.layers[0]
    own = layer.forward

    def waiting(*given, **named):
        result = own(*given, **named)
        (result if isinstance(result, torch.Tensor) else result[0]).sum().item()
        return result

    layer.forward = waiting
    fast = FastModel(model)
    found, decoder = fast_answers(fast, prompts()[:1], (6,), 1)
    assert found == expected
    assert decoder.reason
    for _ in range(3):
        assert first_tokens(decoder, prompts()[:1]) == expected[0][:1]
    assert decoder.prefill_graphs.reason


@pytest.mark.parametrize("emulated", [False] if ON_GPU else [False, pytest.param(True, marks=pytest.mark.slow)])
def test_steps_in_16_bits_take_the_lanes_and_give_the_same(tmp_path, monkeypatch, emulated):
    """On the CPU their program is emulated in the long form, and otherwise replaced by the portable one."""
    model = load(tmp_path, "llama", dtype=torch.float16)
    questions, counts = prompts((5, 19) if ON_GPU else (2, 3)), (8, 6) if ON_GPU else (2, 2)
    expected = [own_answer(model, ids, count) for ids, count in zip(questions, counts, strict=True)]
    if emulated:
        from tests.kernels.lane_emulation import emulate

        emulate(monkeypatch)
    elif not ON_GPU:
        monkeypatch.setattr(gemv, "multiprocessors", lambda device: 1)

        def multiply(x, weight, operands, ranks, parts, constants, tiling):
            operands = (operands[0], operands[1].view(torch.int32), *operands[2:])
            gemv._multiply_portably(x, weight, operands, ranks, parts, constants, shuffle=False)

        monkeypatch.setattr(gemv, "_multiply_lanes", multiply)
    taken = []
    lanes = gemv._multiply_lanes
    monkeypatch.setattr(gemv, "_multiply_lanes", lambda x, *rest: (taken.append(x.shape[0]), lanes(x, *rest)))
    fast = FastModel(model)
    try:
        found, _ = fast_answers(fast, questions, counts, 2)
    finally:
        fast.close()
    assert found == expected and set(taken) >= {2}


# ---------------------------------------------------------------- guesses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16] if ON_GPU else [torch.float32])
@pytest.mark.parametrize("name", ARCHITECTURES if ON_GPU else [pytest.param("llama", marks=pytest.mark.slow)])
def test_steps_of_several_tokens_give_the_bits_of_steps_of_one(tmp_path, monkeypatch, name, dtype):
    """Guesses are what the answer will be, one in five wrong. Where bits are not the same none is taken: in float32, whose head
    cuBLAS multiplies otherwise for one row, and on a CPU, whose head is torch's own product."""
    model, (ids,) = load(tmp_path, name, dtype=dtype), prompts((9,))
    count = 40 if ON_GPU else 9
    fast = FastModel(model)
    made = []

    def answer(look_up):
        def open_decoder(rows, capacity):
            size = {"rows": rows, "capacity": capacity + WIDTH}
            made.append(GraphDecoder(fast, **size, sampling=SAMPLING, look_up=look_up, near=not ON_GPU))
            if look_up:
                made[-1].look_up = PromptLookUp(made[-1].cache.capacity, DEVICE)  # its guesses are told below
            return made[-1]

        return answer_with(open_decoder, [ids], (count,), 1)[0]

    answer(False)  # whose first step compares attention with the model's own, and takes that
    expected = answer(False)
    whole = torch.tensor([*ids, *expected, *[NOTHING] * 2 * WIDTH], device=DEVICE)
    told = torch.where(torch.arange(len(whole), device=DEVICE) % 5 == 3, (whole + 1).clamp(max=300), whole)
    ahead = torch.arange(1, WIDTH, device=DEVICE)
    monkeypatch.setattr(PromptLookUp, "guess", lambda self, last: told[last + ahead])
    assert answer(True) == expected
    assert fast.guesses is not Guesses.WRONG
    if dtype is torch.bfloat16 or not ON_GPU:
        assert made[-1].guessed_right > (10 if ON_GPU else 0)
        assert fast.guesses is Guesses.EQUAL or not ON_GPU
    fast.close()


# ---------------------------------------------------------------- prompts that came before


class ReplayedRun:
    """A CUDA graph without a GPU: nothing is computed until a replay, and then into the same tensor."""

    def __init__(self, run):
        self.run, self.result = run, run().fill_(float("nan"))

    def replay(self):
        self.result.copy_(self.run())


@pytest.fixture
def captured(monkeypatch):
    """`captured.capture` captures graphs, on a CPU without one; `captured.graphs` are they, in order."""
    if not ON_GPU:
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    graphs = []

    def capture(run, pool):
        if ON_GPU:
            graphs.append(prefill.capture(run, pool))
        else:
            graph = ReplayedRun(run)
            graphs.append((graph, graph.result))
        return graphs[-1]

    return SimpleNamespace(capture=capture, graphs=graphs)


@pytest.mark.parametrize(("step", "right"), [(lambda x: x + 1, True), (lambda x: x, False), (lambda x: x / 0, False)])
def test_a_replay_that_leaves_other_states_is_found(captured, step, right):
    state = torch.ones(2, 3, device=DEVICE)
    expected = state + 1
    graph, _ = captured.capture(lambda: state.copy_(step(state)), None)
    state.fill_(1)
    assert prefill.leaves(graph, [state], [expected]) is right


def first_tokens(decoder, questions):
    return decoder.prefill(range(len(questions)), [Prompt(ids) for ids in questions]).wait()


@pytest.mark.parametrize("name", ARCHITECTURES if ON_GPU else ("llama",))
def test_prompts_of_a_shape_that_came_before_give_the_same(tmp_path, captured, name):
    model = load(tmp_path, name)
    batches = [prompts(lengths) for lengths in ((5, 19, 9), (32, 2, 17), (11, 30, 12), (40, 7, 64), (50, 41, 33))]
    expected = [[own_answer(model, ids, 1)[0] for ids in batch] for batch in batches]
    fast = FastModel(model)
    if not ON_GPU:
        fast.layers.close()  # interpreted they take seconds, and other checks run them
    decoder = GraphDecoder(fast, rows=3, capacity=96, sampling=SAMPLING)
    decoder.prefill_graphs = PrefillGraphs(decoder.read_padded, None, captured.capture)

    def read():
        return [first_tokens(decoder, batch) for batch in batches]

    found = read()
    with model.disable_adapter():
        fast.refresh()
        bare = read()
    draw_b(model, seed=1)
    fast.refresh()
    other = read()
    following = decoder.step().wait() if ON_GPU else None  # it finds the keys and values where the graph has put them
    elsewhere = fast.adapters_elsewhere
    fast.close()
    if name not in MAY_NOT_BE_CAPTURED:
        assert decoder.prefill_graphs.reason is None
        assert set(decoder.prefill_graphs.graphs) == {(3, 32), (3, 64)} and len(captured.graphs) == 2
    assert found == expected
    assert other == [[own_answer(model, ids, 1)[0] for ids in batch] for batch in batches]
    assert following is None or following == [own_answer(model, ids, 2)[1] for ids in batches[-1]]
    with model.disable_adapter():
        # Where PEFT applies an adapter its graphs hold it; the session gives them up.
        assert elsewhere or bare == [[own_answer(model, ids, 1)[0] for ids in batch] for batch in batches]
    assert bare != found != other


def sum_up(padded):
    """A model: one number for each prompt that depends on its tokens and on where it ends."""
    return (padded.ids.sum(1) + 1000 * padded.ends + padded.ids.flatten()[padded.last]).float()[:, None]


def padded_prompts(lengths, length):
    batch = [Prompt(ids) for ids in prompts(lengths)]
    return pad_prompts(range(len(batch)), batch, length).to(DEVICE)


def test_padded_lengths_are_few_and_not_much_more_than_tokens():
    assert [bucket_length(n, 4000) for n in (1, 32, 33, 257, 513, 1900, 3999)] == [32, 32, 64, 288, 576, 1920, 4000]
    assert all(n <= bucket_length(n, 4000) <= max(n + 31, 1.125 * n) for n in range(1, 4001))
    padded = PaddedPrompts.of(torch.tensor([4, 2, 1, 3, 0, 5, 7, 7, 7, 8, 9, 10]), 2)
    assert torch.equal(pad_prompts([4, 2], [Prompt([7]), Prompt([8, 9, 10])], 3).whole, padded.whole)


def test_the_last_graphs_used_are_kept(captured):
    reader = PrefillGraphs(sum_up, None, captured.capture)
    for length in range(1, MOST_GRAPHS + 2):
        for lengths in ((length,), (1,), (max(1, length - 1),)):
            padded = padded_prompts(lengths, length)
            assert torch.equal(reader.read(padded), sum_up(padded))
        reader.read(padded_prompts((1,), 1))
    assert (1, 1) in reader.graphs and (1, 2) not in reader.graphs
    assert len(reader.graphs) == MOST_GRAPHS == len(captured.graphs) - 1
    many = padded_prompts((2,), MOST_TOKENS + 1)
    for _ in range(3):
        assert torch.equal(reader.read(many), sum_up(many))
    assert len(captured.graphs) == MOST_GRAPHS + 1


def test_a_capture_that_fails_is_the_last_one(captured):
    attempts = []

    def capture(run, pool):
        attempts.append(run)
        if len(attempts) == 1:
            return captured.capture(run, pool)
        run()
        raise torch.OutOfMemoryError("CUDA out of memory")

    reader = PrefillGraphs(sum_up, None, capture)
    for _ in range(2):
        reader.read(padded_prompts((3,), 4))
    assert len(reader.graphs) == 1
    for _ in range(3):
        padded = padded_prompts((5, 2), 8)
        assert torch.equal(reader.read(padded), sum_up(padded))
    assert "OutOfMemoryError: CUDA out of memory" in reader.reason and not reader.graphs and len(attempts) == 2


def test_graphs_make_room_for_a_prompt_that_needs_their_memory(captured):
    short = []

    def run(padded):
        if short and (reader.graphs or padded.ids.shape[1] > 9):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return sum_up(padded)

    reader = PrefillGraphs(run, None, captured.capture)
    for _ in range(2):
        reader.read(padded_prompts((3,), 4))
    short.append(True)
    padded = padded_prompts((5, 2), 8)
    assert torch.equal(reader.read(padded), sum_up(padded))
    assert reader.reason == "their memory was needed"
    with pytest.raises(torch.OutOfMemoryError):
        reader.read(padded_prompts((5,), 10))


def test_what_holds_for_a_step_is_found_out_anew_for_prompts():
    norm = LlamaRMSNorm(64).to(DEVICE)
    norm.forward = lambda x: LlamaRMSNorm.forward(norm, x) * (3 if x.shape[1] > 1 else 1)
    one, many = torch.randn(2, 1, 64, device=DEVICE), torch.randn(2, 5, 64, device=DEVICE)
    expected = norm(one), norm(many)
    layers = FastLayers(torch.nn.ModuleList([norm]))
    for use, x, wanted in (("step", one, expected[0]), ("prefill", many, expected[1])) * 2:
        with layers.used_for(use), torch.no_grad():
            torch.testing.assert_close(norm(x), wanted)
    assert [fits is None for fits in layers._norms.values()] == [False, True]


@pytest.mark.parametrize(
    ("kind", "fits"),
    [
        ("llama", True),
        ("granite", False),
        ("gpt_oss", False),
        *(pytest.param(n, True, marks=pytest.mark.slow) for n in ("gemma", "phi3")),
    ],
)
def test_residual_additions_are_computed_with_the_norms_that_read_them(kind, fits, monkeypatch):
    """Both of every layer, where it adds as llama's does; one that scales what it adds, or whose MLP returns more, is left alone."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    sizes |= {"num_local_experts": 2, "num_experts_per_tok": 1} if kind == "gpt_oss" else {}
    config = AutoConfig.for_model(kind, **sizes, num_hidden_layers=3, vocab_size=100, head_dim=32, pad_token_id=0)
    if not fits:
        config.residual_multiplier = 0.3
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(DEVICE).eval()
    ids, counts = torch.tensor([[5], [7]], device=DEVICE), []
    fused = fused_layers.add_and_rms_norm
    monkeypatch.setattr(fused_layers, "add_and_rms_norm", lambda *a, **n: counts.append(0) or fused(*a, **n))
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        layers = FastLayers(model)
        for _ in range(3):
            counts.clear()
            with layers.used_for("step"):
                torch.testing.assert_close(model(ids, use_cache=False).logits, expected, atol=1e-5, rtol=1e-5)
        assert len(counts) == (6 if fits else 0)
        layers.close()
        assert torch.equal(model(ids, use_cache=False).logits, expected)
