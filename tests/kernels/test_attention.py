"""Packed attention, with sinks and without, equals attention over each row alone."""

from functools import partial
from itertools import accumulate, pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from qlora_cli.kernels import attention
from qlora_cli.kernels.attention import equal_rows_attention, packed_attention
from qlora_cli.kernels.sink_attention import chunked_attention
from tests.engine import cpu_attention  # noqa: F401  (the op on the CPU)
from tests.kernels import reference


def inputs(lengths, heads, key_heads, size, device, dtype, sinks=False):
    torch.manual_seed(0)
    tokens = sum(lengths)
    tensors = [
        torch.randn(tokens, h, size, device=device, dtype=dtype, requires_grad=True)
        for h in (heads, key_heads, key_heads)
    ]
    if sinks:  # from next to nothing to nearly all of a short row's weight
        tensors.append(torch.linspace(-4, 4, heads, device=device, dtype=dtype).requires_grad_())
    return tensors, [0, *accumulate(lengths)]


def check(lengths, window, heads, key_heads, size, device, dtype, attend=packed_attention, sinks=False, cap=None):
    tensors, boundaries = inputs(lengths, heads, key_heads, size, device, dtype, sinks)
    cu_seqlens = torch.tensor(boundaries, dtype=torch.int32, device=device)
    out = attend(*tensors[:3], cu_seqlens, max(lengths), 0.3, window, tensors[3] if sinks else None, cap)
    grad = torch.randn_like(out)
    got = (out, *torch.autograd.grad(out, tensors, grad))

    def formula(kind):
        leaves = [t.detach().to(kind).requires_grad_() for t in tensors]
        result = reference.packed_attention(*leaves[:3], boundaries, 0.3, window, leaves[3] if sinks else None, cap)
        return (result, *torch.autograd.grad(result, leaves, grad.to(kind)))

    for ours, eager, exact in zip(got, formula(dtype), formula(torch.float64), strict=True):
        scale = exact.norm()
        assert (ours.double() - exact).norm() / scale <= 2 * (eager.double() - exact).norm() / scale + 1e-6


@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("window", [None, 4])
def test_matches_float64_on_the_cpu(heads, key_heads, window):
    check((7, 1, 12), window, heads, key_heads, 8, "cpu", torch.float32)


def opaque(query, key, value, boundaries, longest, scale, window, sinks, cap):
    """The op as a card runs it: sinks are brought in afterwards, by the log-sum-exp."""
    given = query, key, value, sinks, boundaries, longest, scale, window, cap, False
    return torch.ops.qlora.packed_attention(*given)[0]


def in_chunks(chunk_bytes, masked):
    def attend(query, key, value, boundaries, longest, scale, window, sinks, cap):
        """Two padded rows, or each of a pack's rows alone; the mask is booleans and for one head or all."""
        rows = []
        for number, (start, end) in enumerate(pairwise(boundaries.tolist())):
            q, k, v = (t[None, start:end].transpose(1, 2) for t in (query, key, value))
            mask = None
            if masked:
                mask = torch.ones(end - start, end - start, dtype=torch.bool).tril()
                mask = (mask if window is None else mask.triu(1 - window)).expand(1, query.shape[1] ** number, -1, -1)
                mask = mask if number != 1 else torch.where(mask, 0.0, float("-inf"))
            settings = {"scale": scale, "mask": mask, "window": window, "cap": cap, "chunk_bytes": chunk_bytes}
            rows.append(chunked_attention(q, k, v, sinks, **settings)[0].transpose(0, 1))
        return torch.cat(rows)

    return attend


@pytest.mark.each_choice
@pytest.mark.parametrize(
    "attend", [packed_attention, opaque, in_chunks(1, False), in_chunks(4 * 4 * 12 * 5, False), in_chunks(800, True)]
)
@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("window", [None, 4])
def test_sinks_and_caps_match_float64_on_the_cpu(heads, key_heads, window, attend):
    lengths = (7, 12) if getattr(attend, "__name__", "") == "attend" else (7, 1, 12)
    for sinks, cap in ((True, None), (False, 1.5), (True, 1.5)):
        check(lengths, window, heads, key_heads, 8, "cpu", torch.float32, attend, sinks, cap)


def test_queries_behind_keys_and_queries_that_see_nothing():
    """The last 3 of 9 positions; a mask of padding leaves a query nothing but the sink."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 4, n, 8, dtype=torch.float64) for n in (9, 9, 9))
    sinks = torch.randn(4, dtype=torch.float64)
    whole = chunked_attention(query, key, value, sinks, scale=0.3, window=5)
    last = chunked_attention(query[:, :, 6:], key, value, sinks, scale=0.3, window=5, chunk_bytes=1)
    assert torch.allclose(last, whole[:, :, 6:])
    mask = torch.zeros(2, 1, 9, 9, dtype=torch.bool)
    mask[1] = True
    query.requires_grad_()
    out = chunked_attention(query, key, value, sinks, scale=0.3, mask=mask)
    out.sum().backward()
    assert torch.equal(out[0], torch.zeros_like(out[0])) and not query.grad.isnan().any()
    assert out[1].abs().sum() > 0


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [(100, 1, 300, 37), (60, 0, 128)])
@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize(("heads", "key_heads", "size"), [(8, 8, 64), (64, 8, 64), (8, 2, 128)])
def test_sinks_and_caps_match_float64_on_the_gpu(lengths, window, heads, key_heads, size):
    for attend in (packed_attention, in_chunks(2**16, False)):
        for sinks, cap in ((True, None), (False, 4.0), (True, 4.0)):
            check(lengths, window, heads, key_heads, size, "cuda", torch.bfloat16, attend, sinks, cap)


@pytest.mark.gpu
def test_sinks_grow_memory_with_the_tokens_not_their_square_on_the_gpu():
    peaks = []
    for tokens in (2048, 4096):
        tensors, _ = inputs((tokens,), 64, 8, 64, "cuda", torch.bfloat16, sinks=True)
        query, key, value = (t[None].transpose(1, 2) for t in tensors[:3])
        for attend in (
            lambda t=tensors, n=tokens: packed_attention(
                *t[:3], torch.tensor([0, n], dtype=torch.int32, device="cuda"), n, 0.1, None, t[3]
            ),
            lambda q=query, k=key, v=value, t=tensors: chunked_attention(q, k, v, t[3], scale=0.1),
        ):
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            attend().sum().backward()
            peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[2] < 2.2 * peaks[0] and peaks[3] < 2.2 * peaks[1]
    assert max(peaks[:2]) < 2048**2 * 64 * 2  # less than the scores alone, in 16 bits


def groups_of_plain_attention(monkeypatch, seen=None):
    """Has `equal_rows_attention` go in groups of heads, each by float64's own attention, which notes its gradient's strides."""

    def attend(query, key, value, rows, scale):
        q, k, v = (t.unflatten(0, (rows, -1)).transpose(1, 2) for t in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        if seen is not None:
            out.register_hook(lambda gradient: seen.append(gradient.transpose(1, 2).stride()))
        return out.transpose(1, 2).reshape(query.shape)

    monkeypatch.setattr(attention, "_cudnn_attention", attend)
    monkeypatch.setattr(attention, "LONG_ROW_TOKENS", 16)


def both_passes_of_equal_rows(heads, key_heads, attend=None):
    generator = torch.Generator().manual_seed(0)
    shapes = [(40, count, 8) for count in (heads, key_heads, key_heads, heads)]
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    given = [t.requires_grad_() for t in drawn[:3]]
    out = (attend or equal_rows_attention)(*given, 2, 0.3)
    return [out, *torch.autograd.grad(out, given, drawn[3])]


@pytest.mark.parametrize(("heads", "key_heads"), [(8, 4), (8, 8), (6, 3), (4, 2)])
def test_heads_of_long_rows_go_in_groups_whose_gradients_lie_alike_whatever_other_heads_there_are(
    heads, key_heads, monkeypatch
):
    """Plans of cuDNN's backward passes are kept by all strides but the gradient's: it has to lie the same way each time."""
    seen = []
    groups_of_plain_attention(monkeypatch, seen)
    in_groups = both_passes_of_equal_rows(heads, key_heads)
    assert seen == [(20 * (heads // key_heads) * 8, heads // key_heads * 8, 8, 1)] * key_heads
    monkeypatch.setattr(attention, "LONG_ROW_TOKENS", 64)
    for found, own in zip(in_groups, both_passes_of_equal_rows(heads, key_heads), strict=True):
        assert torch.allclose(found, own, atol=1e-12, rtol=0)


def test_groups_of_heads_compile_whole(monkeypatch):
    groups_of_plain_attention(monkeypatch)
    compiled = torch.compile(equal_rows_attention, backend="aot_eager", fullgraph=True)
    for found, own in zip(both_passes_of_equal_rows(8, 4, compiled), both_passes_of_equal_rows(8, 4), strict=True):
        assert torch.equal(found, own)


def test_sinks_follow_cudnns_attention_through_its_log_sums(monkeypatch):
    """cuDNN's two passes in float64, (rows, heads, length, size): what they are given with sinks gives attention with sinks."""

    def scores(query, key, scale):
        masked = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool).triu(1)
        grouped = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        return (query @ grouped.transpose(2, 3) * scale).masked_fill(masked, float("-inf"))

    def forward(query, key, value, bias, sums, dropout, causal, mask, *, scale):
        assert bias is None and sums and dropout == 0 and causal and not mask
        found = scores(query, key, scale)
        spread = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
        out = torch.empty_like(query)  # laid out as the query is
        return out.copy_(found.softmax(-1) @ spread), found.logsumexp(-1, keepdim=True)

    def backward(grad, query, key, value, out, sums, *rest, scale):
        assert (
            sums.shape == (*query.shape[:3], 1)
            and sums.is_contiguous()
            and rest[2:] == (None,) * 3 + (12, 12, 0.0, True)
        )
        spread = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
        weights = (scores(query, key, scale) - sums).exp()
        slopes = weights * (grad @ spread.transpose(2, 3) - (grad * out).sum(-1, keepdim=True)) * scale
        grouped = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        of_key, of_value = slopes.transpose(2, 3) @ query, weights.transpose(2, 3) @ grad
        both = (t.unflatten(1, (key.shape[1], -1)).sum(2) for t in (of_key, of_value))
        return (slopes @ grouped, *both)

    names = {"": forward, "_backward": backward}
    ops = SimpleNamespace(**{f"_scaled_dot_product_cudnn_attention{name}": op for name, op in names.items()})
    monkeypatch.setattr(attention, "_aten", ops)
    tensors, boundaries = inputs((12, 12, 12), 4, 2, 8, "cpu", torch.float64, sinks=True)
    grad = torch.randn(36, 4, 8, dtype=torch.float64)
    with torch.no_grad():
        out, lse = attention._cudnn(*tensors[:3], 12, 0.3)
        sums = attention.add_sinks(out, lse, tensors[3])
        found = out, *attention._cudnn_backward((grad, *tensors[:3], out, sums), 12, 0.3)
    exact = reference.packed_attention(*tensors[:3], boundaries, 0.3, None, tensors[3], None)
    for ours, right in zip(found, (exact, *torch.autograd.grad(exact, tensors[:3], grad)), strict=True):
        assert ours.is_contiguous() and torch.allclose(ours, right, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("kernel", "longest", "given"),
    [
        ("short", 100, {}),
        ("block", 200, {}),
        ("block", 512, {"size": 96, "equal_rows": True}),
        ("block", 4096, {"window": 512}),
        ("block", 4096, {"cap": 50.0, "size": 256}),
        ("flash", 513, {}),
        ("flash", 200, {"size": 256}),
        ("flash", 200, {"of_values": 32}),
        ("flash", 4096, {"window": 513, "equal_rows": True}),
        ("cudnn", 513, {"equal_rows": True}),
        ("cudnn", 4096, {"window": 4096, "equal_rows": True}),
        ("flash", 16_385, {"equal_rows": True}),
        ("capped", 4096, {"cap": 50.0, "size": 512}),
    ],
)
def test_rows_go_to_the_kernel_made_for_them_in_both_passes(kernel, longest, given, monkeypatch):
    pytest.importorskip("triton")

    class Taken(Exception):
        pass

    def take(name):
        def run(*_):
            raise Taken(name)

        return run

    for name in ("", "_backward"):
        monkeypatch.setattr(attention.short_attention, f"attend{name}", take("short"))
        monkeypatch.setattr(attention.block_attention, f"attend{name}", take("block"))
        monkeypatch.setattr(attention, f"_cudnn{name}", take("cudnn"))
        monkeypatch.setattr(attention, f"_flash{name}", take("flash"))
    size = given.get("size", 64)
    query, key, value = (torch.empty(4, n, s) for n, s in ((4, size), (4, size), (4, given.get("of_values", size))))
    limits = longest, 0.3, given.get("window"), given.get("cap"), given.get("equal_rows", False)
    boundaries = torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(ValueError if kernel == "capped" else Taken, match=kernel[:3]):
        attention._attention_op._init_fn(query, key, value, None, boundaries, *limits)
    if kernel != "capped":
        with pytest.raises(Taken, match=kernel):
            attention._attention_backward_op._init_fn(
                query, query, key, value, query, torch.empty(16), boundaries, *limits
            )


@pytest.mark.gpu
def test_gradients_of_some_heads_are_those_that_they_have_among_more_on_the_gpu():
    """In one process, as where a card has all heads of a row at first and shares them afterwards."""
    tokens = attention.LONG_ROW_TOKENS + 128
    shapes = [(tokens, count, 128) for count in (16, 4, 4, 16)]
    drawn = [torch.randn(shape, dtype=torch.bfloat16, device="cuda") for shape in shapes]

    def gradients(heads, key_heads):
        shares = (heads, key_heads, key_heads, heads)
        query, key, value, weights = (t[:, :n].contiguous() for t, n in zip(drawn, shares, strict=True))
        given = [t.requires_grad_() for t in (query, key, value)]
        out = equal_rows_attention(*given, 1, 0.1)
        return torch.autograd.grad(out, given, weights)

    for found, own in zip(gradients(8, 2), gradients(16, 4), strict=True):
        own = own[:, : found.shape[1]].float()
        assert (found.float() - own).norm() <= 0.01 * own.norm()


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
@pytest.mark.parametrize(("key_heads", "size"), [(4, 64), (4, 96), (4, 128), (1, 64), (2, 128)])
def test_rows_of_one_length_match_float64_on_the_gpu(lengths, key_heads, size):
    def attend(query, key, value, cu_seqlens, longest, scale, *rest):
        return equal_rows_attention(query, key, value, len(lengths), scale)

    check(lengths, None, 4, key_heads, size, "cuda", torch.bfloat16, attend)


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [(600, 600), (1024,)])
@pytest.mark.parametrize("window", [None, 2048])
@pytest.mark.parametrize(("heads", "key_heads", "size"), [(64, 8, 64), (8, 2, 128), (4, 4, 96)])
def test_rows_of_one_length_with_sinks_match_float64_by_cudnn_on_the_gpu(lengths, window, heads, key_heads, size):
    assert attention.sinks_fit(heads, key_heads, size, torch.bfloat16, torch.device("cuda"))
    attend = partial(packed_attention, equal_rows=True)
    check(lengths, window, heads, key_heads, size, "cuda", torch.bfloat16, attend, sinks=True)


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [(100, 1, 300, 37), (256, 256), (100, 28)])
def test_the_compiler_is_told_the_truth_on_the_gpu(lengths):
    (query, key, value, sinks), boundaries = inputs(lengths, 4, 2, 64, "cuda", torch.bfloat16, sinks=True)
    cu_seqlens = torch.tensor(boundaries, dtype=torch.int32, device="cuda")
    for given in (None, sinks):
        arguments = (query, key, value, given, cu_seqlens, max(lengths), 0.3, None, None, False)
        torch.library.opcheck(torch.ops.qlora.packed_attention.default, arguments)
