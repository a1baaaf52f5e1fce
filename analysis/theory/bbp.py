r"""The BBP transition: when a spike leaves the Marchenko-Pastur bulk, where to, and how aligned.

Convention: N samples of n dimensions with covariance
:math:`\sigma^2 I + \theta\, v v^T`, v a unit vector; ``scale`` is
:math:`\sigma^2`, ``ratio`` is :math:`r = n / N` and ``spike`` is
:math:`\theta \ge 0`, all as in
:mod:`hild_xr.analysis.theory.marchenko_pastur`. Samples
:math:`Y = \pm\mu + \text{noise}` have the spike :math:`\theta = |\mu|^2`. Several
spikes with different directions act one by one, in the limit of large n and N.

J. Baik, G. Ben Arous and S. Peche, Ann. Probab. 33 (2005) 1643; J. Baik and
J. W. Silverstein, J. Multivariate Anal. 97 (2006) 1382; D. Paul, Statist. Sinica 17
(2007) 1617 for the eigenvectors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from hild_xr.analysis.theory.marchenko_pastur import Value, require_positive

if TYPE_CHECKING:
    from collections.abc import Callable

    from hild_xr.analysis.subspaces.bases import FloatArray


def bbp_threshold(ratio: Value, scale: Value = 1.0) -> Any:
    r"""Smallest spike that gives an outlier, :math:`\theta_c = \sigma^2 \sqrt{r}`.

    Parameters
    ----------
    ratio
        Dimensions per sample, n / N.
    scale
        Variance :math:`\sigma^2` of the noise.

    Returns
    -------
    float or array
        In the unit of the eigenvalues; labelled if an argument is.

    Raises
    ------
    ValueError
        Unless ratio and scale are positive.

    Examples
    --------
    >>> bbp_threshold(0.25, scale=2.0)
    1.0
    """
    require_positive(ratio=ratio, scale=scale)
    return scale * ratio**0.5


def bbp_outlier(spike: Value, ratio: Value, scale: Value = 1.0) -> Any:
    r"""Eigenvalue that a spike gives, :math:`(\sigma^2 + \theta)(1 + r \sigma^2 / \theta)`.

    Parameters
    ----------
    spike
        Excess :math:`\theta` of the covariance in one direction.
    ratio
        Dimensions per sample, n / N.
    scale
        Variance :math:`\sigma^2` of the noise.

    Returns
    -------
    float or array
        At and below the threshold (:func:`bbp_threshold`) the right edge of the
        bulk: nothing leaves it. NaN at NaN; labelled, and lazy, if an argument is.

    Raises
    ------
    ValueError
        If the spike is negative, or ratio or scale is not positive.

    Examples
    --------
    >>> float(bbp_outlier(3.0, 0.25)).__round__(4)
    4.3333
    """
    return _of_spike(_outlier, spike, ratio, scale)


def bbp_overlap(spike: Value, ratio: Value, scale: Value = 1.0) -> Any:
    r"""Squared overlap of the outlier's eigenvector with the direction of the spike.

    :math:`\langle u, v \rangle^2 \to (1 - r \sigma^4 / \theta^2) / (1 + r \sigma^2 / \theta)`.

    Parameters
    ----------
    spike, ratio, scale
        As in :func:`bbp_outlier`.

    Returns
    -------
    float or array
        Values in [0, 1]: 0 at and below the threshold. NaN at NaN; labelled,
        and lazy, if an argument is.

    Raises
    ------
    ValueError
        If the spike is negative, or ratio or scale is not positive.

    Examples
    --------
    >>> float(bbp_overlap(3.0, 0.25)).__round__(4)
    0.8974
    """
    return _of_spike(_overlap, spike, ratio, scale)


def bbp_spike(outlier: Value, ratio: Value, scale: Value = 1.0) -> Any:
    r"""Spike that gives an observed outlier: the inverse of :func:`bbp_outlier`.

    The larger root of
    :math:`\theta^2 - (x - \sigma^2 (1 + r))\,\theta + r \sigma^4 = 0`. An observed
    outlier lies above its spike; this takes the bias off.

    Parameters
    ----------
    outlier
        Eigenvalue x of the sample covariance.
    ratio, scale
        As in :func:`bbp_outlier`.

    Returns
    -------
    float or array
        At least the threshold. NaN where x is not beyond the right edge of the
        bulk: no spike can be told from it. Labelled, and lazy, if an argument is.

    Raises
    ------
    ValueError
        Unless ratio and scale are positive.

    Examples
    --------
    >>> bbp_spike(np.array([13 / 3, 2.25, 1.0]), 0.25).round(4)
    array([ 3., nan, nan])
    """
    require_positive(ratio=ratio, scale=scale)
    return _apply(_spike, outlier, ratio, scale)


def _of_spike(kernel: Callable[..., FloatArray], spike: Value, ratio: Value, scale: Value) -> Any:
    require_positive(ratio=ratio, scale=scale)
    lazy = isinstance(spike, xr.DataArray) and spike.chunks is not None
    if not lazy and bool(np.any(np.asarray(spike) < 0)):
        raise ValueError(
            f"expected spike >= 0, the covariance in excess of the noise, came {spike}; of an eigenvalue l "
            "of the population covariance it is l - scale"
        )
    return _apply(kernel, spike, ratio, scale)


def _apply(kernel: Callable[..., FloatArray], x: Value, ratio: Value, scale: Value) -> Any:
    return xr.apply_ufunc(
        kernel, x, ratio, scale, join="exact", dask="parallelized", output_dtypes=[np.float64]
    )


def _outlier(spike: FloatArray, ratio: FloatArray, scale: FloatArray) -> FloatArray:
    root = np.sqrt(ratio)
    theta = np.maximum(_in_units_of(spike, scale), root)
    outlier: FloatArray = np.where(
        theta == root, scale * (1 + root) ** 2, scale * (1 + theta) * (1 + ratio / theta)
    )
    return outlier


def _overlap(spike: FloatArray, ratio: FloatArray, scale: FloatArray) -> FloatArray:
    root = np.sqrt(ratio)
    theta = np.maximum(_in_units_of(spike, scale), root)
    overlap: FloatArray = (1 - root / theta) * (1 + root / theta) / (1 + ratio / theta)
    return overlap


def _spike(outlier: FloatArray, ratio: FloatArray, scale: FloatArray) -> FloatArray:
    x, ratio = _in_units_of(outlier, scale), np.asarray(ratio, dtype=np.float64)
    beyond = x > (1 + np.sqrt(ratio)) ** 2
    half = np.where(beyond, x - 1 - ratio, np.nan) / 2
    # (x - lower edge)(x - upper edge) / 4 as a product: no cancellation close to the edge
    root = np.sqrt(np.where(beyond, (half - np.sqrt(ratio)) * (half + np.sqrt(ratio)), np.nan))
    return np.asarray(scale * (half + root))


def _in_units_of(x: FloatArray, scale: FloatArray) -> FloatArray:
    return np.asarray(x, dtype=np.float64) / scale
