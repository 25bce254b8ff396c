"""`qlora prepare`: a dataset tokenised for a model into a prepared directory."""

from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qlora_cli.config import PrepareConfig
from qlora_cli.core.data.dataset import PreparedRows
from qlora_cli.core.data.prepare import PreparedSummary, prepare_rows
from qlora_cli.core.data.row_origins import first_records, left_out_of, name_pieces, parts_of
from qlora_cli.core.data.statistics import LOST
from qlora_cli.core.models.files import resolve_model
from qlora_cli.core.prompts.encoder import encoder_of
from qlora_cli.core.prompts.formatting import Formatting, describe_origins
from qlora_cli.core.recognition.columns import list_names
from qlora_cli.core.runs.validate import check, report_idle
from qlora_cli.errors import QloraError
from qlora_cli.events import Report, RowShown
from qlora_cli.sizes import format_count

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
    report_idle(config, report)
    assert config.model is not None
    files = resolve_model(
        config.model,
        config.model_revision,
        trust_remote_code=config.trust_remote_code,
        rope_scaling=config.rope_scaling,
        report=report,
    )
    vocabulary = getattr(files.config.get_text_config(), "vocab_size", None) or len(files.tokenizer)
    files.check_token(encoder_of(files.tokenizer).spec.eos_id, vocabulary)  # which every row has, so before all is read
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
    rows = PreparedRows(summary.directory)
    show_rows(rows, files.tokenizer, config, report, lines)
    files.check_token(rows.largest_id(), vocabulary)
    return summary


def summarise(summary: PreparedSummary) -> dict[str, Any]:
    """What became of the data at a glance: a few facts of `summary.to_dict()`, and all that was left out."""
    facts, lengths = summary.manifest, summary.manifest["lengths"]
    left_out = [f"{format_count(count, 'row')}: {reason}" for reason, count in facts["dropped"].items()]
    left_out += [format_count(count, "bad row")] if (count := facts["bad_rows"]) else []
    if count := facts["truncated"]:
        left_out.append(f"the end{'' if count == 1 else 's'} of {format_count(count, 'row')}, past --max-length")
    lost = facts.get("lost", {}).items()
    left_out += [f"{LOST[kind]} of {format_count(count, 'conversation')}, by the chat template" for kind, count in lost]
    formatting = Formatting.from_dict(facts["formatting"])
    if formatting.format == "chat" and formatting.thoughts != "keep":
        others = "" if formatting.thoughts == "drop" else " but the last of each conversation"
        left_out.append(f"thoughts of answers{others} (--thoughts {formatting.thoughts})")
    left_out += [f"columns {list_names(names)}"] if (names := facts.get("unused_columns")) else []
    share = facts["trained_tokens"] / max(1, facts["tokens"])
    return {
        "rows": f"{format_count(facts['rows'], 'row')} of {format_count(facts['records'], 'record')}",
        "tokens": f"{format_count(facts['tokens'], 'token')}, of which {100 * share:.0f} % are trained",
        "lengths": f"{lengths['min']:,} to {lengths['max']:,}, half up to {lengths['p50']:,}, limit {facts['max_length']:,}",
        "parts": describe_origins(formatting),
        "left_out": left_out or "nothing",
        "directory": summary.directory,
    }


def show_rows(
    rows: PreparedRows,
    tokenizer: "PreTrainedTokenizerBase",
    config: PrepareConfig,
    report: Report,
    most_lines: int | None = None,
) -> None:
    """Reports the first rows as text, cut where trained tokens begin or end, and which message each part shows.

    Args:
        rows: All of them.
        tokenizer: Decodes them.
        config: Of `prepare`: how many are shown, and where their records are.
        report: Takes them.
        most_lines: Lines that each may take on the screen; None for all.
    """
    count = min(config.show, len(rows))
    if not count:
        return
    formatting = Formatting.from_dict(rows.manifest["formatting"])
    parts = describe_origins(formatting)
    try:
        records = first_records(config, tokenizer)
    except QloraError:
        records = {}  # what is shown is there all the same
    numbers = [int(number) for number in rows.records[:count]]
    left_out: dict[int, list[str]] = {}
    if rows.manifest.get("lost"):
        known = [number for number in dict.fromkeys(numbers) if number in records]
        faults = left_out_of([records[i] for i in known], formatting, tokenizer, rows.manifest["train_on"])
        left_out = dict(zip(known, faults, strict=True))

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    for index, number in enumerate(numbers):
        input_ids, trained = rows[index]
        borders = [0, *(np.flatnonzero(np.diff(trained)) + 1).tolist(), len(input_ids)]
        whole = decode(input_ids.tolist())
        # By itself a part may lose its first space; and a letter of several tokens is shown once all of them are there.
        texts = [decode(input_ids[:border].tolist()) for border in borders]
        texts = [text if whole.startswith(text) else text.rstrip("\ufffd") for text in texts]
        pieces = [text[len(before) :] for before, text in pairwise(texts)]
        origins = parts_of(records[number], formatting) if number in records else []
        sources = name_pieces(pieces, origins, lambda text: decode(tokenizer.encode(text, add_special_tokens=False)))
        report(
            RowShown(
                index,
                tuple((piece, bool(trained[start])) for piece, start in zip(pieces, borders, strict=False)),
                len(input_ids),
                int(trained.sum()),
                f"record {number + 1}: {parts}" if index == 0 else f"record {number + 1}",
                most_lines,
                tuple(sources),
                tuple(left_out.get(number, ())),
            )
        )
