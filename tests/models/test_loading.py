"""The 4-bit base: what is quantised, what is refused, what identifies it."""

import json
import shutil
from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from qlora_cli.config import QuantizationSettings
from qlora_cli.core.models.files import resolve_model
from qlora_cli.core.models.identity import BaseIdentity
from qlora_cli.core.models.loading import load_base
from qlora_cli.core.models.lora import count_parameters
from qlora_cli.core.models.quantization import (
    Bnb4bitQuantize,
    dequantized_weight,
    four_bit_linears,
    freeze_base,
    is_4bit,
    round_trip,
)
from qlora_cli.core.models.structure import build_empty, linear_names
from qlora_cli.errors import ModelError, UsageError
from tests.conftest import ARCHITECTURES


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_every_linear_but_the_head_is_4bit_on_every_architecture(load_tiny, architecture):
    base, _ = load_tiny(architecture)
    names = linear_names(base)
    assert names
    assert all(is_4bit(base.get_submodule(name)) for name in names)
    head = base.get_output_embeddings()
    assert isinstance(head, nn.Linear) and not is_4bit(head)
    assert not any(parameter.requires_grad for parameter in base.parameters())
    assert torch.isfinite(base(torch.arange(5, 15)[None]).logits).all()


@pytest.mark.parametrize("architecture", ["falcon", "gpt2", "llama"])
def test_4bit_logits_are_those_of_the_dequantised_weights(load_tiny, tiny_model, architecture):
    from transformers import AutoModelForCausalLM

    base, _ = load_tiny(architecture)
    plain = AutoModelForCausalLM.from_pretrained(tiny_model(architecture), dtype=torch.float32).eval()
    for name, module in four_bit_linears(base):
        weight = dequantized_weight(module)
        target = plain.get_submodule(name)
        transposed = type(target).__name__ == "Conv1D"
        target.weight.data = weight.T.contiguous() if transposed else weight
    ids = torch.arange(5, 25)[None]
    torch.testing.assert_close(base(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_round_trip_is_bitwise_what_the_loaded_base_computes_with(load_tiny, tiny_model, quant_type, double_quant):
    base, _ = load_tiny("gpt_neox", quant_type=quant_type, double_quant=double_quant)
    weights = load_file(tiny_model("gpt_neox") / "model.safetensors")
    for name, module in four_bit_linears(base):
        again = round_trip(weights[f"{name}.weight"], quant_type=quant_type, double_quant=double_quant)
        assert torch.equal(again, dequantized_weight(module))


def test_an_evaluation_in_between_leaves_the_packed_weights_alone(load_tiny):
    base, _ = load_tiny("llama")
    before = {name: dequantized_weight(module).clone() for name, module in four_bit_linears(base)}
    with torch.no_grad():
        base.eval()(torch.arange(5, 15)[None])
    for name, module in four_bit_linears(base):
        assert torch.equal(before[name], dequantized_weight(module))


def test_parameters_are_counted_true_not_packed(load_tiny, tiny_model):
    base, _ = load_tiny("gpt_neox")
    empty = build_empty(resolve_model(str(tiny_model("gpt_neox"))).config)
    assert count_parameters(base) == (0, sum(p.numel() for p in empty.parameters()))


def test_memory_that_runs_out_while_a_weight_is_quantised_is_said(load_tiny, monkeypatch):
    def no_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(Bnb4bitQuantize, "convert", no_memory)
    with pytest.raises(ModelError, match="does not fit in the GPU's memory while it is loaded"):
        load_tiny("llama")


def test_nan_in_a_quantised_weight_is_found_at_load(tiny_model, tmp_path):
    directory = shutil.copytree(tiny_model("llama"), tmp_path / "nan")
    weights = load_file(directory / "model.safetensors")
    name = next(n for n in weights if n.endswith("down_proj.weight"))
    weights[name][3, 5] = float("nan")
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"NaN or infinity in 1 tensors, first .*{name.removeprefix('model.')}"):
        load_base(
            resolve_model(str(directory)),
            QuantizationSettings(),
            compute_dtype=torch.float32,
            device=torch.device("cpu"),
        )


def test_a_truncated_weight_file_is_named(tiny_model, tmp_path):
    directory = shutil.copytree(tiny_model("llama"), tmp_path / "cut")
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ModelError, match=r"model\.safetensors is damaged"):
        load_base(
            resolve_model(str(directory)),
            QuantizationSettings(),
            compute_dtype=torch.float32,
            device=torch.device("cpu"),
        )


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("./nowhere", "No model directory"),
        ("org/absent", "not in the local hub cache"),
        ("a/b/c", "No model directory"),
    ],
)
def test_a_missing_model_is_one_sentence(model, message):
    with pytest.raises(ModelError, match=message) as error:
        resolve_model(model)
    assert error.value.hint


def test_pickle_weights_are_not_read(tiny_model, tmp_path):
    directory = shutil.copytree(tiny_model("llama"), tmp_path / "pickle")
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickle"):
        _ = resolve_model(str(directory)).weights


def test_code_of_a_model_is_run_neither_by_its_files_nor_by_an_unpinned_flag(tiny_model, tmp_path):
    directory = shutil.copytree(tiny_model("llama"), tmp_path / "code")
    config = json.loads((directory / "config.json").read_text())
    config |= {"model_type": "strange", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
    (directory / "config.json").write_text(json.dumps(config))
    proof = tmp_path / "executed"
    (directory / "evil.py").write_text(f"open({str(proof)!r}, 'w')")
    with pytest.raises(ModelError, match="not run"):
        _ = resolve_model(str(directory)).config
    with pytest.raises(UsageError, match="40-digit"):
        resolve_model("org/model", "main", trust_remote_code=True)
    assert not proof.exists()


def test_identity_tells_siblings_of_one_shape_apart(tiny_model):
    def identity(seed, **changes):
        return resolve_model(str(tiny_model("llama", seed=seed))).identity(
            QuantizationSettings(**changes), torch.float32
        )

    first = identity(0)
    assert BaseIdentity.from_dict(asdict(first)) == first == identity(0)
    for other, field in ((identity(1), "weights_sha256"), (identity(0, quant_type="fp4"), "quant_type")):
        assert replace(first, model=other.model, **{field: getattr(other, field)}) == other != first


def test_widths_that_bitsandbytes_misreads_on_the_cpu_are_refused(tiny_model):
    directory = tiny_model("llama", hidden_size=96)
    with pytest.raises(ModelError, match="no multiple of 64"):
        load_base(
            resolve_model(str(directory)),
            QuantizationSettings(),
            compute_dtype=torch.float32,
            device=torch.device("cpu"),
        )


@pytest.mark.parametrize("width", [48, 50, 64, 96, 4544])
def test_a_round_trip_is_close_at_any_width(width):
    weight = torch.randn(8, width, generator=torch.Generator().manual_seed(0))
    again = round_trip(weight, quant_type="nf4", double_quant=True)
    assert again.shape == weight.shape
    assert (again - weight).abs().mean() < 0.1  # NF4 of a normal weight: 0.073


def test_the_second_load_comes_from_the_cache_with_the_same_bits(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path))
    ids, reported = torch.arange(5, 25)[None], []
    files = resolve_model(str(tiny_model("qwen2")), report=reported.append)
    options = {"compute_dtype": torch.float32, "device": torch.device("cpu")}
    logits = [load_base(files, QuantizationSettings(), **options)[0](ids).logits for _ in range(2)]
    assert torch.equal(*logits)
    assert [event.text for event in reported if "kept in" in event.text] == [
        f"Using the quantised base kept in {tmp_path / 'base'}."
    ]


def test_a_checkpoint_that_is_4bit_already_is_taken_as_it_is(tiny_model, tmp_path):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_compute_dtype=torch.float32)
    stored = AutoModelForCausalLM.from_pretrained(tiny_model("llama"), quantization_config=config, dtype=torch.float32)
    stored.save_pretrained(tmp_path)
    base, identity = load_base(
        resolve_model(str(tmp_path)), QuantizationSettings(), compute_dtype=torch.float32, device=torch.device("cpu")
    )
    assert (identity.quant_type, identity.double_quant) == ("fp4", False)
    freeze_base(stored)
    ids = torch.arange(5, 25)[None]
    assert torch.equal(base(ids).logits, stored(ids).logits)
