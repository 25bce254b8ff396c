"""A model's structure is read from its configuration, whatever family it is of."""

from importlib.util import find_spec

import pytest
import transformers

from qlora_cli.core.models.files import context_length
from qlora_cli.core.models.structure import (
    build_empty,
    find_decoder,
    is_multimodal,
    linear_names,
    tower_names,
)
from qlora_cli.errors import ModelError
from tests.conftest import most_slow


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        (transformers.LlamaConfig(max_position_embeddings=1024), 1024),
        (transformers.GPT2Config(n_positions=512), 512),
        (transformers.MptConfig(max_seq_len=768), 768),
        (transformers.BloomConfig(seq_length=2048), 2048),  # as in the files of bigscience/bloom
        (transformers.BloomConfig(), None),
        (transformers.Gemma3Config(text_config={"max_position_embeddings": 640}), 640),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_the_context_is_read_from_any_configuration(config, tokens):
    assert context_length(config) == tokens


TEXT = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
QWEN_TOWER = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64}
# Configuration class → (arguments, what stands beside the language model).
MULTIMODAL = {
    "LlavaConfig": (
        {
            "text_config": {"model_type": "llama", **TEXT},
            "vision_config": {"model_type": "clip_vision_model", **TOWER},
        },
        ["model.vision_tower", "model.multi_modal_projector"],
    ),
    "Gemma3Config": (
        {"text_config": TEXT, "vision_config": TOWER},
        ["model.vision_tower", "model.multi_modal_projector"],
    ),
    "Qwen2_5_VLConfig": ({"text_config": TEXT, "vision_config": QWEN_TOWER}, ["model.visual"]),
    "Qwen3_5Config": (
        {"text_config": {**TEXT, "layer_types": ["full_attention"]}, "vision_config": QWEN_TOWER},
        ["model.visual"],
    ),
    "VoxtralConfig": (
        {
            "text_config": {"model_type": "llama", **TEXT},
            "audio_config": {
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
            },
        },
        ["model.audio_tower", "model.multi_modal_projector"],
    ),
    "Llama4Config": (
        {"text_config": {**TEXT, "num_local_experts": 2}, "vision_config": TOWER},
        ["vision_model", "multi_modal_projector"],
    ),
}


@pytest.mark.parametrize("name", most_slow(MULTIMODAL, ["LlavaConfig", "Qwen2_5_VLConfig", "VoxtralConfig"]))
def test_a_multimodal_model_keeps_its_class_and_leaves_its_towers_out(name):
    arguments, towers = MULTIMODAL[name]
    config = getattr(transformers, name)(**arguments)
    whole, text = build_empty(config, whole=True), build_empty(config)
    assert type(text).__name__ == type(whole).__name__ == name.replace("Config", "ForConditionalGeneration")
    assert tower_names(whole) == tower_names(text) == towers
    beside = tuple(f"{tower}." for tower in towers)
    assert set(text.state_dict()) == {key for key in whole.state_dict() if not key.startswith(beside)}
    assert find_decoder(text).config.model_type == config.get_text_config().model_type
    assert find_decoder(text).get_output_embeddings() is None
    assert linear_names(text) and not any(linear.startswith(beside) for linear in linear_names(text))


def test_a_model_of_text_alone_has_no_towers():
    model = build_empty(transformers.LlamaConfig(**TEXT))
    assert tower_names(model) == [] and not is_multimodal(model.config)


def test_a_language_model_known_as_a_multimodal_one_alone_is_built():
    heads = {"q_lora_rank": 64, "kv_lora_rank": 64, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}
    experts = {"n_routed_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 64}
    model = build_empty(transformers.Mistral4Config(**TEXT | {"num_key_value_heads": 4}, **heads, **experts))
    assert type(model).__name__ == "Mistral4ForCausalLM" and tower_names(model) == []


def test_a_head_inside_of_what_is_left_out_is_refused():
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    with pytest.raises(ModelError, match="blip is no causal language model that can be built here"):
        build_empty(transformers.BlipConfig(text_config=text, vision_config=TOWER))


def test_an_encoder_with_a_decoder_is_refused():
    with pytest.raises(ModelError, match="t5 is an encoder with a decoder"):
        build_empty(transformers.T5Config())


@pytest.mark.skipif(find_spec("timm") is not None, reason="timm is here")
def test_a_library_that_a_tower_needs_is_named_with_the_way_to_it():
    with pytest.raises(ModelError, match="requires the timm library") as refused:
        build_empty(transformers.Gemma3nConfig())
    assert "Install" in refused.value.hint
