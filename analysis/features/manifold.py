r"""Predictions as points: Bhattacharyya distances, progress from ignorance to truth, trajectories.

A model is a point by what it predicts on N fixed samples: a product of N distributions over
the classes. The distance of two points is

.. math:: d_B(P, Q) = -\frac{1}{N} \sum_n \log \sum_c \sqrt{p_n(c)\, q_n(c)} ,

and the geodesic between ignorance (uniform) and truth is, sample by sample with
:math:`T = \arccos \sum_c \sqrt{p(c) q(c)}`,

.. math:: \gamma(t) = \frac{\sin((1-t)T)}{\sin T} \sqrt{p} + \frac{\sin(tT)}{\sin T} \sqrt{q} .

J. Mao, I. Griniasty, H. K. Teoh, R. Ramesh, R. Yang, M. Transtrum, J. Sethna,
P. Chaudhari (2023), arXiv:2305.01604. The embedding is in
:mod:`hild_xr.analysis.features.inpca`.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal, get_args

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
from hild_xr.analysis.base.chunks import united
from hild_xr.analysis.features.classes import label_values
from hild_xr.variables import DIM_CLASS, DIM_MODEL, DIM_SAMPLE, DIM_STEP

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hild_xr.analysis.subspaces.bases import FloatArray

Of = Literal["probabilities", "logits"]
"""What predictions are: probabilities that sum to 1, or what softmax makes probabilities of."""

SUM_TOLERANCE = 1e-2
"""Largest difference from 1 of a sum of probabilities: float16 rounds that of many classes."""

BLOCK_BYTES = 2**22
"""Bytes of the products of all pairs held at once: they stay in the cache, 2.4 times faster than 2**26."""

# ---------------------------------------------------------------------------- kernels


def amplitudes_kernel(predictions: FloatArray, of: Of) -> FloatArray:
    """Square roots of the probabilities: unit vectors over the classes, in float64.

    Parameters
    ----------
    predictions
        Array of shape (..., C).
    of
        What they are. Logits lose nothing where a probability is too small for its dtype.

    Returns
    -------
    amplitudes
        Array of shape (..., C); NaN where the predictions are not finite, or are no
        probabilities: negative, or with a sum that is not 1.

    Examples
    --------
    >>> amplitudes_kernel(np.array([[0.5, 0.5], [3.0, -1.0]]), "probabilities").round(3)
    array([[0.707, 0.707],
           [  nan,   nan]])
    """
    p = predictions.astype(np.float64)
    if of == "logits":
        p = np.where(np.isfinite(p).all(axis=-1, keepdims=True), p, np.nan)
        p = np.exp((p - p.max(axis=-1, keepdims=True)) / 2)  # half of it: the square root of exp
        amplitudes: FloatArray = p / np.linalg.norm(p, axis=-1, keepdims=True)
        return amplitudes
    total = p.sum(axis=-1, keepdims=True)
    distribution = (p >= 0).all(axis=-1, keepdims=True) & (np.abs(total - 1) <= SUM_TOLERANCE)
    normalised: FloatArray = np.divide(p, total, out=np.full_like(p, np.nan), where=distribution)
    return np.sqrt(normalised)


def bhattacharyya_kernel(P: FloatArray, Q: FloatArray) -> FloatArray:
    """Bhattacharyya distances of all pairs of two stacks of points.

    Parameters
    ----------
    P, Q
        Amplitudes (:func:`amplitudes_kernel`) of shapes (..., s, N, C) and (..., t, N, C).

    Returns
    -------
    distances
        Array of shape (..., s, t); inf where the predictions on a sample exclude each
        other, NaN where a prediction is missing.

    Examples
    --------
    >>> certain, ignorant = np.array([[[1.0, 0.0]], [[0.5, 0.5]]]) ** 0.5
    >>> float(bhattacharyya_kernel(certain[None], ignorant[None])[0, 0].round(5))
    0.34657
    """
    s, t, n = P.shape[-3], Q.shape[-3], P.shape[-2]
    lead = np.broadcast_shapes(P.shape[:-3], Q.shape[:-3])
    total: FloatArray = np.zeros((*lead, s, t))
    block = max(1, BLOCK_BYTES // (8 * max(1, s * t * math.prod(lead))))
    for start in range(0, n, block):  # blocks of samples: the products of all pairs are s t N numbers
        of_P = np.swapaxes(P[..., start : start + block, :], -3, -2)
        of_Q = np.moveaxis(Q[..., start : start + block, :], -3, -1)
        with np.errstate(divide="ignore"):
            # not above 1: the distance of equal points is 0, and never negative by rounding
            total -= np.log(np.minimum(of_P @ of_Q, 1.0)).sum(axis=-3)
    distances: FloatArray = total / n + 0.0  # no -0
    return distances


def progress_kernel(P: FloatArray, start: FloatArray, end: FloatArray) -> tuple[FloatArray, FloatArray]:
    r"""Place of the nearest point of the geodesic from start to end, and the distance to it.

    :math:`f(t) = d_B(P, \gamma(t))` is strictly convex: with :math:`g'' = -T^2 g` of every
    sample's product g, :math:`(-\log g)'' = T^2 + (g'/g)^2`. Newton's method inside a
    bracket that shrinks finds the only zero of its derivative, for all points at once.

    Parameters
    ----------
    P, start, end
        Amplitudes of shapes (..., N, C); they broadcast.

    Returns
    -------
    progress, distance
        Arrays of shape (...): t in [0, 1] and f(t); NaN where a prediction is missing,
        where start and end are the same on all samples, and where the distance is
        infinite all along.

    Examples
    --------
    >>> start, end = np.array([[0.5, 0.5]]) ** 0.5, np.array([[1.0, 0.0]])
    >>> [float(t.round(9)) for t in progress_kernel(np.stack([start, end]), start, end)[0]]
    [0.0, 1.0]
    """
    a, b = (np.einsum("...nc,...nc->...n", P, fixed) for fixed in (start, end))
    # from the chord: arccos of the product would lose small angles
    chord = np.linalg.norm(np.subtract(*np.broadcast_arrays(start, end)), axis=-1)
    T = 2 * np.arcsin(np.minimum(chord / 2, 1.0))
    a, b, T = np.broadcast_arrays(a, b, T)
    low, high = np.zeros(a.shape[:-1]), np.ones(a.shape[:-1])
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        slope_at = functools.partial(_slope, a, b, T)
        low = np.where(slope_at(high)[0] <= 0, 1.0, low)  # falls all the way: the nearest is the end
        high = np.where(slope_at(np.zeros_like(high))[0] >= 0, 0.0, high)
        t = (low + high) / 2
        for _ in range(60):
            slope, curvature = slope_at(t)
            low, high = np.where(slope < 0, t, low), np.where(slope > 0, t, high)
            newton = t - slope / curvature
            inside = (newton > low) & (newton < high)
            moved = np.where(slope == 0, t, np.where(inside, newton, (low + high) / 2))
            done = np.abs(moved - t) <= 4e-16
            t = moved
            if done.all():
                break
        distance = -np.log(np.minimum(_products(a, b, T, t), 1.0)).mean(axis=-1) + 0.0
    defined = np.isfinite(distance) & (T > 0).any(axis=-1)
    return np.where(defined, np.clip(t, 0, 1), np.nan), np.where(defined, distance, np.nan)


def _products(a: FloatArray, b: FloatArray, T: FloatArray, t: FloatArray) -> FloatArray:
    """Products of the point with the geodesic at t, sample by sample."""
    t = t[..., None]
    return a * _sine_ratio(1 - t, T) + b * _sine_ratio(t, T)


def _sine_ratio(t: FloatArray, T: FloatArray) -> FloatArray:
    """Return sin(tT)/sin T, which is t for T = 0."""
    return np.divide(np.sin(t * T), np.sin(T), out=np.broadcast_to(t, T.shape).copy(), where=T > 0)


def _slope(a: FloatArray, b: FloatArray, T: FloatArray, t: FloatArray) -> tuple[FloatArray, FloatArray]:
    """First and second derivative by t of the mean of -log of the products."""
    at = t[..., None]
    per_sine = np.divide(T, np.sin(T), out=np.ones_like(T), where=T > 0)
    derivative = per_sine * (b * np.cos(at * T) - a * np.cos((1 - at) * T))
    ratio = derivative / _products(a, b, T, t)
    return -ratio.mean(axis=-1), (T**2 + ratio**2).mean(axis=-1)


# ---------------------------------------------------------------------------- labelled


def truth(labels: xr.DataArray, n_classes: int) -> xr.DataArray:
    r"""Predictions of a network that is certain of the labels: one-hot, dims (sample, class\_).

    Ignorance is ``xr.full_like(truth, 1 / n_classes)``.

    Parameters
    ----------
    labels
        Whole numbers 0 ... n_classes - 1 on the dim ``sample``.
    n_classes
        Number of classes.

    Raises
    ------
    TypeError
        If the labels are no DataArray of whole numbers.
    ValueError
        If their only dim is not ``sample``, or a label is out of range.

    Examples
    --------
    >>> truth(xr.DataArray([1, 0], dims="sample"), 2).values
    array([[0., 1.],
           [1., 0.]])
    """
    values: NDArray[Any] = label_values(labels)
    if values.dtype.kind not in "iu":
        raise TypeError(f"expected labels 0 ... {n_classes - 1}, came dtype {values.dtype}")
    if ((values < 0) | (values >= n_classes)).any():
        raise ValueError(f"expected labels 0 ... {n_classes - 1}, came {values.min()} ... {values.max()}")
    one_hot = (values[:, None] == np.arange(n_classes)).astype(np.float64)
    coords = {DIM_SAMPLE: labels[DIM_SAMPLE]} if DIM_SAMPLE in labels.indexes else None
    return xr.DataArray(one_hot, dims=(DIM_SAMPLE, DIM_CLASS), coords=coords)


def bhattacharyya_distance(p: xr.DataArray, q: xr.DataArray, *, of: Of = "probabilities") -> xr.DataArray:
    r"""Bhattacharyya distance between predictions, record by record.

    Lazy on dask-backed arrays.

    Parameters
    ----------
    p, q
        Predictions with dims (..., sample, class\_). Dims that only one of them has are
        broadcast.
    of
        ``"probabilities"`` or ``"logits"``. Stored probabilities that were rounded to 0
        make distances infinite; logits do not.

    Returns
    -------
    xarray.DataArray
        inf where predictions on a sample exclude each other; NaN where a prediction is
        missing or, said to be probabilities, has negative numbers or a sum other than 1.

    Raises
    ------
    TypeError
        If an array is no DataArray of real numbers.
    ValueError
        If dims are missing or empty, `of` is unknown, or labels differ along a shared dim; and
        if an array said to be probabilities plainly holds logits: no sample of an array in
        memory has probabilities, or a dask-backed one has the attr ``transform`` of outputs
        recorded as the model gave them, None.

    Examples
    --------
    >>> certain, ignorant = (xr.DataArray([p], dims=("sample", "class_")) for p in ([1, 0], [0.5, 0.5]))
    >>> round(float(bhattacharyya_distance(certain, ignorant)), 5)
    0.34657
    """
    arrays = {"p": p, "q": q}
    _require_predictions(arrays, of)
    result = apply_kernel(
        _distance, [_amplitudes(a, of) for a in arrays.values()], [(DIM_SAMPLE, DIM_CLASS)] * 2
    )
    return declared(result, "bhattacharyya_distance")


def pairwise_bhattacharyya(
    predictions: xr.DataArray,
    other: xr.DataArray | None = None,
    *,
    dim: str | Iterable[str] = DIM_STEP,
    of: Of = "probabilities",
) -> xr.DataArray:
    r"""Bhattacharyya distances between the predictions of all pairs of records.

    Of dask-backed arrays neighbouring small chunks of records are united, and each pair of the
    united ones is a task.

    Parameters
    ----------
    predictions
        Array with dims (..., `dim`, sample, class\_).
    other
        Predictions that the second of each pair is taken from; by default the first array
        itself.
    dim
        Dim whose labels are paired, or several: ``("seed", "step")`` pairs all records of
        all runs, on the new dims ``model`` and ``model_`` with the coords of both.
    of
        As in :func:`bhattacharyya_distance`.

    Returns
    -------
    xarray.DataArray
        Distances with dims (..., `dim`, `dim` + "\_") or (..., model, model\_), inf and NaN
        as in :func:`bhattacharyya_distance`. Of one array the diagonal is 0 up to rounding.

    Raises
    ------
    TypeError, ValueError
        As :func:`bhattacharyya_distance`, and if the lagged dim exists already.

    Examples
    --------
    >>> p = xr.DataArray([[[1.0, 0.0]], [[0.5, 0.5]]], dims=("step", "sample", "class_"))
    >>> pairwise_bhattacharyya(p).values.round(5)
    array([[0.     , 0.34657],
           [0.34657, 0.     ]])
    """
    other = predictions if other is None else other
    _require_predictions({"predictions": predictions, "other": other}, of, same=False)
    first, name = _on_one_dim("predictions", predictions, dim)
    second, _ = _on_one_dim("other", other, dim)
    lagged = f"{name}_"
    clash = [str(d) for d in (*first.dims, *second.dims) if d == lagged]
    if clash:
        raise ValueError(f"expected no dim {lagged!r}, the result's own, came {first.dims}, {second.dims}")
    own = {c: f"{c}_" for c in second.coords if name in second[c].dims and c != name}
    second = second.rename({name: lagged, **own})
    require_same_labels({"predictions": first, "other": second})
    first, second = (united(a, d, (DIM_SAMPLE, DIM_CLASS)) for a, d in ((first, name), (second, lagged)))
    # the order in which dims are broadcast: those of the first, its paired one, those of the other, its own
    lead = [d for d in first.dims if d not in (name, DIM_SAMPLE, DIM_CLASS)]
    extra = [d for d in second.dims if d not in (*lead, lagged, DIM_SAMPLE, DIM_CLASS)]
    first = first.transpose(*lead, name, ...)
    second = second.transpose(*(d for d in lead if d in second.dims), *extra, lagged, ...)
    with warnings.catch_warnings():
        # dask advises against graphs with more chunks than the input: all pairs of chunks are meant here
        warnings.filterwarnings("ignore", "Increasing number of chunks")
        result = apply_kernel(
            functools.partial(_distances_of_pairs, n_extra=len(extra)),
            [_amplitudes(first, of), _amplitudes(second, of)],
            [(DIM_SAMPLE, DIM_CLASS)] * 2,
        )
    return declared(result, "bhattacharyya_distance").transpose(..., name, lagged)


def progress(
    predictions: xr.DataArray,
    truth: xr.DataArray,
    *,
    ignorance: xr.DataArray | None = None,
    of: Of = "probabilities",
) -> xr.Dataset:
    r"""Progress of predictions on the geodesic from ignorance to truth, and distance from it.

    Lazy on dask-backed predictions.

    Parameters
    ----------
    predictions
        Array with dims (..., sample, class\_).
    truth
        Probabilities at the end of the geodesic, dims (..., sample, class\_): see
        :func:`truth`.
    ignorance
        Probabilities at its start; uniform by default.
    of
        What the predictions are, as in :func:`bhattacharyya_distance`.

    Returns
    -------
    xarray.Dataset
        ``progress``
            t in [0, 1] of the point of the geodesic that is nearest in the
            Bhattacharyya distance.
        ``distance_to_geodesic``
            That distance.

        NaN where a prediction is missing or no probability, where start and end are the
        same on every sample, and where the distance is infinite all along.

    Raises
    ------
    TypeError, ValueError
        As :func:`bhattacharyya_distance`.

    Examples
    --------
    >>> certain = xr.DataArray([[1.0, 0.0]], dims=("sample", "class_"))
    >>> halfway = np.cos(np.pi / 8) ** 2
    >>> predicted = xr.DataArray([[halfway, 1 - halfway]], dims=("sample", "class_"))
    >>> found = progress(predicted, certain)
    >>> round(float(found.progress), 9), round(float(found.distance_to_geodesic), 9)
    (0.5, 0.0)
    """
    require_dims("truth", require_real("truth", truth), (DIM_SAMPLE, DIM_CLASS), "dims")
    if ignorance is None:
        ignorance = xr.DataArray(
            np.full((truth.sizes[DIM_SAMPLE], truth.sizes[DIM_CLASS]), 1 / max(1, truth.sizes[DIM_CLASS])),
            dims=(DIM_SAMPLE, DIM_CLASS),
        )
    arrays = {"predictions": predictions, "ignorance": ignorance, "truth": truth}
    _require_predictions(arrays, of)
    kinds: tuple[Of, Of, Of] = (of, "probabilities", "probabilities")
    results = apply_kernel(
        progress_kernel,
        [_amplitudes(a, kind) for a, kind in zip(arrays.values(), kinds, strict=True)],
        [(DIM_SAMPLE, DIM_CLASS)] * 3,
        output_dims=[(), ()],
        output_dtypes=[FLOAT, FLOAT],
    )
    names = ("progress", "distance_to_geodesic")
    return xr.Dataset({name: declared(a, name) for name, a in zip(names, results, strict=True)})


def _distance(P: FloatArray, Q: FloatArray) -> FloatArray:
    P, Q = np.broadcast_arrays(P, Q)
    return bhattacharyya_kernel(P[..., None, :, :], Q[..., None, :, :])[..., 0, 0]


def _distances_of_pairs(P: FloatArray, Q: FloatArray, n_extra: int) -> FloatArray:
    """Undo the broadcasting by name: dims of the other array stand as axes of size one.

    P has the axes (..., s, 1 for each extra dim of Q, 1, N, C), Q has (..., 1, extra dims, t, N, C)
    or, without leading dims, (extra dims, t, N, C). The result has (..., s, extra dims, t).
    """
    P = np.moveaxis(np.squeeze(P, -3), -3 - n_extra, -3)
    Q = np.squeeze(Q, -4 - n_extra) if Q.ndim > 3 + n_extra else Q
    return np.moveaxis(bhattacharyya_kernel(P, Q), -2, -2 - n_extra)


def _amplitudes(predictions: xr.DataArray, of: Of) -> xr.DataArray:
    sizes = {dim: predictions.sizes[dim] for dim in (DIM_SAMPLE, DIM_CLASS)}
    found: xr.DataArray = apply_kernel(
        functools.partial(amplitudes_kernel, of=of),
        [predictions],
        [tuple(sizes)],
        output_dims=[tuple(sizes)],
        output_sizes=sizes,
    )
    return found


def _on_one_dim(argument: str, array: xr.DataArray, dim: str | Iterable[str]) -> tuple[xr.DataArray, str]:
    """Array with the dims to be paired as one dim, and that dim's name."""
    dims = (dim,) if isinstance(dim, str) else tuple(dim)
    if not dims or {DIM_SAMPLE, DIM_CLASS} & set(dims):
        raise ValueError(f"expected dims of records as dim, beside sample and class_, came {list(dims)}")
    require_dims(argument, array, dims, "dim")
    if len(dims) == 1:
        return array, dims[0]
    # plain coords, not a MultiIndex: the result can be stored
    labelled = array.assign_coords({d: array[d] for d in dims})
    return labelled.stack({DIM_MODEL: dims}).reset_index(DIM_MODEL), DIM_MODEL


def _require_predictions(arrays: dict[str, xr.DataArray], of: str, *, same: bool = True) -> None:
    for name, array in arrays.items():
        require_dims(name, require_real(name, array), (DIM_SAMPLE, DIM_CLASS), "dims")
        if array.sizes[DIM_SAMPLE] == 0 or array.sizes[DIM_CLASS] < 2:
            raise ValueError(
                f"expected at least one sample and two classes in {name}, came sizes {dict(array.sizes)}"
            )
    if of not in get_args(Of):
        raise ValueError(f"expected of='probabilities' or 'logits', came {of!r}")
    if of == "probabilities":
        for name, array in arrays.items():
            _refuse_logits(name, array)
    if same:
        require_same_labels(arrays)


def _refuse_logits(name: str, array: xr.DataArray) -> None:
    """Raise if an array said to be probabilities plainly holds none, without computing a lazy one."""
    if array.chunks is not None:
        if array.attrs.get("transform", "unknown") is None:
            raise ValueError(
                f"expected probabilities as {name}, came outputs recorded as the model gave them (attr "
                f"transform=None): pass of='logits'; if the model itself ends in a softmax, pass "
                f"{name}.assign_attrs(transform='softmax')"
            )
        return
    rows = array.transpose(..., DIM_CLASS).values
    finite = np.isfinite(rows).all(axis=-1)
    if finite.any() and np.isnan(amplitudes_kernel(rows, "probabilities")).all():
        raise ValueError(
            f"expected probabilities as {name}, not negative and with the sum 1 over the classes, came none: "
            "pass of='logits' if these are logits"
        )
