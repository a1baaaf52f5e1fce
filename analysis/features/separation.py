r"""Separation of the classes layer by layer.

.. math:: D_l = \log(\mathrm{Tr}\,\Sigma_W / \mathrm{Tr}\,\Sigma_B)

with the scatter matrices of :mod:`hild_xr.analysis.features.classes`. In trained networks
it falls nearly linearly with the layer (H. He and W. Su 2023, arXiv:2210.17020, with
:math:`\mathrm{Tr}(\Sigma_W \Sigma_B^+)`; C. Shi, L. Pan, I. Dokmanic 2024, arXiv:2407.19353,
with the ratio of the traces). The slope is the logarithm of the factor by which a layer
separates the classes further, and the correlation says how even the layers are.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Literal

import numpy as np
import xarray as xr

from hild_xr.analysis.base.arguments import FLOAT, apply_kernel, declared, require_dims, require_real
from hild_xr.analysis.features.classes import (
    ClassIndex,
    Weighting,
    class_index,
    require_weighting,
    scatter_kernel,
    scatter_traces_kernel,
    whitened_trace_kernel,
)
from hild_xr.analysis.features.layers import Layers, over_layers
from hild_xr.analysis.subspaces.bases import precision
from hild_xr.variables import DIM_LAYER, DIM_SAMPLE, DIM_UNIT

if TYPE_CHECKING:
    from hild_xr.analysis.subspaces.bases import FloatArray

Measure = Literal["trace_ratio", "pinv"]

# ---------------------------------------------------------------------------- kernels


def separation_kernel(
    features: FloatArray, index: ClassIndex, weighting: Weighting, measure: Measure
) -> FloatArray:
    """Logarithm of the scatter within classes by that between them, of stacked features.

    Parameters
    ----------
    features
        Array of shape (..., n, d).
    index, weighting, measure
        Classes of the n samples, and as in :func:`separation`.

    Returns
    -------
    separation
        Array of shape (...); NaN where the features are not finite or the class means
        coincide, -inf where the features of each class do.

    Examples
    --------
    >>> index = ClassIndex(np.array([0, 0, 1, 1]), np.array([0, 1]))
    >>> features = np.array([[0.0], [2.0], [5.0], [7.0]])
    >>> float(np.exp(separation_kernel(features, index, "sample", "trace_ratio"))).__round__(12)
    0.16
    """
    scatter = scatter_kernel(features, index, weighting)
    if measure == "pinv":
        rtol = max(scatter.means.shape[-2:]) * precision(features)
        ratio = whitened_trace_kernel(scatter, index, weighting, rtol)
    else:
        within, between = scatter_traces_kernel(scatter, index, weighting)
        ratio = np.divide(within, between, out=np.full_like(within, np.nan), where=between > 0)
    with np.errstate(divide="ignore"):
        return np.where(scatter.finite, np.log(ratio), np.nan)


def line_kernel(values: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Least-squares slope of values (..., L) against 0 ... L - 1, and their correlation with it.

    Returns
    -------
    slope, correlation
        Arrays of shape (...); NaN where a value is not finite, the correlation also for
        equal values.

    Examples
    --------
    >>> slope, correlation = line_kernel(np.array([5.0, 3.0, 1.0]))
    >>> float(slope), float(correlation.round(12))
    (-2.0, -1.0)
    """
    finite = np.asarray(np.isfinite(values).all(axis=-1))
    y = np.where(finite[..., None], values, 0.0).astype(np.float64, copy=False)
    x = np.arange(values.shape[-1]) - (values.shape[-1] - 1) / 2
    largest = np.abs(y).max(axis=-1)
    y = y - y.mean(axis=-1, keepdims=True)
    slope, spread = y @ x / (x @ x), np.linalg.norm(y, axis=-1)
    # equal values have a spread at rounding, and no correlation
    varied = spread > 8 * np.finfo(np.float64).eps * largest
    correlation = np.divide(y @ x, spread * np.linalg.norm(x), out=np.full_like(spread, np.nan), where=varied)
    return np.where(finite, slope, np.nan), np.where(finite, np.clip(correlation, -1, 1), np.nan)


# ---------------------------------------------------------------------------- labelled


def separation(
    activations: Layers,
    labels: xr.DataArray,
    *,
    measure: Measure = "trace_ratio",
    weighting: Weighting = "sample",
) -> xr.DataArray:
    r"""Logarithm of the scatter within classes by that between them, record by record.

    :math:`D = \log(\mathrm{Tr}\,\Sigma_W / \mathrm{Tr}\,\Sigma_B)`.
    Small values are well separated. Lazy on dask-backed activations; only the labels are
    read at once.

    Parameters
    ----------
    activations
        Array with dims (..., sample, unit), an array for each layer by its name, or the
        node of a run that holds them.
    labels
        Class of each sample, on the dim ``sample``.
    measure
        ``"trace_ratio"`` as above, or ``"pinv"`` for :math:`\log \mathrm{Tr}(\Sigma_W\Sigma_B^+)`.
    weighting
        Whether each sample ("sample") or each class ("class") counts alike.

    Returns
    -------
    xarray.DataArray
        With the dim ``layer`` for several layers, in their order. NaN where a record is
        missing or the class means coincide; -inf where the features of each class do.

    Raises
    ------
    TypeError, ValueError
        As :func:`~hild_xr.analysis.features.neural_collapse`.

    Examples
    --------
    >>> activations = xr.DataArray([[-2.0], [-1.0], [1.0], [2.0]], dims=("sample", "unit"))
    >>> labels = xr.DataArray([0, 0, 1, 1], dims="sample")
    >>> round(float(separation(activations, labels)), 4)  # log(0.5**2 / 1.5**2)
    -2.1972
    """
    require_weighting(weighting)
    if measure not in ("trace_ratio", "pinv"):
        raise ValueError(f"expected measure 'trace_ratio' or 'pinv', came {measure!r}")

    def of_layer(_: str | None, array: xr.DataArray) -> xr.DataArray:
        index = class_index(array, labels)
        kernel = functools.partial(separation_kernel, index=index, weighting=weighting, measure=measure)
        result = apply_kernel(kernel, [array], [(DIM_SAMPLE, DIM_UNIT)])
        return declared(result, "separation", measure=measure, weighting=weighting)

    found: xr.DataArray = over_layers("activations", of_layer, activations)
    return found


def separation_slope(separation: xr.DataArray, *, dim: str = DIM_LAYER) -> xr.Dataset:
    """Slope of the separation over the layers, and how linear it is.

    Parameters
    ----------
    separation
        Result of :func:`separation` for several layers.
    dim
        Dim of the layers, which are taken at equal distances in the order of the array.

    Returns
    -------
    xarray.Dataset
        ``separation_slope``, a number a layer (least squares), and
        ``separation_correlation``, the Pearson correlation of separation and layer:
        -1 is the law of equal separation. NaN where the value of a layer is missing or
        infinite; the correlation also where all layers have the same.

    Raises
    ------
    TypeError
        If the array is no DataArray of real numbers.
    ValueError
        If the dim is missing or has fewer than two layers.

    Examples
    --------
    >>> layers = xr.DataArray([-1.0, -1.5, -2.0], dims="layer")
    >>> found = separation_slope(layers)
    >>> float(found.separation_slope), float(found.separation_correlation.round(12))
    (-0.5, -1.0)
    """
    require_dims("separation", require_real("separation", separation), (dim,), "dim")
    if separation.sizes[dim] < 2:
        raise ValueError(f"expected at least two layers along {dim!r}, came {separation.sizes[dim]}")
    results = apply_kernel(
        line_kernel, [separation], [(dim,)], output_dims=[(), ()], output_dtypes=[FLOAT, FLOAT]
    )
    names = ("separation_slope", "separation_correlation")
    return xr.Dataset({name: declared(a, name) for name, a in zip(names, results, strict=True)})
