r"""Single numbers of a curvature matrix: R_med, the Goldilocks zone, the noise scale.

* :math:`R_{med} = \max_i |H_{ii}| / \mathrm{median}_i |H_{ii}|`: how uneven the
  diagonal of a layer's Hessian is (K. Jiang, D. Malik and Y. Li, "How does
  adaptive optimization impact local neural network geometry?", NeurIPS 2023,
  arXiv:2211.02254).
* :math:`\mathrm{tr} H / \|H\|_F` and the fraction of positive eigenvalues: excess
  of positive curvature, large in the Goldilocks zone (S. Fort and A. Scherlis,
  AAAI 2019, arXiv:1807.02581; A. Vysogorets, A. Dawid and J. Kempe, arXiv:2402.03579).
* :math:`\mathrm{tr}\,\Sigma_g / |g|^2`: the gradient noise scale, in units of
  the batch size (S. McCandlish et al., arXiv:1812.06162).
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np

from hild_xr.analysis.base.arguments import (
    Dims,
    apply_kernel,
    declared,
    require_real,
    require_same_labels,
    vector_dims_of,
)
from hild_xr.analysis.base.checks import real_number, require_values
from hild_xr.analysis.base.division import divide_or_nan
from hild_xr.analysis.base.stacking import flatten_last
from hild_xr.analysis.spectra.recorded import n_recorded
from hild_xr.analysis.subspaces.bases import precision
from hild_xr.variables import DIM_EIG, DIM_LAYER

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping, Sequence

    import xarray as xr

    from hild_xr.analysis.subspaces.bases import FloatArray

ROUNDING = 64.0
"""Multiple of eps by which the trace of G may fall short of |g|^2 before the two contradict each other."""


# ---------------------------------------------------------------------------- kernels


def r_med_kernel(diagonal: FloatArray, *, n_axes: int = 1) -> FloatArray:
    """Largest by median absolute value, over the last axes.

    Parameters
    ----------
    diagonal
        Array of shape (..., *axes of one block).
    n_axes
        Number of axes of one block.

    Returns
    -------
    ratio
        float64 array over the leading axes, at least 1: inf where the median is
        zero and the largest is not; NaN where all are zero or one is not finite.

    Examples
    --------
    >>> float(r_med_kernel(np.arange(-9.0, 0.0)))
    1.8
    """
    sizes = np.abs(flatten_last(diagonal, n_axes).astype(np.float64))
    known = np.asarray(np.isfinite(sizes).all(axis=-1))
    sizes = np.where(known[..., None], sizes, 0.0)
    largest, middle = sizes.max(axis=-1), np.median(sizes, axis=-1)
    with np.errstate(divide="ignore", over="ignore"):
        return divide_or_nan(largest, middle, known & (largest > 0))


def trace_to_frobenius_kernel(trace: FloatArray, frobenius_norm: FloatArray) -> FloatArray:
    """Trace by Frobenius norm; NaN where the norm is not positive or either is not finite.

    Parameters
    ----------
    trace, frobenius_norm
        Arrays that broadcast.

    Returns
    -------
    ratio
        float64 array.

    Examples
    --------
    >>> float(trace_to_frobenius_kernel(np.array(9.0), np.array(3.0)))
    3.0
    """
    trace, norm = np.broadcast_arrays(*(np.asarray(a, dtype=np.float64) for a in (trace, frobenius_norm)))
    known = np.isfinite(trace) & np.isfinite(norm) & (norm > 0)
    return divide_or_nan(trace, norm, known)


def positive_fraction_kernel(
    values: FloatArray, weights: FloatArray | None = None, *, rtol: float = 0.0, n_axes: int = 1
) -> FloatArray:
    """Fraction of the values that are above rtol times the largest absolute one.

    Parameters
    ----------
    values
        Array of shape (..., *axes of one spectrum).
    weights
        Weights of the values, of the same shape, or None for equal ones.
    rtol
        Relative tolerance.
    n_axes
        Number of axes of one spectrum.

    Returns
    -------
    fraction
        float64 array over the leading axes in [0, 1]; NaN where values are
        missing.

    Examples
    --------
    >>> float(positive_fraction_kernel(np.array([2.0, 1e-9, -1.0, np.nan]), rtol=1e-6)).__round__(4)
    0.3333
    """
    values = flatten_last(values, n_axes).astype(np.float64)
    finite = np.isfinite(values)
    if weights is None:
        _, known = n_recorded(values)
        weights = finite.astype(np.float64)
    else:
        weights = flatten_last(weights, n_axes).astype(np.float64)
        known = (np.isfinite(weights) & (weights >= 0) & (finite | (weights == 0))).all(axis=-1)
        known = known & (weights > 0).any(axis=-1)
        weights = np.where(known[..., None], weights, 0.0)
    values = np.where(finite & (weights > 0), values, 0.0)
    positive = values > rtol * np.abs(values).max(axis=-1, keepdims=True)
    total = weights.sum(axis=-1)
    part = np.where(positive, weights, 0.0).sum(axis=-1)
    return divide_or_nan(part, total, known)


def noise_scale_kernel(
    trace: FloatArray, gradient: FloatArray, *, centered: bool = False, n_axes: int = 1
) -> FloatArray:
    r"""Trace of the gradients' covariance by the squared norm of their mean.

    Parameters
    ----------
    trace
        Trace of :math:`G = \mathrm{mean}\, g_i g_i^T`, or of the covariance:
        array of shape (...).
    gradient
        Mean gradient: array of shape (..., *axes of one block).
    centered
        Whether the trace is that of the covariance.
    n_axes
        Number of axes of one block.

    Returns
    -------
    noise_scale
        float64 array of shape (...). NaN where something is not finite, the mean
        gradient is zero, or the trace is smaller than it can be.

    Examples
    --------
    >>> per_sample = np.array([[3.0, 0.0], [1.0, 2.0]])
    >>> float(noise_scale_kernel(np.square(per_sample).sum(1).mean(), per_sample.mean(0)))
    0.4
    """
    axes = tuple(range(-n_axes, 0))
    eps = ROUNDING * max(precision(trace), precision(gradient))
    gradient = np.asarray(gradient, dtype=np.float64)
    finite = np.isfinite(gradient).all(axis=axes) & np.isfinite(trace)
    gradient = np.where(np.isfinite(gradient), gradient, 0.0)
    # by the largest entry: a square of it may be too small for a float
    size = np.abs(gradient).max(axis=axes)
    known = finite & (size > 0)
    divisor = np.where(size > 0, size, 1.0)
    squared = np.square(gradient / divisor.reshape(*divisor.shape, *[1] * n_axes)).sum(axis=axes)
    trace = np.where(known, trace, 0.0) / divisor / divisor
    squared, trace, known = np.broadcast_arrays(squared, trace, known)
    covariance = trace if centered else trace - squared
    covariance = np.where(np.abs(covariance) <= eps * squared, 0.0, covariance)
    known = known & (covariance >= 0)
    return divide_or_nan(covariance, squared, known)


# ---------------------------------------------------------------------------- labelled


def r_med(diagonal: xr.DataArray, *, vector_dims: Dims = None) -> xr.DataArray:
    r""":math:`R_{med} = \max_i |H_{ii}| / \mathrm{median}_i |H_{ii}|` of a layer (arXiv:2211.02254).

    Parameters
    ----------
    diagonal
        Diagonal of a layer's Hessian on the dims of its weights, exact or
        estimated.
    vector_dims
        Dims of one layer; by default the attr ``vector_dims``.

    Returns
    -------
    xarray.DataArray
        Numbers of at least 1: inf where more than half of the entries are zero;
        NaN where all are, or one is missing.

    Raises
    ------
    TypeError
        If the array is no DataArray or not real.
    ValueError
        If dims are missing, unknown or empty.

    Examples
    --------
    >>> import xarray as xr
    >>> float(r_med(xr.DataArray(np.arange(1.0, 10.0), dims="in"), vector_dims="in"))
    1.8
    """
    vector = vector_dims_of({"diagonal": require_real("diagonal", diagonal)}, vector_dims)
    require_values("diagonal", diagonal, vector, "vector_dims")
    result = apply_kernel(functools.partial(r_med_kernel, n_axes=len(vector)), [diagonal], [vector])
    return declared(result, "r_med")


def trace_to_frobenius(trace: xr.DataArray, frobenius_norm: xr.DataArray) -> xr.DataArray:
    r"""Excess of positive curvature, :math:`\mathrm{tr} H / \|H\|_F` (arXiv:1807.02581).

    It is :math:`\sqrt p` for a multiple of the identity and near 0 where
    positive and negative eigenvalues cancel. Its square is the participation
    ratio of a positive semidefinite matrix.

    Parameters
    ----------
    trace, frobenius_norm
        As recorded, of the same matrix, with the same dims and labels.

    Returns
    -------
    xarray.DataArray
        Numbers in :math:`[-\sqrt p, \sqrt p]` up to the errors of estimates; NaN
        where one is missing or the matrix is zero.

    Raises
    ------
    TypeError
        If an array is no DataArray or not real.
    ValueError
        If dims or labels differ, or the attrs ``matrix``.

    Examples
    --------
    >>> import xarray as xr
    >>> float(trace_to_frobenius(xr.DataArray(9.0), xr.DataArray(3.0)))
    3.0
    """
    arrays = {"trace": trace, "frobenius_norm": frobenius_norm}
    for name, array in arrays.items():
        require_real(name, array)
    stated = {name: array.attrs["matrix"] for name, array in arrays.items() if "matrix" in array.attrs}
    if len(set(stated.values())) > 1:
        raise ValueError(f"expected trace and Frobenius norm of one matrix, came {stated}: record both of it")
    _require_same_blocks(arrays, {name: set(array.dims) for name, array in arrays.items()})
    result = apply_kernel(trace_to_frobenius_kernel, [trace, frobenius_norm], [(), ()])
    return declared(result, "trace_to_frobenius")


def positive_fraction(
    eigenvalues: xr.DataArray,
    weights: xr.DataArray | None = None,
    *,
    dim: str | Sequence[str] = DIM_EIG,
    rtol: float | None = None,
) -> xr.DataArray:
    r"""Fraction of eigenvalues that are positive.

    Of a truncated spectrum it is the fraction of what was recorded; the whole
    spectrum is in a stored density: ``positive_fraction(nodes, weights,
    dim=("probe", "node"))``.

    Parameters
    ----------
    eigenvalues
        Eigenvalues along `dim`, in any order. NaN at the end means that a block
        has no more.
    weights
        Weights of the values, with the same sizes along `dim`.
    dim
        Dim or dims of a spectrum.
    rtol
        Eigenvalues up to rtol times the largest absolute one count as zero. The
        default is the number of values times eps of the dtype. Of a model in
        float32 zero eigenvalues come out larger than that, whatever dtype they
        are stored in: pass 1e-5 or so.

    Returns
    -------
    xarray.DataArray
        Numbers in [0, 1]; NaN where values are missing.

    Raises
    ------
    TypeError
        If an array is no DataArray or not real, or rtol is no real number.
    ValueError
        If a dim is missing or empty, rtol is not in [0, 1), or labels differ.

    Examples
    --------
    >>> import xarray as xr
    >>> float(positive_fraction(xr.DataArray([3.0, 1.0, 0.0, -2.0], dims="eig")))
    0.5
    """
    dims = (dim,) if isinstance(dim, str) else tuple(dim)
    arrays = {"eigenvalues": eigenvalues} | ({} if weights is None else {"weights": weights})
    for name, array in arrays.items():
        require_values(name, array, dims, "dim")
    require_same_labels(arrays)
    if rtol is None:
        n = int(np.prod([eigenvalues.sizes[d] for d in dims]))
        rtol = n * precision(np.empty(0, dtype=eigenvalues.dtype))
    rtol = real_number("rtol", rtol)
    if not 0 <= rtol < 1:
        raise ValueError(f"expected rtol in [0, 1), a fraction of the largest eigenvalue, came {rtol}")
    kernel = functools.partial(positive_fraction_kernel, rtol=rtol, n_axes=len(dims))
    result = apply_kernel(kernel, list(arrays.values()), [dims] * len(arrays))
    return declared(result, "positive_fraction", rtol=rtol)


def noise_scale(
    trace: xr.DataArray, gradient: xr.DataArray, *, centered: bool = False, vector_dims: Dims = None
) -> xr.DataArray:
    r"""Gradient noise scale :math:`\mathrm{tr}\,\Sigma_g / |g|^2` (arXiv:1812.06162).

    :math:`\Sigma_g` is the covariance of per-sample gradients and g their mean.
    The G-matrix is the second moment, so
    :math:`\mathrm{tr}\,\Sigma_g = \mathrm{tr}\, G - |g|^2`. Both have to be of the same
    loss and data: a recorded gradient holds the regulariser, and so must G
    (``include_regularizer``) where there is one.

    Parameters
    ----------
    trace
        Trace of G over the same parameters as the gradient. Recorded traces of all layers
        stand in one array: take those of the gradient's layer, ``.sel(layer="fc1.weight")``.
    gradient
        Mean gradient on the dims of the weights, or flat.
    centered
        Whether `trace` is that of the covariance :math:`\Sigma_g` already.
    vector_dims
        Dims of the gradient; by default its attr ``vector_dims``.

    Returns
    -------
    xarray.DataArray
        Numbers of at least 0. NaN where something is missing or the gradient is
        zero, and where :math:`\mathrm{tr}\, G < |g|^2`: the two are then not of
        the same loss, data and parameters.

    Raises
    ------
    TypeError
        If an array is no DataArray or not real.
    ValueError
        If dims are missing or unknown, the trace has a vector dim, one of the two has dims
        of records or layers that the other lacks, labels differ, or the attr ``matrix`` of
        the trace says that it is another matrix's.

    Examples
    --------
    >>> import xarray as xr
    >>> per_sample = xr.DataArray([[3.0, 0.0], [1.0, 2.0]], dims=("sample", "in"))
    >>> trace = (per_sample**2).sum("in").mean("sample")
    >>> float(noise_scale(trace, per_sample.mean("sample"), vector_dims="in"))
    0.4
    """
    require_real("trace", trace)
    vector = vector_dims_of({"gradient": require_real("gradient", gradient)}, vector_dims)
    require_values("gradient", gradient, vector, "vector_dims")
    if set(vector) & set(trace.dims):
        raise ValueError(
            f"expected a trace without the dims {list(vector)} of the gradient, came {trace.dims}"
        )
    wanted = "gmatrix_centered" if centered else "gmatrix"
    matrix = trace.attrs.get("matrix", wanted)
    if matrix != wanted:
        hint = f"; pass centered={not centered}" if matrix in ("gmatrix", "gmatrix_centered") else ""
        raise ValueError(f"expected the trace of {wanted!r} with centered={centered}, came {matrix!r}{hint}")
    dims = {"trace": set(trace.dims), "gradient": set(gradient.dims) - set(vector)}
    _require_same_blocks({"trace": trace, "gradient": gradient}, dims)
    kernel = functools.partial(noise_scale_kernel, centered=centered, n_axes=len(vector))
    return declared(apply_kernel(kernel, [trace, gradient], [(), vector]), "noise_scale")


def _require_same_blocks(arrays: Mapping[str, xr.DataArray], dims: Mapping[str, set[Hashable]]) -> None:
    """Raise unless two arrays hold numbers of the same records and blocks: none is broadcast over others."""
    (one, other) = arrays
    for name, beside in ((one, other), (other, one)):
        extra = sorted(map(str, dims[name] - dims[beside]))
        if extra:
            index = arrays[name].indexes.get(extra[0])
            label = "..." if index is None or not len(index) else repr(index.tolist()[0])
            raise ValueError(
                f"expected {one} and {other} of the same records and parameters, came {extra} on {name} "
                f"alone: select what {beside} is of, for example {name}.sel({extra[0]}={label})"
            )
    layers = [array.coords[DIM_LAYER] for array in arrays.values() if DIM_LAYER in array.coords]
    if len(layers) == 2 and layers[0].ndim == layers[1].ndim == 0 and not layers[0].equals(layers[1]):
        raise ValueError(
            f"expected {one} and {other} of one layer, came {[layer.item() for layer in layers]}"
        )
    require_same_labels(arrays)
