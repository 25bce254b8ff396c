"""Names of a checkpoint's tensors, found where transformers puts them as it loads."""

from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers.core_model_loading import Chunk, Concatenate, PermuteForRope, Transpose, WeightConverter

from qlora_cli.core.models.files import resolve_model
from qlora_cli.core.models.loading import load_base
from qlora_cli.core.models.quantization import dequantized_weight, four_bit_linears
from qlora_cli.core.models.structure import build_empty
from qlora_cli.core.models.weight_names import WeightOrigin, map_names, renamer
from qlora_cli.errors import ModelError
from qlora_cli.settings.groups import QuantizationSettings
from tests.conftest import ARCHITECTURES


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_parameter_is_found_once(tiny_model, architecture) -> None:
    directory = tiny_model(architecture)
    model = build_empty(resolve_model(str(directory)).config)
    with safe_open(directory / "model.safetensors", "pt") as reader:
        names = list(reader.keys())
    found = map_names(names, model)
    parameters = {name for name, _ in model.named_parameters()}  # tied ones once
    assert parameters <= set(found)
    assert len(set(found.values())) == len(found)


def test_a_missing_or_an_extra_prefix_and_an_older_name_are_seen_through(tiny_model) -> None:
    model = build_empty(resolve_model(str(tiny_model("gpt_neox"))).config)
    names = ["layers.0.mlp.dense_h_to_4h.weight", "embed_out.weight", "some.stranger"]
    assert map_names(names, model) == {
        "gpt_neox.layers.0.mlp.dense_h_to_4h.weight": "layers.0.mlp.dense_h_to_4h.weight",
        "lm_head.weight": "embed_out.weight",
    }
    assert renamer(model)("lm_head.weight") == ("lm_head.weight", False)


def test_two_tensors_for_one_place_are_refused(tiny_model) -> None:
    model = build_empty(resolve_model(str(tiny_model("gpt_neox"))).config)
    with pytest.raises(ModelError, match=r"holds lm_head\.weight twice, as embed_out\.weight and as lm_head\.weight"):
        map_names(["embed_out.weight", "lm_head.weight"], model)


class ThreeLinears(nn.Module):
    """Weights `q` (8, 4), `k` (8, 4) and `qk` (16, 4), and a configuration of 2 heads."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.qk = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(4, 16)
        self.config = SimpleNamespace(num_attention_heads=2)


@pytest.mark.parametrize(
    ("sources", "targets", "operations"),
    [
        (["fused.weight"], ["q.weight", "k.weight"], [Chunk(dim=0)]),
        (["fused.weight"], ["q.weight", "k.weight"], [Chunk(dim=0), PermuteForRope()]),
        (["q.weight", "k.weight"], ["qk.weight"], [Concatenate(dim=0)]),
        (["q.weight", "k.weight"], ["qk.weight"], [Concatenate(dim=1)]),
        (["q.weight"], ["qk.weight"], [Transpose(0, 1)]),
    ],
    ids=lambda value: str(value[0])[:20],
)
def test_rows_of_what_is_rearranged_are_found_where_they_stay_whole(sources, targets, operations):
    rows_are_whole = not any(isinstance(step, Transpose) or getattr(step, "dim", 0) for step in operations)
    converter = WeightConverter(sources, targets, operations=operations)
    origin = WeightOrigin(tuple(targets), {name: [name] for name in sources}, converter)
    stored = {name: torch.randn(16 if name == "fused.weight" else 8, 4) for name in sources}
    rows = origin.rows({name: tuple(value.shape) for name, value in stored.items()}, ThreeLinears())
    assert (rows is not None) == rows_are_whole
    if rows is not None:
        whole = torch.cat([stored[name] for name in origin.names])
        for name, value in origin.read(stored.__getitem__, ThreeLinears()).items():
            assert torch.equal(value, whole[rows[name]])


def test_linears_that_are_split_by_the_model_s_own_shapes_are_packed(tmp_path):
    """Molmo 2's language model keeps query, key and value as one, of which transformers asks the model how long each is."""
    molmo2 = pytest.importorskip("transformers.models.molmo2", reason="transformers 5.17 has no Molmo 2")
    size = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "head_dim": 16}
    text = {**size, "num_key_value_heads": 2, "vocab_size": 384, "num_hidden_layers": 1}
    tower = {**size, "num_key_value_heads": 4, "num_hidden_layers": 1}
    between = {**size, "num_key_value_heads": 4, "text_hidden_size": 64, "vit_layers": [-1]}
    config = molmo2.Molmo2Config(text_config=text, vision_config=tower, adapter_config=between)
    model = molmo2.Molmo2ForConditionalGeneration(config)
    model.save_pretrained(tmp_path)
    settings, cpu = QuantizationSettings(base_cache=False), torch.device("cpu")
    base, _ = load_base(resolve_model(str(tmp_path)), settings, compute_dtype=torch.float32, device=cpu)
    linears = dict(four_bit_linears(base))
    assert {name.rpartition(".")[2] for name in linears} >= {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
    for name, linear in linears.items():
        wanted = model.get_parameter(f"{name}.weight")
        assert (dequantized_weight(linear) - wanted).abs().mean() < 0.1 * wanted.abs().mean(), name
