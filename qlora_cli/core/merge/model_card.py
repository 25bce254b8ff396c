"""Model card of a merged model: how it was merged, and how far it predicts apart from base + adapter."""

from collections.abc import Mapping, Sequence
from typing import Any

from qlora_cli import __version__
from qlora_cli.core.device import dtype_name
from qlora_cli.core.merge.base import Base
from qlora_cli.core.merge.compare_models import Comparison
from qlora_cli.core.merge.plan import MergeOptions
from qlora_cli.core.models.model_card import format_card, hub_dataset, link_base
from qlora_cli.core.models.structure import is_multimodal


def write_merged_card(
    base: Base,
    options: MergeOptions,
    data: Mapping[str, Any],
    comparison: Comparison | None,
    rows_described: str | None,
    choice: Sequence[str],
) -> str:
    """The text of the card; `data` is what the run's record says of it, `rows_described` as `find_rows` returns it,
    `choice` the lines on how the base was chosen."""
    name = base.files.name if base.files.commit else None
    packed, dtype = options.quantization.quant_type if options.pack else None, dtype_name(options.dtype)
    of_base = link_base(name)
    weights = (
        "the 4-bit weights the adapter was trained against, dequantised"
        if options.restore
        else "the base's original weights, which are not those the adapter was trained against"
    )
    stored = f"linear layers in 4 bits ({packed}), the rest in {dtype}" if packed else dtype
    auto_class = "AutoModelForImageTextToText" if is_multimodal(base.files.config) else "AutoModelForCausalLM"
    lines = [
        f"{of_base[0].upper()}{of_base[1:]}, fine-tuned with QLoRA; the adapter is merged into {weights}. Stored: "
        f"{stored}. Written by qlora {__version__}.",
        "",
        *choice,
        *_comparison(comparison, rows_described),
        "## Use",
        "",
        "```python",
        f"from transformers import {auto_class}, AutoTokenizer",
        "",
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/model")',
        f'model = {auto_class}.from_pretrained("path/to/this/model", dtype="auto", device_map="auto")',
        "```",
    ]
    return format_card(
        f"{name.rpartition('/')[2]}, fine-tuned" if name else "A fine-tuned model",
        lines,
        base=name,
        dataset=hub_dataset(data),
        base_model_relation=("quantized" if packed else "finetune") if name else None,
        library_name="transformers",
        tags=["qlora", "merged"] + (["bitsandbytes", "4-bit"] if packed else []),
    )


def _comparison(comparison: Comparison | None, rows_described: str | None) -> list[str]:
    if comparison is None:
        return ["The merged model was not compared with base + adapter.", ""]
    return [
        "## Against base + adapter",
        "",
        f"Measured on {comparison.tokens:,} tokens of {comparison.rows} row{'s' * (comparison.rows != 1)} "
        f"{rows_described}.",
        "",
        "| | |",
        "|---|---|",
        f"| KL divergence, mean | {comparison.kl_mean:.2e} nats a token |",
        f"| KL divergence, largest | {comparison.kl_max:.2e} nats |",
        f"| perplexity of base + adapter | {comparison.reference_perplexity:.4f} |",
        f"| perplexity of this model | {comparison.other_perplexity:.4f} |",
        f"| same greedy choice | {100 * comparison.greedy_agreement:.2f} % of tokens |",
        "",
    ]
