r"""The bulk of a whole spectrum: the Marchenko-Pastur law fitted below the outliers.

Scale and ratio follow from the first two moments of the bulk,

.. math::

   \mathrm{scale} = m_1, \qquad \mathrm{ratio} = \frac{m_2 / m_1^2 - 1}{1 + 1/b},

the bulk being the smallest b eigenvalues (the divisor is the exact one for b
dimensions and real Gaussian entries). The q eigenvalues beyond it hold q dimensions
and q samples of the noise; scale and ratio are given for the noise as a whole.

Which b is right follows from the fit itself: none of the b eigenvalues may lie
beyond the fitted edge, and the next one has to. All b are tried at once, and of
those that agree with themselves the one whose law meets the quantiles of its bulk
best is taken. So a spike of any size does no harm, unlike in a fit that starts from
all eigenvalues.

The largest of b eigenvalues of pure noise fluctuates about the edge of the law by
:math:`b^{-2/3}`, as I. M. Johnstone, Ann. Statist. 29 (2001) 295, made precise. The
fitted edge therefore stands at the 99 % quantile of that largest eigenvalue.
"""

from __future__ import annotations

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
from hild_xr.analysis.spectra.recorded import n_recorded
from hild_xr.analysis.subspaces.bases import precision
from hild_xr.analysis.theory.marchenko_pastur import marchenko_pastur_cdf_kernel, require_positive
from hild_xr.variables import DIM_EIG

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hild_xr.analysis.subspaces.bases import FloatArray, IntArray

MINIMUM = 20
"""Fewest eigenvalues of a bulk that a law is fitted to."""

TRACY_WIDOM_99 = 2.0234
"""99 % quantile of the Tracy-Widom law of real matrices (beta = 1)."""

SLACK = 5.0
"""A fitted ratio may exceed 1 by this over b, its sampling error, before it counts as impossible."""

QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
"""Where the law and the bulk are compared to choose between bulks."""

RESULTS = ("marchenko_pastur_scale", "marchenko_pastur_ratio", "bulk_edge", "marchenko_pastur_distance")


# ---------------------------------------------------------------------------- kernel


def marchenko_pastur_fit_kernel(
    eigenvalues: FloatArray, ratio: FloatArray | float = np.nan
) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
    """Scale, ratio, edge and distance of the law fitted to stacked spectra; see :func:`marchenko_pastur_fit`.

    Parameters
    ----------
    eigenvalues
        Array of shape (..., n) in any order.
    ratio
        Array that broadcasts with the shape (...): the ratio where it is known, NaN
        where it is to be fitted.

    Returns
    -------
    scale, ratio, edge, distance
        float64 arrays of shape (...).

    Examples
    --------
    >>> W = np.random.default_rng(0).standard_normal((800, 400)) / 800**0.5
    >>> scale, ratio, edge, distance = marchenko_pastur_fit_kernel(np.linalg.eigvalsh(W.T @ W))
    >>> round(float(scale), 2), round(float(ratio), 2), bool(distance < 0.01)
    (1.0, 0.5, True)
    """
    y, unit, m, n_zero, usable = _positive_by_size(eigenvalues)
    known = np.broadcast_to(np.asarray(ratio, dtype=np.float64), m.shape)
    # the continuous part of the law (ratio, scale) is that of (1 / ratio, scale * ratio): fit the one below 1
    wide = np.where(np.isnan(known), n_zero > 0, known > 1)
    usable = usable & (wide | (n_zero == 0))
    scales, ratios = _moments(y, np.where(known > 1, 1 / known, known))
    edges = _finite_edge(scales, ratios)
    b = _best_bulk(y, m, scales, ratios, edges)
    usable = usable[..., None] & (b > 0)
    b = np.maximum(b, 1)
    scale, below_one, edge = (np.take_along_axis(a, b - 1, axis=-1) for a in (scales, ratios, edges))
    distance = _distance(y, b, scale, below_one)
    scale, below_one = _with_outliers(scale, below_one, b, m[..., None] - b, known[..., None])
    ratio = np.where(wide[..., None], 1 / below_one, below_one)
    scale = np.where(wide[..., None], scale * below_one, scale)
    fitted = (scale * unit, ratio, edge * unit, distance)
    found = [np.where(usable, a, np.nan)[..., 0] for a in fitted]
    return found[0], found[1], found[2], found[3]


def _positive_by_size(
    eigenvalues: FloatArray,
) -> tuple[FloatArray, FloatArray, IntArray, IntArray, NDArray[np.bool_]]:
    """Positive eigenvalues by the largest one, increasing and inf at the end; their and the zeros' number."""
    n, usable = n_recorded(eigenvalues)
    finite = np.isfinite(eigenvalues)
    values = np.where(finite, eigenvalues, 0.0).astype(np.float64)
    unit = np.abs(values).max(axis=-1, keepdims=True, initial=0.0)
    rounding = n[..., None] * precision(eigenvalues) * unit
    positive = finite & (values > rounding)
    m = np.asarray(positive.sum(axis=-1))
    usable = usable & ~(values < -rounding).any(axis=-1)
    y = np.sort(np.where(positive, values / np.where(unit > 0, unit, 1.0), np.inf), axis=-1)
    return y, unit, m, n - m, usable


def _moments(y: FloatArray, known: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Scale and ratio for every number b of bulk eigenvalues: arrays of the shape of y, at b - 1."""
    b = np.arange(1, y.shape[-1] + 1)
    finite = np.where(np.isfinite(y), y, 0.0)
    mean, mean_square = np.cumsum(finite, axis=-1) / b, np.cumsum(finite**2, axis=-1) / b
    spread = np.divide(mean_square, mean**2, out=np.full(y.shape, np.nan), where=mean > 0)
    fitted = (spread - 1) / (1 + 1 / b)
    fitted = np.where(fitted <= 1 + SLACK / b, np.clip(fitted, np.finfo(float).tiny, 1.0), np.nan)
    return mean, np.where(np.isnan(known[..., None]), fitted, known[..., None])


def _finite_edge(scale: FloatArray, ratio: FloatArray) -> FloatArray:
    """Right edge for b dimensions: 99 of 100 samples of pure noise have no eigenvalue beyond it."""
    samples = np.arange(1, scale.shape[-1] + 1) / ratio
    root = np.sqrt(ratio)
    width = (1 + root) * (1 + 1 / root) ** (1 / 3) * samples ** (-2 / 3)
    edge: FloatArray = scale * ((1 + root) ** 2 + TRACY_WIDOM_99 * width)
    return edge


def _with_outliers(
    scale: FloatArray, ratio: FloatArray, b: IntArray, q: IntArray, known: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Give scale and ratio of the whole noise from those of the bulk beside q outliers.

    Beside q strong spikes, n x N noise leaves the bulk of (n - q) x (N - q) noise divided by N.
    """
    other = b / ratio
    ratio = np.where(np.isnan(known), (b + q) / (other + q), ratio)
    other = np.where(np.isnan(known), other, np.maximum((b + q) / ratio - q, 1))
    return scale * (other + q) / other, ratio


def _best_bulk(
    y: FloatArray, m: IntArray, scales: FloatArray, ratios: FloatArray, edges: FloatArray
) -> IntArray:
    """Find the size b of the bulk, shape (..., 1); 0 where no b agrees with its own edge."""
    b = np.arange(1, y.shape[-1] + 1)
    beyond = np.concatenate([y[..., 1:], np.full((*y.shape[:-1], 1), np.inf)], axis=-1)
    agrees = (y <= edges) & (beyond > edges)
    agrees &= (b >= MINIMUM) & (2 * b >= m[..., None]) & (b <= m[..., None])
    misfit = np.zeros(y.shape)
    for p in QUANTILES:
        at = (p * b).astype(np.int64)
        law = marchenko_pastur_cdf_kernel(np.where(agrees, y[..., at], np.nan), ratios, scales)
        misfit = np.fmax(misfit, np.abs(law - (at + 0.5) / b))
    misfit = np.where(agrees, misfit, np.inf)
    # quantiles are sharp to about 1 / b: within that the larger bulk is as good, and removes less
    good = agrees & (misfit <= misfit.min(axis=-1, keepdims=True) + 1 / b)
    best = np.where(good, b, 0).max(axis=-1, keepdims=True)
    return np.asarray(best)


def _distance(y: FloatArray, b: IntArray, scale: FloatArray, ratio: FloatArray) -> FloatArray:
    """Kolmogorov-Smirnov distance between the b smallest values and the law, shape (..., 1)."""
    index = np.arange(y.shape[-1])
    law = marchenko_pastur_cdf_kernel(np.where(index < b, y, np.nan), ratio, scale)
    size = np.maximum(b, 1)
    apart = np.maximum(np.abs(law - index / size), np.abs(law - (index + 1) / size))
    largest: FloatArray = np.fmax.reduce(apart, axis=-1, keepdims=True)
    return largest


# ---------------------------------------------------------------------------- labelled


def marchenko_pastur_fit(
    eigenvalues: xr.DataArray, *, ratio: float | xr.DataArray | None = None, dim: str = DIM_EIG
) -> xr.Dataset:
    r"""Fit the Marchenko-Pastur law to the bulk of whole spectra, whatever outliers lie above it.

    For sample covariances, weight matrices (squared singular values) and other
    positive semidefinite spectra that were recorded **whole**: the leading
    eigenvalues alone do not tell the law. The method stands in
    :mod:`hild_xr.analysis.spectra.bulk`. For 400 dimensions, 800 Gaussian samples and 4 spikes
    scale and ratio are right to 1 % and 2 % (largest error in 210 draws 0.8 % and
    1.8 %); the error falls as one over the number of eigenvalues.

    Parameters
    ----------
    eigenvalues
        All eigenvalues along `dim`, in any order. NaN at the end means that a
        block has no more.
    ratio
        Dimensions per sample, n / N, where it is known (the shape of a weight
        matrix, say): then only the scale is fitted. Number, or array without `dim`.
    dim
        Dim of the eigenvalues.

    Returns
    -------
    xarray.Dataset
        ``marchenko_pastur_scale``, ``marchenko_pastur_ratio``
            In the convention of :mod:`hild_xr.analysis.theory.marchenko_pastur`. Above
            1 if some eigenvalues are zero (up to rounding), at most 1 otherwise.
        ``bulk_edge``
            Right edge with the allowance for a finite number of eigenvalues: of
            pure noise no eigenvalue exceeds it in 99 of 100 draws.
        ``marchenko_pastur_distance``
            Kolmogorov-Smirnov distance between the bulk and the law, about 1 / n for
            noise. A large one says that the bulk does not follow the law.

        All are NaN where the spectrum is missing, has a negative eigenvalue
        or fewer than 20 positive ones in its bulk, where zeros contradict a
        known ratio below 1, and where no law agrees with its own edge (at most
        half of the positive eigenvalues may be outliers).

    Raises
    ------
    TypeError
        If an array is no DataArray or not real.
    ValueError
        If `dim` is missing, the ratio is not positive, or labels differ.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> Y = rng.standard_normal((800, 400)) * np.r_[5.0, 4.0, np.ones(398)]
    >>> fit = marchenko_pastur_fit(xr.DataArray(np.linalg.eigvalsh(Y.T @ Y / 800), dims="eig"))
    >>> {name: round(float(value), 2) for name, value in fit.items()}
    {'marchenko_pastur_scale': 1.0, 'marchenko_pastur_ratio': 0.5, 'bulk_edge': 2.96,
     'marchenko_pastur_distance': 0.01}
    """
    require_dims("eigenvalues", require_real("eigenvalues", eigenvalues), (dim,), "dim")
    arrays = {"eigenvalues": eigenvalues, "ratio": known_ratio(ratio, dim)}
    require_same_labels(arrays)
    results = apply_kernel(
        marchenko_pastur_fit_kernel,
        list(arrays.values()),
        [(dim,), ()],
        output_dims=[()] * len(RESULTS),
        output_dtypes=[FLOAT] * len(RESULTS),
    )
    return xr.Dataset({name: declared(a, name) for name, a in zip(RESULTS, results, strict=True)})


def known_ratio(ratio: float | xr.DataArray | None, dim: str) -> xr.DataArray:
    """Argument `ratio` as an array, NaN where it is to be fitted.

    Raises
    ------
    TypeError, ValueError
        If it is not real, not positive, or has the dim of the eigenvalues.

    Examples
    --------
    >>> float(known_ratio(0.5, "eig"))
    0.5
    """
    given = ratio if isinstance(ratio, xr.DataArray) else xr.DataArray(np.nan if ratio is None else ratio)
    require_positive(ratio=require_real("ratio", given))
    if dim in given.dims:
        raise ValueError(f"expected one ratio for a spectrum, came one with dim {dim!r}: {given.dims}")
    return given
