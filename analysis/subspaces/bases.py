"""Orthonormal bases of stacked subspaces (kernel).

Recorded eigenvectors are nearly orthonormal, class means are not. Everything
in this package that speaks of a subspace first passes through
:func:`orthonormal_basis`, so that a result depends on the span only.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.floating[Any]]
IntArray = NDArray[np.integer[Any]]

NEARLY_ORTHONORMAL = 0.5
"""Largest |U^T U - I| for which Cholesky is used: the condition number is then at most sqrt(3)."""

RANK_TOLERANCE = 8.0
"""Multiple of k eps below which a singular value of k unit columns counts as zero."""


def precision(array: NDArray[Any]) -> float:
    """Machine epsilon of the array's own dtype; of float64 for integers.

    Examples
    --------
    >>> precision(np.zeros(2, dtype=np.float32))
    1.1920928955078125e-07
    """
    kind = array.dtype if np.issubdtype(array.dtype, np.floating) else np.dtype(np.float64)
    return float(np.finfo(kind).eps)


def divide_or_zero(array: FloatArray, by: FloatArray) -> FloatArray:
    """Divide, with zero where the divisor is zero.

    Examples
    --------
    >>> divide_or_zero(np.array([2.0, 0.0]), np.array([4.0, 0.0]))
    array([0.5, 0. ])
    """
    quotient = np.zeros(np.broadcast_shapes(array.shape, by.shape))
    return np.divide(array, by, out=quotient, where=by != 0)


def finite_matrices(A: FloatArray) -> NDArray[np.bool_]:
    """Tell which of the stacked matrices (..., m, n) have finite entries only: shape (...).

    Examples
    --------
    >>> finite_matrices(np.array([[[1.0]], [[np.nan]]]))
    array([ True, False])
    """
    return np.asarray(np.isfinite(A).all(axis=(-2, -1)))


def singular_values(A: FloatArray) -> FloatArray:
    """Singular values of stacked matrices in decreasing order, computed in float64.

    Parameters
    ----------
    A
        Array of shape (..., m, n).

    Returns
    -------
    values
        float64 array of shape (..., min(m, n)); NaN where A is not finite
        (LAPACK would raise for the whole stack).

    Examples
    --------
    >>> singular_values(np.array([[[3.0, 0.0], [0.0, 4.0]], [[np.nan, 0.0], [0.0, 1.0]]]))
    array([[ 4.,  3.],
           [nan, nan]])
    """
    finite = finite_matrices(A)[..., None]
    A = np.where(finite[..., None], A, 0.0).astype(np.float64, copy=False)
    return np.where(finite, np.linalg.svd(A, compute_uv=False), np.nan)


def full_rank_basis(U: FloatArray) -> FloatArray:
    """Orthonormal bases as by :func:`orthonormal_basis`, NaN where the k columns are dependent.

    Parameters
    ----------
    U
        Array of shape (..., p, k) with k <= p.

    Returns
    -------
    Q
        float64 array of shape (..., p, k).

    Examples
    --------
    >>> full_rank_basis(np.ones((3, 2))).tolist()
    [[nan, nan], [nan, nan], [nan, nan]]
    """
    Q, rank = orthonormal_basis(U)
    deficient = rank < U.shape[-1]
    if deficient.any():
        Q[deficient] = np.nan
    return Q


def orthonormal_basis(U: FloatArray) -> tuple[FloatArray, IntArray]:
    r"""Orthonormal bases of the column spaces of stacked matrices.

    Bases that are orthonormal up to rounding are corrected by
    :math:`Q = U L^{-T}`, :math:`L L^T = U^T U` (Cholesky QR, backward stable
    for well conditioned columns and several times faster than Householder QR
    for tall matrices). All others have their columns scaled to unit length
    and are decomposed by SVD. A direction whose singular value is at most
    ``8 k eps`` of the largest, eps being that of the input's dtype, counts as
    dependent: the rounding of the input alone can produce it.

    Parameters
    ----------
    U
        Array of shape (..., p, k): k vectors of length p as columns.

    Returns
    -------
    Q
        float64 array of shape (..., p, min(p, k)). The first ``rank`` columns
        are orthonormal, the others zero. NaN where U is not finite.
    rank
        Integer array of shape (...): dimension of the span; -1 where U is not
        finite.

    Examples
    --------
    >>> Q, rank = orthonormal_basis(np.array([[1.0, 2.0], [1.0, 2.0], [0.0, 0.0]]))
    >>> int(rank)
    1
    >>> np.abs(Q.round(3))
    array([[0.707, 0.   ],
           [0.707, 0.   ],
           [0.   , 0.   ]])
    """
    U = np.asarray(U)
    p, k = U.shape[-2:]
    lead = U.shape[:-2]
    # rows of length p: the recorded layout (eig, *layer dims), hence contiguous and no copy
    rows = np.swapaxes(U, -1, -2).astype(np.float64, copy=False).reshape(-1, k, p)
    gram, nearly = _gram_of_rows(rows)
    if k <= p and nearly.all():
        basis, rank = inverse_cholesky_factor(gram) @ rows, np.full(len(rows), k)
    else:
        basis, rank = np.empty((len(rows), min(p, k), p)), np.full(len(rows), k)
        # the slice only fits the empty stack: more than p vectors are never nearly orthonormal
        basis[nearly] = (inverse_cholesky_factor(gram[nearly]) @ rows[nearly])[:, : min(p, k)]
        basis[~nearly], rank[~nearly] = _orthonormal_rows_by_svd(rows[~nearly], precision(U))
    return np.swapaxes(basis.reshape(*lead, min(p, k), p), -1, -2), rank.reshape(lead)


def factored_rows(rows: FloatArray) -> tuple[FloatArray, FloatArray | None]:
    r"""Rows W and a small matrix F such that F W are orthonormal rows of the same span.

    What is computed from inner products can have F applied to the small
    products afterwards; the large matrix F W is then never formed, and the
    rows are read once.

    Parameters
    ----------
    rows
        Array of shape (n, k, p): k vectors of length p as rows, k at most p.

    Returns
    -------
    W
        float64 array of shape (n, k, p). NaN where the rows are not finite or
        linearly dependent, as by :func:`full_rank_basis`.
    F
        float64 array of shape (n, k, k), or None for the identity.

    Examples
    --------
    >>> W, F = factored_rows(np.array([[[1.1, 0.0], [0.0, 1.0]]]))
    >>> (F @ W)[0].round(12)
    array([[1., 0.],
           [0., 1.]])
    """
    wide = rows.astype(np.float64, copy=False)
    gram, nearly = _gram_of_rows(wide)
    if nearly.all():
        return wide, inverse_cholesky_factor(gram)
    # the original rows: their dtype says at which precision columns count as dependent
    return np.swapaxes(full_rank_basis(np.swapaxes(rows, -1, -2)), -1, -2), None


def _gram_of_rows(rows: FloatArray) -> tuple[FloatArray, NDArray[np.bool_]]:
    """Inner products of the rows of stacked matrices (n, k, p), and which are nearly orthonormal."""
    k = rows.shape[-2]
    with np.errstate(over="ignore", invalid="ignore"):
        gram = rows @ np.swapaxes(rows, -1, -2)
        # comparisons with NaN are False: matrices that are not finite take the other road
        nearly = k * np.abs(gram - np.eye(k)).max(axis=(-2, -1), initial=0.0) <= NEARLY_ORTHONORMAL
    return gram, nearly


def inverse_cholesky_factor(gram: FloatArray) -> FloatArray:
    r"""Give the matrix F with :math:`F G F^T = I` for stacked positive definite matrices G.

    Examples
    --------
    >>> inverse_cholesky_factor(np.diag([4.0, 1.0]))
    array([[0.5, 0. ],
           [0. , 1. ]])
    """
    factor: FloatArray = np.linalg.inv(np.linalg.cholesky(gram))
    return factor


def _orthonormal_rows_by_svd(rows: FloatArray, eps: float) -> tuple[FloatArray, IntArray]:
    """Rows of unit length, then their right singular vectors as far as the rank goes."""
    finite = finite_matrices(rows)
    rows = np.where(finite[:, None, None], rows, 0.0)
    # largest entry first, then the norm: squares of very small or large entries would leave the range
    rows = divide_or_zero(rows, np.abs(rows).max(axis=-1, keepdims=True, initial=0.0))
    rows = divide_or_zero(rows, np.linalg.norm(rows, axis=-1, keepdims=True))
    _, values, directions = np.linalg.svd(rows, full_matrices=False)
    independent = values > RANK_TOLERANCE * rows.shape[-2] * eps * values[:, :1]
    basis = np.where(independent[:, :, None], directions, 0.0)
    basis[~finite] = np.nan
    return basis, np.where(finite, independent.sum(axis=-1), -1)
