r"""Drift of single eigenvectors and of their span along training (Hessian inertia).

The overlap matrix :math:`O_{ij}(s, t) = |\langle u_i(s), u_j(t) \rangle|` of the eigenvectors of
two records says how the eigenvectors have turned, pair by pair; the subspace
overlap :math:`\|U_s^T U_t\|_F^2 / k` says how their span has. Both are those of G. Gur-Ari,
D. A. Roberts and E. Dyer, arXiv:1812.04754. For a quadratic loss O is the identity for
all s and t; for random directions of p dimensions the subspace overlap is about
:math:`k / p`.

Where eigenvalues nearly coincide single eigenvectors mean nothing: compare spans, or
follow the eigenpairs with :func:`hild_xr.analysis.track`, which knows groups.
"""

from __future__ import annotations

import importlib
import math
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from hild_xr.analysis.base.arguments import (
    Dims,
    apply_kernel,
    declared,
    number_dim_of,
    number_of,
    on_stacked,
    require_dims,
    require_same_labels,
    subspaces,
)
from hild_xr.analysis.base.chunks import united
from hild_xr.analysis.base.records import require_unique_labels
from hild_xr.analysis.base.threads import on_one_blas_thread
from hild_xr.analysis.subspaces.bases import FloatArray, IntArray, full_rank_basis
from hild_xr.variables import DIM_STEP

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

BLOCK_BYTES = 2**26
"""Size of the temporary arrays of one pass over many records or pairs."""

SAFE_SQUARES = (1e-280, 1e280)
"""Squared norms in between come from squares that have not left the range of float64."""

_FLAT = "__vector__"


# ---------------------------------------------------------------------------- kernels


def eigenvector_overlap_kernel(U: FloatArray, V: FloatArray) -> FloatArray:
    """Absolute cosines between the columns of stacked matrices.

    Parameters
    ----------
    U, V
        Arrays of shapes (..., p, k1) and (..., p, k2). Columns are scaled to unit length.

    Returns
    -------
    overlap
        float64 array of shape (..., k1, k2) in [0, 1]; NaN for columns that are zero or
        not finite.

    Examples
    --------
    >>> eigenvector_overlap_kernel(np.eye(2), np.array([[3.0], [-4.0]])).round(12)
    array([[0.6],
           [0.8]])
    """
    rows, others = (unit_rows(np.swapaxes(A, -1, -2)) for A in (U, V))
    return _absolute(rows @ np.swapaxes(others, -1, -2))


def pairwise_overlap_kernel(U: FloatArray, V: FloatArray) -> FloatArray:
    """Absolute cosines between the columns of every matrix of one stack and every one of another.

    All of them come from one matrix product.

    Parameters
    ----------
    U, V
        Arrays of shapes (..., s, p, k1) and (..., t, p, k2).

    Returns
    -------
    overlap
        float64 array of shape (..., s, t, k1, k2), as by :func:`eigenvector_overlap_kernel`.

    Examples
    --------
    >>> pairwise_overlap_kernel(np.eye(2)[:, :, None], np.eye(2)[:, :, None])[..., 0, 0]
    array([[1., 0.],
           [0., 1.]])
    """
    return _absolute(_products(unit_rows(np.swapaxes(U, -1, -2)), unit_rows(np.swapaxes(V, -1, -2))))


def pairwise_subspace_overlap_kernel(U: FloatArray, V: FloatArray) -> FloatArray:
    """Mean squared cosine of the principal angles of every pair of bases of two stacks.

    Parameters
    ----------
    U, V
        Arrays of shapes (..., s, p, k1) and (..., t, p, k2). Columns are orthonormalised.

    Returns
    -------
    overlap
        float64 array of shape (..., s, t) in [0, 1]; NaN where a basis is not finite or
        linearly dependent.

    Examples
    --------
    >>> axes = np.stack([np.eye(3)[:, :2], np.eye(3)[:, 1:]])
    >>> pairwise_subspace_overlap_kernel(axes, axes).round(12)
    array([[1. , 0.5],
           [0.5, 1. ]])
    """
    return _subspace_overlaps(_orthonormal_rows(U), _orthonormal_rows(V))


def consecutive_overlap_kernel(rows: FloatArray, before: FloatArray) -> FloatArray:
    """Cosines between the vectors of each record and those of the last one recorded before it.

    Parameters
    ----------
    rows
        Array of shape (..., s, k, p): k vectors for each of s records. A vector with NaN is
        absent; a record without vectors was not recorded.
    before
        Array of shape (..., 1, k, p): the last record before the first one, NaN if there
        is none.

    Returns
    -------
    overlap
        float64 array of shape (..., s, k, k): earlier vectors along the last axis but one.
        Signed; NaN where one of the two vectors is absent.

    Examples
    --------
    >>> axes = np.stack([np.eye(2), np.full((2, 2), np.nan), np.eye(2)[::-1]])
    >>> consecutive_overlap_kernel(axes, np.full((1, 2, 2), np.nan))[2]
    array([[0., 1.],
           [1., 0.]])
    """
    *lead, s, k, p = rows.shape
    n = math.prod(lead)
    rows = rows.reshape(n, s, k, p)
    before = np.broadcast_to(before, (*lead, 1, k, p)).reshape(n, k, p)
    last, last_norm = _with_norms(np.array(before, dtype=np.float64))  # a copy: the loop moves it on
    overlap = np.empty((n, s, k, k))
    for part in _slices(s, max(1, BLOCK_BYTES // max(1, 8 * k * p * n))):
        some, norm = _with_norms(rows[:, part])
        overlap[:, part] = _overlap_with_last(some, norm, last, last_norm)
        found = _last_place(norm)
        run = np.flatnonzero(found >= 0)
        last[run], last_norm[run] = some[run, found[run]], norm[run, found[run]]
    return overlap.reshape(*lead, s, k, k)


def _overlap_with_last(
    rows: FloatArray, norm: FloatArray, before: FloatArray, norm_before: FloatArray
) -> FloatArray:
    """Cosines of records (n, s, k, p) with the one before each; shapes of the first one: (n, k, p)."""
    n, s, k, _ = rows.shape
    overlap, of_earlier = np.empty((n, s, k, k)), np.empty((n, s, k))
    transposed = np.swapaxes(rows, -1, -2)
    overlap[:, 1:], of_earlier[:, 1:] = rows[:, :-1] @ transposed[:, 1:], norm[:, :-1]
    last = np.maximum.accumulate(np.where(_any_vector(norm), np.arange(s), -1), axis=-1)
    last = np.concatenate([np.full((n, 1), -1), last[:, :-1]], axis=-1)
    run, at = np.nonzero((last >= 0) & (last < np.arange(s) - 1))  # records are missing in between
    overlap[run, at] = rows[run, last[run, at]] @ transposed[run, at]
    of_earlier[run, at] = norm[run, last[run, at]]
    run, at = np.nonzero(last < 0)
    overlap[run, at], of_earlier[run, at] = before[run] @ transposed[run, at], norm_before[run]
    return overlap / (of_earlier[..., :, None] * norm[..., None, :])


def _with_norms(rows: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Vectors in float64 and their norms, NaN for what is no vector (zero or not finite).

    The small products are divided by the norms, not the large vectors: that costs one pass less.
    """
    rows = rows.astype(np.float64, copy=False)
    square = np.einsum("...p,...p->...", rows, rows)
    if ((square < SAFE_SQUARES[0]) | (square > SAFE_SQUARES[1])).any():  # out of range, zero or infinite
        rows = unit_rows(rows)
        square = np.einsum("...p,...p->...", rows, rows)
    return rows, np.sqrt(square)


def _any_vector(norm: FloatArray) -> NDArray[np.bool_]:
    return np.asarray(np.isfinite(norm).any(axis=-1))


def _last_place(norm: FloatArray) -> IntArray:
    """Last of the records (..., s, k) with a vector; -1 if there is none."""
    place: IntArray = np.where(_any_vector(norm), np.arange(norm.shape[-2]), -1).max(axis=-1, initial=-1)
    return place


def unit_rows(rows: FloatArray) -> FloatArray:
    """Scale vectors along the last axis to unit length, in float64; NaN for zero or unfinite ones.

    Examples
    --------
    >>> unit_rows(np.array([[3.0, 4.0], [0.0, 0.0]]))
    array([[0.6, 0.8],
           [nan, nan]])
    """
    largest = np.abs(rows).max(axis=-1, keepdims=True, initial=0.0)
    usable = np.isfinite(largest) & (largest > 0)
    # largest entry first: squares of very small or large entries would leave the range
    scaled = rows / np.where(usable, largest, np.nan).astype(np.float64)
    unit: FloatArray = scaled / np.linalg.norm(scaled, axis=-1, keepdims=True)
    return unit


def is_vector(rows: FloatArray) -> NDArray[np.bool_]:
    """Tell which rows (..., p) are finite and not zero: shape (...).

    Examples
    --------
    >>> is_vector(np.array([[3.0, 4.0], [0.0, 0.0], [np.nan, 1.0]]))
    array([ True, False, False])
    """
    return np.asarray(np.isfinite(_with_norms(rows)[1]))


def last_record(rows: FloatArray) -> FloatArray:
    """Return the last recorded one of records (..., s, k, p): shape (..., 1, k, p), NaN if there is none.

    Examples
    --------
    >>> last_record(np.array([[[1.0]], [[2.0]], [[np.nan]]]))
    array([[[2.]]])
    """
    place = _last_place(_with_norms(rows)[1])
    found = np.take_along_axis(rows, np.maximum(place, 0)[..., None, None, None], axis=-3)
    return np.where(place[..., None, None, None] >= 0, found, np.nan).astype(rows.dtype)


def _absolute(cosines: FloatArray) -> FloatArray:
    return np.minimum(np.abs(cosines), 1.0)


def _products(rows: FloatArray, others: FloatArray) -> FloatArray:
    """Products of all vectors of (..., s, k1, p) and (..., t, k2, p): shape (..., s, t, k1, k2)."""
    (*lead, s, k1, p), (t, k2) = rows.shape, others.shape[-3:-1]
    product = rows.reshape(*lead, s * k1, p) @ np.swapaxes(others.reshape(*lead, t * k2, p), -1, -2)
    return np.swapaxes(product.reshape(*lead, s, k1, t, k2), -2, -3)


def _orthonormal_rows(U: FloatArray) -> FloatArray:
    return np.swapaxes(full_rank_basis(U), -1, -2)


def _subspace_overlaps(rows: FloatArray, others: FloatArray) -> FloatArray:
    *lead, s, k1, _ = rows.shape
    t, k2 = others.shape[-3:-1]
    overlap = np.empty((*lead, s, t))
    for part in _slices(s, max(1, BLOCK_BYTES // max(1, 8 * k1 * k2 * t * math.prod(lead)))):
        products = _products(rows[..., part, :, :], others)
        overlap[..., part, :] = np.square(products, out=products).sum(axis=(-2, -1)) / min(k1, k2)
    return np.minimum(overlap, 1.0)


def _slices(n: int, length: int) -> Iterator[slice]:
    return (slice(start, start + length) for start in range(0, n, length))


# ---------------------------------------------------------------------------- labelled


def eigenvector_overlap(
    u: xr.DataArray,
    v: xr.DataArray,
    *,
    vector_dims: Dims = None,
    number_dim: str | tuple[str, str] | None = None,
) -> xr.DataArray:
    r"""Overlap matrix :math:`O_{ij} = |\langle u_i, v_j \rangle|` of two arrays of vectors, record by record.

    Parameters
    ----------
    u, v, vector_dims, number_dim
        As in :func:`hild_xr.analysis.principal_angles`; vectors are scaled to unit length,
        but not orthogonalised.

    Returns
    -------
    xarray.DataArray
        Values in [0, 1] with the number dims of u and v as last dims; that of v carries
        an underscore where the two are equal (eig, eig_). NaN for vectors that are
        zero or not finite.

    Raises
    ------
    TypeError, ValueError
        As :func:`hild_xr.analysis.principal_angles`.

    Examples
    --------
    >>> axes = xr.DataArray(np.eye(3), dims=("eig", "in"))
    >>> pair = {"vector_dims": ["in"], "number_dim": "eig"}
    >>> eigenvector_overlap(axes[:2], -axes.roll(eig=1)[:2], **pair).values
    array([[0., 1.],
           [0., 0.]])
    """
    bases, vector = subspaces({"u": u, "v": v}, vector_dims, number_dim)
    require_same_labels(bases)
    given = number_dim if isinstance(number_dim, tuple) else (number_dim, number_dim)
    numbers = [number_dim_of("u", u, given[0]), number_dim_of("v", v, given[1])]
    own = [number_of(name) for name in bases]
    result = apply_kernel(
        on_stacked(eigenvector_overlap_kernel, len(vector)),
        list(bases.values()),
        [(number, *vector) for number in own],
        output_dims=[own],
        output_sizes={number: bases[name].sizes[number] for name, number in zip(bases, own, strict=True)},
    )
    return _numbered(declared(result, "eigenvector_overlap"), (u, v), own, numbers)


def pairwise_overlap(
    u: xr.DataArray, *, dim: str = DIM_STEP, vector_dims: Dims = None, number_dim: str | None = None
) -> xr.DataArray:
    r"""Overlap matrices :math:`O_{ij}(s, t) = |\langle u_i(s), u_j(t) \rangle|` of all pairs of steps.

    Of dask-backed arrays neighbouring small chunks along `dim` are united, and each pair of
    the united ones is a task, one matrix product.

    Parameters
    ----------
    u
        Vectors with dims (..., `dim`, number_dim, vector dims) in any order. They are scaled
        to unit length, but not orthogonalised.
    dim
        Dim whose labels are paired.
    vector_dims, number_dim
        As in :func:`hild_xr.analysis.principal_angles`.

    Returns
    -------
    xarray.DataArray
        Values in [0, 1] with dims (..., `dim`, `dim` + "_", eig, eig_); NaN for
        vectors that are zero or not finite.

    Raises
    ------
    TypeError, ValueError
        As :func:`hild_xr.analysis.pairwise_angles`.

    Examples
    --------
    >>> u = xr.DataArray(
    ...     [[[1.0, 0.0], [0.0, 1.0]], [[0.6, 0.8], [0.8, -0.6]]],
    ...     dims=("step", "eig", "in"),
    ...     coords={"step": [0, 10]},
    ...     attrs={"vector_dims": ["in"], "number_dim": "eig"},
    ... )
    >>> pairwise_overlap(u).sel(step=0, step_=10).values
    array([[0.6, 0.8],
           [0.8, 0.6]])
    """
    rows, number, name = _rows_of_records(u, dim, vector_dims, number_dim, _unit_rows_of_columns, True)
    own = [number, number + "v"]
    rows_v = rows.rename({dim: dim + "_", number: own[1]})
    k = rows.sizes[number]
    result = _of_all_pairs(_pairwise_overlaps, rows, rows_v, own, dict.fromkeys(own, k))
    return _numbered(declared(result, "eigenvector_overlap"), (u, u), own, [name, name])


def pairwise_subspace_overlap(
    u: xr.DataArray, *, dim: str = DIM_STEP, vector_dims: Dims = None, number_dim: str | None = None
) -> xr.DataArray:
    r"""Subspace overlap :math:`\|U_s^T U_t\|_F^2 / k` of all pairs of steps (arXiv:1812.04754).

    The mean squared cosine of the principal angles, from matrix products alone: cheaper
    than :func:`hild_xr.analysis.pairwise_angles`, which gives the angles one by one.

    Parameters
    ----------
    u, dim, vector_dims, number_dim
        As in :func:`pairwise_overlap`; bases are orthonormalised.

    Returns
    -------
    xarray.DataArray
        Values in [0, 1] with dims (..., `dim`, `dim` + "_"); NaN where a basis is not
        finite or linearly dependent.

    Raises
    ------
    TypeError, ValueError
        As :func:`hild_xr.analysis.pairwise_angles`.

    Examples
    --------
    >>> u = xr.DataArray(
    ...     np.stack([np.eye(3)[:2], np.eye(3)[1:]]),
    ...     dims=("step", "eig", "in"),
    ...     attrs={"vector_dims": ["in"], "number_dim": "eig"},
    ... )
    >>> pairwise_subspace_overlap(u).values.round(12)
    array([[1. , 0.5],
           [0.5, 1. ]])
    """
    rows, number, _ = _rows_of_records(u, dim, vector_dims, number_dim, _orthonormal_rows, False)
    rows_v = rows.rename({dim: dim + "_", number: number + "v"})
    result = _of_all_pairs(_pairwise_subspace_overlaps, rows, rows_v, [], {})
    return declared(result, "subspace_overlap")


def consecutive_overlap(
    u: xr.DataArray, *, dim: str = DIM_STEP, vector_dims: Dims = None, number_dim: str | None = None
) -> xr.DataArray:
    r"""Overlap matrices between the vectors of each record and those of the last one recorded before.

    Records without a finite vector are skipped: the record after a gap is compared with the
    one before it. Dask-backed arrays are read once, chunk by chunk.

    Parameters
    ----------
    u
        Vectors with dims (..., `dim`, number_dim, vector dims) in any order, with increasing
        labels along `dim`. They are scaled to unit length, but not orthogonalised.
    dim
        Dim of the records.
    vector_dims, number_dim
        As in :func:`hild_xr.analysis.principal_angles`.

    Returns
    -------
    xarray.DataArray
        Values in [0, 1] with dims (..., `dim`, eig_, eig): the vectors of the earlier
        record are numbered by eig_. NaN at the first record, and where a vector is zero
        or not finite.

    Raises
    ------
    TypeError, ValueError
        As :func:`hild_xr.analysis.principal_angles`, and if labels along `dim` do not
        increase.

    Examples
    --------
    >>> u = xr.DataArray(
    ...     [[[1.0, 0.0]], [[np.nan, np.nan]], [[0.6, 0.8]]],
    ...     dims=("step", "eig", "in"),
    ...     attrs={"vector_dims": ["in"], "number_dim": "eig"},
    ... )
    >>> consecutive_overlap(u).squeeze().values
    array([nan, nan, 0.6])
    """
    number = number_dim_of("u", u, number_dim)
    signed = signed_consecutive_overlap(u, dim=dim, vector_dims=vector_dims, number_dim=number_dim)
    overlap = xr.apply_ufunc(_absolute, signed, dask="parallelized", output_dtypes=[np.float64])
    own = [number_of("u") + "_", number_of("u")]
    result = declared(overlap, "eigenvector_overlap")
    return _numbered(result, (u, u), own, [number + "_", number])


def signed_consecutive_overlap(
    u: xr.DataArray, *, dim: str = DIM_STEP, vector_dims: Dims = None, number_dim: str | None = None
) -> xr.DataArray:
    """Signed cosines of :func:`consecutive_overlap`, with the number dims named by ``number_of``.

    Raises
    ------
    TypeError, ValueError
        As :func:`consecutive_overlap`.

    Examples
    --------
    >>> u = xr.DataArray(
    ...     [[[1.0, 0.0]], [[-1.0, 0.0]]],
    ...     dims=("step", "eig", "in"),
    ...     attrs={"vector_dims": ["in"], "number_dim": "eig"},
    ... )
    >>> signed_consecutive_overlap(u).squeeze().values
    array([nan, -1.])
    """
    bases, vector = subspaces({"u": u}, vector_dims, number_dim)
    u = bases["u"]
    require_dims("u", u, (dim,), "dim")
    require_increasing_labels("u", u, dim)
    number = number_of("u")
    rows = _flat_rows(u, dim, number, vector, _rows_of_columns, u.dtype)
    lead = rows.dims[:-2]
    if rows.chunks is None:
        nothing = np.full((1, *rows.shape[-2:]), np.nan)
        overlap: Any = consecutive_overlap_kernel(rows.to_numpy(), nothing)
    else:
        overlap = _of_chunks(rows.data)
    coords = {name: c.variable for name, c in rows.coords.items() if set(c.dims) <= set(lead)}
    return xr.DataArray(overlap, dims=(*lead, number + "_", number), coords=coords)


def recorded_vectors(
    u: xr.DataArray, *, dim: str = DIM_STEP, vector_dims: Dims = None, number_dim: str | None = None
) -> xr.DataArray:
    """Tell which vectors are recorded: finite and not zero. The number dim is named by ``number_of``.

    Raises
    ------
    TypeError, ValueError
        As :func:`consecutive_overlap`.

    Examples
    --------
    >>> u = xr.DataArray([[[1.0, 0.0], [0.0, np.nan]]], dims=("step", "eig", "in"))
    >>> recorded_vectors(u, vector_dims="in", number_dim="eig").values
    array([[ True, False]])
    """
    bases, vector = subspaces({"u": u}, vector_dims, number_dim)
    number = number_of("u")
    recorded: xr.DataArray = apply_kernel(
        on_stacked(_is_vector_of_columns, len(vector)),
        [bases["u"]],
        [(number, *vector)],
        output_dims=[(number,)],
        output_sizes={number: bases["u"].sizes[number]},
        output_dtypes=[np.dtype(np.bool_)],
    )
    return recorded.transpose(..., dim, number)


def require_increasing_labels(name: str, array: xr.DataArray, dim: str) -> None:
    """Raise unless the labels along the dim increase: what comes before what would not be known.

    Raises
    ------
    ValueError
        If a label occurs twice or is smaller than the one before it.

    Examples
    --------
    >>> require_increasing_labels("u", xr.DataArray([0.0, 0.0], coords={"step": [10, 0]}), "step")
    Traceback (most recent call last):
    ...
    ValueError: expected increasing labels along dim 'step' of u, came [10, 0];
    sort them with u.sortby('step')
    """
    require_unique_labels(name, array, dim)
    index = array.indexes.get(dim)
    if index is not None and not index.is_monotonic_increasing:
        raise ValueError(
            f"expected increasing labels along dim {dim!r} of {name}, came {index.tolist()}; "
            f"sort them with {name}.sortby({dim!r})"
        )


def _of_chunks(rows: Any) -> Any:
    """Overlaps of a dask array (..., s, k, p): each chunk of records with itself and the record before."""
    da: Any = importlib.import_module("dask.array")  # dask is not typed
    cumreduction = da.reductions.cumreduction

    step, k = rows.ndim - 3, rows.shape[-2]
    blocks = rows.numblocks[step]
    one_each = (*rows.chunks[:step], (1,) * blocks, *rows.chunks[step + 1 :])
    last = rows.map_blocks(last_record, chunks=one_each, dtype=rows.dtype)
    last = cumreduction(_as_it_is, _later_if_recorded, np.nan, last, axis=step, dtype=rows.dtype)
    first = (*rows.chunks[:step], (1,), *rows.chunks[step + 1 :])
    nothing = da.full(tuple(sum(sizes) for sizes in first), np.nan, chunks=first, dtype=rows.dtype)
    before = da.concatenate([nothing, last[(slice(None),) * step + (slice(blocks - 1),)]], axis=step)
    index = tuple(range(rows.ndim))
    return da.blockwise(
        on_one_blas_thread(consecutive_overlap_kernel),
        (*index[: step + 1], rows.ndim, step + 1),
        rows,
        index,
        before,
        index,
        new_axes={rows.ndim: k},
        concatenate=True,
        align_arrays=False,  # a chunk of records meets the one record before it
        dtype=np.float64,
        meta=np.empty((0,) * rows.ndim),
    )


def _as_it_is(rows: FloatArray, axis: int) -> FloatArray:  # noqa: ARG001  # dask passes it
    return rows


def _later_if_recorded(earlier: FloatArray, later: FloatArray) -> FloatArray:
    return np.where(np.asarray(is_vector(later).any(axis=-1))[..., None, None], later, earlier)


def _rows_of_records(
    u: xr.DataArray,
    dim: str,
    vector_dims: Dims,
    number_dim: str | None,
    kernel: Callable[[FloatArray], FloatArray],
    pairs_of_vectors: bool,
) -> tuple[xr.DataArray, str, str]:
    """Rows (..., dim, number, flat) that a kernel makes of the columns; the number dim and its old name.

    Chunks of records are united by what a pair of records gives: a number for each pair of vectors, or one.
    """
    bases, vector = subspaces({"u": u}, vector_dims, number_dim)
    basis, other = bases["u"], dim + "_"
    require_dims("u", basis, (dim,), "dim")
    if dim in vector or other in basis.dims:
        raise ValueError(
            f"expected dim={dim!r} beside the vector dims and no dim {other!r}, came {basis.dims}"
        )
    number = number_of("u")
    pair_size = basis.sizes[number] ** 2 if pairs_of_vectors else 1
    basis = united(basis, dim, (number, *vector), pair_size)
    rows = _flat_rows(basis, dim, number, vector, kernel, np.dtype(np.float64))
    return rows, number, number_dim_of("u", u, number_dim)


def _flat_rows(
    basis: xr.DataArray,
    dim: str,
    number: str,
    vector: tuple[str, ...],
    kernel: Callable[[FloatArray], FloatArray],
    dtype: np.dtype[Any],
) -> xr.DataArray:
    rows: xr.DataArray = apply_kernel(
        on_stacked(kernel, len(vector)),
        [basis],
        [(number, *vector)],
        output_dims=[(number, _FLAT)],
        output_sizes={number: basis.sizes[number], _FLAT: math.prod(basis.sizes[d] for d in vector)},
        output_dtypes=[dtype],
    )
    return rows.transpose(..., dim, number, _FLAT)


def _is_vector_of_columns(U: FloatArray) -> NDArray[np.bool_]:
    return is_vector(np.swapaxes(U, -1, -2))


def _rows_of_columns(U: FloatArray) -> FloatArray:
    return np.swapaxes(U, -1, -2)


def _unit_rows_of_columns(U: FloatArray) -> FloatArray:
    return unit_rows(np.swapaxes(U, -1, -2))


def _of_all_pairs(
    kernel: Callable[[FloatArray, FloatArray], FloatArray],
    rows: xr.DataArray,
    others: xr.DataArray,
    output_dims: list[str],
    output_sizes: dict[str, int],
) -> xr.DataArray:
    with warnings.catch_warnings():
        # dask advises against graphs with more chunks than the input: all pairs of chunks are meant here
        warnings.filterwarnings("ignore", "Increasing number of chunks")
        result: xr.DataArray = apply_kernel(
            kernel,
            [rows, others],
            [[str(d) for d in array.dims[-2:]] for array in (rows, others)],
            output_dims=[output_dims],
            output_sizes=output_sizes,
        )
    return result


def _pairwise_overlaps(rows: FloatArray, others: FloatArray) -> FloatArray:
    return _absolute(_products(*_without_broadcasting(rows, others)))


def _pairwise_subspace_overlaps(rows: FloatArray, others: FloatArray) -> FloatArray:
    return _subspace_overlaps(*_without_broadcasting(rows, others))


def _without_broadcasting(rows: FloatArray, others: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Undo the broadcasting by name: the dim of the other array stands as an axis of size one."""
    return np.squeeze(rows, -3), np.squeeze(others, -4) if others.ndim > 3 else others


def _numbered(
    result: xr.DataArray, arrays: tuple[xr.DataArray, xr.DataArray], own: list[str], names: list[str]
) -> xr.DataArray:
    """Give the number dims their names and labels back; an underscore tells the second of equal ones."""
    final = [names[0], names[1] + "_" if names[0] == names[1] else names[1]]
    result = result.rename(dict(zip(own, final, strict=True)))
    for array, name, new in zip(arrays, names, final, strict=True):
        known = name.removesuffix("_") if name not in array.dims else name
        if known in array.indexes:
            result = result.assign_coords({new: array.indexes[known].to_numpy()})
    return result
