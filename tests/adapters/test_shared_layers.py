"""A block that a model repeats has one adapter: trained once, saved for PEFT in each place, merged once."""

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from qlora_cli.artifacts import ADAPTER_WEIGHTS
from qlora_cli.commands.merge import merge
from qlora_cli.config import MergeConfig
from qlora_cli.core.adapters.lora import adapter_state, attach_adapter, load_adapter_state, save_adapter
from qlora_cli.core.models.files import resolve_model
from qlora_cli.core.models.loading import load_base
from qlora_cli.core.models.quantization import dequantized_weight, four_bit_linears, is_4bit
from qlora_cli.errors import AdapterError
from qlora_cli.events import report_nothing
from qlora_cli.settings.groups import LoraSettings, QuantizationSettings
from tests.adapters.test_targets import IDS, build, randomise
from tests.conftest import make_tokenizer

ZAMBA = transformers.Zamba2Config(
    vocab_size=512,
    hidden_size=64,
    num_hidden_layers=4,
    layers_block_type=["linear_attention", "hybrid", "linear_attention", "hybrid"],
    num_attention_heads=4,
    num_key_value_heads=4,
    intermediate_size=128,
    mamba_d_state=16,
    mamba_ngroups=1,
    n_mamba_heads=4,
    num_mem_blocks=1,
    adapter_rank=64,
    use_shared_attention_adapter=True,
    chunk_size=32,
    pad_token_id=1,
)


def test_a_shared_block_has_one_pair_in_training_and_peft_reads_it_in_every_place(tmp_path):
    adapted = attach_adapter(build(ZAMBA), LoraSettings(rank=4, alpha=8))
    first, other = (
        adapted.get_base_model().model.layers[place].shared_transformer.feed_forward.down_proj for place in (1, 3)
    )
    assert first is not other and first.lora_A["default"].weight is other.lora_A["default"].weight
    randomise(adapted)
    adapted(IDS).logits.sum().backward()
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trained.values()), [
        name for name, p in trained.items() if p.grad is None
    ]
    save_adapter(adapted, tmp_path, base_name="org/base")
    again = PeftModel.from_pretrained(build(ZAMBA), str(tmp_path)).eval()
    torch.testing.assert_close(again(IDS).logits, adapted(IDS).logits, rtol=0, atol=1e-5)
    fresh = attach_adapter(build(ZAMBA), LoraSettings(rank=4, alpha=8)).eval()
    load_adapter_state(fresh, load_file(tmp_path / ADAPTER_WEIGHTS))
    torch.testing.assert_close(fresh(IDS).logits, adapted(IDS).logits, rtol=0, atol=1e-5)
    assert len(adapter_state(fresh)) == len(load_file(tmp_path / ADAPTER_WEIGHTS))


@pytest.mark.parametrize("shared", [True, False])
def test_a_shared_weight_is_merged_once_and_never_from_two_updates(shared, tmp_path):
    build(ZAMBA).save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    if shared:
        adapted = randomise(attach_adapter(build(ZAMBA), LoraSettings(rank=4, alpha=8)))
        save_adapter(adapted, tmp_path, base_name=str(tmp_path / "base"))
    else:
        targets = ["shared_transformer.feed_forward.down_proj"]
        adapted = randomise(get_peft_model(build(ZAMBA), LoraConfig(r=4, target_modules=targets)))
        adapted.save_pretrained(tmp_path)
    config = MergeConfig(
        model=str(tmp_path / "base"),
        adapter=str(tmp_path),
        output=str(tmp_path / "merged"),
        base="original",
        dtype="float32",
        verify=False,
    )
    if not shared:
        with pytest.raises(AdapterError, match="one weight for both"):
            merge(config, report_nothing)
        return
    merge(config, report_nothing)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(merged(IDS).logits, adapted(IDS).logits, rtol=0, atol=1e-5)


def test_a_shared_weight_is_in_4_bits_once_also_from_the_copy_and_in_a_merged_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    build(ZAMBA).save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    told = []
    files = resolve_model(str(tmp_path / "base"), report=told.append)
    loaded = [
        load_base(files, QuantizationSettings(), compute_dtype=torch.float32, device=torch.device("cpu"))[0]
        for _ in range(2)
    ]
    assert "Using the quantised base" in told[-1].text
    for base in loaded:
        blocks = [base.model.layers[place].shared_transformer for place in (1, 3)]
        first, other = (block.feed_forward.down_proj for block in blocks)
        assert is_4bit(first) and is_4bit(other) and first is not other and first.weight is other.weight
    logits = loaded[0](IDS).logits
    assert torch.equal(loaded[1](IDS).logits, logits)
    plain = build(ZAMBA)
    for name, linear in four_bit_linears(loaded[0]):
        plain.get_submodule(name).weight.data = dequantized_weight(linear).float()
    torch.testing.assert_close(plain(IDS).logits, logits, rtol=0, atol=1e-5)
    adapted = randomise(attach_adapter(loaded[0], LoraSettings(rank=4, alpha=8)))
    save_adapter(adapted, tmp_path, base_name=str(tmp_path / "base"))
    config = MergeConfig(model=str(tmp_path / "base"), adapter=str(tmp_path), output=str(tmp_path / "m"), quantize=True)
    merge(config, report_nothing)  # which reads it back, and compares
