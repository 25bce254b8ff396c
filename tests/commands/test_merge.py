"""`qlora merge`: the merged checkpoint, loaded by transformers alone, predicts what base + adapter predict."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from qlora_cli.commands.train import train
from qlora_cli.config import TrainConfig
from qlora_cli.core.merge.base import RefusedMerge, foresee_refusal
from qlora_cli.core.models.files import resolve_model
from qlora_cli.core.models.loading import load_base
from qlora_cli.core.models.quantization import dequantized_weight, four_bit_linears
from qlora_cli.errors import AdapterError, MergeError
from qlora_cli.settings.groups import LoraSettings, QuantizationSettings
from tests.adapters.test_fitting import whole_wrapper
from tests.commands.merge_case import DEVICE, Case, logits_of, make_case
from tests.conftest import ARCHITECTURES, most_slow, write_model


def assert_same(case: Case, tolerance: float = 2e-4) -> None:
    """The largest difference of two logits, against logits of about 3."""
    merged = case.merged_logits()
    assert merged.shape == case.live.shape
    assert (merged - case.live).abs().max() < tolerance


def divergence(case: Case, **loading) -> float:
    """Mean KL(live || merged), nats a token."""
    live, merged = case.live.log_softmax(-1), case.merged_logits(**loading).log_softmax(-1)
    return float((live.exp() * (live - merged)).sum(-1).mean())


@pytest.mark.parametrize("architecture", most_slow(ARCHITECTURES, ("gpt_neox", "falcon")))
def test_every_architecture_predicts_the_same_once_merged(tiny_model, tmp_path, architecture) -> None:
    case = make_case(tiny_model(architecture), tmp_path)
    case.merge()
    assert_same(case)


def test_experts_that_are_stacked_as_they_load_are_merged_into_a_tensor_each(tmp_path, monkeypatch) -> None:
    """transformers makes one parameter of a layer's experts; each is in 4 bits in training, and so merged."""
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2, "intermediate_size": 128}
    shape = {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    monkeypatch.setitem(ARCHITECTURES, "mixtral", ("MixtralConfig", {**shape, **sizes}))
    case = make_case(write_model(tmp_path / "base", "mixtral"), tmp_path)
    assert case.merge().restored_weights == 8 + 24  # q, k, v, o, and three of each expert, of two layers
    assert_same(case)
    merged, stored = load_file(case.output / "model.safetensors"), load_file(case.base / "model.safetensors")
    assert set(merged) == set(stored)
    experts = [name for name in stored if "experts" in name]
    assert len(experts) == 2 * 4 * 3
    assert not any(torch.equal(merged[name], stored[name]) for name in experts)


@pytest.mark.parametrize("adapted", [{}, {"target_modules": ["v_proj"], "use_dora": True}])
def test_linears_that_lie_fused_and_are_split_as_they_load_are_merged_into_what_is_stored(
    tmp_path, monkeypatch, adapted
) -> None:
    shape = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "head_dim": 16}
    cycles = {"num_hidden_layers": 1, "H_cycles": 1, "L_cycles": 1, "L_bp_cycles": [1]}
    monkeypatch.setitem(ARCHITECTURES, "hrm_text", ("HrmTextConfig", {**shape, **cycles}))
    case = make_case(write_model(tmp_path / "base", "hrm_text"), tmp_path, **adapted)
    assert case.merge(verify=not adapted).restored_weights == 2 * (4 + 2 + 2)  # gate, q, k, v; gate, up; o and down
    assert_same(case)
    merged, stored = (load_file(directory / "model.safetensors") for directory in (case.output, case.base))
    assert list(merged) == list(stored) and any("gqkv_proj" in name for name in stored)


def test_a_base_that_no_merge_takes_is_known_before_anything_is_trained(tmp_path, monkeypatch) -> None:
    """Inkling 2 stores gate and up of an expert in turn, row by row: told from its files, and from config.json alone."""
    pytest.importorskip("transformers.models.inkling2", reason="transformers 5.17 has no Inkling 2")
    shape = {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 1, "layer_types": ["hybrid"], "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "d_rel": 16}
    monkeypatch.setitem(ARCHITECTURES, "inkling2", ("Inkling2TextConfig", {**shape, **heads, **experts}))
    base = write_model(tmp_path / "base", "inkling2")
    case = make_case(base, tmp_path)
    with pytest.raises(MergeError) as caught:
        case.merge()
    refused = f"{caught.value.message} {caught.value.hint}"
    case.merge(base="original")  # as it says

    def stop(event) -> None:
        if "qlora merge will refuse what is trained here" in getattr(event, "text", ""):
            raise KeyboardInterrupt(event.text)

    (tmp_path / "rows.txt").write_text("a fox\n" * 4)
    few = {"data": (str(tmp_path / "rows.txt"),), "max_length": 32, "max_steps": 1}
    with pytest.raises(KeyboardInterrupt) as told:
        train(TrainConfig(model=str(base), output=str(tmp_path / "run"), **few), stop)
    assert str(told.value).endswith(refused)
    (base / "model.safetensors").unlink()
    files = resolve_model(str(base))
    known = [foresee_refusal(files, LoraSettings(adapt_experts=adapted)) for adapted in (False, True)]
    assert known == [RefusedMerge(refused, original=True), RefusedMerge(refused, original=False)]


# What is peculiar → (architecture, LoraConfig arguments or make_case arguments).
SPECIAL = {
    "dora": ("llama", {"use_dora": True}),
    "dora on transposed weights": ("gpt2", {"use_dora": True}),
    "rank-stabilised": ("llama", {"use_rslora": True, "r": 8}),
    "ranks and alphas by module": (
        "llama",
        {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 6}, "alpha_pattern": {"q_proj": 3, "o_proj": 20}},
    ),
    "some modules only": ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    "one layer only": ("llama", {"layers_to_transform": [1]}),
    "targets as a pattern": ("llama", {"target_modules": r".*\.mlp\.(up|down)_proj"}),
    "trained biases": ("phi", {"bias": "all"}),
    "trained biases of adapted modules": ("opt", {"bias": "lora_only"}),
    "biases of the adapter": ("phi", {"lora_bias": True}),
    "biases of layers that have none": ("llama", {"lora_bias": True, "target_modules": ["q_proj", "down_proj"]}),
    "head trained in full": ("llama", {"modules_to_save": ["lm_head"]}),
    "renamed head trained in full": ("gpt_neox", {"modules_to_save": ["lm_head"]}),
    "embeddings trained in full": ("llama", {"modules_to_save": ["embed_tokens"]}),
    "norms trained in full": ("llama", {"modules_to_save": ["input_layernorm", "norm"]}),
    "tied, embeddings trained in full": ("qwen2", {"modules_to_save": ["embed_tokens"]}),
    "tied, head trained in full": ("qwen2", {"modules_to_save": ["lm_head"]}),
    "tied, both trained in full": ("gpt2", {"modules_to_save": ["wte", "lm_head"]}),
    "tied, both trained as one": ("qwen2", {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "adapted head": ("llama", {"target_modules": ["q_proj", "lm_head"]}),
    "adapted embeddings": ("llama", {"target_modules": ["q_proj", "embed_tokens"]}),
    "adapted embeddings, dora": ("llama", {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True}),
    "tied, adapted embeddings": ("qwen2", {"target_modules": ["q_proj", "embed_tokens"]}),
    "tied, adapted head": ("qwen2", {"target_modules": ["q_proj", "lm_head"]}),
    "tied, both adapted": ("qwen2", {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "tied, scaled embeddings adapted": ("gemma3", {"target_modules": ["q_proj", "embed_tokens"]}),
    "trained tokens": ("llama", {"trainable_token_indices": [3, 4, 60, 511]}),
    "tied, trained tokens": ("qwen2", {"trainable_token_indices": {"embed_tokens": [3, 4, 60]}}),
    "new tokens": ("llama", {"new_tokens": 8}),
    "tied, new tokens": ("qwen2", {"new_tokens": 8}),
    "new tokens, adapted embeddings": (
        "llama",
        {"new_tokens": 8, "target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    ),
    "new tokens, renamed head": ("gpt_neox", {"new_tokens": 8}),
    "fp4": ("llama", {"quant_type": "fp4"}),
    "single quantisation": ("llama", {"double_quant": False}),
}


KEPT = ["dora on transposed weights", "biases of the adapter", "tied, both trained as one", "new tokens"]
KEPT += ["tied, scaled embeddings adapted", "tied, adapted head"]


@pytest.mark.parametrize("special", most_slow(SPECIAL, KEPT))
def test_special_cases_predict_the_same_once_merged(tiny_model, tmp_path, special) -> None:
    architecture, arguments = SPECIAL[special]
    case = make_case(tiny_model(architecture), tmp_path, **arguments)
    result = case.merge()
    assert result.restored_weights and result.changed_weights
    assert_same(case)
    config = AutoConfig.from_pretrained(case.output)
    assert config.vocab_size == case.live.shape[-1]
    base_tied = AutoConfig.from_pretrained(case.base).tie_word_embeddings
    apart = special.startswith("tied") and special not in (
        "tied, both trained as one",
        "tied, trained tokens",
        "tied, new tokens",
    )
    assert config.tie_word_embeddings == (base_tied and not apart)


def test_biases_that_no_model_of_the_kind_has_are_refused_with_a_way(tiny_model, tmp_path) -> None:
    case = make_case(tiny_model("gemma3"), tmp_path, lora_bias=True, target_modules=["gate_proj"])
    with pytest.raises(AdapterError, match="have none in any gemma3_text model") as error:
        case.merge()
    assert "qlora generate --adapter" in error.value.hint and not case.output.exists()


@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float16])
def test_weights_are_those_trained_against_bit_for_bit(tiny_model, tmp_path, compute) -> None:
    """With an adapter that changes nothing, every quantised weight comes out as the live base dequantises it."""
    base = tiny_model("gpt2", dtype="float16")

    def silence(model: torch.nn.Module) -> None:
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.zero_()

    case = make_case(base, tmp_path, compute_dtype=compute, change=silence)
    result = case.merge(dtype=str(compute).removeprefix("torch."))
    live, _ = load_base(
        resolve_model(str(base)), QuantizationSettings(base_cache=False), compute_dtype=compute, device=DEVICE
    )
    merged, stored = load_file(case.output / "model.safetensors"), load_file(base / "model.safetensors")
    restored = {f"{name}.weight": dequantized_weight(module).T.cpu() for name, module in four_bit_linears(live)}
    assert len(restored) == result.restored_weights == 8
    for name, weight in merged.items():
        expected = restored[name] if name in restored else stored[name].to(compute)
        assert torch.equal(weight, expected), name


def test_bfloat16_loses_next_to_nothing_and_the_original_weights_much(tiny_model, tmp_path) -> None:
    """pitfalls: on an overfit model 3e-5 against 0.63; a random one of two layers shows the same order."""
    case = make_case(tiny_model("llama", dtype="bfloat16"), tmp_path, compute_dtype=torch.bfloat16)
    result = case.merge()
    assert result.dtype == "bfloat16"
    dequantized = divergence(case, dtype=torch.float32)
    case.merge(base="original", overwrite=True)
    original = divergence(case, dtype=torch.float32)
    assert dequantized < 1e-4 and original > 100 * dequantized, (dequantized, original)


def test_original_weights_get_the_update_and_nothing_else(tiny_model, tmp_path) -> None:
    case = make_case(tiny_model("llama"), tmp_path, target_modules=["q_proj"])
    result = case.merge(base="original")
    assert result.restored_weights == 0
    adapter = load_file(case.adapter / "adapter_model.safetensors")
    merged, stored = load_file(case.output / "model.safetensors"), load_file(case.base / "model.safetensors")
    for name, weight in stored.items():
        if "q_proj" in name:
            prefix = f"base_model.model.{name.removesuffix('.weight')}"
            weight = weight + 2 * adapter[f"{prefix}.lora_B.weight"] @ adapter[f"{prefix}.lora_A.weight"]
        assert torch.allclose(merged[name], weight, atol=1e-6), name


def test_names_of_an_older_or_headless_checkpoint_are_found(tiny_model, tmp_path) -> None:
    """The hub's own GPT-2 has no `transformer.` before its names, and keeps a buffer that no model loads."""
    from safetensors.torch import save_file

    base = tmp_path / "base"
    base.mkdir()
    for path in tiny_model("gpt2").iterdir():
        (base / path.name).write_bytes(path.read_bytes())
    weights = load_file(base / "model.safetensors")
    weights = {name.removeprefix("transformer."): weight for name, weight in weights.items()}
    weights["h.0.attn.bias"] = torch.ones(1, 1, 8, 8)
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    case = make_case(base, tmp_path, modules_to_save=["ln_f"])
    case.merge()
    assert set(load_file(case.output / "model.safetensors")) == set(weights)
    assert_same(case)


def test_shards_keep_their_names_and_the_order_of_their_tensors(tiny_model, tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(tiny_model("llama")).save_pretrained(base, max_shard_size="120KB")
    case = make_case(base, tmp_path)
    result = case.merge(dtype="bfloat16")
    shards = sorted(path.name for path in base.glob("*.safetensors"))
    assert len(shards) == result.files > 2
    assert shards == sorted(path.name for path in case.output.glob("*.safetensors"))
    old, new = (json.loads((d / "model.safetensors.index.json").read_text()) for d in (base, case.output))
    assert old["weight_map"] == new["weight_map"]
    assert new["metadata"]["total_size"] * 2 == old["metadata"]["total_size"]
    for name in shards:
        header = [
            list(json.loads(f[8 : 8 + int.from_bytes(f[:8], "little")]))
            for f in ((base / name).read_bytes(), (case.output / name).read_bytes())
        ]
        assert header[0] == header[1]
    assert case.merged_logits().argmax(-1).eq(case.live.argmax(-1)).float().mean() > 0.9


@pytest.mark.parametrize(
    ("stored", "compute", "asked", "expected"),
    [
        ("float16", torch.bfloat16, None, "float16"),
        ("float32", torch.bfloat16, None, "bfloat16"),
        ("float32", torch.float32, "float16", "float16"),
        ("float64", torch.bfloat16, None, "bfloat16"),
        pytest.param("bfloat16", torch.float32, None, "bfloat16", marks=pytest.mark.slow),
        pytest.param("float32", torch.float32, None, "float32", marks=pytest.mark.slow),
    ],
)
def test_the_dtype_is_the_checkpoints_or_the_runs_or_the_one_asked_for(
    tiny_model, tmp_path, stored, compute, asked, expected
) -> None:
    case = make_case(tiny_model("llama", dtype=stored), tmp_path, compute_dtype=compute, target_modules=["q_proj"])
    assert case.merge(dtype=asked).dtype == expected
    assert json.loads((case.output / "config.json").read_text())["dtype"] == expected
    assert {str(w.dtype) for w in load_file(case.output / "model.safetensors").values()} == {f"torch.{expected}"}


@pytest.mark.each_choice
@pytest.mark.parametrize("architecture", most_slow(["llama", "gpt2", "qwen2"], ["llama", "gpt2"]))
@pytest.mark.parametrize("double_quant", [True, False])
def test_a_four_bit_checkpoint_loads_at_once(tiny_model, tmp_path, architecture, double_quant) -> None:
    case = make_case(tiny_model(architecture), tmp_path, double_quant=double_quant)
    result = case.merge(quantize=True)
    assert result.quantized
    plain = Case(case.base, case.adapter, tmp_path / "plain", case.live)
    plain.merge()
    assert result.total_bytes < 0.7 * (plain.output / "model.safetensors").stat().st_size
    requantised, _ = load_base(
        resolve_model(str(plain.output)),
        QuantizationSettings(base_cache=False, double_quant=double_quant),
        compute_dtype=torch.float32,
        device=DEVICE,
    )
    assert (case.merged_logits() - logits_of(requantised)).abs().max() < 1e-4  # as quantising the merged model would


def test_a_base_in_one_file_of_a_shard_s_name_is_merged_to_one_that_loads(tiny_model, tmp_path) -> None:
    base, shard = (
        shutil.copytree(tiny_model("llama"), tmp_path / "base"),
        "model.safetensors-00001-of-00001.safetensors",
    )
    (base / "model.safetensors").rename(base / shard)
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(base / shard), shard)}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    case = make_case(base, tmp_path)
    case.merge()
    assert_same(case)


def test_a_wrapper_s_head_that_was_trained_is_untied_where_older_programs_look(tmp_path) -> None:
    """transformers 4 reads the language model's configuration, and ties where that says nothing, as on the hub."""
    base = tmp_path / "base"
    whole_wrapper().save_pretrained(base)
    config = json.loads((base / "config.json").read_text())
    config["text_config"].pop("tie_word_embeddings")
    config["text_config"]["quantization_config"] = {
        "quant_method": "fp8",
        "weight_block_size": [32, 32],
    }  # as Kimi K2.5
    (base / "config.json").write_text(json.dumps(config))
    case = make_case(base, tmp_path, target_modules=r".*\.q_proj", modules_to_save=["lm_head"])
    case.merge()
    merged = json.loads((case.output / "config.json").read_text())
    assert merged["tie_word_embeddings"] is merged["text_config"]["tie_word_embeddings"] is False
    assert "quantization_config" not in merged["text_config"]
    stored = load_file(case.output / "model.safetensors")
    assert not torch.equal(stored["lm_head.weight"], stored["language_model.model.embed_tokens.weight"])


def test_a_tokenizer_saved_again_is_merged_as_the_base_has_it_and_another_as_the_adapter_has_it(tiny_model, tmp_path):
    """transformers 4 fails on what transformers 5 writes of it (extra_special_tokens in a list), and other programs read
    files that transformers does not save again."""
    base = shutil.copytree(tiny_model("qwen2"), tmp_path / "base")
    settings = json.loads((base / "tokenizer_config.json").read_text()) | {"tokenizer_class": "Qwen2Tokenizer"}
    settings |= {"additional_special_tokens": ["<|padding|>"], "chat_template": "{{ messages[0].content }}"}
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    stored = json.loads((base / "tokenizer.json").read_text())["model"]
    (base / "vocab.json").write_text(json.dumps(stored["vocab"]))
    (base / "merges.txt").write_text("".join(f"{' '.join(pair)}\n" for pair in stored["merges"]))
    (base / "chat_template.json").write_text('{"chat_template": "of a processor"}')
    (base / "configuration_own.py").write_text("")
    own = json.loads((base / "config.json").read_text()) | {"auto_map": {"AutoConfig": "configuration_own.Own"}}
    (base / "config.json").write_text(json.dumps(own))
    case = make_case(base, tmp_path, target_modules=["q_proj"])
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.save_pretrained(case.adapter)
    case.merge()
    beside = ("tokenizer_config.json", "tokenizer.json", "vocab.json", "merges.txt", "chat_template.json")
    for name in (*beside, "configuration_own.py"):
        assert (case.output / name).read_bytes() == (base / name).read_bytes(), name
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(case.adapter)
    for _ in range(2):  # the second time over the first
        case.merge(overwrite=True)
    assert AutoTokenizer.from_pretrained(case.output).chat_template == tokenizer.chat_template
    del settings["chat_template"]  # which llama.cpp's converter prefers to the file
    assert json.loads((case.output / "tokenizer_config.json").read_text()) == settings
    assert not (case.output / "chat_template.json").exists()  # a processor would take it
    told: list = []
    for added in (["<another>"], [f"<{number}>" for number in range(200)]):
        tokenizer.add_tokens(added)
        tokenizer.save_pretrained(case.adapter)
        case.merge(told, overwrite=True)
    assert "<another>" in AutoTokenizer.from_pretrained(case.output).get_vocab()
    past = [event.text for event in told if "the merged model has embeddings for 512" in getattr(event, "text", "")]
    assert len(past) == 1 and "tokens up to 584" in past[0]


def test_tokenizer_template_and_generation_config_come_along(tiny_model, tmp_path) -> None:
    case = make_case(tiny_model("llama"), tmp_path, target_modules=["q_proj"])
    for path in case.base.glob("tokenizer*"):
        (case.adapter / path.name).write_bytes(path.read_bytes())
    (case.adapter / "chat_template.jinja").write_text("{{ messages[0].content }}")
    case.merge()
    tokenizer = AutoTokenizer.from_pretrained(case.output)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hey"}], tokenize=False) == "hey"
    expected = GenerationConfig.from_pretrained(case.base).to_dict()
    assert GenerationConfig.from_pretrained(case.output).to_dict() == expected
    (case.adapter / "tokenizer_config.json").unlink()
    (case.adapter / "tokenizer.json").unlink()
    case.merge(overwrite=True)
    assert AutoTokenizer.from_pretrained(case.output).get_vocab() == tokenizer.get_vocab()  # the base's
    assert not (case.output / "chat_template.jinja").exists()


def test_the_chat_template_that_was_trained_with_goes_with_the_merged_model(tiny_model, tmp_path) -> None:
    base = shutil.copytree(tiny_model("llama"), tmp_path / "base")
    settings = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": "of the base"}))
    case = make_case(base, tmp_path, target_modules=["q_proj"])
    formatting = {
        "format": "chat",
        "column": "messages",
        "template": "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}",
    }
    record = json.loads((case.adapter / "qlora.json").read_text())
    (case.adapter / "qlora.json").write_text(json.dumps(record | {"formatting": formatting}))
    case.merge()
    assert AutoTokenizer.from_pretrained(case.output).chat_template == formatting["template"]
    assert json.loads((case.output / "tokenizer_config.json").read_text()) == settings
    shutil.copytree(
        case.output, case.adapter, ignore=shutil.ignore_patterns("[!tc]*", "config.json"), dirs_exist_ok=True
    )
    (case.adapter / "chat_template.jinja").write_text("changed since")
    case.merge(overwrite=True)
    assert AutoTokenizer.from_pretrained(case.output).chat_template == "changed since"


def test_no_path_of_this_machine_is_in_the_merged_model(tiny_model, tmp_path) -> None:
    case = make_case(tiny_model("llama"), tmp_path, target_modules=["q_proj"])
    case.merge(verify=True)
    for path in case.output.iterdir():
        content = path.read_bytes()
        for place in (case.base, tmp_path, Path.home()):
            assert str(place).encode() not in content, path.name
