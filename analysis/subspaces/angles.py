r"""Principal angles between subspaces.

The principal angles :math:`0 \le \theta_1 \le \dots \le \theta_k \le \pi/2`
between two subspaces with orthonormal bases U and V have as cosines the
singular values of :math:`U^T V`. A cosine close to one carries only the square
of the angle: its arc cosine is wrong by about 1e-8 rad. Small angles are
therefore taken from the sines, the singular values of
:math:`V - U U^T V`, as in A. Bjorck and G. H. Golub, Math. Comp. 27 (1973) 579
and A. V. Knyazev and M. E. Argentati, SIAM J. Sci. Comput. 23 (2002) 2008; how
is said in :mod:`hild_xr.analysis.subspaces.sines`.

The cost is that of reading: bases that are orthonormal to a few digits, as
recorded eigenvectors are, are not orthonormalised. Their inner products are,
which are small (:func:`hild_xr.analysis.subspaces.bases.factored_rows`).
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from hild_xr.analysis.base.arguments import (
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
from hild_xr.analysis.base.chunks import united
from hild_xr.analysis.base.records import earlier_and_later, require_unique_labels
from hild_xr.analysis.base.threads import on_one_blas_thread
from hild_xr.analysis.subspaces.bases import (
    FloatArray,
    IntArray,
    factored_rows,
    full_rank_basis,
    singular_values,
)
from hild_xr.analysis.subspaces.nearby import nearby_sines_kernel
from hild_xr.analysis.subspaces.sines import sines_kernel
from hild_xr.variables import DIM_ANGLE, DIM_STEP

if TYPE_CHECKING:
    from collections.abc import Iterator

    import xarray as xr
    from numpy.typing import NDArray

SMALL_ANGLE = 3e-2
"""Angles (rad) below this are taken from sines; above it the arc cosine is right to about 1e-13."""

BLOCK_BYTES = 2**25
"""Size of the products of all pairs that are worked on in one pass."""

CACHE_BYTES = 2**22
"""Size of the bases that are worked on in one pass: they are read several times, from the cache."""

MANY = 16
"""Number of bases that fit into the cache below which a basis is long, and worth the trouble to read once."""

HELD_BYTES = 2**29
"""Size of all dask-backed bases up to which they stay in memory while all pairs are worked on."""


# ---------------------------------------------------------------------------- kernels


def principal_angles_kernel(U: FloatArray, V: FloatArray) -> FloatArray:
    """Principal angles between the column spaces of stacked matrices.

    Absolute error below 1e-12 rad, small angles included. Columns need not be
    orthonormal, see :func:`hild_xr.analysis.subspaces.bases.orthonormal_basis`; the
    angles of nearly dependent columns are as uncertain as their span.

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
    larger, smaller = (U, V) if U.shape[-1] >= V.shape[-1] else (V, U)
    lead = np.broadcast_shapes(U.shape[:-2], V.shape[:-2])
    p, k = smaller.shape[-2:]
    n = math.prod(lead)
    Q, at_Q = _each_once(larger, lead)
    R, at_R = _each_once(smaller, lead)
    angles = np.empty((n, k))
    for part in _slices(n, max(1, CACHE_BYTES // (8 * p * larger.shape[-1]))):
        angles[part] = _angles_of_rows(
            _taken(Q, at_Q[part]), _taken(R, at_R[part]), orthonormal=(len(Q) < n, len(R) < n)
        )
    return angles.reshape(*lead, k)


def _each_once(U: FloatArray, lead: tuple[int, ...]) -> tuple[FloatArray, IntArray]:
    """Rows (m, k, p) of the matrices, and which of them each of the broadcast stack is.

    Matrices that are used more than once are orthonormalised here, those used once when their turn comes.
    """
    m, n = math.prod(U.shape[:-2]), math.prod(lead)
    if m < n:
        U = full_rank_basis(U)
    at = np.broadcast_to(np.arange(m).reshape(U.shape[:-2]), lead).reshape(n)
    return np.swapaxes(U, -1, -2).reshape(m, U.shape[-1], U.shape[-2]), at


def _taken(stack: FloatArray, at: IntArray) -> FloatArray:
    """``stack[at]``, without a copy if it is a slice or one element for all, which then stands once."""
    if len(stack) == 1:
        return stack
    if np.all(at == at[0]):
        return stack[at[0] : at[0] + 1]
    if np.all(np.diff(at) == 1):
        return stack[at[0] : at[-1] + 1]
    picked: FloatArray = stack[at]
    return picked


def _angles_of_rows(Q: FloatArray, R: FloatArray, orthonormal: tuple[bool, bool]) -> FloatArray:
    """Angles between bases given as rows (n, k, p), the second with no more; one may serve all."""
    Q, factor_Q = (Q, None) if orthonormal[0] else factored_rows(Q)
    R, factor_R = (R, None) if orthonormal[1] else factored_rows(R)
    products = _products_with_one(Q[0], R) if len(Q) == 1 else R @ np.swapaxes(Q, -1, -2)
    if factor_Q is None:
        coefficients = cosine_matrix = products
    else:
        cosine_matrix = products @ np.swapaxes(factor_Q, -1, -2)
        coefficients = cosine_matrix @ factor_Q
    if factor_R is not None:
        cosine_matrix = factor_R @ cosine_matrix
    angles, small = _angles_from_cosines(cosine_matrix)
    if small.any():
        # a mask copies: where all are small, as late in training, there is nothing to pick
        which = slice(None) if small.all() else small
        sines = sines_kernel(
            R if len(R) == 1 else R[which],
            None if factor_R is None else factor_R[which],
            Q if len(Q) == 1 else Q[which],
            coefficients[which],
        )
        angles[which] = _with_sines(angles[which], sines)
    return angles


def _products_with_one(Q: FloatArray, R: FloatArray) -> FloatArray:
    """Inner products of the rows of a stack R (n, k2, p) with the rows of one matrix Q (k1, p): (n, k2, k1).

    As one product, with R on the right: three times faster than a product for each matrix.
    """
    n, k, p = R.shape
    return (Q @ R.reshape(n * k, p).T).T.reshape(n, k, len(Q))


def _angles_from_cosines(cosine_matrix: FloatArray) -> tuple[FloatArray, NDArray[np.bool_]]:
    """Arc cosines in increasing order, and where the first one is too small to be right."""
    angles: FloatArray = np.arccos(np.minimum(singular_values(cosine_matrix), 1.0))
    return angles, angles[..., 0] < SMALL_ANGLE


def _with_sines(angles: FloatArray, sines: FloatArray) -> FloatArray:
    """Replace the small ones of increasing angles by arc sines; rounding may turn the order at the border."""
    replaced = np.where(angles < SMALL_ANGLE, np.arcsin(np.minimum(sines, 1.0)), angles)
    return np.sort(replaced, axis=-1)


def pairwise_angles_kernel(U: FloatArray, V: FloatArray | None = None) -> FloatArray:
    """Principal angles of every basis of one stack with every basis of another, or of the same.

    The cosines of all pairs come from large matrix products, the sines are
    computed only for pairs with an angle below :data:`SMALL_ANGLE`. Within one
    stack each pair is computed once, and the angles of a basis to itself are
    zero.

    Parameters
    ----------
    U, V
        Arrays of shapes (..., s, p, k1) and (..., t, p, k2); V is U if left out.

    Returns
    -------
    angles
        float64 array of shape (..., s, t, min(k1, k2)) in rad, increasing; NaN
        as in :func:`principal_angles_kernel`.

    Examples
    --------
    >>> axes = np.eye(2)[:, :, None]  # two lines in the plane
    >>> pairwise_angles_kernel(axes)[..., 0].round(3)
    array([[0.   , 1.571],
           [1.571, 0.   ]])
    """
    Q = _full_rank_rows(U)
    return _pairwise_angles_of_rows(Q, Q if V is None else _full_rank_rows(V))


def _full_rank_rows(U: FloatArray) -> FloatArray:
    return np.swapaxes(full_rank_basis(U), -1, -2)


def _pairwise_angles_of_rows(Q: FloatArray, R: FloatArray) -> FloatArray:
    """Angles of all pairs from orthonormal rows (..., s, k1, p) and (..., t, k2, p); R may be Q itself."""
    if R.shape[-2] > Q.shape[-2]:
        return np.swapaxes(_pairwise_angles_of_rows(R, Q), -2, -3)
    lead = np.broadcast_shapes(Q.shape[:-3], R.shape[:-3])
    same = Q is R
    n, (s, k1), (t, k2) = math.prod(lead), Q.shape[-3:-1], R.shape[-3:-1]
    Q = np.broadcast_to(Q, lead + Q.shape[-3:]).reshape(n, *Q.shape[-3:])
    R = Q if same else np.broadcast_to(R, lead + R.shape[-3:]).reshape(n, *R.shape[-3:])
    angles = np.zeros((n, s, t, k2))
    side = max(1, math.isqrt(BLOCK_BYTES // (8 * k1 * k2 * max(1, n))))
    for rows in _slices(s, side):
        for columns in _slices(t, side):
            if not same or rows.start < columns.start:
                angles[:, rows, columns] = _angles_of_block(Q[:, rows], R[:, columns])
            elif rows == columns:
                angles[:, rows, rows] = _angles_within_block(Q[:, rows])
            else:
                angles[:, rows, columns] = np.swapaxes(angles[:, columns, rows], 1, 2)
    return angles.reshape(*lead, s, t, k2)


def _angles_of_block(Q: FloatArray, R: FloatArray) -> FloatArray:
    s, t = Q.shape[1], R.shape[1]
    i, j = np.indices((s, t)).reshape(2, -1)
    return _angles_of_pairs(Q, R, _products(Q, R), i, j).reshape(-1, s, t, R.shape[2])


def _angles_within_block(Q: FloatArray) -> FloatArray:
    """Each pair once. The product of an array with its own transpose costs BLAS half as much, too."""
    n, s, k, _ = Q.shape
    i, j = np.triu_indices(s, 1)
    angles = np.zeros((n, s, s, k))
    angles[:, i, j] = angles[:, j, i] = _angles_of_pairs(Q, Q, _products(Q, Q), i, j)
    angles[:, np.arange(s), np.arange(s)] += np.where(np.isnan(Q).any(axis=(-2, -1)), np.nan, 0.0)[..., None]
    return angles


def _products(Q: FloatArray, R: FloatArray) -> FloatArray:
    """Inner products of all rows (n, s, k1, p) with all rows (n, t, k2, p): (n, s, k1, t, k2)."""
    (n, s, k1, p), (t, k2) = Q.shape, R.shape[1:3]
    left = Q.reshape(n, s * k1, p)
    right = left if R is Q else R.reshape(n, t * k2, p)
    return (left @ np.swapaxes(right, -1, -2)).reshape(n, s, k1, t, k2)


def _angles_of_pairs(
    Q: FloatArray, R: FloatArray, products: FloatArray, i: IntArray, j: IntArray
) -> FloatArray:
    """Angles (n, pairs, k2) between the bases i of Q and j of R, with k2 at most k1."""
    cosine_matrices = np.moveaxis(products[:, i, :, j, :], 0, 1).swapaxes(-1, -2)  # (n, pairs, k2, k1)
    angles, small = _angles_from_cosines(cosine_matrices)
    n_at_once = max(1, CACHE_BYTES // (8 * Q.shape[-2] * Q.shape[-1]))
    if n_at_once < MANY and Q.shape[2] == R.shape[2]:
        for one in range(len(Q)):  # bases are long here: what is left to loop over are a few seeds or layers
            pairs = np.flatnonzero(small[one])
            some = Q[one]
            sines, right = nearby_sines_kernel(some, some if R is Q else R[one], i[pairs], j[pairs])
            done = pairs[right]
            angles[one, done] = _with_sines(angles[one, done], sines[right])
            small[one, done] = False
    lead, pair = np.nonzero(small)
    at_Q, at_R = lead * Q.shape[1] + i[pair], lead * R.shape[1] + j[pair]
    all_Q, all_R = (a.reshape(-1, *a.shape[-2:]) for a in (Q, R))
    for part in _runs(at_Q, n_at_once) if n_at_once < MANY else _slices(len(pair), n_at_once):
        at = lead[part], pair[part]
        sines = sines_kernel(_taken(all_R, at_R[part]), None, _taken(all_Q, at_Q[part]), cosine_matrices[at])
        angles[at] = _with_sines(angles[at], sines)
    return angles


def _runs(values: IntArray, length: int) -> Iterator[slice]:
    """Slices of at most a length within which the values are equal."""
    for start, stop in itertools.pairwise(np.flatnonzero(np.diff(values, prepend=-1, append=-1))):
        yield from (slice(at, min(at + length, stop)) for at in range(start, stop, length))


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

    Each pair is computed once, blocks of pairs as one matrix product, and the
    angles of a basis to itself are zero. Of dask-backed arrays, neighbouring
    chunks along `dim` are united to blocks of about 128 MB, and each pair of
    blocks is a task. Up to 512 MB every chunk is read once; of larger arrays
    each task reads its two blocks anew, so that memory does not grow with the
    number of steps. ``u.persist()`` first where the memory is there, or where u
    is costly to compute.

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
        the two; NaN as in :func:`principal_angles`.

    Raises
    ------
    TypeError, ValueError
        As :func:`principal_angles`, and if a label along `dim` is repeated.

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
    require_unique_labels("u", u, dim)
    other = dim + "_"
    if dim in vector or other in u.dims:
        raise ValueError(f"expected dim={dim!r} beside the vector dims and no dim {other!r}, came {u.dims}")
    if u.chunks is None or u.size == 0:
        sizes = {other: u.sizes[dim], DIM_ANGLE: u.sizes[number_of("u")]}
        result = apply_kernel(
            on_stacked(pairwise_angles_kernel, len(vector)),
            [u],
            [(dim, number_of("u"), *vector)],
            output_dims=[(dim, other, DIM_ANGLE)],
            output_sizes={dim: u.sizes[dim], **sizes},
        )
    else:
        result = _pairwise_angles_of_chunks(u, dim, vector)
    if dim in u.indexes:
        result = result.assign_coords({other: (other, u.indexes[dim], u[dim].attrs)})
    return declared(result, "principal_angles")


def consecutive_angles(
    u: xr.DataArray,
    *,
    dim: str = DIM_STEP,
    vector_dims: Dims = None,
    number_dim: str | None = None,
) -> xr.DataArray:
    """Principal angles between the subspaces of each record and the record before it.

    Small angles are Hessian inertia: the subspace barely moves from record to
    record. The records may be any number of optimizer steps apart; the angle
    is that between the records, not one for each step.

    Parameters
    ----------
    u
        Bases with dims (..., `dim`, number_dim, vector dims) in any order.
    dim
        Dim along which the records follow each other; its labels increase.
    vector_dims, number_dim
        As in :func:`principal_angles`.

    Returns
    -------
    xarray.DataArray
        Angles in rad with dims (..., `dim`, angle), labelled by the later one of
        the two records: the first label of u is missing. NaN where one of the
        two is NaN: no angle reaches across a missing record.

    Raises
    ------
    TypeError, ValueError
        As :func:`principal_angles`, and if labels along `dim` are repeated or
        do not increase.

    Examples
    --------
    >>> import xarray as xr
    >>> u = xr.DataArray(
    ...     np.eye(3)[[0, 1, 1], None, :],
    ...     dims=("step", "eig", "in"),
    ...     coords={"step": [0, 10, 20]},
    ...     attrs={"vector_dims": ["in"], "number_dim": "eig"},
    ... )
    >>> angles = consecutive_angles(u).isel(angle=0)
    >>> angles.values.round(4), angles["step"].values
    (array([1.5708, 0.    ]), array([10, 20]))
    """
    earlier, later = earlier_and_later("u", require_real("u", u), dim)
    number = None if number_dim is None else (number_dim, number_dim)
    return principal_angles(later, earlier, vector_dims=vector_dims, number_dim=number)


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


def _pairwise_angles_of_chunks(u: xr.DataArray, dim: str, vector: tuple[str, ...]) -> xr.DataArray:
    """Angles of all pairs of records of a dask-backed array: a task for each pair of blocks of records."""
    import xarray as xr

    number, flat = number_of("u"), "__vector__"
    sizes = {number: u.sizes[number], flat: math.prod(u.sizes[d] for d in vector)}
    u = united(u, dim, (number, *vector), pair_size=sizes[number])
    # (number, flat) and not (flat, number): dask copies blocks to C order, and vectors are to stay contiguous
    rows = apply_kernel(
        on_stacked(_full_rank_rows, len(vector)),
        [u],
        [(number, *vector)],
        output_dims=[(number, flat)],
        output_sizes=sizes,
    ).transpose(..., dim, number, flat)
    dims = (*rows.dims[:-2], dim + "_", DIM_ANGLE)
    return xr.DataArray(_all_pairs(rows.data), dims=dims, coords=rows.coords)


def _all_pairs(rows: Any) -> Any:
    """All pairs of blocks of orthonormal rows (..., s, k, p), each pair once.

    dask keeps a block as long as a task needs it, and every block is needed to
    the end. Where all of them together are too large, a task gets the recipes
    of its two blocks instead (:class:`_Recipe`).
    """
    import dask.array as da
    import dask.base
    from dask.highlevelgraph import HighLevelGraph

    optimize: Any = dask.base.optimize
    n, held = rows.numblocks[-3], rows.nbytes <= HELD_BYTES
    name = f"pairwise-angles-{dask.base.tokenize(rows)}"
    of_one, of_two = on_one_blas_thread(_pairs_of_one_block), on_one_blas_thread(_pairs_of_two_blocks)
    graph: dict[Any, Any] = {}
    for lead in np.ndindex(rows.numblocks[:-3]):
        blocks: list[Any] = [(rows.name, *lead, j, 0, 0) for j in range(n)]
        if not held:
            blocks = [_Recipe(optimize(rows.blocks[(*lead, j)])[0]) for j in range(n)]
        for i in range(n):
            graph[name, *lead, i, i, 0] = (of_one, blocks[i])
            for j in range(i + 1, n):
                graph[name, *lead, i, j, 0] = (of_two, blocks[i], blocks[j])
                graph[name, *lead, j, i, 0] = (_mirrored, (name, *lead, i, j, 0))
    chunks = (*rows.chunks[:-2], rows.chunks[-3], rows.chunks[-2])
    layers = HighLevelGraph.from_collections(name, graph, dependencies=[rows] if held else [])
    array: Any = da.Array
    return array(layers, name, chunks, dtype=np.float64)


class _Recipe:
    """A block of a dask array that is computed within the task that needs it, and forgotten after it.

    No scheduler knows of the block, so no order of the tasks keeps it. (``dask.graph_manipulation.clone``
    would say the same in dask's own words, but loses the sources of rechunked arrays in dask 2026.8.)
    """

    def __init__(self, block: Any) -> None:
        self.block = block

    def __call__(self) -> FloatArray:
        values: FloatArray = self.block.compute(scheduler="synchronous")
        return values


def _pairs_of_one_block(Q: FloatArray | _Recipe) -> FloatArray:
    rows = Q() if isinstance(Q, _Recipe) else Q
    return _pairwise_angles_of_rows(rows, rows)


def _pairs_of_two_blocks(Q: FloatArray | _Recipe, R: FloatArray | _Recipe) -> FloatArray:
    first, second = (block() if isinstance(block, _Recipe) else block for block in (Q, R))
    return _pairwise_angles_of_rows(first, second)


def _mirrored(angles: FloatArray) -> FloatArray:
    return np.swapaxes(angles, -2, -3)
