"""When layers are multiplied in 8 bits: as asked where the card can, as before where a run goes on, else not, and it is said."""

import pytest
import torch

from qlora_cli.core.matmul import choice
from qlora_cli.core.matmul.choice import ProductTrial, is_wanted
from qlora_cli.core.matmul.expert_stacks import ExpertStacks
from qlora_cli.core.matmul.gate import ProductErrors
from qlora_cli.errors import UsageError
from qlora_cli.kernels.weights import FrozenWeight
from qlora_cli.settings.groups import StepSettings

CARD = torch.device("cuda", 0)


@pytest.fixture
def capability(monkeypatch):
    """Sets that of the card."""
    return lambda *number: monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: number)


def ask(matmul, trial=None, *, dtype=torch.bfloat16, tokens=8192, sharded=False, events=None):
    report = (lambda event: None) if events is None else events.append
    return is_wanted(StepSettings(matmul=matmul), trial or ProductTrial(), CARD, dtype, tokens, sharded, report)


@pytest.mark.parametrize(("number", "dtype"), [((8, 0), torch.bfloat16), ((9, 0), torch.float16)])
def test_what_the_card_or_the_dtype_cannot_do_is_refused_with_what_helps(capability, number, dtype):
    capability(*number)
    with pytest.raises(UsageError) as caught:
        ask("fp8", dtype=dtype)
    assert "fp8" in caught.value.message and "--matmul bf16" in caught.value.hint
    assert not ask("bf16", dtype=dtype) and not ask("auto", dtype=dtype)


@pytest.mark.parametrize("number", [(8, 9), (9, 0), (10, 0), (12, 0)])
def test_cards_with_8_bit_arithmetic_are_taken(capability, number):
    capability(*number)
    assert ask("fp8")


def test_a_run_that_began_in_8_bits_does_not_go_on_where_there_are_none(capability):
    capability(8, 0)
    recorded = {"asked": "auto", "matmul": "fp8", "kept": []}
    with pytest.raises(UsageError, match="this run multiplies in fp8"):
        ask("auto", ProductTrial(recorded=recorded, resumed=True))


def test_a_base_that_is_sharded_is_multiplied_in_bf16_and_that_is_said(capability):
    capability(9, 0)
    events: list = []
    assert not ask("fp8", sharded=True, events=events)
    assert "the base is sharded" in events[0].text


def test_auto_takes_many_tokens_of_a_long_run_alone(capability):
    capability(9, 0)
    long = ProductTrial(pays=True)
    assert ask("auto", long, tokens=4096) and not ask("auto", long, tokens=2048)
    assert not ask("auto", long, sharded=True) and not ask("auto", ProductTrial(pays=False))
    assert not ask("bf16", long)
    capability(8, 6)
    assert not ask("auto", long)


def test_auto_leaves_runs_that_go_on_as_they_began(capability):
    capability(9, 0)
    for recorded, expected in ((None, False), ({"asked": "auto", "matmul": "bf16", "kept": []}, False),
                               ({"asked": "auto", "matmul": "fp8", "kept": []}, True)):  # fmt: skip
        assert ask("auto", ProductTrial(recorded=recorded, resumed=True, pays=True)) == expected


def chosen(matmul, weight, run):
    """The layers in 8 bits of one with this weight, the record, and what is said."""
    layer, events = torch.nn.Linear(1, 1), []
    layers = {"q_proj": (layer, weight)}
    given = ProductTrial(), layers, ExpertStacks(layer), 4096, run, events.append
    found, record = choice.choose_products(StepSettings(matmul=matmul), *given)
    return len(found), record, " ".join(event.text for event in events)


def test_auto_says_how_to_turn_it_off_and_falls_back_where_it_cannot_be_tried(monkeypatch):
    weight = FrozenWeight(32, 64, packed=torch.zeros(1024, dtype=torch.uint8))
    monkeypatch.setattr(
        choice, "measure_products", lambda weights, run: dict.fromkeys(weights, ProductErrors(0.4, 0.3))
    )
    count, record, said = chosen("auto", weight, None)
    assert count == 1 and record.matmul == "fp8" and "--matmul bf16 turns it off" in said
    assert "turns it off" not in chosen("fp8", weight, None)[2]

    for error, named in ((torch.OutOfMemoryError("all of it"), "no room"), (RuntimeError("scaled_mm?"), "scaled_mm?")):

        def fails(*_, error=error):
            raise error

        monkeypatch.setattr(choice, "measure_products", fails)
        count, record, said = chosen("auto", weight, None)
        assert count == 0 and record.matmul == "bf16" and record.kept == ("q_proj",) and named in said
        with pytest.raises(RuntimeError):
            chosen("fp8", weight, None)


def test_a_layer_that_no_trial_reached_is_named_as_not_measured(monkeypatch):
    monkeypatch.setattr(choice, "measure_products", lambda weights, run: {})
    weight = FrozenWeight(32, 64, packed=torch.zeros(1024, dtype=torch.uint8))
    assert chosen("fp8", weight, None)[2].endswith("In bf16 stay q_proj (not measured).")
