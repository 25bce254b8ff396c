"""Rows of a weight and an adapter's tensors in, the merged rows out, in float32."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from qlora_cli.core.merge.delta import WeightDelta
from qlora_cli.core.storage.safetensors_file import TensorFile

RowsOf = Callable[[int, int], torch.Tensor]  # (start, stop) → (stop - start, columns) float32


@dataclass(frozen=True)
class Factors:
    """A change with its tensors in float32; shapes as in `WeightDelta`."""

    scaling: float
    a: torch.Tensor | None
    b: torch.Tensor | None
    magnitude: torch.Tensor | None
    rows: torch.Tensor | None
    token_indices: torch.Tensor | None
    embedding: bool


def load_factors(change: WeightDelta, adapter: TensorFile, device: torch.device) -> Factors:
    """Reads the tensors of one change of a weight."""

    def read(name: str | None) -> torch.Tensor | None:
        return None if name is None else adapter.read(name).to(device).float()

    return Factors(
        scaling=change.scaling,
        a=read(change.a),
        b=read(change.b),
        magnitude=read(change.magnitude),
        rows=read(change.rows),
        token_indices=torch.tensor(change.token_indices, device=device) if change.rows else None,
        embedding=change.embedding,
    )


def merge_rows(rows_of: RowsOf, factors: Factors, *, rows: int, step: int) -> Iterator[torch.Tensor]:
    """The merged weight, `step` rows at a time, from the first to the last.

    Linear layers: W + scaling * B @ A, with DoRA its rows scaled to the magnitudes
    (https://arxiv.org/abs/2402.09353, equation 5). Embeddings: W + scaling * (B @ A)^T, with DoRA its columns scaled.

    Args:
        rows_of: Gives rows of W as fresh float32 tensors on the factors' device.
        factors: The change.
        rows: Rows of W.
        step: Rows made at a time.
    """

    def updated(start: int, stop: int) -> torch.Tensor:
        part = rows_of(start, stop)
        if factors.a is not None and factors.b is not None:
            if factors.embedding:
                part.addmm_(factors.a[:, start:stop].T, factors.b.T, alpha=factors.scaling)
            else:
                part.addmm_(factors.b[start:stop], factors.a, alpha=factors.scaling)
        return part

    starts = range(0, rows, step)
    columns = None
    if factors.magnitude is not None and factors.embedding:
        squares = sum(updated(s, min(s + step, rows)).double().square().sum(dim=0) for s in starts)
        columns = factors.magnitude / torch.as_tensor(squares).sqrt().float()
    for start in starts:
        stop = min(start + step, rows)
        part = updated(start, stop)
        if columns is not None:
            part.mul_(columns)
        elif factors.magnitude is not None:
            part.mul_((factors.magnitude[start:stop] / torch.linalg.vector_norm(part, dim=1)).unsqueeze(1))
        if factors.rows is not None and factors.token_indices is not None:
            here = (factors.token_indices >= start) & (factors.token_indices < stop)
            part[factors.token_indices[here] - start] = factors.rows[here]
        yield part
