"""Tiles over tokens change nothing but memory: losses and gradients are those of whole rows."""

import pytest
import torch
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from qlora_cli.core.adapters.lora import attach_adapter
from qlora_cli.core.engine.lora_linear import StepState
from qlora_cli.core.models.files import resolve_model
from qlora_cli.core.models.structure import build_empty
from qlora_cli.core.planning.activation_trace import trace_model, trace_tiles
from qlora_cli.core.tiling.token_tiles import TokenTiles, fused_norm, run_norm, tile_of
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_in_one_kernel_is_as_near_as_the_models_own_and_another_norm_is_left(dtype):
    torch.manual_seed(0)
    x, grad = 3 * torch.randn(1, 70, 96), torch.randn(1, 70, 96)
    own = LlamaRMSNorm(96, 1e-3)
    with torch.no_grad():
        own.weight.normal_(1, 0.2)

    def both_ways(norm, dtype):
        given = x.to(dtype).requires_grad_()
        out = norm(given)
        return out.detach(), *torch.autograd.grad(out, given, grad.to(dtype))

    exact = both_ways(own.double().requires_grad_(False), torch.float64)
    norm = fused_norm(own.to(dtype), x.to(dtype))
    for expected, ours, theirs in zip(exact, both_ways(norm, dtype), both_ways(own, dtype), strict=True):
        assert (ours - expected).norm() <= 2 * (theirs - expected).norm()
    other = Gemma2RMSNorm(96, 1e-3).to(dtype).requires_grad_(False)  # of which the weight is one less
    assert fused_norm(other, x.to(dtype)) is None
    assert fused_norm(nn.LayerNorm(96, 1e-3, bias=False, dtype=dtype).requires_grad_(False), x.to(dtype)) is None
    assert fused_norm(own.requires_grad_(), x.to(dtype)) is None


@pytest.mark.parametrize(("tokens", "called"), [(2**19, "norm"), (2**19 + 1, "tiles")])
def test_norms_of_more_values_than_32_bits_count_go_in_tiles(tokens, called):
    x = torch.empty(1, tokens, 8192, dtype=torch.bfloat16, device="meta")
    assert run_norm(lambda _: "norm", lambda _: "tiles", x) == called


@pytest.mark.gpu
def test_norms_of_long_rows_are_one_kernel_on_a_card():
    torch.manual_seed(0)
    norm, x = LlamaRMSNorm(256).bfloat16().cuda().requires_grad_(False), torch.randn(1, 500, 256).bfloat16().cuda()
    grad = torch.randn_like(x)
    layer = nn.Sequential(norm, nn.Linear(256, 8, dtype=torch.bfloat16, device="cuda"))
    found = []
    tiles = TokenTiles(nn.Module(), [layer], lambda: layer(x[:, :64]), StepState(torch.device("cuda"), 0))
    for tile_tokens in (None, 128):
        if tile_tokens:
            tiles.install(tile_tokens)
        given = x.clone().requires_grad_()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
            out = norm(given)
            torch.cuda.synchronize()
        found.append((out, *torch.autograd.grad(out, given, grad), len(seen.key_averages())))
    (own, own_gradient, many), (fused, gradient, few) = found
    assert few < many and list(tiles.norms) == [norm]
    assert (fused - own).norm() <= 2**-7 * own.norm() and (
        gradient - own_gradient
    ).norm() <= 2**-7 * own_gradient.norm()


@pytest.mark.parametrize("architecture", sorted(FEW))
def test_a_layer_in_tiles_is_predicted_to_take_less(tiny_model, architecture):
    config = resolve_model(str(tiny_model(architecture))).config
    model = attach_adapter(build_empty(config), LoraSettings(rank=4, alpha=8))
    layers = zip(trace_model(model, fused=True).layers, trace_tiles(model, 1024).layers, strict=True)
    for whole, tiled in layers:
        before, now = (dict(each.recomputed.backward.moments)[0].per_token for each in (whole, tiled))
        assert now < 0.7 * before
    assert not any("forward" in vars(module) for module in model.modules())
