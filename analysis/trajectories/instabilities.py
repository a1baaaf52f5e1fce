r"""Instabilities: loss spikes above the threshold of stability, and what they change.

With a large learning rate the loss spikes where the sharpness exceeds the threshold
of stability; afterwards the sharpness is lower (flattening) and the leading
eigenvectors have turned (rotation), see arXiv:2307.11948.

A **spike** is a run of records whose loss exceeds the lowest one before by more than a
fraction `rise`. It is an **instability** if the sharpness exceeds the threshold within it or at
the record before it.
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
    require_dims,
    require_real,
    require_same_labels,
)
from hild_xr.analysis.subspaces.alignment import subspace_overlap
from hild_xr.analysis.trajectories.drift import require_increasing_labels
from hild_xr.analysis.trajectories.stability import numeric_labels
from hild_xr.variables import DIM_INSTABILITY, DIM_STEP

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hild_xr.analysis.subspaces.bases import FloatArray, IntArray

RISE = 0.1
"""Fraction by which the loss of a spike exceeds the lowest loss before."""

NONE = -1
"""Index of records outside of instabilities."""

RESULTS = (
    "instability_index",
    "instability_before",
    "instability_start",
    "instability_end",
    "flattening",
    "instability_count",
)


# ---------------------------------------------------------------------------- kernel


def instabilities_kernel(
    loss: FloatArray, sharpness: FloatArray, threshold: FloatArray, *, labels: FloatArray, rise: float = RISE
) -> tuple[Any, ...]:
    """Instabilities of stacked runs of records; see :func:`instabilities` for the meaning.

    Parameters
    ----------
    loss, sharpness, threshold
        Arrays of shape (..., s), NaN where a record is missing.
    labels
        Array of shape (s,).
    rise
        As in :func:`instabilities`.

    Returns
    -------
    index
        Integer array of shape (..., s).
    before, start, end, flattening
        float64 arrays of shape (..., (s + 1) // 2): there cannot be more.
    count
        Integer array of shape (...).

    Examples
    --------
    >>> loss, sharpness = np.array([1.0, 0.5, 4.0, 0.4]), np.array([18.0, 22.0, 12.0, 11.0])
    >>> found = instabilities_kernel(loss, sharpness, np.full(4, 20.0), labels=np.arange(4.0))
    >>> [a.tolist() for a in found[1:5]]
    [[1.0, nan], [2.0, nan], [3.0, nan], [11.0, nan]]
    """
    *lead, s = np.broadcast_shapes(loss.shape, sharpness.shape, threshold.shape)
    arrays = [np.broadcast_to(a, (*lead, s)) for a in (loss, sharpness, threshold)]
    loss, sharpness, threshold = (a.reshape(math.prod(lead), s).astype(np.float64) for a in arrays)
    spiking, before = _spikes(loss, rise)
    spike = _numbered(spiking)
    unstable = _unstable(spike, spiking, before, sharpness > threshold)
    index = np.where(unstable, np.cumsum(unstable & _starts(spike), axis=-1) - 1, NONE)
    places = _places(index, before)
    padded = np.append(labels, np.nan)  # place s stands for none
    at = [np.take_along_axis(_padded(sharpness), place, axis=-1) for place in places]
    results = (index, *(padded[place] for place in places), at[0] - at[2])
    shaped = [a.reshape(*lead, a.shape[-1]) for a in results]
    recorded = ~np.isnan(loss).all(axis=-1)
    count = np.where(recorded, index.max(axis=-1, initial=NONE) + 1, NONE)
    return (*shaped, count.reshape(lead))


def _spikes(loss: FloatArray, rise: float) -> tuple[NDArray[np.bool_], IntArray]:
    """Tell which records are within a spike (missing ones as those before); place of the one before each."""
    s = loss.shape[-1]
    recorded = ~np.isnan(loss)
    lowest = np.minimum.accumulate(np.where(recorded, loss, np.inf), axis=-1)
    lowest = np.concatenate([np.full((len(loss), 1), np.inf), lowest], axis=-1)[:, :s]
    low = np.where(np.isfinite(lowest), lowest, 0.0)
    high = recorded & np.isfinite(lowest) & (np.where(recorded, loss, 0.0) > low + rise * np.abs(low))
    last = np.maximum.accumulate(np.where(recorded, np.arange(s), NONE), axis=-1)
    spiking = (last != NONE) & (np.take_along_axis(high, np.maximum(last, 0), axis=-1) if s else high)
    before = np.concatenate([np.full((len(loss), 1), NONE), last], axis=-1)[:, :s]
    return np.asarray(spiking), before


def _starts(spike: IntArray) -> NDArray[np.bool_]:
    """First record of each run of equal numbers other than NONE."""
    earlier = np.concatenate([np.full((len(spike), 1), NONE), spike], axis=-1)[:, :-1]
    return np.asarray((spike != NONE) & (spike != earlier))


def _numbered(spiking: NDArray[np.bool_]) -> IntArray:
    starts = _starts(np.where(spiking, 0, NONE))
    return np.where(spiking, np.cumsum(starts, axis=-1) - 1, NONE)


def _unstable(
    spike: IntArray, spiking: NDArray[np.bool_], before: IntArray, above: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """Tell which records are within a spike that has a record above the threshold, or just before it."""
    s = spike.shape[-1]
    if s == 0:
        return spiking
    start = _starts(spike)
    above_before = np.take_along_axis(above, np.maximum(before, 0), axis=-1) & (before != NONE)
    witness = spiking & (above | (start & above_before))
    seen = np.zeros((len(spike), s), dtype=bool)
    run, at = np.nonzero(witness)
    seen[run, spike[run, at]] = True
    return np.asarray(spiking & np.take_along_axis(seen, np.maximum(spike, 0), axis=-1))


def _places(index: IntArray, before: IntArray) -> tuple[IntArray, IntArray, IntArray]:
    """Find the record before each instability, its first one, and the first one after it; s for none."""
    n, s = index.shape
    most = (s + 1) // 2
    last, start, end = (np.full((n, most), s) for _ in range(3))
    run, at = np.nonzero(_starts(index))
    last[run, index[run, at]], start[run, index[run, at]] = before[run, at], at
    earlier = np.concatenate([np.full((n, 1), NONE), index], axis=-1)[:, :s]
    run, at = np.nonzero((earlier != NONE) & (index != earlier))
    end[run, earlier[run, at]] = at
    return last, start, end


def _padded(values: FloatArray) -> FloatArray:
    return np.concatenate([values, np.full((len(values), 1), np.nan)], axis=-1)


# ---------------------------------------------------------------------------- labelled


def instabilities(
    loss: xr.DataArray,
    sharpness: xr.DataArray,
    threshold: float | xr.DataArray,
    *,
    rise: float = RISE,
    dim: str = DIM_STEP,
) -> xr.Dataset:
    r"""Find the instabilities of training and how much flatter they leave the loss.

    Parameters
    ----------
    loss, sharpness
        Training loss and largest Hessian eigenvalue at the same records along `dim`.
    threshold
        :func:`hild_xr.analysis.stability_threshold`, number or array.
    rise
        A spike exceeds the lowest loss before by more than this fraction.
    dim
        Dim of the records, labels increasing.

    Returns
    -------
    xarray.Dataset
        ``instability_index``
            With `dim`: number of the instability that the record is in, -1 for none.
        ``instability_before``, ``instability_start``, ``instability_end``
            With the dim ``instability``: labels of the last record before, of the first within,
            and of the first after it (NaN where the loss did not come back).
        ``flattening``
            Sharpness before less sharpness after; NaN where one is not recorded.
        ``instability_count``
            Number of instabilities, -1 if no loss was recorded.

        The dim ``instability`` has half as many places as there are records; those behind the
        last instability hold NaN.

    Raises
    ------
    TypeError
        If an array is no DataArray or not real.
    ValueError
        If `dim` is missing, labels differ, do not increase or are no numbers, or rise is
        negative.

    Examples
    --------
    >>> coords = {"step": [0, 10, 20, 30]}
    >>> loss = xr.DataArray([1.0, 0.5, 4.0, 0.4], dims="step", coords=coords)
    >>> sharp = xr.DataArray([18.0, 22.0, 12.0, 11.0], dims="step", coords=coords)
    >>> found = instabilities(loss, sharp, threshold=20.0)
    >>> int(found.instability_count), float(found.instability_start[0]), float(found.flattening[0])
    (1, 20.0, 11.0)
    """
    if rise < 0:
        raise ValueError(f"expected rise >= 0, a fraction of the loss, came {rise}")
    limit = threshold if isinstance(threshold, xr.DataArray) else xr.DataArray(float(threshold))
    arrays = {"loss": loss, "sharpness": sharpness, "threshold": limit}
    for name, array in arrays.items():
        require_real(name, array)
    require_dims("loss", loss, (dim,), "dim")
    require_dims("sharpness", sharpness, (dim,), "dim")
    require_increasing_labels("loss", loss, dim)
    require_same_labels(arrays)
    s = loss.sizes[dim]
    if dim not in limit.dims:
        arrays["threshold"] = limit.expand_dims({dim: s}, axis=-1)
    results = apply_kernel(
        functools.partial(instabilities_kernel, labels=numeric_labels(loss, dim), rise=rise),
        list(arrays.values()),
        [(dim,)] * 3,
        output_dims=[(dim,), *[(DIM_INSTABILITY,)] * 4, ()],
        output_sizes={DIM_INSTABILITY: (s + 1) // 2},
        output_dtypes=[np.dtype(np.int64), *[FLOAT] * 4, np.dtype(np.int64)],
    )
    named = zip(RESULTS, results, strict=True)
    found = xr.Dataset({name: declared(result, name, rise=rise) for name, result in named})
    return found.assign_coords({DIM_INSTABILITY: np.arange((s + 1) // 2)})


def instability_rotation(
    eigenvectors: xr.DataArray,
    found: xr.Dataset,
    *,
    dim: str = DIM_STEP,
    vector_dims: Dims = None,
    number_dim: str | None = None,
) -> xr.DataArray:
    r"""Rotation of the span of the leading eigenvectors over each instability.

    One minus the root of :func:`hild_xr.analysis.subspace_overlap`, the mean squared cosine
    of the principal angles between the spans before and after: for one vector
    :math:`1 - |\langle u(\mathrm{before}), u(\mathrm{after}) \rangle|`.
    Select the vectors that are meant, for example ``eigenvectors.isel(eig=[0])``.

    Parameters
    ----------
    eigenvectors
        With the dims (..., `dim`, number_dim, vector dims), labels along `dim` increasing. Their
        cadence may be another one: taken are the last record up to
        ``instability_before`` and the first from ``instability_end`` on.
    found
        From :func:`instabilities`, in memory: it decides which records are read.
    dim
        Dim of the records.
    vector_dims, number_dim
        As in :func:`hild_xr.analysis.principal_angles`.

    Returns
    -------
    xarray.DataArray
        Values in [0, 1] with the dim ``instability``; NaN where there is none, where it has not
        ended, and where a record is missing. Lazy if the vectors are.

    Raises
    ------
    TypeError, ValueError
        As :func:`hild_xr.analysis.subspace_overlap`, and if `found` is lazy or not from
        :func:`instabilities`.

    Examples
    --------
    >>> coords = {"step": [0, 10, 20, 30]}
    >>> loss = xr.DataArray([1.0, 0.5, 4.0, 0.4], dims="step", coords=coords)
    >>> sharp = xr.DataArray([18.0, 22.0, 12.0, 11.0], dims="step", coords=coords)
    >>> u = xr.DataArray(
    ...     [[[1.0, 0.0]], [[1.0, 0.0]], [[0.0, 1.0]], [[0.6, 0.8]]],
    ...     dims=("step", "eig", "in"),
    ...     coords=coords,
    ...     attrs={"vector_dims": ["in"], "number_dim": "eig"},
    ... )
    >>> instability_rotation(u, instabilities(loss, sharp, threshold=20.0)).values.round(12)
    array([0.4, nan])
    """
    require_dims("eigenvectors", require_real("eigenvectors", eigenvectors), (dim,), "dim")
    require_increasing_labels("eigenvectors", eigenvectors, dim)
    missing = [name for name in ("instability_before", "instability_end") if name not in found]
    if missing:
        raise ValueError(f"expected the dataset that instabilities returns, came one without {missing}")
    before, after = found["instability_before"], found["instability_end"]
    if before.chunks is not None or after.chunks is not None:
        raise ValueError("expected instabilities in memory, came lazy ones; call .load() on them first")
    require_same_labels({"eigenvectors": eigenvectors, "found": before})
    labels = numeric_labels(eigenvectors, dim)
    u = _at(eigenvectors, before, np.searchsorted(labels, before.values, side="right") - 1, dim)
    v = _at(eigenvectors, after, np.searchsorted(labels, after.values, side="left"), dim)
    overlap = subspace_overlap(u, v, vector_dims=vector_dims, number_dim=number_dim)
    return declared(1.0 - overlap**0.5, "instability_rotation")


def _at(u: xr.DataArray, labels: xr.DataArray, places: IntArray, dim: str) -> xr.DataArray:
    """Vectors at the places, NaN where the label is NaN or there is no such record."""
    there = labels.copy(data=np.isfinite(labels.values) & (places >= 0) & (places < u.sizes[dim]))
    place = xr.DataArray(np.where(there, places, 0), dims=labels.dims)
    shared = {d: xr.DataArray(np.arange(u.sizes[d]), dims=[d]) for d in labels.dims if d in u.dims}
    plain = u.drop_vars([name for name in u.coords if dim in u[name].dims])
    return plain.isel({dim: place, **shared}).where(there).assign_attrs(u.attrs)
