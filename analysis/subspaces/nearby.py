r"""Sines of the angles of many pairs of nearby subspaces from two large matrix products (kernel).

Late in training all subspaces of a run lie close to each other. With a basis B
of one of them as reference (rows, orthonormal), every other one has the basis
:math:`Q_i = A_i (B + T_i)` with :math:`T_i B^T = 0`: :math:`A_i = Q_i B^T`, and
:math:`T_i` is as small as the angle to the reference. What of :math:`Q_j` lies
outside the span of :math:`Q_i` is

.. math:: Q_j (I - P_i) = A_j (T_j - T_i) (I - P_i),

because :math:`(B + T_i)(I - P_i) = 0`. Its Gram matrix, the squares of the
sines, follows from the small products :math:`T_i T_j^T`, which for all pairs
are one matrix product. Rounding of those is relative to :math:`|T|^2` and not
to one: it is known, and a pair for which it is too large is given back to
:mod:`hild_xr.analysis.subspaces.sines`, which takes each pair by itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hild_xr.analysis.subspaces.bases import singular_values
from hild_xr.analysis.subspaces.sines import settled

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hild_xr.analysis.subspaces.bases import FloatArray, IntArray

NEAR = 0.9
"""Smallest cosine of a subspace to the reference for which A is inverted."""

WORTH = 3
"""Number of pairs for each subspace from which coordinates cost less than pairs one by one."""

BYTES_AT_ONCE = 2**22
"""Size of the small matrices, and of the bases, of one pass."""


def nearby_sines_kernel(
    Q: FloatArray, R: FloatArray, i: IntArray, j: IntArray
) -> tuple[FloatArray, NDArray[np.bool_]]:
    """Sines between pairs of nearby subspaces, and for which pairs they are right.

    Parameters
    ----------
    Q, R
        Orthonormal bases as rows, shapes (s, k, p) and (t, k, p); R may be Q
        itself.
    i, j
        Integer arrays of shape (n,): the pairs ``Q[i], R[j]``.

    Returns
    -------
    sines
        float64 array of shape (n, k), increasing.
    right
        Boolean array of shape (n,): where the sines are right to about 1e-15.
        False everywhere if too few pairs are near the reference.

    Examples
    --------
    >>> turn = np.array([0.0, 1e-9, 3e-9, 4e-9])
    >>> Q = np.stack([np.cos(turn), np.sin(turn)], axis=-1)[:, None, :]
    >>> i, j = np.triu_indices(4, 1)
    >>> sines, right = nearby_sines_kernel(Q, Q, np.tile(i, 3), np.tile(j, 3))
    >>> sines[:6, 0].round(12), bool(right.all())
    (array([1.e-09, 3.e-09, 4.e-09, 2.e-09, 3.e-09, 1.e-09]), True)
    """
    n, k = len(i), Q.shape[-2]
    sines, right = np.zeros((n, k)), np.zeros(n, dtype=bool)
    if n == 0:
        return sines, right
    B = Q[np.bincount(i).argmax()]  # the one with the most pairs is finite and has many others near
    A_Q, near_Q = _along(Q, B)
    A_R, near_R = (A_Q, near_Q) if R is Q else _along(R, B)
    near = near_Q[i] & near_R[j]
    if near.sum() < WORTH * (len(Q) if R is Q else len(Q) + len(R)):
        return sines, right
    T_Q = _beside(Q, B, A_Q)
    T_R = T_Q if R is Q else _beside(R, B, A_R)
    all_Q, all_R = (T.reshape(-1, T.shape[-1]) for T in (T_Q, T_R))
    products = (all_Q @ all_R.T).reshape(len(Q), k, len(R), k)
    own_Q, own_R = (T @ T.swapaxes(1, 2) for T in (T_Q, T_R))
    at = np.flatnonzero(near)
    length = max(1, BYTES_AT_ONCE // (8 * k * k))
    for start in range(0, len(at), length):
        some = at[start : start + length]
        a, b = i[some], j[some]
        sines[some], right[some] = _sines_from_products(A_Q[a], own_Q[a], A_R[b], own_R[b], products[a, :, b])
    return sines, right


def _along(Q: FloatArray, B: FloatArray) -> tuple[FloatArray, NDArray[np.bool_]]:
    """Return A = Q B^T for each basis, and which are near; A is the identity for the others."""
    s, k, p = Q.shape
    A = (B @ Q.reshape(s * k, p).T).T.reshape(s, k, k)
    near: NDArray[np.bool_] = singular_values(A)[:, -1] > NEAR
    return np.where(near[:, None, None], A, np.eye(k)), near


def _beside(Q: FloatArray, B: FloatArray, A: FloatArray) -> FloatArray:
    """Return T = A^-1 (Q - A B) for each basis, in passes that stay in the cache."""
    s, k, p = Q.shape
    inverse, T = np.linalg.inv(A), np.empty((s, k, p))
    length = max(1, BYTES_AT_ONCE // (8 * k * p))
    for start in range(0, s, length):
        part = slice(start, start + length)
        along = (A[part].reshape(-1, k) @ B).reshape(Q[part].shape)
        np.matmul(inverse[part], np.subtract(Q[part], along, out=along), out=T[part])
    return T


def _sines_from_products(
    A_i: FloatArray, own_i: FloatArray, A_j: FloatArray, own_j: FloatArray, products: FloatArray
) -> tuple[FloatArray, NDArray[np.bool_]]:
    """Sines from A and T T^T of both sides and from T_i T_j^T, all of shape (n, k, k)."""
    turned = np.swapaxes(products, -1, -2)
    # with D = T_j - T_i: D D^T, and D Q_i^T = D T_i^T A_i^T
    gram = own_j - turned - products + own_i
    inside = (turned - own_i) @ np.swapaxes(A_i, -1, -2)
    outside = A_j @ (gram - inside @ np.swapaxes(inside, -1, -2)) @ np.swapaxes(A_j, -1, -2)
    sines = np.sqrt(np.maximum(np.linalg.eigvalsh(outside), 0.0))
    size = np.einsum("nii->n", own_i) + np.einsum("nii->n", own_j)
    return sines, settled(sines, size)
