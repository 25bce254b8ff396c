"""`qlora prepare`: a dataset tokenised for a model into a prepared directory."""

from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qlora_cli.config import PrepareConfig
from qlora_cli.core.data.dataset import PreparedRows
from qlora_cli.core.data.prepare import PreparedSummary, prepare_rows
from qlora_cli.core.models.files import resolve_model
from qlora_cli.core.runs.validate import check
from qlora_cli.events import Report, RowShown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["PreparedSummary", "prepare"]


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
    show_rows(PreparedRows(summary.directory), files.tokenizer, config.show, report)
    return summary


def show_rows(rows: PreparedRows, tokenizer: "PreTrainedTokenizerBase", count: int, report: Report) -> None:
    """Reports the first rows as text, cut where trained tokens begin or end."""

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
        report(RowShown(index, pieces, len(input_ids), int(trained.sum())))
