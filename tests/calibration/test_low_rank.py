"""The answer of low rank to an error is the weighted SVD's, whichever second moment was gathered, and nothing past its rank."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from qlora_cli.core.calibration.activation_stream import ActivationStream
from qlora_cli.core.calibration.low_rank import DAMPING, SecondMoment, answer_error


def make_case(rows: int, columns: int, tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """An error (rows, columns) and inputs (tokens, columns) whose directions differ in size."""
    generator = torch.Generator().manual_seed(seed)
    error = 0.01 * torch.randn(rows, columns, generator=generator)
    mixing = torch.randn(columns, columns, generator=generator) / torch.arange(1, columns + 1) ** 0.5
    return error, torch.randn(tokens, columns, generator=generator) @ mixing


def gather(error: torch.Tensor, x: torch.Tensor, kind: str) -> SecondMoment:
    moment = SecondMoment()
    for part in x.split(37):
        if kind == "inputs":
            moment.add_inputs(part)
        else:
            moment.add_errors(part, error)
    return moment


def weighted_residual(residual: torch.Tensor, x: torch.Tensor) -> float:
    """Squared error of the output over the inputs, damped as the answer is."""
    c = (x.T @ x).double() / len(x)
    c = c / c.diagonal().mean() + DAMPING * torch.eye(len(c), dtype=torch.float64)
    return float((residual.double() @ c * residual.double()).sum())


@given(
    rows=st.integers(3, 40),
    columns=st.integers(3, 40),
    rank=st.integers(1, 12),
    seed=st.integers(0, 99),
    kind=st.sampled_from(["inputs", "errors"]),
)
def test_no_product_of_its_rank_is_nearer_where_the_inputs_look(rows, columns, rank, seed, kind):
    error, x = make_case(rows, columns, 80, seed)
    a, b = answer_error(error, gather(error, x, kind), rank, 2.0)
    c = (x.T @ x).double() / len(x)
    c = c / c.diagonal().mean() + DAMPING * torch.eye(columns, dtype=torch.float64)
    root = torch.linalg.cholesky(c)
    singular = torch.linalg.svdvals(error.double() @ root)
    best = float(singular[rank:].square().sum())
    whole = float(singular.square().sum())
    assert weighted_residual(error - 2.0 * b @ a, x) <= best + 1e-3 * whole
    assert a.shape == (min(rank, rows, columns), columns) and b.shape == (rows, len(a))


@pytest.mark.parametrize("kind", ["inputs", "errors"])
def test_enough_rank_answers_all_of_the_error(kind):
    error, x = make_case(12, 20, 100, 3)
    a, b = answer_error(error, gather(error, x, kind), 16, 0.5)
    torch.testing.assert_close(0.5 * b @ a, error, rtol=1e-3, atol=1e-6)


def test_both_moments_give_one_answer_on_a_wide_layer():
    error, x = make_case(24, 300, 500, 5)
    products = []
    for kind in ("inputs", "errors"):
        a, b = answer_error(error, gather(error, x, kind), 4, 1.0)
        products.append(b @ a)
    torch.testing.assert_close(products[0], products[1], rtol=1e-2, atol=1e-4)


def test_an_error_of_zero_leaves_nothing_to_set():
    a, b = answer_error(torch.zeros(8, 8), SecondMoment(), 4, 1.0)
    assert len(a) == 0 and b.shape == (8, 0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_moments_of_16_bit_inputs_on_a_card_are_those_of_float64(dtype):
    x = torch.randn(3000, 192, device="cuda").to(dtype)
    moment = SecondMoment()
    for part in x.split(1000):
        moment.add_inputs(part)
    exact = x.double().T @ x.double()
    assert moment.inputs.dtype == torch.float32
    assert float((moment.inputs.double() - exact).norm() / exact.norm()) < 1e-6


@pytest.mark.gpu
def test_hidden_states_that_stay_on_a_card_are_those_that_lie_on_the_host():
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)).eval().cuda()
    batches = [torch.randint(64, (2, 24)) for _ in range(2)]
    staying, away = (ActivationStream(model, batches, may_stay=may) for may in (True, False))
    for stream in (staying, away):
        for _ in stream.layers:
            stream.advance()
    assert all(torch.equal(staying.logits(i), away.logits(i)) for i in range(2))
