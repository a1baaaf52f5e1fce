r"""Rank and activity of features: how many directions and units a layer uses.

The quantities of M. Andriushchenko, D. Bahri, H. Mobahi and N. Flammarion,
"Sharpness-aware minimization leads to low-rank features", NeurIPS 2023
(arXiv:2305.16292), from the activations of a layer on a fixed set of samples:

* feature rank: the least r with
  :math:`\sum_{i \le r} s_i^2 \ge 0.99 \sum_i s_i^2`, s the singular values of
  the centred matrix of features;
* active units: the number of units whose activation exceeds a twentieth of the
  largest one on more than a given fraction of the samples;
* sparsity: the fraction of activations that are not active.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import xarray as xr

from hild_xr.analysis.base.arguments import apply_kernel, declared
from hild_xr.analysis.base.checks import require_values
from hild_xr.analysis.subspaces.bases import finite_matrices, precision, singular_values
from hild_xr.variables import DIM_FRACTION, DIM_SAMPLE, DIM_UNIT

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hild_xr.analysis.subspaces.bases import FloatArray, IntArray

Center = Literal["features", "samples", "none"]

CENTER_AXES: dict[str, int | None] = {"features": -2, "samples": -1, "none": None}
"""Axis of (..., sample, unit) over which the mean is subtracted."""

UNKNOWN = -1
"""Count where the activations are missing."""

FRACTIONS = (0.0, 0.01, 0.05, 0.1)
"""The paper's fractions of samples on which an active unit exceeds the threshold."""

ACTIVE = 0.05
"""The paper's threshold of activity, as a fraction of the largest activation."""


# ---------------------------------------------------------------------------- kernels


def feature_rank_kernel(features: FloatArray, *, part: float = 0.99, center: Center = "features") -> IntArray:
    """Least number of squared singular values that hold a part of their sum.

    Parameters
    ----------
    features
        Array of shape (..., samples, units).
    part, center
        As in :func:`feature_rank`.

    Returns
    -------
    rank
        Integer array of shape (...): 0 where the centred features are zero, -1
        where they are not finite.

    Examples
    --------
    >>> features = np.outer([1.0, -1.0, 2.0, -2.0], [3.0, 1.0]) + 7.0
    >>> int(feature_rank_kernel(features)), int(feature_rank_kernel(features, center="none"))
    (1, 2)
    """
    features = np.asarray(features)
    finite = finite_matrices(features)
    largest = np.abs(np.where(finite[..., None, None], features, 0.0)).max(axis=(-2, -1), initial=0.0)
    centred = features / np.where(largest > 0, largest, 1.0)[..., None, None].astype(np.float64)
    axis = CENTER_AXES[center]
    if axis is not None:
        centred = centred - centred.mean(axis=axis, keepdims=True)
    s = singular_values(centred)
    # what centring leaves of constant features is rounding of the features themselves
    rounding = max(features.shape[-2:]) * precision(features)
    squares = np.square(np.where(s > rounding, s, 0.0))
    cumulated = squares.cumsum(axis=-1)
    short = cumulated < part * cumulated[..., -1:]
    rank = short.sum(axis=-1) + (cumulated[..., -1] > 0)
    return np.where(finite, rank, UNKNOWN)


def active_units_kernel(
    activations: FloatArray, *, fractions: Sequence[float] = FRACTIONS, threshold: float = ACTIVE
) -> IntArray:
    """Count the units that are active on more than each fraction of the samples.

    Parameters
    ----------
    activations
        Array of shape (..., samples, units).
    fractions, threshold
        As in :func:`active_units`.

    Returns
    -------
    count
        Integer array of shape (..., len(fractions)); -1 where the activations
        are not finite.

    Examples
    --------
    >>> activations = np.array([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]])
    >>> active_units_kernel(activations, fractions=[0.0, 0.5])
    array([2, 1])
    """
    finite = finite_matrices(activations)
    n_active = _active(activations, threshold).sum(axis=-2)[..., None, :]
    least = np.asarray(fractions, dtype=np.float64)[:, None] * activations.shape[-2]
    count = (n_active > least).sum(axis=-1)
    return np.where(finite[..., None], count, UNKNOWN)


def sparsity_kernel(activations: FloatArray, *, threshold: float = 0.0) -> FloatArray:
    """Fraction of the activations that are not above a fraction of the largest one.

    Parameters
    ----------
    activations
        Array of shape (..., samples, units).
    threshold
        As in :func:`sparsity`.

    Returns
    -------
    sparsity
        float64 array of shape (...) in [0, 1]; NaN where the activations are
        not finite.

    Examples
    --------
    >>> float(sparsity_kernel(np.array([[1.0, 0.0], [2.0, 0.0]])))
    0.5
    """
    inactive = 1.0 - _active(activations, threshold).mean(axis=(-2, -1))
    return np.where(finite_matrices(activations), inactive, np.nan)


def _active(activations: FloatArray, threshold: float) -> FloatArray:
    """Whether an activation exceeds the threshold times the largest of its record; never if that is <= 0."""
    return np.asarray(activations > threshold * activations.max(axis=(-2, -1), keepdims=True))


# ---------------------------------------------------------------------------- labelled


def feature_rank(
    activations: xr.DataArray,
    *,
    part: float = 0.99,
    center: Center = "features",
    sample_dim: str = DIM_SAMPLE,
    unit_dim: str = DIM_UNIT,
) -> xr.DataArray:
    r"""Least number of principal components that hold a part of the features' variance.

    The least r with :math:`\sum_{i \le r} s_i^2 \ge \mathrm{part} \sum_i s_i^2`
    (arXiv:2305.16292).

    Parameters
    ----------
    activations
        Activations of a layer on fixed samples, with dims (..., sample, unit).
    part
        Part of the sum of squares, in (0, 1].
    center
        ``"features"`` subtracts the mean over the samples from each unit
        (principal components), ``"samples"`` subtracts the mean over the units
        from each sample (what the code released with the paper does), ``"none"``
        subtracts nothing.
    sample_dim, unit_dim
        Names of the dims.

    Returns
    -------
    xarray.DataArray
        Integers: 0 where nothing is left after centring (up to rounding), -1
        where activations are missing.

    Raises
    ------
    TypeError
        If the array is no DataArray or not real.
    ValueError
        If a dim is missing or empty, or an option is out of range.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> low = rng.standard_normal((50, 3)) @ rng.standard_normal((3, 20))
    >>> noise = 1e-3 * rng.standard_normal((50, 20))
    >>> int(feature_rank(xr.DataArray(low + noise, dims=("sample", "unit"))))
    3
    """
    require_values("activations", activations, (sample_dim, unit_dim), "sample_dim=... and unit_dim")
    if not 0 < part <= 1:
        raise ValueError(f"expected part in (0, 1], a fraction of the sum of squares, came {part}")
    if center not in get_args(Center):
        raise ValueError(f"expected center 'features', 'samples' or 'none', came {center!r}")
    result = apply_kernel(
        functools.partial(feature_rank_kernel, part=part, center=center),
        [activations],
        [(sample_dim, unit_dim)],
        output_dtypes=[np.dtype(np.int64)],
    )
    return declared(result, "feature_rank", part=part, center=center)


def active_units(
    activations: xr.DataArray,
    *,
    fractions: Sequence[float] = FRACTIONS,
    threshold: float = ACTIVE,
    sample_dim: str = DIM_SAMPLE,
    unit_dim: str = DIM_UNIT,
) -> xr.DataArray:
    """Count the units that are active on more than a fraction of the samples.

    A unit is active on a sample if its activation exceeds `threshold` times the
    largest activation of the record, over all samples and units
    (arXiv:2305.16292).

    Parameters
    ----------
    activations
        Activations of a layer on fixed samples, with dims (..., sample, unit).
    fractions
        Fractions of the samples, each in [0, 1).
    threshold
        Fraction of the largest activation, in [0, 1).
    sample_dim, unit_dim
        Names of the dims.

    Returns
    -------
    xarray.DataArray
        Integers with the new last dim ``fraction``; -1 where activations are
        missing.

    Raises
    ------
    TypeError
        If the array is no DataArray or not real.
    ValueError
        If a dim is missing or empty, or an option is out of range.

    Examples
    --------
    >>> activations = xr.DataArray([[1.0, 0.0, 0.01], [1.0, 1.0, 0.01]], dims=("sample", "unit"))
    >>> active_units(activations, fractions=[0.0, 0.5]).values
    array([2, 1])
    """
    require_values("activations", activations, (sample_dim, unit_dim), "sample_dim=... and unit_dim")
    _require_threshold(threshold)
    fractions = [float(fraction) for fraction in fractions]
    if not fractions or not all(0 <= fraction < 1 for fraction in fractions):
        raise ValueError(f"expected fractions of the samples in [0, 1), at least one, came {fractions}")
    result = apply_kernel(
        functools.partial(active_units_kernel, fractions=fractions, threshold=threshold),
        [activations],
        [(sample_dim, unit_dim)],
        output_dims=[(DIM_FRACTION,)],
        output_sizes={DIM_FRACTION: len(fractions)},
        output_dtypes=[np.dtype(np.int64)],
    )
    return declared(result, "active_units", threshold=threshold).assign_coords({DIM_FRACTION: fractions})


def sparsity(
    activations: xr.DataArray,
    *,
    threshold: float = 0.0,
    sample_dim: str = DIM_SAMPLE,
    unit_dim: str = DIM_UNIT,
) -> xr.DataArray:
    """Fraction of the activations that are not active.

    Parameters
    ----------
    activations
        Activations of a layer on fixed samples, with dims (..., sample, unit).
    threshold
        Fraction of the largest activation of the record that an active one
        exceeds, in [0, 1). With 0 the result is the fraction of activations
        that are zero or negative.
    sample_dim, unit_dim
        Names of the dims.

    Returns
    -------
    xarray.DataArray
        Numbers in [0, 1]; NaN where activations are missing.

    Raises
    ------
    TypeError
        If the array is no DataArray or not real.
    ValueError
        If a dim is missing or empty, or the threshold is out of range.

    Examples
    --------
    >>> float(sparsity(xr.DataArray([[1.0, 0.0], [2.0, 0.0]], dims=("sample", "unit"))))
    0.5
    """
    require_values("activations", activations, (sample_dim, unit_dim), "sample_dim=... and unit_dim")
    _require_threshold(threshold)
    result = apply_kernel(
        functools.partial(sparsity_kernel, threshold=threshold), [activations], [(sample_dim, unit_dim)]
    )
    return declared(result, "sparsity", threshold=threshold)


def _require_threshold(threshold: float) -> None:
    if not 0 <= threshold < 1:
        raise ValueError(
            f"expected threshold in [0, 1), a fraction of the largest activation, came {threshold}"
        )
