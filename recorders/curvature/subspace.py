"""An orthonormal basis whose products with the matrix are known: the ground of iterative eigensolvers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from hild_xr.recorders.curvature.errors import NonFiniteCurvatureError
from hild_xr.recorders.curvature.pairs import Which, ranking

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# Shrinking to 0.7 of the length calls for another Gram-Schmidt pass ("twice is enough", Giraud et al. 2005).
# A laxer bound saves nothing: what one pass leaves grows with every restart until the basis is no basis and
# the Ritz values are made up, also in float64 at a loose tolerance.
_CANCELLATION = 0.7

_IN_BASIS = 1e-5
"""Length that projection leaves of a unit vector below which it is noise."""

_INDEPENDENT = 1e-3
"""Smallest eigenvalue of a Gram matrix, in the number of its unit vectors, at which it may be inverted."""


@dataclass(frozen=True)
class Matrices:
    """A batch of symmetric matrices that are known by their products.

    Parameters
    ----------
    matvec
        ``matvec(vectors, problems)`` multiplies vectors (n, p) with the matrices of indices problems (n,).
    size
        Dimension p.
    dtype, device
        Of the vectors.
    name
        Name in error messages.
    seed
        Seed of random vectors.
    """

    matvec: Callable[[Tensor, Tensor], Tensor]
    size: int
    dtype: torch.dtype
    device: torch.device
    name: str
    seed: int

    def __post_init__(self) -> None:
        # Random numbers are drawn on the CPU, so that every device starts from the same vectors.
        object.__setattr__(self, "_generator", torch.Generator().manual_seed(self.seed))

    def product(self, vectors: Tensor, problems: Tensor) -> Tensor:
        """Multiply; raise a NonFiniteCurvatureError for NaN or infinity."""
        products = self.matvec(vectors, problems.to(vectors.device))
        if not bool(torch.linalg.vector_norm(products, dim=-1).isfinite().all()):
            raise NonFiniteCurvatureError(self.name, "a product")
        return products

    def multiplied_by(self, matvec: Callable[[Tensor, Tensor], Tensor]) -> Matrices:
        """Return matrices that stand for these; random vectors of both are drawn from one source."""
        others = replace(self, matvec=matvec)
        object.__setattr__(others, "_generator", self._generator)  # type: ignore[attr-defined]
        return others

    def random(self, n: int) -> Tensor:
        """Return n random vectors."""
        generator: torch.Generator = self._generator  # type: ignore[attr-defined]
        return torch.randn(n, self.size, generator=generator, dtype=self.dtype).to(self.device)


@dataclass
class Ritz:
    """Ritz values in the order asked for, and the coefficients of the vectors; small, on the CPU.

    Parameters
    ----------
    eigenvalues
        Shape (n, filled).
    coefficients
        Shape (n, filled, filled); row i belongs to value i.
    estimates
        Shape (n, filled): norms of the residuals by the recurrence of Lanczos.
    """

    eigenvalues: Tensor
    coefficients: Tensor
    estimates: Tensor

    def select(self, mask: Tensor) -> Ritz:
        """Keep the problems of a mask."""
        return Ritz(self.eigenvalues[mask], self.coefficients[mask], self.estimates[mask])


class Subspace:
    """Orthonormal bases V of equal length for a batch of problems, with A V and V^T A V.

    The products are kept, so that the residual of any Ritz pair is known from real
    products without another one, and a search can go on in any direction: of the
    recurrence (Lanczos), of residuals (Davidson), of random or given vectors.

    Parameters
    ----------
    matrices
        The matrices.
    problems
        Indices of those that this one is for, shape (n,), on the CPU.
    capacity
        Vectors that it can hold.
    """

    def __init__(self, matrices: Matrices, problems: Tensor, capacity: int) -> None:
        n, size = len(problems), matrices.size
        dtype, device = matrices.dtype, matrices.device
        self.matrices, self.problems, self.capacity, self.filled = matrices, problems, capacity, 0
        # one more than the products: the next vector to be multiplied
        self.vectors = torch.empty(n, capacity + 1, size, dtype=dtype, device=device)
        self.products = torch.empty(n, capacity, size, dtype=dtype, device=device)
        self.projected = torch.zeros(n, capacity, capacity, dtype=torch.float64)
        self.next_norm = torch.zeros(n, dtype=torch.float64)
        self.scale = torch.zeros(n, dtype=torch.float64)
        self.count = torch.zeros(n, dtype=torch.int64)
        self.errors = torch.zeros(n, capacity, dtype=torch.float64)
        self.follows_recurrence = True

    @property
    def full(self) -> bool:
        """Whether the basis has no room for another product."""
        return self.filled == self.capacity

    @property
    def exhausted(self) -> bool:
        """Whether the basis spans the whole space."""
        return self.filled == self.matrices.size

    def aim(self, directions: Tensor) -> None:
        """Go on with given directions (n, p), orthogonalised; a random one for those that vanish."""
        before = torch.linalg.vector_norm(directions, dim=-1).to("cpu", torch.float64)
        self.vectors[:, self.filled] = directions
        rest, _, after = self._orthogonalised(self.vectors[:, self.filled], before)
        vanish = ~(after > 1e-3 * before)
        rest /= torch.where(vanish, 1.0, after).to(rest)[:, None]
        self._aim_randomly(vanish)
        self.follows_recurrence = self.filled == 0

    def aim_randomly(self) -> None:
        """Go on with random vectors orthogonal to the basis."""
        self._aim_randomly(torch.ones(len(self.problems), dtype=torch.bool))
        self.follows_recurrence = self.filled == 0

    def extend(self) -> None:
        """Multiply the next vector; what is new in the product is the next one."""
        j = self.filled
        product = self.matrices.product(self.vectors[:, j], self.problems)
        self.products[:, j], self.errors[:, j] = product, 0.0
        self.filled, self.count = j + 1, self.count + 1
        before = torch.linalg.vector_norm(product, dim=-1).to("cpu", torch.float64)
        self.scale = torch.maximum(self.scale, before)
        # in its place in the basis: memory that is new for each vector costs as much as the work in it
        self.vectors[:, j + 1] = product
        rest, coefficients, after = self._orthogonalised(self.vectors[:, j + 1], before)
        self.projected[:, : j + 1, j] = coefficients
        self.projected[:, j, : j + 1] = coefficients
        # Below this the direction is rounding noise of the product: the Krylov space is exhausted.
        noise = 50 * torch.finfo(product.dtype).eps * self.scale
        vanish = after <= noise
        self.next_norm = torch.where(vanish, 0.0, after)
        if self.exhausted:
            return
        rest /= torch.where(vanish, 1.0, after).to(rest)[:, None]
        self._aim_randomly(vanish)

    def append(self, directions: Tensor, *, by: Matrices | None = None, errors: Tensor | None = None) -> None:
        """Take several directions (n, b, p) into the basis and multiply them at once; none is next then.

        By other matrices than its own, which stand for these, if they are given with a bound (n,) on the
        errors of their products.
        """
        b, size = directions.shape[1:]
        basis, there = self.vectors[:, : self.filled], slice(self.filled, self.filled + b)
        new = self.vectors[:, there].copy_(directions)
        new /= torch.linalg.vector_norm(new, dim=-1, keepdim=True).clamp(min=torch.finfo(new.dtype).tiny)
        for _ in range(3):
            new.baddbmm_(new @ basis.mT, basis, alpha=-1)
            lost = torch.linalg.vector_norm(new, dim=-1) < _IN_BASIS
            if not bool(lost.any()):
                break
            new[lost] = self.matrices.random(int(lost.sum())) / size**0.5  # any other direction will do
        make_orthonormal(new)
        new.baddbmm_(new @ basis.mT, basis, alpha=-1)
        make_orthonormal(new)
        self.filled += b
        self._take(there, self._multiplied(there, self.matrices if by is None else by), errors)

    def multiply_anew(self, there: slice, by: Matrices) -> Tensor:
        """Replace the products of some vectors (n, b, p) by those of other matrices, its own from here on.

        Returns
        -------
        Tensor
            Norms of the differences, shape (n, b).
        """
        self.matrices = by
        products = self._multiplied(there, by)
        difference = self.products[:, there].sub_(products)
        norms: Tensor = torch.linalg.vector_norm(difference, dim=-1).to("cpu", torch.float64)
        self._take(there, products)
        return norms

    def _multiplied(self, there: slice, by: Matrices) -> Tensor:
        """Return the products of some vectors (n, b, p) of the basis."""
        vectors = self.vectors[:, there]
        n, b, size = vectors.shape
        products = by.product(vectors.reshape(n * b, size), self.problems.repeat_interleave(b))
        self.count = self.count + b
        return products.reshape(n, b, size)

    def _take(self, there: slice, products: Tensor, errors: Tensor | None = None) -> None:
        """Take the products of some vectors, and bounds (n,) of their errors if they have some."""
        self.products[:, there] = products
        self.errors[:, there] = 0.0 if errors is None else errors[:, None]
        columns = self.vectors[:, : self.filled] @ products.mT
        if errors is not None:  # those of the vectors before tell the same, without
            columns[:, : there.start] = self.products[:, : there.start] @ self.vectors[:, there].mT
        columns = columns.to("cpu", torch.float64)
        self.projected[:, : self.filled, there] = columns
        self.projected[:, there, : self.filled] = columns.mT
        norms = torch.linalg.vector_norm(products, dim=-1).amax(-1)
        self.scale = torch.maximum(self.scale, norms.to("cpu", torch.float64))
        self.follows_recurrence = False

    def ritz(self, which: Which) -> Ritz:
        """Solve the projected problem."""
        projected = self.projected[:, : self.filled, : self.filled]
        eigenvalues, columns = torch.linalg.eigh((projected + projected.mT) / 2)
        order = ranking(eigenvalues, which)
        coefficients = columns.mT.gather(1, order[..., None].expand_as(columns))
        estimates = (self.next_norm[:, None] * coefficients[..., -1]).abs()
        return Ritz(eigenvalues.gather(1, order), coefficients, estimates)

    def residuals(self, ritz: Ritz, n_pairs: int, chunk: int = 1 << 16) -> Tensor:
        """Return the norms of ``A v - lambda v`` of the first Ritz pairs, shape (n, n_pairs).

        Where products have errors these are bounds.
        """
        # In units of the matrix, whose numbers may be so small that their squares vanish in float32.
        unit = torch.where(self.scale > 0, self.scale, 1.0)[:, None]
        of_products = ritz.coefficients[:, :n_pairs] / unit[..., None]
        of_vectors = -ritz.eigenvalues[:, :n_pairs, None] * of_products
        left, right = of_products.to(self.vectors), of_vectors.to(self.vectors)
        squares = torch.zeros(left.shape[:2], dtype=torch.float64, device=self.vectors.device)
        for start in range(0, self.matrices.size, chunk):
            there = (slice(None), slice(self.filled), slice(start, start + chunk))
            parts = torch.baddbmm(left @ self.products[there], right, self.vectors[there])
            squares += torch.linalg.vector_norm(parts, dim=-1).double().square()
        return squares.sqrt().cpu() * unit + self._error_bounds(ritz, n_pairs)

    def _error_bounds(self, ritz: Ritz, n_pairs: int) -> Tensor:
        """Return bounds of the errors of ``A v`` of the first Ritz pairs, shape (n, n_pairs)."""
        bounds: Tensor = ritz.coefficients[:, :n_pairs].abs() @ self.errors[:, : self.filled, None]
        return bounds[..., 0]

    def residual_vectors(self, ritz: Ritz, pairs: Sequence[int]) -> Tensor:
        """Return ``A v - lambda v`` of some Ritz pairs, shape (n, pairs, p)."""
        chosen = list(pairs)
        coefficients = ritz.coefficients[:, chosen].to(self.vectors)
        of_vectors = -ritz.eigenvalues[:, chosen, None].to(self.vectors) * coefficients
        basis, products = self.vectors[:, : self.filled], self.products[:, : self.filled]
        return torch.bmm(coefficients, products).baddbmm_(of_vectors, basis)

    def restart(self, ritz: Ritz, keep: int) -> None:
        """Keep the best Ritz vectors; the next vector stays the next."""
        coefficients = ritz.coefficients[:, :keep].to(self.vectors)
        newest = None if self.exhausted else self.vectors[:, self.filled].clone()
        rotate_in_place(self.vectors, coefficients, self.filled)
        rotate_in_place(self.products, coefficients, self.filled)
        if newest is not None:
            self.vectors[:, keep] = newest
        self.errors[:, :keep] = self._error_bounds(ritz, keep)
        self.projected.zero_()
        self.projected[:, :keep, :keep] = torch.diag_embed(ritz.eigenvalues[:, :keep])
        self.scale = torch.maximum(self.scale, ritz.eigenvalues.abs().amax(-1))
        self.filled = keep

    def taken_apart(self, ritz: Ritz, keep: int) -> Tensor:
        """Return the best Ritz vectors and let go of all else; the end of this subspace."""
        self.products = self.products[:, :0].clone()  # first: the vectors need room
        rotate_in_place(self.vectors, ritz.coefficients[:, :keep].to(self.vectors), self.filled)
        vectors = self.vectors[:, :keep].clone()  # a copy, so that the basis goes
        self.vectors = vectors[:, :0]
        return vectors

    def select(self, mask: Tensor) -> Self:
        """Return the problems of a mask; all of them without a copy."""
        if bool(mask.all()):
            return self
        chosen = object.__new__(type(self))
        chosen.matrices, chosen.capacity, chosen.filled = self.matrices, self.capacity, self.filled
        chosen.follows_recurrence = self.follows_recurrence
        for name in ("problems", "projected", "next_norm", "scale", "count", "errors"):
            setattr(chosen, name, getattr(self, name)[mask])
        there = mask.to(self.vectors.device)
        chosen.vectors, chosen.products = self.vectors[there], self.products[there]
        return chosen

    def trimmed(self) -> Self:
        """Let go of the memory beyond what is filled, where this is one of several parts."""
        self.vectors = self.vectors[:, : self.filled + 1].clone()
        self.products = self.products[:, : self.filled].clone()
        return self

    @classmethod
    def joined(cls, parts: Sequence[Subspace], capacity: int) -> Subspace:
        """Join problems whose bases are equally long, in their order; one part alone is not copied."""
        if len(parts) == 1:
            return parts[0]
        order = torch.cat([part.problems for part in parts]).argsort()
        filled = parts[0].filled
        whole = Subspace(parts[0].matrices, torch.cat([part.problems for part in parts])[order], capacity)
        whole.filled, whole.follows_recurrence = filled, False
        for name in ("projected", "next_norm", "scale", "count", "errors"):
            setattr(whole, name, torch.cat([getattr(part, name) for part in parts])[order])
        there = order.to(whole.vectors.device)
        whole.vectors[:, :filled] = torch.cat([part.vectors[:, :filled] for part in parts])[there]
        whole.products[:, :filled] = torch.cat([part.products[:, :filled] for part in parts])[there]
        return whole

    def _orthogonalised(self, vector: Tensor, before: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project the basis out of vectors, in place; return them, the coefficients and the norms left."""
        total = torch.zeros(len(vector), self.filled, dtype=torch.float64)
        if self.filled > 2 and self.follows_recurrence:
            # In exact arithmetic Lanczos leaves the two newest alone. Once they are out, one pass over the
            # whole basis is enough most of the time.
            newest = slice(self.filled - 2, self.filled)
            self._project_out(vector, newest, total)
            before = torch.linalg.vector_norm(vector, dim=-1).to("cpu", torch.float64)
        after = before
        for _ in range(3 if self.filled else 0):
            self._project_out(vector, slice(self.filled), total)
            after = torch.linalg.vector_norm(vector, dim=-1).to("cpu", torch.float64)
            if bool((after > _CANCELLATION * before).all()):
                break
            before = after
        return vector, total, after

    def _project_out(self, vector: Tensor, which: slice, total: Tensor) -> None:
        basis = self.vectors[:, which]
        coefficients = torch.bmm(basis, vector[:, :, None])
        total[:, which] += coefficients[:, :, 0].to("cpu", torch.float64)
        vector[:, :, None].baddbmm_(basis.mT, coefficients, alpha=-1)

    def _aim_randomly(self, where: Tensor) -> None:
        """Put random unit vectors orthogonal to the basis after it, in the problems of the mask."""
        if not bool(where.any()):
            return
        # a mask would copy the basis of a large block
        there = slice(None) if bool(where.all()) else where.to(self.vectors.device)
        basis = self.vectors[there, : self.filled]
        vector = self.matrices.random(int(where.sum()))
        for _ in range(3):
            vector = vector - (basis.mT @ (basis @ vector[:, :, None]))[:, :, 0]
            vector = vector / torch.linalg.vector_norm(vector, dim=-1, keepdim=True)
        self.vectors[there, self.filled] = vector


def make_orthonormal(vectors: Tensor) -> None:
    """Replace unit vectors (n, b, p) by an orthonormal basis of their span, in place.

    By the Cholesky factor of their Gram matrix, which takes two passes over them, or by QR where they
    are nearly dependent and the Gram matrix does not tell.

    Examples
    --------
    >>> vectors = torch.tensor([[[1.0, 0.0], [0.6, 0.8]]])
    >>> make_orthonormal(vectors)
    >>> torch.allclose(vectors @ vectors.mT, torch.eye(2), atol=1e-6)
    True
    """
    gram = (vectors @ vectors.mT).to("cpu", torch.float64)
    if bool((torch.linalg.eigvalsh(gram)[:, 0] > _INDEPENDENT * gram.shape[1]).all()):
        unit = torch.eye(gram.shape[1], dtype=torch.float64).expand_as(gram)
        rotation = torch.linalg.solve_triangular(torch.linalg.cholesky(gram), unit, upper=False)
        rotate_in_place(vectors, rotation.to(vectors), vectors.shape[1])
    else:
        vectors.copy_(torch.linalg.qr(vectors.mT)[0].mT)


def rotate_in_place(vectors: Tensor, coefficients: Tensor, length: int, chunk: int = 1 << 16) -> None:
    """Replace the first rows of ``vectors`` (n, m, p) by combinations of its first ``length`` rows.

    ``coefficients`` has shape (n, r, length) with r <= length. Columns are done in
    chunks, so no second basis is held.

    Examples
    --------
    >>> vectors = torch.eye(2)[None].clone()
    >>> rotate_in_place(vectors, torch.tensor([[[0.0, 1.0]]]), 2)
    >>> vectors[0, 0]
    tensor([0., 1.])
    """
    rows, size = coefficients.shape[1], vectors.shape[2]
    for start in range(0, size, chunk):
        part = slice(start, start + chunk)
        vectors[:, :rows, part] = coefficients @ vectors[:, :length, part]
