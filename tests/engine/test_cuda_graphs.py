"""Shapes of the grid give the same loss, compiled layers share one graph, and CUDA graphs repeat what eager steps do."""

import weakref
from dataclasses import replace
from itertools import accumulate

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlora_cli.core.engine.cuda_graphs import MOST_RELEASES, StepGraphs, StepInputs, bucket, bucketed, explain_failure
from qlora_cli.core.matmul.choice import ProductTrial
from tests.conftest import most_slow
from tests.engine import cpu_attention  # noqa: F401 - lets compiled layers attend on the CPU
from tests.engine.test_engine import adapted, batch_of, gradients, install, step


class Compiler:
    """A backend that notes what it is given to compile: for each graph, how often it calls which of our ops."""

    def __init__(self, backend="aot_eager_decomp_partition"):
        self.backend = torch._dynamo.lookup_backend(backend)
        self.graphs = []

    def __call__(self, graph, inputs):
        parts = [module for module in graph.modules() if isinstance(module, torch.fx.GraphModule)]
        nodes = [node for part in parts for node in part.graph.nodes if str(node.target).startswith("qlora.")]
        self.graphs.append([(str(node.target).split(".")[1], node.args) for node in nodes])
        return self.backend(graph, inputs)

    def arguments_of(self, op):
        """For each graph, the arguments of each call of one op."""
        return [[arguments for name, arguments in graph if name == op] for graph in self.graphs]


def compile_layers(engine, *backend, lean=False):
    """Runs an engine's layers compiled, which it does by itself on cards only."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiler = Compiler(*backend)
    engine.compiled = True
    engine._share_projections()
    for plan in engine.layer_plans:
        plan.compiled, plan.lean, plan.backend = True, lean, compiler
    return compiler


@given(st.integers(1, 10**6), st.sampled_from([8, 16, 128]))
def test_a_bucket_is_never_smaller_nor_much_larger(count, least):
    found = bucket(count, least)
    assert count <= found <= max(count + least - 1, count * 9 / 8 + 1)
    assert bucket(found, least) == found
    assert bucket(count + 1, least) >= found


@pytest.mark.each_choice
@pytest.mark.parametrize("architecture", ["llama", "gpt_neox", "falcon", "gemma3"])
@pytest.mark.parametrize("lengths", [(40, 7, 33), (64,), (1, 2, 90)])
def test_a_pack_laid_into_the_grid_has_the_same_loss_and_gradients(load_tiny, architecture, lengths):
    model = adapted(load_tiny, architecture)
    engine = install(model)
    found = []
    for form in (lambda inputs: inputs, bucketed):
        model.zero_grad(set_to_none=True)
        engine.values.refresh()
        loss = engine._packed_loss(form(engine._inputs(batch_of(lengths))))
        loss.backward()
        found.append((loss.detach(), gradients(model)))
    (loss, plain), (again, padded) = found
    assert torch.allclose(loss, again, rtol=1e-6)
    assert (plain - padded).norm() <= 1e-5 * plain.norm()


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "recomputed"), [("llama", False), ("gpt_neox", True)])
def test_layers_alike_are_compiled_once_for_all_lengths(load_tiny, architecture, recomputed):
    engine = install(adapted(load_tiny, architecture, dropout=0.1))
    assert len(engine.layers) > 1
    compiler = compile_layers(engine)
    if recomputed:
        everything = replace(engine.plan, recomputed=len(engine.layers))
        engine.plan_by_tokens = lambda *_: everything
    for lengths in ((40, 7, 33), (60, 50), (9, 8, 7, 6, 5), (30, 34)):
        engine.loss(batch_of(lengths)).backward()
    assert len(compiler.graphs) == 1 and not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "gpt_neox"])
def test_lean_layers_keep_less_and_have_the_same_gradients(load_tiny, architecture):
    found = []
    for lean in (False, True):
        model = adapted(load_tiny, architecture)
        engine = install(model)
        compile_layers(engine, lean=lean)
        saved = {}

        def note(tensor, saved=saved):
            saved[tensor.data_ptr()] = tensor  # views of one storage count once
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = engine.loss(batch_of((40, 24)))
        loss.backward()
        found.append((sum(t.nbytes for t in saved.values()), gradients(model)))
    (bytes_, expected), (fewer, lean) = found
    assert fewer < 0.95 * bytes_
    assert (lean - expected).norm() <= 1e-5 * expected.norm()


def test_the_inputs_of_a_prepared_batch_wait_on_the_device_and_are_used_once(load_tiny):
    engine = install(adapted(load_tiny, "llama"))
    embedded = []
    engine.embeddings.module.register_forward_hook(lambda *call: embedded.append(call))
    engine.graphs = StepGraphs(
        engine._packed_loss, [], lambda: None, lambda tokens: (), lambda: True, lambda event: None
    )
    engine.graphs.failed = True  # every pass runs without one
    batch, other = batch_of((40, 7)), batch_of((9,))
    expected = [engine.loss(each) for each in (batch, other)]
    embedded.clear()
    assert engine.prepare(batch) is batch and len(embedded) == 1
    assert torch.equal(engine.loss(other), expected[1]) and len(embedded) == 2
    assert torch.equal(engine.loss(batch), expected[0]) and len(embedded) == 2
    assert torch.equal(engine.loss(batch), expected[0]) and len(embedded) == 3

    def full(*_):
        raise torch.OutOfMemoryError("no room")

    hook = engine.embeddings.module.register_forward_pre_hook(full)
    assert engine.prepare(batch) is batch, "the step itself sees to that"
    hook.remove()
    engine.plan = replace(engine.plan, recomputed=1)
    embedded.clear()
    engine.prepare(batch)
    assert not embedded, "where memory is short, nothing lies about"


def test_a_parameter_without_a_standing_gradient_runs_without_a_graph():
    parameter = torch.ones(2, requires_grad=True)
    graphs = StepGraphs(
        lambda inputs: parameter.sum(), [parameter], lambda: None, lambda tokens: (), lambda: True, lambda event: None
    )
    assert graphs.loss(None) == 2 and not graphs.graphs


@pytest.mark.parametrize(
    ("architecture", "recomputed", "backend"),
    [
        ("llama", 1, ["eager"]),
        pytest.param("llama", 1, [], marks=pytest.mark.slow),  # traced by autograd too, as on cards
        *(pytest.param(n, 0, [], marks=pytest.mark.slow) for n in ("gpt_neox", "llama", "qwen2", "gemma3")),
    ],
)
def test_compiled_layers_share_projections_and_gradients_stay(load_tiny, architecture, recomputed, backend):
    model = adapted(load_tiny, architecture)
    batch = batch_of((40, 7, 33))
    expected_loss, expected, _ = step(model, batch)
    engine = install(model, gradient_checkpointing=str(recomputed))
    compiler = compile_layers(engine, *backend)
    groups = [len(shared.members) for shared in engine.layer_plans[-1].shared]
    assert groups == ([] if architecture == "gpt_neox" else [3, 2])
    kind = "gelu_tanh" if architecture == "gemma3" else "silu"
    gates = [unit.kind for plan in engine.layer_plans for unit in plan.gates]
    assert gates == ([] if architecture == "gpt_neox" else [kind] * len(engine.layers))
    model.zero_grad(set_to_none=True)
    loss = engine.loss(batch)
    loss.backward()
    assert torch.allclose(loss, expected_loss, rtol=1e-5)
    found = gradients(model)
    assert (found - expected).norm() <= 1e-5 * expected.norm()
    assert len(compiler.graphs) == 1 + recomputed, "of layers that are repeated, and of the others"
    fused = [[arguments[-1] for arguments in graph] for graph in compiler.arguments_of("gated")]
    ranks = [
        {arguments[1].meta["example_value"].shape[0] for arguments in graph}
        for graph in compiler.arguments_of("project_shared")
    ]
    if groups:
        assert fused == [[]] * recomputed + [[kind]], "a repeated layer has none"
        assert ranks == [set()] * recomputed + [{12, 8}], "three and two projections of rank 4 in one"
    assert all(shared.x is None for plan in engine.layer_plans for shared in plan.shared)
    for lengths in ((60, 50), (9, 8, 7, 6, 5)):
        engine.loss(batch_of(lengths)).backward()
    assert len(compiler.graphs) == 1 + recomputed, "for all lengths"
    engine.put_gates_back()
    engine.put_gates_back()  # as where what comes between the two fails
    engine.close()


@pytest.mark.parametrize("architecture", most_slow(["llama", "qwen2", "gemma3"], ["qwen2"]))
def test_compiled_layers_in_8_bits_multiply_query_key_and_value_as_one(load_tiny, architecture):
    """To within what rounding does: a column of joined weights has one scale, a token's gradients too."""
    model, batch = adapted(load_tiny, architecture), batch_of((40, 7, 33))
    options = {"matmul": "fp8", "resident_weights": True, "trial": ProductTrial(batch=batch_of())}
    plain = step(model, batch)[1]
    expected_loss, expected, _ = step(model, batch, **options)
    model.zero_grad(set_to_none=True)
    engine = install(model, **options)
    compiler = compile_layers(engine, "eager")
    loss = engine.loss(batch)
    loss.backward()
    found = gradients(model)
    assert abs(loss - expected_loss) < 1e-3 * expected_loss
    assert (found - expected).norm() < (expected - plain).norm(), "nearer to each other than to what is not rounded"
    assert (found - plain).norm() < 1.2 * (expected - plain).norm()
    assert [len(calls) for calls in compiler.arguments_of("joined")] == [1]
    attention, gate = engine.layer_plans[0].shared
    assert attention.joined is not None and gate.joined is None
    held = [member.weight.turned_codes for member in attention.members]
    assert len({codes.untyped_storage().data_ptr() for codes in (*held, attention.joined.turned_codes)}) == 1
    engine.close()


def test_a_capture_that_fails_is_explained_by_its_first_error_and_holds_nothing():
    class Held:
        pass

    def fail(kind):
        held = Held()
        watched.append(weakref.ref(held))
        try:
            raise kind("no room\nfor more")
        finally:
            raise RuntimeError("capturing stream has unjoined work")

    watched: list = []
    for kind, expected in ((torch.OutOfMemoryError, True), (ValueError, False)):
        with pytest.raises(RuntimeError) as caught:
            fail(kind)
        assert explain_failure(caught.value) == (f"{kind.__name__}: no room", expected)
    assert explain_failure(NotImplementedError("of this kind")) == ("NotImplementedError: of this kind", False)
    assert all(reference() is None for reference in watched)


def test_embeddings_looked_up_beforehand_give_the_same_loss_and_gradients(load_tiny):
    model = adapted(load_tiny, "gpt_neox")
    engine = install(model)
    found = []
    for waits in (False, True):
        if waits:
            engine.embeddings.move_to_host()
        model.zero_grad(set_to_none=True)
        batch = engine.prepare(batch_of())
        assert (batch.embedded is not None) is (waits and engine.packed)
        loss = engine.loss(batch)
        loss.backward()
        found.append((loss.detach(), gradients(model)))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    engine.close()


def test_graphs_make_room_before_a_leaner_plan_has_to(load_tiny):
    model = adapted(load_tiny, "llama")
    engine = install(model)
    graphs = StepGraphs(None, [], lambda: None, engine._layout, lambda: True, lambda event: None)
    engine.graphs, plan = graphs, engine.plan
    for held in ("another graph", "a capture beside others"):
        graphs.graphs = {(1,): None} if held == "another graph" else {}
        graphs.crowded = not graphs.graphs
        assert engine.reduce_memory() and engine.plan is plan and not graphs.graphs
        assert not engine.reduce_memory()  # nothing is planned on the CPU
    graphs.releases, graphs.graphs = 0, {(1,): None}
    graphs.warm, graphs.warming = {("done",), ("broken off",)}, ("broken off",)
    assert engine.reduce_memory() and graphs.warm == {("done",)}, "what was compiled is, whatever else had no room"
    graphs.releases = MOST_RELEASES
    graphs.graphs = {(1,): None}
    assert not engine.reduce_memory() and not graphs.graphs, "room is made whatever follows"
    engine.close()


def test_a_single_row_has_a_shape_of_its_own_only_at_the_largest_length_or_on_the_grid(load_tiny):
    engine = install(adapted(load_tiny, "llama"), max_tokens=500)
    engine.equal_rows, engine.graphs = (
        True,
        StepGraphs(None, [], lambda: None, engine._layout, lambda: True, lambda event: None),
    )
    found = {lengths: engine._inputs(batch_of(lengths)).equal_rows for lengths in ((300,), (320,), (500,), (300, 300))}
    assert found == {(300,): 0, (320,): 1, (500,): 1, (300, 300): 2}
    engine.close()


def inputs_of(lengths, trained_tokens):
    """A pack of rows of zeros."""
    tokens = sum(lengths)
    return StepInputs(
        embedded=torch.zeros(1, tokens, 1),
        labels=torch.zeros(1, tokens, dtype=torch.long),
        position_ids=torch.zeros(1, tokens, dtype=torch.long),
        boundaries=torch.tensor([0, *accumulate(lengths)], dtype=torch.int32),
        longest=max(lengths),
        equal_rows=0,
        trained_tokens=trained_tokens,
    )


def test_packs_alike_have_few_shapes():
    """A shape is captured once, in the time of several steps: quotes and questions are to need a handful."""
    generator = torch.Generator().manual_seed(0)
    for rows, least, most, shapes in ((8, 12, 80, 6), (25, 60, 260, 8)):
        seen = set()
        for _ in range(150):
            lengths = torch.randint(least, most, (rows,), generator=generator).tolist()
            found = bucketed(inputs_of(lengths, sum(lengths) - rows))
            seen.add((found.labels.shape, found.boundaries.shape, found.longest, found.trained_tokens))
        assert len(seen) <= shapes


@given(st.lists(st.integers(0, 600), min_size=1, max_size=40).filter(any), st.floats(0, 1))
def test_a_shape_of_the_grid_covers_every_row_and_the_one_that_is_added(lengths, share):
    tokens = sum(lengths)
    inputs = inputs_of(lengths, int(share * tokens))
    found = bucketed(inputs)
    rows = found.boundaries.diff()
    assert (rows >= 0).all() and rows.max() <= found.longest, "a kernel looks no further than that"
    assert found.boundaries[-1] == found.labels.numel() == found.embedded.shape[1] == found.position_ids.numel()
    assert rows[: len(lengths)].tolist() == lengths and inputs.trained_tokens <= found.trained_tokens
    assert found.trained_tokens <= found.labels.numel()
    assert (found.labels[0, tokens:] == -100).all()
