"""Promises of the base cache: the same logits bit for bit, never a damaged base, and nothing in the way when it fails."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_cli import artifacts
from qlora_cli.core.distributed.process_group import ProcessGroup
from qlora_cli.core.distributed.weight_shards import WeightShards
from qlora_cli.core.models import quantized_cache as base_cache
from qlora_cli.core.models.files import resolve_model
from qlora_cli.core.models.quantization import four_bit_linears, freeze_base
from qlora_cli.core.models.quantized_cache import base_directory, cache_size_bytes, restore_base, save_base
from qlora_cli.events import report_nothing
from tests.conftest import ARCHITECTURES, FEW, most_slow

CPU = torch.device("cpu")
FACTS = {"weights": "w", "quant_type": "nf4"}


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "base"


def restore(directory, report=report_nothing):
    found = restore_base(FACTS, resolve_model(str(directory), report=report), torch.float32, CPU)
    return None if found is None else freeze_base(found)


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(2, 40)[None]).logits


@pytest.mark.parametrize("architecture", most_slow(ARCHITECTURES, FEW))
def test_a_restored_base_is_the_same_bit_for_bit(architecture, load_tiny, tiny_model):
    base, _ = load_tiny(architecture)
    save_base(base, FACTS)
    again = restore(tiny_model(architecture))
    assert torch.equal(logits(again), logits(base))
    assert [n for n, _ in four_bit_linears(again)] == [n for n, _ in four_bit_linears(base)]
    theirs, ours = dict(base.named_parameters()), dict(again.named_parameters())
    assert list(ours) == list(theirs)
    for name, parameter in ours.items():
        assert torch.equal(parameter.data, theirs[name].data) and parameter.dtype == theirs[name].dtype
        assert not parameter.requires_grad
    (layer, _), *_ = four_bit_linears(again)
    assert again.get_submodule(layer).weight.quant_state.nested


def test_a_base_whose_files_were_edited_in_place_is_not_taken(load_tiny, tiny_model, tmp_path):
    """Even where the digest of the weights, which samples them, stays the same."""
    directory = shutil.copytree(tiny_model("llama"), tmp_path / "model")
    (weights,) = directory.glob("*.safetensors")
    base, _ = load_tiny("llama")
    save_base(base, FACTS, stamps=resolve_model(str(directory)).weight_stamps)
    assert restore(directory) is not None
    os.utime(weights, ns=(0, weights.stat().st_mtime_ns + 1))
    events = []
    assert restore(directory, events.append) is None
    assert "written since" in events[0].text
    save_base(base, FACTS)  # as older versions did, which kept no note of the files
    assert restore(directory) is not None


@pytest.mark.parametrize(
    "arguments", [{"quant_type": "fp4"}, {"double_quant": False}, {"compute_dtype": torch.bfloat16}]
)
def test_every_way_of_holding_a_base_comes_back(arguments, load_tiny, tiny_model):
    base, _ = load_tiny("llama", **arguments)
    save_base(base, FACTS)
    again = restore(tiny_model("llama"))
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter.data, base.get_parameter(name).data)
    for (_, ours), (_, theirs) in zip(four_bit_linears(again), four_bit_linears(base), strict=True):
        ours, theirs = ours.weight.quant_state, theirs.weight.quant_state
        assert ours.quant_type == theirs.quant_type and ours.nested == theirs.nested and ours.dtype == theirs.dtype
        assert torch.equal(ours.absmax, theirs.absmax)
        if ours.nested:
            assert torch.equal(ours.offset, theirs.offset) and torch.equal(ours.state2.absmax, theirs.state2.absmax)


def test_what_decides_the_content_decides_the_place(load_tiny, tiny_model, root, monkeypatch):
    assert restore(tiny_model("llama")) is None  # nothing there yet
    base, _ = load_tiny("llama")
    save_base(base, FACTS)
    assert base_directory(FACTS) != base_directory({**FACTS, "quant_type": "fp4"})
    before = base_directory(FACTS)
    monkeypatch.setattr(base_cache, "version", lambda name: "9.9.9")
    assert base_directory(FACTS) != before
    assert before.parent == root


def test_the_file_is_plain_safetensors_and_its_size_is_known(load_tiny, root):
    from safetensors.torch import load_file

    base, _ = load_tiny("gpt2")
    save_base(base, FACTS)
    content = load_file(base_directory(FACTS) / base_cache.WEIGHTS)
    assert torch.equal(content["transformer.wte.weight"], base.transformer.wte.weight)
    assert cache_size_bytes() == sum(path.stat().st_size for path in root.rglob("*") if path.is_file()) > 50_000


@settings(deadline=None, max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 0.9999), kind=st.sampled_from(["flip", "cut", "grow"]))
def test_damage_anywhere_is_found_and_the_copy_removed(place, kind, load_tiny, tiny_model):
    base, _ = load_tiny("llama")
    save_base(base, FACTS, piece_bytes=10_000)
    path = base_directory(FACTS) / base_cache.WEIGHTS
    content = bytearray(path.read_bytes())
    at = int(place * len(content))
    if kind == "flip":
        content[at] ^= 1
    elif kind == "cut":
        content = content[:at]
    else:
        content += b"\0"
    path.write_bytes(content)
    events = []
    assert restore(tiny_model("llama"), events.append) is None
    assert "made anew" in events[0].text and events[0].text.endswith(".") and not events[0].text.endswith("..")
    assert not base_directory(FACTS).exists()


def test_a_broken_manifest_or_another_structure_is_no_base(load_tiny, tiny_model):
    base, _ = load_tiny("llama")
    for content in ("{", "{}", *({"hashed_bytes": b, "sha256": []} for b in (0, 1))):
        save_base(base, FACTS)
        content = content if isinstance(content, str) else json.dumps(content)
        (base_directory(FACTS) / base_cache.MANIFEST).write_text(content)
        assert restore(tiny_model("llama")) is None
    save_base(base, FACTS)
    assert restore(tiny_model("qwen3")) is None
    assert not base_directory(FACTS).exists()


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("on_host", [True, False])
def test_each_rank_reads_what_it_keeps(on_host, double_quant, load_tiny):
    base, _ = load_tiny("llama", double_quant=double_quant)
    save_base(base, FACTS, piece_bytes=1000)
    path = base_directory(FACTS) / base_cache.WEIGHTS
    manifest = json.loads((base_directory(FACTS) / base_cache.MANIFEST).read_text())
    whole, _ = base_cache._read(path, manifest, CPU, None)
    sharded = {f"{name}.weight{ending}" for name, _ in four_bit_linears(base) for ending in ("", ".absmax")}
    for world_size in (1, 3, 7):
        for rank in range(world_size):
            slices = WeightShards(ProcessGroup(rank, world_size), on_host)
            for name, tensor in base_cache._read(path, manifest, CPU, slices)[0].items():
                expected = slices.keep(whole[name]) if name in sharded else whole[name]
                assert torch.equal(tensor, expected) and tensor.dtype == expected.dtype


@pytest.mark.gpu
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])
def test_on_cuda_the_copy_gives_the_same_bits_and_logits(architecture, load_tiny):
    device = torch.device("cuda", torch.cuda.current_device())
    settings = {"device": device, "compute_dtype": torch.bfloat16, "base_cache": True}
    base, _ = load_tiny(architecture, **settings)
    events = []
    again, _ = load_tiny(architecture, **settings, report=events.append)
    assert "Using the quantised base kept" in events[-1].text
    ids = torch.arange(2, 40, device=device)[None]
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, base(input_ids=ids).logits)
    ours = dict(base_cache._tensors_of(again))
    for name, tensor in base_cache._tensors_of(base):
        assert torch.equal(ours[name], tensor) and ours[name].device == tensor.device, name


def test_a_full_disk_and_a_forbidden_directory_stop_nothing(load_tiny, root, monkeypatch, tmp_path):
    base, _ = load_tiny("llama")
    events = []
    monkeypatch.setattr(base_cache, "SPARE_BYTES", 2**62)
    save_base(base, FACTS, events.append)
    assert "nearly full" in events[-1].text and not base_directory(FACTS).exists()
    monkeypatch.setattr(base_cache, "SPARE_BYTES", 0)

    def no_room(stream, shapes, values, piece_bytes):
        stream.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(base_cache, "write_hashed_file", no_room)
    save_base(base, FACTS, events.append)
    assert "could not be kept" in events[-1].text
    assert list(root.iterdir()) == []
    if os.geteuid() != 0:
        root.chmod(0o500)
        save_base(base, FACTS, events.append)
        root.chmod(0o700)


def test_only_the_first_of_several_processes_writes(load_tiny, monkeypatch):
    base, _ = load_tiny("llama")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    save_base(base, FACTS)
    assert not base_directory(FACTS).exists()


def test_the_root_can_be_moved(monkeypatch):
    monkeypatch.delenv("QLORA_CACHE")
    assert artifacts.cache_root() == Path.home() / ".cache" / "qlora"
