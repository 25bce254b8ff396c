"""Sizes in words become bytes, and a device without memory of its own has none to read."""

from types import SimpleNamespace

import psutil
import pytest
import torch
from bitsandbytes.functional import GlobalPageManager

from qlora_cli.core.device import memory_error, read_capacity_bytes, read_free_bytes, read_vram
from qlora_cli.errors import TrainingError, UsageError
from qlora_cli.settings.ranges import parse_memory


@pytest.mark.parametrize(
    ("text", "expected_bytes"),
    [
        ("12GiB", 12 * 2**30),
        ("12 gib", 12 * 2**30),
        ("12G", 12 * 2**30),
        ("12GB", 12 * 10**9),
        ("12000MiB", 12000 * 2**20),
        ("4.92GiB", int(4.92 * 2**30)),
        ("0.5TiB", 2**39),
        ("12884901888", 12 * 2**30),
    ],
)
def test_a_size_means_what_its_unit_says(text, expected_bytes):
    assert parse_memory(text) == expected_bytes


@pytest.mark.parametrize("text", ["", "GiB", "twelve", "12XB", "-3GiB", "1e3GiB"])
def test_what_is_no_size_is_refused_with_an_example(text):
    with pytest.raises(UsageError) as caught:
        parse_memory(text)
    assert "12GiB" in caught.value.hint


def test_a_forgotten_unit_is_pointed_out():
    with pytest.raises(UsageError) as caught:
        parse_memory("12")
    assert "12GiB" in caught.value.hint


def test_the_cpu_has_no_vram():
    assert read_vram(torch.device("cpu")) is None


def test_the_cpu_s_memory_is_the_host_s():
    for read in (read_free_bytes, read_capacity_bytes):
        assert 0 < read(torch.device("cpu")) < psutil.virtual_memory().total


CARD = torch.device("cuda", 0)


def card_of(monkeypatch, *, free, reserved, fraction=1.0, total=80, paged=0):
    """A card of so many GiB, as PyTorch tells of it, and what bitsandbytes has in managed memory."""
    states = [SimpleNamespace(nbytes=paged * 2**30)]
    monkeypatch.setattr(GlobalPageManager.get_instance(), "paged_tensors", states)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free * 2**30), total * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: int(reserved * 2**30))
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda index: fraction)


def test_memory_that_others_hold_is_said_with_its_figure_where_it_ran_out(monkeypatch):
    card_of(monkeypatch, free=0.5, reserved=30)
    error = memory_error(TrainingError, "No memory.", "Lower --max-length.", CARD)
    assert (
        error.message == "No memory. Other processes hold some 48.5 GiB of this card's 80.0 GiB, and 0.50 GiB is free."
    )
    assert "nvidia-smi" in error.hint and "--max-length" not in error.hint


@pytest.mark.parametrize(
    "card",
    [
        {"free": 0.5, "reserved": 78},
        {"free": 9, "reserved": 30, "fraction": 0.4},
        {"free": 0.5, "reserved": 74, "paged": 4},
    ],
    ids=["nobody else", "its own limit is nearer", "its optimizer's states"],
)
def test_of_others_nothing_is_said_where_they_are_not_the_cause(card, monkeypatch):
    card_of(monkeypatch, **card)
    error = memory_error(TrainingError, "No memory.", "Lower --max-length.", CARD)
    assert (error.message, error.hint) == ("No memory.", "Lower --max-length.")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_what_this_process_allocates_is_no_longer_free_but_within_its_capacity():
    device = torch.device("cuda", 0)
    free_bytes, capacity_bytes = read_free_bytes(device), read_capacity_bytes(device)
    block = torch.empty(2**28, dtype=torch.uint8, device=device)
    assert free_bytes - read_free_bytes(device) == pytest.approx(block.nbytes, rel=0.1)
    assert read_capacity_bytes(device) == pytest.approx(capacity_bytes, rel=0.01)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_vram_follows_an_allocation():
    device = torch.device("cuda", 0)
    before = read_vram(device)
    block = torch.empty(2**26, dtype=torch.uint8, device=device)
    after = read_vram(device)
    assert after.now_bytes - before.now_bytes == block.nbytes
    assert after.peak_bytes >= after.now_bytes
    assert after.total_bytes > after.now_bytes
