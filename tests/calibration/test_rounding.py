"""What is rounded knowing its inputs is what a 4-bit checkpoint holds, and errs less on those inputs than rounding to nearest."""

import pytest
import torch

from qlora_cli.core.bnb import bitsandbytes as bnb
from qlora_cli.core.calibration import rounding
from qlora_cli.core.calibration.low_rank import SecondMoment
from qlora_cli.core.calibration.rounding import round_to_four_bits
from qlora_cli.core.models.quantization import pack_weight, restored_linear, round_trip
from qlora_cli.settings.groups import QuantizationSettings
from tests.calibration.test_low_rank import gather, make_case


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_the_packed_weight_stands_for_what_was_weighed_and_errs_less_on_its_inputs(quant_type, double_quant):
    weight, x = make_case(48, 192, 400, 3)
    settings = QuantizationSettings(quant_type=quant_type, double_quant=double_quant)
    [(packed, value)] = round_to_four_bits([weight], gather(weight, x, "inputs"), settings)
    plain = pack_weight(weight, quant_type=quant_type, double_quant=double_quant)
    assert {name: (t.dtype, t.shape) for name, t in packed.items() if "quant_state" not in name} == {
        name: (t.dtype, t.shape) for name, t in plain.items() if "quant_state" not in name
    }
    linear = restored_linear(torch.float32, torch.device("cpu"), dict(packed), None)
    restored = bnb.functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state)
    torch.testing.assert_close(restored.float(), value, rtol=0, atol=1e-7)
    nearest = round_trip(weight, quant_type=quant_type, double_quant=double_quant)
    errors = [float((x @ (weight - rounded).T).square().sum()) for rounded in (value, nearest)]
    assert errors[0] < 0.7 * errors[1]


def test_a_small_update_survives_where_rounding_to_nearest_loses_it():
    weight, x = make_case(48, 192, 400, 4)
    settings = QuantizationSettings()
    held = round_trip(weight, quant_type="nf4", double_quant=True)
    generator = torch.Generator().manual_seed(4)
    pair = torch.randn(48, 2, generator=generator), torch.randn(2, 192, generator=generator)
    update = 0.03 * float(weight.std()) * pair[0] @ pair[1]
    target = held + update
    kept = []
    for rounded in (
        round_to_four_bits([target], gather(weight, x, "inputs"), settings)[0][1],
        round_trip(target, quant_type="nf4", double_quant=True),
    ):
        kept.append(float((x @ (rounded - target).T).square().sum() / (x @ update.T).square().sum()))
    assert kept[0] < 0.5 * kept[1]


def test_rounding_to_nearest_without_inputs():
    weight, _ = make_case(16, 128, 10, 5)
    [(_, value)] = round_to_four_bits([weight], None, QuantizationSettings(double_quant=False))
    nearest = round_trip(weight, quant_type="nf4", double_quant=False)
    assert float((value - weight).square().sum()) <= float((nearest - weight).square().sum()) * 1.001


def test_descent_takes_more_of_the_outputs_error_away(monkeypatch):
    weight, x = make_case(48, 192, 400, 3)
    errors = []
    for sweeps in (0, 1, 2):
        monkeypatch.setattr(rounding, "SWEEPS", sweeps)
        [(_, value)] = round_to_four_bits([weight], gather(weight, x, "inputs"), QuantizationSettings())
        errors.append(float((x @ (weight - value).T).square().sum()))
    assert errors[2] < errors[1] < 0.97 * errors[0]


def test_a_weight_that_no_token_came_to_is_rounded_to_nearest():
    weight, _ = make_case(48, 192, 400, 3)
    settings = QuantizationSettings()
    [(packed, value)] = round_to_four_bits([weight], SecondMoment(), settings)
    [(expected, nearest)] = round_to_four_bits([weight], None, settings)
    assert torch.equal(value, nearest) and torch.equal(packed[""], expected[""])


def test_weights_that_read_the_same_inputs_are_rounded_as_each_alone():
    weight, x = make_case(48, 192, 400, 3)
    parts = [weight[:32].contiguous(), weight[32:].contiguous()]
    moment = gather(weight, x, "inputs")
    for part, (packed, value) in zip(parts, round_to_four_bits(parts, moment, QuantizationSettings()), strict=True):
        [(alone, expected)] = round_to_four_bits([part], moment, QuantizationSettings())
        assert torch.equal(value, expected)
        assert packed.keys() == alone.keys() and all(torch.equal(packed[name], alone[name]) for name in alone)
