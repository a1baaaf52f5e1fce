"""Singular triplets of blocks beside the diagonal."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from hild_xr.recorders.curvature.arguments import real_number, whole_number
from hild_xr.recorders.curvature.block_parts import BlockPart
from hild_xr.recorders.curvature.cross_operators import CrossOperator
from hild_xr.recorders.curvature.errors import NonFiniteCurvatureError
from hild_xr.recorders.curvature.lanczos import lanczos_eigenpairs
from hild_xr.recorders.curvature.operators import sum_tensors
from hild_xr.recorders.curvature.pairs import own_scale


@dataclass(frozen=True)
class CrossSpectrum:
    """Leading singular triplets of an off-diagonal block.

    Tensors are detached and lie on the model's device.

    Parameters
    ----------
    a, b
        The parts.
    singular_values
        Shape (k,), float64, decreasing.
    left
        Shape (k, *vector shape of a): unit vectors.
    right
        Shape (k, *vector shape of b): unit vectors; the sign of each pair is arbitrary.
    residuals
        Shape (k,), float64: root mean square of ``|A v - sigma u|`` and ``|A^T u - sigma v|``
        from real products, divided by sigma, or by a thousandth of the largest one found if
        that is more.
    converged
        Shape (k,), bool: whether the residual is finite and at most the tolerance.
    n_matvec
        Products with the block and its transpose; 0 for a dense solve.
    path
        ``"dense"`` or ``"lanczos"``.
    """

    a: BlockPart
    b: BlockPart
    singular_values: Tensor
    left: Tensor
    right: Tensor
    residuals: Tensor
    converged: Tensor
    n_matvec: int
    path: Literal["dense", "lanczos"]


def singular_triplets(
    operator: CrossOperator,
    k: int,
    *,
    tol: float = 1e-3,
    max_matvec: int | None = None,
    dense_up_to: int = 128,
    max_bytes: int = 2**30,
    seed: int = 0,
) -> CrossSpectrum:
    r"""Return the k leading singular triplets of a rectangular block.

    Blocks with a side of at most ``dense_up_to`` (or 3 k + 2) are solved as whole
    matrices, others through Lanczos: first on :math:`AA^T` or :math:`A^TA`, whichever is
    smaller, which takes half the products of the next; where squaring has cost the small
    singular values too much of their accuracy, on
    :math:`\begin{pmatrix} 0 & A \\ A^T & 0 \end{pmatrix}`, whose largest eigenvalues are
    the singular values themselves (Golub and Kahan 1965). A Rayleigh-Ritz step on the
    vectors found for the smaller side gives orthonormal vectors on both, also for
    singular values that are equal or zero.

    As for eigenpairs, small residuals do not prove that these are the largest k.

    Parameters
    ----------
    operator
        The block.
    k
        Number of triplets, 1 to the smaller side.
    tol
        Relative residual up to which a triplet counts as converged.
    max_matvec
        Products with the block or its transpose allowed; default ``82 k + 400``.
    dense_up_to
        See above.
    max_bytes
        Memory that a whole matrix and the workspace of its decomposition may take.
    seed
        Seed of the random start vector.

    Raises
    ------
    NonFiniteCurvatureError
        If a product is NaN or infinite.
    ValueError
        If k or the budget is out of range.
    TypeError
        If k is no whole number or the tolerance no number.
    """
    shortest = min(operator.shape)
    whole_number("k, the number of triplets,", k)
    if not 1 <= k <= shortest:
        raise ValueError(f"k must be between 1 and {shortest}, the smaller side of {operator.name}; got {k}")
    if not 0 < real_number("tol, the relative residual to reach,", tol) < math.inf:
        raise ValueError(f"tol, the relative residual to reach, must be a positive number; got {tol}")
    # The matrix, its float64 copy, both factors and the workspace of the decomposition.
    fits = 40 * math.prod(operator.shape) <= max_bytes
    if fits and shortest <= max(dense_up_to, 3 * k + 2):
        return _dense(operator, k, tol)
    return _through_products(operator, k, tol, max_matvec, seed)


def _dense(operator: CrossOperator, k: int, tol: float) -> CrossSpectrum:
    matrix = _exact(operator.matrix().detach())
    if not bool(matrix.isfinite().all()):
        raise NonFiniteCurvatureError(operator.name, "an entry of the matrix")
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    left, values, right = left.T[:k], values[:k], right[:k]
    return _certified(operator, values, left, right, (right @ matrix.T, left @ matrix), tol, path="dense")


class _Sides:
    """A block seen from its smaller side."""

    def __init__(self, operator: CrossOperator) -> None:
        self.operator = operator
        self.swapped = operator.shape[0] > operator.shape[1]
        self.small, self.large = sorted(operator.shape)

    def to_large(self, vectors: Tensor) -> Tensor:
        """Multiply vectors of the smaller side."""
        return (self.operator.product if self.swapped else self.operator.adjoint_product)(vectors)

    def to_small(self, vectors: Tensor) -> Tensor:
        """Multiply vectors of the larger side."""
        return (self.operator.adjoint_product if self.swapped else self.operator.product)(vectors)

    def squared(self, vectors: Tensor, _: Tensor) -> Tensor:
        """Multiply with A A^T of the smaller side."""
        return self.to_small(self.to_large(vectors))

    def dilated(self, vectors: Tensor, _: Tensor) -> Tensor:
        """Multiply with the symmetric matrix of both sides."""
        upper, lower = vectors.split([self.small, self.large], dim=1)
        return torch.cat([self.to_small(lower), self.to_large(upper)], dim=1)


def _through_products(
    operator: CrossOperator, k: int, tol: float, max_matvec: int | None, seed: int
) -> CrossSpectrum:
    sides = _Sides(operator)
    budget = 82 * k + 400 if max_matvec is None else max_matvec
    least = 6 * k + 4
    if budget < least:
        raise ValueError(
            f"max_matvec={budget} is too small for k={k} singular triplets: allow at least {least} products "
            "with the block and its transpose"
        )
    # Products with the square err by eps sigma_1^2, and residuals are judged down to a thousandth of that.
    reachable = max(tol, 1e3 * torch.finfo(operator.dtype).eps)
    attempts = (
        (sides.squared, sides.small, reachable, max(least, budget // 2)),
        (sides.dilated, sides.small + sides.large, tol, budget),
    )
    tried: list[CrossSpectrum] = []
    left = budget
    for matvec, size, stop, share in attempts:
        pairs = lanczos_eigenpairs(
            matvec,
            size,
            k,
            which="largest",
            tol=stop,
            max_matvec=(min(left, share) - 2 * k) // 2,
            dtype=operator.dtype,
            device=operator.device,
            seed=seed,
            name=operator.name,
        )
        left -= 2 * int(pairs.n_matvec[0]) + 2 * k
        tried.append(_from_small_side(sides, pairs.eigenvectors[0, :, : sides.small], tol))
        if bool(tried[-1].converged.all()) or left < least:
            break
    best = max(reversed(tried), key=lambda found: int(found.converged.sum()))
    return replace(best, n_matvec=budget - left)


def _from_small_side(sides: _Sides, vectors: Tensor, tol: float) -> CrossSpectrum:
    """Return the triplets within the span of vectors of the smaller side, shape (k, small)."""
    # Halves of eigenvectors of eigenvalue zero are anything: QR orthonormalises them, and completes them
    # where they are dependent. The rest follows from their products. In float64 on
    # the CPU, since GPU libraries fail on some matrices of low rank.
    like = {"device": vectors.device, "dtype": vectors.dtype}
    basis = torch.linalg.qr(_exact(vectors).T)[0].T
    images = _exact(sides.to_large(basis.to(**like)))
    rotation, values, large = torch.linalg.svd(images, full_matrices=False)
    small = rotation.T @ basis
    triplets = (small, large, _exact(sides.to_small(large.to(**like))), rotation.T @ images)
    left, right, forward, backward = (triplets[i] for i in ((1, 0, 3, 2) if sides.swapped else (0, 1, 2, 3)))
    return _certified(sides.operator, values, left, right, (forward, backward), tol, path="lanczos")


def _exact(vectors: Tensor) -> Tensor:
    return vectors.to("cpu", torch.float64)


def _certified(
    operator: CrossOperator,
    values: Tensor,
    left: Tensor,
    right: Tensor,
    products: tuple[Tensor, Tensor],
    tol: float,
    *,
    path: Literal["dense", "lanczos"],
) -> CrossSpectrum:
    """Bring triplets into their shapes, with residuals from the products A v and A^T u."""
    if not all(bool(product.isfinite().all()) for product in products):
        raise NonFiniteCurvatureError(operator.name, "a product")
    errors = [products[0] - values[:, None] * left, products[1] - values[:, None] * right]
    norms = (sum_tensors(error.square().sum(1) for error in errors) / 2).sqrt()
    scale = own_scale(values, values.max())
    residuals = torch.where(norms == 0, 0.0, norms / scale)  # the zero matrix has residual 0, not 0 / 0
    k, device = len(values), operator.device
    return CrossSpectrum(
        operator.a,
        operator.b,
        values.to(device),
        left.to(device, operator.dtype).reshape(k, *operator.a.vector_shape),
        right.to(device, operator.dtype).reshape(k, *operator.b.vector_shape),
        residuals.to(device),
        ((residuals <= tol) & residuals.isfinite()).to(device),
        0,
        path,
    )
