r"""The 14 statistics of all weights of a record, and their z-scores over a run.

Of the weight matrices W (tensors of a convolution as out x rest), averaged over the matrices:
``l1`` and ``l2``, the norms of the entries; ``trace``, the sum of the main diagonal;
``spectral_norm``; ``l1_by_l2`` and ``trace_by_spectral_norm``, the ratios matrix by matrix
("code sparsity" and "computational sparsity"); ``singular_value_mean`` and
``singular_value_variance``. Of all entries of the matrices together ``weight_mean``,
``weight_median`` and ``weight_variance``, and of all biases ``bias_mean``, ``bias_median`` and
``bias_variance``. Variances divide by n - 1.

M. Hu, A. Chen, N. Saphra, K. Cho (2023), arXiv:2308.09543, as in the code they released; there
singular values below 1e-5 are set to zero first, here they are not.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import xarray as xr

from hild_xr.analysis.base.arguments import (
    apply_kernel,
    declared,
    require_dims,
    require_real,
    require_same_labels,
    vector_dims_of,
)
from hild_xr.analysis.features.layers import arrays_by_layer
from hild_xr.analysis.subspaces.bases import divide_or_zero, precision, singular_values
from hild_xr.variables import DIM_SKETCH, DIM_STATISTIC, DIM_STEP

if TYPE_CHECKING:
    from hild_xr.analysis.subspaces.bases import FloatArray

OF_MATRICES = (
    "l1",
    "l2",
    "trace",
    "spectral_norm",
    "l1_by_l2",
    "trace_by_spectral_norm",
    "singular_value_mean",
    "singular_value_variance",
)
OF_WEIGHTS = ("weight_mean", "weight_median", "weight_variance")
OF_BIASES = ("bias_mean", "bias_median", "bias_variance")

STATISTICS = (*OF_MATRICES, *OF_WEIGHTS, *OF_BIASES)
"""Labels along the dim ``statistic``, in the order of the paper."""

CONSTANT = 8.0
"""Multiple of eps |x|_max up to which a standard deviation is rounding: the column is constant."""


class Tensors(NamedTuple):
    """What the arrays of :func:`weight_statistics_kernel` are."""

    n_axes: tuple[int, ...]
    """Number of axes of each tensor."""

    is_bias: tuple[bool, ...]
    """Whether a tensor is a bias; those that are not are weights, taken as matrices."""


# ---------------------------------------------------------------------------- kernels


def weight_statistics_kernel(*arrays: FloatArray, tensors: Tensors) -> FloatArray:
    """Return the 14 statistics of stacked weights and biases, on the last axis.

    Parameters
    ----------
    *arrays
        Arrays of shapes (..., *tensor shape); the leading axes broadcast.
    tensors
        What they are; at least one is no bias.

    Returns
    -------
    statistics
        Array of shape (..., 14) in the order of :data:`STATISTICS`; NaN where an entry is not
        finite, for what is not defined (ratios of zero matrices, variances of one value), and
        for biases where there are none.

    Examples
    --------
    >>> found = weight_statistics_kernel(np.diag([3.0, 4.0]), tensors=Tensors((2,), (False,)))
    >>> dict(zip(STATISTICS, found.tolist()))["l1_by_l2"]
    1.4
    """
    matrices: list[FloatArray] = []
    biases: list[FloatArray] = []
    lead = np.broadcast_shapes(*(a.shape[: a.ndim - n] for a, n in zip(arrays, tensors.n_axes, strict=True)))
    for array, n, is_bias in zip(arrays, tensors.n_axes, tensors.is_bias, strict=True):
        tensor = array.shape[array.ndim - n :]
        a = np.broadcast_to(array.astype(np.float64), (*lead, *tensor))
        (biases if is_bias else matrices).append(a.reshape(*lead, *tensor[:1], -1) if n > 1 else a)
    of_each = np.stack([_of_matrix(m) for m in matrices])
    entries = [m.reshape(*m.shape[:-2], -1) for m in matrices]
    parts = [_mean_over_matrices(of_each), _distribution(entries), _distribution(biases, lead)]
    return np.concatenate(parts, axis=-1)


def _of_matrix(W: FloatArray) -> FloatArray:
    l1, l2 = np.abs(W).sum(axis=(-2, -1)), np.linalg.norm(W, axis=(-2, -1))
    trace = np.trace(W, axis1=-2, axis2=-1)
    s = singular_values(W)
    largest = s[..., 0]
    nan = np.full_like(l1, np.nan)
    return np.stack(
        [
            l1,
            l2,
            trace,
            largest,
            np.divide(l1, l2, out=nan.copy(), where=l2 > 0),
            np.divide(trace, largest, out=nan.copy(), where=largest > 0),
            s.mean(axis=-1),
            _variance(s),
        ],
        axis=-1,
    )


def _mean_over_matrices(of_each: FloatArray) -> FloatArray:
    """Mean over the first axis; a matrix with one singular value has no variance and is left out of it."""
    means = of_each.mean(axis=0)
    variances = of_each[..., -1]
    defined = np.isfinite(variances)
    n, total = defined.sum(axis=0), np.where(defined, variances, 0.0).sum(axis=0)
    missing = ~np.isfinite(means[..., 0])
    mean = np.divide(total, n, out=np.full_like(total, np.nan), where=(n > 0) & ~missing)
    return np.concatenate([means[..., :-1], mean[..., None]], axis=-1)


def _distribution(parts: list[FloatArray], lead: tuple[int, ...] = ()) -> FloatArray:
    if not parts:
        return np.full((*lead, 3), np.nan)
    values = np.concatenate(parts, axis=-1)
    return np.stack([values.mean(axis=-1), np.median(values, axis=-1), _variance(values)], axis=-1)


def _variance(values: FloatArray) -> FloatArray:
    if values.shape[-1] < 2:
        return np.full(values.shape[:-1], np.nan)
    return np.asarray(values.var(axis=-1, ddof=1))


def z_score_kernel(values: FloatArray) -> FloatArray:
    """Values less their mean, by their standard deviation, over the last axis.

    Parameters
    ----------
    values
        Array of shape (..., n); NaN is left out of mean and standard deviation.

    Returns
    -------
    scores
        Array of shape (..., n); NaN where the value is, and where all values are equal.

    Examples
    --------
    >>> z_score_kernel(np.array([[1.0, 3.0, np.nan], [2.0, 2.0, 2.0]]))
    array([[-1.,  1., nan],
           [nan, nan, nan]])
    """
    x: FloatArray = values.astype(np.float64)
    finite = np.isfinite(x)
    n = np.maximum(finite.sum(axis=-1, keepdims=True), 1)
    x = np.where(finite, x, 0.0)
    largest = np.abs(x).max(axis=-1, keepdims=True, initial=0.0)
    x = divide_or_zero(x, largest)  # squares stay in range
    centred = np.where(finite, x - x.sum(axis=-1, keepdims=True) / n, 0.0)
    deviation = np.sqrt((centred**2).sum(axis=-1, keepdims=True) / n)
    varied = deviation > CONSTANT * precision(values)
    scores: FloatArray = np.divide(centred, deviation, out=np.full_like(x, np.nan), where=varied & finite)
    return scores


# ---------------------------------------------------------------------------- labelled


def weight_statistics(weights: xr.DataTree | Mapping[str, xr.DataArray]) -> xr.DataArray:
    """Statistics of all weights of a record: the 14 columns that latent states are fitted to.

    Lazy on dask-backed arrays; all layers of a record are worked on together.

    Parameters
    ----------
    weights
        Node of a run with a child for each layer (``run["weights"]``), or an array for each
        layer by its qualified name, with the attr ``vector_dims``. Tensors with several axes
        are weights, those with one axis whose name ends in "bias" are biases; others, such as
        the gains of normalisation layers, are left out.

    Returns
    -------
    xarray.DataArray
        Dims (..., statistic), labelled; see the module for their meaning. NaN where a
        record is missing or a statistic is not defined: without biases their three are.

    Raises
    ------
    TypeError
        If an array is no DataArray of real numbers.
    ValueError
        If there is no weight with several axes, an array is a sketch or lacks
        ``vector_dims``, or labels differ.

    Examples
    --------
    >>> weight = xr.DataArray([[3.0, 0.0], [0.0, 4.0]], dims=("out", "in"))
    >>> weight.attrs["vector_dims"] = ["out", "in"]
    >>> found = weight_statistics({"fc.weight": weight})
    >>> float(found.sel(statistic="trace")), float(found.sel(statistic="spectral_norm"))
    (7.0, 4.0)
    """
    arrays, core_dims, is_bias = {}, [], []
    for i, (layer, array) in enumerate(arrays_by_layer("weights", weights).items()):
        dims = vector_dims_of({layer: require_real(layer, array)})
        if DIM_SKETCH in dims:
            raise ValueError(f"expected whole weights, came sketches in {layer!r}: dims {array.dims}")
        bias = len(dims) == 1 and layer.endswith("bias")
        if (len(dims) == 1 and not bias) or not all(array.sizes[d] for d in dims):
            continue
        # layers share names of dims ("out", "in") that differ in size
        own = {d: f"__axis_{j}_of_{i}__" for j, d in enumerate(dims)}
        labels = [c for c, coord in array.coords.items() if set(coord.dims) & set(dims)]
        arrays[layer] = array.drop_vars(labels).rename(own)
        core_dims.append(list(own.values()))
        is_bias.append(bias)
    if all(is_bias):
        raise ValueError(f"expected at least one weight with several axes, came layers {[*arrays]}")
    require_same_labels(arrays)
    tensors = Tensors(tuple(map(len, core_dims)), tuple(is_bias))
    result = apply_kernel(
        functools.partial(weight_statistics_kernel, tensors=tensors),
        list(arrays.values()),
        core_dims,
        output_dims=[(DIM_STATISTIC,)],
        output_sizes={DIM_STATISTIC: len(STATISTICS)},
    )
    return declared(result.assign_coords({DIM_STATISTIC: list(STATISTICS)}), "weight_statistics")


def z_score(statistics: xr.DataArray, *, dim: str = DIM_STEP) -> xr.DataArray:
    """Statistics less their mean over a run, by their standard deviation.

    Lazy on dask-backed arrays.

    Parameters
    ----------
    statistics
        Array with the dim `dim`; every series along it is scored by itself.
    dim
        Dim of the records of a run.

    Returns
    -------
    xarray.DataArray
        Same dims, name and attrs. NaN where the statistic is NaN, which the others do not see, and where it
        is the same all along.

    Raises
    ------
    TypeError
        If the array is no DataArray of real numbers.
    ValueError
        If the dim is missing.

    Examples
    --------
    >>> z_score(xr.DataArray([1.0, 3.0, 1.0, 3.0], dims="step")).values
    array([-1.,  1., -1.,  1.])
    """
    require_dims("statistics", require_real("statistics", statistics), (dim,), "dim")
    sizes = {dim: statistics.sizes[dim]}
    scored: xr.DataArray = apply_kernel(
        z_score_kernel, [statistics], [(dim,)], output_dims=[(dim,)], output_sizes=sizes
    )
    kept = {c: v for c, v in statistics.coords.items() if dim in v.dims}
    result = scored.assign_coords(kept).transpose(*statistics.dims)
    result.attrs = statistics.attrs | {"units": "1", "scored_over": dim}
    return result.rename(statistics.name)
