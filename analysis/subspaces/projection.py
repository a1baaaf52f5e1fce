r"""Dominant and bulk part of gradients and updates.

The span of the first k eigenvectors of the Hessian is the dominant subspace,
its complement the bulk. A vector g splits into :math:`P_k g` and
:math:`(I - P_k) g`; :math:`\chi_k = \|P_k g\| / \|g\|` (M. Song, K. Ahn and
C. Yun, arXiv:2405.16002) and :math:`f_{top} = \chi_k^2` (G. Gur-Ari,
D. A. Roberts and E. Dyer, arXiv:1812.04754) say how much of it is dominant.
For a vector of random direction :math:`E f_{top} = k / p`.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import xarray as xr

from hild_xr.analysis.base.arguments import (
    FLOAT,
    Dims,
    apply_kernel,
    as_basis,
    declared,
    number_of,
    require_real,
    require_same_labels,
    vector_dims_of,
)
from hild_xr.analysis.base.records import earlier_and_later
from hild_xr.analysis.subspaces.bases import FloatArray, divide_or_zero, orthonormal_basis
from hild_xr.variables import DIM_STEP

RESULTS = ("dominant", "bulk", "chi", "f_top")


# ---------------------------------------------------------------------------- kernel


def projection_kernel(v: FloatArray, B: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
    """Dominant part, bulk part, chi and f_top of vectors and column spaces; see :func:`projection`.

    The bulk part is projected twice: what rounding of the first time left in
    the column space would be large beside a small bulk part.

    Parameters
    ----------
    v
        Array of shape (..., p).
    B
        Array of shape (..., p, k). Columns are orthonormalised, dependent ones
        dropped. The leading axes broadcast with those of v.

    Returns
    -------
    dominant, bulk
        float64 arrays of shape (..., p), their sum is v. NaN where v or B is
        not finite.
    chi, f_top
        float64 arrays of shape (...) in [0, 1]; NaN also where v is zero.

    Examples
    --------
    >>> dominant, bulk, chi, f_top = projection_kernel(np.array([3.0, 4.0]), np.array([[1.0], [0.0]]))
    >>> dominant.tolist(), bulk.tolist(), float(chi.round(12)), float(f_top.round(12))
    ([3.0, 0.0], [0.0, 4.0], 0.6, 0.36)
    """
    Q, _ = orthonormal_basis(B)
    largest = np.abs(v).max(axis=-1, keepdims=True).astype(np.float64)
    finite = np.isfinite(largest)
    # largest entry first: squares of very small or large entries would leave the range
    scaled = divide_or_zero(np.where(finite, v, 0.0).astype(np.float64), np.where(finite, largest, 1.0))
    scaled = np.where(finite, scaled, np.nan)
    dominant = _projected(scaled, Q)
    bulk = scaled - dominant
    bulk -= _projected(bulk, Q)
    norms = [np.linalg.norm(part, axis=-1) for part in (dominant, bulk)]
    norm = np.hypot(*norms)
    chi = np.full(norm.shape, np.nan)
    # NaN is not larger than zero either
    np.divide(norms[0], norm, out=chi, where=norm > 0)
    return dominant * largest, bulk * largest, chi, chi**2


def _projected(v: FloatArray, Q: FloatArray) -> FloatArray:
    # coefficients first, as (1, p) @ (p, k) and (1, k) @ (k, p): the p x p projector is never formed
    coefficients = v[..., None, :] @ Q
    projected: FloatArray = (coefficients @ np.swapaxes(Q, -1, -2))[..., 0, :]
    return projected


# ---------------------------------------------------------------------------- labelled


def projection(
    vector: xr.DataArray,
    basis: xr.DataArray,
    *,
    vector_dims: Dims = None,
    number_dim: str | None = None,
) -> xr.Dataset:
    r"""Split vectors into their parts within and beside subspaces.

    :math:`g = P_k g + (I - P_k) g`, with :math:`\chi_k = \|P_k g\| / \|g\|`
    (arXiv:2405.16002) and :math:`f_{top} = \|P_k g\|^2 / \|g\|^2`
    (arXiv:1812.04754). For the k of the papers, the number of classes, select
    it: ``basis.isel(eig=slice(n_classes))``.

    Parameters
    ----------
    vector
        For example gradients with dims (seed, step, out, in), or
        :func:`updates` of the weights.
    basis
        Vectors that span the subspace, for example recorded eigenvectors. They
        are orthonormalised; linearly dependent ones count once.
    vector_dims
        Dims that span one vector; by default the attr ``vector_dims``.
    number_dim
        Dim of the basis that numbers its vectors; by default its attr
        ``number_dim``.

    Returns
    -------
    xarray.Dataset
        ``dominant`` and ``bulk`` on the dims of the vector (and those that only
        the basis has), in its units; their sum is the vector. ``chi`` and
        ``f_top`` in [0, 1] without the vector dims, NaN for zero vectors. All
        are NaN where vector or basis is not finite.

    Raises
    ------
    TypeError
        If an array is no DataArray or not real.
    ValueError
        If dims are missing or unknown, or if the arrays have different labels
        along a shared dim: records that only one of them has are for the
        caller to leave out.

    See Also
    --------
    hild_xr.analysis.alignment : chi alone, with a mask for dead neurons.

    Examples
    --------
    >>> gradient = xr.DataArray([3.0, 4.0, 0.0], dims="in", attrs={"vector_dims": ["in"]})
    >>> basis = xr.DataArray(np.eye(3)[:1], dims=("eig", "in"), attrs={"number_dim": "eig"})
    >>> parts = projection(gradient, basis)
    >>> parts["bulk"].values, float(parts["chi"].round(12))
    (array([0., 4., 0.]), 0.6)
    """
    arrays = {"vector": require_real("vector", vector), "basis": require_real("basis", basis)}
    dims = vector_dims_of(arrays, vector_dims)
    basis = as_basis("basis", basis, dims, number_dim)
    require_same_labels({"vector": vector, "basis": basis})
    coords = {d: vector.coords[d] for d in dims if d in vector.coords}
    results = apply_kernel(
        functools.partial(_projection_on_axes, len(dims)),
        [vector, basis],
        [dims, (number_of("basis"), *dims)],
        output_dims=[dims, dims, (), ()],
        output_sizes={d: vector.sizes[d] for d in dims},
        output_dtypes=[FLOAT] * 4,
    )
    units = vector.attrs.get("units")
    more = {"vector_dims": list(dims)} | ({} if units is None else {"units": units})
    parts = {
        name: declared(result, name, **(more if name in ("dominant", "bulk") else {}))
        for name, result in zip(RESULTS, results, strict=True)
    }
    return xr.Dataset(parts).assign_coords(coords)


def _projection_on_axes(n_vector_axes: int, vector: FloatArray, basis: FloatArray) -> tuple[FloatArray, ...]:
    """Flatten the vector axes for the kernel and give them back to the parts."""
    shape = vector.shape[-n_vector_axes:]
    flat = [a.reshape(*a.shape[:-n_vector_axes], math.prod(shape)) for a in (vector, basis)]
    dominant, bulk, chi, f_top = projection_kernel(flat[0], np.swapaxes(flat[1], -1, -2))
    parts = (part.reshape(*part.shape[:-1], *shape) for part in (dominant, bulk))
    return *parts, chi, f_top


def updates(weights: xr.DataArray, *, dim: str = DIM_STEP) -> xr.DataArray:
    r"""Differences of stored weights between each record and the record before it.

    :math:`\Delta\theta(t) = \theta(t) - \theta(t')` with t' the record before t,
    in float64. Records may be many optimizer steps apart: the difference is
    then the sum of all updates between them.

    Parameters
    ----------
    weights
        Array with `dim` among its dims, for example (seed, step, out, in).
    dim
        Dim along which the records follow each other; its labels increase.

    Returns
    -------
    xarray.DataArray
        Differences on the same dims, labelled by the later one of the two
        records: the first label is missing. NaN where one of the two is NaN: no
        difference reaches across a missing record. The attr ``vector_dims`` is
        kept.

    Raises
    ------
    TypeError
        If weights are no DataArray or not real.
    ValueError
        If the dim is missing, or if its labels are repeated or do not increase.

    Examples
    --------
    >>> weights = xr.DataArray([1.0, 1.5, np.nan, 2.0], coords={"step": [0, 10, 20, 30]})
    >>> found = updates(weights)
    >>> found.values, found["step"].values
    (array([0.5, nan, nan]), array([10, 20, 30]))
    """
    earlier, later = earlier_and_later("weights", require_real("weights", weights), dim)
    kept = {name: weights.attrs[name] for name in ("vector_dims", "units") if name in weights.attrs}
    difference = (later.astype(np.float64) - earlier.astype(np.float64)).transpose(*weights.dims)
    return declared(difference, "update", **kept)
