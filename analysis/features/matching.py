r"""Do two networks have the same neurons? Correlations of units and their best matching.

The correlation :math:`\rho_{ij}` over samples of unit i of one network and unit j of the other
is matched by the one-to-one assignment that makes its sum largest. If the basis of neurons is
privileged and convergent, the mean matched correlation is larger than after a random rotation
of the features (D. Brown, N. Vyas, Y. Bansal 2023, arXiv:2307.12941).
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

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
from hild_xr.analysis.base.checks import whole_number
from hild_xr.analysis.subspaces.bases import divide_or_zero, precision
from hild_xr.variables import DIM_SAMPLE, DIM_UNIT

if TYPE_CHECKING:
    from hild_xr.analysis.subspaces.bases import FloatArray, IntArray

LAGGED = f"{DIM_UNIT}_"
"""Dim of the units of the other network."""

ROUNDING = 8.0
"""Multiple of eps |unit|_max below which a deviation from the mean is rounding: the unit is constant."""

NONE = -1
"""Position of the matched unit where there is none."""

RESULTS = ("mean_matched_correlation", "matched_correlation", "matched_unit")

# ---------------------------------------------------------------------------- kernels


def neuron_correlation_kernel(U: FloatArray, V: FloatArray) -> FloatArray:
    """Pearson correlations over samples of all pairs of units.

    Parameters
    ----------
    U, V
        Activations of shapes (..., n, h1) and (..., n, h2).

    Returns
    -------
    correlation
        Array of shape (..., h1, h2); NaN for units that are constant, or not finite on some
        sample.

    Examples
    --------
    >>> U = np.array([[0.0, 1.0], [1.0, 1.0], [2.0, 1.0]])
    >>> neuron_correlation_kernel(U, -U[:, :1]).round(9)
    array([[-1.],
           [nan]])
    """
    correlation = np.swapaxes(_standardised(U), -1, -2) @ _standardised(V)
    return np.clip(correlation, -1.0, 1.0)


def _standardised(U: FloatArray) -> FloatArray:
    """Units less their mean, of length 1; NaN where they are constant or not finite."""
    u: FloatArray = U.astype(np.float64)
    finite = np.isfinite(u).all(axis=-2, keepdims=True)
    u = np.where(finite, u, 0.0)
    largest = np.abs(u).max(axis=-2, keepdims=True, initial=0.0)
    u = divide_or_zero(u, largest)  # squares stay in range
    u = u - u.mean(axis=-2, keepdims=True)
    varied = np.abs(u).max(axis=-2, keepdims=True, initial=0.0) > ROUNDING * precision(U)
    norms = np.linalg.norm(u, axis=-2, keepdims=True)
    unit: FloatArray = np.divide(u, norms, out=np.full_like(u, np.nan), where=finite & varied)
    return unit


def matching_kernel(
    correlation: FloatArray, absolute: bool = False
) -> tuple[FloatArray, FloatArray, IntArray]:
    """Assign units so that the sum of their correlations is largest, for each of a stack.

    Units without any correlation (constant ones, or with missing activations) take no part.
    The Hungarian method works on one matrix at a time, so this loops over the stack.

    Parameters
    ----------
    correlation
        Array of shape (..., h1, h2).
    absolute
        Whether the sign counts for nothing.

    Returns
    -------
    mean
        Mean correlation of the matched pairs, shape (...); NaN where there are none.
    matched
        Correlation of each unit with its match, shape (..., h1), signed; NaN without match.
    position
        Position of the match among the h2 units, shape (..., h1); -1 without match.

    Examples
    --------
    >>> mean, matched, position = matching_kernel(np.array([[0.9, 0.8], [0.8, 0.1]]))
    >>> float(mean), position
    (0.8, array([1, 0]))
    """
    from scipy.optimize import linear_sum_assignment

    *lead, h1, h2 = correlation.shape
    stack = correlation.reshape(-1, h1, h2)
    matched = np.full((len(stack), h1), np.nan)
    position = np.full((len(stack), h1), NONE, dtype=np.int64)
    defined = np.isfinite(stack)
    for k, rho in enumerate(stack):
        rows, columns = (np.flatnonzero(defined[k].any(axis=axis)) for axis in (1, 0))
        part = rho[np.ix_(rows, columns)]
        i, j = linear_sum_assignment(np.abs(part) if absolute else part, maximize=True)
        matched[k, rows[i]], position[k, rows[i]] = part[i, j], columns[j]
    found = position != NONE
    values = np.where(found, np.abs(matched) if absolute else matched, 0.0).sum(axis=-1)
    n = found.sum(axis=-1)
    mean = np.divide(values, n, out=np.full(len(stack), np.nan), where=n > 0)
    return mean.reshape(lead), matched.reshape(*lead, h1), position.reshape(*lead, h1)


def _match(U: FloatArray, V: FloatArray, absolute: bool) -> tuple[FloatArray, FloatArray, IntArray]:
    return matching_kernel(neuron_correlation_kernel(U, V), absolute)


# ---------------------------------------------------------------------------- labelled


def neuron_correlation(u: xr.DataArray, v: xr.DataArray) -> xr.DataArray:
    r"""Correlations over samples of the units of two networks, record by record.

    Lazy on dask-backed arrays.

    Parameters
    ----------
    u, v
        Activations of the same samples, dims (..., sample, unit); two seeds are
        ``u = a.sel(seed=0, drop=True)`` and ``v = a.sel(seed=1, drop=True)``, all pairs
        ``v = a.rename(seed="seed_")``. The numbers of units may differ.

    Returns
    -------
    xarray.DataArray
        Dims (..., unit, unit\_). NaN for constant units and missing activations.

    Raises
    ------
    TypeError
        If an array is no DataArray of real numbers.
    ValueError
        If a dim is missing, there are fewer than two samples, or labels differ along a
        shared dim.

    Examples
    --------
    >>> u = xr.DataArray([[0.0, 1.0], [1.0, 0.0], [2.0, 4.0]], dims=("sample", "unit"))
    >>> neuron_correlation(u, -u).values.round(3)
    array([[-1.   , -0.721],
           [-0.721, -1.   ]])
    """
    u, v = _pair(u, v)
    result = apply_kernel(
        neuron_correlation_kernel,
        [u, v],
        [(DIM_SAMPLE, DIM_UNIT), (DIM_SAMPLE, LAGGED)],
        output_dims=[(DIM_UNIT, LAGGED)],
        output_sizes={DIM_UNIT: u.sizes[DIM_UNIT], LAGGED: v.sizes[LAGGED]},
    )
    return declared(result, "neuron_correlation")


def matched_correlation(u: xr.DataArray, v: xr.DataArray, *, absolute: bool = False) -> xr.Dataset:
    """Match the units of two networks one to one by their correlation, record by record.

    Lazy on dask-backed arrays. Assignment by scipy (``linear_sum_assignment``).

    Parameters
    ----------
    u, v
        As in :func:`neuron_correlation`.
    absolute
        Match by the size of the correlation, and take the mean of sizes: for activations
        that are odd in the weights, such as tanh, a neuron and its negative are the same.

    Returns
    -------
    xarray.Dataset
        ``mean_matched_correlation``
            Mean over the matched pairs; NaN where there are none. Compare with
            :func:`random_rotation` of one of the two, and with
            :func:`matched_correlation_baseline`.
        ``matched_correlation``
            On (..., unit), signed; NaN for units without match: constant ones, those with
            a missing activation on some sample, and those left over where u has more units
            than v. They take no part in the mean.
        ``matched_unit``
            Position of the match among the units of v; -1 without match.

    Raises
    ------
    TypeError, ValueError
        As :func:`neuron_correlation`.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> u = xr.DataArray(rng.standard_normal((50, 3)), dims=("sample", "unit"))
    >>> found = matched_correlation(u, u.isel(unit=[2, 0, 1]))
    >>> found.matched_unit.values, round(float(found.mean_matched_correlation), 9)
    (array([1, 2, 0]), 1.0)
    """
    u, v = _pair(u, v)
    results = apply_kernel(
        functools.partial(_match, absolute=absolute),
        [u, v],
        [(DIM_SAMPLE, DIM_UNIT), (DIM_SAMPLE, LAGGED)],
        output_dims=[(), (DIM_UNIT,), (DIM_UNIT,)],
        output_sizes={DIM_UNIT: u.sizes[DIM_UNIT]},
        output_dtypes=[FLOAT, FLOAT, np.dtype(np.int64)],
    )
    if DIM_UNIT in u.indexes:
        results = [a.assign_coords({DIM_UNIT: u[DIM_UNIT]}) if DIM_UNIT in a.dims else a for a in results]
    said = {"absolute": absolute}
    return xr.Dataset({name: declared(a, name, **said) for name, a in zip(RESULTS, results, strict=True)})


def random_rotation(activations: xr.DataArray, *, random_seed: int) -> xr.DataArray:
    """Rotate the units by one random orthogonal matrix (Haar measure), the same for all records.

    The rotated features are as good a basis of the same space as the neurons, unless the
    neurons are a privileged one: the control of :func:`matched_correlation`. Lazy on
    dask-backed arrays.

    Parameters
    ----------
    activations
        Array with dims (..., sample, unit).
    random_seed
        Seed of the matrix.

    Returns
    -------
    xarray.DataArray
        Like the activations, in float64 and without the coords of the units, which no
        longer are neurons.

    Raises
    ------
    TypeError
        If the array is no DataArray of real numbers.
    ValueError
        If a dim is missing or there is no unit.

    Examples
    --------
    >>> a = xr.DataArray(np.eye(3), dims=("sample", "unit"))
    >>> rotated = random_rotation(a, random_seed=0)
    >>> bool(np.allclose(rotated.values @ rotated.values.T, np.eye(3)))
    True
    """
    from scipy.stats import ortho_group

    require_dims("activations", require_real("activations", activations), (DIM_SAMPLE, DIM_UNIT), "dims")
    h = activations.sizes[DIM_UNIT]
    if h == 0:
        raise ValueError("expected at least one unit in activations, came none")
    rng = np.random.default_rng(random_seed)
    Q = ortho_group.rvs(h, random_state=rng) if h > 1 else rng.choice([-1.0, 1.0], (1, 1))
    own = [c for c in activations.coords if DIM_UNIT in activations[c].dims]
    rotated: xr.DataArray = apply_kernel(
        functools.partial(np.matmul, dtype=np.float64),
        [activations.drop_vars(own), xr.DataArray(Q, dims=(DIM_UNIT, "__rotated__"))],
        [(DIM_SAMPLE, DIM_UNIT), (DIM_UNIT, "__rotated__")],
        output_dims=[(DIM_SAMPLE, "__rotated__")],
        output_sizes={DIM_SAMPLE: activations.sizes[DIM_SAMPLE], "__rotated__": h},
    )
    rotated = rotated.rename({"__rotated__": DIM_UNIT})
    if DIM_SAMPLE in activations.coords:
        rotated = rotated.assign_coords({DIM_SAMPLE: activations[DIM_SAMPLE]})
    rotated.attrs = activations.attrs | {"rotated_by_random_seed": random_seed}
    return rotated.rename(activations.name).transpose(*activations.dims)


def matched_correlation_baseline(n_units: int, n_samples: int) -> float:
    r"""Leading order of the mean matched correlation of independent Gaussian units.

    A correlation of independent samples is nearly :math:`N(0, 1/n)`, and the largest of h of
    them about :math:`\sqrt{2 \log h / n}`. It is reached for large h only: at h = 200 a
    matching gets about three quarters of it.

    Parameters
    ----------
    n_units, n_samples
        Numbers h and n.

    Raises
    ------
    TypeError
        If a number is not whole.
    ValueError
        If there is no unit, or fewer than two samples.

    Examples
    --------
    >>> round(matched_correlation_baseline(200, 2000), 4)
    0.0728
    """
    n_units, n_samples = whole_number("n_units", n_units), whole_number("n_samples", n_samples)
    if n_units < 1 or n_samples < 2:
        raise ValueError(f"expected a unit and two samples at least, came {n_units} and {n_samples}")
    return math.sqrt(2 * math.log(n_units) / n_samples)


def _pair(u: xr.DataArray, v: xr.DataArray) -> tuple[xr.DataArray, xr.DataArray]:
    """Check both, and give the units of v their own dim."""
    for name, array in (("u", u), ("v", v)):
        require_dims(name, require_real(name, array), (DIM_SAMPLE, DIM_UNIT), "dims")
        if LAGGED in array.dims:
            raise ValueError(f"expected no dim {LAGGED!r} in {name}, the result's own, came {array.dims}")
        if array.sizes[DIM_SAMPLE] < 2 or array.sizes[DIM_UNIT] == 0:
            raise ValueError(
                f"expected at least two samples and one unit in {name}, came sizes {dict(array.sizes)}"
            )
    own: dict[Any, str] = {c: f"{c}_" for c in v.coords if DIM_UNIT in v[c].dims and c != DIM_UNIT}
    v = v.rename({DIM_UNIT: LAGGED, **own})
    require_same_labels({"u": u, "v": v})
    return u, v
