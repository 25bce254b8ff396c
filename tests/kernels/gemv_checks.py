"""Checks of the decoding kernels, run by test_triton.py: under Triton's interpreter on a CPU, for real on a GPU."""

import pytest
import torch

from qlora_cli.core.bnb import bitsandbytes
from qlora_cli.core.decoding.prompt_lookup import WIDTH, PromptLookUp, trusted_kernels
from qlora_cli.kernels.decode import gemv
from qlora_cli.kernels.decode.fused_projections import gate_and_project, normalise_and_project
from qlora_cli.kernels.decode.gemv import ROW_UNIT, StackedAdapter, Tiling
from qlora_cli.kernels.decode.pointwise import add_and_rms_norm, gate
from qlora_cli.kernels.gated import GATES
from qlora_cli.kernels.weights import FrozenWeight

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.each_choice
GPU_ONLY = pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter cuts to bfloat16 where the GPU rounds")


def stack(row_counts, columns, *, quant_type="nf4", nested=True, dtype=torch.float32):
    """A stack, and the values of its weights as bitsandbytes dequantises them."""
    parts, values = [], []
    for rows in row_counts:
        dense = torch.randn(rows, columns, dtype=dtype, device=DEVICE) * (0.5 + torch.rand(1, device=DEVICE).item())
        packed, state = bitsandbytes.functional.quantize_4bit(dense, quant_type=quant_type, compress_statistics=nested)
        values.append(bitsandbytes.functional.dequantize_4bit(packed, state))
        parts.append((packed.flatten(), state))
    second = [state.state2 for _, state in parts]
    statistics = {}
    if nested:
        statistics = {
            "nested_absmax": torch.cat([s.absmax for s in second]),
            "nested_code": second[0].code,
            "offset": torch.cat(
                [state.offset.expand(s.absmax.numel()) for (_, state), s in zip(parts, second, strict=True)]
            ),
        }
    weight = FrozenWeight(
        rows=sum(row_counts),
        columns=columns,
        packed=torch.cat([packed for packed, _ in parts]),
        absmax=torch.cat([state.absmax for _, state in parts]),
        code=parts[0][1].code,
        **statistics,
    )
    return weight, torch.cat(values)


def adapt(row_counts, columns, ranks, *, dtype=torch.float32):
    """Adapters of a stack, and the dense product scaling B A of all of them."""
    widest = max(ranks)
    a = torch.zeros(len(ranks) * widest, columns, device=DEVICE)
    b = torch.zeros(sum(row_counts), widest, device=DEVICE)
    scaling = torch.zeros(len(ranks) * widest, device=DEVICE)
    first_rank, dense, row = [], [], 0
    for number, (rows, rank) in enumerate(zip(row_counts, ranks, strict=True)):
        at = number * widest
        a[at : at + rank] = torch.randn(rank, columns, device=DEVICE)
        b[row : row + rows, :rank] = torch.randn(rows, rank, device=DEVICE) / 8
        scaling[at : at + widest] = 0.25 + number
        first_rank += [at] * -(-rows // ROW_UNIT)
        row += rows
    a, b = a.to(dtype), b.to(dtype)
    row = 0
    for number, rows in enumerate(row_counts):
        at = number * widest
        dense.append((0.25 + number) * b[row : row + rows].double() @ a[at : at + widest].double())
        row += rows
    first = torch.tensor(first_rank, dtype=torch.int32, device=DEVICE)
    return StackedAdapter(a, scaling, b, first), torch.cat(dense)


def exact(x, values, adapter_product, bias):
    """The product in float64."""
    dense = values.double() if adapter_product is None else values.double() + adapter_product
    return x.double() @ dense.T + (0 if bias is None else bias.double())


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("tokens", [1, 3])
def test_every_format_is_read(quant_type, nested, tokens):
    weight, values = stack([96], 256, quant_type=quant_type, nested=nested)
    x = torch.randn(tokens, 256, device=DEVICE)
    y = gemv.multiply(x, weight)
    torch.testing.assert_close(y.double(), exact(x, values, None, None), atol=2e-4, rtol=1e-5)


@pytest.mark.parametrize("tokens", [1, 2, 17, 64] if DEVICE == "cuda" else [1, 17])
@pytest.mark.parametrize(
    ("row_counts", "columns", "ranks"),
    [([64, 64], 256, [8, 4]), ([70], 192, [16]), ([4], 1600, [1])],
)
def test_stacked_weights_with_adapters_and_bias(tokens, row_counts, columns, ranks):
    weight, values = stack(row_counts, columns)
    adapter, product = adapt(row_counts, columns, ranks)
    bias = torch.randn(sum(row_counts), device=DEVICE)
    x = torch.randn(tokens, columns, device=DEVICE) / 4
    y = gemv.multiply(x, weight, adapter, bias)
    torch.testing.assert_close(y.double(), exact(x, values, product, bias), atol=5e-4, rtol=1e-5)
    adapter.scaling.zero_()  # turned off, as when the base is to speak
    torch.testing.assert_close(
        gemv.multiply(x, weight, adapter, bias).double(), exact(x, values, None, bias), atol=5e-4, rtol=1e-5
    )


@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize(
    ("tiling", "nested"),
    [
        (None, True),
        (None, False),
        (Tiling(1, 1, 1), False),
        (Tiling(2, 2, 4), True),
        (Tiling(4, 2, 1), False),
        (Tiling(1, 8, 1, registers=128), True),
    ],
)
def test_lanes_of_any_tiling_give_the_exact_product(tokens, tiling, nested, monkeypatch):
    if DEVICE == "cpu":
        from tests.kernels.lane_emulation import emulate

        emulate(monkeypatch)
    row_counts, columns, ranks = ([64, 64], 768, [8, 4]) if tokens == 9 else ([40], 320, [16 if nested else 72])
    weight, values = stack(row_counts, columns, nested=nested)
    adapter, product = adapt(row_counts, columns, ranks, dtype=torch.float16)
    bias = torch.randn(sum(row_counts), device=DEVICE).half()
    x = torch.randn(tokens, columns, device=DEVICE).half() / 4
    assert gemv.takes_lanes(x, weight)
    y = gemv.multiply(x, weight, adapter, bias, tiling=tiling)
    truth = exact(x, values, product, bias)
    assert (y.double() - truth).abs().max() < 2e-3 * truth.abs().max()
    assert (y.double() - truth).norm() < 1e-3 * truth.norm()


@pytest.mark.parametrize("dtype", [pytest.param(torch.bfloat16, marks=GPU_ONLY), torch.float16])
@pytest.mark.parametrize("tokens", [1, 8, pytest.param(64, marks=GPU_ONLY)])
def test_16_bit_error_is_within_twice_that_of_dequantise_and_multiply(dtype, tokens):
    rows, columns = (64, 512) if DEVICE == "cpu" else (4096, 4096)
    weight, values = stack([rows], columns, dtype=dtype)
    adapter, product = adapt([rows], columns, [16], dtype=dtype)
    x = torch.randn(tokens, columns, device=DEVICE).to(dtype)
    truth = exact(x, values, product, None)
    eager = x @ values.T + ((x @ adapter.a.T) * adapter.scaling.to(dtype)) @ adapter.b.T
    error = (gemv.multiply(x, weight, adapter).double() - truth).norm()
    assert error <= 2 * (eager.double() - truth).norm()
    assert error < 0.01 * truth.norm()


@GPU_ONLY
@pytest.mark.parametrize("tokens", [8, 40])
def test_shuffled_look_ups_are_the_loads(tokens):
    weight, _ = stack([512], 1024, dtype=torch.float32)
    adapter, _ = adapt([512], 1024, [16])
    x = torch.randn(tokens, 1024, device=DEVICE)
    found = [gemv.multiply(x, weight, adapter, shuffle=shuffle) for shuffle in (True, False)]
    assert torch.equal(*found)


def test_a_token_is_multiplied_as_if_it_were_alone():
    """To the bit, with however many others up to seven."""
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    weight, _ = stack((64,), 128, dtype=dtype)
    adapter, _ = adapt((64,), 128, (4,), dtype=dtype)
    x = torch.randn(8, 128, device=DEVICE, dtype=dtype)
    together = gemv.multiply(x, weight, adapter)
    for count in (1, 3, 7) if DEVICE == "cuda" else (1,):
        found = gemv.multiply(x[:count].contiguous(), weight, adapter)
        assert torch.equal(found, together[:count])


@pytest.mark.parametrize("width", [1, WIDTH])
def test_steps_with_guesses_are_those_of_torch(width):
    """Rows in which something is found and nothing, longer than what a program looks at together; guesses right and wrong."""
    assert trusted_kernels(torch.device(DEVICE)) is not None
    generator = torch.Generator().manual_seed(width)
    for length, right in ((1, 0), (5, 2), (9, 7), (30, 0), (1500, 5)):
        ids = torch.randint(0, 3, (length,), generator=generator).to(DEVICE)
        last, found = torch.tensor([length - 1], device=DEVICE), []
        for fused in (False, True):
            look_up = PromptLookUp(2000, torch.device(DEVICE), fused=fused)
            look_up.start(ids, length - 1, ids[-1])
            tokens, places = look_up.extend(ids[-1:, None], last, width)
            guessed = look_up.guess(last)
            chosen = torch.cat([guessed, guessed[:1]])[:width].clamp(min=0)
            chosen[right:] += 1
            taken = look_up.accept(chosen, last)
            found.append([tokens, places, taken, look_up.report, look_up.state()[0], look_up.guess(last + taken + 1)])
        assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("offset", "round_first"), [(0.0, True), (1.0, False)])
def test_what_reads_a_norm_is_projected_with_it(offset, round_first, dtype):
    x, y = torch.randn(2, 3, 1, 600, device=DEVICE).to(dtype)
    weight = torch.randn(600, device=DEVICE).to(dtype)
    adapter, _ = adapt([64, 64], 600, [5, 2], dtype=dtype)
    ways = {"offset": offset, "round_first": round_first}
    expected = add_and_rms_norm(x, y, weight, 1e-5, **ways)
    *found, projected = normalise_and_project(x, y, weight, 1e-5, adapter, **ways)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1])
    alone = normalise_and_project(x[1:2], y[1:2], weight, 1e-5, adapter, **ways)
    assert torch.equal(alone[1], found[1][1:2]) and torch.equal(alone[2], projected[:, 1:2])
    assert (projected - gemv.project(found[1].view(3, 600), adapter)).norm() < 1e-6 * projected.norm()


@pytest.mark.parametrize("kind", sorted(GATES))
def test_what_reads_a_gate_is_projected_with_it(kind):
    whole = torch.randn(3, 1, 1200, device=DEVICE)
    adapter, _ = adapt([64], 600, [5])
    gated, projected = gate_and_project(whole[..., :600], whole[..., 600:], kind, adapter)
    assert torch.equal(gated, gate(whole[..., :600], whole[..., 600:], kind))
    assert (projected - gemv.project(gated.view(3, 600), adapter)).norm() < 1e-6 * projected.norm()
    alone = gate_and_project(whole[1:2, :, :600], whole[1:2, :, 600:], kind, adapter)
    assert torch.equal(alone[0], gated[1:2]) and torch.equal(alone[1], projected[:, 1:2])


def test_shapes_that_do_not_fit_are_refused():
    weight, _ = stack([64], 128)
    for shape in ((1, 64), (65, 128)):
        with pytest.raises(ValueError, match="do not suit"):
            gemv.multiply(torch.randn(shape, device=DEVICE), weight)
    with pytest.raises(ValueError, match="do not suit"):
        gemv.multiply(torch.randn(128, 2, device=DEVICE).T, weight)
