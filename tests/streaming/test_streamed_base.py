"""A base whose layers wait on the host computes what a whole one does, to the bit, and holds a few layers at a time."""

import gc
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlora_cli.core.adapters.lora import attach_adapter
from qlora_cli.core.distributed.process_group import ProcessGroup
from qlora_cli.core.distributed.weight_shards import WeightShards
from qlora_cli.core.engine.decoder_layers import find_layers
from qlora_cli.core.models.files import resolve_model
from qlora_cli.core.models.loading import load_base
from qlora_cli.core.models.quantization import dequantized_weight, four_bit_linears
from qlora_cli.core.models.structure import find_decoder
from qlora_cli.core.streaming import host_memory
from qlora_cli.core.streaming.host_memory import TOUCHED_BYTES, lock_pages, locked_bytes, piece_sizes
from qlora_cli.core.streaming.ring import HostSource, Ring
from qlora_cli.core.streaming.streamed_base import stream_base
from qlora_cli.events import report_nothing
from qlora_cli.settings.groups import LoraSettings, QuantizationSettings
from tests.conftest import most_slow
from tests.engine.test_engine import CPU, batch_of, gradients, install
from tests.experts.expert_modules import write_expert_model

LAYERS = 5  # more than a ring has room for, and no multiple of it
STEPS = 2
DENSE = dict.fromkeys(("falcon", "gemma2", "gpt_neox", "llama", "mistral", "phi3", "qwen2"), "num_hidden_layers")
DENSE |= {"gpt2": "n_layer"}


@pytest.fixture(scope="module")
def directories(tiny_model, tmp_path_factory):
    """`directories(architecture)`: a checkpoint with `LAYERS` layers."""
    made = {}

    def directory(name):
        if name in DENSE:
            return tiny_model(name, **{DENSE[name]: LAYERS})
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name) / "model"
            write_expert_model(name, made[name], num_hidden_layers=LAYERS)
        return made[name]

    return directory


def load(directory, *, on_host=False):
    """A 4-bit base; with `on_host` its packed weights are where they wait, as `qlora train` loads one that streams."""
    base, _ = load_base(
        resolve_model(str(directory), report=report_nothing),
        QuantizationSettings(base_cache=False),
        compute_dtype=torch.float32,
        device=CPU,
        weight_shards=WeightShards(ProcessGroup(), on_host=True) if on_host else None,
    )
    return base


def stream(base, count=LAYERS, slots=2):
    return stream_base(base, find_layers(find_decoder(base)), CPU, streamed=count, slots=slots)


def attach(base, **lora):
    torch.manual_seed(0)
    return attach_adapter(base, LoraSettings(rank=4, alpha=8, **lora)).train()


def train(base, *, model=None, beside=False, **options):
    """Losses, the last gradients and the adapter after steps of gradient descent; with `beside`, there are passes of
    evaluation and answers in between, one of them between a forward pass and its backward pass."""
    model = attach(base) if model is None else model
    trained = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(0.02 * torch.randn(parameter.shape))
    engine = install(model, resident_weights=False, **options)
    losses = []
    for number in range(STEPS):
        model.zero_grad(set_to_none=True)
        loss = engine.loss(batch_of(seed=number))
        if beside:
            with torch.no_grad():
                engine.loss(batch_of((9,), seed=7))
                engine.next_logits(batch_of((5, 11), seed=8))
        loss.backward()
        losses.append(loss.item())
        with torch.no_grad():
            for parameter in trained:
                parameter -= 1e-3 * parameter.grad
    engine.close()
    model.eval()
    with torch.no_grad():  # without an engine
        logits = model(input_ids=batch_of((8,)).input_ids, use_cache=False).logits
    adapter = torch.cat([p.detach().flatten() for p in trained])
    return losses, gradients(model), adapter, logits


def assert_equal(found, wanted):
    assert found[0] == wanted[0]
    assert all(torch.equal(a, b) for a, b in zip(found[1:], wanted[1:], strict=True))
    assert torch.isfinite(wanted[1]).all() and wanted[1].norm() > 0


CASES = [(name, how) for name in (*sorted(DENSE), "qwen3_moe") for how in ("off", "on", "2")]


@pytest.mark.parametrize(
    ("architecture", "checkpointing"), most_slow(CASES, [("gpt_neox", "off"), ("qwen3_moe", "on")])
)
def test_streamed_equals_whole_to_the_bit(directories, architecture, checkpointing):
    directory = directories(architecture)
    options = {"gradient_checkpointing": checkpointing}
    wanted = train(load(directory), **options)
    base = load(directory, on_host=True)
    streamed = stream(base)
    assert streamed.streamed == LAYERS and sum(len(b) for b in streamed.ring.buffers) < 3 * streamed.layer_bytes
    assert_equal(train(base, beside=True, **options), wanted)


@pytest.mark.parametrize(
    ("count", "slots"), most_slow([(count, slots) for count in (1, 3, 5) for slots in (1, 3, 4)], [(3, 1)])
)
def test_any_number_of_layers_streams_through_any_number_of_buffers(directories, count, slots):
    directory = directories("llama")
    base = load(directory)
    assert stream(base, count, slots).streamed == count
    assert_equal(train(base, gradient_checkpointing="3"), train(load(directory), gradient_checkpointing="3"))


@pytest.mark.slow
def test_peft_keeps_its_own_forward_and_dropout_draws_the_same(directories):
    """DoRA runs through bitsandbytes' own product, which keeps the tensor it read."""
    for lora in ({"dora": True}, {"dropout": 0.3}):
        found = []
        for streams in (True, False):
            base = load(directories("gpt_neox"))
            model = attach(base, **lora)  # DoRA's start reads every weight
            if streams:
                stream(base)
            torch.manual_seed(1)
            found.append(train(base, model=model, gradient_checkpointing="off"))
        assert_equal(*found)


@pytest.mark.slow
def test_the_plain_engine_streams_too(directories):
    for checkpointing in ("on", "off"):
        options = {"kind": "plain", "gradient_checkpointing": checkpointing}
        base = load(directories("llama"))
        stream(base)
        assert_equal(train(base, **options), train(load(directories("llama")), **options))


def test_a_weight_that_is_read_is_the_layers_own(directories):
    whole, base = load(directories("llama")), load(directories("llama"))
    stream(base)
    wanted = dict(four_bit_linears(whole))
    for name, linear in reversed(list(four_bit_linears(base))):
        assert torch.equal(dequantized_weight(linear), dequantized_weight(wanted[name]))


def test_what_lies_in_two_layers_stays_on_the_device(directories):
    base = load(directories("llama"))
    layers = find_layers(find_decoder(base))
    layers[3].self_attn.q_proj.weight = layers[1].self_attn.q_proj.weight
    shared = layers[1].self_attn.q_proj.weight
    before, at = shared.data.clone(), shared.data_ptr()
    stream(base)
    assert shared.data_ptr() == at and torch.equal(shared.data, before)
    assert layers[3].mlp.up_proj.weight.data_ptr() != layers[2].mlp.up_proj.weight.data_ptr()


# ---------------------------------------------------------------- ring and host memory


@given(
    layers=st.integers(1, 7),
    slots=st.integers(1, 5),
    uses=st.lists(st.tuples(st.integers(0, 6), st.sampled_from((1, -1)), st.booleans()), max_size=30),
)
def test_a_layer_is_in_its_buffer_whatever_was_used_before(layers, slots, uses):
    sizes = [5 + number for number in range(layers)]
    ring = Ring(
        HostSource([torch.full((size,), number, dtype=torch.uint8) for number, size in enumerate(sizes)]),
        layers,
        max(sizes),
        CPU,
        slots,
    )
    for number, step, learning in uses:
        number %= layers
        with torch.set_grad_enabled(learning):
            ring.use(number, step)
        assert bool((ring.buffers[ring.slot(number)][: sizes[number]] == number).all())


def test_a_pass_up_and_down_copies_what_it_has_no_room_for_and_nothing_else():
    layers, slots = 7, 3
    ring = Ring(HostSource([torch.zeros(4, dtype=torch.uint8)] * layers), layers, 4, CPU, slots)

    def step():
        for number in range(layers):
            ring.use(number)
        for number in reversed(range(layers)):
            ring.use(number, -1)

    step()
    first, ring.copies = ring.copies, 0
    step()
    assert first == layers + layers - slots and ring.copies == 2 * (layers - slots)


@pytest.mark.parametrize(("learning", "held"), [(False, [0, 3]), (True, [2, 3])])
def test_behind_the_last_layer_comes_the_first_where_no_backward_pass_follows(learning, held):
    ring = Ring(HostSource([torch.zeros(4, dtype=torch.uint8)] * 4), 4, 4, CPU, 2)
    with torch.set_grad_enabled(learning):
        for number in range(4):
            ring.use(number)
    assert ring.held == held


@given(layer_bytes=st.integers(1, 2**33), layers=st.integers(0, 200))
def test_host_memory_comes_in_pieces_of_which_little_is_lost(layer_bytes, layers):
    pieces = piece_sizes(layer_bytes, layers)
    assert sum(held for _, held in pieces) == layers
    assert all(held * layer_bytes <= bytes_ for bytes_, held in pieces)
    assert locked_bytes(layer_bytes, layers) >= layer_bytes * layers
    if layer_bytes <= 2**28 and layers >= 16:
        assert locked_bytes(layer_bytes, layers) <= 1.2 * layer_bytes * layers


def test_nothing_is_allocated_beside_the_layers():
    buffers = list(host_memory.layer_buffers(300, 7, torch.device("cpu"), report_nothing))
    pieces = {buffer.untyped_storage().data_ptr(): buffer.untyped_storage().nbytes() for buffer in buffers}
    assert len(buffers) == 7 and sum(pieces.values()) == 7 * 300


@pytest.mark.parametrize("refused", [False, True])
def test_touched_pages_are_locked_once_and_let_go_with_the_last_view_and_where_refused_cuda_allocates(
    monkeypatch, refused
):
    called, empty = [], torch.empty
    runtime = SimpleNamespace(
        cudaError=SimpleNamespace(success=0),
        cudaHostRegister=lambda *given: called.append(given) or int(refused),
        cudaHostUnregister=lambda address: called.append(address),
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(host_memory, "_forget_error", lambda: None)
    monkeypatch.setattr(torch, "empty", lambda *sizes, pin_memory=False, **given: empty(*sizes, **given))
    buffer = lock_pages(TOUCHED_BYTES)
    (address, bytes_, _), view = called[0], buffer[5:7]
    assert (address == buffer.data_ptr()) != refused and bytes_ == buffer.numel() == TOUCHED_BYTES
    del buffer
    gc.collect()
    assert len(called) == 1, "a view is still there"
    view.fill_(1)
    del view
    gc.collect()
    assert called[1:] == ([] if refused else [address])
