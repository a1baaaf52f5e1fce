r"""Sines of small principal angles from matrix products alone (kernel).

The sines of the angles of a span to a larger one are the singular values of
what is left of its orthonormal basis after projection,
:math:`E = V - P_U V`. A QR decomposition of E gives them to rounding but costs
several times the products that lead there. The Gram matrix :math:`E^T E` costs
little but squares the sines: of values far below the largest one it keeps no
digit. So the rows of E are first rotated to the eigenvectors of their Gram
matrix, which separates large from small, and the Gram matrix of the rotated
rows, scaled to unit diagonal, goes through Cholesky. Each sine is then right to
about eps times the largest and 1e-8 times its neighbours within a cluster, as in
J. Demmel and K. Veselic, SIAM J. Matrix Anal. Appl. 13 (1992) 1204.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hild_xr.analysis.subspaces.bases import divide_or_zero, singular_values

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hild_xr.analysis.subspaces.bases import FloatArray

JITTER = 4e-15
"""Times k, added to the unit diagonal of a scaled Gram matrix, which rounding may leave indefinite."""

GRAM_ERROR = 1e-15
"""Error of an eigenvalue of a Gram matrix relative to its largest: some eps."""

SETTLED = 1e-15
"""Error (rad) of the sines below which the first Gram matrix is good enough."""


def sines_kernel(
    rows: FloatArray, factor: FloatArray | None, others: FloatArray, coefficients: FloatArray
) -> FloatArray:
    r"""Sines of the principal angles of stacked spans to others of at least their dimension.

    Absolute error about 1e-15, whatever the angles.

    Parameters
    ----------
    rows
        Array of shape (n, k, p): bases as rows.
    factor
        Array of shape (n, k, k) that makes the rows orthonormal, ``factor @
        rows``; None if they are.
    others
        Array of shape (n, m, p) or (1, m, p) with m at least k: rows that span
        the other spaces.
    coefficients
        Array of shape (n, k, m): ``coefficients @ others`` is the projection
        of the rows.

    Returns
    -------
    sines
        float64 array of shape (n, k), increasing.

    Examples
    --------
    >>> a = 1e-9
    >>> row, axis = np.array([[[np.cos(a), np.sin(a)]]]), np.array([[[1.0, 0.0]]])
    >>> float(sines_kernel(row, None, axis, row @ axis.swapaxes(1, 2))[0, 0])
    1e-09
    """
    n, k, m = coefficients.shape
    if len(others) == 1:  # one product is faster than one for each matrix
        left = (coefficients.reshape(n * k, m) @ others[0]).reshape(rows.shape)
    else:
        left = coefficients @ others
    np.subtract(rows, left, out=left)
    gram = left @ np.swapaxes(left, -1, -2)
    if factor is not None:
        gram = factor @ gram @ np.swapaxes(factor, -1, -2)
    squares, rotation = np.linalg.eigh(gram)
    sines: FloatArray = np.sqrt(np.maximum(squares, 0.0))
    unsettled = ~settled(sines, squares[:, -1])
    if unsettled.any():
        turn = np.swapaxes(rotation[unsettled], -1, -2)
        if factor is not None:
            turn = turn @ factor[unsettled]
        sines[unsettled] = _sines_of_rotated(turn @ left[unsettled])
    return sines


def settled(sines: FloatArray, size: FloatArray) -> NDArray[np.bool_]:
    """Tell where sines from Gram matrices of a size, whose rounding is GRAM_ERROR of it, are within SETTLED.

    Parameters
    ----------
    sines
        Array of shape (n, k).
    size
        Array of shape (n,): largest eigenvalue, or trace, of what was rounded.

    Returns
    -------
    settled
        Boolean array of shape (n,).

    Examples
    --------
    >>> settled(np.array([[1e-3, 2e-3], [1e-9, 0.5]]), np.array([4e-6, 0.25]))
    array([ True, False])
    """
    error = GRAM_ERROR * size[:, None]
    # sqrt(s^2 + error) - s in a form without cancellation
    moved = divide_or_zero(error, sines + np.sqrt(sines**2 + error))
    within: NDArray[np.bool_] = moved.max(axis=-1, initial=0.0) <= SETTLED
    return within


def _sines_of_rotated(left: FloatArray) -> FloatArray:
    gram = left @ np.swapaxes(left, -1, -2)
    k = gram.shape[-1]
    lengths = np.sqrt(np.einsum("...ii->...i", gram))
    scaled = divide_or_zero(gram, lengths[..., :, None] * lengths[..., None, :])
    scaled[..., np.arange(k), np.arange(k)] = 1.0 + JITTER * k
    return singular_values(lengths[..., :, None] * np.linalg.cholesky(scaled))[..., ::-1]
