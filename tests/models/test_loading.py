"""The 4-bit base: what is quantised, what is refused, what is taken from the cache or a stored checkpoint."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import RwkvConfig, RwkvForCausalLM

from qlora_cli.core.adapters.lora import attach_adapter
from qlora_cli.core.bnb import bitsandbytes
from qlora_cli.core.models.files import resolve_model
from qlora_cli.core.models.loading import load_base
from qlora_cli.core.models.quantization import (
    count_parameters,
    dequantized_weight,
    freeze_base,
    is_4bit,
)
from qlora_cli.core.models.structure import build_empty, linear_names
from qlora_cli.errors import ModelError
from qlora_cli.settings.groups import LoraSettings, QuantizationSettings
from tests.conftest import ARCHITECTURES, FEW, make_tokenizer, most_slow, write_model
from tests.experts.expert_modules import write_expert_model


@pytest.mark.parametrize("architecture", most_slow(ARCHITECTURES, FEW))
def test_every_linear_but_the_head_is_4bit_on_every_architecture(load_tiny, architecture):
    base, _ = load_tiny(architecture)
    names = linear_names(base)
    assert names
    assert all(is_4bit(base.get_submodule(name)) for name in names)
    head = base.get_output_embeddings()
    assert isinstance(head, nn.Linear) and not is_4bit(head)
    assert not any(parameter.requires_grad for parameter in base.parameters())
    assert torch.isfinite(base(torch.arange(5, 15)[None]).logits).all()


def test_parameters_are_counted_true_not_packed(load_tiny, tiny_model):
    base, _ = load_tiny("gpt_neox")
    empty = build_empty(resolve_model(str(tiny_model("gpt_neox"))).config)
    assert count_parameters(base) == (0, sum(p.numel() for p in empty.parameters()))


def test_memory_that_runs_out_while_a_weight_is_quantised_is_said(load_tiny, monkeypatch):
    def no_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(bitsandbytes.functional, "quantize_4bit", no_memory)
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


@pytest.mark.parametrize("layout", ["llama", "qwen3_moe"])
def test_a_tensor_of_zeros_is_said(tiny_model, tmp_path, layout):
    """As the end of a file is that was made in its length and not filled."""
    directory, said = tmp_path / "model", []
    if layout == "llama":
        shutil.copytree(tiny_model("llama"), directory)
    else:
        write_expert_model(layout, directory)
    weights = load_file(directory / "model.safetensors")
    name = max(name for name in weights if name.endswith("down_proj.weight"))
    options = {"compute_dtype": torch.float32, "device": torch.device("cpu")}
    for factor, count in ((1, 0), (0, 1)):
        weights[name] *= factor
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
        load_base(resolve_model(str(directory), report=said.append), QuantizationSettings(base_cache=False), **options)
        assert sum("1 tensor" in event.text and "nothing but zeros" in event.text for event in said) == count


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


def test_widths_that_bitsandbytes_misreads_on_the_cpu_are_refused(tiny_model):
    directory = tiny_model("llama", hidden_size=96)
    with pytest.raises(ModelError, match="no multiple of 64"):
        load_base(
            resolve_model(str(directory)),
            QuantizationSettings(),
            compute_dtype=torch.float32,
            device=torch.device("cpu"),
        )


@pytest.mark.parametrize("architecture", ["qwen2", "jamba"])
def test_the_second_load_comes_from_the_cache_with_the_same_bits(tmp_path, monkeypatch, architecture):
    """Jamba, told that it is quantised, would add a bias to its time steps and take it off again, which rounds them."""
    shape = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_experts": 1}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "attn_layer_offset": 1, "mamba_dt_rank": 64}
    monkeypatch.setitem(ARCHITECTURES, "jamba", ("JambaConfig", {**shape, "use_mamba_kernels": False}))
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path))
    ids, reported = torch.arange(5, 25)[None], []
    files = resolve_model(str(write_model(tmp_path / "model", architecture)), report=reported.append)
    options = {"compute_dtype": torch.bfloat16, "device": torch.device("cpu")}
    logits = [load_base(files, QuantizationSettings(), **options)[0](ids).logits for _ in range(2)]
    assert torch.equal(*logits)
    assert [event.text for event in reported if "kept in" in event.text] == [
        f"Using the quantised base kept in {tmp_path / 'base'}."
    ]


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])  # a Conv1D's weight lies as (out, in) once it is in 4 bits
def test_a_checkpoint_that_is_4bit_already_is_taken_as_it_is(tiny_model, tmp_path, architecture):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_compute_dtype=torch.float32)
    model = tiny_model(architecture)
    stored = AutoModelForCausalLM.from_pretrained(model, quantization_config=config, dtype=torch.float32)
    stored.save_pretrained(tmp_path)
    base, identity = load_base(
        resolve_model(str(tmp_path)), QuantizationSettings(), compute_dtype=torch.float32, device=torch.device("cpu")
    )
    assert (identity.quant_type, identity.double_quant) == ("fp4", False)
    freeze_base(stored)
    ids = torch.arange(5, 25)[None]
    assert torch.equal(base(ids).logits, stored(ids).logits)


def test_a_base_does_not_change_its_weights_in_evaluation(tmp_path):
    """As rwkv does every sixth layer, which ended in an error below an adapter."""
    config = RwkvConfig(
        vocab_size=384,
        hidden_size=64,
        attention_hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=7,
        context_length=64,
    )
    torch.manual_seed(0)
    original = RwkvForCausalLM(config)
    original.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    held, device = QuantizationSettings(base_cache=False), torch.device("cpu")
    base, _ = load_base(resolve_model(str(tmp_path)), held, compute_dtype=torch.float32, device=device)
    for name, module in base.named_modules():
        if is_4bit(module):
            original.get_submodule(name).weight.data = dequantized_weight(module)
    model, ids = attach_adapter(base, LoraSettings(rank=4)), torch.arange(2, 12)[None]
    with torch.no_grad():
        wanted = original.eval()(ids).logits  # rescaled
        for mode in (False, True, False):
            torch.testing.assert_close(
                model.train(mode)(input_ids=ids, use_cache=False).logits, wanted, rtol=1e-3, atol=1e-4
            )
