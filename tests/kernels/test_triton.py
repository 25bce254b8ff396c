"""The Triton kernels are right, and decoding over them: interpreted where Triton is installed, compiled on a GPU."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

NEEDS_TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
CHECKS = ["triton_checks.py", "gemv_checks.py", "decode_attention_checks.py", "decode_pointwise_checks.py"]
CHECKS += [
    "float8_checks.py",
    "expert_checks.py",
    "float8_expert_checks.py",
    "adam_checks.py",
    "../decoding/fast_decoding_checks.py",
]
QUICKER = ("-p", "tests.kernels.interpreter")


def run_checks(*names: str, options: tuple[str, ...] = (), **environment: str) -> None:
    # A process of their own: Triton reads TRITON_INTERPRET when kernels are defined. One for all: each takes 10 s of
    # processor time to import what it needs.
    files = [str(Path(__file__).parent / name) for name in names]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options, *files],
        cwd=Path(__file__).parents[2],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-6000:] + done.stderr[-2000:]


@NEEDS_TRITON
def test_kernels_under_the_interpreter():
    """With each value of each parameter, and decoding over them."""
    run_checks(*CHECKS, options=("-m", "not slow", *QUICKER), TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")


@NEEDS_TRITON
@pytest.mark.slow
def test_kernels_under_the_interpreter_with_all_combinations():
    run_checks(*CHECKS, options=QUICKER, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")


@pytest.mark.gpu
def test_kernels_on_the_gpu():
    run_checks(*CHECKS, TRITON_INTERPRET="0")
