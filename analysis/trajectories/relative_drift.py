r"""Relative drift: how far weights or kernels have moved since a reference step.

.. math:: \|A_t - A_0\|_F \, / \, \|A_0\|_F

of weights, of conjugate and of tangent kernels (Z. Wang et al., NeurIPS 2023,
arXiv:2211.06506). In the lazy regime it stays small.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np

from hild_xr.analysis.base.arguments import (
    Dims,
    apply_kernel,
    declared,
    require_dims,
    require_real,
    vector_dims_of,
)
from hild_xr.analysis.base.division import divide_or_nan
from hild_xr.variables import DIM_STEP

if TYPE_CHECKING:
    import xarray as xr

    from hild_xr.analysis.subspaces.bases import FloatArray


# ---------------------------------------------------------------------------- kernel


def relative_drift_kernel(A: FloatArray, reference: FloatArray, *, n_axes: int = 1) -> FloatArray:
    """Norm of the difference by the norm of the reference, over the last axes.

    Parameters
    ----------
    A, reference
        Arrays whose last `n_axes` axes agree; the leading axes broadcast.
    n_axes
        Number of axes that the norms go over.

    Returns
    -------
    drift
        float64 array over the leading axes: NaN where an entry is not finite or
        the reference is zero.

    Examples
    --------
    >>> float(relative_drift_kernel(np.array([3.0, 5.0]), np.array([3.0, 4.0])))
    0.2
    """
    axes = tuple(range(-n_axes, 0))
    A, reference = (np.asarray(a, dtype=np.float64) for a in (A, reference))
    known = np.isfinite(A).all(axis=axes) & np.isfinite(reference).all(axis=axes)
    # entries by the largest one of the reference: squares then stay in range
    size = np.abs(reference).max(axis=axes, keepdims=True, initial=0.0)
    known = known & (size > 0).all(axis=axes)
    size = np.where(np.isfinite(size) & (size > 0), size, 1.0)
    moved = np.sqrt(np.square((A - reference) / size).sum(axis=axes))
    norm = np.sqrt(np.square(reference / size).sum(axis=axes))
    return divide_or_nan(moved, norm, known)


# ---------------------------------------------------------------------------- labelled


def relative_drift(
    array: xr.DataArray, reference: object, *, dim: str = DIM_STEP, vector_dims: Dims = None
) -> xr.DataArray:
    r"""Frobenius norm of the change since a reference step, by that of the reference.

    Parameters
    ----------
    array
        Weights or kernels with dims (..., `dim`, vector dims) in any order.
    reference
        Label along `dim`, for example the step 0.
    dim
        Dim along which the reference lies.
    vector_dims
        Dims that the norm goes over: ``["out", "in"]`` for weights, ``["sample",
        "sample_"]`` for kernels; by default the attr ``vector_dims``.

    Returns
    -------
    xarray.DataArray
        :math:`\|A_t - A_0\|_F / \|A_0\|_F`; the label of the reference stands in
        the attr ``reference``. NaN where a record or the reference is missing,
        or the reference is zero.

    Raises
    ------
    TypeError
        If the array is no DataArray or not real.
    KeyError
        If there is no such label.
    ValueError
        If dims are missing or unknown, the attr names one of the two dims of matrices only, or
        the label is not unique.

    Examples
    --------
    >>> import xarray as xr
    >>> weight = xr.DataArray([[3.0, 4.0], [3.0, 5.0]], dims=("step", "in"), coords={"step": [0, 10]})
    >>> relative_drift(weight, 0, vector_dims="in").values
    array([0. , 0.2])
    """
    vector = vector_dims_of({"array": require_real("array", array)}, vector_dims)
    require_dims("array", array, (dim,), "dim")
    half = [d for d in vector if f"{d}_" in array.dims and f"{d}_" not in vector]
    if vector_dims is None and half:
        # stores of older versions name one side of the average gradient outer product only
        raise ValueError(
            f"expected both dims of a matrix in the attr vector_dims, came {list(vector)} of {array.dims}; "
            f"pass vector_dims={[*vector, *(f'{d}_' for d in half)]}"
        )
    if dim in vector:
        raise ValueError(f"expected dim={dim!r} beside the vector dims, came {list(vector)}")
    if array.indexes.get(dim) is None:
        raise ValueError(
            f"expected labels along {dim!r}, came none; assign them, or use isel to take a position"
        )
    try:
        at = array.sel({dim: reference}, drop=True)
    except KeyError:
        raise KeyError(
            f"expected a label of dim {dim!r} as reference, came {reference!r}; "
            f"the labels are {array.indexes[dim].tolist()}"
        ) from None
    if dim in at.dims:
        raise ValueError(f"expected one label {reference!r} along {dim!r}, came {at.sizes[dim]}")
    result = apply_kernel(
        functools.partial(relative_drift_kernel, n_axes=len(vector)), [array, at], [vector, vector]
    )
    return declared(result, "relative_drift", reference=reference)
