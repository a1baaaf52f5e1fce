r"""Alignment of a layer's neural feature matrix with the average gradient outer product.

The neural feature ansatz says that :math:`W_l^T W_l` is proportional to a power
of :math:`\frac1n \sum_i J_l(x_i)^T J_l(x_i)`, with :math:`J_l` the derivative of
the outputs by the input of layer l (A. Radhakrishnan et al., Science 383 (2024)
1461, arXiv:2212.13881; D. Beaglehole et al., arXiv:2402.05271).
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

import numpy as np

from hild_xr.analysis.base.arguments import (
    Dims,
    apply_kernel,
    declared,
    require_dims,
    require_real,
    require_same_labels,
)
from hild_xr.analysis.base.division import divide_or_nan
from hild_xr.analysis.spectra.weight_spectra import matrix_dims
from hild_xr.analysis.subspaces.bases import divide_or_zero, finite_matrices
from hild_xr.variables import DIM_OUT

if TYPE_CHECKING:
    import xarray as xr
    from numpy.typing import NDArray

    from hild_xr.analysis.subspaces.bases import FloatArray

LAG = "_"


def feature_matrix_alignment_kernel(weight: FloatArray, agop: FloatArray) -> FloatArray:
    r"""Cosine between :math:`W^T W` and a matrix, in the Frobenius inner product.

    Parameters
    ----------
    weight
        Array of shape (..., m, n).
    agop
        Array of shape (..., n, n); the leading axes broadcast.

    Returns
    -------
    alignment
        float64 array of shape (...) in [-1, 1]; NaN where an entry is not finite
        or one of the matrices is zero.

    Examples
    --------
    >>> W = np.array([[1.0, 2.0]])
    >>> float(feature_matrix_alignment_kernel(W, 5 * W.T @ W)).__round__(12)
    1.0
    """
    known = finite_matrices(weight) & finite_matrices(agop)
    W, A = (_scaled(M, known) for M in (weight, agop))
    features = np.swapaxes(W, -1, -2) @ W
    inner = (features * A).sum(axis=(-2, -1))
    norms = np.sqrt(np.square(features).sum(axis=(-2, -1)) * np.square(A).sum(axis=(-2, -1)))
    return divide_or_nan(inner, norms, known & (norms > 0)).clip(-1.0, 1.0)


def _scaled(matrices: FloatArray, known: NDArray[np.bool_]) -> FloatArray:
    """Matrices by their largest entry, which keeps products in range; zero where they are not known."""
    matrices = np.where(known[..., None, None], matrices, 0.0).astype(np.float64)
    return divide_or_zero(matrices, np.abs(matrices).max(axis=(-2, -1), keepdims=True))


def feature_matrix_alignment(
    weight: xr.DataArray,
    agop: xr.DataArray,
    *,
    initial: xr.DataArray | None = None,
    row_dims: Dims = DIM_OUT,
    column_dims: Dims = None,
) -> xr.DataArray:
    r"""Cosine between :math:`W^T W` and the average gradient outer product of the layer's input.

    .. math:: \frac{\langle W^T W, M \rangle}{\|W^T W\|_F \, \|M\|_F}

    Nothing is centred but the weights, if `initial` is given: large random
    weights hide what was learned, so that variant takes :math:`W_t - W_0`
    (arXiv:2402.05271).

    Parameters
    ----------
    weight
        Weights with dims (..., out, in), or those of a convolution.
    agop
        Average gradient outer products M, with the input dims of the weight and
        the same ones with an underscore: (..., in, in\_), as recorded.
    initial
        Weights :math:`W_0` that are subtracted, for example
        ``weight.sel(step=0, drop=True)``.
    row_dims, column_dims
        Dims that make up the rows and the columns of the weight; columns by
        default those of in, kd, kh, kw that there are.

    Returns
    -------
    xarray.DataArray
        Numbers in [0, 1] up to rounding, as both matrices are positive
        semidefinite. NaN where entries are missing or a matrix is zero: at the
        start of the variant with `initial`, for one.

    Raises
    ------
    TypeError
        If an array is no DataArray or not real.
    ValueError
        If dims are missing or empty, sizes do not fit, or labels differ.

    Examples
    --------
    >>> import xarray as xr
    >>> W = np.array([[1.0, 2.0]])
    >>> weight, agop = xr.DataArray(W, dims=("out", "in")), xr.DataArray(W.T @ W, dims=("in", "in_"))
    >>> float(feature_matrix_alignment(weight, agop)).__round__(12)
    1.0
    """
    arrays = {"weight": weight, "agop": agop} | ({} if initial is None else {"initial": initial})
    for name, array in arrays.items():
        require_real(name, array)
    rows, columns = matrix_dims(weight, row_dims, column_dims)
    lagged = tuple(dim + LAG for dim in columns)
    for name, array in arrays.items():
        dims = (*columns, *lagged) if name == "agop" else (*rows, *columns)
        require_dims(name, array, dims, "row_dims=... and column_dims")
    sizes, came = ([array.sizes[dim] for dim in dims] for array, dims in ((weight, columns), (agop, lagged)))
    if sizes != came:
        raise ValueError(f"expected agop with sizes {sizes} along {lagged}, those of the weight, came {came}")
    require_same_labels(arrays)
    result = apply_kernel(
        functools.partial(_of_stacked, len(rows), len(columns)),
        list(arrays.values()),
        [(*rows, *columns), (*columns, *lagged), (*rows, *columns)][: len(arrays)],
    )
    return declared(result, "feature_matrix_alignment", centered=initial is not None)


def _of_stacked(
    n_rows: int, n_columns: int, weight: FloatArray, agop: FloatArray, initial: FloatArray | None = None
) -> FloatArray:
    """Flatten the axes of rows and of columns, which the second matrix has twice."""
    if initial is not None:
        weight = np.asarray(weight, dtype=np.float64) - initial
    lead, axes = weight.ndim - n_rows - n_columns, weight.shape
    m, n = math.prod(axes[lead : lead + n_rows]), math.prod(axes[lead + n_rows :])
    agop = agop.reshape(*agop.shape[: agop.ndim - 2 * n_columns], n, n)
    return feature_matrix_alignment_kernel(weight.reshape(*axes[:lead], m, n), agop)
