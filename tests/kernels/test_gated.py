"""The fused gate computes what its formula says, forward and backward, on every device and compiled."""

import pytest
import torch

from qlora_cli.kernels import gated
from tests.kernels.test_linear import DEVICES, relative


@pytest.mark.each_choice
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", gated.GATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_against_float64_is_within_twice_eager_own(dtype, kind, device):
    torch.manual_seed(0)
    tokens, size, rank = 2 * 21, 200, 8
    inputs = [torch.randn(2, 21, size) for _ in range(2)] + [torch.randn(tokens, 2 * rank)]
    inputs = [t.to(dtype).to(device).requires_grad_() for t in inputs]
    inputs += [torch.randn(size, rank, device=device).requires_grad_() for _ in range(2)]
    grad = torch.randn(2, 21, size, device=device).to(dtype)

    def formula(gate, up, projected, gate_b, up_b):
        parts = [p @ b.t() for p, b in zip(projected.split(rank, dim=1), (gate_b, up_b), strict=True)]
        return gated.activate(gate + parts[0].view_as(gate), kind) * (up + parts[1].view_as(up))

    def op(gate, up, projected, *b):
        lora_b = tuple(t.detach().to(dtype) for t in b)
        return gated.gated_product(gate, up, projected.split(rank, dim=1), b, lora_b, kind)

    def results(function, kind_of_number):
        leaves = [t.detach().to(kind_of_number or t.dtype).requires_grad_() for t in inputs]
        out = function(*leaves)
        return out, *torch.autograd.grad(out, leaves, grad.to(out.dtype))

    found = results(torch.compile(op, backend="aot_eager", fullgraph=True), None)
    assert [t.dtype for t in found[1:]] == [t.dtype for t in inputs]
    for got, eager, exact in zip(found, results(formula, dtype), results(formula, torch.float64), strict=True):
        assert relative(got, exact) <= 2 * relative(eager, exact) + 1e-7
