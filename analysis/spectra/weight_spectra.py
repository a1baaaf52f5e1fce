r"""Singular values of weights: the bulk of noise and the spikes that stand out.

A matrix of m rows and n columns with independent entries of mean 0 and variance
:math:`\sigma^2` has singular values between the Marchenko-Pastur edges
:math:`\sigma |\sqrt m \pm \sqrt n|`. What training adds in few directions shows
as spikes above (Z. Wang et al., NeurIPS 2023, arXiv:2211.06506).

The largest singular value of pure noise scatters about the edge. With
:math:`a = \sqrt{m - 1/2}` and :math:`b = \sqrt{n - 1/2}`,

.. math:: (s_1^2 / \sigma^2 - (a + b)^2) \, / \, \big( (a + b) (1/a + 1/b)^{1/3} \big)

has nearly the Tracy-Widom law of order 1 (I. M. Johnstone, Ann. Statist. 29
(2001) 295; Z. Ma, Bernoulli 18 (2012) 322), so a spike has to exceed a quantile
of it and not the edge alone.
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
    require_real,
    require_same_labels,
)
from hild_xr.analysis.base.checks import require_values
from hild_xr.analysis.subspaces.bases import singular_values
from hild_xr.analysis.theory.marchenko_pastur import marchenko_pastur_cdf
from hild_xr.variables import DIM_IN, DIM_OUT, DIM_SINGULAR

if TYPE_CHECKING:
    from hild_xr.analysis.subspaces.bases import FloatArray, IntArray

TRACY_WIDOM_99 = 2.0234
"""99 % quantile of the Tracy-Widom law of order 1: one noise matrix in a hundred has a spike."""

INPUT_DIMS = (DIM_IN, "kd", "kh", "kw")
"""Dims that make up the columns of a weight matrix, as far as a layer has them."""

RESULTS = (
    "singular_values",
    "entry_variance",
    "singular_bulk_lower",
    "singular_bulk_upper",
    "spike_threshold",
    "spike_count",
)

UNKNOWN = -1
"""Number of spikes where the weights are missing."""

ROUNDS = 50
"""Most rounds of taking spikes out of the estimate of the variance; in practice it takes two or three."""


# ---------------------------------------------------------------------------- kernel


def weight_spectrum_kernel(
    weight: FloatArray, variance: FloatArray | None = None, *, quantile: float = TRACY_WIDOM_99
) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray, FloatArray, IntArray]:
    """Singular values of stacked matrices and what noise of their size would have.

    Parameters
    ----------
    weight
        Array of shape (..., m, n).
    variance
        Variance of the entries of the noise: array that broadcasts with (...),
        or None to estimate it from the bulk.
    quantile
        As in :func:`weight_spectrum`.

    Returns
    -------
    singular_values
        Array of shape (..., min(m, n)).
    variance, lower, upper, threshold, n_spikes
        Arrays of shape (...); NaN, and -1, where a matrix is not finite.

    Examples
    --------
    >>> found = weight_spectrum_kernel(np.diag([5.0, 1.0]), np.array(1.0))
    >>> [np.round(a, 3).tolist() for a in found]
    [[5.0, 1.0], 1.0, 0.0, 2.828, 3.44, 1]
    """
    m, n = weight.shape[-2:]
    values = singular_values(weight)
    unit = math.sqrt(_unit_threshold(m, n, quantile))
    if variance is None:
        variance = _bulk_variance(values, max(m, n), unit)
    else:
        variance = np.broadcast_to(np.asarray(variance, dtype=np.float64), values.shape[:-1])
    known = np.isfinite(values).all(axis=-1) & (variance >= 0)
    sigma = np.sqrt(np.where(known, variance, np.nan))
    count = (values > unit * sigma[..., None]).sum(axis=-1)
    return (
        values,
        np.where(known, variance, np.nan),
        sigma * abs(math.sqrt(m) - math.sqrt(n)),
        sigma * (math.sqrt(m) + math.sqrt(n)),
        unit * sigma,
        np.where(known, count, UNKNOWN),
    )


def _unit_threshold(m: int, n: int, quantile: float) -> float:
    """Quantile of the largest squared singular value of noise of variance 1."""
    a, b = math.sqrt(m - 0.5), math.sqrt(n - 0.5)
    return max(0.0, (a + b) ** 2 + quantile * (a + b) * math.cbrt(1 / a + 1 / b))


def _bulk_variance(values: FloatArray, larger: int, unit_threshold: float) -> FloatArray:
    """Variance whose Marchenko-Pastur median is that of the values that are no spikes.

    Spikes move the median of all values, so they are counted and left out until
    their number stays. Next to r of them the bulk is that of noise with r rows
    and columns less.
    """
    smaller = values.shape[-1]
    ascending = np.square(values[..., ::-1])
    spikes = np.zeros(values.shape[:-1], dtype=np.int64)
    variance = np.full(values.shape[:-1], np.nan)
    for _ in range(ROUNDS):
        middle = (smaller - spikes - 1) / 2
        low, high = np.floor(middle).astype(np.int64), np.ceil(middle).astype(np.int64)
        medians = [np.take_along_axis(ascending, at[..., None], axis=-1)[..., 0] for at in (low, high)]
        numbers, which = np.unique(spikes, return_inverse=True)
        unit_medians = np.array([(larger - r) * _median(int(smaller - r), int(larger - r)) for r in numbers])
        variance = (medians[0] + medians[1]) / (2 * unit_medians[which.reshape(spikes.shape)])
        beyond = (values > unit_threshold * np.sqrt(variance)[..., None]).sum(axis=-1)
        # half of the values make up a median that means something; and only more spikes than before count
        beyond = np.maximum(spikes, np.minimum(beyond, smaller // 2))
        if np.array_equal(beyond, spikes):
            break
        spikes = beyond
    return variance


@functools.cache
def _median(smaller: int, larger: int) -> float:
    """Median of the Marchenko-Pastur law of mean 1 and the ratio of the two."""
    from scipy.optimize import brentq

    ratio = smaller / larger
    lower, upper = (1 - math.sqrt(ratio)) ** 2, (1 + math.sqrt(ratio)) ** 2
    median: float = brentq(lambda x: float(marchenko_pastur_cdf(x, ratio)) - 0.5, lower, upper, xtol=1e-14)
    return median


# ---------------------------------------------------------------------------- labelled


def weight_spectrum(
    weight: xr.DataArray,
    *,
    variance: float | xr.DataArray | None = None,
    quantile: float = TRACY_WIDOM_99,
    row_dims: Dims = DIM_OUT,
    column_dims: Dims = None,
) -> xr.Dataset:
    r"""Singular values of weights, the bulk of noise, and the number of spikes.

    Parameters
    ----------
    weight
        Weights with dims (..., out, in), or those of a convolution, (..., out,
        in, kh, kw), whose kernels make up the columns.
    variance
        Variance :math:`\sigma^2` of an entry of the noise: that of the
        initialisation, as number or array over dims of the records. By default
        it is estimated for each record from the median of the singular values
        that are no spikes (M. Gavish and D. L. Donoho, IEEE Trans. Inf. Theory
        60 (2014) 5040). That assumes noise with independent entries: it says
        little of a matrix whose bulk has another shape.
    quantile
        Quantile of the Tracy-Widom law of order 1 that the largest singular
        value of noise stays below; the default is that of 99 %. Other quantiles:
        90 % .4501, 95 % .9793. With an estimated variance two noise matrices in
        a hundred have a spike, not one.
    row_dims, column_dims
        Dims that make up the rows and the columns of a matrix; columns by
        default those of in, kd, kh, kw that there are.

    Returns
    -------
    xarray.Dataset
        ``singular_values``
            With the new last dim ``singular``, decreasing.
        ``entry_variance``
            :math:`\sigma^2`.
        ``singular_bulk_lower``, ``singular_bulk_upper``
            Marchenko-Pastur edges :math:`\sigma |\sqrt m \pm \sqrt n|`.
        ``spike_threshold``, ``spike_count``
            Bound on the largest singular value of noise, and the number above.

        NaN (-1 for the count) where weights or the variance are missing.

    Raises
    ------
    TypeError
        If an array is no DataArray or not real.
    ValueError
        If dims are missing, shared by rows and columns, or empty, the variance
        is negative, or labels differ.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> noise = rng.standard_normal((200, 100))
    >>> u, v = np.ones(200) / 200**0.5, np.ones(100) / 10
    >>> found = weight_spectrum(xr.DataArray(noise + 60 * np.outer(u, v), dims=("out", "in")))
    >>> int(found.spike_count), round(float(found.singular_bulk_upper / (200**0.5 + 10)), 1)
    (1, 1.0)
    """
    rows, columns = matrix_dims(weight, row_dims, column_dims)
    m, n = (math.prod(weight.sizes[dim] for dim in dims) for dims in (rows, columns))
    arrays = {"weight": weight}
    if variance is not None:
        arrays["variance"] = _variance(variance, (*rows, *columns))
    require_same_labels(arrays)
    results = apply_kernel(
        functools.partial(_of_stacked, (m, n), len(rows) + len(columns), quantile),
        list(arrays.values()),
        [(*rows, *columns), ()][: len(arrays)],
        output_dims=[(DIM_SINGULAR,)] + [()] * (len(RESULTS) - 1),
        output_sizes={DIM_SINGULAR: min(m, n)},
        output_dtypes=[FLOAT] * (len(RESULTS) - 1) + [np.dtype(np.int64)],
    )
    said = {"spike_threshold": {"quantile": quantile}, "spike_count": {"quantile": quantile}}
    named = zip(RESULTS, results, strict=True)
    return xr.Dataset({name: declared(found, name, **said.get(name, {})) for name, found in named})


def matrix_dims(
    weight: xr.DataArray, row_dims: Dims, column_dims: Dims
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Dims of the rows and of the columns of a weight; see :func:`weight_spectrum`.

    Raises
    ------
    TypeError
        If the weight is no DataArray or not real.
    ValueError
        If dims are missing, empty, or shared by rows and columns, or there are none.

    Examples
    --------
    >>> matrix_dims(xr.DataArray(np.ones((4, 3, 2, 2)), dims=("out", "in", "kh", "kw")), "out", None)
    (('out',), ('in', 'kh', 'kw'))
    """
    if column_dims is None:
        column_dims = [dim for dim in INPUT_DIMS if dim in require_real("weight", weight).dims]
    rows, columns = (
        (dims,) if isinstance(dims, str) else tuple(dims or ()) for dims in (row_dims, column_dims)
    )
    require_values("weight", weight, (*rows, *columns), "row_dims=... and column_dims")
    if not rows or not columns or set(rows) & set(columns):
        raise ValueError(
            f"expected rows and columns of different dims of weight, at least one each, came {list(rows)} "
            f"and {list(columns)} of {weight.dims}; pass row_dims=[...] and column_dims=[...]"
        )
    return rows, columns


def _of_stacked(
    shape: tuple[int, int],
    n_axes: int,
    quantile: float,
    weight: FloatArray,
    variance: FloatArray | None = None,
) -> tuple[Any, ...]:
    matrices = weight.reshape(*weight.shape[: weight.ndim - n_axes], *shape)
    return weight_spectrum_kernel(matrices, variance, quantile=quantile)


def _variance(variance: float | xr.DataArray, dims: tuple[str, ...]) -> xr.DataArray:
    if not isinstance(variance, xr.DataArray):
        if not variance >= 0:
            raise ValueError(f"expected a variance of at least 0, came {variance}")
        return xr.DataArray(float(variance))
    if set(dims) & set(require_real("variance", variance).dims):
        raise ValueError(f"expected one variance for a matrix, came one with dims {variance.dims}")
    return variance
