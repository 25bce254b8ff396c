"""Weights stored in bitsandbytes' 4 bits: whole ones in any storage, and refused by name where a part does not fit."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_cli.core.models.files import resolve_model
from qlora_cli.core.models.loading import load_base
from qlora_cli.core.models.quantization import dequantized_weight
from qlora_cli.core.weights.checkpoint import Checkpoint
from qlora_cli.core.weights.stored_formats import StoredFormat
from qlora_cli.errors import ModelError
from qlora_cli.settings.groups import QuantizationSettings
from tests.experts.expert_modules import write_expert_model
from tests.experts.stored_bases import store_in_4_bits

NAME = "model.layers.1.mlp.up_proj.weight"
STATE = ".quant_state.bitsandbytes__nf4"
FORMAT = StoredFormat("bitsandbytes", "nf4", double_quant=True)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def stored(tiny_model, tmp_path_factory):
    """A base of doubly quantised weights, and the values of those; not to be changed."""
    directory = tmp_path_factory.mktemp("stored") / "model"
    return directory, store_in_4_bits(tiny_model("llama"), directory, skipped=())


def with_tensors(directory, target, change):
    """A copy of a checkpoint whose tensors a function has changed in place."""
    shutil.copytree(directory, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file({n: t.contiguous() for n, t in tensors.items()}, target / "model.safetensors", metadata={"format": "pt"})
    return target


def in_state(**changes):
    def change(tensor):
        return torch.tensor(list(json.dumps(json.loads(bytes(tensor.tolist())) | changes).encode()), dtype=torch.uint8)

    return change


@pytest.mark.parametrize("ending", [".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", STATE])
def test_a_weight_without_one_of_its_parts_is_refused_by_name(stored, tmp_path, ending):
    directory = with_tensors(stored[0], tmp_path / "model", lambda tensors: tensors.pop(NAME + ending))
    held = QuantizationSettings(base_cache=False)
    with pytest.raises(ModelError, match=f"{re.escape(NAME)} .*" + ("U8" if ending == STATE else "is missing")):
        load_base(resolve_model(str(directory)), held, compute_dtype=torch.float32, device=CPU)


@pytest.mark.parametrize(
    ("ending", "change", "found"),
    [
        ("", lambda t: t[:-1], "has 4,095 bytes instead of 4,096"),
        (".absmax", lambda t: t[:-1], "127 numbers in U8 instead of 128"),
        (".absmax", lambda t: t.float(), "128 numbers in F32 instead of 128 in U8"),
        (".quant_map", lambda t: t[:8], "8 numbers in F32 instead of 16"),
        (".quant_map", lambda t: t.flip(0), "other values than the 16 of nf4"),
        (".nested_absmax", lambda t: t * torch.nan, "NaN or infinity"),
        (".nested_absmax", lambda t: t[:0], "0 numbers in F32 instead of 1"),
        (".nested_quant_map", lambda t: t * 0, "does not rise"),
        (STATE, in_state(blocksize=128), "absmax has 128 numbers in U8 instead of 64"),
        (STATE, in_state(shape=[128, 32]), "absmax has 128 numbers in U8 instead of 64"),
        (STATE, in_state(nested_offset=float("nan")), "does not describe it"),
        (STATE, in_state(quant_type="fp4"), "does not describe it"),
        (STATE, in_state(nested_blocksize=100), "does not describe it"),
        (STATE, in_state(nested_dtype="int8"), "does not describe it"),
        (STATE, lambda t: t[:20], "does not describe it"),
    ],
)
def test_a_part_that_does_not_fit_is_refused_by_name(stored, tmp_path, ending, change, found):
    def damage(tensors):
        tensors[NAME + ending] = change(tensors[NAME + ending])

    directory = with_tensors(stored[0], tmp_path / "model", damage)
    with pytest.raises(ModelError, match=found) as refused, Checkpoint(directory, FORMAT) as checkpoint:
        checkpoint.read(NAME)
    assert refused.value.message.startswith(NAME)


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32])
def test_codes_stored_as_wider_numbers_give_the_same_values(stored, tmp_path, storage):
    directory, values = stored

    def widen(tensors):
        tensors |= {name: tensors[name].view(-1).view(storage)[:, None] for name in values}

    wide = with_tensors(directory, tmp_path / "model", widen)
    held = QuantizationSettings(base_cache=False)
    base, _ = load_base(resolve_model(str(wide)), held, compute_dtype=torch.float32, device=CPU)
    with Checkpoint(wide, FORMAT) as checkpoint:
        for name, value in values.items():
            assert torch.equal(dequantized_weight(base.get_submodule(name.removesuffix(".weight"))), value)
            assert torch.equal(checkpoint.read(name), value)


def test_experts_in_another_type_than_the_configuration_says_are_refused(tmp_path):
    """Their stack has one table of values: that of the configuration, where nothing named is FP4."""
    write_expert_model("qwen3_moe", tmp_path / "plain")
    store_in_4_bits(tmp_path / "plain", tmp_path / "stored", skipped=())
    path = tmp_path / "stored" / "config.json"
    config = json.loads(path.read_text())
    del config["quantization_config"]["bnb_4bit_quant_type"]
    path.write_text(json.dumps(config))
    held = QuantizationSettings(base_cache=False)
    with pytest.raises(ModelError, match=r"experts.*is stored in nf4, doubly .* not what its config.json says"):
        load_base(resolve_model(str(tmp_path / "stored")), held, compute_dtype=torch.float32, device=CPU)
