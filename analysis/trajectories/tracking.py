r"""Identities of eigenpairs along training: which eigenvector is which at the next record.

Recorded eigenpairs are sorted by size, so that a place along ``eig`` changes its
eigenvector wherever two eigenvalues cross. :func:`track` follows the vectors instead.

**Alone.** An eigenpair with a distinct eigenvalue is followed by the overlap
:math:`|\langle u_i(s), u_j(t) \rangle|` of its vector with those of the next record. The pairs
are matched so that the sum of squared overlaps is largest (the assignment problem), and a
match below `min_overlap` is none: the track ends and another one begins.

**In a group.** Where eigenvalues (nearly) coincide any basis of their span is as good as
another, and the overlaps of single vectors mean nothing. Such a group is followed as a
span: a vector belongs to it by the norm of its projection onto the span. Within
the group each track keeps a vector of its own, the projection of its last one,
made orthonormal with the others by the nearest orthonormal set (parallel transport). As
many tracks go on as directions of the spans do, those whose principal angle has a cosine of at
least `min_overlap`: where two vectors fall onto one direction of a group, the weaker of their
tracks ends, and what came into the group begins a new one. So
two eigenvalues that cross come out of the crossing with the identities they had,
even if the recorded basis in between was mixed at will. Where the vectors were
born inside a group, or where the group turned them, the identities within it are
arbitrary: ``track_group`` says where.

All that is sequential along the records, but needs the small matrices of overlaps only:
they are computed chunk by chunk (:func:`hild_xr.analysis.consecutive_overlap`), the
large vectors are read once.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from hild_xr.analysis.base.arguments import (
    FLOAT,
    Dims,
    apply_kernel,
    declared,
    number_dim_of,
    number_of,
    require_dims,
    require_real,
    require_same_labels,
)
from hild_xr.analysis.subspaces.bases import precision
from hild_xr.analysis.trajectories.drift import recorded_vectors, signed_consecutive_overlap
from hild_xr.analysis.trajectories.stability import numeric_labels, value_before
from hild_xr.variables import DIM_STEP, DIM_TRACK

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hild_xr.analysis.subspaces.bases import FloatArray, IntArray

MIN_OVERLAP = 0.5
"""Smallest overlap at which a track goes on; random vectors of p dimensions have about 1 / sqrt(p)."""

DEGENERATE = 0.02
"""Eigenvalues that differ by at most this fraction of the larger one belong to one group."""

ROUNDING = 8.0
"""Multiple of eps |lambda|_max below which eigenvalues differ by rounding only."""

NONE = -1
"""Index where a track has no eigenpair, and number of a pair without track."""

RESULTS = (
    "track_eigenvalue",
    "track_index",
    "track_overlap",
    "track_group",
    "track_birth",
    "track_death",
    "track_count",
)


# ---------------------------------------------------------------------------- kernel


def track_kernel(
    eigenvalues: FloatArray,
    present: NDArray[np.bool_],
    cosines: FloatArray,
    *,
    labels: FloatArray,
    max_tracks: int,
    min_overlap: float = MIN_OVERLAP,
    degenerate: float = DEGENERATE,
) -> tuple[Any, ...]:
    """Tracks of stacked sequences of records; see :func:`track` for the meaning.

    Parameters
    ----------
    eigenvalues
        Array of shape (..., s, k).
    present
        Boolean array of shape (..., s, k): which vectors are recorded.
    cosines
        Array of shape (..., s, k, k) by
        :func:`hild_xr.analysis.trajectories.drift.consecutive_overlap_kernel`.
    labels
        Array of shape (s,), for births and deaths.
    max_tracks, min_overlap, degenerate
        As in :func:`track`.

    Returns
    -------
    eigenvalue, index, overlap, group
        Arrays of shape (..., max_tracks, s).
    birth, death
        float64 arrays of shape (..., max_tracks).
    count
        Integer array of shape (...).

    Examples
    --------
    >>> eigenvalues = np.array([[2.0, 1.0], [2.5, 2.0]])  # the second one overtakes the first
    >>> cosines = np.stack([np.full((2, 2), np.nan), [[0.0, 1.0], [1.0, 0.0]]])
    >>> here = np.full((2, 2), True)
    >>> tracks = track_kernel(eigenvalues, here, cosines, labels=np.arange(2.0), max_tracks=2)
    >>> tracks[0].tolist(), tracks[1].tolist()
    ([[2.0, 2.0], [1.0, 2.5]], [[0, 1], [1, 0]])
    """
    *lead, s, k = eigenvalues.shape
    n = math.prod(lead)
    values = eigenvalues.astype(np.float64).reshape(n, s, k)
    present, cosines = present.reshape(n, s, k), cosines.reshape(n, s, k, k)
    cosines = np.where(np.isfinite(cosines), cosines, 0.0)
    groups = _groups(values, present, degenerate, ROUNDING * precision(eigenvalues))
    runs = []
    for one in zip(values, present, groups, cosines, strict=True):  # a record depends on those before it
        numbers, overlaps = _follow(*one, min_overlap)
        runs.append(_by_track(*one[:3], numbers, overlaps, labels, max_tracks))
    shapes = [(max_tracks, s)] * 4 + [(max_tracks,)] * 2 + [()]
    kinds = [np.dtype(kind) for kind in (float, int, float, int, float, float, int)]
    results = tuple(np.empty((n, *shape), kind) for shape, kind in zip(shapes, kinds, strict=True))
    for i, run in enumerate(runs):
        for stacked, result in zip(results, run, strict=True):
            stacked[i] = result
    return tuple(stacked.reshape((*lead, *stacked.shape[1:])) for stacked in results)


def _groups(values: FloatArray, present: NDArray[np.bool_], degenerate: float, rounding: float) -> IntArray:
    """Label each pair with the group of nearly equal eigenvalues of its record: shape (..., k), below k.

    Neighbours in the order of size belong together if they are close, hence so do the ends of a chain.
    """
    known = present & np.isfinite(values)
    order = np.argsort(np.where(known, values, np.inf), axis=-1, kind="stable")
    ordered = np.take_along_axis(np.where(known, values, np.nan), order, axis=-1)
    sizes = np.abs(ordered)
    largest = np.where(known, np.abs(values), 0.0).max(axis=-1, keepdims=True, initial=0.0)
    close = np.maximum(degenerate * np.maximum(sizes[..., 1:], sizes[..., :-1]), rounding * largest)
    apart = ~(np.diff(ordered, axis=-1) <= close)  # missing ones are NaN, and alone
    of_ordered = np.concatenate([np.zeros((*apart.shape[:-1], 1), int), np.cumsum(apart, axis=-1)], axis=-1)
    groups = np.empty(values.shape, dtype=np.int64)
    np.put_along_axis(groups, order, of_ordered, axis=-1)
    return groups


def _follow(
    values: FloatArray,
    present: NDArray[np.bool_],
    groups: IntArray,
    cosines: FloatArray,
    min_overlap: float,
) -> tuple[IntArray, FloatArray]:
    """Give every pair of one run the number of its track, by birth, and its overlap: shapes (s, k)."""
    s, k = values.shape
    numbers, overlaps = np.full((s, k), NONE), np.full((s, k), np.nan)
    vectors: FloatArray = np.zeros(
        (k, k)
    )  # row i: the vector of the track at place i, in the recorded vectors
    together = np.zeros((k, k), dtype=bool)
    before, n = np.full(k, NONE), 0
    for t in np.flatnonzero(present.any(axis=-1)):
        here = present[t]
        from_group, together = together, (groups[t][:, None] == groups[t]) & here & here[:, None]
        moved = vectors @ cosines[t]
        old, new, overlap = _matches(moved, cosines[t], from_group, together, min_overlap)
        numbers[t, new], overlaps[t, new] = before[old], overlap
        born = np.flatnonzero(here & (numbers[t] == NONE))
        born = born[np.argsort(-np.nan_to_num(np.abs(values[t, born]), nan=-1.0), kind="stable")]
        numbers[t, born] = n + np.arange(len(born))
        n += len(born)
        before = numbers[t]
        vectors = _transported(moved[old], new, together)
    return numbers, overlaps


def _matches(
    moved: FloatArray,
    cosines: FloatArray,
    from_group: NDArray[np.bool_],
    together: NDArray[np.bool_],
    min_overlap: float,
) -> tuple[IntArray, IntArray, FloatArray]:
    """Match the pairs of two records: places before and after, and the overlaps of the matches.

    A pair may go on as another if the vector of the one lies in the span of the group of the other, before
    or after; within spans the overlap of the vectors decides. Tracks too many for their spans end.
    """
    from scipy.optimize import linear_sum_assignment  # a second to import

    squares = np.square(moved)
    onto_group = squares @ together
    onto_group_before = from_group @ np.square(cosines)
    spans = np.minimum(np.maximum(onto_group, onto_group_before), 1.0)
    weights = np.where(spans >= min_overlap**2, spans + squares, 0.0)
    while True:
        old, new = linear_sum_assignment(weights, maximize=True)
        real = weights[old, new] > 0
        old, new = old[real], new[real]
        ended = _too_many(old, new, weights[old, new], cosines, from_group, together, min_overlap)
        if not ended.size:
            return old, new, np.sqrt(spans[old, new])
        weights[ended] = 0.0  # what they leave may suit the others better


def _too_many(
    old: IntArray,
    new: IntArray,
    weights: FloatArray,
    cosines: FloatArray,
    from_group: NDArray[np.bool_],
    together: NDArray[np.bool_],
    min_overlap: float,
) -> IntArray:
    """Places of the weakest tracks, as many as there are matches between spans beyond common directions.

    Each vector may lie in the span of the others, and yet all of them in one direction of it: the number
    of tracks that go on is that of the principal cosines of the spans that reach the smallest overlap.
    """
    from scipy.sparse.csgraph import connected_components

    k = len(cosines)
    linked = np.zeros((2 * k, 2 * k), dtype=bool)  # the places before, then those after
    linked[:k, :k], linked[k:, k:], linked[old, k + new] = from_group, together, True
    component = connected_components(linked, directed=False)[1]
    ended = []
    for label in np.flatnonzero(np.bincount(component[old]) > 1):  # one match alone has passed already
        before, after = component[:k] == label, component[k:] == label
        common = np.linalg.svd(cosines[np.ix_(before, after)], compute_uv=False) >= min_overlap
        matches = np.flatnonzero(component[old] == label)
        weakest = matches[np.argsort(weights[matches], kind="stable")]
        ended.extend(old[weakest[: max(0, len(matches) - int(common.sum()))]].tolist())
    return np.asarray(ended, dtype=np.int64)


def _transported(moved: FloatArray, new: IntArray, together: NDArray[np.bool_]) -> FloatArray:
    """Vectors of the tracks by place, shape (k, k): the recorded ones, in a group those carried along."""
    k = len(together)
    here = np.diag(together)
    vectors = np.diag(here.astype(np.float64))
    in_group = together.sum(axis=-1) > 1
    for first in np.flatnonzero(in_group & (together.argmax(axis=-1) == np.arange(k))):
        members = np.flatnonzero(together[first])
        old = np.isin(new, members)
        known, unknown = new[old], np.setdiff1d(members, new[old])
        carried = _nearest_orthonormal(moved[np.ix_(np.flatnonzero(old), members)])
        rest = np.linalg.svd(carried)[2][len(known) :]
        born = _nearest_orthonormal((members == unknown[:, None]) @ rest.T) @ rest
        vectors[np.ix_(known, members)], vectors[np.ix_(unknown, members)] = carried, born
    return vectors


def _nearest_orthonormal(rows: FloatArray) -> FloatArray:
    """Orthonormal rows closest to those given (polar decomposition)."""
    left, _, right = np.linalg.svd(rows, full_matrices=False)
    nearest: FloatArray = left @ right
    return nearest


def _by_track(
    values: FloatArray,
    present: NDArray[np.bool_],
    groups: IntArray,
    numbers: IntArray,
    overlaps: FloatArray,
    labels: FloatArray,
    max_tracks: int,
) -> tuple[Any, ...]:
    """Results of :func:`track_kernel` for one run, the longest track first."""
    s, k = values.shape
    at, place = np.nonzero(numbers != NONE)
    lengths = np.bincount(numbers[at, place])
    row = np.argsort(np.argsort(-lengths, kind="stable"))[numbers[at, place]]  # the older of two goes first
    group = _first_of_group(at, groups[at, place], row, (s, k))
    shown = row < max_tracks
    at, place, row = at[shown], place[shown], row[shown]
    results: list[NDArray[Any]] = []
    for found, missing in ((values, np.nan), (None, NONE), (overlaps, np.nan)):
        results.append(np.full((max_tracks, s), missing))
        results[-1][row, at] = place if found is None else found[at, place]
    results.append(np.full((max_tracks, s), NONE))
    results[-1][row, at] = group[shown]
    birth, death = _lives(np.asarray(results[1] != NONE), np.asarray(present.any(axis=-1)), labels)
    recorded = bool(present.any())
    return (*results, birth, death, np.asarray(len(lengths) if recorded else NONE))


def _first_of_group(at: IntArray, group: IntArray, row: IntArray, shape: tuple[int, int]) -> IntArray:
    """First track of the group of each pair, NONE for pairs that are alone."""
    first, size = np.full(shape, np.iinfo(np.int64).max), np.zeros(shape, dtype=np.int64)
    np.minimum.at(first, (at, group), row)
    np.add.at(size, (at, group), 1)
    return np.where(size[at, group] > 1, first[at, group], NONE)


def _lives(
    lives: NDArray[np.bool_], recorded: NDArray[np.bool_], labels: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Labels of the first record of each track (tracks, s) and of the first one after its last."""
    s = len(recorded)
    index = np.arange(s)
    birth = np.where(lives, index, s).min(axis=-1, initial=s)
    last = np.where(lives, index, NONE).max(axis=-1, initial=NONE)
    following = np.minimum.accumulate(np.append(np.where(recorded, index, s), s)[::-1])[::-1]
    padded = np.append(labels, np.nan)
    return padded[birth], np.where(last == NONE, np.nan, padded[following[last + 1]])


# ---------------------------------------------------------------------------- labelled


def track(
    eigenvalues: xr.DataArray,
    eigenvectors: xr.DataArray,
    *,
    dim: str = DIM_STEP,
    vector_dims: Dims = None,
    number_dim: str | None = None,
    min_overlap: float = MIN_OVERLAP,
    degenerate: float = DEGENERATE,
    max_tracks: int | None = None,
) -> xr.Dataset:
    r"""Follow eigenpairs along training, through crossings and near-degeneracies.

    The method stands in :mod:`hild_xr.analysis.trajectories.tracking`: matching by overlap
    (assignment problem), groups of nearly equal eigenvalues as spans. Signs and order of
    the recorded vectors do not matter. A record that is missing (all its vectors NaN)
    is skipped: a track goes on over the gap if the overlap allows. An eigenpair that
    is absent from a recorded one, for example no longer among the leading ones, ends its
    track; should it come back, it is a new track.

    A store says which pairs to trust: ``converged``, and ``n_certain``, how many of them, from the
    first on, no missed eigenvalue exceeds. Pairs without vector have no track, so that
    ``eigenvectors.where(run["hessian/converged"].sel(layer="fc1.weight"))`` leaves out the rest.

    Parameters
    ----------
    eigenvalues
        With dims (..., `dim`, number_dim).
    eigenvectors
        With dims (..., `dim`, number_dim, vector dims), labels along `dim` increasing.
    dim
        Dim of the records.
    vector_dims, number_dim
        As in :func:`hild_xr.analysis.principal_angles`.
    min_overlap
        Smallest overlap at which a track goes on, in (0, 1].
    degenerate
        Eigenvalues are in one group if they differ by at most this fraction of the larger
        one (or by rounding), in [0, 1); neighbours in a chain are.
    max_tracks
        Number of tracks given out, twice the number of eigenpairs of a record by default.
        Tracks come in the order of their number of records, then of their birth, then of the
        size of the eigenvalue at birth: what is left out is short-lived, and
        ``track_count`` tells.

    Returns
    -------
    xarray.Dataset
        ``track_eigenvalue``, ``track_index``, ``track_overlap``, ``track_group``
            With dims (..., track, `dim`): eigenvalue; position along number_dim (-1 where
            the track has no pair); overlap with the last record of the track, in a
            group that with its span (NaN at birth); first track of the group,
            -1 where the eigenvalue is distinct.
        ``track_birth``, ``track_death``
            With dims (..., track): labels of the first record of the track, and of the
            first record in which it was not found, NaN if there is none.
        ``track_count``
            Number of tracks found, -1 if nothing was recorded.

    Raises
    ------
    TypeError
        If an array is no DataArray or not real.
    ValueError
        If dims are missing or unknown, if labels differ or do not increase, if the eigenvalues
        have dims that the vectors lack, or if an option is out of range.

    Examples
    --------
    >>> attrs = {"vector_dims": ["in"], "number_dim": "eig"}
    >>> vectors = [[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [-1.0, 0.0]]]  # places change
    >>> u = xr.DataArray(vectors, dims=("step", "eig", "in"), coords={"step": [0, 10]}, attrs=attrs)
    >>> eigenvalues = xr.DataArray([[2.0, 1.0], [2.5, 1.9]], dims=("step", "eig"), coords={"step": [0, 10]})
    >>> tracks = track(eigenvalues, u)
    >>> tracks.track_eigenvalue.isel(track=slice(2)).values
    array([[2. , 1.9],
           [1. , 2.5]])
    """
    number = number_dim_of("eigenvectors", require_real("eigenvectors", eigenvectors), number_dim)
    require_dims("eigenvalues", require_real("eigenvalues", eigenvalues), (dim, number), "number_dim")
    k = eigenvectors.sizes[number]
    max_tracks = 2 * k if max_tracks is None else max_tracks
    _require_options(min_overlap, degenerate, max_tracks)
    cosines = signed_consecutive_overlap(
        eigenvectors, dim=dim, vector_dims=vector_dims, number_dim=number_dim
    )
    others = [d for d in eigenvalues.dims if d != number and d not in cosines.dims]
    if others:
        raise ValueError(
            f"expected eigenvalues on dims of the eigenvectors {eigenvectors.dims}, came {others} besides; "
            f"select first, for example eigenvalues.sel(layer='fc1.weight')"
        )
    require_same_labels({"eigenvalues": eigenvalues, "eigenvectors": eigenvectors})
    own = number_of("u")
    values = eigenvalues.drop_vars([c for c in eigenvalues.coords if number in eigenvalues[c].dims])
    present = recorded_vectors(eigenvectors, dim=dim, vector_dims=vector_dims, number_dim=number_dim)
    tracks, kinds = (DIM_TRACK, dim), (FLOAT, np.dtype(np.int64))
    results = apply_kernel(
        functools.partial(
            track_kernel,
            labels=numeric_labels(eigenvectors, dim),
            max_tracks=max_tracks,
            min_overlap=min_overlap,
            degenerate=degenerate,
        ),
        [values.rename({number: own}), present, cosines],
        [(dim, own), (dim, own), (dim, own + "_", own)],
        output_dims=[tracks] * 4 + [tracks[:1]] * 2 + [()],
        output_sizes={DIM_TRACK: max_tracks},
        output_dtypes=[kinds[i] for i in (0, 1, 0, 1, 0, 0, 1)],
    )
    said = {"min_overlap": min_overlap, "degenerate": degenerate}
    named = zip(RESULTS, results, strict=True)
    found = xr.Dataset({name: declared(result, name, **said) for name, result in named})
    return found.assign_coords({DIM_TRACK: np.arange(max_tracks)})


def _require_options(min_overlap: float, degenerate: float, max_tracks: int) -> None:
    if not 0 < min_overlap <= 1:
        raise ValueError(f"expected min_overlap in (0, 1], the cosine of an angle, came {min_overlap}")
    if not 0 <= degenerate < 1:
        raise ValueError(f"expected degenerate in [0, 1), a fraction of the eigenvalue, came {degenerate}")
    if max_tracks < 1:
        raise ValueError(f"expected max_tracks of at least 1, came {max_tracks}")


def track_drift(tracks: xr.Dataset, *, dim: str = DIM_STEP) -> xr.Dataset:
    r"""Change of the eigenvalue and rotation of the eigenvector of each track, from record to record.

    Parameters
    ----------
    tracks
        From :func:`track`.
    dim
        Dim of the records.

    Returns
    -------
    xarray.Dataset
        ``eigenvalue_drift``
            Eigenvalue less that of the last record of the track before.
        ``eigenvector_rotation``
            :math:`1 - |\langle u_i(s), u_i(t) \rangle|`, for a pair in a group with the
            overlap (norm of the projection) with its span.

        Both with the dims (..., track, `dim`); NaN at birth and where the track has no pair.

    Raises
    ------
    ValueError
        If the dataset lacks the variables of :func:`track`, or the dim.

    Examples
    --------
    >>> attrs = {"vector_dims": ["in"], "number_dim": "eig"}
    >>> u = xr.DataArray([[[1.0, 0.0]], [[0.6, 0.8]]], dims=("step", "eig", "in"), attrs=attrs)
    >>> drift = track_drift(track(xr.DataArray([[2.0], [2.5]], dims=("step", "eig")), u))
    >>> drift.eigenvalue_drift[0].values, drift.eigenvector_rotation[0].values.round(12)
    (array([nan, 0.5]), array([nan, 0.4]))
    """
    missing = [name for name in ("track_eigenvalue", "track_overlap") if name not in tracks]
    if missing:
        raise ValueError(f"expected the dataset that track returns, came one without {missing}")
    eigenvalue = tracks["track_eigenvalue"]
    require_dims("tracks", eigenvalue, (dim,), "dim")
    drift = apply_kernel(_change_since_last, [eigenvalue], [(dim,)], output_dims=[(dim,)])
    rotation = (1.0 - tracks["track_overlap"]).transpose(*drift.dims)
    return xr.Dataset(
        {
            "eigenvalue_drift": declared(drift, "eigenvalue_drift"),
            "eigenvector_rotation": declared(rotation, "eigenvector_rotation"),
        }
    )


def _change_since_last(values: FloatArray) -> FloatArray:
    change: FloatArray = values - value_before(values)
    return change
