"""Bytes sharded over two ranks: gathered, and in a layer's forward and backward pass, they are the ones that were loaded."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qlora_cli.core.engine.fsdp import CARRIER

SCRIPT = Path(__file__).with_name("fsdp_bytes.py")


def all_pairs_of_bytes() -> torch.Tensor:
    """(4, 65536) uint8: each of the 65,536 pairs twice, at both halves of a wider number."""
    numbers = torch.arange(2**16)
    low, high = (numbers & 255).to(torch.uint8), (numbers >> 8).to(torch.uint8)
    return torch.stack([low, high, low, high], dim=1)


def test_the_carrier_is_as_wide_as_what_the_copies_of_fsdp_compute_in():
    """They take 16-bit numbers through float32 and back, which makes one NaN of all."""
    pairs = all_pairs_of_bytes().flatten()
    assert torch.equal(pairs.view(CARRIER).float().to(CARRIER).view(torch.uint8), pairs)
    there_and_back = pairs.view(torch.bfloat16).float().to(torch.bfloat16).view(torch.uint8)
    assert not torch.equal(there_and_back, pairs)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_no_copy_on_the_card_changes_a_byte():
    """Those that FSDP2 makes: into the buffer of an all-gather, and out of it."""
    pairs = all_pairs_of_bytes().flatten().cuda().view(CARRIER)
    sizes = [pairs.numel() - 12, 12]
    packed = torch.zeros_like(pairs)
    torch._foreach_copy_(list(packed.split(sizes)), list(pairs.split(sizes)))
    out = [torch.zeros(1, size, dtype=CARRIER, device="cuda") for size in sizes]
    torch.split_with_sizes_copy(packed.view(1, -1), sizes, dim=1, out=out)
    for found in (packed, torch.cat(out, dim=1)[0]):
        assert torch.equal(found.view(torch.uint8), pairs.view(torch.uint8))


@pytest.mark.parametrize("on_host", [False, True])
def test_every_byte_comes_back(zygote, on_host):
    done = zygote.run("tests.engine.fsdp_bytes:run_on_cpu", on_host=on_host)
    assert done.code == 0 and done.said.count("all bytes came back") == 2, done.said


@pytest.mark.gpu
@pytest.mark.parametrize("where", ["", "host"])
def test_every_byte_comes_back_on_cards(where):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA GPUs")
    root = Path(__file__).resolve().parents[2]
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT)]
    done = subprocess.run(
        [*command, *filter(None, [where])],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stdout.count("all bytes came back") == 2, done.stdout + done.stderr
