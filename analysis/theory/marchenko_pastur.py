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
    from hild_xr.analysis.subspaces.bases import FloatArray

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
    require_positive(ratio=ratio, scale=scale)
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
    require_positive(ratio=ratio)
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
    require_positive(ratio=ratio, scale=scale)
    return xr.apply_ufunc(
        _density, x, ratio, scale, join="exact", dask="parallelized", output_dtypes=[np.float64]
    )


def marchenko_pastur_cdf(x: Value, ratio: Value, scale: Value = 1.0) -> Any:
    r"""Distribution function of the law, the atom at 0 included.

    The closed-form integral of :func:`marchenko_pastur_density`: with
    :math:`a = x_+ - x` and :math:`b = x - x_-`, for x between the edges and
    ``scale = 1``,

    .. math::

       F(x) = c + \frac{1}{2 \pi\, r} \Big[ \sqrt{ab}
       - (1 + r) \arctan\frac{a - b}{2\sqrt{ab}}
       + |1 - r| \arctan\frac{x_- a - x_+ b}{2 |1 - r| \sqrt{ab}} \Big],

    r the ratio and c the constant that makes :math:`F(x_+) = 1`.

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
        Values in [0, 1]. Labelled, and lazy, if an argument is; NaN at NaN.

    Raises
    ------
    ValueError
        Unless ratio and scale are positive.

    Examples
    --------
    >>> marchenko_pastur_cdf(np.array([-1.0, 0.0, 2.0, 9.0]), 4.0).round(4)
    array([0.    , 0.75  , 0.7966, 1.    ])
    """
    require_positive(ratio=ratio, scale=scale)
    return xr.apply_ufunc(
        marchenko_pastur_cdf_kernel,
        x,
        ratio,
        scale,
        join="exact",
        dask="parallelized",
        output_dtypes=[np.float64],
    )


def marchenko_pastur_cdf_kernel(x: FloatArray, ratio: FloatArray, scale: FloatArray) -> FloatArray:
    """Distribution function for plain arrays that broadcast; see :func:`marchenko_pastur_cdf`.

    Parameters
    ----------
    x, ratio, scale
        Arrays. NaN anywhere gives NaN.

    Returns
    -------
    cdf
        float64 array of the broadcast shape.

    Examples
    --------
    >>> float(marchenko_pastur_cdf_kernel(np.array(1.0), np.array(1.0), np.array(1.0))).__round__(6)
    0.608998
    """
    x, ratio, scale = (np.asarray(a, dtype=np.float64) for a in (x, ratio, scale))
    lower, upper = (1 - np.sqrt(ratio)) ** 2, (1 + np.sqrt(ratio)) ** 2
    at = np.clip(x / scale, lower, upper)
    a, b = upper - at, at - lower
    root = np.sqrt(a * b)
    # arctan2 instead of quotients: at the edges the root is zero and the angles are +-pi/2
    shape = root - (1 + ratio) * np.arctan2(a - b, 2 * root)
    apart = np.abs(1 - ratio)
    shape = shape + apart * np.arctan2(lower * a - upper * b, 2 * apart * root)
    at_upper = (1 + ratio - apart) * np.pi / 2
    cdf: FloatArray = 1 + (shape - at_upper) / (2 * np.pi * ratio)
    cdf = np.where(x < 0, 0.0, np.where(x < lower * scale, np.maximum(0.0, 1 - 1 / ratio), cdf))
    return np.where(np.isnan(x + ratio + scale), np.nan, np.clip(cdf, 0.0, 1.0))


def _density(x: FloatArray, ratio: FloatArray, scale: FloatArray) -> FloatArray:
    x, ratio, scale = np.broadcast_arrays(*(np.asarray(a, dtype=np.float64) for a in (x, ratio, scale)))
    lower, upper = scale * (1 - np.sqrt(ratio)) ** 2, scale * (1 + np.sqrt(ratio)) ** 2
    inside = (x > lower) & (x < upper)
    density = np.where(np.isnan(x), np.nan, 0.0)
    density[(x == 0) & (lower == 0)] = np.inf
    x, lower, upper, ratio, scale = (a[inside] for a in (x, lower, upper, ratio, scale))
    density[inside] = np.sqrt((upper - x) * (x - lower)) / (2 * np.pi * scale * ratio * x)
    return density


def require_positive(**values: Value) -> None:
    """Raise unless the numbers are positive; NaN and lazy arrays pass.

    Raises
    ------
    ValueError
        Naming the first one that is not.

    Examples
    --------
    >>> require_positive(ratio=0.5, scale=0.0)
    Traceback (most recent call last):
    ...
    ValueError: expected scale > 0, came 0.0
    """
    for name, value in values.items():
        lazy = isinstance(value, xr.DataArray) and value.chunks is not None
        if not lazy and bool(np.any(np.asarray(value) <= 0)):
            raise ValueError(f"expected {name} > 0, came {value}")
