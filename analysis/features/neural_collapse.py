r"""Neural collapse, in the last layer or in every layer (NC1 to NC4).

With the class means :math:`\mu_c`, the centre :math:`\mu_G` and the scatter matrices of
:mod:`hild_xr.analysis.features.classes`, and C classes:

* NC1, variability collapse: :math:`\mathrm{Tr}(\Sigma_W \Sigma_B^+)/C`, or
  :math:`\mathrm{Tr}\,\Sigma_W/\mathrm{Tr}\,\Sigma_B`;
* NC2, the centred means :math:`m_c = \mu_c - \mu_G` become a simplex equiangular tight
  frame: spread of their norms :math:`\mathrm{std}_c |m_c| / \mathrm{mean}_c |m_c|`, spread of
  their cosines :math:`\mathrm{std}_{c \ne c'} \cos(m_c, m_{c'})`, and distance of the cosines from
  the largest common angle, :math:`\mathrm{mean}_{c \ne c'} |\cos(m_c, m_{c'}) + 1/(C-1)|`;
* NC3, self-duality: :math:`\| W/\|W\|_F - M/\|M\|_F \|_F` of the classifier's weight W and the
  matrix M with the rows :math:`m_c`;
* NC4, nearest class mean: fraction of samples that the network classifies otherwise than
  :math:`\arg\min_c |h - \mu_c|`.

V. Papyan, X. Han, D. Donoho (2020), arXiv:2008.08186; in intermediate layers: L. Parker and
others (2023), arXiv:2308.02760. Standard deviations divide by the number of values, NC3 is
not squared.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

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
from hild_xr.analysis.features.classes import (
    ClassIndex,
    Scatter,
    Weighting,
    class_index,
    require_weighting,
    scatter_kernel,
    scatter_traces_kernel,
    whitened_trace_kernel,
)
from hild_xr.analysis.features.layers import Layers, arrays_by_layer, over_layers
from hild_xr.analysis.subspaces.bases import divide_or_zero, finite_matrices, precision
from hild_xr.variables import DIM_CLASS, DIM_IN, DIM_OUT, DIM_SAMPLE, DIM_UNIT

if TYPE_CHECKING:
    from hild_xr.analysis.subspaces.bases import FloatArray

NC1 = Literal["pinv", "trace_ratio"]

RESULTS = ("nc1", "nc2_equinorm", "nc2_equiangular", "nc2_maximal_angle", "nearest_mean_accuracy")
"""Variables that need activations and labels only."""


class Options(NamedTuple):
    """How neural collapse is measured; see :func:`neural_collapse`."""

    weighting: Weighting = "class"
    nc1: NC1 = "pinv"
    rtol: float | None = None


# ---------------------------------------------------------------------------- kernels


def neural_collapse_kernel(
    features: FloatArray,
    *others: FloatArray,
    index: ClassIndex,
    options: Options,
    given: tuple[str, ...] = (),
) -> tuple[FloatArray, ...]:
    """NC1, the three of NC2 and the nearest-mean accuracy of stacked features, then what is given for.

    Parameters
    ----------
    features
        Array of shape (..., n, d).
    *others
        For each name in `given`: "nc3" takes the weight (..., C, d), "nc4" the logits (..., n, C).
    index
        Classes of the n samples; for `others` class c is the row or logit c.
    options
        As in :func:`neural_collapse`.
    given
        Names of the `others`.

    Returns
    -------
    tuple of numpy.ndarray
        Arrays of shape (...): :data:`RESULTS`, then one for each of `given`; NaN where an
        argument is not finite or the quantity is not defined.

    Examples
    --------
    >>> index = ClassIndex(np.array([0, 0, 1, 1]), np.array([0, 1]))
    >>> features = np.array([[0.0], [2.0], [5.0], [7.0]])
    >>> values = neural_collapse_kernel(features, index=index, options=Options())
    >>> [round(float(value), 3) for value in values]
    [0.08, 0.0, 0.0, 0.0, 1.0]
    """
    scatter = scatter_kernel(features, index, options.weighting)
    nearest = _nearest_mean(scatter, index)
    apart = (scatter.means != 0).any(axis=(-2, -1))
    results = [
        _variability(scatter, index, options, features),
        *simplex_etf_kernel(_defined_means(scatter)),
        np.where(apart, np.mean(nearest == index.positions, axis=-1), np.nan),
    ]
    finite = [scatter.finite] * len(results)
    for name, other in zip(given, others, strict=True):
        usable = scatter.finite & finite_matrices(other)
        finite.append(usable)
        other = np.where(usable[..., None, None], other, 0.0).astype(np.float64, copy=False)
        if name == "nc3":
            results.append(self_duality_kernel(other, scatter.means))
        else:
            results.append(np.where(apart, np.mean(other.argmax(axis=-1) != nearest, axis=-1), np.nan))
    return tuple(np.where(ok, value, np.nan) for ok, value in zip(finite, results, strict=True))


def simplex_etf_kernel(means: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Spread of the norms, spread of the cosines and distance of the cosines from -1/(C-1).

    Parameters
    ----------
    means
        Centred vectors of shape (..., C, d), C >= 2.

    Returns
    -------
    equinorm, equiangular, maximal_angle
        Arrays of shape (...); NaN where a vector is zero or not finite (the first: where all are).

    Examples
    --------
    >>> [float(v.round(12)) for v in simplex_etf_kernel(np.eye(3) - 1 / 3)]
    [0.0, 0.0, 0.0]
    """
    norms = np.linalg.norm(means, axis=-1)
    mean = norms.mean(axis=-1)
    equinorm = np.divide(norms.std(axis=-1), mean, out=np.full_like(mean, np.nan), where=mean > 0)
    unit = divide_or_zero(means, norms[..., None])
    n = means.shape[-2]
    cosines = (unit @ np.swapaxes(unit, -1, -2))[..., ~np.eye(n, dtype=bool)]
    defined = (norms > 0).all(axis=-1)
    spread = cosines.std(axis=-1)
    distance = np.abs(cosines + 1 / (n - 1)).mean(axis=-1)
    return equinorm, np.where(defined, spread, np.nan), np.where(defined, distance, np.nan)


def self_duality_kernel(weight: FloatArray, means: FloatArray) -> FloatArray:
    """Frobenius distance of two matrices (..., C, d) of Frobenius norm 1; NaN where one is zero.

    Examples
    --------
    >>> float(self_duality_kernel(2 * np.eye(2), np.eye(2)))
    0.0
    """
    sizes = [np.linalg.norm(a, axis=(-2, -1)) for a in (weight, means)]
    unit = [divide_or_zero(a, size[..., None, None]) for a, size in zip((weight, means), sizes, strict=True)]
    distance: FloatArray = np.linalg.norm(unit[0] - unit[1], axis=(-2, -1))
    return np.where((sizes[0] > 0) & (sizes[1] > 0), distance, np.nan)


def _variability(scatter: Scatter, index: ClassIndex, options: Options, features: FloatArray) -> FloatArray:
    if options.nc1 == "trace_ratio":
        within, between = scatter_traces_kernel(scatter, index, options.weighting)
        return np.divide(within, between, out=np.full_like(within, np.nan), where=between > 0)
    rtol = options.rtol
    if rtol is None:
        rtol = max(scatter.means.shape[-2:]) * precision(features)
    return whitened_trace_kernel(scatter, index, options.weighting, rtol) / len(index.classes)


def _defined_means(scatter: Scatter) -> FloatArray:
    """Centred means, zero where a single one differs from the centre by rounding only."""
    norms = np.linalg.norm(scatter.means, axis=-1, keepdims=True)
    return np.where(norms > scatter.rounding[..., None, None], scatter.means, 0.0)


def _nearest_mean(scatter: Scatter, index: ClassIndex) -> Any:
    """Position of the nearest class mean, the first of equally near ones: shape (..., n).

    Of h = m_y + r, with all means centred: |h - m_c|^2 is smallest where h.m_c - |m_c|^2 / 2 is largest.
    """
    transposed = np.swapaxes(scatter.means, -1, -2)
    gram = scatter.means @ transposed
    products = scatter.residuals @ transposed + gram[..., index.positions, :]
    half_squares = np.diagonal(gram, axis1=-2, axis2=-1)[..., None, :] / 2
    return np.argmax(products - half_squares, axis=-1)


# ---------------------------------------------------------------------------- labelled


def neural_collapse(
    activations: Layers,
    labels: xr.DataArray,
    *,
    weight: xr.DataArray | None = None,
    bias: xr.DataArray | None = None,
    logits: xr.DataArray | None = None,
    weighting: Weighting = "class",
    nc1: NC1 = "pinv",
    rtol: float | None = None,
) -> xr.Dataset:
    r"""NC1 to NC4 of activations, record by record, for one layer or for all.

    The formulas are in the module's docstring. Lazy on dask-backed arrays; only the
    labels are read at once.

    Parameters
    ----------
    activations
        Array with dims (..., sample, unit), an array for each layer by its name, or the
        node of a run that holds them. The last layer of many is the one that the
        classifier reads.
    labels
        Class of each sample, on the dim ``sample``.
    weight
        Weight of the classifier, dims (..., out, in), as the probe stores it; for NC3,
        and for NC4 where no logits are given.
    bias
        Bias of the classifier, dims (..., out); 0 by default.
    logits
        Output of the network, dims (..., sample, class\_), for NC4. By default that of
        `weight` and `bias` on the activations (of the last layer).
    weighting
        Whether each class ("class") or each sample ("sample") counts alike in the
        centre and the scatter.
    nc1
        ``"pinv"`` for :math:`\mathrm{Tr}(\Sigma_W\Sigma_B^+)/C`; ``"trace_ratio"`` for
        :math:`\mathrm{Tr}\,\Sigma_W/\mathrm{Tr}\,\Sigma_B`, which does not depend on directions
        in which the means hardly differ.
    rtol
        Singular values of the centred means below this fraction of the largest are left
        out of the pseudo-inverse; max(C, d) eps of the activations' dtype by default.

    Returns
    -------
    xarray.Dataset
        ``nc1``
            NaN where the class means coincide: nothing is collapsed then.
        ``nc2_equinorm``, ``nc2_equiangular``, ``nc2_maximal_angle``
            The latter two NaN where a class mean is at the centre. A simplex has
            C - 1 dimensions: with fewer units they cannot all be zero.
        ``nearest_mean_accuracy``
            Fraction of the samples whose nearest class mean is that of their label; NaN, as
            ``nc4``, where the class means coincide.
        ``nc3``, ``nc4``
            If what they need is given. Of several layers only the last has ``nc3``; the
            others are NaN.

        With the dim ``layer`` for several layers. NaN where an argument is missing.
        Class means are taken over the samples given: with few samples of a class NC1
        is too small, with one it counts no variation.

    Raises
    ------
    TypeError
        If an array is no DataArray of real numbers, or the labels are neither whole
        numbers nor text.
    ValueError
        If a dim is missing, an option is unknown, labels differ along a shared dim,
        there are fewer than two classes, or classes, rows and logits do not agree: with
        `weight` or `logits` the labels are 0 ... C - 1, each with a sample.

    Examples
    --------
    >>> simplex = xr.DataArray(np.eye(3)[[0, 0, 1, 1, 2, 2]], dims=("sample", "unit"))
    >>> labels = xr.DataArray([0, 0, 1, 1, 2, 2], dims="sample")
    >>> weight = xr.DataArray(5 * (np.eye(3) - 1 / 3), dims=("out", "in"))
    >>> found = neural_collapse(simplex, labels, weight=weight)
    >>> {name: abs(round(float(value), 9)) for name, value in found.items()}
    {'nc1': 0.0, 'nc2_equinorm': 0.0, 'nc2_equiangular': 0.0, 'nc2_maximal_angle': 0.0,
    'nearest_mean_accuracy': 1.0, 'nc3': 0.0, 'nc4': 0.0}
    """
    _require_options(weighting, nc1, rtol, weight, bias)
    options = Options(weighting, nc1, rtol)
    last_name, last = None, activations
    if not isinstance(activations, xr.DataArray):
        activations = arrays_by_layer("activations", activations)
        last_name, last = list(activations.items())[-1]
    assert isinstance(last, xr.DataArray)
    if weight is not None:
        require_dims("activations", require_real("activations", last), (DIM_SAMPLE, DIM_UNIT), "unit dims")
        weight = _on_units(weight, last)
        if logits is None:
            logits = _logits(last, weight, bias)

    def of_layer(name: str | None, array: xr.DataArray) -> xr.Dataset:
        of_last = weight if name == last_name else None
        found = _of_layer(array, labels, of_last, logits, options)
        if weight is not None and of_last is None:
            found["nc3"] = declared(xr.full_like(found["nc1"], np.nan), "nc3", **_said("nc3", options))
        return found

    found: xr.Dataset = over_layers("activations", of_layer, activations)
    return found


def _of_layer(
    activations: xr.DataArray,
    labels: xr.DataArray,
    weight: xr.DataArray | None,
    logits: xr.DataArray | None,
    options: Options,
) -> xr.Dataset:
    index = class_index(activations, labels)
    arrays = {"activations": activations}
    core = [(DIM_SAMPLE, DIM_UNIT)]
    given = []
    for name, argument, array, dims in (
        ("nc3", "weight", weight, (DIM_OUT, DIM_UNIT)),
        ("nc4", "logits", logits, (DIM_SAMPLE, DIM_CLASS)),
    ):
        if array is not None:
            require_dims(argument, require_real(argument, array), dims, "dims")
            _require_classes(argument, array.sizes[DIM_OUT if name == "nc3" else DIM_CLASS], index)
            given.append(name)
            arrays[argument] = array
            core.append(dims)
    require_same_labels(arrays)
    names = (*RESULTS, *given)
    results = apply_kernel(
        functools.partial(neural_collapse_kernel, index=index, options=options, given=tuple(given)),
        list(arrays.values()),
        core,
        output_dims=[()] * len(names),
        output_dtypes=[FLOAT] * len(names),
    )
    return xr.Dataset({n: declared(a, n, **_said(n, options)) for n, a in zip(names, results, strict=True)})


def _said(name: str, options: Options) -> dict[str, str]:
    said: dict[str, str] = {"weighting": options.weighting}
    return said | {"nc1": options.nc1} if name == "nc1" else said


def _on_units(weight: xr.DataArray, activations: xr.DataArray) -> xr.DataArray:
    """Weight of the classifier with its columns on the dim of the units that it reads."""
    require_dims("weight", require_real("weight", weight), (DIM_OUT, DIM_IN), "dims (..., 'out', 'in')")
    units, columns = activations.sizes[DIM_UNIT], weight.sizes[DIM_IN]
    if units != columns:
        raise ValueError(
            f"expected a weight with {units} columns, one for each unit of the (last) layer, came {columns}: "
            "give the weight of the layer that reads these activations"
        )
    own = [c for c in weight.coords if {DIM_IN, DIM_OUT} & set(weight[c].dims)]
    renamed = weight.drop_vars(own).rename({DIM_IN: DIM_UNIT})
    if DIM_UNIT in activations.indexes:
        renamed = renamed.assign_coords({DIM_UNIT: activations[DIM_UNIT]})
    return renamed


def _logits(activations: xr.DataArray, weight: xr.DataArray, bias: xr.DataArray | None) -> xr.DataArray:
    require_same_labels({"activations": activations, "weight": weight})
    if bias is None:
        bias = xr.zeros_like(weight.isel({DIM_UNIT: 0}, drop=True))
    require_dims("bias", require_real("bias", bias), (DIM_OUT,), "dims (..., 'out')")
    bias = bias.drop_vars([c for c in bias.coords if DIM_OUT in bias[c].dims])
    require_same_labels({"activations": activations, "weight": weight, "bias": bias})
    products: xr.DataArray = apply_kernel(
        _affine,
        [activations, weight, bias],
        [(DIM_SAMPLE, DIM_UNIT), (DIM_OUT, DIM_UNIT), (DIM_OUT,)],
        output_dims=[(DIM_SAMPLE, DIM_CLASS)],
        output_sizes={DIM_SAMPLE: activations.sizes[DIM_SAMPLE], DIM_CLASS: weight.sizes[DIM_OUT]},
    )
    if DIM_SAMPLE in activations.indexes:
        products = products.assign_coords({DIM_SAMPLE: activations[DIM_SAMPLE]})
    return products


def _affine(features: FloatArray, weight: FloatArray, bias: FloatArray) -> FloatArray:
    products = features.astype(np.float64, copy=False) @ np.swapaxes(weight, -1, -2)
    return products + bias[..., None, :]


def _require_classes(argument: str, n: int, index: ClassIndex) -> None:
    expected = np.arange(n)
    if index.classes.dtype.kind not in "iub" or not np.array_equal(index.classes, expected):
        what = "rows of weight" if argument == "weight" else "logits"
        raise ValueError(
            f"expected labels 0 ... {n - 1}, one for each of the {n} {what} and each with a sample, came "
            f"{index.classes.tolist()}"
        )


def _require_options(
    weighting: str, nc1: str, rtol: float | None, weight: object | None, bias: object | None
) -> None:
    require_weighting(weighting)
    if nc1 not in ("pinv", "trace_ratio"):
        raise ValueError(f"expected nc1 'pinv' or 'trace_ratio', came {nc1!r}")
    if rtol is not None and not (0 <= rtol < 1 and nc1 == "pinv"):
        raise ValueError(f"expected rtol in [0, 1), with nc1='pinv' only, came {rtol} with {nc1!r}")
    if bias is not None and weight is None:
        raise ValueError("expected the weight that the bias belongs to, came none: pass weight=...")
