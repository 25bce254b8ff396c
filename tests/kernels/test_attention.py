"""Packed attention equals attention over each row alone."""

from itertools import accumulate

import pytest
import torch

from qlora_cli.kernels.attention import equal_rows_attention, packed_attention
from tests.kernels import reference


def inputs(lengths, heads, key_heads, size, device, dtype):
    torch.manual_seed(0)
    tokens = sum(lengths)
    tensors = [
        torch.randn(tokens, h, size, device=device, dtype=dtype, requires_grad=True)
        for h in (heads, key_heads, key_heads)
    ]
    return tensors, [0, *accumulate(lengths)]


def check(lengths, window, heads, key_heads, size, device, dtype, attend=packed_attention):
    tensors, boundaries = inputs(lengths, heads, key_heads, size, device, dtype)
    cu_seqlens = torch.tensor(boundaries, dtype=torch.int32, device=device)
    out = attend(*tensors, cu_seqlens, max(lengths), 0.3, window)
    grad = torch.randn_like(out)
    got = (out, *torch.autograd.grad(out, tensors, grad))

    def formula(kind):
        leaves = [t.detach().to(kind).requires_grad_() for t in tensors]
        result = reference.packed_attention(*leaves, boundaries, 0.3, window)
        return (result, *torch.autograd.grad(result, leaves, grad.to(kind)))

    for ours, eager, exact in zip(got, formula(dtype), formula(torch.float64), strict=True):
        scale = exact.norm()
        assert (ours.double() - exact).norm() / scale <= 2 * (eager.double() - exact).norm() / scale + 1e-6


@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("window", [None, 4])
def test_matches_float64_on_the_cpu(heads, key_heads, window):
    check((7, 1, 12), window, heads, key_heads, 8, "cpu", torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [(100, 1, 300, 37), (256, 256), (512, 0, 0)])
@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize(("heads", "key_heads", "size"), [(8, 8, 64), (8, 8, 96), (8, 2, 128), (4, 1, 256)])
def test_matches_float64_on_the_gpu(lengths, window, heads, key_heads, size):
    check(lengths, window, heads, key_heads, size, "cuda", torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [(40, 1, 0, 33), (100, 64, 128, 0)])
@pytest.mark.parametrize("size", [24, 64, 96, 128])
def test_short_rows_match_float64_on_the_gpu(lengths, size):
    check(lengths, None, 8, 8, size, "cuda", torch.bfloat16)
    check(lengths, 128, 8, 8, size, "cuda", torch.float16)


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [(256, 256, 256), (512,)])
@pytest.mark.parametrize("size", [64, 96, 128])
def test_rows_of_one_length_match_float64_on_the_gpu(lengths, size):
    def attend(query, key, value, cu_seqlens, longest, scale, window):
        return equal_rows_attention(query, key, value, len(lengths), scale)

    check(lengths, None, 4, 4, size, "cuda", torch.bfloat16, attend)


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [(100, 1, 300, 37), (256, 256), (100, 28)])
def test_the_compiler_is_told_the_truth_on_the_gpu(lengths):
    (query, key, value), boundaries = inputs(lengths, 4, 2, 64, "cuda", torch.bfloat16)
    cu_seqlens = torch.tensor(boundaries, dtype=torch.int32, device="cuda")
    arguments = (query, key, value, cu_seqlens, max(lengths), 0.3, None)
    torch.library.opcheck(torch.ops.qlora.packed_attention.default, arguments)
