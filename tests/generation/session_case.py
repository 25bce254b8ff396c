"""Settings for the tests of generation and decoding: greedy, unless they say otherwise, and everything explicit."""

from qlora_cli.settings.generation import GenerationSettings


def settings_of(**changes) -> GenerationSettings:
    """Greedy, unfiltered, of seed 0, one prompt at a time, but for the changes."""
    return GenerationSettings(**{"temperature": 0.0, "top_p": 1.0, "seed": 0, "batch_size": 1, **changes})
