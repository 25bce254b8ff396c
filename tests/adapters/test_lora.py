"""Adapters: attached where asked, saved as PEFT saves them, refused on another base."""

import json

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from qlora_cli.artifacts import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from qlora_cli.core.adapters.adapter_facts import read_adapter
from qlora_cli.core.adapters.adapter_record import read_adapter_record
from qlora_cli.core.adapters.lora import (
    adapter_state,
    attach_adapter,
    load_adapter,
    load_adapter_state,
    save_adapter,
)
from qlora_cli.core.inspection.run_summary import describe_run
from qlora_cli.core.models.files import ModelFiles, resolve_model
from qlora_cli.core.models.quantization import count_parameters
from qlora_cli.core.models.structure import build_empty, linear_names
from qlora_cli.errors import AdapterError
from qlora_cli.settings.groups import LoraSettings
from tests.adapters.test_targets import randomise
from tests.conftest import ARCHITECTURES, FEW, most_slow

IDS = torch.arange(5, 25)[None]


@pytest.mark.parametrize("architecture", most_slow(ARCHITECTURES, FEW))
def test_all_linear_adapts_every_linear_and_never_the_head(load_tiny, tiny_model, architecture):
    base, _ = load_tiny(architecture)
    names = linear_names(base)
    adapted = attach_adapter(base, LoraSettings(rank=4, alpha=8))
    found = {n.split(".lora_A")[0] for n, _ in adapted.named_parameters() if ".lora_A." in n}
    assert found == {f"base_model.model.{name}" for name in names}
    assert all(p.dtype == torch.float32 for p in adapted.parameters() if p.requires_grad)
    empty = build_empty(resolve_model(str(tiny_model(architecture))).config)
    assert count_parameters(attach_adapter(empty, LoraSettings(rank=4, alpha=8))) == count_parameters(adapted)


@pytest.mark.parametrize("name", ["q_proj", "mlp"])
def test_a_module_in_4_bits_is_not_trained_in_full(load_tiny, tiny_model, name):
    """Neither where it is loaded nor where it is planned from the configuration."""
    for base in (load_tiny("llama")[0], build_empty(resolve_model(str(tiny_model("llama"))).config)):
        with pytest.raises(AdapterError, match=f"--modules-to-save {name} names .* held in 4 bits"):
            attach_adapter(base, LoraSettings(rank=4, alpha=8, modules_to_save=(name,)))


def test_what_peft_would_take_for_other_layers_is_said():
    laguna = pytest.importorskip("transformers.models.laguna")
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_attention_heads_per_layer": [4, 4]}
    experts = {"num_experts": 4, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64}
    config = laguna.LagunaConfig(**sizes, **heads, **experts, mlp_layer_types=["dense", "sparse"])
    events = []
    attach_adapter(build_empty(config), LoraSettings(rank=4, alpha=8), report=events.append)
    (event,) = events
    assert "6 tensors" in event.text and "shared_experts" in event.text
    qwen3 = transformers.Qwen3MoeConfig(
        **sizes, **dict(list(heads.items())[:2]), num_experts=4, moe_intermediate_size=64
    )
    attach_adapter(build_empty(qwen3), LoraSettings(rank=4, alpha=8, adapt_experts=True), report=events.append)
    assert len(events) == 1


def test_a_target_that_matches_nothing_is_an_error_that_names_the_layers(load_tiny):
    base, _ = load_tiny("llama")
    with pytest.raises(AdapterError, match="v_porj") as error:
        attach_adapter(base, LoraSettings(rank=4, alpha=8, target_modules=("q_proj", "v_porj")))
    assert "v_proj" in error.value.hint


def test_the_same_seed_gives_the_same_adapter_and_leaves_the_random_state(load_tiny):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    states = [
        adapter_state(attach_adapter(load_tiny("gpt_neox")[0], LoraSettings(rank=4, alpha=8), seed=s))
        for s in (3, 3, 4)
    ]
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(states[0][n], states[1][n]) for n in states[0])
    assert any(not torch.equal(states[0][n], states[2][n]) for n in states[0])


@pytest.mark.parametrize("changes", [{}, {"rslora": True}, {"dora": True}, {"modules_to_save": ("norm",)}])
def test_a_saved_adapter_answers_the_same_through_peft_alone(load_tiny, tmp_path, changes):
    from peft import PeftModel

    adapted = attach_adapter(load_tiny("llama")[0], LoraSettings(rank=4, alpha=8, **changes))
    randomise(adapted)
    save_adapter(adapted, tmp_path, base_name="org/base")
    again = PeftModel.from_pretrained(load_tiny("llama")[0], str(tmp_path))
    torch.testing.assert_close(again(IDS).logits, adapted.eval()(IDS).logits, rtol=0, atol=0)
    ours = load_adapter(load_tiny("llama")[0], tmp_path)
    assert count_parameters(ours)[1] == count_parameters(adapted)[1]
    facts = read_adapter(tmp_path)
    assert (facts.rank, facts.base_model, facts.dora, facts.rslora) == (
        4,
        "org/base",
        "dora" in changes,
        "rslora" in changes,
    )


def test_an_adapter_of_other_shapes_is_refused_with_both_shapes(load_tiny, tmp_path):
    adapted = attach_adapter(load_tiny("llama")[0], LoraSettings(rank=4, alpha=8))
    save_adapter(adapted, tmp_path, base_name="org/base")
    with pytest.raises(AdapterError, match="org/base"):
        load_adapter(load_tiny("mistral")[0], tmp_path)
    with pytest.raises(AdapterError, match=r"does not fit|belong to no module"):
        load_adapter(load_tiny("gpt_neox")[0], tmp_path)


def test_tensors_that_are_not_called_as_peft_saves_them_are_not_blamed_on_the_base(load_tiny, tmp_path):
    adapted = attach_adapter(load_tiny("llama")[0], LoraSettings(rank=4, alpha=8))
    save_adapter(adapted, tmp_path, base_name="org/base")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    for old, new in ((".weight", ".default.weight"), ("base_model.model.", "")):
        save_file(
            {name.replace(old, new): tensor for name, tensor in tensors.items()}, tmp_path / "adapter_model.safetensors"
        )
        with pytest.raises(AdapterError, match=r"no place for|belong to no module") as error:
            load_adapter(load_tiny("llama")[0], tmp_path)
        assert "save_pretrained" in error.value.hint


def test_state_goes_back_bitwise_and_a_foreign_state_is_refused(load_tiny):
    adapted = attach_adapter(load_tiny("gpt_neox")[0], LoraSettings(rank=4, alpha=8))
    saved = {name: tensor.clone() for name, tensor in adapter_state(adapted).items()}
    randomise(adapted)
    load_adapter_state(adapted, saved)
    assert all(torch.equal(saved[n], t) for n, t in adapter_state(adapted).items())
    with pytest.raises(AdapterError, match="does not match"):
        load_adapter_state(adapted, dict(list(saved.items())[1:]))


def test_missing_pickled_and_broken_adapters_are_one_sentence(load_tiny, tmp_path):
    with pytest.raises(AdapterError, match="no adapter in"):
        read_adapter(tmp_path)
    save_adapter(attach_adapter(load_tiny("llama")[0], LoraSettings(rank=4, alpha=8)), tmp_path, base_name="b")
    weights = tmp_path / ADAPTER_WEIGHTS
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(AdapterError, match="cannot be read"):
        read_adapter(tmp_path)
    weights.rename(tmp_path / "adapter_model.bin")
    with pytest.raises(AdapterError, match="pickle"):
        read_adapter(tmp_path)
    config = json.loads((tmp_path / ADAPTER_CONFIG).read_text())
    (tmp_path / ADAPTER_CONFIG).write_text(json.dumps({**config, "peft_type": "IA3"}))
    weights.write_bytes(whole)
    with pytest.raises(AdapterError, match="IA3"):
        read_adapter(tmp_path)


UP = "base_model.model.model.layers.1.mlp.up_proj.lora_"
DAMAGES = {
    "nothing": (lambda tensors: tensors.clear(), {}, "holds no tensors"),
    "half": (lambda tensors: tensors.pop(f"{UP}B.weight"), {}, "half of a pair"),
    "ranks": (lambda tensors: tensors.update({f"{UP}A.weight": torch.ones(2, 64)}), {}, r"different ranks, \(2, 64\)"),
    "codes": (lambda tensors: tensors.update({f"{UP}A.weight": torch.ones(4, 64).char()}), {}, "stored as I8"),
    "empty": (lambda tensors: tensors.update({f"{UP}A.weight": torch.ones(0)}), {}, "1 of its tensors are empty"),
    "another rank": (lambda tensors: None, {"r": 8}, "is of rank 4, and .* makes it 8"),
    "no magnitudes": (lambda tensors: None, {"use_dora": True}, "has no magnitudes"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_adapter_that_is_not_whole_is_refused(load_tiny, tmp_path, damage):
    """PEFT loads it without a word, and it changes nothing, or something else."""
    change, settings, said = DAMAGES[damage]
    base, _ = load_tiny("llama")
    save_adapter(attach_adapter(base, LoraSettings(rank=4), seed=1), tmp_path, base_name="base")
    tensors = load_file(tmp_path / ADAPTER_WEIGHTS)
    change(tensors)
    save_file(tensors, tmp_path / ADAPTER_WEIGHTS)
    path = tmp_path / ADAPTER_CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    with pytest.raises(AdapterError, match=said):
        read_adapter(tmp_path)


def test_an_adapter_whose_halves_are_blocks_is_loaded_and_has_no_norm(load_tiny, tmp_path):
    """BD-LoRA stores the blocks of one half beside each other: its rank differs from that of the other."""
    blocks = peft.tuners.lora.BdLoraConfig(target_modules_bd_b=["up_proj"], nblocks=2)
    settings = peft.LoraConfig(r=4, target_modules=["up_proj"], use_bdlora=blocks, init_lora_weights=False)
    peft.get_peft_model(load_tiny("llama")[0], settings).save_pretrained(tmp_path)
    saved = load_file(tmp_path / ADAPTER_WEIGHTS)
    loaded = adapter_state(load_adapter(load_tiny("llama")[0], tmp_path))
    assert loaded.keys() == saved.keys() and all(torch.equal(loaded[name], saved[name]) for name in saved)
    assert describe_run(tmp_path, None)["tables"][-1]["rows"] == []


def test_layers_that_an_adapter_names_and_has_nothing_for_are_said(load_tiny, tmp_path):
    base, _ = load_tiny("llama")
    save_adapter(attach_adapter(base, LoraSettings(rank=4), seed=1), tmp_path, base_name="base")
    said: list = []
    load_adapter(load_tiny("llama")[0], tmp_path, report=said.append)
    assert not said
    tensors = load_file(tmp_path / ADAPTER_WEIGHTS)
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(UP)}
    save_file(kept, tmp_path / ADAPTER_WEIGHTS)
    load_adapter(load_tiny("llama")[0], tmp_path, report=said.append)
    assert "names 1 layer that it has nothing for, first model.layers.1.mlp.up_proj" in said[0].text


@pytest.mark.parametrize(
    ("made_on", "given", "said"),
    [
        ("meta/llama", "{}/llama", 0),
        ("{}/llama", "{}/llama", 0),
        ("meta/llama", "{}/models--meta--llama/snapshots/0123", 0),
        (None, "{}/llama", 0),
        ("meta/llama", "{}/llama-instruct", 1),
    ],
)
def test_another_base_than_a_foreign_adapter_names_is_said(load_tiny, tmp_path, made_on, given, said):
    """Of its weights nothing is known: adapters that others trained have no record of them."""
    base, _ = load_tiny("llama")
    named = made_on and made_on.format(tmp_path)
    save_adapter(attach_adapter(base, LoraSettings(rank=4), seed=1), tmp_path, base_name=named)
    events: list = []
    files = ModelFiles(given.format(tmp_path), tmp_path, None, report=events.append)
    read_adapter_record(tmp_path, print).require_base(files)
    assert len(events) == said and all("made on meta/llama" in event.text for event in events)


def test_an_adapter_of_nan_is_refused_by_name_and_has_no_norm(load_tiny, tmp_path):
    base, _ = load_tiny("llama")
    save_adapter(attach_adapter(base, LoraSettings(rank=4), seed=1), tmp_path, base_name="base")
    tensors = load_file(tmp_path / ADAPTER_WEIGHTS)
    tensors[f"{UP}B.weight"][3, 1] = torch.nan
    save_file(tensors, tmp_path / ADAPTER_WEIGHTS)
    with pytest.raises(AdapterError, match=f"1 of 28 tensors in .* hold NaN or infinity, first {UP}B.weight"):
        load_adapter(load_tiny("llama")[0], tmp_path)
    assert "up_proj" in describe_run(tmp_path, None)["damaged"][0]
