r"""Edge of stability: the sharpness beside the threshold of the optimizer.

On a quadratic of curvature a, gradient descent with the learning rate :math:`\eta` diverges if
and only if :math:`a > 2 / \eta`. Full-batch training drives the sharpness, the largest
eigenvalue of the training loss's Hessian, up to such a threshold and stays there
(J. Cohen et al., arXiv:2103.00065 and, for preconditioned methods, arXiv:2207.14484):

=============  ===================================================================
``gd``         :math:`2 / \eta`
``polyak``     :math:`(2 + 2 \beta) / \eta`, :math:`\beta` the momentum (heavy ball)
``nesterov``   :math:`(2 + 2 \beta) / (\eta (1 + 2 \beta))`
``adam``       :math:`(2 + 2 \beta_1) / ((1 - \beta_1) \eta)`, for the largest eigenvalue of
               :math:`P^{-1} H`, P the diagonal preconditioner
=============  ===================================================================
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import xarray as xr

from hild_xr.analysis.base.arguments import (
    apply_kernel,
    declared,
    require_dims,
    require_real,
    require_same_labels,
)
from hild_xr.analysis.spectra.recorded import n_recorded
from hild_xr.analysis.subspaces.bases import finite_matrices
from hild_xr.analysis.trajectories.drift import require_increasing_labels
from hild_xr.variables import DIM_EIG, DIM_PARAM, DIM_STEP

if TYPE_CHECKING:
    from hild_xr.analysis.subspaces.bases import FloatArray

Optimizer = Literal["gd", "polyak", "nesterov", "adam"]


# ---------------------------------------------------------------------------- kernels


def sharpness_kernel(eigenvalues: FloatArray) -> FloatArray:
    """Largest (not largest absolute) eigenvalue of stacked spectra.

    Parameters
    ----------
    eigenvalues
        Array of shape (..., n) in any order.

    Returns
    -------
    sharpness
        float64 array of shape (...); NaN where the values are missing
        (:func:`hild_xr.analysis.spectra.recorded.n_recorded`).

    Examples
    --------
    >>> sharpness_kernel(np.array([[-3.0, 2.0, np.nan], [np.nan, np.nan, np.nan]]))
    array([ 2., nan])
    """
    _, usable = n_recorded(eigenvalues)
    values = np.where(np.isfinite(eigenvalues), eigenvalues, -np.inf).astype(np.float64)
    return np.where(usable, values.max(axis=-1, initial=-np.inf), np.nan)


def preconditioned_sharpness_kernel(H: FloatArray, P: FloatArray) -> FloatArray:
    """Largest eigenvalue of P^-1 H for stacked symmetric matrices and positive diagonals.

    Parameters
    ----------
    H
        Array of shape (..., p, p).
    P
        Array of shape (..., p): the diagonal.

    Returns
    -------
    sharpness
        float64 array of shape (...); NaN where H or P is not finite or P not positive.

    Examples
    --------
    >>> float(preconditioned_sharpness_kernel(np.diag([4.0, 1.0]), np.array([16.0, 0.25])))
    4.0
    """
    usable = finite_matrices(H) & (np.isfinite(P) & (P > 0)).all(axis=-1)
    root = np.sqrt(np.where(usable[..., None], P, 1.0).astype(np.float64))
    scaled = np.where(usable[..., None, None], H, 0.0) / (root[..., :, None] * root[..., None, :])
    return np.where(usable, np.linalg.eigvalsh(scaled)[..., -1], np.nan)


def non_monotone_fraction_kernel(loss: FloatArray) -> FloatArray:
    """Fraction of recorded values that are larger than the recorded value before.

    Parameters
    ----------
    loss
        Array of shape (..., s). NaN marks missing records, which are skipped.

    Returns
    -------
    fraction
        float64 array of shape (...); NaN with fewer than two records.

    Examples
    --------
    >>> float(non_monotone_fraction_kernel(np.array([3.0, 1.0, np.nan, 2.0])))
    0.5
    """
    recorded = ~np.isnan(loss)
    before = value_before(loss)
    pairs = (recorded & ~np.isnan(before)).sum(axis=-1)
    rises = (recorded & (loss > before)).sum(axis=-1)
    return np.where(pairs > 0, rises / np.maximum(pairs, 1), np.nan)


def value_before(values: FloatArray) -> FloatArray:
    """Last value along the last axis before each one that is not NaN; NaN where there is none.

    Examples
    --------
    >>> value_before(np.array([3.0, np.nan, 2.0]))
    array([nan,  3.,  3.])
    """
    index = np.arange(values.shape[-1])
    last = np.maximum.accumulate(np.where(np.isnan(values), -1, index), axis=-1)
    filled = np.take_along_axis(values, np.maximum(last, 0), axis=-1) if values.size else values
    filled = np.where(last >= 0, filled, np.nan)
    before: FloatArray = np.concatenate([np.full((*values.shape[:-1], 1), np.nan), filled], axis=-1)
    return before[..., :-1]


def _first_crossing(ratio: FloatArray, labels: FloatArray) -> FloatArray:
    crossed = ratio >= 1  # NaN is not
    first = np.where(crossed, np.arange(crossed.shape[-1]), len(labels)).min(axis=-1, initial=len(labels))
    crossing: FloatArray = np.append(labels, np.nan)[first]
    return crossing


# ---------------------------------------------------------------------------- labelled


def sharpness(eigenvalues: xr.DataArray, *, dim: str = DIM_EIG) -> xr.DataArray:
    """Sharpness: the largest eigenvalue, whatever the absolute value of negative ones.

    Parameters
    ----------
    eigenvalues
        Eigenvalues along `dim`, in any order.
    dim
        Dim of the eigenvalues.

    Returns
    -------
    xarray.DataArray
        NaN where the spectrum is missing. A block whose recorded eigenvalues are all
        negative gives the largest recorded one.

    Raises
    ------
    TypeError
        If the array is no DataArray or not real.
    ValueError
        If `dim` is missing.

    Examples
    --------
    >>> float(sharpness(xr.DataArray([-5.0, 3.0, 1.0], dims="eig")))
    3.0
    """
    require_dims("eigenvalues", require_real("eigenvalues", eigenvalues), (dim,), "dim")
    return declared(apply_kernel(sharpness_kernel, [eigenvalues], [(dim,)]), "sharpness")


def preconditioned_sharpness(
    matrix: xr.DataArray,
    preconditioner: xr.DataArray,
    *,
    dims: tuple[str, str] = (DIM_PARAM, DIM_PARAM + "_"),
) -> xr.DataArray:
    r"""Sharpness of a preconditioned method: largest eigenvalue of :math:`P^{-1} H` (arXiv:2207.14484).

    It is that of the symmetric :math:`P^{-1/2} H P^{-1/2}`. Of Adam the preconditioner
    is :math:`(\sqrt{\hat v} + \epsilon)` with the bias-corrected second moment, times
    :math:`1 - \beta_1^t`.

    Parameters
    ----------
    matrix
        Symmetric blocks H with the two dims `dims`; their lower triangle is read.
    preconditioner
        Positive diagonals P with the first of the two dims.
    dims
        Dims of a block.

    Returns
    -------
    xarray.DataArray
        NaN where H or P is not finite or P not positive.

    Raises
    ------
    TypeError
        If an array is no DataArray or not real.
    ValueError
        If dims are missing or have size 0, blocks are not square, or labels differ.

    Examples
    --------
    >>> H = xr.DataArray(np.diag([4.0, 1.0]), dims=("param", "param_"))
    >>> float(preconditioned_sharpness(H, xr.DataArray([16.0, 0.25], dims="param")))
    4.0
    """
    arrays = {"matrix": matrix, "preconditioner": preconditioner}
    for (name, array), needed in zip(arrays.items(), (dims, dims[:1]), strict=True):
        require_dims(name, require_real(name, array), needed, "dims")
    require_same_labels(arrays)
    p, q = (matrix.sizes[d] for d in dims)
    if p != q or p == 0:
        raise ValueError(f"expected square blocks over {dims}, came sizes {p} and {q}")
    result = apply_kernel(preconditioned_sharpness_kernel, list(arrays.values()), [dims, dims[:1]])
    return declared(result, "sharpness")


def stability_threshold(
    learning_rate: float | xr.DataArray, *, optimizer: Optimizer = "gd", momentum: float | None = None
) -> xr.DataArray:
    r"""Sharpness above which the optimizer diverges on a quadratic; see the table of the module.

    Parameters
    ----------
    learning_rate
        The :math:`\eta`, number or array, such as the recorded ``learning_rate``.
    optimizer
        One of the table.
    momentum
        The :math:`\beta` (of Adam :math:`\beta_1`) in [0, 1); for "gd" none.

    Returns
    -------
    xarray.DataArray
        In the unit of the Hessian's eigenvalues; NaN where the learning rate is not positive.

    Raises
    ------
    TypeError
        If the learning rate is not real.
    ValueError
        If the optimizer is unknown, or the momentum does not fit it.

    Examples
    --------
    >>> float(stability_threshold(0.1)), float(stability_threshold(0.1, optimizer="polyak", momentum=0.5))
    (20.0, 30.0)
    """
    given = learning_rate if isinstance(learning_rate, xr.DataArray) else xr.DataArray(learning_rate)
    rate = require_real("learning_rate", given)
    factor = _threshold_factor(optimizer, momentum)
    result = factor / rate.where(rate > 0)
    said = {"optimizer": optimizer, **({} if momentum is None else {"momentum": momentum})}
    return declared(result, "stability_threshold", **said)


def edge_of_stability(
    sharpness: xr.DataArray,
    learning_rate: float | xr.DataArray,
    loss: xr.DataArray | None = None,
    *,
    optimizer: Optimizer = "gd",
    momentum: float | None = None,
    dim: str = DIM_STEP,
) -> xr.Dataset:
    r"""Sharpness by the threshold of stability, where it is first reached, and how often the loss rises.

    Parameters
    ----------
    sharpness
        Largest eigenvalue of the full-batch Hessian with the dim `dim`, labels increasing
        (:func:`sharpness`; for "adam" :func:`preconditioned_sharpness`).
    learning_rate, optimizer, momentum
        As in :func:`stability_threshold`.
    loss
        Training loss with the dim `dim`; its cadence may be another one.
    dim
        Dim of the records.

    Returns
    -------
    xarray.Dataset
        ``stability_threshold``, ``sharpness_ratio``
            Threshold, and sharpness by it: 1 at the edge of stability.
        ``first_crossing``
            Label of the first record with a ratio of at least 1; NaN if there is none.
        ``non_monotone_fraction``
            With `loss` only: fraction of recorded losses above the one recorded before.

    Raises
    ------
    TypeError
        If an array is no DataArray or not real.
    ValueError
        If `dim` is missing, labels differ, do not increase or are no numbers, and as
        :func:`stability_threshold`.

    Examples
    --------
    >>> sharp = xr.DataArray([5.0, 15.0, 21.0], dims="step", coords={"step": [0, 50, 100]})
    >>> found = edge_of_stability(sharp, 0.1)
    >>> found.sharpness_ratio.values, float(found.first_crossing)
    (array([0.25, 0.75, 1.05]), 100.0)
    """
    require_dims("sharpness", require_real("sharpness", sharpness), (dim,), "dim")
    require_increasing_labels("sharpness", sharpness, dim)
    threshold = stability_threshold(learning_rate, optimizer=optimizer, momentum=momentum)
    require_same_labels({"sharpness": sharpness, "learning_rate": threshold})
    ratio = apply_kernel(np.divide, [sharpness.astype(np.float64), threshold], [(), ()])
    labels = numeric_labels(sharpness, dim)
    first = apply_kernel(functools.partial(_first_crossing, labels=labels), [ratio], [(dim,)])
    results = {"sharpness_ratio": ratio, "first_crossing": first}
    if loss is not None:
        require_dims("loss", require_real("loss", loss), (dim,), "dim")
        require_increasing_labels("loss", loss, dim)
        results["non_monotone_fraction"] = apply_kernel(non_monotone_fraction_kernel, [loss], [(dim,)])
    named = {name: declared(array, name, **_said(threshold)) for name, array in results.items()}
    return xr.Dataset({"stability_threshold": threshold, **named})


def numeric_labels(array: xr.DataArray, dim: str) -> FloatArray:
    """Labels along a dim as float64; positions where it has none.

    Raises
    ------
    ValueError
        If the labels are no real numbers.

    Examples
    --------
    >>> numeric_labels(xr.DataArray([1.0, 2.0], coords={"step": [0, 10]}), "step")
    array([ 0., 10.])
    """
    index = array.indexes.get(dim)
    labels: Any = np.arange(array.sizes[dim]) if index is None else index.to_numpy()
    if not (np.issubdtype(labels.dtype, np.number) and np.isrealobj(labels)):
        raise ValueError(f"expected numbers as labels of dim {dim!r}, came {labels.dtype}")
    return np.asarray(labels, dtype=np.float64)


def _said(threshold: xr.DataArray) -> dict[str, object]:
    return {name: threshold.attrs[name] for name in ("optimizer", "momentum") if name in threshold.attrs}


def _threshold_factor(optimizer: str, momentum: float | None) -> float:
    """Threshold times learning rate."""
    if optimizer not in get_args(Optimizer):
        raise ValueError(
            f"expected optimizer {' or '.join(map(repr, get_args(Optimizer)))}, came {optimizer!r}"
        )
    if (momentum is None) != (optimizer == "gd"):
        raise ValueError(
            f"expected momentum=... with every optimizer but 'gd', came {optimizer!r} and momentum={momentum}"
        )
    beta = 0.0 if momentum is None else momentum
    if not 0 <= beta < 1:
        raise ValueError(f"expected momentum in [0, 1), came {momentum}")
    divisor = {"nesterov": 1 + 2 * beta, "adam": 1 - beta}.get(optimizer, 1.0)
    return (2 + 2 * beta) / divisor
