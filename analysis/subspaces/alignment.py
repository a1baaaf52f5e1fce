r"""Alignment of vectors and subspaces with subspaces.

The alignment of a vector v with a subspace B is
:math:`\rho(v, B) = \|P_B v\| / \|v\|`, the cosine of its angle to B (not
squared). Two subspaces are compared by the smallest cosine of their principal
angles (Def. 2.2 of arXiv:2310.03010) or by the mean squared cosine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hild_xr.analysis.base.arguments import (
    Dims,
    apply_kernel,
    as_basis,
    declared,
    number_of,
    on_stacked,
    require_real,
    require_same_labels,
    subspaces,
    vector_dims_of,
)
from hild_xr.analysis.subspaces.bases import (
    FloatArray,
    divide_or_zero,
    full_rank_basis,
    orthonormal_basis,
    singular_values,
)
from hild_xr.variables import DIM_SEED, DIM_STEP

if TYPE_CHECKING:
    from collections.abc import Callable

    import xarray as xr
    from numpy.typing import ArrayLike

# ---------------------------------------------------------------------------- kernels


def alignment_kernel(v: FloatArray, B: FloatArray) -> FloatArray:
    """Norm of the projection of vectors onto the column space of B, divided by their norm.

    Parameters
    ----------
    v
        Array of shape (..., p).
    B
        Array of shape (..., p, k). Columns are orthonormalised, dependent ones
        dropped. The leading axes broadcast with those of v.

    Returns
    -------
    rho
        float64 array of shape (...) in [0, 1]; NaN where v is zero or where v
        or B is not finite.

    Examples
    --------
    >>> alignment_kernel(np.array([3.0, 4.0]), np.array([[1.0], [0.0]])).round(12)
    np.float64(0.6)
    """
    Q, _ = orthonormal_basis(B)
    largest = np.abs(v).max(axis=-1, keepdims=True)
    finite = np.isfinite(largest)
    # largest entry first: squares of very small or large entries would leave the range
    scaled = divide_or_zero(np.where(finite, v, 0.0).astype(np.float64), np.where(finite, largest, 1.0))
    norm = np.linalg.norm(scaled, axis=-1)
    projected = np.linalg.norm((scaled[..., None, :] @ Q)[..., 0, :], axis=-1)
    defined = np.broadcast_to(norm > 0, projected.shape)
    rho: FloatArray = np.divide(projected, norm, out=np.full(projected.shape, np.nan), where=defined)
    return np.minimum(rho, 1.0)


def subspace_overlap_kernel(U: FloatArray, V: FloatArray) -> FloatArray:
    """Mean squared cosine of the principal angles between stacked column spaces.

    Parameters
    ----------
    U, V
        Arrays of shapes (..., p, k1) and (..., p, k2).

    Returns
    -------
    overlap
        float64 array of shape (...) in [0, 1]; NaN where U or V is not finite
        or has linearly dependent columns.

    Examples
    --------
    >>> subspace_overlap_kernel(np.eye(3)[:, :2], np.eye(3)[:, 1:]).round(12)
    np.float64(0.5)
    """
    C = _cosine_matrix(U, V)
    overlap: FloatArray = np.square(C).sum(axis=(-2, -1)) / min(C.shape[-2:])
    return np.minimum(overlap, 1.0)


def subspace_alignment_kernel(U: FloatArray, V: FloatArray) -> FloatArray:
    """Smallest cosine of the principal angles between stacked column spaces.

    Parameters
    ----------
    U, V
        Arrays of shapes (..., p, k1) and (..., p, k2).

    Returns
    -------
    alignment
        float64 array of shape (...) in [0, 1]; NaN as in
        :func:`subspace_overlap_kernel`.

    Examples
    --------
    >>> subspace_alignment_kernel(np.eye(3)[:, :2], np.eye(3)[:, 1:]).round(12)
    np.float64(0.0)
    """
    return np.minimum(singular_values(_cosine_matrix(U, V))[..., -1], 1.0)


def _cosine_matrix(U: FloatArray, V: FloatArray) -> FloatArray:
    product: FloatArray = np.swapaxes(full_rank_basis(U), -1, -2) @ full_rank_basis(V)
    return product


# ---------------------------------------------------------------------------- labelled


def alignment(
    vector: xr.DataArray,
    basis: xr.DataArray,
    *,
    vector_dims: Dims = None,
    number_dim: str | None = None,
    min_norm: float = 0.0,
) -> xr.DataArray:
    r"""Alignment of vectors with subspaces, :math:`\rho = \|P_B v\| / \|v\|` (arXiv:2310.03010).

    One where v lies in the subspace; about ``sqrt(k / p)`` for a random
    k-dimensional subspace (:func:`random_alignment_baseline`). Not squared.

    Parameters
    ----------
    vector
        For example a weight with dims (seed, step, out, in): one vector a
        record, or with ``vector_dims=["in"]`` one a row.
    basis
        Vectors that span the subspace: recorded eigenvectors, or fixed ones
        such as class means with dims (class, in) and ``number_dim="class"``.
        They are orthonormalised; linearly dependent ones count once, so the
        subspace is their span.
    vector_dims
        Dims that span one vector; by default the attr ``vector_dims``.
    number_dim
        Dim of the basis that numbers its vectors; by default its attr
        ``number_dim``. The vector may have a dim of that name too: each of its
        vectors is then compared with the whole basis.
    min_norm
        Vectors whose norm is at most this fraction of the largest norm in the
        same record (over all dims but seed, step and the vector dims) give
        NaN: the direction of a dead neuron means nothing. The norms along
        training are not compared.

    Returns
    -------
    xarray.DataArray
        Values in [0, 1] on the dims that are left. NaN for zero vectors and
        where vector or basis is not finite.

    Raises
    ------
    TypeError
        If an array is no DataArray or not real.
    ValueError
        If dims are missing or unknown, if the arrays have different labels
        along a shared dim, or if min_norm is not in [0, 1).

    Examples
    --------
    >>> import xarray as xr
    >>> weight = xr.DataArray([[3.0, 4.0, 0.0], [0.0, 0.0, 1e-9]], dims=("out", "in"))
    >>> means = xr.DataArray(np.eye(3)[:1], dims=("class", "in"))
    >>> alignment(weight, means, vector_dims=["in"], number_dim="class", min_norm=1e-3).values
    array([0.6, nan])
    """
    arrays = {"vector": require_real("vector", vector), "basis": require_real("basis", basis)}
    if not 0 <= min_norm < 1:
        raise ValueError(f"expected min_norm in [0, 1), a fraction of the largest norm, came {min_norm}")
    dims = vector_dims_of(arrays, vector_dims)
    basis = as_basis("basis", basis, dims, number_dim)
    require_same_labels({"vector": vector, "basis": basis})
    result = apply_kernel(
        on_stacked(alignment_kernel, len(dims), bases=(False, True)),
        [vector, basis],
        [dims, (number_of("basis"), *dims)],
    )
    if min_norm > 0:
        norm = apply_kernel(on_stacked(_norm_kernel, len(dims), bases=(False,)), [vector], [dims])
        same_record = [dim for dim in norm.dims if dim not in (DIM_SEED, DIM_STEP)]
        result = result.where(norm > min_norm * (norm.max(same_record) if same_record else norm))
    return declared(result, "alignment")


def random_alignment_baseline(k: ArrayLike, p: ArrayLike) -> FloatArray:
    r"""Alignment of a random vector with a k-dimensional subspace of p dimensions: ``sqrt(k / p)``.

    The root of :math:`E\,\rho^2 = k / p` for a vector with a uniformly
    distributed direction; the mean of :math:`\rho` itself is slightly smaller.

    Parameters
    ----------
    k
        Dimension of the subspace.
    p
        Dimension of the space, the product of the sizes of the vector dims.

    Returns
    -------
    numpy.ndarray
        Of the broadcast shape of k and p.

    Raises
    ------
    ValueError
        Unless 0 <= k <= p and p > 0.

    Examples
    --------
    >>> float(random_alignment_baseline(4, 100))
    0.2
    """
    k, p = np.asarray(k, dtype=np.float64), np.asarray(p, dtype=np.float64)
    if not np.all((k >= 0) & (k <= p) & (p > 0)):
        raise ValueError(f"expected a subspace of dimension 0 <= k <= p, came k={k} and p={p}")
    baseline: FloatArray = np.sqrt(k / p)
    return baseline


def subspace_overlap(
    u: xr.DataArray,
    v: xr.DataArray,
    *,
    vector_dims: Dims = None,
    number_dim: str | tuple[str, str] | None = None,
) -> xr.DataArray:
    r"""Mean squared cosine of the principal angles, :math:`\|U^T V\|_F^2 / \min(k_1, k_2)`.

    One if the smaller subspace lies in the larger one, about
    :math:`\max(k_1, k_2) / p` for random subspaces of p dimensions. Averages
    over directions: see :func:`subspace_alignment` for the worst one.

    Parameters
    ----------
    u, v, vector_dims, number_dim
        As in :func:`hild_xr.analysis.principal_angles`; bases are
        orthonormalised.

    Returns
    -------
    xarray.DataArray
        Values in [0, 1]; NaN where a basis is not finite or linearly dependent.

    Raises
    ------
    TypeError, ValueError
        As :func:`hild_xr.analysis.principal_angles`.

    Examples
    --------
    >>> import xarray as xr
    >>> axes = xr.DataArray(np.eye(3), dims=("eig", "in"))
    >>> pair = {"vector_dims": ["in"], "number_dim": "eig"}
    >>> float(subspace_overlap(axes[:2], axes[1:], **pair))
    0.5
    """
    return _compare("subspace_overlap", subspace_overlap_kernel, u, v, vector_dims, number_dim)


def subspace_alignment(
    u: xr.DataArray,
    v: xr.DataArray,
    *,
    vector_dims: Dims = None,
    number_dim: str | tuple[str, str] | None = None,
) -> xr.DataArray:
    r"""Smallest cosine of the principal angles, :math:`\sigma_{\min}(U^T V)`.

    Two subspaces of one dimension are :math:`\varepsilon`-aligned if every unit
    vector of one has alignment at least :math:`1 - \varepsilon` with the other,
    that is if this number is at least :math:`1 - \varepsilon` (Def. 2.2 of
    arXiv:2310.03010). For different dimensions it speaks of the vectors of the
    smaller subspace.

    Parameters
    ----------
    u, v, vector_dims, number_dim
        As in :func:`hild_xr.analysis.principal_angles`; bases are
        orthonormalised.

    Returns
    -------
    xarray.DataArray
        Values in [0, 1]; NaN where a basis is not finite or linearly dependent.

    Raises
    ------
    TypeError, ValueError
        As :func:`hild_xr.analysis.principal_angles`.

    Examples
    --------
    >>> import xarray as xr
    >>> axes = xr.DataArray(np.eye(3), dims=("eig", "in"))
    >>> pair = {"vector_dims": ["in"], "number_dim": "eig"}
    >>> float(subspace_alignment(axes[:2], axes[:1], **pair))
    1.0
    """
    return _compare("subspace_alignment", subspace_alignment_kernel, u, v, vector_dims, number_dim)


def _compare(
    name: str,
    kernel: Callable[[FloatArray, FloatArray], FloatArray],
    u: xr.DataArray,
    v: xr.DataArray,
    vector_dims: Dims,
    number_dim: str | tuple[str, str] | None,
) -> xr.DataArray:
    bases, vector = subspaces({"u": u, "v": v}, vector_dims, number_dim)
    require_same_labels(bases)
    core_dims = [(number_of(argument), *vector) for argument in bases]
    return declared(apply_kernel(on_stacked(kernel, len(vector)), list(bases.values()), core_dims), name)


def _norm_kernel(v: FloatArray) -> FloatArray:
    norm: FloatArray = np.linalg.norm(v.astype(np.float64), axis=-1)
    return norm
