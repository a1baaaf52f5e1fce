r"""The Marchenko-Pastur law: eigenvalues of the sample covariance of pure noise.

Convention: :math:`W^T W` for W of shape (N, n) with independent entries of mean
0 and variance :math:`\mathrm{scale} / N`, so the mean eigenvalue is ``scale``
and ``ratio`` is :math:`n / N`, dimensions per sample. For N samples
:math:`Y \sim N(0, I_d / \lambda)` the matrix
:math:`\frac{1}{N} \sum Y Y^T` has ``ratio = d / N`` and ``scale = 1 / lambda``;
papers that write :math:`\phi = N / d` mean its inverse.
V. A. Marchenko and L. A. Pastur, Mat. Sb. 72 (1967) 507.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

if TYPE_CHECKING:
    from hild_xr.analysis.bases import FloatArray

Value = float | np.ndarray[Any, Any] | xr.DataArray
"""Numbers, arrays and labelled arrays alike; they broadcast."""


def marchenko_pastur_edges(ratio: Value, scale: Value = 1.0) -> tuple[Any, Any]:
    r"""Edges of the continuous part, :math:`\mathrm{scale}\,(1 \pm \sqrt{\mathrm{ratio}})^2`.

    Parameters
    ----------
    ratio
        Dimensions per sample, n / N.
    scale
        Mean eigenvalue.

    Returns
    -------
    lower, upper
        Numbers or arrays, labelled if an argument is. For ``ratio > 1`` there is
        also an atom at 0 (:func:`marchenko_pastur_mass_at_zero`).

    Raises
    ------
    ValueError
        Unless ratio and scale are positive.

    Examples
    --------
    >>> lower, upper = marchenko_pastur_edges(400 / 800)
    >>> round(lower, 4), round(upper, 4)
    (0.0858, 2.9142)
    """
    _require_positive(ratio=ratio, scale=scale)
    root = ratio**0.5
    return scale * (1 - root) ** 2, scale * (1 + root) ** 2


def marchenko_pastur_mass_at_zero(ratio: Value) -> Any:
    r"""Fraction of eigenvalues that are exactly zero, :math:`\max(0, 1 - 1 / \mathrm{ratio})`.

    Parameters
    ----------
    ratio
        Dimensions per sample, n / N.

    Returns
    -------
    float or array
        Labelled if the argument is.

    Raises
    ------
    ValueError
        Unless ratio is positive.

    Examples
    --------
    >>> float(marchenko_pastur_mass_at_zero(4.0))
    0.75
    """
    _require_positive(ratio=ratio)
    return np.maximum(0.0, 1.0 - 1.0 / ratio)


def marchenko_pastur_density(x: Value, ratio: Value, scale: Value = 1.0) -> Any:
    r"""Density of the continuous part of the law.

    :math:`\rho(x) = \sqrt{(x_+ - x)(x - x_-)} / (2 \pi\, \mathrm{scale}\, \mathrm{ratio}\, x)`
    between the edges :math:`x_\pm`, zero elsewhere. It integrates to
    :math:`\min(1, 1 / \mathrm{ratio})`; the rest is the atom at 0.

    Parameters
    ----------
    x
        Eigenvalues.
    ratio
        Dimensions per sample, n / N.
    scale
        Mean eigenvalue.

    Returns
    -------
    float or array
        Labelled, and lazy, if an argument is; NaN at NaN. For ``ratio = 1`` the
        density diverges at its lower edge 0, where inf is returned.

    Raises
    ------
    ValueError
        Unless ratio and scale are positive.

    Examples
    --------
    >>> float(marchenko_pastur_density(1.0, 1.0)).__round__(6)
    0.275664
    """
    _require_positive(ratio=ratio, scale=scale)
    return xr.apply_ufunc(
        _density, x, ratio, scale, join="exact", dask="parallelized", output_dtypes=[np.float64]
    )


def _density(x: FloatArray, ratio: FloatArray, scale: FloatArray) -> FloatArray:
    x, ratio, scale = np.broadcast_arrays(*(np.asarray(a, dtype=np.float64) for a in (x, ratio, scale)))
    lower, upper = scale * (1 - np.sqrt(ratio)) ** 2, scale * (1 + np.sqrt(ratio)) ** 2
    inside = (x > lower) & (x < upper)
    density = np.where(np.isnan(x), np.nan, 0.0)
    density[(x == 0) & (lower == 0)] = np.inf
    x, lower, upper, ratio, scale = (a[inside] for a in (x, lower, upper, ratio, scale))
    density[inside] = np.sqrt((upper - x) * (x - lower)) / (2 * np.pi * scale * ratio * x)
    return density


def _require_positive(**values: Value) -> None:
    """Raise unless the numbers are positive; NaN and lazy arrays pass."""
    for name, value in values.items():
        lazy = isinstance(value, xr.DataArray) and value.chunks is not None
        if not lazy and bool(np.any(np.asarray(value) <= 0)):
            raise ValueError(f"expected {name} > 0, came {value}")
