r"""Outliers of a spectrum: how many eigenvalues stand apart from the bulk.

Eigenvalues are measured from the regulariser: a loss with :math:`(\beta/2)|x|^2`
moves the whole Hessian by :math:`\beta`, and ratios mean something only for
:math:`m_i = |\lambda_i - \beta|`, here in decreasing order
:math:`m_1 \ge m_2 \ge \dots`.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Literal, get_args

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
from hild_xr.analysis.base.checks import real_number, whole_number
from hild_xr.analysis.spectra.bulk import known_ratio, marchenko_pastur_fit_kernel
from hild_xr.analysis.spectra.recorded import n_recorded
from hild_xr.analysis.subspaces.bases import precision
from hild_xr.variables import DIM_EIG

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hild_xr.analysis.subspaces.bases import FloatArray, IntArray

Method = Literal["gap", "relative", "edge", "marchenko_pastur"]

DEFAULT_THRESHOLD: dict[str, float] = {"gap": 2.0, "relative": 0.05}
"""Smallest ratio that is a gap; fraction of the largest eigenvalue that an outlier exceeds."""

ZERO = 8.0
"""Multiple of eps |lambda|_max below which lambda - beta is rounding and counts as zero."""

RESULTS = ("outlier_count", "gap_ratio", "bulk_edge", "bulk_reached")

UNKNOWN = -1
"""Count where the spectrum does not tell it."""


# ---------------------------------------------------------------------------- kernel


def outliers_kernel(
    eigenvalues: FloatArray,
    regularizer: FloatArray,
    edge: FloatArray,
    ratio: FloatArray | float = np.nan,
    *,
    method: Method,
    threshold: float = np.nan,
    k: int | None = None,
) -> tuple[IntArray, FloatArray, FloatArray, NDArray[np.bool_]]:
    """Count, gap ratio and edge for stacked spectra; see :func:`outliers` for the meaning.

    Parameters
    ----------
    eigenvalues
        Array of shape (..., n) in any order.
    regularizer, edge, ratio
        Arrays that broadcast with the shape (...); the edge is used by the
        method "edge" only, the ratio by "marchenko_pastur" only (NaN: to be fitted).
    method, threshold, k
        As in :func:`outliers`.

    Returns
    -------
    outlier_count, gap_ratio, bulk_edge, bulk_reached
        Arrays of shape (...).

    Examples
    --------
    >>> count, ratio, edge, reached = outliers_kernel(
    ...     np.array([5.0, 4.0, 0.4, 0.3]), np.array(0.0), np.array(np.nan), method="gap", threshold=2.0
    ... )
    >>> int(count), float(ratio), float(edge), bool(reached)
    (2, 10.0, 0.4, True)
    """
    shape = eigenvalues.shape[:-1]
    beta, edge = (np.broadcast_to(a, shape).astype(np.float64) for a in (regularizer, edge))
    n, known = n_recorded(eigenvalues)
    known = known & np.isfinite(beta)
    values, sizes = _by_decreasing_size(eigenvalues, beta)
    index = np.arange(sizes.shape[-1])
    recorded = index < n[..., None]
    if method == "gap":
        position = _largest_gap(sizes, recorded) if k is None else np.full(shape, k)
        known = known & (n > np.maximum(position, 1))
        ratio = _gap_ratio(sizes, index < position[..., None], recorded)
        count = np.where(ratio >= threshold, position, 0)
        edge = beta + np.take_along_axis(sizes, np.minimum(count, n - 1)[..., None], axis=-1)[..., 0]
    else:
        if method == "relative":
            edge = beta + threshold * sizes[..., 0]
            outlier = recorded & (sizes > threshold * sizes[..., :1])
        else:
            if method == "marchenko_pastur":
                edge = beta + _fitted_edge(eigenvalues, beta, ratio)
            known = known & np.isfinite(edge)
            outlier = recorded & (values > edge[..., None])
        count = outlier.sum(axis=-1)
        ratio = _gap_ratio(sizes, outlier if k is None else index < k, recorded)
    return (
        np.where(known, count, UNKNOWN),
        np.where(known, ratio, np.nan),
        np.where(known, edge, np.nan),
        known & (count < n),
    )


def _fitted_edge(eigenvalues: FloatArray, beta: FloatArray, ratio: FloatArray | float) -> FloatArray:
    """Edge of the bulk of lambda - beta, the differences at rounding taken for zeros as everywhere here."""
    values, sizes = _by_decreasing_size(eigenvalues, beta)
    shifted = np.where(sizes > 0, values - beta[..., None], 0.0)
    return marchenko_pastur_fit_kernel(np.where(sizes < 0, np.nan, shifted), ratio)[2]


def sizes_from(eigenvalues: FloatArray, beta: FloatArray) -> FloatArray:
    """Distances of eigenvalues from the regulariser, zero where they are rounding of the eigenvalues.

    Parameters
    ----------
    eigenvalues
        Array of shape (..., n).
    beta
        Regulariser: array of shape (...).

    Returns
    -------
    sizes
        float64 array of shape (..., n); NaN where an eigenvalue is missing, or the regulariser.

    Examples
    --------
    >>> sizes_from(np.array([2.1, 0.1 + 1e-17, np.nan]), np.array(0.1))
    array([ 2.,  0., nan])
    """
    values = np.where(np.isfinite(eigenvalues), eigenvalues, np.nan).astype(np.float64)
    sizes = np.abs(values - np.asarray(beta)[..., None])
    largest = np.abs(np.where(np.isnan(values), 0.0, values)).max(axis=-1, keepdims=True, initial=0.0)
    return np.where(sizes <= ZERO * precision(eigenvalues) * largest, 0.0, sizes)


def _by_decreasing_size(eigenvalues: FloatArray, beta: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Eigenvalues and |lambda - beta| in decreasing order of the latter, missing ones last with size -1."""
    values = np.where(np.isfinite(eigenvalues), eigenvalues, 0.0).astype(np.float64)
    sizes = np.where(np.isfinite(eigenvalues), sizes_from(eigenvalues, beta), -1.0)
    order = np.argsort(-sizes, axis=-1, kind="stable")
    return np.take_along_axis(values, order, axis=-1), np.take_along_axis(sizes, order, axis=-1)


def _gap_ratio(sizes: FloatArray, leading: NDArray[np.bool_], recorded: NDArray[np.bool_]) -> FloatArray:
    """Smallest leading size by the largest other one; inf above zeros, NaN where one of them is missing."""
    leading, rest = leading & recorded, ~leading & recorded
    last = np.where(leading, sizes, np.inf).min(axis=-1)
    first = np.where(rest, sizes, -1.0).max(axis=-1)
    defined = leading.any(axis=-1) & rest.any(axis=-1) & (last > 0)
    with np.errstate(divide="ignore", over="ignore"):
        ratio: FloatArray = np.divide(last, first, out=np.full(last.shape, np.nan), where=defined)
    return ratio


def _largest_gap(sizes: FloatArray, recorded: NDArray[np.bool_]) -> IntArray:
    """Position r of the largest ratio m_r / m_{r+1}; 0 where there is none."""
    if sizes.shape[-1] < 2:
        return np.zeros(sizes.shape[:-1], dtype=np.int64)
    defined = recorded[..., 1:] & (sizes[..., :-1] > 0)
    with np.errstate(divide="ignore", over="ignore"):
        ratios = np.divide(
            sizes[..., :-1], sizes[..., 1:], out=np.full(defined.shape, -np.inf), where=defined
        )
    return np.where(defined.any(axis=-1), ratios.argmax(axis=-1) + 1, 0)


# ---------------------------------------------------------------------------- labelled


def outliers(
    eigenvalues: xr.DataArray,
    *,
    method: Method = "gap",
    k: int | None = None,
    threshold: float | None = None,
    edge: float | xr.DataArray | None = None,
    ratio: float | xr.DataArray | None = None,
    regularizer: float | xr.DataArray = 0.0,
    dim: str = DIM_EIG,
) -> xr.Dataset:
    r"""Count the outliers of recorded spectra and measure how far they stand apart.

    With the sizes :math:`m_i = |\lambda_i - \beta|` in decreasing order:

    ``"gap"``
        The outliers end at the largest ratio :math:`m_r / m_{r+1}` of
        consecutive sizes, or at `k` if it is given. Where the ratio is below
        `threshold` (2 by default) nothing is separated and the count is 0.
    ``"relative"``
        Outliers have :math:`m_i` above `threshold` (5 % by default) of the
        largest one.
    ``"edge"``
        Outliers are the eigenvalues above `edge`, for example the right edge of
        the theory's bulk. Those to the left of the bulk do not count.
    ``"marchenko_pastur"``
        Outliers are the eigenvalues above the right edge of the Marchenko-Pastur
        law fitted to the bulk of :math:`\lambda - \beta`, with the allowance for
        a finite number of them. The spectrum has to be recorded whole, and to be
        positive semidefinite: see :func:`hild_xr.analysis.marchenko_pastur_fit`.

    Sizes are absolute values, as in the order of recorded eigenvalues and in the
    principal eigenspace of arXiv:2310.03010: with "gap" and "relative" a large
    negative eigenvalue is an outlier, and a negative bulk is a bulk. For the
    positive semidefinite diagonal blocks of the paper that makes no difference.
    Differences at the rounding of the eigenvalues' dtype count as zero.

    Parameters
    ----------
    eigenvalues
        Leading eigenvalues along `dim`, in any order. NaN at the end means that
        a block has no more; NaN before a number leaves the record undefined. A store
        says which ones to trust: ``converged``, and ``n_certain``, how many of them no
        missed eigenvalue exceeds; ``eigenvalues.where(run["hessian/converged"])``
        leaves out what has not converged.
    method
        One of the above.
    k
        Position at which the gap ratio is taken; by default behind the last
        outlier.
    threshold
        See the methods; not for "edge" and "marchenko_pastur".
    edge
        Number or array without `dim`, in the unit of the eigenvalues, regulariser
        included; for "edge" only.
    ratio
        Dimensions per sample where they are known, for "marchenko_pastur" only;
        by default they are fitted.
    regularizer
        The :math:`\beta` that shifts all eigenvalues, number or array; 0 for the
        G-matrix.
    dim
        Dim of the eigenvalues.

    Returns
    -------
    xarray.Dataset
        ``outlier_count``
            -1 where the spectrum does not tell: not recorded, or for "gap" not
            recorded beyond `k` (without k: fewer than two eigenvalues), for
            "marchenko_pastur" no law that fits.
        ``gap_ratio``
            Smallest outlier by the largest eigenvalue of the bulk (first `k` by
            the rest, if given), both as sizes. inf if that bulk is zero; NaN
            without outlier, without recorded bulk, or if both are zero. With
            "gap" it is given where the count is 0 too.
        ``bulk_edge``
            Value above which an eigenvalue counts: the first eigenvalue of the
            bulk for "gap".
        ``bulk_reached``
            Whether an eigenvalue of the bulk is recorded. Where it is not, the
            count is only a lower bound: record more eigenvalues.

    Raises
    ------
    TypeError
        If an array is no DataArray or not real, `k` is no whole number, or another option no
        real number.
    ValueError
        If `dim` is missing, an option does not fit the method, fewer than k + 1
        eigenvalues were recorded at all, or labels differ.

    Examples
    --------
    >>> eigenvalues = xr.DataArray([[5.0, 4.0, 0.4, 0.3], [0.5, 0.4, 0.4, 0.3]], dims=("step", "eig"))
    >>> found = outliers(eigenvalues)
    >>> found.outlier_count.values, found.gap_ratio.values.round(2)
    (array([2, 0]), array([10.  ,  1.33]))
    >>> outliers(eigenvalues, method="edge", edge=0.35).outlier_count.values
    array([3, 3])
    """
    require_dims("eigenvalues", require_real("eigenvalues", eigenvalues), (dim,), "dim")
    k = None if k is None else whole_number("k", k)
    threshold = None if threshold is None else real_number("threshold", threshold)
    _require_options(method, k, threshold, edge, ratio, eigenvalues.sizes[dim], dim)
    if threshold is None:
        threshold = DEFAULT_THRESHOLD.get(method, np.nan)
    arrays = {
        "eigenvalues": eigenvalues,
        "regularizer": one_each("regularizer", regularizer, dim),
        "edge": one_each("edge", np.nan if edge is None else edge, dim),
        "ratio": known_ratio(ratio, dim),
    }
    require_same_labels(arrays)
    results = apply_kernel(
        functools.partial(outliers_kernel, method=method, threshold=threshold, k=k),
        list(arrays.values()),
        [(dim,), (), (), ()],
        output_dims=[()] * len(RESULTS),
        output_dtypes=[np.dtype(np.int64), FLOAT, FLOAT, np.dtype(np.bool_)],
    )
    said = {"method": method, "threshold": threshold, "k": k}
    said = {name: value for name, value in said.items() if value is not None and value == value}
    return xr.Dataset({name: declared(a, name, **said) for name, a in zip(RESULTS, results, strict=True)})


def one_each(name: str, value: float | xr.DataArray, dim: str) -> xr.DataArray:
    """Return a number, or an array of one number for each spectrum, as an array.

    Raises
    ------
    TypeError
        If it is not real.
    ValueError
        If it has the dim of the eigenvalues.

    Examples
    --------
    >>> float(one_each("edge", 2, "eig"))
    2.0
    """
    given = value if isinstance(value, xr.DataArray) else xr.DataArray(real_number(name, value))
    array = require_real(name, given)
    if dim in array.dims:
        raise ValueError(f"expected one {name} for a spectrum, came one with dim {dim!r}: {array.dims}")
    return array


def _require_options(
    method: str, k: int | None, threshold: float | None, edge: object, ratio: object, n: int, dim: str
) -> None:
    if method not in get_args(Method):
        raise ValueError(f"expected method {' or '.join(map(repr, get_args(Method)))}, came {method!r}")
    if (method == "edge") != (edge is not None):
        raise ValueError(f"expected edge=... with method 'edge' and only then, came {method!r} and {edge!r}")
    if ratio is not None and method != "marchenko_pastur":
        raise ValueError(f"expected ratio=... with method 'marchenko_pastur' only, came {method!r}")
    if method not in DEFAULT_THRESHOLD and threshold is not None:
        raise ValueError(
            f"expected no threshold with method {method!r}, came {threshold}; with method 'edge' give a "
            "higher edge instead"
        )
    if threshold is not None and not (threshold >= 1 if method == "gap" else 0 <= threshold < 1):
        allowed = "a ratio of at least 1" if method == "gap" else "a fraction in [0, 1)"
        raise ValueError(f"expected {allowed} as threshold of method {method!r}, came {threshold}")
    if n == 0:
        raise ValueError(f"expected at least one eigenvalue along {dim!r}, came none")
    if k is not None and not 1 <= k < n:
        raise ValueError(
            f"expected 1 <= k < {n}, the number of eigenvalues along {dim!r}, came k={k}: the gap behind the "
            f"k-th needs the next one; record more eigenvalues, or use method 'relative' or 'edge' without k"
        )
