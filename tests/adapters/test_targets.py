"""An adapter is attached where the user says, and PEFT alone puts it there too."""

import copy
import json

import pytest
import torch
import transformers
from peft import PeftModel
from transformers import AutoModelForCausalLM

from qlora_cli.artifacts import ADAPTER_CONFIG
from qlora_cli.core.adapters.lora import attach_adapter, load_adapter, save_adapter
from qlora_cli.core.adapters.targets import describe_partial, find_targets
from qlora_cli.core.models.structure import build_empty, linear_names
from qlora_cli.errors import AdapterError
from qlora_cli.settings.groups import LoraSettings

IDS = torch.arange(5, 25)[None]
SMALL = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
GLM = transformers.Glm4MoeConfig(
    **SMALL,
    num_key_value_heads=2,
    head_dim=16,
    intermediate_size=128,
    moe_intermediate_size=48,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_shared_experts=1,
    n_group=1,
    topk_group=1,
    first_k_dense_replace=1,
    pad_token_id=1,
)


def build(config, seed=0):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.08)
    return model.eval().requires_grad_(False)


def randomise(peft_model):
    with torch.no_grad():
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.1)
    return peft_model.eval()


def adapted_names(peft_model):
    names = (n.split(".lora_A")[0] for n, _ in peft_model.named_parameters() if ".lora_A." in n)
    return {name.removeprefix("base_model.model.") for name in names}


@pytest.fixture(scope="module")
def llama():
    return build_empty(transformers.LlamaConfig(**SMALL, intermediate_size=128))


def test_dense_and_shared_layers_of_a_mixture_are_adapted_as_layers_and_peft_alone_puts_them_there(tmp_path):
    patterns = {"rank_pattern": ("shared_experts.up_proj=2",), "alpha_pattern": ("up_proj=4",)}
    adapted = attach_adapter(build(GLM), LoraSettings(rank=8, alpha=16, dropout=0.1, **patterns))
    assert adapted_names(adapted) == set(linear_names(build_empty(GLM)))
    randomise(adapted)
    logits = adapted(IDS).logits
    assert (logits - build(GLM)(IDS).logits).abs().max() > 0.1
    save_adapter(adapted, tmp_path, base_name="org/base")
    for again in (PeftModel.from_pretrained(build(GLM), str(tmp_path)), load_adapter(build(GLM), tmp_path)):
        torch.testing.assert_close(again.eval()(IDS).logits, logits, rtol=0, atol=5e-6)
        assert adapted_names(again) == adapted_names(adapted)


def test_what_peft_cannot_read_back_is_refused_with_what_to_leave_out():
    with pytest.raises(AdapterError, match="DoRA") as error:
        attach_adapter(build_empty(GLM), LoraSettings(dora=True))
    leaves = error.value.hint.rpartition(" ")[2]
    adapted = attach_adapter(build_empty(GLM), LoraSettings(dora=True, exclude_modules=tuple(leaves.split(","))))
    assert {name.rsplit(".", 1)[-1] for name in adapted_names(adapted)} == {"q_proj", "k_proj", "v_proj", "o_proj"}


@pytest.mark.parametrize(
    ("targets", "excluded", "found"),
    [
        (("all-linear",), None, 14),
        (("all-linear",), ("mlp.up_proj", "layers.1.self_attn.q_proj"), 11),
        ((r".*layers\.1\.(self_attn\.(q|k)_proj|mlp\.up_proj)",), None, 3),
        ((r"model\.layers\.\d{1", r"2}\.mlp\..*"), None, 6),  # commas are a regular expression's own
        (("self_attn.q_proj", r".*\.1\.mlp.*"), None, 5),
        (("model.layers.1.self_attn.q_proj",), None, 1),
        (("q_proj", "lm_head", "embed_tokens"), None, 4),
        (None, (r".*self_attn.*",), 6),
        (("mlp", "layers.1.self_attn"), None, 10),
        (None, ("self_attn",), 6),
    ],
)
def test_targets_are_names_ends_expressions_or_all(llama, targets, excluded, found):
    assert len(find_targets(llama, LoraSettings(target_modules=targets, exclude_modules=excluded))) == found


@pytest.mark.parametrize(
    "wrong",
    [
        {"target_modules": ("q_proj", "v_porj")},
        {"target_modules": (r".*\.mlq\..*",)},
        {"target_modules": ("(",)},
        {"target_modules": ("embed_tokens", "norm")},
        {"exclude_modules": ("q_porj",)},
        {"target_modules": ("q_proj",), "exclude_modules": ("k_proj",)},
        {"exclude_modules": ("all-linear",)},
        {"rank_pattern": ("q_porj=4",)},
        {"rank_pattern": ("q_proj=0",)},
        {"rank_pattern": ("q_proj",)},
        {"alpha_pattern": ("q_proj=much",)},
        {"target_modules": (r"(.*)*(.*)*(.*)*(.*)*(.*)*x",)},  # backtracks for hours
    ],
)
def test_what_matches_nothing_or_says_nothing_is_one_sentence(llama, wrong):
    with pytest.raises(AdapterError):
        attach_adapter(llama, LoraSettings(**wrong))


def test_named_modules_that_some_layers_do_not_have_are_told():
    kinds = {"layer_types": ["conv", "full_attention", "conv"], "num_key_value_heads": 2, "intermediate_size": 128}
    model = build_empty(transformers.Lfm2Config(**{**SMALL, "num_hidden_layers": 3}, **kinds))

    def told(*wanted):
        lora = LoraSettings(target_modules=wanted)
        return describe_partial(find_targets(model, lora), lora, model)

    assert told("q_proj", "w1", "lm_head") == "Not all layers have what --target-modules names: q_proj in 1 of 3."
    assert told("w1") is told("all-linear") is told(".*layers.1.*") is None
    events: list = []
    attach_adapter(model, LoraSettings(target_modules=("q_proj",)), report=events.append)
    assert "q_proj in 1 of 3" in events[0].text


def test_a_layer_that_is_read_and_not_called_is_left_out_and_refused_by_name():
    mixer = build_empty(transformers.MambaConfig(vocab_size=128, hidden_size=64, num_hidden_layers=1, state_size=4))
    assert find_targets(mixer, LoraSettings()) == [f"backbone.layers.0.mixer.{name}" for name in ("in_proj", "x_proj")]
    with pytest.raises(AdapterError, match="out_proj takes no adapter"):
        find_targets(mixer, LoraSettings(target_modules=("out_proj",)))
    with pytest.raises(AdapterError, match="dt_proj takes no adapter"):
        find_targets(mixer, LoraSettings(target_modules=("in_proj", "dt_proj")))


class ListOfExperts(torch.nn.Module):
    """Experts as models of their own code keep them, each of them met here."""

    def __init__(self):
        super().__init__()
        self.experts = torch.nn.ModuleList(torch.nn.ModuleDict({"up": torch.nn.Linear(64, 64)}) for _ in range(3))

    def forward(self, x):
        return sum(expert["up"](x) for expert in self.experts)


def test_experts_that_are_linear_layers_are_adapted_by_name_and_peft_alone_puts_them_there(tmp_path):
    model = build(transformers.LlamaConfig(**SMALL, intermediate_size=96, pad_token_id=1))
    for layer in model.model.layers:
        layer.mlp = ListOfExperts()
    bare = copy.deepcopy(model)
    lora = LoraSettings(rank=4, alpha=8, target_modules=("experts",))
    assert len(find_targets(model, lora)) == 6
    adapted = randomise(attach_adapter(model, lora))
    save_adapter(adapted, tmp_path, base_name="base")
    again = PeftModel.from_pretrained(bare, tmp_path).eval()
    assert adapted_names(again) == adapted_names(adapted)
    assert (again(IDS).logits - adapted(IDS).logits).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["experts", "mlp.experts", "gate_up_proj", r".*\.experts\.down_proj"])
def test_stacks_of_experts_named_as_targets_are_refused_by_the_flag_that_adapts_them(name):
    model = build_empty(GLM)
    with pytest.raises(AdapterError, match="names experts, which") as error:
        find_targets(model, LoraSettings(target_modules=("q_proj", name)))
    assert "--adapt-experts" in error.value.hint
    alone = LoraSettings(target_modules=(name,), adapt_experts=True, rank=4)
    assert find_targets(model, alone) == []
    names = {name for name, p in attach_adapter(model, alone).named_parameters() if p.requires_grad}
    assert names and all("experts" in name for name in names)


def test_ranks_and_alphas_of_their_own_are_peft_patterns(llama, tmp_path):
    settings = LoraSettings(
        rank=4, alpha=8, rank_pattern=("layers.1.mlp.up_proj=16", "q_proj=2"), alpha_pattern=("q_proj=3",)
    )
    model = build(llama.config)
    adapted = randomise(attach_adapter(model, settings))
    save_adapter(adapted, tmp_path, base_name="org/base")
    again = PeftModel.from_pretrained(build(llama.config), str(tmp_path)).eval()
    torch.testing.assert_close(again(IDS).logits, adapted(IDS).logits, rtol=0, atol=0)
    ranks = {n: p.shape[0] for n, p in adapted.named_parameters() if ".lora_A." in n}
    assert {r for n, r in ranks.items() if "q_proj" in n} == {2} and sorted(set(ranks.values())) == [2, 4, 16]
    layer = adapted.get_base_model().model.layers[0].self_attn.q_proj
    assert layer.scaling["default"] == 1.5
    assert json.loads((tmp_path / ADAPTER_CONFIG).read_text())["r"] == 4


@pytest.mark.parametrize("items", [("q_proj=2", "layers.1.self_attn.q_proj=16"), ("q_proj=2", "q_proj=4")])
def test_a_rank_that_those_before_it_leave_no_module_is_refused_with_the_order_that_works(llama, items):
    with pytest.raises(AdapterError, match=f"{items[1]} does nothing: q_proj=2 gives") as caught:
        attach_adapter(build(llama.config), LoraSettings(rank_pattern=items))
    assert caught.value.hint.endswith(f"--rank-pattern {items[1]},{items[0]}")


def test_many_targets_of_a_multimodal_model_stay_those_of_its_language_model(tmp_path):
    """Of 20 names and more PEFT keeps endings such as `q_proj`, which the tower has as well that is left out here."""
    tower = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**SMALL, "model_type": "llama", "num_hidden_layers": 3, "intermediate_size": 64}
    config = transformers.LlavaConfig(
        text_config=text, vision_config={"model_type": "clip_vision_model", **tower, "image_size": 28, "patch_size": 14}
    )
    model = attach_adapter(build_empty(config).to_empty(device="cpu"), LoraSettings(rank=2, alpha=2))
    save_adapter(model, tmp_path, base_name="base")
    whole = PeftModel.from_pretrained(build_empty(config, whole=True).to_empty(device="cpu"), tmp_path)
    ours, theirs = ({name for name, _ in each.named_parameters() if "lora_" in name} for each in (model, whole))
    assert ours == theirs and len(ours) == 2 * 7 * 3
