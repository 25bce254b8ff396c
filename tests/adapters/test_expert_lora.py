"""Experts get adapters where it is asked for, in PEFT's layout, also on stacks that are packed in 4 bits."""

import json

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint

from qlora_cli.artifacts import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from qlora_cli.core.adapters.adapter_facts import read_adapter
from qlora_cli.core.adapters.expert_tensors import expert_pairs
from qlora_cli.core.adapters.lora import attach_adapter, load_adapter, save_adapter
from qlora_cli.core.experts.four_bit_experts import ExpertLora
from qlora_cli.core.experts.layout import expert_weights, find_experts
from qlora_cli.core.models.quantization import count_parameters
from qlora_cli.core.models.structure import build_empty
from qlora_cli.errors import AdapterError
from qlora_cli.settings.groups import LoraSettings
from tests.adapters.test_targets import IDS, SMALL, build, randomise
from tests.conftest import most_slow
from tests.experts.expert_modules import CONFIGS, pack

RANK = 6  # not the number of experts: a wrong packing of B would not show


def config_of(layout):
    name, changes = CONFIGS[layout]
    return getattr(transformers, name)(**{**SMALL, "num_key_value_heads": 2, "num_experts_per_tok": 2, **changes})


def packed(config):
    """The model with its experts in 4 bits, and the same with what they dequantise to."""
    four_bit, plain = build(config), build(config)
    for (_, one), (_, other) in zip(find_experts(four_bit), find_experts(plain), strict=True):
        pack(one, torch.float32)
        for weight in expert_weights(other):
            stack = torch.stack([one.dequantized(weight.name, number) for number in range(weight.experts)])
            getattr(other, weight.name).data.copy_(weight.as_matrix(stack))
    return four_bit, plain


def test_a_layer_that_is_recomputed_is_compiled_with_its_experts_adapter():
    model = build(config_of("mixtral"))
    for _, experts in find_experts(model):
        pack(experts, torch.float32)
    adapted = attach_adapter(model, LoraSettings(rank=2, adapt_experts=True))
    wrapper, base = (
        m
        for n, m in adapted.named_modules()
        if n.endswith(("layers.0.mlp.experts", "0.mlp.experts.base_layer.base_layer"))
    )
    base.forward = lambda x: (
        x @ base.lora_of("gate_up_proj").a.t()
    )  # what it is given, without kernels that need a card

    def run(x):
        return checkpoint(wrapper, x, use_reentrant=False)

    x = torch.randn(3, base.lora_of("gate_up_proj").a.shape[1], requires_grad=True)
    whole = torch.compile(run, backend="eager", fullgraph=True)  # an error where a part is not compiled
    assert torch.equal(whole(x), run(x))
    with adapted.disable_adapter():
        assert base.lora_of("gate_up_proj") is None


@pytest.mark.parametrize("layout", most_slow(sorted(set(CONFIGS) - {"llama"}), ["mixtral", "gpt_oss", "llama4"]))
def test_packed_experts_learn_and_answer_as_peft_has_them(layout, tmp_path):
    four_bit, plain = packed(config_of(layout))
    own = ("layers.0.mlp.experts.down_proj=2",) if layout == "gpt_oss" else None  # one stack of all
    lora = LoraSettings(rank=RANK, alpha=12, adapt_experts=True, expert_rank=3, rank_pattern=own)
    adapted = attach_adapter(four_bit, lora)
    randomise(adapted)
    save_adapter(adapted, tmp_path, base_name="org/base")
    reference = PeftModel.from_pretrained(plain, str(tmp_path), is_trainable=True).eval()
    results = []
    for model in (adapted, reference):
        logits = model(IDS, use_cache=False).logits
        torch.nn.functional.cross_entropy(logits[0, :-1], IDS[0, 1:] % 64).backward()
        results.append((logits.detach(), {n: p.grad for n, p in model.named_parameters() if "lora_" in n}))
    (ours, gradients), (theirs, expected) = results
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)
    assert gradients.keys() == expected.keys() and any(".experts." in name for name in gradients)
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-5)
    again = load_adapter(packed(config_of(layout))[0], tmp_path)
    torch.testing.assert_close(again(IDS, use_cache=False).logits, ours, rtol=0, atol=0)
    with adapted.disable_adapter():
        assert (adapted(IDS, use_cache=False).logits - ours).abs().max() > 0.05


def test_an_adapter_that_peft_made_on_experts_answers_as_in_peft(tmp_path):
    four_bit, plain = packed(config_of("qwen3_moe"))
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    theirs = get_peft_model(
        plain, LoraConfig(r=RANK, lora_alpha=9, target_modules=["q_proj"], target_parameters=targets)
    )
    randomise(theirs).save_pretrained(tmp_path)
    logits = theirs(IDS).logits
    pairs, state = (
        expert_pairs(read_adapter(tmp_path), build_empty(config_of("qwen3_moe"))),
        load_file(tmp_path / ADAPTER_WEIGHTS),
    )
    for name, pair in pairs.items():
        module, _, parameter = name.rpartition(".")
        wrapper = theirs.get_base_model().get_submodule(module)
        wrapper = wrapper if wrapper.parameter_name == parameter else wrapper.base_layer
        delta = ExpertLora(state[pair.a], state[pair.b], pair.scaling)
        for number, expected in enumerate(wrapper.get_delta_weight("default")):
            torch.testing.assert_close(delta.delta(pair.weight, number), expected, rtol=0, atol=1e-6)
    assert len(pairs) == 4
    torch.testing.assert_close(load_adapter(four_bit, tmp_path)(IDS).logits, logits, rtol=0, atol=2e-5)
    # B read expert by expert rather than every so many columns apart is seen.
    for name, parameter in theirs.named_parameters():
        if ".experts." in name and "lora_B" in name:
            experts = 5
            swapped = parameter.view(len(parameter), RANK, experts).transpose(1, 2).reshape(len(parameter), -1)
            parameter.data.copy_(swapped)
    assert (theirs(IDS).logits - logits).abs().max() > 0.01


def test_a_router_that_was_a_linear_layer_when_it_was_adapted_answers_as_in_peft(tmp_path):
    """transformers 4 had one, which `all-linear` of other programs targets; PEFT reads such a file by itself."""
    four_bit, plain = packed(config_of("qwen3_moe"))
    settings = {"r": RANK, "lora_alpha": 9, "target_modules": ["q_proj"], "target_parameters": ["mlp.gate.weight"]}
    theirs = randomise(get_peft_model(plain, LoraConfig(**settings)))
    theirs.save_pretrained(tmp_path)
    path = tmp_path / ADAPTER_CONFIG
    older = {"target_modules": ["gate", "q_proj"], "target_parameters": None}
    path.write_text(json.dumps(json.loads(path.read_text()) | older))
    torch.testing.assert_close(load_adapter(four_bit, tmp_path)(IDS).logits, theirs(IDS).logits, rtol=0, atol=2e-5)


def test_the_rank_of_an_expert_is_shared_among_those_a_token_meets_and_scaled_as_all_others():
    model = build_empty(config_of("qwen3_moe"))
    plain = count_parameters(attach_adapter(model, LoraSettings(rank=16, alpha=32)))[0]
    adapted = attach_adapter(build_empty(config_of("qwen3_moe")), LoraSettings(rank=16, alpha=32, adapt_experts=True))
    experts = 2 * 5 * 8 * ((64 + 96) + (48 + 64))  # layers, experts, half the rank, in and out of both
    assert count_parameters(adapted)[0] == plain + experts
    scalings = {m.scaling["default"] for m in adapted.modules() if hasattr(m, "lora_A")}
    assert scalings == {2.0}


@pytest.mark.parametrize(
    ("layout", "settings", "sentence"),
    [
        ("qwen3_moe", {"dora": True}, "no --dora"),
        ("qwen3_moe", {"dropout": 0.1}, "no --dropout"),
        ("qwen3_moe", {"adapt_experts": False, "expert_rank": 4}, "is of adapted experts"),
        (None, {}, "has no stack of experts"),
    ],
)
def test_experts_that_cannot_be_adapted_so_are_refused(layout, settings, sentence):
    config = transformers.LlamaConfig(**SMALL, intermediate_size=128) if layout is None else config_of(layout)
    with pytest.raises(AdapterError, match=sentence):
        attach_adapter(build_empty(config), LoraSettings(**{"adapt_experts": True, **settings}))
