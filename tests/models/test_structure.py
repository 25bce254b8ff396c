"""A model's structure is read from its configuration, whatever family it is of."""

import pytest
import transformers

from qlora_cli.core.models.structure import context_length


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
