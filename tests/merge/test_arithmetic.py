"""The arithmetic of a merge against the formulas in float64, whatever the size of the blocks."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_cli.core.merge.arithmetic import Factors, merge_rows


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

    factors = Factors(scaling, a, b, lengths, replaced, indices, embedding)
    blocks = list(merge_rows(lambda i, j: weight[i:j].clone(), factors, rows=rows, step=step))
    assert [len(block) for block in blocks[:-1]] == [step] * (len(blocks) - 1)
    assert torch.allclose(torch.cat(blocks).double(), expected, rtol=1e-4, atol=1e-4)


def test_no_change_changes_nothing() -> None:
    weight = torch.randn(7, 5)
    nothing = Factors(1.0, None, None, None, None, None, False)
    assert torch.equal(torch.cat(list(merge_rows(lambda i, j: weight[i:j].clone(), nothing, rows=7, step=3))), weight)
