"""Headers, norms and 4-bit errors are those of the tensors themselves."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_cli.core.adapters.adapter_facts import read_adapter
from qlora_cli.core.adapters.lora import attach_adapter, save_adapter
from qlora_cli.core.inspection.quantization_error import measure_quantization_error
from qlora_cli.core.inspection.weight_stats import (
    LayerValue,
    group_tensors,
    layer_of,
    list_tensors,
    measure_updates,
    tabulate_layers,
)
from qlora_cli.core.models.files import resolve_model
from qlora_cli.core.models.quantization import round_trip
from qlora_cli.core.models.structure import build_empty
from qlora_cli.errors import ModelError
from qlora_cli.settings.groups import LoraSettings, QuantizationSettings
from tests.adapted import draw_b

CPU = torch.device("cpu")


def test_tensors_are_grouped_by_module_and_dtype(tmp_path):
    tensors = {
        "model.layers.0.q_proj.weight": torch.zeros(4, 8, dtype=torch.bfloat16),
        "model.layers.1.q_proj.weight": torch.zeros(4, 8, dtype=torch.bfloat16),
        "model.layers.1.q_proj.bias": torch.zeros(4),
        "lm_head.weight": torch.zeros(2, 8, dtype=torch.float16),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    save_file({"lm_head.weight": torch.zeros(9)}, tmp_path / "consolidated.safetensors")
    groups = {
        (group["module"], group["dtype"]): group
        for group in group_tensors(entry for _, entry in list_tensors(tmp_path).values())
    }
    assert set(groups) == {("q_proj", "BF16"), ("q_proj", "F32"), ("lm_head", "F16")}
    both = groups["q_proj", "BF16"]
    assert (both["tensors"], both["elements"], both["stored_bytes"]) == (2, 64, 128)


@pytest.mark.parametrize("content", [b"", b"\xff" * 8, b"\x02\0\0\0\0\0\0\0{x"])
def test_a_damaged_file_is_named(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError) as caught:
        list_tensors(tmp_path)
    assert "model.safetensors" in caught.value.message


def test_layers_are_read_from_names():
    assert layer_of("model.layers.11.self_attn.q_proj") == 11
    assert layer_of("transformer.h.0.mlp") == 0
    assert layer_of("lm_head") is None


@pytest.mark.parametrize("rslora", [False, True])
def test_the_norm_of_an_update_is_that_of_the_product(tiny_model, tmp_path, rslora):
    patterns = {"rank_pattern": ("v_proj=2",), "alpha_pattern": ("layers.1.self_attn.q_proj=24",)}
    lora = LoraSettings(rank=4, alpha=8, rslora=rslora, **patterns)
    model = draw_b(attach_adapter(build_model(tiny_model("llama")), lora), scale=1.0)
    save_adapter(model, tmp_path, base_name="base")
    found = {(value.layer, value.module): value.value for value in measure_updates(tmp_path, read_adapter(tmp_path))}
    assert len(found) == 2 * 7
    for name in ("q_proj", "k_proj", "v_proj"):
        layer = getattr(model.base_model.model.model.layers[1].self_attn, name)
        exact = layer.scaling["default"] * (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).norm()
        assert found[1, name] == pytest.approx(float(exact.detach()), rel=1e-5)


def build_model(directory):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox", "bloom"])
def test_the_4bit_error_is_that_of_the_round_trip(tiny_model, architecture, double_quant):
    directory = tiny_model(architecture)
    events = []
    found = measure_quantization_error(
        build_empty(resolve_model(str(directory)).config),
        directory,
        QuantizationSettings(quant_type="nf4", double_quant=double_quant),
        compute_dtype=torch.float32,
        device=CPU,
        report=events.append,
    )
    # NF4 in blocks of 64 loses about 9 % of a normal weight's norm (https://arxiv.org/abs/2305.14314).
    assert all(0.07 < value.value < 0.11 for value in found)
    assert events[-1].done == events[-1].total == len(found)
    if architecture == "llama":
        weight = load_file(directory / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
        lost = round_trip(weight, quant_type="nf4", double_quant=double_quant) - weight
        value = next(v.value for v in found if (v.layer, v.module) == (1, "up_proj"))
        assert value == pytest.approx(float(lost.norm() / weight.norm()), rel=1e-5)


def test_fp4_loses_more_than_nf4(tiny_model):
    directory = tiny_model("llama")
    mean = {}
    for quant_type in ("nf4", "fp4"):
        found = measure_quantization_error(
            build_empty(resolve_model(str(directory)).config),
            directory,
            QuantizationSettings(quant_type=quant_type, double_quant=True),
            compute_dtype=torch.float32,
            device=CPU,
            report=lambda event: None,
        )
        mean[quant_type] = sum(value.value for value in found) / len(found)
    assert mean["fp4"] > 1.1 * mean["nf4"]


def test_a_checkpoint_without_a_linear_s_weight_is_refused(tiny_model, tmp_path):
    directory = tiny_model("llama")
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelError) as caught:
        measure_quantization_error(
            build_empty(resolve_model(str(directory)).config),
            tmp_path,
            QuantizationSettings(quant_type="nf4", double_quant=True),
            compute_dtype=torch.float32,
            device=CPU,
            report=lambda event: None,
        )
    assert "layers.0.mlp.up_proj" in caught.value.message


def test_a_table_has_a_row_a_layer_and_a_column_a_module():
    values = [
        LayerValue(1, "q", 0.123456),
        LayerValue(0, "q", 2.0),
        LayerValue(0, "v", 3.0),
        LayerValue(None, "x", 1.0),
    ]
    table = tabulate_layers("Norms", values)
    assert table["columns"] == ["layer", "q", "v", "x"]
    assert table["rows"] == [[0, 2.0, 3.0, None], [1, 0.123, None, None], [None, None, None, 1.0]]
    json.dumps(table)
