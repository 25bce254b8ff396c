"""Model card of an adapter: what it was trained on and how it went."""

from typing import Any

from qlora_cli import __version__
from qlora_cli.core.models.model_card import format_card, link_base

RESULTS = (
    "steps",
    "tokens",
    "final_loss",
    "eval_loss",
    "best_eval_loss",
    "best_step",
    "trainable_parameters",
    "total_parameters",
)
SETTINGS = (
    "rank",
    "alpha",
    "dropout",
    "target_modules",
    "rslora",
    "dora",
    "quant_type",
    "double_quant",
    "batch_size",
    "gradient_accumulation_steps",
    "packing",
    "learning_rate",
    "scheduler",
    "weight_decay",
    "max_grad_norm",
    "seed",
)


def write_card(*, base: str | None, dataset: str | None, settings: dict[str, Any], results: dict[str, Any]) -> str:
    """The text of the card: hub ids, None for what is local, and of settings and results what the tables above name."""
    on_data = f"[{dataset}](https://huggingface.co/datasets/{dataset})" if dataset else "local data"
    lines = [
        f"A LoRA adapter of {link_base(base)}, trained on {on_data} by QLoRA: the base frozen in 4 bits, the adapter in "
        f"float32. Written by qlora {__version__}.",
        "",
        "## Results",
        "",
        *_table(results, RESULTS),
        "",
        "## Settings",
        "",
        *_table(settings, SETTINGS),
        "",
        "## Use",
        "",
        "```sh",
        'qlora generate --adapter . "Your prompt"',
        "qlora merge --adapter . --output merged",
        "```",
        "",
        "```python",
        "from peft import AutoPeftModelForCausalLM",
        "",
        'model = AutoPeftModelForCausalLM.from_pretrained("path/to/this/adapter")',
        "```",
    ]
    return format_card(
        f"{base.rsplit('/', 1)[-1]} fine-tuned" if base else "A fine-tuned adapter",
        lines,
        base=base,
        dataset=dataset,
        library_name="peft",
        tags=["lora", "qlora", "4-bit", "peft"] + ([f"base_model:adapter:{base}"] if base else []),
    )


def _table(values: dict[str, Any], names: tuple[str, ...]) -> list[str]:
    rows = [(name.replace("_", " "), values[name]) for name in names if values.get(name) is not None]
    return ["| | |", "|---|---|", *(f"| {name} | {_text(value)} |" for name, value in rows)]


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, int):
        return f"{value:,}"
    return ", ".join(value) if isinstance(value, list | tuple) else str(value)
