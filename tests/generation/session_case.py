"""Settings for the tests of generation and decoding: greedy, unless they say otherwise, and everything explicit."""

import torch

from qlora_cli.core.models.structure import underlying_model
from qlora_cli.settings.generation import GenerationSettings

NEVER = 10**6  # as an end token: none


def settings_of(**changes) -> GenerationSettings:
    """Greedy, unfiltered, of seed 0, one prompt at a time, but for the changes."""
    return GenerationSettings(**{"temperature": 0.0, "top_p": 1.0, "seed": 0, "batch_size": 1, **changes})


def generate_with_transformers(model, ids, count, penalty=1.0) -> list[int]:
    """The tokens with which transformers' own `generate` goes on, on the model's device."""
    with torch.no_grad():
        output = underlying_model(model).generate(
            input_ids=torch.tensor([ids], device=model.device),
            attention_mask=torch.ones(1, len(ids), dtype=torch.int64, device=model.device),
            max_new_tokens=count,
            do_sample=False,
            repetition_penalty=penalty,
            eos_token_id=NEVER,
            pad_token_id=0,
            use_cache=True,
        )
    return output[0, len(ids) :].tolist()
