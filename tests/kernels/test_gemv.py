"""The decoding kernels are right: under the interpreter everywhere Triton is installed, compiled on a GPU."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest


def run_checks(name: str, **environment: str) -> None:
    # A process of its own: Triton reads TRITON_INTERPRET when kernels are defined.
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__).with_name(name))],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_products_under_the_interpreter():
    run_checks("gemv_checks.py", TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")


@pytest.mark.gpu
def test_products_on_the_gpu():
    run_checks("gemv_checks.py", TRITON_INTERPRET="0")
