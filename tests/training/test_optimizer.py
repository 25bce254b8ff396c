"""Optimizers by name: each learns on the CPU, and its state comes back bit for bit."""

import json

import pytest
import torch
from torch import nn

from qlora_cli.artifacts import TRAINER_STATE
from qlora_cli.core.bnb import bitsandbytes as bnb
from qlora_cli.core.storage.checkpoint import read_tensors, write_tensors
from qlora_cli.core.training.flat_parameters import TrainableParameters
from qlora_cli.core.training.optimizer import (
    PIECE_BYTES,
    PIECES,
    allocated_state_bytes,
    build_optimizer,
    choose_optimizer,
    load_optimizer_state,
    optimizer_state,
    set_learning_rate,
    state_bytes,
    step_optimizer,
)
from qlora_cli.core.training.state import OPTIMIZER_TENSORS, load_optimizer
from qlora_cli.errors import CheckpointError
from qlora_cli.settings.groups import OPTIMIZERS


def make(
    name: str, seed: int = 0, sizes=((96, 64), (64, 80), (7,)), **waits
) -> tuple[TrainableParameters, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Module()
    for index, size in enumerate(sizes):
        model.register_parameter(f"p{index}", nn.Parameter(torch.randn(size)))
    trained = TrainableParameters(model)
    return trained, build_optimizer(name, trained, weight_decay=0.01, **waits)


def step(trained: TrainableParameters, optimizer: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for buffer in trained.buffers:
        for view in buffer.views:
            view.grad.copy_(torch.randn(view.shape, generator=generator))
    set_learning_rate(optimizer, 1e-2)
    step_optimizer(optimizer)


def values(trained: TrainableParameters) -> list[torch.Tensor]:
    return [buffer.values.detach().clone() for buffer in trained.buffers]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("updates", [3, 0])
@pytest.mark.filterwarnings("error")
def test_a_state_saved_and_loaded_continues_bit_for_bit(name, updates, tmp_path):
    """Also one of before the first update: in float16 the first steps may have no finite gradients."""
    trained, optimizer = make(name)
    before = values(trained)
    for seed in range(updates):
        step(trained, optimizer, seed)
    assert all(torch.equal(a, b) == (not updates) for a, b in zip(before, values(trained), strict=True))
    tensors, numbers = optimizer_state(optimizer)
    write_tensors(tmp_path / "o.safetensors", tensors)
    numbers = json.loads(json.dumps(numbers))

    other, resumed = make(name, seed=9)
    with torch.no_grad():
        for mine, theirs in zip(other.buffers, trained.buffers, strict=True):
            mine.values.copy_(theirs.values)
    load_optimizer_state(resumed, read_tensors(tmp_path / "o.safetensors"), numbers)
    for seed in (3, 4):
        step(trained, optimizer, seed)
        step(other, resumed, seed)
    assert all(torch.equal(a, b) for a, b in zip(values(trained), values(other), strict=True))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_bytes_of_a_state_are_what_is_predicted(name):
    trained, optimizer = make(name, sizes=((4, 32768),))
    step(trained, optimizer, 0)
    found = sum(t.numel() * t.element_size() for t in optimizer_state(optimizer)[0].values())
    assert found == pytest.approx(state_bytes(name, trained.elements), rel=0.02, abs=4096)


@pytest.mark.parametrize(
    ("name", "kind"), [("paged_adamw_8bit", bnb.optim.AdamW8bit), ("lion_8bit", bnb.optim.Lion8bit)]
)
@pytest.mark.filterwarnings("ignore:Paged optimizers")
def test_in_buffers_an_8_bit_optimizer_does_what_it_does_on_separate_tensors(name, kind):
    trained, optimizer = make(name, sizes=((96, 64), (64, 80), (130, 33)))
    separate = [nn.Parameter(view.detach().clone()) for view in trained.buffers[0].views]
    reference = kind(separate, lr=1e-2, weight_decay=0.01)
    for seed in range(3):
        step(trained, optimizer, seed)
        for parameter, view in zip(separate, trained.buffers[0].views, strict=True):
            parameter.grad = view.grad.clone()
        reference.step()
    for parameter, view in zip(separate, trained.buffers[0].views, strict=True):
        assert torch.equal(parameter, view)


def test_weight_decay_is_for_matrices_only():
    trained, optimizer = make("adamw")
    trained.zero_gradients()
    before = values(trained)
    set_learning_rate(optimizer, 1.0)
    step_optimizer(optimizer)
    torch.testing.assert_close(trained.buffers[0].values.detach(), before[0] * 0.99)
    assert torch.equal(trained.buffers[1].values.detach(), before[1])


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_a_state_of_other_parameters_is_refused(name):
    trained, optimizer = make(name)
    step(trained, optimizer, 0)
    tensors, numbers = optimizer_state(optimizer)
    _, resumed = make(name, sizes=((96, 64),))
    with pytest.raises(CheckpointError, match="saved optimizer"):
        load_optimizer_state(resumed, tensors, numbers)


def test_on_disk_it_says_of_which_optimizer_and_parameters_it_is(tmp_path):
    trained, optimizer = make("adamw")
    step(trained, optimizer, 0)
    tensors, numbers = optimizer_state(optimizer)
    write_tensors(tmp_path / OPTIMIZER_TENSORS, tensors)
    written = {"kind": "AdamW", "layout": trained.layout(), "numbers": numbers}
    for change, said in (
        ({"kind": "Lion"}, "is Lion, not AdamW"),
        ({"layout": [["p0"]]}, "of other trained parameters"),
    ):
        (tmp_path / TRAINER_STATE).write_text(json.dumps({"optimizer": written | change}))
        with pytest.raises(CheckpointError, match=said):
            load_optimizer(tmp_path, optimizer, trained)
    (tmp_path / TRAINER_STATE).write_text(json.dumps({"optimizer": written}))
    load_optimizer(tmp_path, optimizer, trained)


def test_a_state_of_another_size_is_refused_by_bitsandbytes_optimizers():
    trained, optimizer = make("adamw_8bit", sizes=((96, 64),))
    step(trained, optimizer, 0)
    _, resumed = make("adamw_8bit", sizes=((96, 96),))
    with pytest.raises(CheckpointError, match="does not fit"):
        load_optimizer_state(resumed, *optimizer_state(optimizer))


def test_defaults_follow_the_device():
    assert choose_optimizer(None, torch.device("cpu")) == "adamw"
    assert choose_optimizer(None, torch.device("cuda")) == "paged_adamw_8bit"
    assert choose_optimizer("sgd", torch.device("cuda")) == "sgd"


def test_a_paged_optimizer_asks_nothing_of_the_allocator():
    assert allocated_state_bytes("paged_adamw_8bit", 10**6) == 0
    assert allocated_state_bytes("adamw_8bit", 10**6) == state_bytes("adamw_8bit", 10**6) > 2 * 10**6


def test_a_state_that_waits_on_the_host_asks_for_its_share_and_for_pieces_on_their_way():
    parameters = 10**9
    whole, rooms = state_bytes("paged_adamw_8bit", parameters), PIECES * PIECE_BYTES
    assert allocated_state_bytes("paged_adamw_8bit", parameters, 0.75) == int(0.25 * whole) + rooms
    assert allocated_state_bytes("paged_adamw_8bit", 10**6, 1.0) == state_bytes("paged_adamw_8bit", 10**6) < rooms


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_on_a_gpu_a_state_continues_bit_for_bit_and_stays_paged(name, tmp_path):
    def on_gpu(seed: int):
        torch.manual_seed(seed)
        model = nn.Linear(1024, 512, bias=False).cuda()
        trained = TrainableParameters(model)
        return trained, build_optimizer(name, trained, weight_decay=0.01)

    def gpu_step(trained, optimizer, seed):
        trained.buffers[0].values.grad.copy_(torch.randn(512 * 1024, generator=torch.Generator().manual_seed(seed)))
        set_learning_rate(optimizer, 1e-2)
        step_optimizer(optimizer)

    trained, optimizer = on_gpu(0)
    torch.ones(8, 8, device="cuda") @ torch.ones(8, 8, device="cuda")  # adafactor multiplies: cuBLAS takes a workspace
    before = torch.cuda.memory_allocated()
    for seed in range(3):
        gpu_step(trained, optimizer, seed)
    taken = torch.cuda.memory_allocated() - before
    assert taken <= 1.05 * allocated_state_bytes(name, trained.elements) + 0.05 * state_bytes(name, trained.elements)
    tensors, numbers = optimizer_state(optimizer)
    write_tensors(tmp_path / "o.safetensors", tensors)
    other, resumed = on_gpu(1)
    with torch.no_grad():
        other.buffers[0].values.copy_(trained.buffers[0].values)
    load_optimizer_state(resumed, read_tensors(tmp_path / "o.safetensors"), numbers)
    for seed in (3, 4):
        gpu_step(trained, optimizer, seed)
        gpu_step(other, resumed, seed)
    assert torch.equal(trained.buffers[0].values, other.buffers[0].values)
    if name.startswith("paged"):
        assert resumed.state[other.buffers[0].values]["state1"].is_paged


def test_lora_plus_updates_as_in_peft(tiny_model, load_tiny):
    """A and B each by its own rate, and the same values as from PEFT's optimizer (LoRA+, arXiv:2402.12354)."""
    from peft.optimizers import create_loraplus_optimizer

    from qlora_cli.core.adapters.lora import attach_adapter
    from qlora_cli.settings.groups import LoraSettings

    ours, theirs = (attach_adapter(load_tiny("llama")[0], LoraSettings(rank=4), seed=0) for _ in range(2))
    trained = TrainableParameters(ours, 16.0)
    optimizer = build_optimizer("adamw", trained, weight_decay=0.01)
    peer = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0, loraplus_weight_decay=0.01
    )
    pairs = [
        (name, mine, other)
        for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True)
        if mine.requires_grad
    ]
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for _, mine, other in pairs:
            other.grad = torch.randn(mine.shape, generator=generator)
            mine.grad.copy_(other.grad)
        set_learning_rate(optimizer, 1e-3)
        step_optimizer(optimizer)
        peer.step()
    for name, mine, other in pairs:
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-7, msg=name)
    assert {group["rate"] for group in optimizer.param_groups} == {1.0, 16.0}


@pytest.mark.parametrize("share", [1.0, 0.4, 0.0])
@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name.startswith("paged")])
@pytest.mark.filterwarnings("ignore:Paged optimizers")
def test_a_state_that_waits_on_the_host_is_updated_in_pieces_to_the_same_bits(name, share):
    pieces = {"waiting_share": share, "piece_bytes": 2048}  # a dozen pieces of each buffer
    whole, plain = make(name)
    parts, waiting = make(name, on_host=lambda event: pytest.fail(str(event)), **pieces)
    for seed in range(3):
        step(whole, plain, seed)
        step(parts, waiting, seed)
        if seed == 1:
            optimizer_state(waiting)  # as where a checkpoint is saved
    for one, other in zip(whole.buffers, parts.buffers, strict=True):
        assert torch.equal(one.values, other.values)
    (tensors, numbers), (own_tensors, own_numbers) = optimizer_state(plain), optimizer_state(waiting)
    assert numbers == own_numbers and all(torch.equal(tensors[key], own_tensors[key]) for key in tensors)
    again, resumed = make(name, on_host=lambda event: None, **pieces)
    step(again, resumed, 9)
    for one, other in zip(whole.buffers, again.buffers, strict=True):
        other.values.data.copy_(one.values)
    load_optimizer_state(resumed, *optimizer_state(plain))
    step(whole, plain, 7)
    step(again, resumed, 7)
    assert all(torch.equal(a.values, b.values) for a, b in zip(whole.buffers, again.buffers, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name.startswith("paged")])
def test_on_a_gpu_a_state_on_the_host_is_updated_to_the_same_bits(name):
    def gpu_make(**how):
        torch.manual_seed(0)
        trained = TrainableParameters(nn.Linear(4096, 1500, bias=False).cuda())
        return trained, build_optimizer(name, trained, weight_decay=0.01, **how)

    waits = {"on_host": lambda event: pytest.fail(str(event)), "waiting_share": 0.6, "piece_bytes": 2**20}
    (whole, plain), (parts, waiting) = gpu_make(), gpu_make(**waits)
    for seed in range(4):
        step(whole, plain, seed)
        step(parts, waiting, seed)
    assert torch.equal(whole.buffers[0].values, parts.buffers[0].values)
    tensors, own = optimizer_state(plain)[0], optimizer_state(waiting)[0]
    assert own["0.state1"].is_pinned()
    assert all(torch.equal(tensors[key].cpu(), own[key].cpu()) for key in tensors)
