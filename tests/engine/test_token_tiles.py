"""Tiles over tokens change nothing but memory: losses and gradients are those of whole rows."""

import pytest
import torch
from torch import nn

from qlora_cli.core.adapters.lora import attach_adapter
from qlora_cli.core.engine.lora_linear import StepState
from qlora_cli.core.models.files import resolve_model
from qlora_cli.core.models.structure import build_empty
from qlora_cli.core.planning.activation_trace import trace_model, trace_tiles
from qlora_cli.core.tiling.token_tiles import TokenTiles, tile_of
from qlora_cli.settings.groups import LoraSettings
from tests.conftest import ARCHITECTURES, most_slow
from tests.engine.test_engine import CPU, adapted, batch_of, step

FEW = {"llama", "gemma2"}
LENGTHS = (170, 7, 100)
PARTS = {"off": 0.0, "on": 0.1}


@pytest.mark.each_choice
@pytest.mark.parametrize("checkpointing", ["on", "off"])
@pytest.mark.parametrize("architecture", most_slow(ARCHITECTURES, FEW))
def test_loss_and_gradients_are_those_of_whole_rows(load_tiny, architecture, checkpointing):
    # What adapters drop out has to be the same, whichever tile a token is in.
    model, batch = adapted(load_tiny, architecture, dropout=PARTS[checkpointing]), batch_of(LENGTHS)
    torch.manual_seed(3)
    whole_loss, whole, _ = step(model, batch, gradient_checkpointing=checkpointing)
    torch.manual_seed(3)
    loss, found, engine = step(model, batch, gradient_checkpointing=checkpointing, tile_tokens=128)
    assert engine.tiles.found, "nothing of a layer runs in tiles"
    assert torch.allclose(loss, whole_loss, rtol=1e-6)
    assert (found - whole).norm() <= 1e-5 * whole.norm()
    assert not any(tile_of(module) for module in model.modules()), "a tile stayed"


class Leaky(nn.Module):
    """A layer of one part that treats each token by itself and one that looks back, ever so little."""

    def __init__(self):
        super().__init__()
        self.own, self.past, self.norm = (
            nn.Sequential(nn.Linear(8, 8), nn.GELU()),
            nn.Sequential(Past()),
            nn.LayerNorm(8),
        )

    def forward(self, x):
        return self.norm(x + self.own(x) + self.past(x))


class Past(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.full((8,), 1e-6))

    def forward(self, x):
        return x + self.weight * nn.functional.pad(x[:, :-1], (0, 0, 1, 0))


def test_a_part_that_looks_back_is_left_whole():
    torch.manual_seed(0)
    layer, x = Leaky(), torch.randn(1, 64, 8)
    tiles = TokenTiles(nn.Module(), [layer], lambda: layer(x), StepState(CPU, 0))
    assert set(tiles.found) == {layer.own, layer.norm}


def test_a_row_of_many_tiles_has_the_gradients_of_the_whole():
    torch.manual_seed(0)
    layer, x = Leaky().double(), torch.randn(1, 500, 8, dtype=torch.float64)
    tiles = TokenTiles(nn.Module(), [layer], lambda: layer(x[:, :64]), StepState(CPU, 0))

    def gradients():
        given = x.clone().requires_grad_()
        weights = [*layer.parameters()]
        out = layer(given)
        return [out, *torch.autograd.grad(out.square().sum(), [given, *weights])]

    own = gradients()
    tiles.install(128)
    for found, expected in zip(gradients(), own, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    tiles.remove()
    assert not any("forward" in vars(module) for module in layer.modules())


@pytest.mark.parametrize("architecture", sorted(FEW))
def test_a_layer_in_tiles_is_predicted_to_take_less(tiny_model, architecture):
    config = resolve_model(str(tiny_model(architecture))).config
    model = attach_adapter(build_empty(config), LoraSettings(rank=4, alpha=8))
    layers = zip(trace_model(model, fused=True).layers, trace_tiles(model, 1024).layers, strict=True)
    for whole, tiled in layers:
        before, now = (dict(each.recomputed.backward.moments)[0].per_token for each in (whole, tiled))
        assert now < 0.7 * before
    assert not any("forward" in vars(module) for module in model.modules())
