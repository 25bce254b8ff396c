"""Random state: captured, restored and shielded, for the generators that training draws from."""

import pytest
import torch

from qlora_cli.core.storage.checkpoint import read_tensors, write_tensors
from qlora_cli.core.training.rng_state import (
    capture_random_state,
    restore_random_state,
    undisturbed_random_state,
)

CPU = torch.device("cpu")


def draw() -> list:
    drawn = [torch.rand(3).tolist(), torch.randn(3).tolist()]
    return drawn + ([torch.rand(3, device="cuda").tolist()] if torch.cuda.is_available() else [])


def test_every_generator_continues_where_it_was(tmp_path):
    device = torch.device("cuda", 0) if torch.cuda.is_available() else CPU
    torch.manual_seed(5)
    draw()
    write_tensors(tmp_path / "r.safetensors", capture_random_state(device))
    expected = [draw(), draw()]
    torch.manual_seed(6)
    restore_random_state(read_tensors(tmp_path / "r.safetensors"), device)
    assert [draw(), draw()] == expected


def test_a_state_with_the_generators_of_an_earlier_version_is_restored():
    state = capture_random_state(CPU)
    expected = draw()
    restore_random_state({**state, "python": torch.zeros(625, dtype=torch.int64), "numpy_gauss": torch.zeros(1)}, CPU)
    assert draw() == expected


def test_what_is_drawn_inside_leaves_no_trace_even_when_it_fails():
    torch.manual_seed(5)
    expected = draw()
    torch.manual_seed(5)
    with pytest.raises(KeyError), undisturbed_random_state(CPU):
        draw()
        raise KeyError
    assert draw() == expected
