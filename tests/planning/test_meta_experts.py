"""Fused experts on the meta device keep and allocate what the real ops do."""

from functools import partial
from itertools import product

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime import JITFunction

from qlora_cli.core.experts.four_bit_experts import ExpertLora
from qlora_cli.core.experts.fused_experts import FusedExperts, fuse_experts
from qlora_cli.core.planning.meta_experts import ExpertNotes, ExpertValues, TracedExperts
from qlora_cli.core.planning.meta_ops import LiveBytes, Sink, Source
from qlora_cli.kernels.experts import grouped, layer
from qlora_cli.kernels.weights import FrozenWeight
from tests.experts.expert_modules import make_experts, pack

TOKENS, CHOICES, RANK = 4096, 2, 8
BODIES = {
    "experts_route": layer._route_op,
    "experts_up": layer._up_op,
    "experts_up_backward": layer._up_backward_op,
    "experts_down": layer._down_op,
    "experts_down_backward": layer._down_backward_op,
}


class BytesInside(LiveBytes):
    """Counts what ops of experts allocate inside as well."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        body = BODIES.get(func._opname) if func.namespace == "qlora" else None
        if body is None:
            return super().__torch_dispatch__(func, types, args, kwargs)
        with self:
            return body._init_fn(*args, **(kwargs or {}))


@pytest.fixture
def live(monkeypatch):
    """What counts the real ops: their kernels do nothing, and values are scratch memory while rows are multiplied."""
    found = BytesInside()
    values = torch.empty(1, dtype=torch.bfloat16, device="meta")
    monkeypatch.setattr(JITFunction, "__getitem__", lambda *_: lambda *_, **__: None)
    monkeypatch.setattr(FrozenWeight, "values", lambda w, _, start, end: values.expand((end - start) * w.columns))
    monkeypatch.setattr(
        grouped.dense,
        "multiply_dense",
        lambda _, matrices, *__, **___: found.mark(ExpertValues(2 * matrices.numel())),
    )
    code = torch.empty(1, dtype=torch.float8_e4m3fn, device="meta")
    monkeypatch.setattr(
        grouped, "unpack_stack", lambda w, experts, _, some, **__: code.expand(some * w.rows // experts, w.columns)
    )
    monkeypatch.setattr(grouped, "multiply_codes", lambda _, __, codes, *___, **____: found.mark(codes.numel()))
    monkeypatch.setattr(
        grouped.float8,
        "quantise_rows",
        lambda x: (x.new_empty(x.shape, dtype=torch.uint8), x.new_empty(len(x), 1, dtype=torch.float32)),
    )
    return found


def count(experts, live):
    """Bytes held between the passes, and the highest moments of both."""
    anchor = torch.empty((), device="meta", requires_grad=True)
    weights = torch.empty(TOKENS, CHOICES, dtype=torch.bfloat16, device="meta", requires_grad=True)
    index = torch.empty(TOKENS, CHOICES, dtype=torch.long, device="meta")
    with live:
        x = Source.apply(anchor, (TOKENS, 64), torch.bfloat16)
        answer = experts(x, index, weights)
        del x
        held = live.now_bytes
        forward = live.restart()
        Sink.apply(answer).backward()
    return held, forward, live.highest_bytes


@pytest.mark.parametrize(("adapted", "in_8_bits"), list(product((False, True), repeat=2)))
@pytest.mark.parametrize("layout", ["qwen3_moe", "gpt_oss", "nemotron_h"])
def test_moments_are_those_of_the_real_ops(layout, adapted, in_8_bits, live):
    experts = pack(make_experts(layout), torch.bfloat16).to("meta")
    for weight in experts.expert_weights if in_8_bits else ():
        experts.scales[weight.name] = torch.empty(weight.experts, device="meta")
    for weight in experts.expert_weights if adapted else ():
        a = torch.empty(weight.experts * RANK, weight.columns, device="meta", requires_grad=True)
        b = torch.empty(weight.rows, RANK * weight.experts, device="meta", requires_grad=True)
        a.grad, b.grad = torch.empty_like(a), torch.empty_like(b)
        experts.lora[weight.name] = partial(ExpertLora, a, b, 1.0)
    put_back = fuse_experts(experts)
    assert type(experts.fused) is FusedExperts
    held, *passes = count(experts, live)
    put_back()
    traced = LiveBytes()
    notes = ExpertNotes(lambda: traced, lambda *_: None, lambda *_: None)
    fuse_experts(experts, kind=lambda *given: TracedExperts(*given, notes=notes))
    found, *moments = count(experts, traced)
    assert found == held
    for real, told in zip(passes, moments, strict=True):
        assert told == pytest.approx(real, rel=0.01)
