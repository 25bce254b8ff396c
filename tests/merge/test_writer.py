"""Writing planned files: host memory does not grow with the files, threads are as many as fit, a failure stops all."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from qlora_cli.core.merge.plan import MergeTask, OutputFile
from qlora_cli.core.merge.writer import choose_workers, write_files
from qlora_cli.core.storage.safetensors_file import TensorFile, make_header
from qlora_cli.errors import MergeError
from tests.conftest import make_tokenizer


def write_random(directory: Path, hidden: int, layers: int) -> tuple[Path, int]:
    """A random llama in one file and an adapter on half of it; returns the adapter and the file's bytes."""
    base, adapter = directory / "base", directory / "adapter"
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
    )
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in LlamaForCausalLM(config).state_dict().items()}
    noise = (torch.randn(2**20) * 0.02).bfloat16()
    config.save_pretrained(base)
    weights = {n: noise.repeat(-(-s.numel() // len(noise)))[: s.numel()].view(s) for n, s in shapes.items()}
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    make_tokenizer().save_pretrained(base)
    adapter.mkdir()
    weights = {}
    for name in (f"model.layers.{layer}.mlp.up_proj" for layer in range(layers)):
        weights[f"base_model.model.{name}.lora_A.weight"] = torch.randn(8, hidden)
        weights[f"base_model.model.{name}.lora_B.weight"] = torch.randn(4 * hidden, 8)
    save_file(weights, adapter / "adapter_model.safetensors")
    content = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["up_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps({**content, "base_model_name_or_path": str(base)}))
    return adapter, (base / "model.safetensors").stat().st_size


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_resident_memory_stays_far_below_the_size_of_a_file(tmp_path, zygote) -> None:
    small, _ = write_random(tmp_path / "s", hidden=128, layers=1)
    large, file_bytes = write_random(tmp_path / "l", hidden=1024, layers=5)
    assert file_bytes > 150e6
    done = zygote.run("tests.faults.victims:merge_growth", small=str(small), large=str(large), work=str(tmp_path))
    assert done.code == 0, done.said
    growth = int(done.said.split("growth ")[1].split()[0])
    assert growth < file_bytes / 3  # measured: 23 MB


def task_of(held_bytes: int) -> OutputFile:
    return OutputFile("a", make_header([]), (MergeTask(held_bytes, lambda: iter(())),))


def test_as_many_threads_as_memory_holds() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    cores = len(os.sched_getaffinity(0))
    assert choose_workers((task_of(1),), 10**9, cpu) == min(cores, 16)
    assert choose_workers((task_of(1),), 10**9, gpu) == min(cores, 4)
    assert choose_workers((task_of(10**9), task_of(1)), 10**9, cpu) == 1
    assert choose_workers((task_of(10**10),), 10**9, cpu) == 1


def test_a_failure_in_one_tensor_stops_the_others(tmp_path) -> None:
    made = []

    def endless():
        for _ in range(10**6):
            made.append(1)
            yield "x", torch.zeros(1)

    def failing():
        raise MergeError("A weight is bad.")
        yield

    header = make_header([("x", torch.float32, (10**6,)), ("y", torch.float32, (1,))])
    file = OutputFile("model.safetensors", header, (MergeTask(1, endless), MergeTask(1, failing)))
    threads = torch.get_num_threads()
    with pytest.raises(MergeError, match="A weight is bad"):
        write_files((file,), tmp_path, key="k", workers=2, report=lambda event: None)
    assert len(made) < 10**6
    assert torch.get_num_threads() == threads


def test_a_task_that_makes_too_little_is_noticed(tmp_path) -> None:
    header = make_header([("x", torch.float32, (8,))])
    file = OutputFile("model.safetensors", header, (MergeTask(1, lambda: iter([("x", torch.zeros(7))])),))
    with pytest.raises(AssertionError, match="28 bytes made, 32 planned"):
        write_files((file,), tmp_path, key="k", workers=1, report=lambda event: None)


def test_a_kept_file_is_not_written_again(tmp_path) -> None:
    header = make_header([("x", torch.float32, (8,))])
    runs = []

    def once():
        runs.append(1)
        yield "x", torch.arange(8.0)

    file = OutputFile("model.safetensors", header, (MergeTask(1, once),))
    assert write_files((file,), tmp_path, key="k", workers=1, report=lambda event: None) == []
    assert write_files((file,), tmp_path, key="k", workers=1, report=lambda event: None) == ["model.safetensors"]
    assert write_files((file,), tmp_path, key="other", workers=1, report=lambda event: None) == []
    assert len(runs) == 2
    with TensorFile(tmp_path / "model.safetensors") as written:
        assert torch.equal(written.read("x"), torch.arange(8.0))
