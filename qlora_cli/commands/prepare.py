"""`qlora prepare`: a dataset tokenised for a model into a prepared directory."""

from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qlora_cli.config import PrepareConfig
from qlora_cli.core.data.dataset import PreparedRows
from qlora_cli.core.data.prepare import PreparedSummary, prepare_rows
from qlora_cli.core.models.files import resolve_model
from qlora_cli.core.prompts.formatting import Formatting, describe_origins
from qlora_cli.core.recognition.columns import list_names
from qlora_cli.core.runs.validate import check
from qlora_cli.events import Report, RowShown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["PreparedSummary", "prepare", "summarise"]

SCREEN_LINES = 14  # of 24, for rows; what was recognised, the summary and the next command take the others


def prepare(config: PrepareConfig, report: Report) -> PreparedSummary:
    """Tokenises data for a model into `config.output`.

    Raises:
        UsageError: No model or data was given, or the settings do not fit the data.
        ModelError: The model's tokenizer cannot be found or used.
        DataError: The data is missing, or holds a bad row, or nothing to train on.
        RunError: The output directory holds something else.
    """
    check(config)
    assert config.model is not None
    files = resolve_model(
        config.model, config.model_revision, trust_remote_code=config.trust_remote_code, report=report
    )
    summary = prepare_rows(
        config,
        files.tokenizer,
        files.config,
        Path(config.output),
        report,
        overwrite=config.overwrite,
        workers=config.workers,
    )
    lines = None if config.verbose else max(4, SCREEN_LINES // max(1, config.show) - 3)
    show_rows(PreparedRows(summary.directory), files.tokenizer, config.show, report, lines)
    return summary


def summarise(summary: PreparedSummary) -> dict[str, Any]:
    """What became of the data at a glance: a few facts of `summary.to_dict()`, and all that was left out."""
    facts, lengths = summary.manifest, summary.manifest["lengths"]
    left_out = [f"{count:,} rows: {reason}" for reason, count in facts["dropped"].items()]
    left_out += [f"{facts['bad_rows']:,} bad rows"] if facts["bad_rows"] else []
    left_out += [f"the ends of {facts['truncated']:,} rows, past --max-length"] if facts["truncated"] else []
    left_out += [f"columns {list_names(names)}"] if (names := facts.get("unused_columns")) else []
    share = facts["trained_tokens"] / max(1, facts["tokens"])
    return {
        "rows": f"{facts['rows']:,} of {facts['records']:,} records",
        "tokens": f"{facts['tokens']:,}, {facts['trained_tokens']:,} trained ({share:.0%})",
        "lengths": f"{lengths['min']:,} to {lengths['max']:,}, half up to {lengths['p50']:,}, limit {facts['max_length']:,}",
        "parts": describe_origins(Formatting.from_dict(facts["formatting"])),
        "left_out": left_out or "nothing",
        "directory": summary.directory,
    }


def show_rows(
    rows: PreparedRows,
    tokenizer: "PreTrainedTokenizerBase",
    count: int,
    report: Report,
    most_lines: int | None = None,
) -> None:
    """Reports the first rows as text, cut where trained tokens begin or end.

    Args:
        rows: All of them.
        tokenizer: Decodes them.
        count: How many are shown.
        report: Takes them.
        most_lines: Lines that each may take on the screen; None for all.
    """
    if not count:
        return
    parts = describe_origins(Formatting.from_dict(rows.manifest["formatting"]))

    def decode(ids: np.ndarray) -> str:
        return str(tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    for index in range(min(count, len(rows))):
        input_ids, trained = rows[index]
        borders = [0, *(np.flatnonzero(np.diff(trained)) + 1).tolist(), len(input_ids)]
        texts = [decode(input_ids[:border]) for border in borders]  # decoded by itself, a part may lose its first space
        pieces = tuple(
            (text[len(before) :], bool(trained[start]))
            for (before, text), start in zip(pairwise(texts), borders, strict=False)
        )
        record = f"record {int(rows.records[index]) + 1}"
        origin = f"{record}: {parts}" if index == 0 else record
        report(RowShown(index, pieces, len(input_ids), int(trained.sum()), origin, most_lines))
