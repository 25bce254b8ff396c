"""Arithmetic of a merge, by blocks of rows: the 4-bit round trip of a weight, and W + scaling * B @ A in float32.

The round trip is bit for bit that of bitsandbytes, which (0.50) quantises on the CPU with a binary search a weight, 32 ns
each on one core (EPYC, AVX-512); here it is 4 ns, because two look-ups in a table that fits the first cache replace the
search.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import cache

import torch

from qlora_cli.core.merge.delta import WeightDelta
from qlora_cli.core.models.quantization import BLOCK_SIZE, four_bit_values, round_trip, round_trip_constants
from qlora_cli.errors import ModelError
from qlora_cli.settings.groups import QuantizationSettings

BINS = 16  # a unit: bins of 1/16 hold at most one border between NF4 values, the closest lying 0.08 apart
SMALLEST_CONSTANT = 1e-38  # bitsandbytes' floor under the largest magnitude of a block
ROWS_ELEMENTS = 2**17  # elements worked on at a time: 512 KiB of float32 stay in the second cache

RowsOf = Callable[[int, int], torch.Tensor]  # (start, stop) → (stop - start, in), fresh float32 unless said otherwise


# ---------------------------------------------------------------- low-rank update


def merge_rows(
    rows_of: RowsOf, delta: WeightDelta, tensors: Mapping[str, torch.Tensor], *, rows: int, step: int
) -> Iterator[torch.Tensor]:
    """The merged weight of `rows` rows, `step` of them at a time, from the first to the last.

    Linear layers: W + scaling * B @ A, with DoRA its rows scaled to the magnitudes
    (https://arxiv.org/abs/2402.09353, equation 5). Embeddings: W + scaling * (B @ A)^T, with DoRA its columns scaled.

    Args:
        rows_of: Gives rows of W as fresh float32 tensors on the device of `tensors`.
        delta: What is done to W.
        tensors: Those it names, in float32.
        rows: Of W.
        step: Rows made at a time.
    """

    a, b, magnitude, trained = (
        tensors[name] if name else None for name in (delta.a, delta.b, delta.magnitude, delta.rows)
    )
    device = None if trained is None else trained.device
    indices = torch.tensor(delta.token_indices, dtype=torch.int64, device=device)

    def updated(start: int, stop: int) -> torch.Tensor:
        part = rows_of(start, stop)
        if a is not None and b is not None:
            if delta.embedding:
                part.addmm_(a[:, start:stop].T, b.T, alpha=delta.scaling)
            else:
                part.addmm_(b[start:stop], a, alpha=delta.scaling)
        return part

    starts = range(0, rows, step)
    columns = None
    if magnitude is not None and delta.embedding:
        squares = sum(updated(s, min(s + step, rows)).double().square().sum(dim=0) for s in starts)
        columns = magnitude / torch.as_tensor(squares).sqrt().float()
    for start in starts:
        stop = min(start + step, rows)
        part = updated(start, stop)
        if columns is not None:
            part.mul_(columns)
        elif magnitude is not None:
            part.mul_((magnitude[start:stop] / torch.linalg.vector_norm(part, dim=1)).unsqueeze(1))
        if trained is not None:
            here = (indices >= start) & (indices < stop)
            part[indices[here] - start] = trained[here]
        yield part


# ---------------------------------------------------------------- 4-bit round trip


def restored_rows(
    read_rows: RowsOf,
    shape: tuple[int, int],
    *,
    name: str,
    quantization: QuantizationSettings,
    compute_dtype: torch.dtype,
) -> RowsOf:
    """Prepares the 4-bit round trip of one weight, as `load_base` quantises it and as training dequantises it.

    Args:
        read_rows: Gives rows of the stored weight on the device to work on; each row is read twice.
        shape: (out, in) of the weight.
        compute_dtype: Dtype it was quantised from and is dequantised to.

    Returns:
        A function from a range of rows to fresh float32 rows after the round trip, each number one of
        `compute_dtype`'s.

    Raises:
        ModelError: The weight holds NaN or infinity, which quantisation would hide.
    """
    double_quant = quantization.double_quant
    if restores_by_rows(quantization, shape[1], read_rows(0, 1).device):
        return _nf4_rows(read_rows, shape, name, double_quant=double_quant, compute_dtype=compute_dtype)
    weight = read_rows(0, shape[0]).to(compute_dtype)
    _require_finite(weight, name)
    restored = round_trip(weight, quant_type=quantization.quant_type, double_quant=double_quant)
    return lambda start, stop: restored[start:stop].to(torch.float32, copy=True)


def restores_by_rows(quantization: QuantizationSettings, columns: int, device: torch.device) -> bool:
    """Whether a weight is restored by rows as they are read; else bitsandbytes restores all of it at once."""
    return device.type == "cpu" and quantization.quant_type == "nf4" and columns % BLOCK_SIZE == 0


def _nf4_rows(
    read_rows: RowsOf, shape: tuple[int, int], name: str, *, double_quant: bool, compute_dtype: torch.dtype
) -> RowsOf:
    rows, columns = shape
    blocks = columns // BLOCK_SIZE  # of a row: rows are whole blocks, so that any range of rows stands alone
    largest = torch.empty(rows, blocks)
    step = max(1, ROWS_ELEMENTS // columns)
    for start in range(0, rows, step):
        part = read_rows(start, min(start + step, rows)).to(compute_dtype).float()
        torch.amax(part.abs().view(-1, blocks, BLOCK_SIZE), dim=-1, out=largest[start : start + step])
    _require_finite(largest, name)
    scale = 1.0 / largest.clamp(min=SMALLEST_CONSTANT)
    constants = round_trip_constants(largest.view(-1)).view(rows, blocks) if double_quant else largest
    borders, values = _nf4_tables()

    def restore(start: int, stop: int) -> torch.Tensor:
        blocked = (stop - start, blocks, BLOCK_SIZE)
        part = read_rows(start, stop).to(compute_dtype).float().view(blocked)
        part = torch.mul(part, scale[start:stop].unsqueeze(-1)).view(-1)  # in [-1, 1]
        place = torch.mul(part, BINS).add_(BINS)
        bins = place.to(torch.int32)
        torch.index_select(borders, 0, bins, out=place)
        torch.gt(part, place, out=place)  # 1.0 above the border in the bin
        bins = torch.add(place, bins, alpha=2, out=place).to(torch.int32)
        torch.index_select(values, 0, bins, out=part)
        part.view(blocked).mul_(constants[start:stop].unsqueeze(-1))
        if compute_dtype != torch.float32:
            part = part.to(compute_dtype).float()  # training computes with the dequantised weight in this dtype
        return part.view(stop - start, columns)

    return restore


def _require_finite(numbers: torch.Tensor, name: str) -> None:
    if not bool(torch.isfinite(numbers).all()):
        raise ModelError(f"{name} of the base holds NaN or infinity.", "Download the base again.")


@cache
def _nf4_tables() -> tuple[torch.Tensor, torch.Tensor]:
    """For numbers x of [-1, 1], by bin i = int(16 x + 16): the border in the bin, and the values below and above it.

    Borders are the midpoints of neighbouring values, and a number on one belongs to the value below. The bin is a
    monotone function of x whatever the rounding, so counting the borders in lower bins and comparing with the one
    inside gives exactly what a search over all of them gives.
    """
    values = four_bit_values("nf4")
    midpoints = (values[:-1] + values[1:]) / 2
    bins = (midpoints * BINS + BINS).to(torch.int32).long()
    if bins.unique().numel() != bins.numel():
        raise AssertionError("two borders in one bin")
    below = torch.searchsorted(bins, torch.arange(2 * BINS + 1))
    borders = torch.full((2 * BINS + 1,), torch.inf)
    borders[bins] = midpoints
    return borders, torch.stack([values[below], values[(below + 1).clamp(max=15)]], dim=1).flatten()
