"""On a GPU: whatever is recomputed, sent to the host, compiled or replayed as a graph, gradients stay what they are."""

from dataclasses import replace

import pytest
import torch

from qlora_cli.core.engine import fast as engine_fast
from qlora_cli.core.engine.engine import install_engine
from qlora_cli.core.engine.memory_plan import MemoryPlan, StepNeeds
from qlora_cli.core.models.files import resolve_model
from qlora_cli.core.models.loading import load_base
from qlora_cli.core.training.flat_parameters import TrainableParameters
from qlora_cli.settings.groups import QuantizationSettings, StepSettings
from tests.engine.test_engine import adapted, batch_of, gradients

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


def on_gpu(load_tiny, architecture, **arguments):
    options = {"compute_dtype": torch.bfloat16, "device": CUDA}
    return adapted(lambda name: load_tiny(name, **options), architecture, **arguments)


def install(model, *, max_tokens=128, total_steps=100, **options):
    return install_engine(
        model,
        StepSettings(**{"gradient_checkpointing": "off", "compile": False, **options}),
        device=CUDA,
        compute_dtype=torch.bfloat16,
        max_tokens=max_tokens,
        total_steps=total_steps,
        report=lambda event: None,
    )


def steps(model, engine, batches):
    """Losses, and gradients summed over all batches, which parameters hold in place as in training."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    losses = []
    for batch in batches:
        loss = engine.loss(batch)
        loss.backward()
        losses.append(loss.item())
        del loss  # as in training: what a graph is captured beside must be gone
    return torch.tensor(losses), gradients(model)


def batches():
    """The first runs eagerly, the second is captured, the third replayed; the last ones are other shapes."""
    return [batch_of(seed=seed) for seed in range(4)] + [batch_of((64, 64), seed=9), batch_of((9, 8, 7), seed=10)]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "gpt_neox", "falcon"])
def test_measures_and_graphs_leave_gradients_as_they_are(load_tiny, architecture, compiled):
    model = on_gpu(load_tiny, architecture)
    plain = install(model, total_steps=1)
    assert plain.graphs is None
    expected = steps(model, plain, batches())
    plain.close()
    engine = install(model, compile=compiled)
    layers = len(engine.layers)
    for recomputed, sent, away in ((0, 0, False), (layers, 0, True), (0, layers, False), (1, layers - 1, False)):
        engine._apply(MemoryPlan(recomputed, away, False, False, sent=sent))
        if engine.offload is not None:
            engine.offload.smallest_bytes = 1
        engine.plan_by_tokens = lambda *_: engine.plan
        engine.graphs.clear()
        for layer in engine.layer_plans:
            layer.lean = recomputed + sent > 0
        losses, found = steps(model, engine, batches())
        assert not engine.graphs.failed and engine.graphs.graphs
        assert torch.allclose(losses, expected[0], rtol=2e-2)
        assert (found - expected[1]).norm() <= 3e-2 * expected[1].norm(), engine.describe()
    engine.close()


@pytest.mark.parametrize("compiled", [False, True])
def test_memory_of_gradients_is_lent_inside_graphs_too(tiny_model, compiled):
    path = tiny_model("llama", num_hidden_layers=8, dtype="bfloat16")
    options = {"compute_dtype": torch.bfloat16, "device": CUDA}
    files, held = resolve_model(str(path)), QuantizationSettings(base_cache=False)
    model = adapted(lambda _: load_base(files, held, **options), "llama", rank=64)
    engine, parameters, found = install(model, compile=compiled), TrainableParameters(model), []
    for lent in (0, 2):
        engine._apply(replace(engine.plan, recomputed=6 - lent, lent=lent, resident_weights=False))
        if lent:
            engine.offload.smallest_bytes = 1
        engine.graphs.clear()
        found.append([])
        for batch in (*batches()[:4], *batches()[:2]):
            for opens in (True, False):
                if opens:
                    parameters.zero_gradients()
                engine.loss(replace(batch, opens_step=opens)).backward()
                assert engine.lends == (lent > 0 and opens)
                found[-1].append(parameters.gradients()[0].clone())
        assert not engine.graphs.failed and engine.graphs.graphs
    engine.close()
    for plain, borrowed in zip(*found, strict=True):
        assert (plain - borrowed).norm() <= 3e-2 * plain.norm()


@pytest.mark.parametrize("architecture", ["gpt_neox", "falcon"])
def test_a_first_layer_that_runs_plainly_leaves_gradients_as_they_are(load_tiny, architecture):
    model = on_gpu(load_tiny, architecture, target_modules=("query_key_value",), dropout=0.05)
    found = []
    for compiled in (False, True):
        torch.manual_seed(1)
        engine = install(model, compile=compiled)
        assert [layer.compiled for layer in engine.layer_plans] == [False] + [compiled] * (len(engine.layers) - 1)
        found.append(steps(model, engine, batches()))
        assert not engine.graphs.failed and engine.graphs.graphs
        engine.close()
    assert torch.allclose(found[0][0], found[1][0], rtol=2e-2)
    assert (found[0][1] - found[1][1]).norm() <= 3e-2 * found[0][1].norm()


def test_dropout_is_the_same_when_a_layer_is_repeated(load_tiny):
    found = []
    for word in ("off", "on"):
        torch.manual_seed(0)
        model = on_gpu(load_tiny, "llama", dropout=0.3)
        engine = install(model, gradient_checkpointing=word)
        torch.manual_seed(1)
        found.append(steps(model, engine, batches())[1])
        engine.close()
    assert (found[0] - found[1]).norm() <= 3e-2 * found[0].norm()


def test_a_plan_is_measured_and_layers_are_sent_where_memory_is_short(load_tiny):
    model = on_gpu(load_tiny, "llama")
    engine = install(model, gradient_checkpointing="auto", max_tokens=2048)
    needs: StepNeeds = engine.planner.needs
    assert needs.seconds.forward > 0 and needs.seconds.backward > 0
    assert 0 <= needs.fixed_seconds.forward <= needs.seconds.forward
    assert needs.link_bytes_per_second > 1e9 and needs.kept_bytes > 0 and needs.peak_bytes > needs.kept_bytes
    engine.close()


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox", "opt", "gemma3"])
def test_embeddings_leave_before_trials_where_room_is_short(load_tiny, architecture, monkeypatch):
    model = on_gpu(load_tiny, architecture)
    plain = install(model, total_steps=1)
    expected = steps(model, plain, batches())
    tied = plain.embeddings.movable_bytes() == 0
    plain.close()
    monkeypatch.setattr(engine_fast, "TRIAL_ROOM_BYTES", 2**60)
    engine = install(model)
    assert engine.packed and engine.head is not None and engine.embeddings.on_host is not tied
    losses, found = steps(model, engine, batches())
    assert torch.allclose(losses, expected[0], rtol=2e-2)
    assert (found - expected[1]).norm() <= 3e-2 * expected[1].norm()
    engine.close()
    assert model.get_input_embeddings().weight.is_cuda
