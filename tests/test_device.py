"""Sizes in words become bytes, and a device without memory of its own has none to read."""

import pytest
import torch

from qlora_cli.core.device import parse_memory, read_free_bytes, read_vram
from qlora_cli.errors import UsageError


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
    assert read_free_bytes(torch.device("cpu")) is None


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
