"""Names of a checkpoint's tensors, found where transformers puts them as it loads."""

import pytest
from safetensors import safe_open

from qlora_cli.core.models.files import resolve_model
from qlora_cli.core.models.structure import build_empty
from qlora_cli.core.models.weight_names import map_names, renamer
from qlora_cli.errors import ModelError
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
