"""Bytes alive are counted from a tensor's making to its end, autograd's own included, with or without real memory."""

import pytest
import torch

from qlora_cli.core.planning.meta_ops import LiveBytes

SIZE = 4 * 1000


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_autograd_saves_stays_counted_until_the_backward_pass(device):
    x = torch.ones(1000, device=device, requires_grad=True)
    with LiveBytes() as live:
        doubled = x * 2
        activated = torch.nn.functional.silu(doubled)
        assert live.now_bytes == 2 * SIZE
        del doubled
        assert live.now_bytes == 2 * SIZE  # silu's backward pass needs it
        total = activated.sum()
        del activated
        assert live.now_bytes == SIZE + 4
        total.backward()
        del total
        assert live.now_bytes == SIZE  # the gradient
    assert live.highest_bytes == {0: 2 * SIZE + 8}


def test_views_of_what_was_there_before_are_free():
    x = torch.ones(1000)
    with LiveBytes() as live:
        assert live.now_bytes == 0
        kept = [x.view(10, 100), x[5:], x.view(10, 100).t()]
        assert live.now_bytes == 0
        del kept


def test_scratch_memory_counts_with_what_is_alive_beside_it():
    with LiveBytes() as live:
        small = torch.ones(1000)
        live.mark(10 * SIZE)
        del small
        large = torch.ones(5000)
        del large
    assert live.highest_bytes == {0: 5 * SIZE, 10 * SIZE: SIZE}


def test_moments_start_anew_with_what_is_still_alive():
    with LiveBytes() as live:
        large = torch.ones(5000)
        small = torch.ones(1000)
        del large
        assert live.restart() == {0: 6 * SIZE}
        assert live.highest_bytes == {0: SIZE}
        del small
        torch.ones(10)
    assert live.highest_bytes == {0: SIZE}
