"""A model's scaling of rotary embeddings counts in training, also in rows past what it was trained on."""

import pytest
import torch
import transformers

from qlora_cli.core.adapters.lora import attach_adapter
from qlora_cli.core.models.files import resolve_model
from qlora_cli.core.models.loading import load_base
from qlora_cli.settings.groups import LoraSettings, QuantizationSettings
from tests.engine.test_engine import CPU, batch_of, step

FACTORS = [1.0 + 0.5 * place for place in range(8)]
KINDS = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
    "llama3": {
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
    "longrope": {
        "short_factor": [1.0] * 8,
        "long_factor": FACTORS,
        "original_max_position_embeddings": 32,
        "factor": 4.0,
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_models_scaling_counts(tmp_path, kind):
    losses = {}
    for name in (kind, "default"):
        rope = {"rope_type": name, "rope_theta": 1e4, **KINDS.get(name, {})}
        config = transformers.LlamaConfig(
            vocab_size=384,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64 if kind == "dynamic" else 128,
            initializer_range=0.2,  # attention that looks somewhere
            rope_parameters=rope,
        )
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / name)
        files = resolve_model(str(tmp_path / name))
        base, _ = load_base(files, QuantizationSettings(base_cache=False), compute_dtype=torch.float32, device=CPU)
        model = attach_adapter(base, LoraSettings(rank=4, alpha=8, init="default")).train()
        batch = batch_of((100, 20, 40))  # past the 32 or 64 positions it was trained on, and not
        plain, _, _ = step(model, batch, kind="plain")
        fast, _, engine = step(model, batch)
        assert engine.packed and torch.allclose(fast, plain, rtol=1e-6)
        losses[name] = plain
    assert abs(losses[kind] - losses["default"]) > 1e-5 * losses["default"]
