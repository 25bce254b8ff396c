"""Attention with sinks in the fast engine: rows packed or padded cost what transformers' own attention makes of them."""

from functools import partial

import pytest
import torch
import transformers

from qlora_cli.core.adapters.lora import attach_adapter
from qlora_cli.core.engine.calibration import Calibration
from qlora_cli.core.engine.engine import install_engine
from qlora_cli.core.engine.lora_linear import AdapterValues
from qlora_cli.core.engine.packed_attention import _attend_pack, install_attention, pack_mask, takes_equal_rows
from qlora_cli.core.models.structure import find_decoder, underlying_model
from qlora_cli.events import Notice
from qlora_cli.settings.groups import LoraSettings, StepSettings
from tests.adapted import draw_b
from tests.engine import cpu_attention  # noqa: F401 - lets compiled layers attend on the CPU
from tests.engine.test_cuda_graphs import compile_layers
from tests.engine.test_engine import batch_of, gradients, install, step

SIZES = {
    "vocab_size": 384,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 2}  # all, since which is met is decided by rounding
MODELS = {
    "gpt_oss": {**SIZES, **EXPERTS, "head_dim": 16, "sliding_window": 8},
    "granitemoe_swa": {**SIZES, **EXPERTS, "sliding_window": 8},
}


def build(kind, **changes):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**MODELS[kind], **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for name, parameter in model.named_parameters():
        if "sinks" in name:
            torch.nn.init.uniform_(parameter, 0.0, 6.0)  # up to nearly all of a short row's weight
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    model = attach_adapter(model, LoraSettings(rank=4, alpha=8, target_modules=("q_proj", "v_proj", "o_proj")))
    return draw_b(model).train()


@pytest.mark.parametrize("kind", MODELS)
def test_loss_and_gradients_are_the_plain_engines_packed_and_padded(kind, monkeypatch):
    if kind not in transformers.CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {kind}")
    model, batch = build(kind), batch_of()
    plain_loss, plain_gradients, _ = step(model, batch, kind="plain")

    def agrees(loss, found):
        return torch.allclose(loss, plain_loss, rtol=1e-5) and (found - plain_gradients).norm() <= 1e-4 * (
            plain_gradients.norm()
        )

    for recomputed in ("off", "on"):
        loss, found, engine = step(model, batch, gradient_checkpointing=recomputed)
        assert engine.packed and not engine.equal_rows and agrees(loss, found)
    monkeypatch.setattr(model.config, "use_bidirectional_attention", True, raising=False)
    events = []
    loss, found, engine = step(model, batch, events=events)
    assert not engine.packed and agrees(loss, found)
    assert not any("all of its scores" in event.text for event in events)


@pytest.mark.slow  # compiling experts takes half a minute
def test_compiled_layers_cost_what_the_plain_engines_do():
    model, batch = build("gpt_oss"), batch_of()
    plain_loss, plain_gradients, _ = step(model, batch, kind="plain")
    model.zero_grad(set_to_none=True)
    engine = install(model)
    compile_layers(engine)
    loss = engine.loss(batch)
    loss.backward()
    engine.close()
    assert torch.allclose(loss, plain_loss, rtol=1e-5)
    assert (gradients(model) - plain_gradients).norm() <= 1e-4 * plain_gradients.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [(40, 7, 33), (300, 1, 150)])
def test_a_step_on_the_gpu_is_as_exact_as_the_models_own_attention(lengths):
    batch, found = batch_of(lengths), {}
    for kind, dtype, place in (("plain", torch.float32, "cpu"), ("plain", torch.bfloat16, "cuda"), ("fast", 0, "cuda")):
        dtype = dtype or torch.bfloat16
        model = build("gpt_oss", head_dim=64, max_position_embeddings=512).to(place)
        model.base_model.model.to(dtype)
        settings = StepSettings(engine=kind, gradient_checkpointing="on", compile=False)
        run = {"max_tokens": 512, "total_steps": 3, "report": lambda event: None}
        engine = install_engine(model, settings, device=torch.device(place), compute_dtype=dtype, **run)
        loss = engine.loss(batch)
        loss.backward()
        found[kind, place] = loss.double().cpu(), gradients(model).double().cpu()
        if kind == "fast":
            assert engine.packed
    exact_loss, exact = found["plain", "cpu"]
    (plain_loss, plain), (fast_loss, fast) = found["plain", "cuda"], found["fast", "cuda"]
    assert (fast - exact).norm() <= 2 * (plain - exact).norm() + 1e-3 * exact.norm()
    assert (fast_loss - exact_loss).abs() <= 2 * (plain_loss - exact_loss).abs() + 5e-3 * exact_loss.abs()


@pytest.mark.parametrize(("kind", "name"), [("gpt_oss", "position_bias"), ("llama", "sinks")])
def test_attention_that_is_given_more_than_is_known_stays_the_models_own(kind, name, monkeypatch):
    """A bias; or sinks under another name, as each token's own in Inkling 2, which SDPA leaves out without a word."""
    monkeypatch.setitem(MODELS, "llama", SIZES)
    model = build(kind)
    base = underlying_model(model)
    decoder = find_decoder(base)
    decoder.layers[0].self_attn.register_parameter("sinks", torch.nn.Parameter(torch.ones(4)))
    for layer in decoder.layers:
        layer.self_attn.forward = partial(layer.self_attn.forward, **{name: torch.ones(1)})
    events: list[Notice] = []
    values = AdapterValues(torch.float32)
    trials = Calibration(model, decoder, base.get_input_embeddings(), values, torch.device("cpu"))
    before = decoder.config._attn_implementation
    packed, _ = install_attention(base, decoder, trials, events.append)
    assert not packed and decoder.config._attn_implementation == before
    assert [event.text.partition(" (")[0] for event in events][
        1
    ] == "Attention with sinks holds all of its scores at once"


def test_packs_of_equal_rows_attend_as_by_their_boundaries_with_sinks_and_windows():
    torch.manual_seed(0)
    module, rows, longest = torch.nn.Module(), 3, 12
    query, key, value = (torch.randn(rows * longest, heads, 8, dtype=torch.float64) for heads in (4, 2, 2))
    boundaries = torch.arange(rows + 1, dtype=torch.int32) * longest
    masks = [pack_mask(boundaries, longest, equal_rows) for equal_rows in (0, rows)]
    sinks = torch.randn(4, dtype=torch.float64)
    for given in ((None, sinks), (5, sinks), (5, None)):
        own, found = (_attend_pack(module, query, key, value, mask, 0.3, *given) for mask in masks)
        assert torch.allclose(found, own, rtol=0, atol=1e-12)


def test_equal_rows_go_by_themselves_where_heads_are_such_as_cudnn_takes():
    for size, takes in ((64, True), (16, False)):
        decoder = find_decoder(underlying_model(build("gpt_oss", head_dim=size)))
        assert takes_equal_rows(decoder, torch.device("cuda")) is takes
