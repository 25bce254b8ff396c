"""Merging into bases with routed experts: the merged checkpoint answers as base and adapter, in the base's own layout."""

import json
import shutil
from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

from qlora_cli.artifacts import FORMAT, RUN_RECORD
from qlora_cli.commands.merge import merge
from qlora_cli.config import MergeConfig
from qlora_cli.core.adapters.lora import attach_adapter, save_adapter
from qlora_cli.core.models.files import resolve_model
from qlora_cli.core.models.loading import load_base
from qlora_cli.core.weights.checkpoint import Checkpoint
from qlora_cli.errors import ModelError
from qlora_cli.settings.groups import LoraSettings, QuantizationSettings
from tests.experts.expert_modules import write_expert_model
from tests.experts.stored_bases import store_in_4_bits, store_in_fp8, store_in_mxfp4
from tests.experts.test_loading_experts import load

IDS = torch.arange(5, 45)[None]


def train(directory, output, *, seed=0, **lora):
    """An adapter on a base, as a run leaves it, with weights that change every layer; and the answer with it."""
    files = resolve_model(str(directory))
    held = QuantizationSettings(base_cache=False)
    base, identity = load_base(files, held, compute_dtype=torch.float32, device=torch.device("cpu"))
    model = attach_adapter(base, LoraSettings(rank=4, alpha=8.0, dropout=0.0, **lora))
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.08)
    output.mkdir()
    save_adapter(model.eval(), output, base_name=str(directory))
    (output / RUN_RECORD).write_text(json.dumps({"format": FORMAT, "base": asdict(identity)}))
    with torch.no_grad():
        return model(IDS, use_cache=False).logits, base


def merged(adapter, output, **options):
    options = {"verify": False, **options}
    result = merge(MergeConfig(adapter=str(adapter), output=str(output), dtype="float32", **options), lambda e: None)
    assert not options["verify"] or result.verification.kl_mean < 1e-6
    model, info = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    with torch.no_grad():
        return model.eval()(IDS, use_cache=False).logits


@pytest.mark.parametrize(
    ("layout", "shard", "adapt_experts"),
    [
        ("qwen3_moe", "60KB", True),
        ("deepseek_v3", "1GB", False),
        *(pytest.param(name, "1GB", True, marks=pytest.mark.slow) for name in ("mixtral", "gpt_oss", "llama4")),
    ],
)
def test_the_merged_model_answers_as_base_and_adapter(layout, shard, adapt_experts, tmp_path):
    directory = tmp_path / "base"
    write_expert_model(layout, directory, shard=shard)
    expected, _ = train(directory, tmp_path / "adapter", adapt_experts=adapt_experts)
    found = merged(tmp_path / "adapter", tmp_path / "merged", verify=layout in ("qwen3_moe", "deepseek_v3"))
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-4)
    names = [sorted(p.name for p in d.glob("*.safetensors")) for d in (directory, tmp_path / "merged")]
    assert names[0] == names[1]


@pytest.mark.parametrize(
    ("layout", "store"), [("gpt_oss", store_in_mxfp4), ("qwen3_moe", store_in_fp8), ("llama", store_in_4_bits)]
)
def test_a_base_stored_quantised_trains_and_merges_from_itself_and_from_the_original(layout, store, tmp_path):
    original, stored = tmp_path / "original", tmp_path / "stored"
    write_expert_model(layout, original, **({"intermediate_size": 96} if layout == "gpt_oss" else {}))
    values = store(original, stored)
    expected, _base = train(stored, tmp_path / "adapter")
    found = merged(tmp_path / "adapter", tmp_path / "merged")
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-4)
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "quantization_config" not in config
    tensors = load_file(tmp_path / "merged" / "model.safetensors")
    assert set(tensors) == set(load_file(original / "model.safetensors"))
    if layout == "llama":  # some of whose layers are left in 16 bits: verified, in 4 bits are those that were
        quantised = MergeConfig(adapter=str(tmp_path / "adapter"), output=str(tmp_path / "packed"), quantize=True)
        merge(quantised, lambda e: None)
    if layout == "llama":  # which 4 bits round as it was: from the 16-bit one, what was left in 16 bits as it is
        found = merged(tmp_path / "adapter", tmp_path / "named", model=str(original), verify=True)
        torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-4)
    again = merged(tmp_path / "adapter", tmp_path / "again", base="original")
    assert again.isfinite().all()
    untouched = load_file(tmp_path / "again" / "model.safetensors")
    adapted = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    for name, value in values.items():
        if ".experts." in name:
            torch.testing.assert_close(untouched[name], value.float(), rtol=0, atol=0)
        else:
            assert name.split(".")[-2] in adapted


def test_ragged_blocks_of_fp8_are_read_by_the_block_size_of_the_configuration(tmp_path):
    directory, stored = tmp_path / "base", tmp_path / "stored"
    write_expert_model("deepseek_v3", directory, kv_lora_rank=160, qk_rope_head_dim=32, hidden_size=256)
    values = store_in_fp8(directory, stored)
    from qlora_cli.core.weights.stored_formats import stored_format

    with Checkpoint(stored, stored_format(resolve_model(str(stored)).config, "m")) as checkpoint:
        assert any(value.shape[0] == 192 for value in values.values())
        for name, value in values.items():
            assert torch.equal(checkpoint.read(name), value)
            assert torch.equal(checkpoint.read(name, slice(17, 40)), value[17:40])


def test_other_formats_are_refused_before_any_weight_is_read(tmp_path):
    directory = tmp_path / "base"
    write_expert_model("llama", directory)
    config = json.loads((directory / "config.json").read_text())
    for method in ("gptq", "awq", "compressed-tensors"):
        stored = shutil.copytree(directory, tmp_path / method)
        (stored / "model.safetensors").unlink()
        (stored / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": method}}))
        with pytest.raises(ModelError, match=f"quantised already, by {method}"):
            load(stored)


def test_tensors_that_no_module_takes_are_in_the_account_and_in_the_merged_checkpoint(tmp_path):
    directory, said = tmp_path / "base", []
    write_expert_model("qwen3_moe", directory)
    weights = load_file(directory / "model.safetensors")
    weights["mtp.fc.weight"] = torch.randn(8, 4)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    load(directory, said=said)
    assert any("1 tensors of the checkpoint" in e.text and "mtp.fc.weight" in e.text for e in said)
    train(directory, tmp_path / "adapter")
    merged(tmp_path / "adapter", tmp_path / "merged")
    assert torch.equal(load_file(tmp_path / "merged" / "model.safetensors")["mtp.fc.weight"], weights["mtp.fc.weight"])


@pytest.mark.parametrize("square", [False, True])
def test_experts_that_transformers_turns_where_they_need_it_are_the_same_in_both_layouts(tmp_path, square):
    """Qwen3-VL's lie transposed on the hub, and not in what transformers 5 saves of it."""
    width = 64 if square else 48
    sizes = {"vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "head_dim": 16}
    text = {
        **sizes,
        "num_key_value_heads": 2,
        "num_experts": 3,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": width,
    }
    vision = {"hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 32, "depth": 1, "num_heads": 2}
    config = Qwen3VLMoeConfig(text_config=text, vision_config={**vision, "deepstack_visual_indexes": [0]})
    torch.manual_seed(0)
    Qwen3VLMoeForConditionalGeneration(config).save_pretrained(tmp_path / "saved")
    stored = load_file(tmp_path / "saved" / "model.safetensors")
    shutil.copytree(tmp_path / "saved", tmp_path / "hub")
    answers, made = {}, {}
    for layout in ("saved",) if square else ("saved", "hub"):

        def turned(weights, layout=layout):
            turn = layout == "hub"
            return {n: v.transpose(1, 2).contiguous() if turn and ".experts." in n else v for n, v in weights.items()}

        save_file(turned(stored), tmp_path / layout / "model.safetensors", metadata={"format": "pt"})
        answers[layout], _ = train(tmp_path / layout, tmp_path / f"{layout}-run")
        config = MergeConfig(adapter=str(tmp_path / f"{layout}-run"), output=str(tmp_path / f"{layout}-merged"))
        merge(replace(config, dtype="float32", verify=False), lambda event: None)
        made[layout] = turned(load_file(tmp_path / f"{layout}-merged" / "model.safetensors"))
        model = Qwen3VLMoeForConditionalGeneration.from_pretrained(tmp_path / f"{layout}-merged").eval()
        with torch.no_grad():
            torch.testing.assert_close(model(IDS, use_cache=False).logits, answers[layout], rtol=0, atol=2e-5)
    for answer in answers.values():
        torch.testing.assert_close(answer, answers["saved"], rtol=0, atol=1e-5)
    assert all(torch.equal(value, made["saved"][name]) for weights in made.values() for name, value in weights.items())
