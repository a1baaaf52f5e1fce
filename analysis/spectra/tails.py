r"""Heavy tails: the exponent of a power law in the tail of a spectrum.

For n values :math:`l_i \ge l_{\min}` of a density
:math:`p(l) \propto l^{-\alpha}` the maximum likelihood estimate is

.. math:: \hat\alpha = 1 + \frac{n}{\sum_i \log(l_i / l_{\min})}

(B. M. Hill, Ann. Statist. 3 (1975) 1163; A. Clauset, C. R. Shalizi and
M. E. J. Newman, SIAM Review 51 (2009) 661). The tail index
:math:`\hat\alpha - 1` is the exponent of the survival function: samples of
Pareto(a) have tail index a. Weight spectra with heavy tails are studied in
C. H. Martin and M. W. Mahoney, JMLR 22 (2021) 165.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from hild_xr.analysis.base.arguments import (
    FLOAT,
    apply_kernel,
    declared,
    require_real,
    require_same_labels,
)
from hild_xr.analysis.base.checks import require_values
from hild_xr.analysis.base.division import divide_or_nan
from hild_xr.analysis.spectra.recorded import n_recorded
from hild_xr.variables import DIM_EIG

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hild_xr.analysis.subspaces.bases import FloatArray, IntArray

RESULTS = (
    "tail_index",
    "tail_index_standard_error",
    "power_law_exponent",
    "tail_minimum",
    "tail_distance",
    "tail_count",
)

UNKNOWN = -1
"""Count where the spectrum was not recorded."""


# ---------------------------------------------------------------------------- kernels


def tail_index_kernel(
    values: FloatArray, minimum: FloatArray | None = None, *, k: int | None = None
) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray, FloatArray, IntArray]:
    """Fit a power law to the tails of stacked spectra; see :func:`tail_index` for the meaning.

    Parameters
    ----------
    values
        Array of shape (..., n) in any order.
    minimum
        Start of the tail: array that broadcasts with (...), or None.
    k
        Number of values in the tail, or None. With neither the start is chosen.

    Returns
    -------
    tail_index, standard_error, exponent, minimum, distance, count
        Arrays of shape (...).

    Examples
    --------
    >>> found = tail_index_kernel(np.exp([3.0, 2.0, 1.0, 0.0]), np.array(1.0))
    >>> [round(float(a), 4) for a in found]
    [0.6667, 0.3333, 1.6667, 1.0, 0.25, 4.0]
    """
    _, known = n_recorded(values)
    usable = np.isfinite(values) & (values > 0) & known[..., None]
    # below: logarithms in decreasing order, the positive ones first
    logs = np.log(np.where(usable, values, 1.0).astype(np.float64))
    logs = -np.sort(np.where(usable, -logs, np.inf), axis=-1)
    positive = usable.sum(axis=-1)
    if k is not None:
        count = np.where(positive > k, k, 0)
        start = logs[..., min(k, logs.shape[-1] - 1)]
    elif minimum is not None:
        minimum = np.broadcast_to(np.asarray(minimum, dtype=np.float64), known.shape)
        known = known & (minimum > 0)
        start = np.log(np.where(known, minimum, 1.0))
        count = (logs >= start[..., None]).sum(axis=-1)
    else:
        count, start = _closest_tail(logs, positive)
    count = np.where(known, count, 0)
    start = np.where(count > 0, start, 0.0)
    index = _hill(logs, count, start)
    defined = np.isfinite(index)
    distance = _distance(logs, count, start, index)
    return (
        index,
        index / np.sqrt(np.maximum(count, 1)),
        1.0 + index,
        np.where(defined, np.exp(start), np.nan),
        np.where(defined, distance, np.nan),
        np.where(known, count, UNKNOWN),
    )


def _in_tail(logs: FloatArray, count: IntArray) -> NDArray[np.bool_]:
    return np.asarray(np.arange(logs.shape[-1]) < count[..., None])


def _hill(logs: FloatArray, count: IntArray, start: FloatArray) -> FloatArray:
    """Values by the sum of their logarithms over the start; NaN where that sum is not positive."""
    over = np.where(_in_tail(logs, count), logs - start[..., None], 0.0).sum(axis=-1)
    return divide_or_nan(count, over, over > 0)


def _distance(logs: FloatArray, count: IntArray, start: FloatArray, index: FloatArray) -> FloatArray:
    """Kolmogorov-Smirnov distance between the tails and their power laws."""
    tail = _in_tail(logs, count)
    index = np.where(np.isfinite(index), index, 0.0)
    fitted = np.exp(-index[..., None] * np.where(tail, logs - start[..., None], 0.0))
    above = np.arange(logs.shape[-1]) / np.maximum(count, 1)[..., None]  # fraction larger than the value
    steps = np.maximum(np.abs(fitted - above), np.abs(fitted - above - 1 / np.maximum(count, 1)[..., None]))
    return np.asarray(np.where(tail, steps, 0.0).max(axis=-1))


def _closest_tail(logs: FloatArray, positive: IntArray) -> tuple[IntArray, FloatArray]:
    """Size and start of the tail that is closest to its power law, over all starts at a value.

    The loop runs over the sizes of the tail, for all records at once.
    """
    *lead, n = logs.shape
    best, count, start = np.full(lead, np.inf), np.zeros(lead, dtype=np.int64), np.zeros(lead)
    for size in range(2, n + 1):
        # equal values are in the tail or out of it together
        whole = (positive == size) | (logs[..., min(size, n - 1)] < logs[..., size - 1])
        sizes = np.where((positive >= size) & whole, size, 0)
        least = np.where(sizes > 0, logs[..., size - 1], 0.0)
        index = _hill(logs[..., :size], sizes, least)
        distance = _distance(logs[..., :size], sizes, least, index)
        better = np.isfinite(index) & (distance < best)
        best = np.where(better, distance, best)
        count, start = np.where(better, size, count), np.where(better, least, start)
    return count, start


# ---------------------------------------------------------------------------- labelled


def tail_index(
    values: xr.DataArray,
    *,
    minimum: float | xr.DataArray | None = None,
    k: int | None = None,
    dim: str = DIM_EIG,
) -> xr.Dataset:
    r"""Fit a power law to the tail of recorded spectra by maximum likelihood.

    :math:`\hat\alpha = 1 + n / \sum_i \log(l_i / l_{\min})` over the values
    :math:`l_i \ge l_{\min}` (Hill 1975; Clauset, Shalizi and Newman 2009). The
    start of the tail is

    * `minimum`, if it is given;
    * the (k+1)-th largest value, if `k` is given (Hill's estimator);
    * otherwise the value for which the tail is closest to its power law in
      Kolmogorov-Smirnov distance (Clauset, Shalizi and Newman 2009), which
      takes :math:`O(n^2)` work for n values.

    A number comes out whether or not there is a power law: look at
    ``tail_distance`` and ``tail_count``. Only positive values take part.

    Parameters
    ----------
    values
        Eigenvalues, or squared singular values, along `dim` in any order. NaN
        at the end means that a block has no more.
    minimum
        Start of the tail: a positive number, or an array without `dim`.
    k
        Number of values in the tail.
    dim
        Dim of the values.

    Returns
    -------
    xarray.Dataset
        ``tail_index``
            :math:`\hat\alpha - 1`; NaN where the tail is empty or all its
            values are equal.
        ``tail_index_standard_error``
            :math:`(\hat\alpha - 1) / \sqrt n`.
        ``power_law_exponent``
            :math:`\hat\alpha`.
        ``tail_minimum``, ``tail_count``
            :math:`l_{\min}`, and n; -1 where values are missing, 0 where fewer
            than k + 1 are positive.
        ``tail_distance``
            Kolmogorov-Smirnov distance between tail and power law.

    Raises
    ------
    TypeError
        If an array is no DataArray or not real.
    ValueError
        If `dim` is missing or empty, both `minimum` and `k` are given, one is
        out of range, or labels differ.

    Examples
    --------
    >>> quantiles = (np.arange(1000) + 0.5) / 1000
    >>> pareto = xr.DataArray(quantiles ** (-1 / 2.5), dims="eig")
    >>> round(float(tail_index(pareto, minimum=1.0).tail_index), 2)
    2.5
    """
    n = require_values("values", values, (dim,), "dim").sizes[dim]
    if minimum is not None and k is not None:
        raise ValueError(f"expected minimum or k, or neither, came minimum={minimum!r} and k={k}")
    if k is not None and not 1 <= k < n:
        raise ValueError(f"expected 1 <= k < {n}, the number of values along {dim!r}, came k={k}")
    arrays = {"values": values}
    if minimum is not None:
        arrays["minimum"] = _minimum(minimum, dim)
    require_same_labels(arrays)
    results = apply_kernel(
        functools.partial(tail_index_kernel, k=k),
        list(arrays.values()),
        [(dim,), ()][: len(arrays)],
        output_dims=[()] * len(RESULTS),
        output_dtypes=[FLOAT] * (len(RESULTS) - 1) + [np.dtype(np.int64)],
    )
    return xr.Dataset({name: declared(found, name) for name, found in zip(RESULTS, results, strict=True)})


def _minimum(minimum: float | xr.DataArray, dim: str) -> xr.DataArray:
    if not isinstance(minimum, xr.DataArray):
        if not minimum > 0:
            raise ValueError(f"expected minimum > 0, the start of the tail, came {minimum}")
        return xr.DataArray(float(minimum))
    if dim in require_real("minimum", minimum).dims:
        raise ValueError(f"expected one minimum for a spectrum, came one with dim {dim!r}: {minimum.dims}")
    return minimum
