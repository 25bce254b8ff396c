"""The fast engine computes what the plain one does, rows never see one another, and the model comes back as it was."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from benchmarks.support.architectures import make_config
from qlora_cli.core.adapters.lora import attach_adapter
from qlora_cli.core.data.packing import collate
from qlora_cli.core.engine.calibration import StepPlanner
from qlora_cli.core.engine.cuda_graphs import bucketed
from qlora_cli.core.engine.decoder_layers import can_compile, saved_bytes_a_token
from qlora_cli.core.engine.engine import install_engine
from qlora_cli.core.engine.lora_linear import ATTRIBUTE, AdapterValues
from qlora_cli.core.engine.memory_plan import MemoryPlan, StepNeeds, count_recomputed_layers
from qlora_cli.core.models.files import resolve_model
from qlora_cli.core.models.structure import bytes_by_token, find_decoder, underlying_model
from qlora_cli.errors import ModelError, TrainingError, UsageError
from qlora_cli.events import Caution
from qlora_cli.settings.groups import LoraSettings, QuantizationSettings, StepSettings
from tests.adapted import draw_b
from tests.conftest import ARCHITECTURES, FEW, most_slow

CPU = torch.device("cpu")
PADDED = {"bloom"}  # outside the attention interface


def adapted(load_tiny, architecture, *, rank=4, **arguments):
    base, _ = load_tiny(architecture)
    return draw_b(attach_adapter(base, LoraSettings(rank=rank, alpha=8, **arguments))).train()


def install(model, kind="fast", events=None, *, max_tokens=128, trial=None, **options):
    settings = StepSettings(engine=kind, **{"gradient_checkpointing": "off", **options})
    report = (lambda event: None) if events is None else events.append
    run = {"max_tokens": max_tokens, "total_steps": 3, "trial": trial, "report": report}
    return install_engine(model, settings, device=CPU, compute_dtype=torch.float32, **run)


def batch_of(lengths=(40, 7, 33), *, seed=0, change=None):
    rng = np.random.default_rng(seed)
    rows = [(rng.integers(2, 384, n).astype(np.int32), rng.random(n) < 0.7) for n in lengths]
    if change is not None:
        row, token = change
        rows[row][0][token] = (rows[row][0][token] + 1) % 384
    return collate(rows, range(len(rows)))


def gradients(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def step(model, batch, **options):
    model.zero_grad(set_to_none=True)
    engine = install(model, **options)
    try:
        loss = engine.loss(batch)
        loss.backward()
        return loss.detach(), gradients(model), engine
    finally:
        engine.close()


@pytest.mark.each_choice
@pytest.mark.parametrize("gradient_checkpointing", ["off", "on"])
@pytest.mark.parametrize("architecture", most_slow(ARCHITECTURES, FEW))
def test_loss_and_gradients_are_the_plain_engines(load_tiny, architecture, gradient_checkpointing):
    model = adapted(load_tiny, architecture)
    batch = batch_of()
    plain_loss, plain_gradients, _ = step(model, batch, kind="plain")
    loss, fast_gradients, engine = step(model, batch, gradient_checkpointing=gradient_checkpointing)
    assert engine.packed == (architecture not in PADDED)
    assert len(engine.linears.fused) and not engine.linears.kept and engine.head is not None
    assert torch.allclose(loss, plain_loss, rtol=1e-6)
    assert (fast_gradients - plain_gradients).norm() <= 1e-5 * plain_gradients.norm()


@pytest.mark.parametrize("architecture", most_slow(ARCHITECTURES, FEW))
def test_no_token_sees_a_later_one_nor_another_row(load_tiny, architecture):
    model = adapted(load_tiny, architecture).eval()
    engine = install(model)
    lengths = (50, 40)  # longer than gemma's window of 32

    def hidden(change=None):
        seen = []
        handle = engine.decoder.register_forward_hook(lambda *call: seen.append(call[2].last_hidden_state))
        with torch.no_grad():
            engine.loss(batch_of(lengths, change=change))
        handle.remove()
        states = seen[0]
        return states[0].split(lengths) if engine.packed else [states[i, :n] for i, n in enumerate(lengths)]

    before, later_token, other_row = hidden(), hidden(change=(0, 30)), hidden(change=(0, 49))
    assert torch.equal(later_token[0][:30], before[0][:30]), "a token saw a later one"
    assert not torch.equal(later_token[0][30:], before[0][30:])
    assert torch.equal(later_token[1], before[1]), "a row saw another"
    assert torch.equal(other_row[1], before[1]), "a row saw the end of the row before"
    engine.close()


@pytest.mark.parametrize("architecture", most_slow(ARCHITECTURES, FEW))
def test_packed_rows_cost_what_they_cost_alone(load_tiny, architecture):
    model = adapted(load_tiny, architecture).eval()
    engine = install(model)
    lengths = (40, 7, 33)
    together = batch_of(lengths)
    rows, start = [], 0
    for n in lengths:
        ids, labels = (t[0, start : start + n].numpy() for t in (together.input_ids, together.labels))
        rows.append((ids.astype(np.int32), labels != -100))
        start += n
    with torch.no_grad():
        alone = sum(engine.loss(collate([row], [0])) for row in rows)
        assert torch.allclose(engine.loss(together), alone, rtol=1e-6)
    engine.close()


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox", "bloom", "gemma2"])
def test_the_logits_after_each_row_are_the_models_own(load_tiny, architecture):
    model, batch = adapted(load_tiny, architecture).eval(), batch_of()
    starts = batch.cu_seqlens.tolist()
    with torch.no_grad():
        rows = [batch.input_ids[:, a:b] for a, b in itertools.pairwise(starts)]
        expected = torch.cat([model(input_ids=row, use_cache=False).logits[:, -1] for row in rows])
        for kind in ("plain", "fast"):
            engine = install(model, kind)
            found = engine.next_logits(batch)
            engine.close()
            torch.testing.assert_close(found.float(), expected.float(), rtol=1e-4, atol=1e-4)


def test_falcon_variants_are_packed_or_padded_right(load_tiny, tiny_model):
    from qlora_cli.core.models.loading import load_base

    variants = (
        ({"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 2}, True),
        ({"multi_query": False, "parallel_attn": False, "bias": True}, True),
        ({"alibi": True}, False),
    )
    for changes, packed in variants:
        directory = tiny_model("falcon", **changes)
        base, _ = load_base(
            resolve_model(str(directory)),
            QuantizationSettings(base_cache=False),
            compute_dtype=torch.float32,
            device=CPU,
        )
        model = attach_adapter(base, LoraSettings(rank=4, alpha=8)).train()
        plain_loss, plain_gradients, _ = step(model, batch_of(), kind="plain")
        loss, fast_gradients, engine = step(model, batch_of())
        assert engine.packed == packed
        assert torch.allclose(loss, plain_loss, rtol=1e-6)
        assert (fast_gradients - plain_gradients).norm() <= 1e-5 * plain_gradients.norm()


def test_sliding_windows_are_kept_inside_a_pack(tiny_model):
    from qlora_cli.core.models.loading import load_base

    directory = tiny_model("mistral", sliding_window=8)
    base, _ = load_base(
        resolve_model(str(directory)), QuantizationSettings(base_cache=False), compute_dtype=torch.float32, device=CPU
    )
    model = attach_adapter(base, LoraSettings(rank=4, alpha=8)).train()
    plain_loss, _, _ = step(model, batch_of(), kind="plain")
    loss, _, engine = step(model, batch_of())
    assert engine.packed and torch.allclose(loss, plain_loss, rtol=1e-6)


OTHERS = ["dora", "two adapters", "merged", "disabled", "lora bias"]


@pytest.mark.parametrize("change", most_slow(OTHERS, ["dora", "two adapters", "lora bias"]))
def test_what_the_op_does_not_cover_goes_to_pefts_own_forward(load_tiny, change):
    from peft import LoraConfig

    base, _ = load_tiny("llama")
    model = draw_b(attach_adapter(base, LoraSettings(rank=4, alpha=8, dora=change == "dora"))).train()
    covered = install(model)
    fused = len(covered.linears.fused)
    covered.close()
    if change == "two adapters":
        model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        model.base_model.set_adapter(["default", "second"])
    if change == "lora bias":
        model.add_adapter("second", LoraConfig(r=2, target_modules="all-linear", lora_bias=True))
        model.set_adapter("second")
    if change == "merged":
        model.merge_adapter()
    if change == "disabled":
        model.base_model.disable_adapter_layers()
    engine = install(model)
    assert len(engine.linears.fused) < fused or change == "dora"
    assert not any(linear.adapter for linear in engine.linears.fused)
    with torch.no_grad():
        fast = engine.loss(batch_of())
        engine.close()
        plain = install(model, kind="plain").loss(batch_of())
    assert torch.allclose(fast, plain, rtol=1e-6)


def test_an_adapter_disabled_after_installation_is_left_out_at_once(load_tiny):
    model = adapted(load_tiny, "gpt_neox")
    engine = install(model)
    with torch.no_grad():
        with_adapter = engine.loss(batch_of())
        with model.disable_adapter():
            without = engine.loss(batch_of())
        again = engine.loss(batch_of())
    engine.close()
    assert torch.equal(with_adapter, again) and not torch.allclose(with_adapter, without)


@pytest.mark.parametrize("target", ["lm_head", "embed_out"])
def test_a_trained_head_gets_its_gradient(load_tiny, target):
    base, _ = load_tiny("llama")
    keywords = {"modules_to_save": ("lm_head",)} if target == "lm_head" else {"target_modules": ("q_proj", "lm_head")}
    model = attach_adapter(base, LoraSettings(rank=4, alpha=8, **keywords)).train()
    plain_loss, plain_gradients, _ = step(model, batch_of(), kind="plain")
    loss, fast_gradients, _ = step(model, batch_of())
    assert torch.allclose(loss, plain_loss, rtol=1e-6)
    assert (fast_gradients - plain_gradients).norm() <= 1e-5 * plain_gradients.norm()


def test_head_scaling_and_caps_are_honoured(tiny_model):
    import transformers

    from qlora_cli.core.engine.lm_head import find_head
    from qlora_cli.core.models.structure import find_decoder

    small = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    small["num_key_value_heads"] = 2
    cases = [
        ("GraniteConfig", {"logits_scaling": 8.0, "intermediate_size": 32}),
        ("CohereConfig", {"logit_scale": 0.0625, "intermediate_size": 32}),
        ("Gemma2Config", {"final_logit_softcapping": 3.0, "head_dim": 16, "intermediate_size": 32}),
        ("PhiConfig", {"intermediate_size": 32}),  # a biased head
        ("GPTJConfig", {"rotary_dim": 4}),
    ]
    found = []
    for name, arguments in cases:
        config = getattr(transformers, name)(**small, **arguments, bos_token_id=0, eos_token_id=0, pad_token_id=1)
        model = transformers.AutoModelForCausalLM.from_config(config).requires_grad_(False)
        head = find_head(model, find_decoder(model), {"input_ids": torch.arange(8)[None]})
        assert head is not None and head.frozen, name
        found.append((head.logit_scale, head.softcap))
    assert found == [(0.125, None), (0.0625, None), (1.0, 3.0), (1.0, None), (1.0, None)]


def test_dropout_is_repeated_by_recomputation_and_seeded_by_torch(load_tiny):
    model = adapted(load_tiny, "llama", dropout=0.3)
    batch = batch_of()

    def run(seed, gradient_checkpointing):
        torch.manual_seed(seed)
        return step(model, batch, gradient_checkpointing=gradient_checkpointing)[:2]

    loss, kept = run(0, "off")
    same_loss, recomputed = run(0, "on")
    other_loss, _ = run(1, "off")
    assert torch.equal(loss, same_loss) and torch.allclose(kept, recomputed, rtol=1e-4, atol=1e-7)
    assert not torch.equal(loss, other_loss)
    model.eval()
    with torch.no_grad():
        engine = install(model)
        assert torch.equal(engine.loss(batch), engine.loss(batch))
        engine.close()


@pytest.mark.parametrize("what", ["noise", "pefts own dropout"])
def test_what_layers_draw_is_repeated_by_recomputation(load_tiny, what):
    """Jitter as routers have it, in no module of its own, and dropout of an adapter that keeps PEFT's own forward."""
    model = adapted(load_tiny, "llama", dropout=0.3 if what != "noise" else 0.0, dora=what != "noise")
    if what == "noise":
        for module in model.modules():
            if type(module).__name__ == "LlamaMLP":
                own = module.forward
                module.forward = lambda x, m=module, own=own: own(
                    x * torch.empty_like(x).uniform_(0.5, 1.5) if m.training else x
                )
    model.eval()  # as a model is when an engine is installed
    state, batch, found = torch.get_rng_state(), batch_of(), []
    for recomputed in ("off", "on"):
        engine = install(model, gradient_checkpointing=recomputed)
        assert torch.equal(torch.get_rng_state(), state) and not model.training
        model.train().zero_grad(set_to_none=True)
        torch.manual_seed(0)
        loss = engine.loss(batch)
        loss.backward()
        engine.close()
        model.eval()
        torch.set_rng_state(state)
        found.append((loss.detach(), gradients(model)))
    assert torch.equal(found[0][0], found[1][0]) and torch.allclose(found[0][1], found[1][1], rtol=1e-4, atol=1e-6)


def test_recomputation_leaves_out_the_last_linear(load_tiny):
    model = adapted(load_tiny, "gpt_neox")
    engine = install(model, gradient_checkpointing="on")
    assert engine.skipped == ["attention.dense", "mlp.dense_4h_to_h"]
    engine.close()


def test_what_one_layer_does_not_call_and_another_needs_is_computed_again(load_tiny):
    model = adapted(load_tiny, "llama")
    layers = model.get_base_model().model.layers
    layers[0].of_another = layers[1].self_attn.q_proj
    batch = batch_of()
    (_, kept, _), (_, repeated, _) = (step(model, batch, gradient_checkpointing=how) for how in ("off", "on"))
    assert (repeated - kept).norm() <= 1e-5 * kept.norm()


@pytest.mark.parametrize("architecture", ["gpt_neox", "falcon"])
def test_a_first_layer_keeps_little_where_only_attention_is_adapted(load_tiny, architecture):
    def kept(*targets):
        engine = install(adapted(load_tiny, architecture, target_modules=targets))
        layer, call = engine.layers[0], engine.calls[0]
        found = [saved_bytes_a_token(layer, call, input_gradient=wanted) for wanted in (True, False)]
        engine.close()
        return found

    whole, without_input = kept("query_key_value")
    assert 0 < without_input < 0.6 * whole
    whole, without_input = kept("query_key_value", "dense_h_to_4h", "dense_4h_to_h")
    assert 0.8 * whole < without_input < whole


def test_packed_weights_give_the_same_as_resident_ones(load_tiny):
    model = adapted(load_tiny, "llama")
    resident = step(model, batch_of(), resident_weights=True)
    packed = step(model, batch_of(), resident_weights=False)
    assert torch.equal(resident[0], packed[0]) and torch.equal(resident[1], packed[1])
    assert all(linear.weight.dense is None for linear in packed[2].linears.fused)


def test_closing_puts_every_instance_back(load_tiny):
    model = adapted(load_tiny, "falcon")
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    implementation = model.config._attn_implementation
    engine = install(model, gradient_checkpointing="on")
    engine.loss(batch_of()).backward()
    engine.close()
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert model.config._attn_implementation == implementation


def test_a_second_model_is_not_touched(load_tiny):
    untouched = adapted(load_tiny, "llama").eval()
    ids = torch.arange(5, 30)[None]
    with torch.no_grad():
        before = untouched(input_ids=ids).logits
        engine = install(adapted(load_tiny, "llama"))
        assert torch.equal(untouched(input_ids=ids).logits, before)
    engine.close()


def test_a_batch_with_nothing_trained_has_zero_loss_and_gradient(load_tiny):
    model = adapted(load_tiny, "llama")
    batch = collate([(np.arange(5, 15, dtype=np.int32), np.zeros(10, dtype=bool))], [0])
    loss, gradient, _ = step(model, batch)
    assert loss.item() == 0 and not gradient.any()


@pytest.mark.slow
def test_fifty_steps_follow_the_plain_engines_losses(load_tiny):
    curves = []
    for kind in ("plain", "fast"):
        model = adapted(load_tiny, "llama")
        engine = install(model, kind=kind)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
        losses = []
        for number in range(50):
            batch = batch_of((20, 9, 14), seed=number % 5)
            optimizer.zero_grad()
            loss = engine.loss(batch) / batch.trained_tokens
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curves.append(np.array(losses))
        engine.close()
    assert curves[0][-5:].mean() < 0.8 * curves[0][:5].mean(), "the model has to learn for this to mean anything"
    assert np.abs(curves[0] - curves[1]).max() < 1e-3


@pytest.mark.parametrize("word", ["auto", "on", "off", "1", "99"])
def test_gradient_checkpointing_takes_words_and_numbers(word):
    settings = StepSettings(gradient_checkpointing=word)
    assert count_recomputed_layers(settings, 4) == {"auto": None, "on": 4, "off": 0, "1": 1, "99": 4}[word]


def test_the_plain_engine_recomputes_all_layers_or_none():
    for word, counts in {"auto": (4, 0), "on": (4, 4), "off": (0, 0), "1": (4, 4), "0": (0, 0)}.items():
        settings = StepSettings(engine="plain", gradient_checkpointing=word)
        assert tuple(count_recomputed_layers(settings, 4, on_cuda=on_cuda) for on_cuda in (True, False)) == counts


def test_the_plain_engine_says_that_text_is_no_image_where_a_model_does_not_train_without(load_tiny, monkeypatch):
    """As Molmo 2 does not."""
    model, batch, asked = adapted(load_tiny, "llama"), batch_of(), []
    loss, expected, _ = step(model, batch, kind="plain")
    base = model.get_base_model()
    forward = base.forward

    def choosy(*arguments, mm_token_type_ids=None, **keywords):
        if base.training and mm_token_type_ids is None:
            raise ValueError("`mm_token_type_ids` is required as a model input when training")
        asked.append(mm_token_type_ids)
        return forward(*arguments, **keywords)

    monkeypatch.setattr(base, "forward", choosy)
    again, found, _ = step(model, batch, kind="plain")
    assert again == loss and torch.equal(found, expected)
    assert asked[-1].shape == (3, 40) and not asked[-1].any()


def test_unknown_words_are_refused(load_tiny):
    model = adapted(load_tiny, "llama")
    with pytest.raises(UsageError, match="sometimes"):
        install(model, gradient_checkpointing="sometimes")
    with pytest.raises(UsageError, match="warp"):
        install(model, kind="warp")


def test_an_engine_that_ran_out_of_memory_recomputes_more_until_nothing_is_left(load_tiny):
    model = adapted(load_tiny, "llama")
    batch = batch_of()
    loss, expected, _ = step(model, batch)
    engine = install(model, events=(events := []))
    assert not engine.reduce_memory()  # nothing is planned on the CPU
    mebi = 2**20
    needs = StepNeeds(layers=2, kept_bytes=300 * mebi, peak_bytes=300 * mebi, hidden_bytes=mebi)
    engine.planner = StepPlanner(
        StepSettings(offload_activations=False, offload_embeddings=False, resident_weights=False), 128
    )
    engine.planner.needs, engine.planner.available_bytes = needs, 2**30 + 2**28
    counts = []
    while engine.reduce_memory():
        counts.append(engine.plan.recomputed)
        model.zero_grad(set_to_none=True)
        again = engine.loss(batch)
        again.backward()
        assert torch.allclose(again, loss) and torch.allclose(gradients(model), expected, atol=1e-5)
    assert counts[-1] == 2 and counts == sorted(counts) and len(events) == len(counts)


def test_an_adapted_embedding_trains_beside_fused_linears(load_tiny):
    batch = batch_of()
    found = []
    for kind in ("plain", "fast"):
        base, _ = load_tiny("llama")
        model = attach_adapter(
            base, LoraSettings(rank=4, alpha=8, target_modules=("q_proj", "embed_tokens")), seed=0
        ).train()
        with torch.no_grad():
            for name, parameter in sorted(model.named_parameters()):
                if parameter.requires_grad:
                    parameter.copy_(
                        0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
                    )
        loss, gradients_, _ = step(model, batch, kind=kind)
        found.append((loss, gradients_))
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-6)
    assert (found[0][1] - found[1][1]).norm() <= 1e-5 * found[0][1].norm()


class Deeper(torch.nn.Module):
    """The same, its parts one name further down."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


def test_layers_of_one_class_with_other_parts_are_recomputed_each_in_its_way(load_tiny):
    model = adapted(load_tiny, "llama")
    batch = batch_of()
    loss, expected, _ = step(model, batch)
    last = model.get_base_model().model.layers[-1]
    last.mlp = Deeper(last.mlp)  # as where dense layers come before layers with experts
    again, found, engine = step(model, batch, gradient_checkpointing="on")
    assert set(engine.skipped) == {"mlp.down_proj", "mlp.inner.down_proj"}
    assert torch.allclose(again, loss, rtol=1e-6) and (found - expected).norm() <= 1e-5 * expected.norm()


def test_no_room_to_try_a_layer_out_is_told_in_one_sentence(load_tiny):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 64.00 MiB.\nMore lines.")

    model = adapted(load_tiny, "llama")
    model.get_base_model().model.layers[0].register_forward_pre_hook(full)
    with pytest.raises(TrainingError, match="no room on the device to run one layer") as reported:
        install(model)
    assert "\n" not in reported.value.message and "--vram" in reported.value.hint
    assert not any(hasattr(module, ATTRIBUTE) for module in model.modules()), "the model is left as it was"


def test_a_model_that_the_fast_engine_does_not_run_is_trained_plainly_and_that_is_said(load_tiny):
    """Such as deepseek_v4, whose routers want the tokens themselves; what runs nowhere is refused."""
    model, batch, events = adapted(load_tiny, "llama"), batch_of(), []
    expected, gradient, _ = step(model, batch, kind="plain")
    decoder = model.get_base_model().model
    own = decoder.forward

    def of_tokens(input_ids=None, **named):
        if input_ids is None:
            raise AttributeError("'NoneType' object has no attribute 'reshape'")
        return own(input_ids=input_ids, **named)

    decoder.forward = of_tokens
    loss, found, engine = step(model, batch, events=events)
    assert engine.describe() == "plain" and torch.equal(loss, expected) and torch.equal(found, gradient)
    assert [event for event in events if isinstance(event, Caution) and "AttributeError" in event.text]
    with pytest.raises(AttributeError):  # which the plain engine would leave out
        install(model, matmul="fp8")

    decoder.forward = lambda **named: named["nothing"]
    for kind in ("fast", "plain"):
        with pytest.raises(ModelError, match="llama does not run on a base in 4 bits: its own code ends in KeyError"):
            install(model, kind)


def test_rows_are_padded_where_given_positions_are_others_than_the_models_own(load_tiny):
    """Such as kosmos-2.5, which counts from 2 where it is given none: each layer by itself computes as before."""
    model, batch = adapted(load_tiny, "gpt2"), batch_of()
    decoder = model.get_base_model().transformer
    own = decoder.forward

    def counting_from_2(*given, position_ids=None, inputs_embeds=None, **named):
        if position_ids is None:
            tokens = given[0] if given else named.get("input_ids", inputs_embeds)
            position_ids = torch.arange(2, 2 + tokens.shape[1])[None]
        return own(*given, position_ids=position_ids, inputs_embeds=inputs_embeds, **named)

    decoder.forward = counting_from_2
    _, plain, _ = step(model, batch, kind="plain")
    _, found, engine = step(model, batch)
    assert not engine.packed and torch.allclose(found, plain, rtol=1e-4, atol=1e-5)


@pytest.fixture
def looking_up():
    """A model whose layers look tokens up in a table of their own, and of which the last has the keys of another."""

    def build(kind):
        kinds = {"num_hidden_layers": 3, "layer_types": ["sliding_attention", "full_attention", "full_attention"]}
        table = {"hidden_size_per_layer_input": 64, "vocab_size_per_layer_input": 384, "num_kv_shared_layers": 1}
        sizes = {
            "vocab_size": 384,
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_attention_heads": 4,
            "head_dim": 16,
        }
        config = getattr(transformers, kind)(
            **{**sizes, **kinds, **table, "num_key_value_heads": 2, "sliding_window": 16, "pad_token_id": 0},
            **({"laurel_rank": 64, "altup_num_inputs": 2} if "3n" in kind else {"global_head_dim": 16}),
        )
        torch.manual_seed(0)
        base = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in base.parameters():
                parameter.normal_(0, 0.1)
        model = attach_adapter(base, LoraSettings(rank=4, alpha=8)).train()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_(0, 0.1)
        return model

    return build


@pytest.mark.parametrize("kind", ["Gemma3nTextConfig", "Gemma4TextConfig"])
def test_layers_that_look_tokens_up_again_train_on_what_they_find(looking_up, kind):
    model, batch = looking_up(kind), batch_of()
    _, plain, _ = step(model, batch, kind="plain")
    for checkpointing in ("off", "on"):
        _, found, engine = step(model, batch, gradient_checkpointing=checkpointing)
        assert engine.packed
        assert (found - plain).norm() <= 1e-5 * plain.norm()


@pytest.mark.parametrize("kind", ["Gemma3nTextConfig", "Gemma4TextConfig"])
def test_what_fills_a_pack_up_for_a_graph_changes_no_gradient_of_layers_that_look_tokens_up(looking_up, kind):
    model, batch = looking_up(kind), batch_of()
    _, plain, _ = step(model, batch, kind="plain")
    model.zero_grad(set_to_none=True)
    engine = install(model)
    engine._packed_loss(bucketed(engine._inputs(batch))).backward()
    assert (gradients(model) - plain).norm() <= 1e-5 * plain.norm()


def test_tables_that_go_by_token_ids_are_given_these_and_not_what_noisy_embeddings_look_like():
    config = make_config("qwen4_exp_text")
    config.vocab_size = 384
    base = transformers.AutoModelForCausalLM.from_config(config)
    model, losses = draw_b(attach_adapter(base, LoraSettings(rank=4, alpha=8))).train(), []
    for kind in ("plain", "fast"):
        engine = install(model, kind, neftune_noise_alpha=5.0)
        assert ("fast" in engine.describe()) == (kind == "fast")
        torch.manual_seed(0)
        losses.append(engine.loss(batch_of()).detach())
        engine.close()
    assert torch.allclose(*losses, rtol=1e-5)


def test_layers_with_several_hidden_states_a_token_are_not_compiled(looking_up):
    """The compiler fails on them, at the first step."""
    assert not can_compile(install(looking_up("Gemma3nTextConfig")).calls)
    assert can_compile(install(looking_up("Gemma4TextConfig")).calls)


@pytest.mark.parametrize(("kind", "states"), [("Gemma3nTextConfig", 2), ("Gemma4TextConfig", 1)])
def test_all_hidden_states_of_a_token_count_as_memory_that_waits(looking_up, monkeypatch, kind, states):
    trials = (engine := install(looking_up(kind))).trials
    monkeypatch.setattr("qlora_cli.core.engine.calibration.measure_layer", lambda *_: None)
    trials.measure(engine.layers[0], 96)
    assert (trials.hidden_bytes, trials.state_bytes) == (states * 64 * 4, 64 * 4)


def test_what_is_looked_up_for_each_token_is_counted_as_memory_of_a_step(looking_up):
    decoder = find_decoder(underlying_model(looking_up("Gemma4TextConfig")))
    assert bytes_by_token(decoder) == 3 * 64 * 4
    needs, more = StepNeeds(layers=3, hidden_bytes=2**20), 2**24
    plans = MemoryPlan(), MemoryPlan(recomputed=3)
    assert all(p.step_bytes(replace(needs, by_token_bytes=more)) == p.step_bytes(needs) + more for p in plans)


def test_a_model_that_looks_up_embeddings_alone_is_not_run_again_to_see_whether_it_looks_up_more(load_tiny):
    """Where rows are padded: two passes of a large base that streams, and of experts that go by the last bit."""
    model = adapted(load_tiny, "bloom")
    runs = []
    model.get_base_model().transformer.register_forward_hook(lambda *_: runs.append(1))
    engine = install(model)
    # The head is found, by three passes; what layers are called with, by one.
    assert not engine.packed and len(runs) == 4


def test_layers_that_see_token_ids_in_another_way_are_trained_plainly_and_that_is_said(looking_up, monkeypatch):
    model, events = looking_up("Gemma3nTextConfig"), []
    for module in ("fast", "calibration"):
        monkeypatch.setattr(f"qlora_cli.core.engine.{module}.inputs_by_token", lambda decoder, ids: {})
    assert install(model, events=events).describe() == "plain"
    assert "its layers see token ids besides the embeddings" in events[-1].text


@pytest.mark.parametrize("kind", ["fast", "plain"])
def test_a_model_that_reads_ahead_is_refused(kind):
    """BERT has a head of a language model, and sees the token that it is to predict unless `is_decoder` is set."""
    from transformers import BertConfig, BertLMHeadModel

    sizes = {"vocab_size": 384, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    for is_decoder in (True, False):
        config = BertConfig(**sizes, intermediate_size=128, is_decoder=is_decoder)
        model = attach_adapter(BertLMHeadModel(config), LoraSettings(rank=4, alpha=8)).train()
        if is_decoder:
            install(model, kind).close()
        else:
            with pytest.raises(ModelError, match="depend on the tokens behind them"):
                install(model, kind)
        assert model.training


def test_adapters_that_lie_together_are_copied_together_and_what_lies_between_is_not():
    buffer = torch.randn(60_000)
    places = {"a": (0, (2, 8)), "b": (256, (8, 2)), "far a": (50_176, (2, 8)), "far b": (50_432, (8, 2))}
    views = {
        name: nn.Parameter(buffer[at : at + torch.Size(shape).numel()].view(shape))
        for name, (at, shape) in places.items()
    }
    linears = [SimpleNamespace(a=views[f"{where}a"], b=views[f"{where}b"]) for where in ("", "far ")]
    values = AdapterValues(torch.bfloat16)
    values.take(linears)
    for _ in range(2):
        values.refresh()
        for linear in linears:
            assert torch.equal(linear.lora_a, linear.a.bfloat16()) and torch.equal(linear.lora_b, linear.b.bfloat16())
        buffer += 1.0
    assert len(values.copies) == 2 and sum(copy.numel() for copy in values.copies) < 1000
