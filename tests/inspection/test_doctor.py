"""What works on this machine is found by trying it, and each failure comes with what mends it."""

import builtins
import sys

import pytest
import torch

from qlora_cli.core.device import list_versions
from qlora_cli.core.inspection import doctor
from qlora_cli.core.inspection.doctor import (
    check_4bit_step,
    check_card,
    check_disk,
    check_environment,
    check_fast_engine,
    check_triton,
    describe_machine,
    measure_directory,
    read_driver,
    run_4bit_step,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_real_4bit_step_works_here(dtype):
    check = check_4bit_step(CPU, dtype)
    assert check.works, check.found
    error, norm = run_4bit_step(CPU, dtype)
    assert error < 4 * torch.finfo(dtype).eps
    assert norm > 0


def test_a_4bit_step_that_fails_says_how_and_what_to_do(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("libbitsandbytes_cuda.so: cannot open\nmore")

    monkeypatch.setattr(doctor, "load_base", fail)
    check = check_4bit_step(CPU, torch.float32)
    assert not check.works
    assert "cannot open" in check.found and "more" not in check.found
    assert "bitsandbytes" in check.fix


def test_both_engines_agree_here():
    check = check_fast_engine(CPU, torch.bfloat16)
    assert check.works, check.found


def test_a_fast_engine_that_is_off_or_fails_leaves_the_plain_one(monkeypatch):
    monkeypatch.setattr(doctor, "run_engine_steps", lambda *_: (100.0, 100.1))
    assert "not 100.1" in check_fast_engine(CPU, torch.float32).found
    assert check_fast_engine(CPU, torch.bfloat16).works
    monkeypatch.setattr(doctor, "run_engine_steps", lambda *_: 1 / 0)
    check = check_fast_engine(CPU, torch.float32)
    assert not check.works
    assert "--engine plain" in check.fix


def test_a_4bit_step_with_wrong_numbers_fails(monkeypatch):
    exact = doctor.dequantized_weight
    monkeypatch.setattr(doctor, "dequantized_weight", lambda linear: exact(linear) * 1.01)
    check = check_4bit_step(CPU, torch.float32)
    assert not check.works
    assert "off by 0.0099" in check.found


@pytest.mark.parametrize(
    ("cuda_build", "driver", "found", "fix"),
    [
        (None, None, "no NVIDIA card", "CPU"),
        (None, "580.1", "built for the CPU", "pip install"),
        ("13.0", None, "no NVIDIA driver", "driver"),
        ("13.0", "470.0", "finds no usable card", "CUDA_VISIBLE_DEVICES"),
    ],
)
def test_a_missing_card_is_reported_by_what_is_missing(monkeypatch, tmp_path, cuda_build, driver, found, fix):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda_build)
    if driver:
        (tmp_path / "version").write_text(f"NVRM version: NVIDIA UNIX x86_64 Kernel Module  {driver}  Mon Nov  3 2025")
    check = check_card(tmp_path / "version", tmp_path / "absent")
    assert not check.works
    assert found in check.found
    assert fix in check.fix


def test_triton_is_needed_on_a_card_only(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(doctor, "list_versions", lambda: {"triton": None})
    assert check_triton(CPU).works
    assert "pip install triton" in check_triton(cuda).fix
    monkeypatch.setattr(doctor, "list_versions", lambda: {"triton": "3.6"})
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert "gcc" in check_triton(cuda).fix
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/cc")
    assert check_triton(cuda).works


def test_a_full_disk_is_noticed_before_the_directory_exists(monkeypatch, tmp_path):
    usage = type("Usage", (), {"free": 10**9})
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
    check = check_disk("hub cache", tmp_path / "not" / "yet")
    assert not check.works
    assert "0.93 GiB free" in check.found
    usage.free = 10**12
    assert check_disk("hub cache", tmp_path / "not" / "yet").works


def test_the_driver_s_version_is_read(tmp_path):
    version = tmp_path / "version"
    assert read_driver(version) is None
    version.write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.159.04  Mon Nov  3 2025\nGCC version: 12.2\n"
    )
    assert read_driver(version) == "580.159.04"


def test_versions_are_read_without_importing_anything(monkeypatch):
    imported = []
    real = builtins.__import__

    def note(name, *arguments, **keywords):
        imported.append(name)
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", note)
    versions = list_versions()
    assert not {"peft", "bitsandbytes", "datasets"} & set(imported)
    assert versions["torch"] == torch.__version__
    assert versions["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}")


def test_every_check_has_a_fix_where_it_fails(tmp_path):
    checks = check_environment(CPU, torch.float32, tmp_path)
    assert {"python", "cuda", "triton", "4-bit step", "fast engine", "hub cache", "working directory"} == {
        c.name for c in checks
    }
    assert all(check.works or check.fix for check in checks)
    assert describe_machine()["host_memory_bytes"] > 0


def test_a_directory_s_bytes_are_those_of_its_files(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 100)
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b").write_bytes(b"x" * 50)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert measure_directory(tmp_path) == 150
    assert measure_directory(tmp_path / "absent") == 0
