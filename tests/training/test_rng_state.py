"""Random state: captured, restored and shielded, for every generator a model may draw from."""

import random

import numpy as np
import pytest
import torch

from qlora_cli.core.storage.checkpoint import read_tensors, write_tensors
from qlora_cli.core.training.rng_state import (
    capture_random_state,
    restore_random_state,
    seed_everything,
    undisturbed_random_state,
)

CPU = torch.device("cpu")


def draw() -> list:
    drawn = [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(3).tolist()]
    return drawn + ([torch.rand(3, device="cuda").tolist()] if torch.cuda.is_available() else [])


@pytest.mark.parametrize("drawn_before", [0, 1, 2])  # an odd number of normal draws leaves half a pair behind
def test_every_generator_continues_where_it_was(drawn_before, tmp_path):
    device = torch.device("cuda", 0) if torch.cuda.is_available() else CPU
    seed_everything(5)
    for _ in range(drawn_before):
        draw()
    write_tensors(tmp_path / "r.safetensors", capture_random_state(device))
    expected = [draw(), draw()]
    seed_everything(6)
    restore_random_state(read_tensors(tmp_path / "r.safetensors"), device)
    assert [draw(), draw()] == expected


def test_what_is_drawn_inside_leaves_no_trace_even_when_it_fails():
    seed_everything(5)
    expected = draw()
    seed_everything(5)
    with pytest.raises(KeyError), undisturbed_random_state(CPU):
        draw()
        raise KeyError
    assert draw() == expected
