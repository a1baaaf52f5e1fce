r"""Distances between two spectra, or their bulks.

Both compare distribution functions F and G of eigenvalues, so spectra of
different sizes and weighted spectra compare as well:

* Wasserstein-1: :math:`\int |F(x) - G(x)|\,dx`, in the unit of the eigenvalues;
* Kolmogorov-Smirnov: :math:`\sup_x |F(x) - G(x)|`.

Without the outliers beyond an edge they tell whether training has changed the
bulk (Z. Wang, A. Engel, A. Sarwate, I. Dumitriu and T. Chiang, "Spectral
evolution and invariance in linear-width neural networks", NeurIPS 2023,
arXiv:2211.06506).
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
    require_real,
    require_same_labels,
)
from hild_xr.analysis.base.checks import require_values
from hild_xr.analysis.base.stacking import flatten_last
from hild_xr.analysis.spectra.recorded import n_recorded
from hild_xr.variables import DIM_EIG

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from hild_xr.analysis.subspaces.bases import FloatArray

Edge = float | xr.DataArray | tuple[float | xr.DataArray, float | xr.DataArray] | None
Weights = tuple[xr.DataArray | None, xr.DataArray | None] | None

RESULTS = ("wasserstein_distance", "kolmogorov_smirnov_distance")


# ---------------------------------------------------------------------------- kernel


def bulk_distance_kernel(
    a: FloatArray, b: FloatArray, weights_a: FloatArray, weights_b: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Wasserstein-1 and Kolmogorov-Smirnov distance between stacked weighted samples.

    Parameters
    ----------
    a, b
        Arrays of shapes (..., n) and (..., m) in any order; the leading axes
        broadcast.
    weights_a, weights_b
        Weights of the values, of the same shapes; normalised here. A value of
        weight 0 takes no part, whatever it is.

    Returns
    -------
    wasserstein, kolmogorov_smirnov
        float64 arrays of shape (...). NaN where a value or weight is not finite,
        a weight is negative, or all weights of a sample are zero.

    Examples
    --------
    >>> ones = np.ones(2)
    >>> w, ks = bulk_distance_kernel(np.array([0.0, 1.0]), np.array([1.0, 2.0]), ones, ones)
    >>> float(w), float(ks)
    (1.0, 0.5)
    """
    lead = np.broadcast_shapes(*(array.shape[:-1] for array in (a, b, weights_a, weights_b)))
    (a, p, a_known), (b, q, b_known) = (_normalised(*pair) for pair in ((a, weights_a), (b, weights_b)))
    values = np.concatenate([np.broadcast_to(x, (*lead, x.shape[-1])) for x in (a, b)], axis=-1)
    masses = np.concatenate([np.broadcast_to(x, (*lead, x.shape[-1])) for x in (p, -q)], axis=-1)
    order = np.argsort(values, axis=-1, kind="stable")
    values = np.take_along_axis(values, order, axis=-1)
    # F - G between a value and the next, which is where it holds
    difference = np.abs(np.take_along_axis(masses, order, axis=-1).cumsum(axis=-1))[..., :-1]
    lengths = np.diff(values, axis=-1)
    known = a_known & b_known
    return (
        np.where(known, (difference * lengths).sum(axis=-1), np.nan),
        # among equal values F - G has not reached its value yet
        np.where(known, np.where(lengths > 0, difference, 0.0).max(axis=-1, initial=0.0), np.nan),
    )


def _normalised(values: FloatArray, weights: FloatArray) -> tuple[FloatArray, FloatArray, NDArray[np.bool_]]:
    """Values and weights that sum to 1, unused values moved onto a used one, and whether all is known."""
    values, weights = np.broadcast_arrays(*(np.asarray(x, dtype=np.float64) for x in (values, weights)))
    used = weights > 0
    finite = np.isfinite(weights) & (weights >= 0) & (np.isfinite(values) | ~used)
    known = np.asarray(finite.all(axis=-1) & used.any(axis=-1))
    used = used & known[..., None]
    weights = np.where(used, weights, 0.0)
    total = weights.sum(axis=-1, keepdims=True)
    largest = np.where(used, values, -np.inf).max(axis=-1, keepdims=True)
    largest = np.where(np.isfinite(largest), largest, 0.0)
    return np.where(used, values, largest), weights / np.where(total > 0, total, 1.0), known


def _within(
    values: FloatArray, weights: FloatArray | None, lower: FloatArray, upper: FloatArray
) -> FloatArray:
    """Weights of a recorded spectrum without what lies outside of the edges; NaN where it is not known."""
    if weights is None:
        _, known = n_recorded(values)
        weights = np.where(np.isfinite(values), 1.0, 0.0)
        weights = np.where(known[..., None], weights, np.nan)
    lower, upper = lower[..., None], upper[..., None]
    missing = np.isnan(lower) | np.isnan(upper) | np.isnan(weights) | (np.isnan(values) & (weights > 0))
    outside = (values < lower) | (values > upper)
    return np.where(missing, np.nan, np.where(outside, 0.0, weights))


# ---------------------------------------------------------------------------- labelled


def bulk_distance(
    a: xr.DataArray,
    b: xr.DataArray,
    *,
    weights: Weights = None,
    lower: Edge = None,
    upper: Edge = None,
    dim: str | Sequence[str] = DIM_EIG,
) -> xr.Dataset:
    r"""Wasserstein-1 and Kolmogorov-Smirnov distance between two spectra, record by record.

    Parameters
    ----------
    a, b
        Spectra along `dim`, in any order and of any sizes; all other dims are
        records, and those that only one has are broadcast (``b`` may be one
        record, such as ``a.sel(step=0, drop=True)``). NaN at the end means that
        a block has no more values.
    weights
        Weights of the values of a and of b, each an array like it or None for
        equal ones: ``quadrature_weights`` for ``quadrature_nodes``.
    lower, upper
        Values below and above are outliers and left out, for example the
        Marchenko-Pastur edges; what is left is normalised anew. A number or an
        array over dims of the records for both spectra, or a pair of them, one
        each.
    dim
        Dim or dims of a spectrum, ``("probe", "node")`` for a stored density.

    Returns
    -------
    xarray.Dataset
        ``wasserstein_distance``, in the unit of the eigenvalues, and
        ``kolmogorov_smirnov_distance`` in [0, 1]. NaN where a spectrum is not
        recorded or nothing of it lies between the edges.

    Raises
    ------
    TypeError
        If an array is no DataArray or not real.
    ValueError
        If a dim is missing, weights have another shape than their values, edges
        have the dim of a spectrum, or labels of records differ.

    See Also
    --------
    hild_xr.analysis.weight_spectrum : edges for the singular values of weights.
    hild_xr.analysis.bulk_weights : the bulk of a stored density.

    Examples
    --------
    >>> eigenvalues = xr.DataArray([[9.0, 2.0, 1.0], [9.0, 3.0, 2.0]], dims=("step", "eig"))
    >>> found = bulk_distance(eigenvalues, eigenvalues.isel(step=0), upper=5.0)
    >>> found.wasserstein_distance.values, found.kolmogorov_smirnov_distance.values
    (array([0., 1.]), array([0. , 0.5]))
    """
    dims = (dim,) if isinstance(dim, str) else tuple(dim)
    spectra = {"a": _spectrum("a", a, dims), "b": _spectrum("b", b, dims)}
    for name, array in zip("ab", _pair("weights", weights, None), strict=True):
        if array is not None:
            spectra[f"weights_{name}"] = _weights(name, array, spectra[name], dims)
    pairs = {"lower": _pair("lower", lower, -math.inf), "upper": _pair("upper", upper, math.inf)}
    edges = {
        f"{kind}_{name}": _edge(kind, edge, dims)
        for kind, pair in pairs.items()
        for name, edge in zip("ab", pair, strict=True)
    }
    require_same_labels(spectra | edges)
    results = apply_kernel(
        functools.partial(_distances, list(spectra), len(dims)),
        [*spectra.values(), *edges.values()],
        [_own(name, dims) for name in spectra] + [()] * len(edges),
        output_dims=[(), ()],
        output_dtypes=[FLOAT, FLOAT],
    )
    return xr.Dataset({name: declared(found, name) for name, found in zip(RESULTS, results, strict=True)})


def _distances(names: list[str], n_axes: int, *arrays: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Flatten the axes of a spectrum, weigh, and compare."""
    spectra = zip(names, arrays, strict=False)
    flat = {name: flatten_last(a, n_axes) for name, a in spectra}
    lower_a, lower_b, upper_a, upper_b = arrays[len(names) :]
    weights_a = _within(flat["a"], flat.get("weights_a"), lower_a, upper_a)
    weights_b = _within(flat["b"], flat.get("weights_b"), lower_b, upper_b)
    return bulk_distance_kernel(flat["a"], flat["b"], weights_a, weights_b)


def _own(name: str, dims: tuple[str, ...]) -> tuple[str, ...]:
    """Names for the dims of one spectrum: the other may have another number of values along them."""
    return tuple(f"__{dim}_of_{name[-1]}__" for dim in dims)


def _spectrum(name: str, array: xr.DataArray, dims: tuple[str, ...]) -> xr.DataArray:
    require_values(name, array, dims, "dim")
    along = [c for c in array.coords if set(dims) & set(array[c].dims)]
    return array.drop_vars(along).rename(dict(zip(dims, _own(name, dims), strict=True)))


def _weights(name: str, array: xr.DataArray, values: xr.DataArray, dims: tuple[str, ...]) -> xr.DataArray:
    weights = _spectrum(f"weights_{name}", array, dims)
    own = _own(name, dims)
    if [weights.sizes[dim] for dim in own] != [values.sizes[dim] for dim in own]:
        raise ValueError(
            f"expected as many weights as values of {name} along {dims}, came {dict(array.sizes)} for sizes "
            f"{[values.sizes[dim] for dim in own]}"
        )
    return weights


def _pair(name: str, given: Any, default: Any) -> tuple[Any, Any]:
    pair = given if isinstance(given, tuple) else (given, given)
    if len(pair) != 2 or (name == "weights" and given is not None and not isinstance(given, tuple)):
        raise ValueError(f"expected {name} as a pair, for a and for b, came {type(given).__name__}")
    first, second = (default if one is None else one for one in pair)
    return first, second


def _edge(name: str, edge: float | xr.DataArray, dims: tuple[str, ...]) -> xr.DataArray:
    array = require_real(name, edge if isinstance(edge, xr.DataArray) else xr.DataArray(float(edge)))
    if set(dims) & set(array.dims):
        raise ValueError(f"expected one {name} edge for a spectrum, came one with dims {array.dims}")
    return array
