"""bitsandbytes is imported without the compiler, and what is not compiled computes the same."""

import subprocess
import sys

import pytest
import torch

from qlora_cli.core.bnb import bitsandbytes

COMPILED = """
import sys, torch, bitsandbytes.functional as F
state = torch.load(sys.argv[1], weights_only=False)
torch.save(F.dequantize_4bit(*state), sys.argv[2])
"""


def test_no_command_imports_the_compiler(zygote):
    """The zygote has imported every command, and what was imported with them is what it says."""
    assert "qlora_cli.commands.train" in zygote.imported
    assert not {"torch._inductor.lowering", "matplotlib"} & zygote.imported
    assert torch.compile.__module__ == "torch"


@pytest.mark.slow  # a minute of compiling
def test_an_odd_shape_has_the_bits_that_bitsandbytes_compiled_gives(tmp_path):
    weight = torch.randn((7, 33), generator=torch.Generator().manual_seed(0))
    state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    torch.save(state, tmp_path / "in.pt")
    command = [sys.executable, "-c", COMPILED, str(tmp_path / "in.pt"), str(tmp_path / "out.pt")]
    subprocess.run(command, check=True)
    assert torch.equal(bitsandbytes.functional.dequantize_4bit(*state), torch.load(tmp_path / "out.pt"))
