"""Activations that wait on the host come back as they were, whatever their layout, and leave nothing on the device."""

import gc
import weakref
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlora_cli.core.adapters.lora import attach_adapter
from qlora_cli.core.engine import packed_attention
from qlora_cli.core.engine.engine import install_engine
from qlora_cli.core.engine.memory_plan import MARGIN_BYTES, MemoryPlan, StepNeeds
from qlora_cli.core.engine.offload import ActivationOffload, storages_of
from qlora_cli.core.models.files import resolve_model
from qlora_cli.core.models.loading import load_base
from qlora_cli.core.tiling import kept_attention
from qlora_cli.core.training.flat_parameters import TrainableParameters
from qlora_cli.settings.groups import LoraSettings, QuantizationSettings, StepSettings
from tests.conftest import most_slow
from tests.engine.test_engine import adapted, batch_of, gradients, install

CPU = torch.device("cpu")


class Double(torch.autograd.Function):
    """Saves views of what it is given, in the layouts that attention saves them in."""

    @staticmethod
    def forward(ctx, x, view):
        ctx.save_for_backward(view(x))
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        seen.append(ctx.saved_tensors[0])
        return 2 * grad, None


seen: list = []
VIEWS = {
    "whole": lambda x: x,
    "transposed": lambda x: x.transpose(0, 1),
    "every third": lambda x: x[:, 1::3],
    "a slice of the last dimension": lambda x: x.view(4, 6, 10)[..., 3:7],
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_a_saved_tensor_comes_back_in_its_own_layout(view):
    offload = ActivationOffload(CPU, frozenset(), smallest_bytes=1)
    x = torch.randn(24, 10, requires_grad=True)
    seen.clear()
    offload.start()
    with offload.layer(0):
        y = Double.apply(x, view)
    with offload.layer(1):
        z = Double.apply(y, view)
    held = weakref.ref(y)
    expected = [view(y).detach().clone(), view(x).detach().clone()]
    del y
    gc.collect()
    z.sum().backward()
    for found, wanted, source in zip(seen, expected, (x, x), strict=True):
        assert torch.equal(found, wanted) and found.stride() == view(source).stride()
    assert held() is None and len(offload.free) == 2


def test_a_storage_travels_once_however_many_tensors_see_it():
    offload = ActivationOffload(CPU, frozenset(), smallest_bytes=1)
    x = torch.randn(24, 10, requires_grad=True)
    seen.clear()
    offload.start()
    with offload.layer(0):
        y = 2 * x
        outs = [Double.apply(y, view) for view in VIEWS.values()]
    expected = [view(y).detach().clone() for view in VIEWS.values()]
    assert sum(offload.bytes.values()) == y.nbytes
    sum(out.sum() for out in outs).backward()
    assert all(torch.equal(found, wanted) for found, wanted in zip(reversed(seen), expected, strict=True))
    with pytest.raises(RuntimeError, match="in place"), offload.layer(1):
        z = 2 * x
        out = Double.apply(z, VIEWS["whole"])
        z.detach().zero_()
    del out


def test_small_layers_stay_and_return_beside_a_large_one_and_large_ones_one_by_one():
    """1,000 values of large layers, 100 of small ones: a copy of the former takes the time of more than one layer."""
    offload = ActivationOffload(CPU, frozenset(), smallest_bytes=1)
    x = torch.ones((), requires_grad=True)
    offload.start()
    out, there = x, []

    def on_device() -> list[int]:
        return [n for n, aways in offload.layers.items() if any(away.on_device is not None for away in aways)]

    for number, size in enumerate((1000, 100, 1000, 1000, 100, 100)):
        with offload.layer(number):
            out = (torch.rand(size, 1) * out).sum()
        there.append(on_device())
    assert there == [[0], [0, 1], [1, 2], [3], [3, 4], [3, 4, 5]]
    offload.fetch_around(2)
    assert on_device() == [0, 1, 2, 3, 4, 5]  # room for 0 and 1 together: 2 is at work, the others were never away
    del out


def test_a_plan_counts_what_lies_beside_a_layer_that_is_repeated():
    """Its input, what is on its way for the layers below, and what the first of them was given, which stays."""
    offload = ActivationOffload(CPU, frozenset(), smallest_bytes=1)
    given = torch.rand(100, 1, requires_grad=True)
    offload.start()
    out = given.sum()
    for number, size in enumerate((100, 100, 1000, 100, 100, 1000, 100)):  # values: an input, or all that a layer saves
        with offload.layer(number):
            out = (torch.rand(size, 1) * out).sum()
    offload.fetch_around(3)
    stretches = [s for number in range(4) for s in offload.layers[number] if s.on_device is not None]
    there = sum(stretch.bytes for stretch in stretches) + given.nbytes
    plan, peak = MemoryPlan(recomputed=5, offload_activations=True, sent=2), 2**40
    needs = StepNeeds(layers=7, kept_bytes=4000, peak_bytes=peak, hidden_bytes=400)
    own_inputs = 400  # normalised, which a repetition keeps
    assert there > 4000 and plan.step_bytes(needs) - MARGIN_BYTES >= peak + there + own_inputs
    del out


def test_adapters_in_the_compute_dtype_stay(load_tiny):
    dtype = torch.bfloat16
    base, _ = load_tiny("llama", compute_dtype=dtype)
    model = attach_adapter(base, LoraSettings(rank=4, alpha=8)).train()
    run = {"max_tokens": 128, "total_steps": 3, "report": lambda event: None}
    engine = install_engine(model, StepSettings(engine="fast"), device=CPU, compute_dtype=dtype, **run)
    engine.loss(batch_of())
    staying = storages_of([*engine.base.parameters(), *engine.base.buffers(), *engine.linears.tensors()])
    adapters = [t for linear in engine.linears.fused if linear.adapter for t in (linear.lora_a, linear.lora_b)]
    assert adapters and storages_of(adapters) <= staying
    engine.close()


def test_tensors_that_stay_anyway_are_not_copied():
    weight = torch.randn(8, 8, requires_grad=True)
    offload = ActivationOffload(CPU, frozenset([weight.untyped_storage().data_ptr()]), smallest_bytes=1)
    offload.start()
    with offload.layer(0):
        (torch.randn(3, 8) @ weight).sum().backward()
    with offload.layer(1):
        torch.randn(1, 8).expand(500, 8).mul(weight.sum()).sum().backward()
    assert all(buffer.numel() < 16_000 for buffer in offload.free)


@pytest.mark.parametrize("gathered", [torch.zeros(4096, dtype=torch.uint8), torch.rand(4096)])
def test_a_gathered_weight_is_not_sent_away(gathered):
    """It is freed when its layer is done, which no copy of it would wait for."""
    offload = ActivationOffload(CPU, frozenset(), smallest_bytes=1)
    offload.start()
    with offload.layer(0):
        torch.ones((), requires_grad=True) * gathered  # saves it
    assert not offload.layers[0] and offload.chunk is None


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=30))
def test_buffers_are_used_again_and_never_by_two(sizes):
    offload = ActivationOffload(CPU, frozenset(), smallest_bytes=1)
    first = [offload.borrow(size, 0) for size in sizes]
    spans = sorted((b.data_ptr(), b.data_ptr() + b.numel()) for b in first)
    assert all(end <= begin for (_, end), (begin, _) in pairwise(spans))
    assert all(b.numel() >= size for b, size in zip(first, sizes, strict=True))
    used, chunk = offload.chunk_used, offload.chunk
    offload.free += first
    for size in sorted(sizes, reverse=True):
        offload.borrow(size, 0)
    assert (offload.chunk_used, offload.chunk) == (used, chunk)


@pytest.mark.each_choice
@pytest.mark.parametrize("architecture", ["llama", "gpt_neox", "falcon"])
@pytest.mark.parametrize(("recomputed", "sent"), [(0, 2), (1, 1), (0, 1)])
def test_sent_layers_leave_loss_and_gradients_as_they_are(load_tiny, architecture, recomputed, sent):
    model = adapted(load_tiny, architecture)
    engine = install(model)
    found = []
    for plan in (engine.plan, MemoryPlan(recomputed, False, False, engine.linears.resident, sent=sent)):
        engine._apply(plan)
        if plan.sent:
            staying = [*engine.base.parameters(), *engine.base.buffers(), *engine.linears.tensors()]
            engine.offload = ActivationOffload(CPU, storages_of(staying), smallest_bytes=1)
        model.zero_grad(set_to_none=True)
        loss = engine.loss(batch_of())
        loss.backward()
        found.append((loss.detach(), gradients(model)))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    assert engine.offload.free, "something was sent"
    engine.close()


@pytest.mark.parametrize("elements", [4096, 700])  # room for all that is saved, and for a part of it
def test_what_waits_in_memory_of_gradients_comes_back_and_leaves_zeros_also_where_nobody_needed_it(elements):
    weight = torch.nn.Parameter(torch.ones(elements))
    weight.grad = torch.zeros_like(weight)
    offload = ActivationOffload(CPU, frozenset(), smallest_bytes=1)
    assert offload.borrow_from([torch.nn.ParameterList([weight])])
    x = torch.randn(24, 10, requires_grad=True)
    seen.clear()
    offload.start()
    with offload.loan.layer(1):
        y = Double.apply(x, VIEWS["transposed"])
        Double.apply(y * 2, VIEWS["whole"])  # whose result is dropped
    expected = x.detach().clone()
    assert weight.grad.any()
    y.sum().backward()
    assert torch.equal(seen[0], expected.T) and seen[0].stride() == expected.T.stride()
    assert not weight.grad.any()


@pytest.mark.parametrize("recomputed", [2, 1])
def test_gradients_that_lend_their_memory_are_those_of_a_step_without_it(tiny_model, recomputed):
    """The second micro-batch of a step finds gradients there, and does without."""
    path = tiny_model("llama", num_hidden_layers=6)
    quantized = {"quantization": QuantizationSettings(base_cache=False), "compute_dtype": torch.float32, "device": CPU}
    model = adapted(lambda _: load_base(resolve_model(str(path)), **quantized), "llama", rank=32)
    engine, parameters = install(model), TrainableParameters(model)
    batches, found = [replace(batch_of(), opens_step=True), batch_of((9, 30))], []
    for plan in (engine.plan, replace(engine.plan, recomputed=recomputed, lent=2)):
        engine._apply(plan)
        if plan.lent:
            staying = [*engine.base.parameters(), *engine.base.buffers(), *engine.linears.tensors()]
            engine.offload = ActivationOffload(CPU, storages_of(staying), smallest_bytes=1)
        parameters.zero_gradients()
        for batch in batches:
            loss = engine.loss(batch)
            lent = sum(engine.offload.loan.used) if plan.lent else 0
            assert (lent > 100_000) == (plan.lent > 0 and batch.opens_step)
            loss.backward()
            found.append(parameters.gradients()[0].clone())
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])
    engine.close()


def plain_attention(query, key, value):
    key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
    q, k, v = (t.transpose(0, 1) for t in (query, key, value))  # (heads, tokens, size)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1)


@torch.library.custom_op("qlora_tests::attend", mutates_args=())
def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention as one op below autograd, as it is on a card."""
    computed.append(query.shape)
    return plain_attention(query, key, value).contiguous(), query[..., 0].contiguous()


def differentiate(ctx, grad, _):
    given = [t.detach().requires_grad_() for t in ctx.saved_tensors[:3]]
    with torch.enable_grad():
        return torch.autograd.grad(plain_attention(*given), given, grad)


attend.register_autograd(
    differentiate, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs, *output)
)
computed: list = []


@pytest.mark.parametrize("architecture", most_slow(["llama", "gpt_neox", "falcon"], {"llama"}))
def test_attention_whose_results_wait_on_the_host_is_not_computed_again(load_tiny, monkeypatch, architecture):
    model = adapted(load_tiny, architecture)
    engine = install(model, tile_tokens=128)
    monkeypatch.setattr(packed_attention, "packed_attention", lambda q, k, v, *_: attend(q, k, v)[0])
    monkeypatch.setattr(kept_attention, "ATTENTION_OPS", {torch.ops.qlora_tests.attend.default})
    found = []
    for keeps in (0, 1, 2):
        engine._apply(MemoryPlan(2, True, False, engine.linears.resident, attention_kept=keeps, tile_tokens=128))
        staying = [*engine.base.parameters(), *engine.base.buffers(), *engine.linears.tensors()]
        engine.offload = ActivationOffload(CPU, storages_of(staying), smallest_bytes=1)
        model.zero_grad(set_to_none=True)
        computed.clear()
        loss = engine.loss(batch_of((180,)))
        loss.backward()
        found.append((loss.detach(), gradients(model), len(computed)))
    for loss, gradient, _ in found[1:]:
        assert torch.equal(loss, found[0][0]) and torch.equal(gradient, found[0][1])
    attended = [times for *_, times in found]
    assert attended == [4, 3, 2], "once in each of two layers, and in the backward pass once more where it is not kept"
    engine.close()
