"""Decoding over fused kernels gives transformers' answers: interpreted where Triton is installed, captured on a GPU."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKS = Path(__file__).with_name("fast_decoding_checks.py")


def run_checks(**environment: str) -> None:
    # A process of its own: Triton reads TRITON_INTERPRET when kernels are defined.
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(CHECKS)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_fused_steps_under_the_interpreter():
    run_checks(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")


@pytest.mark.gpu
def test_captured_steps_on_the_gpu():
    run_checks(TRITON_INTERPRET="0")
