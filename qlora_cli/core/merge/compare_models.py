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

Row = tuple[np.ndarray, np.ndarray]  # input_ids int32 (n,), trained bool (n,)
OpenModel = Callable[[], AbstractContextManager[nn.Module]]


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


def compare_models(
    open_reference: OpenModel, open_other: OpenModel, rows: Sequence[Row], *, device: torch.device, report: Report
) -> Comparison:
    """Compares two models on the trained tokens of some rows, one model in memory at a time.

    Args:
        open_reference: Opens the model that is right; closing it frees its memory.
        open_other: Opens the model to compare with it.
        rows: From `choose_rows`; at least one.
    """
    kept: list[torch.Tensor] = []
    with open_reference() as model:
        for number, row in enumerate(rows, start=1):
            kept.append(_log_probabilities(model, row, device).cpu())
            report(Progress("Verifying base + adapter", number, len(rows)))
    del model
    free_memory(device)
    totals = torch.zeros(4, dtype=torch.float64)  # KL, cross-entropy of each, agreements
    kl_max, tokens = -math.inf, 0
    with open_other() as model:
        for number, (row, reference) in enumerate(zip(rows, kept, strict=True), start=1):
            other = _log_probabilities(model, row, device)
            reference = reference.to(device)
            divergence = torch.sum(reference.exp() * (reference - other), dim=-1)  # (predicted,)
            targets = torch.from_numpy(row[0][1:][row[1][1:]].astype(np.int64)).to(device)  # (predicted,)
            likelihoods = [log.gather(1, targets.unsqueeze(1)).sum().double() for log in (reference, other)]
            agreements = (reference.argmax(-1) == other.argmax(-1)).sum().double()
            totals += torch.stack([divergence.double().sum(), -likelihoods[0], -likelihoods[1], agreements]).cpu()
            kl_max, tokens = max(kl_max, float(divergence.max())), tokens + len(targets)
            report(Progress("Verifying merged model", number, len(rows)))
    del model
    free_memory(device)
    kl, reference_loss, other_loss, agreement = (totals / tokens).tolist()
    return Comparison(kl, kl_max, math.exp(reference_loss), math.exp(other_loss), agreement, tokens, len(rows))


@torch.inference_mode()
def _log_probabilities(model: nn.Module, row: Row, device: torch.device) -> torch.Tensor:
    """(predicted, vocabulary) float32: at every position whose next token is trained."""
    ids = torch.from_numpy(row[0].astype(np.int64)).to(device).unsqueeze(0)
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1]  # (tokens - 1, vocabulary)
    predicting = torch.from_numpy(np.flatnonzero(row[1][1:])).to(device)
    return torch.log_softmax(logits[predicting].float(), dim=-1)
