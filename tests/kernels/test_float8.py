"""Products in e4m3, emulated on the CPU: as exact as their rounding, the same however the codes are held."""

import pytest
import torch

from qlora_cli.kernels import float8, joined, linear
from qlora_cli.kernels.weights import FrozenWeight
from tests.kernels.test_linear import quantise, relative

OPTIONS = linear.LinearOptions(0.5)
ROUNDING = 0.027  # of a value to e4m3, in the mean square, as a share of it


def run(weight, x, a, b, grad, options=OPTIONS, compiled=False):
    leaves = [t.detach().clone().requires_grad_() for t in (x, a, b)]

    def op():
        return linear.qlora_linear(leaves[0], weight, None, *leaves[1:], a, b, None, options)

    y = torch.compile(op, backend="aot_eager", fullgraph=True)() if compiled else op()
    y.backward(grad)
    return y.detach(), *(leaf.grad for leaf in leaves)


@pytest.fixture(scope="module")
def case():
    torch.manual_seed(0)
    weight, dense = quantise((192, 128))
    x, grad = torch.randn(40, 128), torch.randn(40, 192)
    x[:, 5] *= 100  # an outlying channel
    x[7], grad[9] = 0, 0
    return weight, dense, x, torch.randn(4, 128), torch.randn(192, 4), grad


def test_error_is_that_of_rounding_both_factors(case):
    weight, dense, x, a, b, grad = case
    y, x_, a_, b_ = run(float8.with_codes(weight, resident=False), x, a, b, grad)
    exact = [t.double() for t in (x, dense, a, b, grad)]
    x64, w64, a64, b64, g64 = exact
    assert relative(y, x64 @ w64.t() + 0.5 * x64 @ a64.t() @ b64.t()) < 1.6 * ROUNDING
    assert relative(x_, g64 @ w64 + 0.5 * g64 @ b64 @ a64) < 1.6 * ROUNDING
    # Adapters' gradients do not pass through products in 8 bits.
    assert relative(a_, 0.5 * (g64 @ b64).t() @ x64) < 1e-6 and relative(b_, 0.5 * g64.t() @ (x64 @ a64.t())) < 1e-6


@pytest.mark.parametrize("way", ["resident", "sliced", "compiled"])
def test_codes_give_the_same_numbers_however_they_are_held(case, way):
    weight, _, *inputs = case
    plain = run(float8.with_codes(weight, resident=False), *inputs)
    options = linear.LinearOptions(0.5, 128 * 128) if way == "sliced" else OPTIONS
    other = run(float8.with_codes(weight, resident=way == "resident"), *inputs, options, way == "compiled")
    for found, expected in zip(other, plain, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-4 if way == "sliced" else 0)


@pytest.mark.parametrize("workspace_bytes", [None, 128 * 128])
def test_a_bias_joins_before_the_product_is_rounded(case, workspace_bytes):
    """In bf16, whose rounding the two ways differ by; also where codes are made of some rows at a time."""
    weight, _, x, *_ = case
    bias = torch.linspace(-3, 3, 192).bfloat16()
    scaled, exact, out = (
        float8.with_codes(weight, resident=False),
        torch.empty(40, 192),
        torch.empty(40, 192).bfloat16(),
    )
    float8.multiply(x.bfloat16(), scaled, exact, None)
    float8.multiply(x.bfloat16(), scaled, out, workspace_bytes, bias=bias)
    torch.testing.assert_close(out, (exact + bias).bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize(("rows", "refuses"), [(5, "bias"), (5, "few rows"), (600, "bias"), (5, "nothing")])
@pytest.mark.parametrize("apart", [False, True])
def test_a_product_that_the_library_refuses_is_made_of_others(rows, refuses, apart, monkeypatch):
    """Once tried, it is not tried again; what runs out of memory, or is refused for ever, is raised."""
    torch.manual_seed(0)
    calls, bias = [], torch.randn(32)

    def library(left, right, scale_a, scale_b, bias, out_dtype, use_fast_accum, out=None):
        calls.append((len(left), bias is not None))
        if (refuses == "bias" and bias is not None) or (refuses == "few rows" and len(left) < 300):
            raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED")
        found = (left.float() @ right.float()) * scale_a * scale_b + (0 if bias is None else bias)
        return found if out is None else out.copy_(found)

    monkeypatch.setattr(torch, "_scaled_mm", library)
    monkeypatch.setattr(float8, "_REFUSED", set())
    (left, left_scale), (right, right_scale) = (float8.quantise_rows(torch.randn(n, 64)) for n in (rows, 32))
    given = left, left_scale, right, right_scale.squeeze(1)
    out, expected = torch.full((rows, 64), torch.nan)[:, ::2] if apart else torch.empty(rows, 32), torch.empty(rows, 32)
    float8.scaled_product(*given, expected, bias)
    for _ in range(2):
        torch.testing.assert_close(float8._library_product(*given, bias, out, fast=True), expected)
    whole, many = (rows, True), (float8.MANY_ROWS, False)
    tried = {"bias": [whole, (rows, False), (rows, False)], "few rows": [whole, (rows, False), many, many]}
    assert calls == tried.get(refuses, [whole, whole])

    def raising(*_, **__):
        raise (torch.OutOfMemoryError if rows == 5 else RuntimeError)("not today")

    monkeypatch.setattr(torch, "_scaled_mm", raising)
    monkeypatch.setattr(float8, "_REFUSED", set())
    with pytest.raises(RuntimeError, match="not today"):
        float8._library_product(*given, bias, out, fast=True)


def test_joined_layers_give_what_each_gives_and_the_sum_of_their_gradients():
    """Of unlike widths, ranks and sizes of gradients; adapters' gradients have no rounding."""
    torch.manual_seed(0)
    rows, ranks = (192, 64, 32), (4, 3, 4)
    given = [quantise((n, 128)) for n in rows]
    whole, parts = float8.join([float8.with_codes(weight, resident=True) for weight, _ in given])
    grads = [torch.randn(40, n) * 10.0**-i for i, n in enumerate(rows)]
    leaves = [torch.randn(40, 128), *(torch.randn(r, 128) for r in ranks)]
    leaves += [torch.randn(n, r) for n, r in zip(rows, ranks, strict=True)]

    def op(x, *factors):
        projected = linear.project_shared(x, list(factors[:3]), 0.5)
        return joined.joined_linears(x, whole, projected, factors[3:], [each.detach() for each in factors[3:]])

    def formula(x, *factors):
        layers = zip(given, factors[:3], factors[3:], strict=True)
        return [x @ dense.double().t() + 0.5 * x @ a.t() @ b.t() for (_, dense), a, b in layers]

    def run(function, leaves, grads):
        found = function(*leaves)
        return *found, *torch.autograd.grad(found, leaves, grads)

    found = run(torch.compile(op, backend="aot_eager", fullgraph=True), [t.requires_grad_() for t in leaves], grads)
    exact = run(formula, [t.detach().double().requires_grad_() for t in leaves], [grad.double() for grad in grads])
    for got, truth, most in zip(found, exact, [1.6 * ROUNDING] * 4 + [1e-6] * 6, strict=True):
        assert relative(got, truth) < most
    apart = [float8.multiply_transposed(grad, part, None) for grad, part in zip(grads, parts, strict=True)]
    assert (
        relative(sum(apart), sum(g.double() @ w[1].double() for g, w in zip(grads, given, strict=True)))
        < 1.6 * ROUNDING
    )


def test_a_row_that_is_not_finite_spoils_its_own_alone(case):
    weight, _, x, *_ = case
    x, y = x.clone(), torch.empty(40, 192)
    x[3, 4] = float("nan")
    x[8, 1] = float("inf")
    float8.multiply(x, float8.with_codes(weight, resident=False), y, None)
    assert (~y.isfinite().all(1)).nonzero().flatten().tolist() == [3, 8]


def test_rows_of_any_size_are_rounded_alike():
    x = torch.randn(1, 64) * torch.logspace(-30, 30, 61)[:, None]
    codes, scale = float8.quantise_rows(x)
    assert ((codes.double() * scale - x.double()).norm(dim=1) < 0.04 * x.double().norm(dim=1)).all()


def test_weights_of_other_sides_are_left_out():
    for shape, taken in (((48, 64), True), ((40, 64), False), ((48, 72), False)):
        assert float8.covers(quantise(shape)[0]) == taken
    assert not float8.covers(FrozenWeight(64, 64, dense=torch.ones(64, 64)))


@pytest.mark.parametrize("nested", [True, False])
def test_a_stack_has_the_scale_of_each_matrix(nested):
    weight, dense = quantise((4 * 80, 256), nested=nested)
    assert torch.equal(float8.with_stack_scale(weight, 4).stack_scale, dense.view(4, -1).abs().amax(1) / 448)
    assert float8.with_stack_scale(weight, 4).plain().stack_scale is None
    nothing = weight._replace(code=torch.zeros_like(weight.code))
    assert float8.with_stack_scale(nothing, 4).stack_scale.tolist() == [1.0] * 4


def test_stacks_of_other_sides_are_left_out():
    weight = quantise((192, 64))[0]
    assert float8.covers_stack(weight, 4) and float8.covers_stack(weight, 12)
    assert not float8.covers_stack(weight, 5) and not float8.covers_stack(weight, 24)  # of 8 rows
    assert float8.covers_stack(quantise((48, 80))[0], 3) and not float8.covers_stack(quantise((64, 72))[0], 4)


@pytest.mark.slow
def test_layers_with_one_input_quantise_it_once(case):
    """The compiler finds that they are given the same tensor."""
    weight, _, x, a, b, _ = case
    scaled, calls = float8.with_codes(weight, resident=False), []

    def count(graph, _):
        calls.extend(node for node in graph.graph.nodes if "quantise_rows" in str(node.target))
        return graph

    def op(x):
        first, second = (linear.qlora_linear(x, scaled, None, a, b, *values, None, OPTIONS) for _ in range(2))
        return first * second

    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition  # inductor's

    values = a, b
    a, b = (t.clone().requires_grad_() for t in values)
    backend = aot_autograd(
        fw_compiler=count,
        bw_compiler=lambda graph, _: graph,
        partition_fn=min_cut_rematerialization_partition,
    )
    torch.compile(op, backend=backend, fullgraph=True)(x.clone().requires_grad_()).sum().backward()
    assert len(calls) == 1
