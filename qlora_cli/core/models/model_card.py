"""Model cards: a README.md with the metadata that the hub reads, with no local path and no token."""

from collections.abc import Mapping
from typing import Any

from huggingface_hub import ModelCardData


def hub_dataset(data: Mapping[str, Any]) -> str | None:
    """Hub id of the data a record names; None for local or unknown data, whose path stays private."""
    return data["source"].partition(":")[0] if "revision" in data else None


def link_base(base: str | None) -> str:
    """A base model in a sentence, by its hub id; None for a local directory."""
    return f"[{base}](https://huggingface.co/{base})" if base else "a local base model"


def format_card(title: str, lines: list[str], *, base: str | None, dataset: str | None, **metadata: Any) -> str:
    """The text of a card: hub ids, None for what is local; lines below the title; more fields of `ModelCardData`."""
    card = ModelCardData(
        base_model=base, datasets=[dataset] if dataset else None, pipeline_tag="text-generation", **metadata
    )
    return "\n".join(["---", card.to_yaml().strip(), "---", "", f"# {title}", "", *lines, ""])
