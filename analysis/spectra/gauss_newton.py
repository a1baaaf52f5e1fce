r"""Gauss-Newton split of the Hessian, from whole matrices.

The Hessian of a loss of a network is the Gauss-Newton matrix plus a part with
the curvature of the network, :math:`H = GN + R` (L. Sagun et al., "Empirical
analysis of the Hessian of over-parametrized neural networks", arXiv:1706.04454).
Here are the size of R, :math:`\|H - GN\|_F / \|H\|_F`, and the overlap of the top
eigenspaces of the two. Of recorded eigenvectors the overlap is
:func:`hild_xr.analysis.subspace_overlap`.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from hild_xr.analysis.base.arguments import (
    FLOAT,
    apply_kernel,
    declared,
    require_dims,
    require_real,
    require_same_labels,
)
from hild_xr.analysis.subspaces.bases import finite_matrices, precision
from hild_xr.variables import DIM_PARAM

if TYPE_CHECKING:
    from hild_xr.analysis.subspaces.bases import FloatArray

MATRIX_DIMS = (DIM_PARAM, DIM_PARAM + "_")

RESULTS = ("gauss_newton_residual", "gauss_newton_overlap")

DEGENERATE = 8.0
"""Multiple of p eps |lambda|_max below which the k-th and the next eigenvalue count as equal."""


def gauss_newton_split_kernel(
    hessian: FloatArray, gauss_newton: FloatArray, *, k: int
) -> tuple[FloatArray, FloatArray]:
    """Relative size of the difference, and overlap of the top eigenspaces, of stacked matrices.

    Parameters
    ----------
    hessian, gauss_newton
        Symmetric arrays of shape (..., p, p); the leading axes broadcast.
    k
        Dimension of the eigenspaces, at most p.

    Returns
    -------
    residual, overlap
        float64 arrays of shape (...): NaN as in :func:`gauss_newton_split`.

    Examples
    --------
    >>> residual, overlap = gauss_newton_split_kernel(np.diag([3.0, 0.0, 4.0]), np.diag([3.0, 0.0, 0.0]), k=1)
    >>> float(residual), float(overlap)
    (0.8, 0.0)
    """
    eps = max(precision(hessian), precision(gauss_newton))
    finite = finite_matrices(hessian) & finite_matrices(gauss_newton)
    H, GN = (np.where(finite[..., None, None], A, 0.0).astype(np.float64) for A in (hessian, gauss_newton))
    size = np.abs(H).max(axis=(-2, -1))
    known = finite & (size > 0)
    scale = np.where(known, size, 1.0)[..., None, None]
    H, GN = H / scale, GN / scale
    norms = [np.sqrt(np.square(A).sum(axis=(-2, -1))) for A in (H - GN, H)]
    residual = np.divide(norms[0], norms[1], out=np.full(known.shape, np.nan), where=known)
    (U, separated), (V, also) = (_top_eigenspace(A, k, eps) for A in (H, GN))
    overlap = np.square(np.swapaxes(U, -1, -2) @ V).sum(axis=(-2, -1)) / k
    return residual, np.where(known & separated & also, overlap, np.nan)


def _top_eigenspace(A: FloatArray, k: int, eps: float) -> tuple[FloatArray, FloatArray]:
    """Eigenvectors of the k eigenvalues of largest size, and whether these stand apart from the others."""
    values, vectors = np.linalg.eigh((A + np.swapaxes(A, -1, -2)) / 2)
    order = np.argsort(-np.abs(values), axis=-1, kind="stable")
    sizes = np.take_along_axis(np.abs(values), order, axis=-1)
    top = np.take_along_axis(vectors, order[..., None, :k], axis=-1)
    following = sizes[..., k] if k < sizes.shape[-1] else np.zeros(sizes.shape[:-1])
    return top, sizes[..., k - 1] - following > DEGENERATE * sizes.shape[-1] * eps * sizes[..., 0]


def gauss_newton_split(
    hessian: xr.DataArray,
    gauss_newton: xr.DataArray,
    k: int,
    *,
    dims: tuple[str, str] = MATRIX_DIMS,
) -> xr.Dataset:
    r"""Compare recorded Hessians with Gauss-Newton matrices.

    Parameters
    ----------
    hessian, gauss_newton
        Symmetric matrices over the two `dims`, of the same parameters, loss and
        data.
    k
        Dimension of the top eigenspaces, those of the k eigenvalues of largest
        absolute value.
    dims
        The two dims of a matrix.

    Returns
    -------
    xarray.Dataset
        ``gauss_newton_residual``
            :math:`\|H - GN\|_F / \|H\|_F`; 0 for softmax regression.
        ``gauss_newton_overlap``
            :math:`\|U_k^T V_k\|_F^2 / k`, in [0, 1]; NaN also where the k-th
            eigenvalue of one matrix coincides with the next, up to rounding, or
            is zero: the eigenspace is then not defined.

        Both are NaN where an entry is missing or the Hessian is zero.

    Raises
    ------
    TypeError
        If an array is no DataArray or not real.
    ValueError
        If a dim is missing, matrices are not square, k is out of range, or
        labels differ.

    Examples
    --------
    >>> hessian = xr.DataArray(np.diag([3.0, 0.0, 4.0]), dims=("param", "param_"))
    >>> found = gauss_newton_split(hessian, hessian, k=2)
    >>> float(found.gauss_newton_residual), float(found.gauss_newton_overlap)
    (0.0, 1.0)
    """
    arrays = {"hessian": hessian, "gauss_newton": gauss_newton}
    for name, array in arrays.items():
        require_dims(name, require_real(name, array), dims, "dims")
        if array.sizes[dims[0]] != array.sizes[dims[1]]:
            raise ValueError(f"expected square matrices {name} along {dims}, came {dict(array.sizes)}")
    require_same_labels(arrays)
    if not 1 <= k <= hessian.sizes[dims[0]]:
        raise ValueError(f"expected 1 <= k <= {hessian.sizes[dims[0]]}, the size of the matrix, came k={k}")
    results = apply_kernel(
        functools.partial(gauss_newton_split_kernel, k=k),
        [hessian, gauss_newton],
        [dims, dims],
        output_dims=[(), ()],
        output_dtypes=[FLOAT, FLOAT],
    )
    said = {"gauss_newton_overlap": {"k": k}}
    named = zip(RESULTS, results, strict=True)
    return xr.Dataset({name: declared(found, name, **said.get(name, {})) for name, found in named})
