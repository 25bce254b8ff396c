"""Adapters made elsewhere fit a base under other names and in other layouts, or are refused: never in part."""

import copy
import json
import re
import shutil

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from qlora_cli.artifacts import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from qlora_cli.core.adapters.adapter_facts import read_adapter
from qlora_cli.core.adapters.expert_tensors import expert_pairs
from qlora_cli.core.adapters.fitting import fitted_adapter
from qlora_cli.core.adapters.lora import load_adapter
from qlora_cli.core.models.files import resolve_model
from qlora_cli.core.models.loading import load_unquantized
from qlora_cli.core.models.structure import leave_out_towers
from qlora_cli.errors import AdapterError
from tests.adapters.test_expert_lora import config_of
from tests.adapters.test_targets import IDS, SMALL, build, randomise

LLAMA = transformers.LlamaConfig(**SMALL, intermediate_size=128)
TIED = transformers.Qwen2Config(**SMALL, intermediate_size=128, num_key_value_heads=2, tie_word_embeddings=True)
WRAPPER = transformers.Gemma3Config(
    text_config={**SMALL, "intermediate_size": 128, "num_key_value_heads": 2, "head_dim": 16},
    vision_config={
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
        "vision_use_head": False,
    },
)


def make(model, directory, new_tokens=0, **settings):
    """An adapter as PEFT saves it, and the logits of the two together."""
    if new_tokens:
        model.resize_token_embeddings(SMALL["vocab_size"] + new_tokens, mean_resizing=False)
    adapted = randomise(get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 12, **settings})))
    adapted.save_pretrained(directory, save_embedding_layers=bool(new_tokens) or "auto")
    return adapted(IDS).logits


def rewrite(directory, change, **config):
    """Changes an adapter's tensors and configuration."""
    tensors = change(load_file(directory / ADAPTER_WEIGHTS))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / ADAPTER_WEIGHTS)
    path = directory / ADAPTER_CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | config))


def answers(base, directory):
    return load_adapter(base, directory).eval()(IDS).logits


def whole_wrapper():
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(WRAPPER).eval().requires_grad_(False)


def text_of_wrapper():
    model = whole_wrapper()
    leave_out_towers(model)
    return model


@pytest.mark.parametrize(
    "prefix", ["model.language_model.layers", "language_model.model.layers", "model.layers", "language_model.layers"]
)
def test_a_language_model_has_one_adapter_whatever_its_wrapper_was_called(prefix, tmp_path):
    targets = r".*language_model.*\.(q_proj|down_proj)"
    logits = make(whole_wrapper(), tmp_path, target_modules=targets)
    rewrite(tmp_path, lambda t: {n.replace("model.language_model.layers", prefix): v for n, v in t.items()})
    torch.testing.assert_close(answers(text_of_wrapper(), tmp_path), logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("old", ["language_model.model", "model"])
def test_ranks_alphas_and_tokens_by_module_go_along_with_its_name(old, tmp_path):
    """The file names each module in full, as PEFT writes what it has by module."""
    layers, embeddings = "model.language_model.layers", "model.language_model.embed_tokens"
    settings = {
        "rank_pattern": {f"{layers}.0.self_attn.q_proj": 2},
        "alpha_pattern": {f"^{layers}.0.self_attn.q_proj": 60, f"{layers}.1.self_attn.q_proj": 1},
        "trainable_token_indices": {embeddings: [3, 9]},
    }
    logits = make(whole_wrapper(), tmp_path, target_modules=r".*language_model.*\.q_proj", **settings)

    def renamed(items):
        return {name.replace("model.language_model.", f"{old}."): value for name, value in items.items()}

    rewrite(tmp_path, renamed, **{field: renamed(given) for field, given in settings.items()})
    with fitted_adapter(tmp_path, text_of_wrapper()) as fitted:
        facts = read_adapter(fitted)
        assert facts.scaling_of(f"{layers}.0.self_attn.q_proj", 2) == 30
        assert set(facts.config["trainable_token_indices"]) == {embeddings}
    torch.testing.assert_close(answers(text_of_wrapper(), tmp_path), logits, rtol=0, atol=1e-5)


def test_pairs_on_towers_are_refused_with_what_helps(tmp_path):
    make(whole_wrapper(), tmp_path, target_modules=r".*\.q_proj")
    with pytest.raises(
        AdapterError, match="of the adapter's tensors change vision_tower of this gemma3 model"
    ) as refused:
        answers(text_of_wrapper(), tmp_path)
    assert "exclude_modules" in refused.value.hint and "merge_and_unload" in refused.value.hint
    rewrite(tmp_path, lambda t: {n.replace("model.vision_tower", "vision_tower"): v for n, v in t.items()})
    with pytest.raises(AdapterError, match=r"change vision_tower .* first base_model\.model\.vision_tower\."):
        answers(text_of_wrapper(), tmp_path)


@pytest.mark.parametrize(
    "prefix", ["base_model.model.base_model.model", "base_model.model._orig_mod", "model", "base_model.model.tower"]
)
def test_names_that_mean_nothing_are_refused_with_the_first(prefix, tmp_path):
    make(build(LLAMA), tmp_path, target_modules=["q_proj"])
    rewrite(tmp_path, lambda t: {n.replace("base_model.model", prefix, 1): v for n, v in t.items()})
    with pytest.raises(AdapterError, match=re.escape(prefix)):
        load_adapter(build(LLAMA), tmp_path)


@pytest.mark.parametrize(
    ("config", "settings"),
    [
        (LLAMA, {"target_modules": ["q_proj", "lm_head", "embed_tokens"]}),
        (LLAMA, {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True}),
        (LLAMA, {"target_modules": ["q_proj"], "new_tokens": 8}),
        (LLAMA, {"target_modules": ["q_proj"], "new_tokens": 8, "modules_to_save": ["embed_tokens", "lm_head"]}),
        (TIED, {"target_modules": ["q_proj"], "new_tokens": 8}),
        (TIED, {"target_modules": ["q_proj"], "new_tokens": 8, "modules_to_save": ["embed_tokens"]}),
    ],
    ids=["both adapted", "dora", "grown", "grown, in full", "tied, grown", "tied, grown, in full"],
)
def test_embeddings_and_head_beside_an_adapter_are_taken(config, settings, tmp_path):
    logits = make(build(config), tmp_path, **settings)
    torch.testing.assert_close(answers(build(config), tmp_path), logits, rtol=0, atol=1e-5)


def test_two_adapters_on_different_embeddings_are_not_used_together(tmp_path):
    make(build(LLAMA), tmp_path / "grown", target_modules=["q_proj"], new_tokens=8)
    make(build(LLAMA), tmp_path / "plain", target_modules=["q_proj"])
    for first, second in (("grown", "plain"), ("plain", "grown")):
        model = load_adapter(build(LLAMA), tmp_path / first, name="a")
        with pytest.raises(AdapterError, match="different embeddings"):
            load_adapter(model, tmp_path / second, name="b")


def per_expert(tensors, root, names, experts, rank):
    """Pairs on stacks of gates and ups as a file of transformers 4 had them, gates and ups sharing nothing."""
    old = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"(.*\.mlp)\.experts\.(base_layer\.)?lora_(A|B)\.weight", name)
        if not match:
            old[name] = tensor
            continue
        block = match[1].replace(".mlp", f".{root}")
        for expert in range(experts):
            a = match[3] == "A"
            part = tensor[expert * rank : (expert + 1) * rank] if a else tensor[:, expert::experts]
            if not match[2]:
                parts = {names[2]: part}
            elif a:  # the same A for gate and up: so do B's halves make one update
                parts = {names[0]: part, names[1]: part.clone()}
            else:
                parts = dict(zip(names[:2], part.chunk(2), strict=True))
            for leaf, value in parts.items():
                old[f"{block}.experts.{expert}.{leaf}.lora_{match[3]}.weight"] = value
    return old


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
def test_pairs_of_single_experts_become_pairs_of_their_stacks(kind, tmp_path):
    if kind == "mixtral":
        config = transformers.MixtralConfig(
            **SMALL, num_key_value_heads=2, num_local_experts=5, num_experts_per_tok=2, intermediate_size=48
        )
        names, root = ("w1", "w3", "w2"), "block_sparse_moe"
    else:
        config, names, root = config_of("qwen3_moe"), ("gate_proj", "up_proj", "down_proj"), "mlp"
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    logits = make(build(config), tmp_path, target_modules=["q_proj"], target_parameters=targets)
    rewrite(
        tmp_path,
        lambda tensors: per_expert(tensors, root, names, 5, 4),
        target_modules=["q_proj", *names],
        target_parameters=None,
    )
    torch.testing.assert_close(answers(build(config), tmp_path), logits, rtol=0, atol=1e-5)
    own = {rf"experts\.3\.{names[0]}": 48, names[2]: 24}  # alphas of a file whose others have 12
    halves = {f"3.{names[0]}.lora_B": 4, f"{names[2]}.lora_B": 2}
    rewrite(
        tmp_path,
        lambda tensors: {n: v / next((by for part, by in halves.items() if part in n), 1) for n, v in tensors.items()},
        alpha_pattern=own,
    )
    torch.testing.assert_close(answers(build(config), tmp_path), logits, rtol=0, atol=1e-5)
    rewrite(tmp_path, lambda t: {n: v for n, v in t.items() if f".{names[1]}." not in n})
    with pytest.raises(AdapterError):  # half of a stack
        load_adapter(build(config), tmp_path)


@pytest.mark.parametrize("layout", ["qwen3_moe", "gpt_oss", "llama4"])
@pytest.mark.parametrize("square", [False, True])
def test_stacks_as_peft_packed_them_before_0_19_are_read(layout, square, tmp_path):
    config = config_of(layout)
    sizes = {"qwen3_moe": "moe_intermediate_size"}.get(layout, "intermediate_size")
    if square:  # whether A and B were exchanged does not show in their shapes
        setattr(config, sizes, 32)
    place = "feed_forward" if layout == "llama4" else "mlp"
    targets = [f"{place}.experts.gate_up_proj", f"{place}.experts.down_proj"]
    logits = make(build(config), tmp_path, target_modules=["q_proj"], target_parameters=targets)
    model = build(config)

    def as_before(tensors):
        old = dict(tensors)
        if layout == "gpt_oss":
            return old
        for name, a in tensors.items():
            if ".experts." in name and ".lora_A." in name:
                b = tensors[name.replace("lora_A", "lora_B")]
                old[name] = torch.cat([b[:, e::5].T for e in range(5)])
                old[name.replace("lora_A", "lora_B")] = torch.stack(
                    [a[e * 4 : (e + 1) * 4].T for e in range(5)], -1
                ).reshape(a.shape[1], -1)
        return old

    rewrite(tmp_path, as_before, peft_version="0.18.1")
    torch.testing.assert_close(answers(model, tmp_path), logits, rtol=0, atol=1e-5)
    with fitted_adapter(tmp_path, build(config)) as own:
        assert len(expert_pairs(read_adapter(own), build(config))) == 4


@pytest.mark.parametrize("initial", ["loftq", "pissa_niter_4", "corda"])
def test_an_adapter_of_a_base_that_its_start_had_changed_is_refused_with_a_way(initial, tmp_path):
    make(build(LLAMA), tmp_path, target_modules=["q_proj"])
    rewrite(tmp_path, dict, init_lora_weights=initial)
    with pytest.raises(AdapterError, match=initial) as error:
        load_adapter(build(LLAMA), tmp_path)
    assert ("path_initial_model_for_weight_conversion" in error.value.hint) == (initial != "loftq")
    assert "set init_lora_weights to true" in error.value.hint


@pytest.mark.parametrize(
    ("architecture", "start", "settings"),
    [
        ("llama", "pissa", {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"q_proj": 6}}),
        ("llama", "olora", {"use_rslora": True}),
        ("gpt2", "pissa", {}),
    ],
)
def test_an_adapter_whose_start_follows_from_the_base_is_one_of_the_base_as_it_is(
    tiny_model, tmp_path, architecture, start, settings
):
    files = resolve_model(str(tiny_model(architecture)))

    def base():
        found = load_unquantized(files, dtype=torch.float32, device=torch.device("cpu"))
        found.name_or_path = str(files.directory)
        return found

    targets = ["c_attn", "c_fc"] if architecture == "gpt2" else ["q_proj", "down_proj"]
    make(base(), tmp_path, init_lora_weights=start, target_modules=targets, **settings)
    wanted = PeftModel.from_pretrained(base(), tmp_path).eval()(IDS).logits  # which changes its base as the start did
    found = load_adapter(base(), tmp_path)
    torch.testing.assert_close(found.eval()(IDS).logits, wanted, rtol=0, atol=1e-4)
    plain = base()(IDS).logits
    assert (found(IDS).logits - plain).abs().max() > 0.1
    with found.disable_adapter():
        torch.testing.assert_close(found(IDS).logits, plain)


def test_an_adapter_of_some_tokens_is_refused_where_answers_would_be_the_bases(tmp_path):
    make(build(LLAMA), tmp_path, target_modules=["q_proj"], alora_invocation_tokens=[5, 6])
    with pytest.raises(AdapterError, match="of the kind aLoRA"):
        load_adapter(build(LLAMA), tmp_path)


def test_a_pair_on_a_layer_that_is_not_called_is_refused_as_it_would_work_merged_alone(tmp_path):
    config = transformers.MambaConfig(vocab_size=128, hidden_size=64, num_hidden_layers=1, state_size=4)
    make(build(config), tmp_path, target_modules=["in_proj", "dt_proj"])
    with pytest.raises(AdapterError, match=r"first backbone.layers.0.mixer.dt_proj: unmerged they do nothing"):
        load_adapter(build(config), tmp_path)


def test_what_cannot_be_undone_is_converted_where_it_was_made_or_given_its_own_base(tmp_path):
    """Both ways that a refusal names."""
    model = build(LLAMA)
    adapted = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj"], init_lora_weights="pissa_niter_4")
    )
    adapted.save_pretrained(tmp_path / "initial")
    randomise(adapted)
    wanted = adapted(IDS).logits
    adapted.save_pretrained(tmp_path / "kept")
    residual = copy.deepcopy(adapted).unload()
    adapted.peft_config["default"].init_lora_weights = True
    rewrite(tmp_path / "initial", dict, init_lora_weights=True)
    rewrite(tmp_path / "kept", dict, init_lora_weights=True)
    torch.testing.assert_close(answers(residual, tmp_path / "kept"), wanted, rtol=0, atol=1e-5)
    adapted.peft_config["default"].init_lora_weights = "pissa_niter_4"
    adapted.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    torch.testing.assert_close(answers(build(LLAMA), tmp_path / "plain"), wanted, rtol=0, atol=1e-4)


def test_a_start_that_only_drew_other_numbers_is_loaded_as_it_ended(load_tiny, tmp_path):
    logits = make(load_tiny("llama")[0], tmp_path / "a", target_modules=["q_proj"])
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    rewrite(tmp_path / "b", dict, init_lora_weights="orthogonal")
    torch.testing.assert_close(answers(load_tiny("llama")[0], tmp_path / "b"), logits, rtol=0, atol=1e-5)


def test_what_fits_is_read_where_it_lies(tmp_path):
    make(build(LLAMA), tmp_path, target_modules=["q_proj"])
    with fitted_adapter(tmp_path, build(LLAMA)) as own:
        assert own == tmp_path
    assert isinstance(load_adapter(build(LLAMA), tmp_path), PeftModel)
