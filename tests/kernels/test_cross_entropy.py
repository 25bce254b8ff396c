"""The chunked loss equals the plain one and never holds all the logits."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_cli.kernels.cross_entropy import chunk_tokens, linear_cross_entropy
from tests.kernels import reference

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("scale", "softcap", "biased"), [(1.0, None, False), (0.25, None, True), (1.0, 5.0, True)])
def test_error_against_float64_is_within_twice_eager_own(scale, softcap, biased, dtype, device):
    torch.manual_seed(0)
    hidden = torch.randn(37, 32, device=device, dtype=dtype, requires_grad=True)
    weight = torch.randn(301, 32, device=device, dtype=dtype) * 0.4
    bias = torch.randn(301, device=device, dtype=dtype) if biased else None
    targets = torch.randint(301, (37,), device=device)
    loss = linear_cross_entropy(hidden, weight, bias, targets, logit_scale=scale, softcap=softcap, chunk=8)
    (gradient,) = torch.autograd.grad(loss * 0.5, hidden)

    def formula(kind):
        leaf = hidden.detach().to(kind).requires_grad_()
        value = reference.linear_cross_entropy(
            leaf, weight.to(kind), None if bias is None else bias.to(kind), targets, scale, softcap
        )
        return value, *torch.autograd.grad(value * 0.5, leaf)

    assert loss.dtype == torch.float32
    for ours, eager, exact in zip((loss, gradient), formula(dtype), formula(torch.float64), strict=True):
        scale_ = exact.norm()
        assert (ours.double() - exact).norm() / scale_ <= 2 * (eager.double() - exact).norm() / scale_ + 1e-6


def test_never_more_than_a_chunk_of_logits():
    largest = 0

    class RankMonitor(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            nonlocal largest
            result = function(*arguments, **(keywords or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel())
            return result

    hidden, weight = torch.randn(64, 4, requires_grad=True), torch.randn(500, 4)
    with RankMonitor():
        linear_cross_entropy(hidden, weight, None, torch.zeros(64, dtype=torch.int64), chunk=8).backward()
    assert largest <= 8 * 500


def test_chunks_are_whole_tiles_and_never_empty():
    assert chunk_tokens(32000, 2) == 1024
    assert chunk_tokens(10**9, 4) == chunk_tokens(10**9, 4, wide=True) == 256
    assert chunk_tokens(128256, 2) == 256 and chunk_tokens(128256, 2, wide=True) == 2048
