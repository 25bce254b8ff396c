"""Checks of the attention of one new token, run by test_triton.py: by the interpreter on a CPU, for real on a GPU."""

import pytest
import torch

from qlora_cli.kernels.decode.attention import attend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.each_choice


def exact(query, keys, values, positions, scale, window, softcap):
    """Row by row in float64, from caches that hold the new token already."""
    rows, heads, _, size = query.shape
    groups = heads // keys.shape[1]
    out = torch.empty(rows, 1, heads, size, dtype=torch.float64, device=DEVICE)
    for row, position in enumerate(positions.tolist()):
        lowest = 0 if window is None else max(0, position + 1 - window)
        key = keys[row, :, lowest : position + 1].double().repeat_interleave(groups, 0)
        value = values[row, :, lowest : position + 1].double().repeat_interleave(groups, 0)
        scores = torch.einsum("hd,hsd->hs", query[row, :, 0].double(), key) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        out[row, 0] = torch.einsum("hs,hsd->hd", scores.softmax(-1), value)
    return out


@pytest.mark.parametrize(
    ("heads", "key_heads", "size", "capacity", "window", "softcap"),
    [
        (4, 4, 64, 192, None, None),
        (8, 2, 80, 128, None, None),
        (4, 1, 16, 700, None, 5.0),
        (2, 2, 32, 700, 100, None),
        (2, 2, 32, 192, 40, 3.0),
    ],
)
def test_matches_float64_and_stores_the_new_token(heads, key_heads, size, capacity, window, softcap):
    positions = torch.tensor([0, 5, capacity // 2, capacity - 1], device=DEVICE)
    rows = len(positions)
    query, new_key, new_value = (
        torch.randn(rows, 1, count, size, device=DEVICE).transpose(1, 2) for count in (heads, key_heads, key_heads)
    )
    keys, values = (torch.randn(rows, key_heads, capacity, size, device=DEVICE) for _ in range(2))
    wanted_keys, wanted_values = keys.clone(), values.clone()
    at = (torch.arange(rows, device=DEVICE)[:, None], torch.arange(key_heads, device=DEVICE)[None], positions[:, None])
    wanted_keys[at], wanted_values[at] = new_key.squeeze(2), new_value.squeeze(2)
    # What lies beyond a row's end is of another answer and may be anything.
    for row, position in enumerate(positions.tolist()):
        keys[row, :, position:] = values[row, :, position:] = float("nan")
    scale = size**-0.5
    found = attend(query, new_key, new_value, keys, values, positions, scale=scale, window=window, softcap=softcap)
    expected = exact(query, wanted_keys, wanted_values, positions, scale, window, softcap)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    for row, position in enumerate(positions.tolist()):
        assert torch.equal(keys[row, :, : position + 1], wanted_keys[row, :, : position + 1])
        assert torch.equal(values[row, :, : position + 1], wanted_values[row, :, : position + 1])


@pytest.mark.parametrize(("capacity", "window", "dtype"), [(40, None, torch.float32), (700, 50, torch.float16)])
def test_several_tokens_of_one_row_give_the_bits_of_one_after_another(capacity, window, dtype):
    """Whole rows, and rows that are divided among programs."""
    count, key_heads, size = 5, 2, 16
    positions = torch.arange(20, 20 + count, device=DEVICE)
    query, new_key, new_value = (
        torch.randn(count, heads, 1, size, device=DEVICE, dtype=dtype) for heads in (4, key_heads, key_heads)
    )
    keys, values = (torch.randn(1, key_heads, capacity, size, device=DEVICE, dtype=dtype) for _ in range(2))
    apart = []
    for n in range(count):
        one = slice(n, n + 1)
        given = query[one], new_key[one], new_value[one], keys, values, positions[one]
        apart.append(attend(*given, scale=0.25, window=window))
    together = attend(query, new_key, new_value, keys, values, positions, scale=0.25, window=window, shared=True)
    assert torch.equal(together, torch.cat(apart))  # the tokens' keys and values are in the row by now


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_error_is_within_twice_that_of_torch(dtype):
    if DEVICE == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter cuts to bfloat16 where the GPU rounds")
    rows, heads, size, capacity = 2, 4, 64, 320
    positions = torch.tensor([100, 319], device=DEVICE)
    query, new_key, new_value = (torch.randn(rows, heads, 1, size, device=DEVICE).to(dtype) for _ in range(3))
    keys, values = (torch.randn(rows, heads, capacity, size, device=DEVICE).to(dtype) for _ in range(2))
    found = attend(query, new_key, new_value, keys, values, positions, scale=0.2)
    truth = exact(query, keys, values, positions, 0.2, None, None)
    mask = torch.arange(capacity, device=DEVICE) <= positions[:, None]
    eager = torch.nn.functional.scaled_dot_product_attention(
        query, keys, values, attn_mask=mask[:, None, None], scale=0.2
    ).transpose(1, 2)
    assert (found.double() - truth).norm() <= 2 * (eager.double() - truth).norm()


def test_many_parts_give_what_one_gives():
    positions = torch.tensor([0, 63, 64, 200, 255], device=DEVICE)
    query = torch.randn(5, 4, 1, 32, device=DEVICE)
    new = torch.randn(2, 5, 2, 1, 32, device=DEVICE)
    caches = torch.randn(2, 5, 2, 256, 32, device=DEVICE)
    one = attend(query, *new, *caches.clone(), positions, scale=0.2)
    many = attend(query, *new, *caches.clone(), positions, scale=0.2, undivided=0)
    torch.testing.assert_close(many, one, atol=1e-6, rtol=1e-5)
