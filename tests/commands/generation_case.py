"""Run directories for the tests of generation: an adapter that gives answers of its own, and its run record."""

import json
from dataclasses import asdict
from pathlib import Path

import torch

from qlora_cli.artifacts import FORMAT, RUN_RECORD
from qlora_cli.core.adapters.lora import attach_adapter, save_adapter
from qlora_cli.core.models.files import resolve_model
from qlora_cli.core.models.loading import load_base
from qlora_cli.core.prompts.formatting import Formatting
from qlora_cli.settings.groups import LoraSettings, QuantizationSettings
from tests.adapted import draw_b

CHAT = Formatting(
    format="chat",
    column="messages",
    template="{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|endoftext|>' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}",
)


def write_run(
    run: Path, base_directory: Path, *, seed: int = 0, formatting: Formatting | None = None, **identity: object
) -> Path:
    """Writes a run whose base identity is the true one but for `identity`."""
    base, found = load_base(
        resolve_model(str(base_directory)),
        QuantizationSettings(base_cache=False),
        compute_dtype=torch.float32,
        device=torch.device("cpu"),
    )
    model = draw_b(attach_adapter(base, LoraSettings(rank=4, alpha=16)), seed=seed, scale=0.1)
    save_adapter(model, run, base_name=str(base_directory))
    record = {"format": FORMAT, "base": {**asdict(found), **identity}}
    if formatting is not None:
        record["formatting"] = formatting.to_dict()
    (run / RUN_RECORD).write_text(json.dumps(record))
    return run
