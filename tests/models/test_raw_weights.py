"""Linear layers that are read and not called are known, on every path of the code."""

import pytest
import transformers

from qlora_cli.core.models.raw_weights import read_raw
from qlora_cli.core.models.structure import build_empty
from tests.conftest import ARCHITECTURES

MIXERS = {
    "mamba": (transformers.MambaConfig(hidden_size=64, num_hidden_layers=1), {"x_proj", "dt_proj", "out_proj"}),
    "mamba2": (transformers.Mamba2Config(hidden_size=64, num_heads=8, head_dim=16, num_hidden_layers=1), {"out_proj"}),
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
def test_what_a_fused_kernel_is_given_is_read_raw_where_the_kernel_is_absent_too(mixer):
    config, layers = MIXERS[mixer]
    assert {name.rsplit(".", 1)[-1] for name in read_raw(build_empty(config))} == layers
