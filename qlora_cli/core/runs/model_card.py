"""Model card of an adapter: what it was trained on and how it went."""

import re
from typing import Any

from qlora_cli import __version__
from qlora_cli.core.models.model_card import format_card, link_base
from qlora_cli.core.prompts.encoder import encoder_of
from qlora_cli.core.prompts.formatting import Formatting, PromptTemplate, format_prompt

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
    "rope_scaling",
    "seed",
)


SNIPPET = """
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer, BitsAndBytesConfig

adapter = "path/to/this/adapter"
held = BitsAndBytesConfig(  # as in training
    load_in_4bit=True,
    bnb_4bit_quant_type={quant_type!r},
    bnb_4bit_use_double_quant={double_quant!r},
    bnb_4bit_compute_dtype=torch.{compute_dtype},
)
{positions}model = AutoPeftModelForCausalLM.from_pretrained(adapter, quantization_config=held, dtype=torch.{compute_dtype}{given})
tokenizer = AutoTokenizer.from_pretrained(adapter)
prompt = {prompt!r}
ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids.to(model.device)
answer = model.generate(input_ids=ids, max_new_tokens=100, do_sample=False)
print(tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True))
""".strip()


def write_example(formatting: Formatting, tokenizer: Any) -> str:
    """A prompt as the model was trained to be given one, control tokens written out."""
    prompt: Any = "Your question"
    if formatting.format == "prompt":
        answer = formatting.completion_column or ""
        fields = PromptTemplate(formatting.template or "", answer, encoder_of(tokenizer)).fields
        prompt = {name: prompt if len(set(fields)) == 2 else f"Your {name}" for name in fields if name != answer}
    return str(tokenizer.decode(format_prompt(prompt, formatting, tokenizer)))


def write_card(
    *,
    base: str | None,
    dataset: str | None,
    settings: dict[str, Any],
    results: dict[str, Any],
    held: dict[str, Any],
    example: str,
    merging: list[str],
    positions: dict[str, Any] | None = None,
) -> str:
    """The text of the card.

    Args:
        base: Hub id; None for a local one.
        dataset: Hub id; None for local data.
        settings: Of which the table above is shown.
        results: Likewise.
        held: `quant_type`, `double_quant` and `compute_dtype` of the base.
        example: A prompt as the model is given one.
        merging: What to type to merge it, if anything.
        positions: What of the base's configuration a scaling of positions changed, if one was asked for.
    """
    scaled = {"positions": "", "given": ""}
    if positions is not None:
        scaled = {"positions": f"positions = {positions}  # as in training\n", "given": ", **positions"}
    fence = "~" * max(3, 1 + max(map(len, re.findall("~+", example)), default=0))
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
        "## Prompt format",
        "",
        "What the model is given, and answers:",
        "",
        fence,
        example,
        fence,
        "",
        "## Use",
        "",
        "```sh",
        'qlora generate --adapter . "Your prompt"',
        *merging,
        "```",
        "",
        "```python",
        SNIPPET.format(
            prompt=example, **scaled, **{name: held[name] for name in ("quant_type", "double_quant", "compute_dtype")}
        ),
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
