"""Figures of two models' predictions, against their definitions."""

import math
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from qlora_cli.core.merge.compare_models import MOST_ROW_TOKENS, MOST_TOKENS, choose_rows, compare_models, pad_together
from qlora_cli.events import Progress

CPU = torch.device("cpu")


class Bigram(nn.Module):
    """A model whose next token depends on the last one alone."""

    def __init__(self, vocabulary: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = nn.Parameter(torch.randn(vocabulary, vocabulary, generator=generator))

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table[input_ids])


def opened(model: nn.Module, log: list[str], name: str):
    @contextmanager
    def open_model():
        log.append(f"open {name}")
        yield model
        log.append(f"close {name}")

    return open_model


def test_figures_are_their_definitions_over_the_trained_tokens_and_one_model_is_open_at_a_time() -> None:
    one, two = Bigram(11, 0), Bigram(11, 1)
    random = np.random.default_rng(0)
    rows = []
    for length in (2, 9, 30):
        trained = random.random(length) < 0.6
        trained[-1] = True
        rows.append((random.integers(0, 11, length).astype(np.int32), trained))
    log: list[str] = []
    events: list = []
    batches = pad_together(rows, vocabulary=11, device=CPU, most_tokens=40)
    found = compare_models(opened(one, log, "1"), opened(two, log, "2"), batches, device=CPU, report=events.append)
    assert log == ["open 1", "close 1", "open 2", "close 2"]

    logs = [model.table.detach().double().log_softmax(-1) for model in (one, two)]
    before = np.concatenate([ids[:-1][trained[1:]] for ids, trained in rows])
    after = np.concatenate([ids[1:][trained[1:]] for ids, trained in rows])
    p, q = (log[before] for log in logs)
    divergences = (p.exp() * (p - q)).sum(-1)
    assert found.tokens == len(before)
    assert found.rows == 3
    assert found.kl_mean == pytest.approx(float(divergences.mean()), rel=1e-5)
    assert found.kl_max == pytest.approx(float(divergences.max()), rel=1e-5)
    assert found.reference_perplexity == pytest.approx(math.exp(-float(logs[0][before, after].mean())), rel=1e-5)
    assert found.other_perplexity == pytest.approx(math.exp(-float(logs[1][before, after].mean())), rel=1e-5)
    assert found.greedy_agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    assert [e.done for e in events if isinstance(e, Progress)] == [2, 3, 2, 3]


def test_a_model_does_not_diverge_from_itself() -> None:
    model = Bigram(7, 3)
    rows = [(np.arange(7, dtype=np.int32), np.ones(7, dtype=bool))]
    batches = pad_together(rows, vocabulary=7, device=CPU)
    found = compare_models(opened(model, [], ""), opened(model, [], ""), batches, device=CPU, report=lambda event: None)
    assert abs(found.kl_mean) < 1e-7
    assert found.greedy_agreement == 1
    assert found.other_perplexity == found.reference_perplexity


def test_rows_are_taken_until_the_budget_and_cut_where_need_be() -> None:
    ones = np.ones(2000, dtype=bool)
    long = (np.zeros(2000, dtype=np.int32), ones)
    untrained = (np.zeros(50, dtype=np.int32), np.zeros(50, dtype=bool))
    single = (np.zeros(1, dtype=np.int32), np.ones(1, dtype=bool))
    chosen = choose_rows([untrained, single, long, long, long], vocabulary=100, device=CPU)
    assert [len(ids) for ids, _ in chosen] == [MOST_ROW_TOKENS, MOST_ROW_TOKENS]
    assert sum(int(trained[1:].sum()) for _, trained in chosen) <= MOST_TOKENS["cpu"]
    chosen = choose_rows([long], vocabulary=2**29 // (4 * 20), device=CPU)  # room for 20 tokens
    assert [int(trained[1:].sum()) for _, trained in chosen] == [20]
    assert choose_rows([untrained, single], vocabulary=100, device=CPU) == []
    foreign = (np.array([1, 2, 3, 100, 4]), np.ones(5, dtype=bool))
    assert len(choose_rows([foreign], vocabulary=100, device=CPU)[0][0]) == 3


def test_rows_are_padded_behind_their_ends_with_neighbours_in_length() -> None:
    random = np.random.default_rng(1)
    rows = [(random.integers(1, 9, n).astype(np.int32), random.random(n) < 0.7) for n in (12, 3, 512, 12, 4, 30, 512)]
    batches = pad_together(rows, vocabulary=9, device=CPU)
    assert [tuple(batch.ids.shape) for batch in batches] == [(5, 30), (1, 512), (1, 512)]
    ordered = sorted(rows, key=lambda row: len(row[0]))
    assert torch.equal(
        torch.cat([b.targets for b in batches]), torch.tensor(np.concatenate([i[1:][t[1:]] for i, t in ordered]))
    )
    for batch in batches:
        assert torch.equal(batch.ids.flatten()[batch.places + 1], batch.targets) and bool((batch.targets > 0).all())
    large = pad_together(rows, vocabulary=2**22, device=CPU)
    assert [len(batch.ids) for batch in large] == [2, 1, 1, 1, 1, 1]  # of 16 tokens, or a row
