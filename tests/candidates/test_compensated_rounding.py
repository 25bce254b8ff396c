"""A weight that is rounded after others makes up for what those lost, as far as that holds on other rows."""

from functools import partial

import pytest
import torch
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from qlora_cli.core.calibration.activation_stream import ActivationStream
from qlora_cli.core.candidates.compensated_rounding import Shortfall, round_layer, share_of_stream, silenced
from qlora_cli.core.candidates.losses import ReplacedLinears

SIZES = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32}
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES, num_attention_heads=2)),
    "gpt_neox": (GPTNeoXForCausalLM, GPTNeoXConfig(**SIZES, num_attention_heads=2)),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config(**SIZES, **HEADS)),
    "granite": (GraniteForCausalLM, GraniteConfig(**SIZES, num_attention_heads=2, residual_multiplier=0.25)),
}


def make(architecture: str, batches: int = 1):
    """A random model, and batches of tokens drawn by a few repeated words."""
    torch.manual_seed(0)
    kind, config = MODELS[architecture]
    model = kind(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    return model, [torch.randint(0, 128, (8, 32), generator=generator) for _ in range(batches)]


@pytest.mark.parametrize(
    ("architecture", "last_of_attention", "last_of_mlp", "expected"),
    [
        ("llama", "self_attn.o_proj", "mlp.down_proj", 1.0),
        ("gpt_neox", "attention.dense", "mlp.dense_4h_to_h", 1.0),
        ("granite", "self_attn.o_proj", "mlp.down_proj", 0.25),
        ("gemma2", "self_attn.o_proj", "mlp.down_proj", None),  # through a norm
    ],
)
def test_what_a_linear_layer_gives_is_seen_to_be_added_to_the_stream(
    architecture, last_of_attention, last_of_mlp, expected
):
    model, batches = make(architecture)
    stream = ActivationStream(model, batches)
    linears = {name: m for name, m in stream.layers[0].named_modules() if isinstance(m, nn.Linear)}
    mlp = [module for name, module in linears.items() if "mlp" in name]
    with silenced(mlp):
        found = share_of_stream(stream, linears[last_of_attention])
        assert found == (None if expected is None else pytest.approx(expected, rel=1e-3))
    found = share_of_stream(stream, linears[last_of_mlp])
    assert found == (None if expected is None else pytest.approx(expected, rel=1e-3))
    others = linears.keys() - {last_of_attention, last_of_mlp}
    assert all(share_of_stream(stream, linears[name]) is None for name in others)


def test_what_is_lacking_is_answered_as_far_as_it_holds_on_tokens_left_out():
    torch.manual_seed(0)
    true, noise = torch.randn(8, 32), 0.5
    found, checked, unrelated = Shortfall(), Shortfall(), Shortfall()
    for part, tokens in ((found, 400), (checked, 200)):
        x = torch.randn(tokens, 32)
        part.add(x @ true.T + noise * torch.randn(tokens, 8), x)
    answer = found.answer()
    assert float((answer - true).norm() / true.norm()) < 0.05
    assert checked.share_of(answer) > 0.95
    unrelated.add(torch.randn(40, 8), torch.randn(40, 32))
    other = Shortfall()
    other.add(torch.randn(400, 8), torch.randn(400, 32))
    assert other.share_of(unrelated.answer()) < 0.1
    found.merge(checked)
    assert found.moment.tokens == 600 and found.products.shape == (8, 32)


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox", "gemma2", "granite"])
def test_the_second_layer_makes_up_for_the_first(architecture):
    model, batches = make(architecture, 9)
    live, plain, better = (ActivationStream(model, batches) for _ in range(3))
    live.counted = better.counted = 8  # what is seen; the last batch is other rows
    for number, layer in enumerate(live.layers):
        inside = {id(m): name for name, m in model.named_modules()}
        names = [inside[id(m)] for m in layer.modules() if isinstance(m, nn.Linear)]

        def linears(names=names):
            return {name: model.get_submodule(name) for name in names}

        weights = {name: m.weight.detach() for name, m in linears().items()}
        noise = {name: 0.3 * w.std() * torch.randn_like(w) for name, w in weights.items()}
        if number == 0:  # rounded badly
            hurt = chosen = {name: weights[name] + noise[name] for name in names}
        else:
            hurt = weights
            as_wanted = {}

            def keep(wanted, moment, kept=as_wanted):
                assert moment.tokens == 8 * 8 * 32
                kept |= wanted
                return wanted

            chosen = round_layer(live, better, linears, weights, partial(ReplacedLinears, model), keep)
            assert as_wanted.keys() == weights.keys()
        for stream, used in ((plain, hurt), (better, chosen)):
            with ReplacedLinears(model, used):
                stream.advance()
        live.advance()
    other = len(batches) - 1
    apart = [float((s.logits(other) - live.logits(other)).square().mean()) for s in (plain, better)]
    assert apart[1] < 0.9 * apart[0]


def round_first_layer(model, batches, round_weights):
    """What weights of the first layer are written as where the rounded model's stream is half of the trained one's; and the
    weights."""
    live, rounded = (ActivationStream(model, batches) for _ in range(2))
    names = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and "layers.0" in name]
    weights = {name: model.get_submodule(name).weight.detach() for name in names}

    def linears():
        return {name: model.get_submodule(name) for name in names}

    rounded._hidden = [0.5 * hidden for hidden in rounded._hidden]
    return round_layer(live, rounded, linears, weights, partial(ReplacedLinears, model), round_weights), weights


def test_one_batch_shows_nothing_that_holds_on_others_and_weights_stay():
    model, batches = make("llama")
    found, weights = round_first_layer(model, batches, lambda wanted, _: wanted)
    assert all(torch.equal(found[name], weight) for name, weight in weights.items())


def test_a_layer_that_is_called_twice_is_rounded_by_all_that_it_reads_and_makes_up_for_nothing():
    model, batches = make("llama", 2)
    mlp = model.model.layers[0].mlp
    plain = mlp.forward
    mlp.forward = lambda x: plain(x) + plain(2 * x)
    seen = {}

    def keep(wanted, moment):
        seen.update({name: (value, moment.tokens) for name, value in wanted.items()})
        return wanted

    _, weights = round_first_layer(model, batches, keep)
    for name, (value, tokens) in seen.items():
        assert tokens == (2 if "mlp" in name else 1) * 2 * 8 * 32
        assert torch.equal(value, weights[name]) or "mlp" not in name
    assert seen.keys() == weights.keys()
