"""Comparison of two models on rows of tokens: KL divergence, perplexity, greedy agreement."""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from qlora_cli.core.device import free_memory
from qlora_cli.events import Progress, Report

KEPT_BYTES = 2**29  # float32 log-probabilities of the first model held on the host while the second one answers
MOST_TOKENS = {"cuda": 8192, "cpu": 1024}  # enough for a mean KL of 1e-5 ± 1e-6; a 7B model on CPU reads 10 a second
MOST_ROW_TOKENS = 512
# Of rows that go through a model together: a GPU waits for Python with few, a CPU does not. Of a large vocabulary fewer, for
# whose logits this is the memory.
BATCH_TOKENS = {"cuda": 2048, "cpu": MOST_ROW_TOKENS}
LOGITS_BYTES = 2**28

Row = tuple[np.ndarray, np.ndarray]  # input_ids int32 (n,), trained bool (n,)
OpenModel = Callable[[], AbstractContextManager[nn.Module]]


@dataclass(frozen=True)
class RowBatch:
    """Rows that go through a causal model together, padded at their ends, which changes nothing in front.

    Attributes:
        ids: (rows, length) int64.
        places: Where the next token is trained, (predicted,) int64, counted over all rows.
        targets: Those tokens, (predicted,) int64.
    """

    ids: torch.Tensor
    places: torch.Tensor
    targets: torch.Tensor

    def predictions(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of what a model gave, (rows, length, vocabulary), that at the places, (predicted, vocabulary) float32, and targets."""
        return logits.flatten(0, 1)[self.places.to(logits.device)].float(), self.targets.to(logits.device)


@dataclass(frozen=True)
class Comparison:
    """How far `other` predicts apart from `reference` over the same tokens."""

    kl_mean: float  # of KL(reference || other), nats a token
    kl_max: float  # of one token
    reference_perplexity: float  # exp of the mean cross-entropy
    other_perplexity: float
    greedy_agreement: float  # share of tokens at which both hold the same one likeliest, 0 to 1
    tokens: int  # predictions compared
    rows: int  # they come from


def choose_rows(
    rows: Iterable[Row], *, vocabulary: int, device: torch.device, most_tokens: int | None = None
) -> list[Row]:
    """As many rows, each cut to 512 tokens and before a token without an embedding, as keep the comparison within memory
    and a minute's time, or hold `most_tokens` that are predicted.

    Rows without a trained token, and single tokens, predict nothing and are left out.
    """
    most_tokens = most_tokens or MOST_TOKENS.get(device.type, MOST_TOKENS["cpu"])
    budget = min(most_tokens, KEPT_BYTES // (4 * vocabulary))
    chosen: list[Row] = []
    for ids, trained in rows:
        ids, trained = ids[:MOST_ROW_TOKENS], trained[:MOST_ROW_TOKENS]
        known = int(np.flatnonzero(np.append(ids >= vocabulary, True))[0])  # a tokenizer may have more tokens than that
        ids, trained = ids[:known], trained[:known]
        predicted = int(trained[1:].sum())
        if not predicted:
            continue
        if predicted > budget:
            if chosen:
                break
            keep = int(np.flatnonzero(np.cumsum(trained[1:]) == max(1, budget))[0]) + 2
            ids, trained, predicted = ids[:keep], trained[:keep], max(1, budget)
        chosen.append((ids, trained))
        budget -= predicted
        if budget <= 0:
            break
    return chosen


def pad_together(
    rows: Sequence[Row], *, vocabulary: int, device: torch.device, most_tokens: int | None = None
) -> list[RowBatch]:
    """The rows in batches of neighbours in length, of at most so many tokens or one row."""
    most = most_tokens or min(BATCH_TOKENS.get(device.type, MOST_ROW_TOKENS), LOGITS_BYTES // (4 * vocabulary))
    batches: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: len(row[0])):
        if batches and (len(batches[-1]) + 1) * len(row[0]) <= most:
            batches[-1].append(row)
        else:
            batches.append([row])
    return [_pad(batch) for batch in batches]


def _pad(rows: Sequence[Row]) -> RowBatch:
    ids = np.zeros((len(rows), len(rows[-1][0])), dtype=np.int64)
    predicting = np.zeros(ids.shape, dtype=np.bool_)
    for number, (row, trained) in enumerate(rows):
        ids[number, : len(row)] = row
        predicting[number, : len(row) - 1] = trained[1:]
    places = np.flatnonzero(predicting)
    return RowBatch(*map(torch.from_numpy, (ids, places, ids.flatten()[places + 1])))


def compare_models(
    open_reference: OpenModel,
    open_other: OpenModel,
    batches: Sequence[RowBatch],
    *,
    device: torch.device,
    report: Report,
) -> Comparison:
    """Compares two models on the trained tokens of some rows, one model in memory at a time.

    Args:
        open_reference: Opens the model that is right; closing it frees its memory.
        open_other: Opens the model to compare with it.
        batches: From `pad_together`; at least one.
    """
    kept: list[torch.Tensor] = []
    rows, done = sum(len(batch.ids) for batch in batches), 0
    with open_reference() as model:
        for batch in batches:
            kept.append(_log_probabilities(model, batch, device)[0].cpu())
            done += len(batch.ids)
            report(Progress("Verifying base + adapter", done, rows))
    del model
    free_memory(device)
    totals = torch.zeros(4, dtype=torch.float64)  # KL, cross-entropy of each, agreements
    kl_max, tokens, done = -math.inf, 0, 0
    with open_other() as model:
        for batch, reference in zip(batches, kept, strict=True):
            other, targets = _log_probabilities(model, batch, device)
            reference = reference.to(device)
            divergence = torch.sum(reference.exp() * (reference - other), dim=-1)  # (predicted,)
            likelihoods = [log.gather(1, targets.unsqueeze(1)).sum().double() for log in (reference, other)]
            agreements = (reference.argmax(-1) == other.argmax(-1)).sum().double()
            totals += torch.stack([divergence.double().sum(), -likelihoods[0], -likelihoods[1], agreements]).cpu()
            kl_max, tokens = max(kl_max, float(divergence.max())), tokens + len(targets)
            done += len(batch.ids)
            report(Progress("Verifying merged model", done, rows))
    del model
    free_memory(device)
    kl, reference_loss, other_loss, agreement = (totals / tokens).tolist()
    return Comparison(kl, kl_max, math.exp(reference_loss), math.exp(other_loss), agreement, tokens, rows)


@torch.inference_mode()
def _log_probabilities(model: nn.Module, batch: RowBatch, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(predicted, vocabulary) float32 at every position whose next token is trained, and those tokens."""
    logits, targets = batch.predictions(model(input_ids=batch.ids.to(device), use_cache=False).logits)
    return torch.log_softmax(logits, dim=-1), targets
