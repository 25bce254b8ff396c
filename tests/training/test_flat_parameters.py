"""Trainable parameters in buffers: the model computes, learns and saves as if they were separate."""

import copy

import torch
from torch import nn

from qlora_cli.core.training import flat_parameters as module
from qlora_cli.core.training.flat_parameters import ALIGNMENT_ELEMENTS, TrainableParameters


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3), nn.LayerNorm(3))
    model[1].weight.requires_grad_(False)
    return model


def test_the_model_computes_and_its_gradients_gather_in_the_buffers():
    model, plain = make_model(), make_model()
    trained = TrainableParameters(model)
    x = torch.randn(4, 5)
    for m in (model, plain):
        for _ in range(2):  # gradients of two micro-batches add up
            m(x).square().sum().backward()
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
        assert (ours.grad is None) == (theirs.grad is None) and (
            theirs.grad is None or torch.equal(ours.grad, theirs.grad)
        )
    norm = nn.utils.get_total_norm([p.grad for p in plain.parameters() if p.grad is not None])
    torch.testing.assert_close(trained.gradient_norm(), norm)
    trained.scale_gradients(0.5)
    assert torch.equal(model[0].weight.grad, plain[0].weight.grad / 2)
    trained.zero_gradients()
    assert model[0].weight.grad.abs().sum() == 0


def test_matrices_decay_and_vectors_do_not_and_nothing_frozen_is_there():
    trained = TrainableParameters(make_model())
    assert {name: b.decays for b in trained.buffers for name in b.names} == {
        "0.weight": True, "0.bias": False, "1.bias": False, "2.weight": False, "2.bias": False,
    }  # fmt: skip


def test_a_change_of_the_buffer_is_a_change_of_the_model_and_back():
    model = make_model()
    trained = TrainableParameters(model)
    with torch.no_grad():
        trained.buffers[0].values.fill_(3)
        assert bool((model[0].weight == 3).all())
        model[0].weight.copy_(torch.full((7, 5), 4.0))
    assert bool((trained.buffers[0].values[:35] == 4).all())


def test_no_two_parameters_share_a_quantisation_block():
    for buffer in TrainableParameters(make_model()).buffers:
        starts = [view.data_ptr() - buffer.values.data_ptr() for view in buffer.views]
        assert all(start % (4 * ALIGNMENT_ELEMENTS) == 0 for start in starts)


def test_a_gradient_that_is_not_finite_shows_in_the_norm():
    model = make_model()
    trained = TrainableParameters(model)
    model[2].bias.grad[1] = torch.nan
    assert not torch.isfinite(trained.gradient_norm())


def test_buffers_are_cut_before_they_grow_too_long(monkeypatch):
    monkeypatch.setattr(module, "LARGEST_BUFFER_ELEMENTS", 2 * ALIGNMENT_ELEMENTS)
    model = make_model()
    reference = copy.deepcopy(model)
    trained = TrainableParameters(model)
    assert [len(b.names) for b in trained.buffers] == [1, 2, 2]
    x = torch.randn(2, 5)
    assert torch.equal(model(x), reference(x))
