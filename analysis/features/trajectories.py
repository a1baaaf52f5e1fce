r"""Distance between two training runs as curves, from the distances of their points.

* Discrete Frechet distance (T. Eiter and H. Mannila 1994): the shortest leash with which one
  can walk along both curves from start to end, neither going back.
* Smoothed: mean distance of the points of each curve to the other, with the soft minimum
  :math:`\sum_j w_{ij} D_{ij}`, :math:`w_{ij} \propto \exp(-D_{ij}/h)`, both directions averaged.
  The order of the points does not matter; for small h it is the distance to the nearest
  point.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import xarray as xr

from hild_xr.analysis.base.arguments import apply_kernel, declared, require_dims, require_real
from hild_xr.variables import DIM_STEP

if TYPE_CHECKING:
    from hild_xr.analysis.subspaces.bases import FloatArray

Method = Literal["frechet", "smoothed"]

# ---------------------------------------------------------------------------- kernels


def frechet_kernel(distances: FloatArray) -> FloatArray:
    r"""Discrete Frechet distance from stacked distances between the points of two curves.

    :math:`c_{ij} = \max(D_{ij}, \min(c_{i-1,j}, c_{i,j-1}, c_{i-1,j-1}))`. Entries of one
    antidiagonal do not depend on each other: s + t - 1 array operations serve all stacked
    pairs of curves.

    Parameters
    ----------
    distances
        Array of shape (..., s, t).

    Returns
    -------
    distance
        Array of shape (...); NaN where a distance is.

    Examples
    --------
    >>> float(frechet_kernel(np.array([[0.0, 3.0], [1.0, 0.5]])))
    0.5
    """
    D = distances.astype(np.float64, copy=False)
    s, t = D.shape[-2:]
    # entry i + 1 of an antidiagonal is row i; what lies outside is never the smallest
    last = np.full((*D.shape[:-2], s + 1), np.inf)
    before = last.copy()
    for number in range(s + t - 1):
        rows = np.arange(max(0, number - t + 1), min(s, number + 1))
        reached = np.minimum(np.minimum(last[..., rows + 1], last[..., rows]), before[..., rows])
        if number == 0:
            reached = np.zeros_like(reached)
        now = np.full_like(last, np.inf)
        now[..., rows + 1] = np.maximum(D[..., rows, number - rows], reached)
        before, last = last, now
    missing = np.isnan(D).any(axis=(-2, -1))
    return np.where(missing, np.nan, last[..., s])


def smoothed_kernel(distances: FloatArray, bandwidth: float) -> FloatArray:
    """Mean soft distance of the points of each of two curves to the other.

    Parameters
    ----------
    distances
        Array of shape (..., s, t).
    bandwidth
        Positive number h.

    Returns
    -------
    distance
        Array of shape (...); NaN where a distance is NaN, inf where a point is infinitely
        far from the whole other curve.

    Examples
    --------
    >>> float(smoothed_kernel(np.array([[0.0, 3.0], [1.0, 0.5]]), 1e-3))
    0.25
    """
    D = distances.astype(np.float64, copy=False)
    both = (_soft_minimum(D, bandwidth), _soft_minimum(np.swapaxes(D, -1, -2), bandwidth))
    return np.asarray(both[0].mean(axis=-1) + both[1].mean(axis=-1)) / 2


def _soft_minimum(D: FloatArray, bandwidth: float) -> FloatArray:
    nearest = D.min(axis=-1, keepdims=True)
    beyond = np.where(np.isinf(nearest), np.inf, D - np.where(np.isinf(nearest), 0.0, nearest))
    weights = np.exp(-beyond / bandwidth)
    finite = np.where(np.isinf(D), 0.0, D)  # at infinity the weight is 0
    total = weights.sum(axis=-1)
    soft: FloatArray = np.divide(
        (weights * finite).sum(axis=-1), total, out=np.full_like(total, np.inf), where=total != 0
    )
    return soft


# ---------------------------------------------------------------------------- labelled


def trajectory_distance(
    distances: xr.DataArray,
    *,
    dim: str = DIM_STEP,
    method: Method = "frechet",
    bandwidth: float | None = None,
) -> xr.DataArray:
    r"""Distance between trajectories, from the distances between their points.

    Lazy on dask-backed distances. Every result depends on all distances of its pair of
    trajectories, which are one block.

    Parameters
    ----------
    distances
        Array with dims (..., `dim`, `dim` + "\_"): points of the one and of the other, for
        example ``pairwise_bhattacharyya(p, p.rename(seed="seed_"))`` for all pairs of seeds.
    dim
        Dim of the points of the first trajectory; sorted as the run went, for "frechet".
    method
        ``"frechet"``, discrete Frechet distance, or ``"smoothed"``, mean soft distance to
        the other curve.
    bandwidth
        Width h of the soft minimum, in the unit of the distances; for "smoothed" only.

    Returns
    -------
    xarray.DataArray
        On the dims that are left. NaN where a distance is NaN: leave records that are
        missing out first.

    Raises
    ------
    TypeError
        If the array is no DataArray of real numbers.
    ValueError
        If dims are missing or empty, or an option is unknown or missing.

    Examples
    --------
    >>> x = xr.DataArray([0.0, 1.0, 2.0], dims="step")
    >>> y = xr.DataArray([0.0, 1.0, 2.5], dims="step_")
    >>> float(trajectory_distance(abs(x - y)))
    0.5
    """
    dims = (dim, f"{dim}_")
    require_dims("distances", require_real("distances", distances), dims, "dim")
    if any(distances.sizes[d] == 0 for d in dims):
        raise ValueError(f"expected at least one point of each trajectory, came {dict(distances.sizes)}")
    if method not in ("frechet", "smoothed"):
        raise ValueError(f"expected method 'frechet' or 'smoothed', came {method!r}")
    if (method == "smoothed") != (bandwidth is not None):
        raise ValueError(
            f"expected bandwidth=... with method 'smoothed' and only then, came {method!r} and {bandwidth!r}"
        )
    said: dict[str, Any] = {"method": method}
    if bandwidth is None:
        result = apply_kernel(frechet_kernel, [distances], [dims])
    else:
        if not 0 < bandwidth < np.inf:
            raise ValueError(f"expected a positive bandwidth, came {bandwidth}")
        said["bandwidth"] = bandwidth
        result = apply_kernel(functools.partial(smoothed_kernel, bandwidth=bandwidth), [distances], [dims])
    return declared(result, "trajectory_distance", **said)
