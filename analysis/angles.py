r"""Principal angles between subspaces.

The principal angles :math:`0 \le \theta_1 \le \dots \le \theta_k \le \pi/2`
between two subspaces with orthonormal bases U and V have as cosines the
singular values of :math:`U^T V`. A cosine close to one carries only the square
of the angle: its arc cosine is wrong by about 1e-8 rad. Small angles are
therefore taken from the sines, the singular values of
:math:`V - U U^T V`, as in A. Bjorck and G. H. Golub, Math. Comp. 27 (1973) 579
and A. V. Knyazev and M. E. Argentati, SIAM J. Sci. Comput. 23 (2002) 2008.
"""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING

import numpy as np

from hild_xr.analysis.arguments import (
    Dims,
    apply_kernel,
    declared,
    number_of,
    on_stacked,
    require_dims,
    require_real,
    require_same_labels,
    subspaces,
)
from hild_xr.analysis.bases import FloatArray, full_rank_basis, singular_values
from hild_xr.variables import DIM_ANGLE, DIM_STEP

if TYPE_CHECKING:
    from collections.abc import Iterator

    import xarray as xr

SMALL_ANGLE = 1e-2
"""Angles (rad) below this are taken from sines; above it the arc cosine is right to about 1e-13."""

BLOCK_BYTES = 2**26
"""Size of the temporary arrays of one pass over many pairs."""


# ---------------------------------------------------------------------------- kernels


def principal_angles_kernel(U: FloatArray, V: FloatArray) -> FloatArray:
    """Principal angles between the column spaces of stacked matrices.

    Absolute error below 1e-12 rad for well conditioned columns, small angles
    included. Columns need not be orthonormal, see
    :func:`hild_xr.analysis.bases.orthonormal_basis`.

    Parameters
    ----------
    U, V
        Arrays of shapes (..., p, k1) and (..., p, k2), k1 and k2 at most p.
        The leading axes broadcast.

    Returns
    -------
    angles
        float64 array of shape (..., min(k1, k2)) in rad, increasing. NaN where
        U or V is not finite or its columns are linearly dependent.

    Examples
    --------
    >>> plane, line = np.eye(3)[:, :2], np.array([[1e-9], [0.0], [1.0]])
    >>> float(np.pi / 2 - principal_angles_kernel(plane, line)[0]).__round__(12)
    1e-09
    """
    Q, R = full_rank_basis(U), full_rank_basis(V)
    return _angles_from_cosines(Q, R, np.swapaxes(Q, -1, -2) @ R)


def pairwise_angles_kernel(U: FloatArray, V: FloatArray) -> FloatArray:
    """Principal angles of every basis of one stack with every basis of another.

    The cosines of all pairs come from one large matrix product, the sines are
    computed only for pairs with an angle below :data:`SMALL_ANGLE`.

    Parameters
    ----------
    U, V
        Arrays of shapes (..., s, p, k1) and (..., t, p, k2).

    Returns
    -------
    angles
        float64 array of shape (..., s, t, min(k1, k2)) in rad, increasing; NaN
        as in :func:`principal_angles_kernel`.

    Examples
    --------
    >>> axes = np.eye(2)[:, :, None]  # two lines in the plane
    >>> pairwise_angles_kernel(axes, axes)[..., 0].round(3)
    array([[0.   , 1.571],
           [1.571, 0.   ]])
    """
    return _pairwise_angles_from_orthonormal(full_rank_basis(U), full_rank_basis(V))


def _pairwise_angles_from_orthonormal(Q: FloatArray, R: FloatArray) -> FloatArray:
    s, t = Q.shape[-3], R.shape[-3]
    k1, k2 = Q.shape[-1], R.shape[-1]
    lead = np.broadcast_shapes(Q.shape[:-3], R.shape[:-3])
    angles = np.empty((*lead, s, t, min(k1, k2)))
    all_of_R = np.swapaxes(_all_rows(R), -1, -2)
    pairs_per_block = BLOCK_BYTES // (8 * k1 * k2 * max(1, math.prod(lead)))
    for part in _slices(s, max(1, pairs_per_block // max(1, t))):
        some = Q[..., part, :, :]
        cosines = (_all_rows(some) @ all_of_R).reshape(*lead, some.shape[-3], k1, t, k2)
        angles[..., part, :, :] = _angles_from_cosines(
            some[..., :, None, :, :], R[..., None, :, :, :], np.swapaxes(cosines, -2, -3)
        )
    return angles


def _all_rows(Q: FloatArray) -> FloatArray:
    """All vectors of a stack of bases (..., s, p, k) below each other: (..., s * k, p)."""
    return np.swapaxes(Q, -1, -2).reshape(*Q.shape[:-3], Q.shape[-3] * Q.shape[-1], Q.shape[-2])


def _angles_from_cosines(Q: FloatArray, R: FloatArray, C: FloatArray) -> FloatArray:
    """Angles between orthonormal bases whose products C = Q^T R are known; NaN bases give NaN."""
    if C.ndim == 2:
        return np.squeeze(_angles_from_cosines(Q[None], R[None], C[None]), 0)
    if R.shape[-1] > Q.shape[-1]:
        Q, R, C = R, Q, np.swapaxes(C, -1, -2)
    cosines = np.minimum(singular_values(C), 1.0)
    angles: FloatArray = np.arccos(cosines)
    small = np.nonzero(angles[..., 0] < SMALL_ANGLE)
    Q = np.broadcast_to(Q, C.shape[:-2] + Q.shape[-2:])
    R = np.broadcast_to(R, C.shape[:-2] + R.shape[-2:])
    for part in _slices(len(small[0]), max(1, BLOCK_BYTES // (8 * R.shape[-2] * R.shape[-1]))):
        at = tuple(index[part] for index in small)
        angles[at] = np.arctan2(_sines(Q[at], R[at], C[at]), cosines[at])
    return angles


def _sines(Q: FloatArray, R: FloatArray, C: FloatArray) -> FloatArray:
    """Sines of the principal angles in increasing order, for R with no more columns than Q.

    The triangle of a QR decomposition has the singular values of the tall
    residual; a Gram matrix would square them away.
    """
    triangle = np.asarray(np.linalg.qr(R - Q @ C, mode="r"))
    return singular_values(triangle)[..., ::-1]


def _slices(n: int, length: int) -> Iterator[slice]:
    return (slice(start, start + length) for start in range(0, n, length))


# ---------------------------------------------------------------------------- labelled


def principal_angles(
    u: xr.DataArray,
    v: xr.DataArray,
    *,
    vector_dims: Dims = None,
    number_dim: str | tuple[str, str] | None = None,
) -> xr.DataArray:
    r"""Principal angles between two arrays of subspaces, record by record.

    :math:`\cos\theta_i = \sigma_i(U^T V)`, with small angles taken from sines
    (Bjorck and Golub 1973, Knyazev and Argentati 2002; absolute error below
    1e-12 rad). Only the spans count: bases are orthonormalised first. Lazy on
    dask-backed arrays.

    Parameters
    ----------
    u, v
        Bases, for example recorded eigenvectors with dims (seed, step, eig,
        out, in). Dims that only one of them has are broadcast; the number of
        vectors may differ.
    vector_dims
        Dims that span one vector; by default the attr ``vector_dims``.
    number_dim
        Dim that numbers the vectors, or one for u and one for v; by default
        the attrs ``number_dim``.

    Returns
    -------
    xarray.DataArray
        Angles in rad along the new last dim ``angle``, increasing. NaN where a
        basis is not finite, or linearly dependent at the precision of its
        dtype (the subspace then has another dimension than said).

    Raises
    ------
    TypeError
        If an array is no DataArray or not real.
    ValueError
        If dims are missing or unknown, if a basis has more vectors than
        entries, or if u and v have different labels along a shared dim.

    See Also
    --------
    pairwise_angles : all pairs of steps of one array.
    angles_to_reference : against one step of the array itself.

    Examples
    --------
    >>> import xarray as xr
    >>> attrs = {"vector_dims": ["in"], "number_dim": "eig"}
    >>> u = xr.DataArray(np.eye(3)[:2], dims=("eig", "in"), attrs=attrs)
    >>> v = u.roll(eig=1).isel(eig=[0])
    >>> principal_angles(u, v).values
    array([0.])
    """
    bases, vector = subspaces({"u": u, "v": v}, vector_dims, number_dim)
    require_same_labels(bases)
    u, v = bases.values()
    result = apply_kernel(
        on_stacked(principal_angles_kernel, len(vector)),
        [u, v],
        [(number_of("u"), *vector), (number_of("v"), *vector)],
        output_dims=[(DIM_ANGLE,)],
        output_sizes={DIM_ANGLE: min(u.sizes[number_of("u")], v.sizes[number_of("v")])},
    )
    return declared(result, "principal_angles")


def pairwise_angles(
    u: xr.DataArray,
    *,
    dim: str = DIM_STEP,
    vector_dims: Dims = None,
    number_dim: str | None = None,
) -> xr.DataArray:
    """Principal angles between the subspaces of all pairs of steps.

    Dask-backed arrays are worked on one pair of chunks at a time, each as one
    matrix product; every basis is orthonormalised once.

    Parameters
    ----------
    u
        Bases with dims (..., `dim`, number_dim, vector dims) in any order.
    dim
        Dim whose labels are paired.
    vector_dims, number_dim
        As in :func:`principal_angles`.

    Returns
    -------
    xarray.DataArray
        Angles in rad with dims (..., `dim`, `dim` + "_", angle), symmetric in
        the two up to rounding; NaN as in :func:`principal_angles`.

    Raises
    ------
    TypeError, ValueError
        As :func:`principal_angles`.

    Examples
    --------
    >>> import xarray as xr
    >>> u = xr.DataArray(
    ...     np.eye(3)[:, None, :],
    ...     dims=("step", "eig", "in"),
    ...     coords={"step": [0, 10, 20]},
    ...     attrs={"vector_dims": ["in"], "number_dim": "eig"},
    ... )
    >>> angles = pairwise_angles(u)
    >>> angles.dims, angles.sel(step=10, step_=20).values.round(4)
    (('step', 'step_', 'angle'), array([1.5708]))
    """
    bases, vector = subspaces({"u": u}, vector_dims, number_dim)
    u = bases["u"]
    require_dims("u", u, (dim,), "dim")
    number, flat, other = number_of("u"), "__vector__", dim + "_"
    if dim in vector or other in u.dims:
        raise ValueError(f"expected dim={dim!r} beside the vector dims and no dim {other!r}, came {u.dims}")
    k, p = u.sizes[number], math.prod(u.sizes[d] for d in vector)
    # (number, flat) and not (flat, number): dask copies blocks to C order, and vectors are to stay contiguous
    basis = apply_kernel(
        on_stacked(_full_rank_rows, len(vector)),
        [u],
        [(number, *vector)],
        output_dims=[(number, flat)],
        output_sizes={number: k, flat: p},
    ).transpose(..., dim, number, flat)
    with warnings.catch_warnings():
        # dask advises against graphs with more chunks than the input: all pairs of chunks are meant here
        warnings.filterwarnings("ignore", "Increasing number of chunks")
        result = apply_kernel(
            _pairwise_angles_of_rows,
            [basis, basis.rename({dim: other})],
            [(number, flat), (number, flat)],
            output_dims=[(DIM_ANGLE,)],
            output_sizes={DIM_ANGLE: k},
        )
    return declared(result, "principal_angles")


def angles_to_reference(
    u: xr.DataArray,
    reference: object,
    *,
    dim: str = DIM_STEP,
    vector_dims: Dims = None,
    number_dim: str | None = None,
) -> xr.DataArray:
    """Principal angles of the subspace at every step to the one at a reference step.

    Parameters
    ----------
    u
        Bases with dims (..., `dim`, number_dim, vector dims) in any order.
    reference
        Label along `dim`, for example the step 0.
    dim
        Dim along which the reference lies.
    vector_dims, number_dim
        As in :func:`principal_angles`.

    Returns
    -------
    xarray.DataArray
        Angles in rad with dims (..., `dim`, angle); the label of the reference
        stands in the attr ``reference``.

    Raises
    ------
    KeyError
        If there is no such label.
    TypeError, ValueError
        As :func:`principal_angles`, and if several records carry the label.

    Examples
    --------
    >>> import xarray as xr
    >>> u = xr.DataArray(
    ...     np.eye(3)[:, None, :],
    ...     dims=("step", "eig", "in"),
    ...     coords={"step": [0, 10, 20]},
    ...     attrs={"vector_dims": ["in"], "number_dim": "eig"},
    ... )
    >>> angles_to_reference(u, 10).isel(angle=0).values.round(4)
    array([1.5708, 0.    , 1.5708])
    """
    require_dims("u", require_real("u", u), (dim,), "dim")
    try:
        at_reference = u.sel({dim: reference}, drop=True)
    except KeyError:
        raise KeyError(
            f"expected a label of dim {dim!r} as reference, came {reference!r}; "
            f"the labels are {u.indexes[dim].tolist()}"
        ) from None
    if dim in at_reference.dims:
        raise ValueError(
            f"expected one record at {dim}={reference!r}, came {at_reference.sizes[dim]}; "
            f"drop duplicates with u.drop_duplicates({dim!r})"
        )
    result = principal_angles(u, at_reference, vector_dims=vector_dims, number_dim=number_dim)
    return declared(result, "principal_angles", reference=reference)


def _full_rank_rows(U: FloatArray) -> FloatArray:
    return np.swapaxes(full_rank_basis(U), -1, -2)


def _pairwise_angles_of_rows(Q: FloatArray, R: FloatArray) -> FloatArray:
    """Undo the broadcasting by name: the dim of the other array stands as an axis of size one."""
    Q, R = np.squeeze(Q, -3), np.squeeze(R, -4) if R.ndim > 3 else R
    return _pairwise_angles_from_orthonormal(np.swapaxes(Q, -1, -2), np.swapaxes(R, -1, -2))
