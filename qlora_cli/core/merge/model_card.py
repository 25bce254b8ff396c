"""Model card of a merged model; no local path is in it."""

from huggingface_hub import ModelCardData

from qlora_cli import __version__
from qlora_cli.core.merge.compare_models import Comparison


def write_merged_card(
    *,
    base: str | None,
    dataset: str | None,
    method: str,
    dtype: str,
    packed: str | None,
    comparison: Comparison | None,
    rows_described: str | None,
) -> str:
    """The text of a README.md with the metadata the hub reads.

    Args:
        base: Hub id of the base; None when it is a local directory, whose path stays private.
        dataset: Hub id of the data it was tuned on; None when it is local or unknown.
        method: "dequantized" or "original".
        dtype: Of the weights.
        packed: 4-bit type of the linear layers, None where they are in `dtype`.
        comparison: Merged model against base + adapter, if it was made.
        rows_described: Which rows it was made on.
    """
    metadata = ModelCardData(
        base_model=base,
        base_model_relation=("quantized" if packed else "finetune") if base else None,
        datasets=[dataset] if dataset else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["qlora", "merged"] + (["bitsandbytes", "4-bit"] if packed else []),
    )
    of_base = f"[{base}](https://huggingface.co/{base})" if base else "a local base model"
    weights = {
        "dequantized": "the 4-bit weights the adapter was trained against, dequantised",
        "original": "the base's original weights, which are not those the adapter was trained against",
    }[method]
    stored = f"linear layers in 4 bits ({packed}), the rest in {dtype}" if packed else dtype
    lines = [
        "---",
        metadata.to_yaml().strip(),
        "---",
        "",
        f"# {base.rpartition('/')[2]}, fine-tuned" if base else "# A fine-tuned model",
        "",
        f"{of_base[0].upper()}{of_base[1:]}, fine-tuned with QLoRA; the adapter is merged into {weights}. Stored: "
        f"{stored}. Written by qlora {__version__}.",
        "",
        *_comparison(comparison, rows_described),
        "## Use",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/model")',
        'model = AutoModelForCausalLM.from_pretrained("path/to/this/model", dtype="auto", device_map="auto")',
        "```",
        "",
    ]
    return "\n".join(lines)


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
