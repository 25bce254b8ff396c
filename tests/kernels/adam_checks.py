"""Checks of AdamW with moments in 8 bits, run by test_triton.py: under Triton's interpreter on a CPU, for real on a GPU."""

import pytest
import torch

from qlora_cli.core.bnb import bitsandbytes as bnb
from qlora_cli.kernels.triton import adam_8bit

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def maps():
    return [bnb.functional.create_dynamic_map(signed).to(DEVICE) for signed in (True, False)]


def nearest(values, codes):
    """Codes of the nearest of some values, where a value below zero keeps its sign."""
    found = (values[:, None] - codes.double()[None]).abs().argmin(1)
    return torch.where((values < 0) & (codes[found] >= 0), found - 1, found)


@pytest.mark.parametrize("signed", [True, False])
def test_each_value_has_the_nearest_code(signed, maps):
    codes = maps[0 if signed else 1].cpu()
    lowest, borders = adam_8bit.tables(codes)
    halves = (codes[:-1].double() + codes[1:].double()) / 2
    near = torch.cat([halves * (1 - 1e-6), halves * (1 + 1e-6), codes.double(), torch.tensor([0.0, 1e-30, 1.0])])
    values = near[(near >= 0) | signed].float()
    bits = values.view(torch.int32)
    key = ((bits & 0x7FFFFFFF) >> (23 - adam_8bit.FRACTION_BITS)) - (
        adam_8bit.LEAST_EXPONENT << adam_8bit.FRACTION_BITS
    )
    key = key.clamp(0, adam_8bit.KEYS - 1) + torch.where(bits < 0, adam_8bit.KEYS, 0)
    found = lowest[key].long()
    assert torch.equal(found + (values >= borders[found]), nearest(values.double(), codes))


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_update_is_adamw_on_what_the_codes_stand_for(decay, maps):
    generator = torch.Generator().manual_seed(0)
    elements, step, rule = 256 * 9 + 40, 3, adam_8bit.Rule(1e-2, (0.9, 0.99), 1e-8, decay)
    blocks = -(-elements // 256)
    values, gradient = (torch.randn(elements, generator=generator).to(DEVICE) for _ in range(2))
    codes = [torch.randint(low, 256, (elements,), generator=generator).to(DEVICE) for low in (0, 1)]
    scales = [(torch.rand(blocks, generator=generator) + 0.1).to(DEVICE) for _ in range(2)]
    gradient[:256], codes[0][:256], codes[1][:256] = 0, 127, 0  # a block without any
    kept = adam_8bit.Moments(*(c.to(torch.uint8) for c in codes), *(s.clone() for s in scales), *maps)
    g, block = gradient.double(), torch.arange(elements, device=DEVICE) // 256
    first, second = (m.double()[c] * s.double()[block] for m, c, s in zip(maps, codes, scales, strict=True))
    first, second = 0.9 * first + 0.1 * g, 0.99 * second + 0.01 * g * g
    change = first / (1 - 0.9**step) / ((second / (1 - 0.99**step)).sqrt() + 1e-8)
    expected = (values.double() - 1e-2 * change) * (1 - 1e-2 * decay)
    adam_8bit.update(values, gradient, kept, rule, step)
    assert (values.double() - expected).abs().max() < 1e-6
    for exact, found, scale, codes_of in zip((first, second), kept[:2], kept[2:4], maps, strict=True):
        most = torch.zeros(blocks, dtype=torch.float64, device=DEVICE).scatter_reduce(0, block, exact.abs(), "amax")
        assert torch.allclose(scale.double(), most, rtol=1e-6)
        wanted = nearest(exact / most.clamp(min=1e-300)[block], codes_of)
        assert (wanted != found.long()).float().mean() < 1e-3  # one that lies halfway
        assert (wanted - found.long()).abs().max() <= 1
