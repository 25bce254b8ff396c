"""Linear layers that are read and not called are known, on every path of the code."""

import copy

import pytest
import torch
import transformers

from qlora_cli.core.models.raw_weights import call_layers, read_raw
from qlora_cli.core.models.structure import build_empty
from tests.conftest import ARCHITECTURES

MIXERS = {
    "mamba": (transformers.MambaConfig(hidden_size=64, num_hidden_layers=1), {"dt_proj"}),
    "mamba2": (transformers.Mamba2Config(hidden_size=64, num_heads=8, head_dim=16, num_hidden_layers=1), set()),
}


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_a_decoder_calls_every_linear_layer(architecture):
    name, arguments = ARCHITECTURES[architecture]
    assert not read_raw(build_empty(getattr(transformers, name)(**arguments, pad_token_id=1)))


def test_a_branch_that_settings_rule_out_is_not_taken_and_one_they_choose_is():
    name, arguments = ARCHITECTURES["bloom"]
    exact = build_empty(getattr(transformers, name)(**arguments, pretraining_tp=2, slow_but_exact=True))
    assert {name.rsplit(".", 1)[-1] for name in read_raw(exact)} == {"dense", "dense_4h_to_h"}


@pytest.mark.parametrize("mixer", sorted(MIXERS))
def test_what_is_read_without_calling_it_is_read_raw_but_what_a_kernel_is_given_in_training_alone(mixer):
    config, layers = MIXERS[mixer]
    assert {name.rsplit(".", 1)[-1] for name in read_raw(build_empty(config))} == layers


def test_a_mixer_calls_its_output_layer_in_training_too_and_its_layers_train(monkeypatch):
    from transformers.models.mamba2 import modeling_mamba2

    def kernel(*_, **__):
        raise AssertionError("given the weight of a layer")

    monkeypatch.setattr(modeling_mamba2, "mamba2_split_conv1d_scan_combined", kernel)
    config, _ = MIXERS["mamba2"]
    torch.manual_seed(0)
    plain = transformers.Mamba2ForCausalLM(config).eval()
    held = copy.deepcopy(plain)
    call_layers(held)
    call_layers(held)  # a second time changes nothing
    held.train()
    mixer = held.backbone.layers[0].mixer
    assert isinstance(mixer, modeling_mamba2.Mamba2Mixer) and type(mixer).__name__ == "Mamba2Mixer"
    assert not mixer.training and mixer.out_proj.training and held.training
    ids = torch.arange(7)[None]
    assert torch.equal(held(ids, use_cache=False).logits, plain(ids, use_cache=False).logits)
    with pytest.raises(AssertionError, match="given the weight"):
        plain.train()(ids, use_cache=False)
