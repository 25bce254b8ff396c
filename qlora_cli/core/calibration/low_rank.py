"""Best answer of low rank to the quantisation error of a linear layer, by what its inputs are.

For an error E = W - Q (out, in) and inputs x of second moment C = E[x xᵀ], the product of rank r nearest to E where the
inputs look, min ‖(E - B A) C^½‖, is the projection of E on the r leading left singular vectors U of E C^½: B A = U Uᵀ E
(Eckart and Young, 1936). So neither a root nor an inverse of C is needed, only M = E C Eᵀ, the second moment of the
output's errors: whichever of C (in, in) and M (out, out) is smaller is gathered, and 28,672 columns are never squared.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_cli.errors import ModelError

DAMPING = 0.01  # of the mean square of an input, added to each: directions the rows do not show count a little
OVERSAMPLING = 16  # directions iterated beside those wanted
ITERATIONS = 12  # of the subspace; quantisation errors have flat spectra: 12 reach 99.9 % of what an exact SVD does
COUNTED_TOKENS = 128  # at once
NEGLIGIBLE = 1e-6  # of the largest singular value: below it a direction is noise of rounding


@dataclass
class SecondMoment:
    """Sums over the tokens that a linear layer was given, of which the moments are made; empty, all directions are equal.

    Attributes:
        inputs: Σ x xᵀ (in, in) float32, or None where the output's errors are gathered.
        errors: Σ (E x)(E x)ᵀ (out, out) float32, or None where the inputs are.
        squares: Σ ‖x‖² / in, () float32.
        tokens: How many.
    """

    inputs: Tensor | None = None
    errors: Tensor | None = None
    squares: Tensor | None = None
    tokens: int = 0

    def add_inputs(self, x: Tensor) -> None:
        """Adds inputs, (tokens, in)."""
        product = _squared(x)
        self.inputs = product if self.inputs is None else self.inputs.add_(product)
        self._count(x)

    def add_errors(self, x: Tensor, error: Tensor) -> None:
        """Adds the output's errors at inputs, (tokens, in); `error` is E (out, in) in the inputs' dtype."""
        product = _squared(x @ error.T)
        self.errors = product if self.errors is None else self.errors.add_(product)
        self._count(x)

    def _count(self, x: Tensor) -> None:
        means = [
            part.float().square().mean(dim=1) for part in x.split(COUNTED_TOKENS)
        ]  # two copies of wide inputs less
        squares = torch.cat(means).sum()
        self.squares = squares if self.squares is None else self.squares + squares
        self.tokens += len(x)

    def of_errors(self, error: Tensor) -> Callable[[Tensor], Tensor]:
        """Multiplication of (out, n) by the damped second moment of E x, in units of the mean square of an input."""
        scale = 1.0 if self.squares is None else self.squares.clamp(min=torch.finfo(torch.float32).tiny)

        def multiply(directions: Tensor) -> Tensor:
            back = error.T @ directions  # (in, n)
            if self.errors is not None:
                return self.errors @ directions / scale + DAMPING * (error @ back)
            if self.inputs is not None:
                back = self.inputs @ back / scale + DAMPING * back
            return error @ back

        return multiply


def _squared(x: Tensor) -> Tensor:
    """xᵀ x (in, in) float32 of x (tokens, in). Products of two numbers of 16 bits are exact in float32, in which a GPU sums
    them some ten times faster than it multiplies float32."""
    if x.is_cuda and x.dtype.itemsize == 2:
        return torch.mm(x.T, x, out_dtype=torch.float32)
    values = x.float()
    return values.T @ values


def leading_directions(error: Tensor, multiply: Callable[[Tensor], Tensor], rank: int) -> tuple[Tensor, Tensor]:
    """Leading eigenvectors of a second moment of the output's errors, by subspace iteration from a fixed start.

    Args:
        error: E (out, in) float32.
        multiply: By the moment.
        rank: How many; fewer come back where E has no more.

    Returns:
        Singular values of E C^½ (rank,), descending, and directions (out, rank), orthonormal.

    Raises:
        ModelError: The moment is not finite: what the layer was given, or its weights, overflowed.
    """
    out, columns = error.shape
    count = min(out, columns, rank + max(OVERSAMPLING, rank // 2))
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(out, count, generator=generator).to(error.device)
    moved = multiply(start)
    if not moved.isfinite().all():
        raise ModelError(
            "The model's activations are not finite numbers, so that no adapter can be started from them.",
            "Use --compute-dtype bfloat16 or float32, which hold larger numbers than float16.",
        )
    basis = torch.linalg.qr(moved)[0]
    for _ in range(ITERATIONS):
        basis = torch.linalg.qr(multiply(basis))[0]
    values, vectors = torch.linalg.eigh((basis.T @ multiply(basis)).double())
    order = torch.argsort(values, descending=True)[:rank]
    singular = values[order].clamp(min=0).sqrt()
    kept = int((singular > NEGLIGIBLE * singular[:1].clamp(min=1e-30)).sum())
    return singular[:kept].float(), (basis.double() @ vectors[:, order[:kept]]).float()


def answer_error(error: Tensor, moment: SecondMoment, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r) with scaling * B @ A nearest to an error, their sizes balanced; r is `rank` at most."""
    singular, directions = leading_directions(error, moment.of_errors(error), rank)
    root = singular.sqrt()
    return directions.T @ error / root[:, None], directions * root / scaling
