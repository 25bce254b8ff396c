"""Bases with routed experts: loaded in 4 bits while they stream in, whatever the checkpoint's layout, and from the copy."""

import json
import shutil
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_cli.core.bnb import bitsandbytes as bnb
from qlora_cli.core.experts.layout import find_experts
from qlora_cli.core.models import packing
from qlora_cli.core.models.files import resolve_model
from qlora_cli.core.models.loading import load_base
from qlora_cli.core.weights import read_ahead
from qlora_cli.core.weights.checkpoint import Checkpoint
from qlora_cli.errors import ModelError
from qlora_cli.settings.groups import QuantizationSettings
from tests.experts.expert_modules import write_expert_model

CPU = torch.device("cpu")


def load(directory, *, dtype=torch.float32, cache=False, said=None, **held):
    files = resolve_model(str(directory), report=(said.append if said is not None else lambda event: None))
    return load_base(files, QuantizationSettings(base_cache=cache, **held), compute_dtype=dtype, device=CPU)[0]


def experts_of(base):
    return dict(find_experts(base))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """`models(layout)`: a checkpoint of it, written once, and its model in 16 bits; not to be changed."""
    made = {}

    def write(layout):
        if layout not in made:
            directory = tmp_path_factory.mktemp(layout) / "model"
            made[layout] = (directory, write_expert_model(layout, directory))
        return made[layout]

    return write


@pytest.mark.parametrize("layout", ["qwen3_moe", "gpt_oss", "llama4", "mixtral", "deepseek_v3"])
def test_experts_become_4bit_and_the_answer_is_that_of_their_values(models, layout):
    directory, plain = models(layout)
    said = []
    base = load(directory, said=said)
    assert any(("9" in e.text and "of the base is in 4 bits" in e.text) or "100%" in e.text for e in said)
    for name, experts in experts_of(base).items():
        original = plain.get_submodule(name)
        for weight in experts.expert_weights:
            for number in range(weight.experts):
                matrix = weight.as_matrix(getattr(original, weight.name).data[number]).contiguous()
                codes, state = bnb.functional.quantize_4bit(matrix, quant_type="nf4", compress_statistics=True)
                state.shape = torch.Size([1, matrix.numel()])
                expected = bnb.functional.dequantize_4bit(codes, state).view(matrix.shape)
                assert torch.equal(experts.dequantized(weight.name, number), expected)
    assert torch.isfinite(base(torch.arange(5, 25)[None]).logits).all()


@pytest.mark.parametrize(
    ("layout", "changes"),
    [
        ("qwen3_moe", {}),
        ("qwen3_moe", {"hidden_size": 128, "moe_intermediate_size": 128}),
        ("gpt_oss", {}),
        ("llama4", {}),
    ],
)
@pytest.mark.parametrize("double_quant", [True, False])
def test_weights_that_are_read_ahead_and_packed_together_are_those_of_one_by_one(
    tmp_path, monkeypatch, layout, changes, double_quant
):
    write_expert_model(layout, tmp_path / "model", shard="200KB", **changes)
    expected = load(tmp_path / "model", double_quant=double_quant).state_dict()
    monkeypatch.setattr(packing, "pays", lambda device: True)
    monkeypatch.setattr(packing, "PIECE_BYTES", 3 * 4 * 256 * 128)  # experts together: three, or all five
    monkeypatch.setattr(read_ahead, "PIECE_BYTES", 100_000)
    monkeypatch.setattr(read_ahead, "PART_BYTES", 10_000)
    read, alone = Checkpoint.read, []
    monkeypatch.setattr(
        Checkpoint, "read", lambda self, name, rows=None: (alone.append(name), read(self, name, rows))[1]
    )
    found = load(tmp_path / "model", double_quant=double_quant).state_dict()
    assert not [name for name in alone if "_proj" in name and "bias" not in name]
    assert list(found) == list(expected) and len(found) > 20
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_a_weight_that_ends_too_early_says_so_when_it_is_read_ahead(models, tmp_path, monkeypatch):
    directory, _ = models("qwen3_moe")
    files = resolve_model(str(shutil.copytree(directory, tmp_path / "model")), report=lambda event: None)
    monkeypatch.setattr(packing, "pays", lambda device: True)
    read, main = read_ahead.WeightFile.read_into, threading.current_thread()

    def ends(file, buffer, start):
        if threading.current_thread() is main:
            return read(file, buffer, start)
        raise ModelError("It became shorter while it was read.")

    monkeypatch.setattr(read_ahead.WeightFile, "read_into", ends)
    with pytest.raises(ModelError, match="became shorter"):
        load_base(files, QuantizationSettings(base_cache=False), compute_dtype=torch.float32, device=CPU)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


def test_what_is_read_ahead_takes_ordinary_memory_where_the_system_locks_no_more(monkeypatch):
    empty = torch.empty

    def refuse(*given, pin_memory=False, **named):
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory")
        return empty(*given, **named)

    monkeypatch.setattr(torch, "empty", refuse)
    assert read_ahead.staging_memory(100, torch.device("cuda")).numel() == 100


def test_what_is_asked_for_in_another_order_comes_too(models):
    directory, _ = models("qwen3_moe")
    with Checkpoint(directory) as checkpoint:
        names = sorted(checkpoint.entries)
        order = [(name, None) for name in names] + [(names[0], slice(1, 3))]
        with read_ahead.ReadAhead(checkpoint, order, CPU) as read:
            for name in [*reversed(names), names[3]]:
                assert torch.equal(read(name), checkpoint.read(name))
            assert torch.equal(read(names[0], slice(1, 3)), checkpoint.read(names[0], slice(1, 3)))


def test_a_copy_of_the_base_gives_the_same_experts_bit_for_bit(models, tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path))
    directory, _ = models("gpt_oss")
    ids, said = torch.arange(5, 25)[None], []
    logits = [load(directory, cache=True, said=said)(ids).logits for _ in range(2)]
    assert torch.equal(*logits)
    assert any("Using the quantised base kept" in event.text for event in said)


def test_per_expert_tensors_in_4_bits_are_kept_bit_for_bit(models, tmp_path):
    directory, _ = models("qwen3_moe")
    stored = shutil.copytree(directory, tmp_path / "stored")
    weights = load_file(stored / "model.safetensors")
    packed, values = {}, {}
    for name, weight in weights.items():
        if not name.endswith("proj.weight"):
            packed[name] = weight
            continue
        codes, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        packed |= {name: codes, **{f"{name}.{end}": part for end, part in state.as_dict(packed=True).items()}}
        state.shape = torch.Size([1, weight.numel()])
        values[name] = bnb.functional.dequantize_4bit(codes, state).view(weight.shape)
    save_file(packed, stored / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((stored / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    }
    (stored / "config.json").write_text(json.dumps(config))
    for name, experts in experts_of(load(stored)).items():
        for number in range(5):
            gate, up, down = (values[f"{name}.{number}.{p}_proj.weight"] for p in ("gate", "up", "down"))
            assert torch.equal(experts.dequantized("gate_up_proj", number), torch.cat((gate, up)))
            assert torch.equal(experts.dequantized("down_proj", number), down)


def test_a_missing_expert_is_refused_by_name(models, tmp_path):
    directory, _ = models("qwen3_moe")
    for lacking in ("experts.4.", "experts.4.gate_proj", "layers.0.mlp.experts."):
        broken = shutil.copytree(directory, tmp_path / lacking)
        weights = load_file(broken / "model.safetensors")
        kept = {name: weight for name, weight in weights.items() if lacking not in name}
        assert len(kept) < len(weights)
        save_file(kept, broken / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ModelError, match=r"model\.layers\.0\.mlp\.experts"):
            load(broken)


def test_a_checkpoint_of_many_shards_never_has_two_of_them_on_the_host(tmp_path, monkeypatch):
    import weakref

    from qlora_cli.core.storage.safetensors_file import TensorFile

    write_expert_model("qwen3_moe", tmp_path, shard="120KB", num_hidden_layers=3)
    shards = list(tmp_path.glob("*.safetensors"))
    assert len(shards) > 5
    live, peak, original = 0, 0, TensorFile.read_entry

    def forget(count):
        nonlocal live
        live -= count

    def read_entry(self, entry, rows=None):
        nonlocal live, peak
        tensor = original(self, entry, rows)
        live += tensor.nbytes
        peak = max(peak, live)
        weakref.finalize(tensor.untyped_storage(), forget, tensor.nbytes)
        return tensor

    monkeypatch.setattr(TensorFile, "read_entry", read_entry)
    base = load(tmp_path)
    kept = sum(p.nbytes for name, p in base.named_parameters() if p.is_floating_point())
    assert peak - kept < 2 * max(path.stat().st_size for path in shards)


@pytest.mark.parametrize("lacking", ["lm_head.weight", "model.norm.weight", "model.embed_tokens.weight"])
def test_a_missing_head_norm_or_embedding_is_refused_by_name(models, tmp_path, lacking):
    directory, _ = models("llama")
    broken = shutil.copytree(directory, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    del weights[lacking]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=lacking.replace(".", r"\.")):
        load(broken)
