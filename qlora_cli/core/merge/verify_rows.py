"""An adapter's directory and a tokenizer in; rows of tokens to compare two models on, and what they are, out."""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from qlora_cli.artifacts import RUN_YAML, find_run_record, is_prepared, run_of
from qlora_cli.config import TrainConfig
from qlora_cli.config_file import read_config_file
from qlora_cli.core.data.dataset import PreparedRows
from qlora_cli.core.data.split import RowSubset, hold_out
from qlora_cli.core.merge.compare_models import Row

LEAST_TOKENS = 512  # held out, below which rows trained on are added: a mean over few tokens says little
# Plain prose, code and a dialogue: read where a run's own rows are gone.
TEXTS = (
    "The harbour lay still in the early light. A single boat moved along the far wall, its engine barely audible, and "
    "the gulls that had waited all night on the roofs of the fish market rose one after another to follow it out.",
    "Question: A farmer has 3 fields of 12 rows each and plants 25 seeds a row. How many seeds does he need?\n"
    "Answer: There are 3 * 12 = 36 rows, and 36 * 25 = 900, so he needs 900 seeds.",
    'def count_words(text):\n    """Return how often each word occurs."""\n    counts = {}\n    for word in text.split():\n'
    "        counts[word] = counts.get(word, 0) + 1\n    return counts\n",
    "User: My parcel was meant to arrive on Tuesday and the page still says that it is being packed.\n"
    "Assistant: I am sorry about the wait. Could you give me the order number? I will ask the warehouse today and "
    "write to you as soon as I know when it leaves.",
    "In 1854 a physician marked each death on a map of the district. The marks crowded around one street pump, and when "
    "its handle was taken off the outbreak faded. It was among the first times that a map had settled an argument "
    "about the cause of a disease.",
)


def find_rows(adapter: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[Iterator[Row], str]:
    """The best rows there are: held out by the run, else those it trained on, else a built-in text.

    Args:
        adapter: Run directory or PEFT adapter.
        tokenizer: For the built-in text.

    Returns:
        Rows one at a time, and a description that ends a sentence.
    """
    rows = _rows_of_run(adapter)
    if rows is None:
        return (_whole(tokenizer(text)["input_ids"]) for text in TEXTS), "of a built-in text"
    settings: dict[str, Any] = {}
    if (run_of(adapter) / RUN_YAML).is_file():
        settings = read_config_file(run_of(adapter) / RUN_YAML, TrainConfig)
    run = TrainConfig(**settings)
    trained, held = hold_out(rows, fraction=run.eval_fraction, count=run.eval_rows, seed=run.seed)
    if held.lengths.sum() >= LEAST_TOKENS:
        return _each(held), "held out from training"
    if len(held):
        return chain(_each(held), _each(trained)), "held out from training and trained on"
    return _each(trained), "trained on"


def _each(rows: RowSubset) -> Iterator[Row]:
    return (rows[index] for index in range(len(rows)))


def _rows_of_run(adapter: Path) -> PreparedRows | None:
    """The rows a run recorded, where they lie unchanged."""
    data = find_run_record(adapter).get("data") or {}
    directory = Path(data.get("prepared") or "")
    if not data.get("prepared") or not is_prepared(directory):
        return None
    rows = PreparedRows(directory)
    return rows if rows.manifest.get("rows_sha256") == data.get("rows_sha256") else None


def _whole(ids: list[int]) -> Row:
    return np.asarray(ids, dtype=np.int32), np.ones(len(ids), dtype=np.bool_)
