"""Rows that a calibration looks at: some of those trained on, in batches without padding."""

import numpy as np
import torch
from torch import Tensor

from qlora_cli.core.data.dataset import RowSubset

ROWS = 64  # at most, unless they are short
# Of all rows; 64 rows of GSM8K have 13,000. On a CPU time counts: twice as many leave a 135M model the same loss.
MOST_TOKENS = {"cuda": 16_384, "cpu": 1_024}
MOST_ROW_TOKENS = 512
ROUNDING_TOKENS = {"cuda": 65_536, "cpu": 4_096}  # for rounding, which needs four times as many to be near its best
BATCH_TOKENS = 1_024  # with which one layer of llama-7b takes less beside the base than the leanest training step
# Of what rounding looks at, a layer at a time of a model that nothing is trained in.
ROUNDING_BATCH_TOKENS = {"cuda": 4_096, "cpu": 1_024}
MOST_CUT = 1.15  # a row of a batch is at most so many times as long as what is left of it
ROWS_STREAM = 0xCA1  # apart from the streams that split rows and order epochs


def choose_calibration_rows(
    rows: RowSubset, *, seed: int, device: torch.device, most_tokens: dict[str, int] = MOST_TOKENS
) -> list[int]:
    """Numbers of the rows looked at: drawn by the seed, until there are the tokens wanted."""
    wanted, chosen, tokens = most_tokens[device.type], [], 0
    for index in np.random.default_rng([seed, ROWS_STREAM]).permutation(len(rows)).tolist():
        length = min(int(rows.lengths[index]), MOST_ROW_TOKENS)
        if length < 2:
            continue
        chosen.append(index)
        tokens += length
        if tokens >= wanted or (len(chosen) >= ROWS and tokens >= wanted // 2):
            break
    return chosen


def batch_rows(rows: RowSubset, chosen: list[int], most_tokens: int = BATCH_TOKENS) -> list[Tensor]:
    """Token ids of the rows, (rows, length) int64: neighbours in length together, cut to the shortest of their batch, of
    `most_tokens` or a row."""
    ids = sorted((rows[index][0][:MOST_ROW_TOKENS] for index in chosen), key=len)
    batches: list[list[np.ndarray]] = []
    for row in ids:
        shortest = len(batches[-1][0]) if batches else 0
        if len(row) <= MOST_CUT * shortest and shortest * (len(batches[-1]) + 1) <= most_tokens:
            batches[-1].append(row)
        else:
            batches.append([row])
    return [torch.from_numpy(np.stack([row[: len(batch[0])] for row in batch]).astype(np.int64)) for batch in batches]
