r"""Effective number of parameters: how many directions of the weights the data determine.

.. math::

   N_{\mathrm{eff}}(\alpha) = \sum_{\lambda_i > 0} \frac{\lambda_i}{\lambda_i + \alpha}

over the positive eigenvalues of the Hessian: a direction counts fully where the
curvature is far above :math:`\alpha`, and not at all far below it (D. J. C. MacKay, Neural
Comput. 4 (1992) 448; W. J. Maddox, G. Benton and A. G. Wilson, arXiv:2003.02139). For
ridge regression with the penalty :math:`\alpha` it is the trace of the hat matrix.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

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
from hild_xr.analysis.subspaces.bases import precision
from hild_xr.variables import DIM_EIG

if TYPE_CHECKING:
    from hild_xr.analysis.subspaces.bases import FloatArray

ZERO = 8.0
"""Multiple of eps |lambda|_max up to which an eigenvalue is rounding and counts as zero."""


def effective_parameters_kernel(
    eigenvalues: FloatArray, alpha: FloatArray, regularizer: FloatArray | float = 0.0
) -> FloatArray:
    """Sum of lambda / (lambda + alpha) over the positive ones of lambda = eigenvalue - regularizer.

    Parameters
    ----------
    eigenvalues
        Array of shape (..., n) in any order.
    alpha, regularizer
        Arrays that broadcast with the shape (...).

    Returns
    -------
    number
        float64 array of shape (...); NaN where the values are missing
        (:func:`hild_xr.analysis.spectra.recorded.n_recorded`) or alpha is NaN or negative.

    Examples
    --------
    >>> float(effective_parameters_kernel(np.array([3.0, 1.0, -2.0]), np.array(1.0)))
    1.25
    """
    _, usable = n_recorded(eigenvalues)
    finite = np.isfinite(eigenvalues)
    values = np.where(finite, eigenvalues, 0.0).astype(np.float64)
    rounding = ZERO * precision(eigenvalues) * np.abs(values).max(axis=-1, keepdims=True, initial=0.0)
    values = values - np.asarray(regularizer, dtype=np.float64)[..., None]
    positive = finite & (values > rounding)
    alpha = np.asarray(alpha, dtype=np.float64)
    defined = alpha >= 0
    total = np.where(positive, values, 1.0) + np.where(defined, alpha, 0.0)[..., None]
    number = np.where(positive, values / total, 0.0).sum(axis=-1)
    return np.where(usable & defined & ~np.isnan(regularizer), number, np.nan)


def effective_parameters(
    eigenvalues: xr.DataArray,
    alpha: float | xr.DataArray,
    *,
    regularizer: float | xr.DataArray = 0.0,
    dim: str = DIM_EIG,
) -> xr.DataArray:
    r"""Effective number of parameters, :math:`\sum_{\lambda_i > 0} \lambda_i / (\lambda_i + \alpha)`.

    Parameters
    ----------
    eigenvalues
        Eigenvalues along `dim`, in any order. NaN at the end means that a block has no
        more. Of leading eigenvalues alone the sum is a lower bound: what was not recorded
        adds at most :math:`\lambda_k / (\lambda_k + \alpha)` for each direction.
    alpha
        Prior precision, in the unit of the eigenvalues and at least 0: number, or array
        without `dim`. Values along a dim of their own give a curve. For
        :math:`\alpha \to 0` the result is the number of positive eigenvalues.
    regularizer
        The :math:`\beta` that shifts all eigenvalues, number or array: it is taken off first.
    dim
        Dim of the eigenvalues.

    Returns
    -------
    xarray.DataArray
        Numbers between 0 and the number of eigenvalues. Eigenvalues at the rounding
        of their dtype count as zero. NaN where the spectrum is missing (nothing but NaN, or NaN
        before a number).

    Raises
    ------
    TypeError
        If an array is no DataArray or not real.
    ValueError
        If `dim` is missing, alpha or the regulariser has it, alpha is negative (of a lazy
        alpha: NaN), or labels differ.

    Examples
    --------
    >>> eigenvalues = xr.DataArray([3.0, 1.0, 0.0], dims="eig")
    >>> effective_parameters(eigenvalues, xr.DataArray([0.0, 1.0], dims="prior")).values
    array([2.  , 1.25])
    """
    require_dims("eigenvalues", require_real("eigenvalues", eigenvalues), (dim,), "dim")
    arrays = {"eigenvalues": eigenvalues}
    for name, value in {"alpha": alpha, "regularizer": regularizer}.items():
        array = require_real(name, value if isinstance(value, xr.DataArray) else xr.DataArray(float(value)))
        if dim in array.dims:
            raise ValueError(f"expected one {name} for a spectrum, came one with dim {dim!r}: {array.dims}")
        arrays[name] = array
    if arrays["alpha"].chunks is None and bool((arrays["alpha"] < 0).any()):
        raise ValueError(f"expected alpha >= 0, a prior precision, came {arrays['alpha'].values}")
    require_same_labels(arrays)
    result = apply_kernel(effective_parameters_kernel, list(arrays.values()), [(dim,), (), ()])
    return declared(result, "effective_parameters")
