r"""Numerical, stable and effective rank, and the participation ratio.

With singular values :math:`s_1 \ge s_2 \ge \dots` of a matrix:

* numerical rank: the number of :math:`s_i > \mathrm{rtol}\, s_1`;
* stable rank: :math:`\|A\|_F^2 / \|A\|_2^2 = \sum_i s_i^2 / s_1^2`;
* effective rank: :math:`\exp(-\sum_i p_i \log p_i)`, :math:`p_i = s_i / \sum_j s_j`
  (O. Roy and M. Vetterli, EUSIPCO 2007);
* participation ratio: :math:`(\sum_i s_i)^2 / \sum_i s_i^2`, the number of equal
  eigenvalues that would spread as widely (P. Gao et al., bioRxiv 214262, 2017, of
  the eigenvalues of a covariance).

Each is taken from recorded eigenvalues or singular values (one dim) or from
matrices (two dims). Ranks of k recorded eigenvalues are ranks of these k values:
where they are the largest ones, lower bounds for the matrix. None of them depends
on the scale of the matrix. A regulariser :math:`\beta` moves all eigenvalues and
fakes full rank: given as `regularizer` it is subtracted, as in
:func:`hild_xr.analysis.outliers`, and :math:`s_i = |\lambda_i - \beta|`.
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
from hild_xr.analysis.base.checks import real_number
from hild_xr.analysis.spectra.outliers import one_each, sizes_from
from hild_xr.analysis.spectra.recorded import n_recorded
from hild_xr.analysis.subspaces.bases import divide_or_zero, precision, singular_values
from hild_xr.variables import DIM_EIG

if TYPE_CHECKING:
    from collections.abc import Callable

    from hild_xr.analysis.subspaces.bases import FloatArray, IntArray

MatrixDims = str | tuple[str, str]


UNKNOWN = -1
"""Numerical rank where the spectrum was not recorded."""


# ---------------------------------------------------------------------------- kernels


def numerical_rank_kernel(values: FloatArray, rtol: float) -> IntArray:
    """Count the values above rtol times the largest absolute one.

    Parameters
    ----------
    values
        Eigenvalues or singular values of shape (..., n) in any order.
    rtol
        Relative tolerance.

    Returns
    -------
    rank
        Integer array of shape (...): 0 for a zero matrix, -1 where the values
        are missing (:func:`hild_xr.analysis.spectra.recorded.n_recorded`).

    Examples
    --------
    >>> int(numerical_rank_kernel(np.array([2.0, -1.0, 1e-9]), rtol=1e-6))
    2
    """
    s, usable = _scaled(values)
    return np.where(usable, (s > rtol).sum(axis=-1), UNKNOWN)


def stable_rank_kernel(values: FloatArray) -> FloatArray:
    """Sum of squares divided by the largest square.

    Parameters
    ----------
    values
        Eigenvalues or singular values of shape (..., n) in any order.

    Returns
    -------
    rank
        float64 array of shape (...) in [1, n]; NaN for a zero matrix and where
        the values are missing.

    Examples
    --------
    >>> float(stable_rank_kernel(np.array([2.0, 1.0, 1.0])))
    1.5
    """
    s, usable = _scaled(values)
    squares = np.square(s).sum(axis=-1)
    return np.where(usable & (squares > 0), squares, np.nan)


def effective_rank_kernel(values: FloatArray) -> FloatArray:
    """Exponential of the entropy of the values divided by their sum.

    Parameters
    ----------
    values
        Eigenvalues or singular values of shape (..., n) in any order.

    Returns
    -------
    rank
        float64 array of shape (...) in [1, n]; NaN for a zero matrix and where
        the values are missing.

    Examples
    --------
    >>> float(effective_rank_kernel(np.array([3.0, 3.0, 0.0]))).__round__(12)
    2.0
    """
    s, usable = _scaled(values)
    total = s.sum(axis=-1, keepdims=True)
    p = divide_or_zero(s, total)
    entropy = -(p * np.log(np.where(p > 0, p, 1.0))).sum(axis=-1)
    return np.where(usable & (total[..., 0] > 0), np.exp(entropy), np.nan)


def participation_ratio_kernel(values: FloatArray) -> FloatArray:
    """Squared sum of the absolute values by the sum of their squares.

    Parameters
    ----------
    values
        Eigenvalues or singular values of shape (..., n) in any order.

    Returns
    -------
    ratio
        float64 array of shape (...) in [1, n]; NaN for a zero matrix and where
        the values are missing.

    Examples
    --------
    >>> float(participation_ratio_kernel(np.array([2.0, 1.0, 1.0]))).__round__(12)
    2.666666666667
    """
    s, usable = _scaled(values)
    squares = np.square(s).sum(axis=-1)
    ratio = divide_or_zero(np.square(s.sum(axis=-1)), squares)
    return np.where(usable & (squares > 0), ratio, np.nan)


def _scaled(values: FloatArray) -> tuple[FloatArray, Any]:
    """Absolute values by the largest one, so that squares stay in range; missing ones are zero."""
    _, usable = n_recorded(values)
    s = np.abs(np.where(np.isfinite(values), values, 0.0).astype(np.float64))
    return divide_or_zero(s, s.max(axis=-1, keepdims=True, initial=0.0)), usable


# ---------------------------------------------------------------------------- labelled


def numerical_rank(
    array: xr.DataArray,
    dim: MatrixDims = DIM_EIG,
    *,
    rtol: float | None = None,
    regularizer: float | xr.DataArray = 0.0,
) -> xr.DataArray:
    r"""Count the singular values above `rtol` times the largest.

    Of k recorded eigenvalues it is the rank of these k values, a lower bound for the matrix.

    Parameters
    ----------
    array
        Eigenvalues or singular values along the dim `dim`, or matrices over the
        two dims `dim`, for example ``("out", "in")``.
    dim
        One dim name, or two.
    rtol
        Relative tolerance. The default is that of ``numpy.linalg.matrix_rank``,
        the larger size of the matrix times eps of the dtype. Of eigenvalues
        found by iteration the small ones are not that accurate: pass the
        tolerance of the solver.
    regularizer
        The :math:`\beta` that shifts all eigenvalues, number or array, which is
        subtracted from them; for eigenvalues only.

    Returns
    -------
    xarray.DataArray
        Integers on the dims that are left: 0 for a zero matrix, -1 where values
        are missing (NaN before a number, or nothing but NaN) or a matrix is not
        finite.

    Raises
    ------
    TypeError
        If an array is no DataArray or not real, or an option no real number.
    ValueError
        If a dim is missing or has size 0, rtol is not in [0, 1), labels differ, or there
        is a regulariser of matrices.

    Examples
    --------
    >>> weight = xr.DataArray(np.diag([2.0, 1.0, 0.0]), dims=("out", "in"))
    >>> int(numerical_rank(weight, ("out", "in")))
    2
    """
    return rank(array, dim, rtol=rtol, regularizer=regularizer)["numerical_rank"]


def stable_rank(
    array: xr.DataArray, dim: MatrixDims = DIM_EIG, *, regularizer: float | xr.DataArray = 0.0
) -> xr.DataArray:
    r"""Squared Frobenius norm by squared spectral norm, :math:`\sum_i s_i^2 / s_1^2`.

    Parameters
    ----------
    array, dim, regularizer
        As in :func:`numerical_rank`.

    Returns
    -------
    xarray.DataArray
        Values of at least 1; NaN for a zero matrix and where values are missing.

    Raises
    ------
    TypeError, ValueError
        As :func:`numerical_rank`.

    Examples
    --------
    >>> weight = xr.DataArray(np.diag([2.0, 1.0, 1.0]), dims=("out", "in"))
    >>> float(stable_rank(weight, ("out", "in")))
    1.5
    """
    return rank(array, dim, regularizer=regularizer)["stable_rank"]


def effective_rank(
    array: xr.DataArray, dim: MatrixDims = DIM_EIG, *, regularizer: float | xr.DataArray = 0.0
) -> xr.DataArray:
    r"""Exponential of the entropy of :math:`p_i = s_i / \sum_j s_j` (Roy and Vetterli 2007).

    Parameters
    ----------
    array, dim, regularizer
        As in :func:`numerical_rank`.

    Returns
    -------
    xarray.DataArray
        Values of at least 1; NaN for a zero matrix and where values are missing.

    Raises
    ------
    TypeError, ValueError
        As :func:`numerical_rank`.

    Examples
    --------
    >>> eigenvalues = xr.DataArray([1.0, 1.0, 1.0, 0.0], dims="eig")
    >>> float(effective_rank(eigenvalues)).__round__(12)
    3.0
    """
    return rank(array, dim, regularizer=regularizer)["effective_rank"]


def participation_ratio(
    array: xr.DataArray, dim: MatrixDims = DIM_EIG, *, regularizer: float | xr.DataArray = 0.0
) -> xr.DataArray:
    r"""Participation ratio :math:`(\sum_i |\lambda_i|)^2 / \sum_i \lambda_i^2`.

    Absolute values are summed, as for the other ranks. With signs it would be
    the square of :func:`hild_xr.analysis.trace_to_frobenius`.

    Parameters
    ----------
    array, dim, regularizer
        As in :func:`numerical_rank`. For the dimension of a cloud of features
        pass the eigenvalues of their covariance: from a matrix of features it is
        taken of the singular values, not of their squares.

    Returns
    -------
    xarray.DataArray
        Values of at least 1; NaN for a zero matrix and where values are missing.

    Raises
    ------
    TypeError, ValueError
        As :func:`numerical_rank`.

    Examples
    --------
    >>> eigenvalues = xr.DataArray([1.0, 1.0, 1.0, 0.0], dims="eig")
    >>> float(participation_ratio(eigenvalues))
    3.0
    """
    return rank(array, dim, regularizer=regularizer)["participation_ratio"]


def rank(
    array: xr.DataArray,
    dim: MatrixDims = DIM_EIG,
    *,
    rtol: float | None = None,
    regularizer: float | xr.DataArray = 0.0,
) -> xr.Dataset:
    """All four ranks of this module at once, from one singular value decomposition.

    Parameters
    ----------
    array, dim, rtol, regularizer
        As in :func:`numerical_rank`.

    Returns
    -------
    xarray.Dataset
        ``numerical_rank``, ``stable_rank``, ``effective_rank`` and ``participation_ratio``.

    Raises
    ------
    TypeError, ValueError
        As :func:`numerical_rank`.

    Examples
    --------
    >>> eigenvalues = xr.DataArray([2.0, 1.0, 1.0], dims="eig")
    >>> {name: round(float(value), 3) for name, value in rank(eigenvalues).items()}
    {'numerical_rank': 3.0, 'stable_rank': 1.5, 'effective_rank': 2.828, 'participation_ratio': 2.667}
    """
    dims = _dims(require_real("array", array), dim)
    if len(dims) == 2 and (isinstance(regularizer, xr.DataArray) or regularizer != 0):
        raise ValueError(
            f"expected no regularizer of matrices over {dims}, came {regularizer}: it shifts eigenvalues; "
            "subtract it from the diagonal of a symmetric matrix, or pass its eigenvalues"
        )
    arrays = {"array": array, "regularizer": one_each("regularizer", regularizer, dims[0])}
    require_same_labels(arrays)
    if rtol is None:
        rtol = max(array.sizes[d] for d in dims) * precision(np.empty(0, dtype=array.dtype))
    rtol = real_number("rtol", rtol)
    if not 0 <= rtol < 1:
        raise ValueError(f"expected rtol in [0, 1), a fraction of the largest singular value, came {rtol}")
    kernels: dict[str, tuple[Callable[..., Any], np.dtype[Any]]] = {
        "numerical_rank": (functools.partial(numerical_rank_kernel, rtol=rtol), np.dtype(np.int64)),
        "stable_rank": (stable_rank_kernel, FLOAT),
        "effective_rank": (effective_rank_kernel, FLOAT),
        "participation_ratio": (participation_ratio_kernel, FLOAT),
    }
    results = apply_kernel(
        functools.partial(_ranks, [kernel for kernel, _ in kernels.values()], len(dims) == 2),
        list(arrays.values()),
        [dims, ()],
        output_dims=[()] * len(kernels),
        output_dtypes=[dtype for _, dtype in kernels.values()],
    )
    said = {"numerical_rank": {"rtol": rtol}}
    named = zip(kernels, results, strict=True)
    return xr.Dataset({name: declared(result, name, **said.get(name, {})) for name, result in named})


def _ranks(
    kernels: list[Callable[..., Any]], matrices: bool, values: FloatArray, beta: FloatArray
) -> tuple[Any, ...]:
    if matrices:
        values = singular_values(values)
    else:
        # without a regulariser nothing is subtracted, so nothing is rounding
        values = np.where((beta == 0)[..., None], values, sizes_from(values, beta))
    return tuple(kernel(values) for kernel in kernels)


def _dims(array: xr.DataArray, dim: MatrixDims) -> tuple[str, ...]:
    dims = (dim,) if isinstance(dim, str) else tuple(dim)
    if len(dims) not in (1, 2) or len(set(dims)) != len(dims):
        raise ValueError(
            f"expected one dim of singular values or two different dims of matrices, came {dim!r}"
        )
    require_dims("array", array, dims, "dim")
    if math.prod(array.sizes[d] for d in dims) == 0:
        raise ValueError(f"expected at least one value along {dims}, came sizes {dict(array.sizes)}")
    return dims
