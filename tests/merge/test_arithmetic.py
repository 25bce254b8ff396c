"""The arithmetic of a merge: the formulas in float64 whatever the blocks, and bitsandbytes' 4-bit round trip to the bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_cli.core.merge.arithmetic import merge_rows, restored_rows
from qlora_cli.core.merge.delta import WeightDelta
from qlora_cli.core.models.quantization import dequantized_weight, four_bit_linears, four_bit_values, round_trip
from qlora_cli.settings.groups import QuantizationSettings


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 30),
    columns=st.integers(1, 30),
    rank=st.integers(1, 5),
    step=st.integers(1, 40),
    embedding=st.booleans(),
    magnitude=st.booleans(),
    trained_rows=st.booleans(),
    scaling=st.floats(0.01, 8),
    seed=st.integers(0, 2**31),
)
def test_every_block_size_gives_the_formula(
    rows, columns, rank, step, embedding, magnitude, trained_rows, scaling, seed
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    weight = normal(rows, columns) + 0.1
    wide, tall = (rows, columns) if embedding else (columns, rows)  # in, out as the adapter sees them
    a, b = normal(rank, wide), normal(tall, rank)
    lengths = normal(tall).abs() + 0.5 if magnitude else None
    indices = torch.randperm(rows, generator=generator)[: rows // 2] if trained_rows else None
    replaced = normal(rows // 2, columns) if trained_rows else None

    update = scaling * (b.double() @ a.double())
    expected = weight.double() + (update.T if embedding else update)
    if lengths is not None:
        axis = 0 if embedding else 1
        scale = lengths.double() / expected.norm(dim=axis)
        expected = expected * (scale if embedding else scale.unsqueeze(1))
    if indices is not None:
        expected[indices] = replaced.double()

    delta = WeightDelta(
        scaling,
        a="a",
        b="b",
        magnitude="lengths" if magnitude else None,
        rows="replaced" if trained_rows else None,
        token_indices=tuple(indices.tolist()) if trained_rows else (),
        embedding=embedding,
    )
    tensors = {"a": a, "b": b, "lengths": lengths, "replaced": replaced}
    blocks = list(merge_rows(lambda i, j: weight[i:j].clone(), delta, tensors, rows=rows, step=step))
    assert [len(block) for block in blocks[:-1]] == [step] * (len(blocks) - 1)
    assert torch.allclose(torch.cat(blocks).double(), expected, rtol=1e-4, atol=1e-4)


def test_no_delta_changes_nothing() -> None:
    weight = torch.randn(7, 5)
    blocks = list(merge_rows(lambda i, j: weight[i:j].clone(), WeightDelta(), {}, rows=7, step=3))
    assert torch.equal(torch.cat(blocks), weight)


# ---------------------------------------------------------------- 4-bit round trip


def rows_after(weight: torch.Tensor, *, compute_dtype: torch.dtype, **quantization):
    """`restored_rows` of a weight in memory."""
    return restored_rows(
        lambda i, j: weight[i:j],
        tuple(weight.shape),
        name="w",
        quantization=QuantizationSettings(**quantization),
        compute_dtype=compute_dtype,
    )


DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.sampled_from([6, 10, 64, 96, 128, 192, 320]),
    stored=st.sampled_from(DTYPES),
    compute=st.sampled_from(DTYPES),
    quant_type=st.sampled_from(["nf4", "fp4"]),
    double_quant=st.booleans(),
    scale=st.sampled_from([1e-6, 0.02, 30.0]),
    step=st.integers(1, 17),
    seed=st.integers(0, 2**31),
)
def test_rows_are_those_of_bitsandbytes_bit_for_bit(
    rows, columns, stored, compute, quant_type, double_quant, scale, step, seed
) -> None:
    weight = (torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * scale).to(stored)
    before = weight.clone()
    expected = round_trip(weight.to(compute), quant_type=quant_type, double_quant=double_quant).float()
    rows_of = rows_after(
        weight,
        quant_type=quant_type,
        double_quant=double_quant,
        compute_dtype=compute,
    )
    found = torch.cat([rows_of(start, min(start + step, rows)) for start in range(0, rows, step)])
    assert torch.equal(found, expected)
    assert torch.equal(weight, before)


def test_numbers_on_and_beside_each_border_fall_as_in_bitsandbytes() -> None:
    values = four_bit_values("nf4")
    borders = (values[:-1] + values[1:]) / 2
    beside = torch.cat([borders, borders.nextafter(torch.tensor(2.0)), borders.nextafter(torch.tensor(-2.0)), values])
    weight = torch.zeros(1, 64)
    weight[0, : len(beside)] = beside
    weight[0, 63] = 1.0  # so that the block's constant is 1 and its numbers stay where they are
    expected = round_trip(weight, quant_type="nf4", double_quant=False)
    rows_of = rows_after(
        weight,
        quant_type="nf4",
        double_quant=False,
        compute_dtype=torch.float32,
    )
    assert torch.equal(rows_of(0, 1), expected)


def test_a_block_of_zeros_stays_zero() -> None:
    weight = torch.zeros(4, 128)
    weight[2] = torch.randn(128)
    for double_quant in (False, True):
        rows_of = rows_after(weight, quant_type="nf4", double_quant=double_quant, compute_dtype=torch.float32)
        assert torch.equal(rows_of(0, 4), round_trip(weight, quant_type="nf4", double_quant=double_quant))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "falcon"])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_rows_are_the_weights_a_loaded_base_computes_with(load_tiny, tiny_model, architecture, compute) -> None:
    from transformers import AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    base, _ = load_tiny(architecture, compute_dtype=compute)
    plain = AutoModelForCausalLM.from_pretrained(tiny_model(architecture))
    for name, module in four_bit_linears(base):
        source = plain.get_submodule(name)
        weight = source.weight.detach().T.contiguous() if isinstance(source, Conv1D) else source.weight.detach()
        rows_of = rows_after(
            weight,
            quant_type="nf4",
            double_quant=True,
            compute_dtype=compute,
        )
        assert torch.equal(rows_of(0, len(weight)), dequantized_weight(module).float()), name
