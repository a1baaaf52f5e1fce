r"""Kernels of a network on a fixed set of samples: conjugate kernel, alignment, CKA.

With the activations :math:`\Phi` (samples x h) of a layer the conjugate kernel is
:math:`K = \Phi \Phi^T / h`; the neural tangent kernel is recorded as it is.
How either moves is :func:`hild_xr.analysis.relative_drift`, how far it has
turned to the targets :func:`kernel_alignment` (N. Cristianini et al., NIPS
2001; arXiv:2211.06506), how far its spike has :func:`spike_alignment`, and how
alike two layers or two runs are :func:`cka` (S. Kornblith, M. Norouzi, H. Lee
and G. Hinton, ICML 2019, arXiv:1905.00414).
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np

from hild_xr.analysis.base.arguments import (
    apply_kernel,
    declared,
    require_same_labels,
)
from hild_xr.analysis.base.checks import require_values
from hild_xr.analysis.base.division import divide_or_nan
from hild_xr.analysis.subspaces.bases import divide_or_zero, finite_matrices
from hild_xr.variables import DIM_SAMPLE, DIM_SINGULAR, DIM_UNIT

if TYPE_CHECKING:
    import xarray as xr

    from hild_xr.analysis.subspaces.bases import FloatArray

LAG = "_"

KERNEL_DIMS = (DIM_SAMPLE, DIM_SAMPLE + LAG)

CONSTANT = 8.0
"""Multiple of eps times the size of the features below which centred features are rounding."""


# ---------------------------------------------------------------------------- kernels


def conjugate_kernel_kernel(activations: FloatArray) -> FloatArray:
    """Product of the activations on all pairs of samples, mean over the units.

    Parameters
    ----------
    activations
        Array of shape (..., samples, units).

    Returns
    -------
    kernel
        float64 array of shape (..., samples, samples).

    Examples
    --------
    >>> conjugate_kernel_kernel(np.array([[1.0, 1.0], [2.0, 0.0]]))
    array([[1., 1.],
           [1., 2.]])
    """
    features = np.asarray(activations, dtype=np.float64)
    kernel: FloatArray = features @ np.swapaxes(features, -1, -2) / features.shape[-1]
    return kernel


def kernel_alignment_kernel(kernel: FloatArray, targets: FloatArray) -> FloatArray:
    r"""Cosine between K and :math:`Y Y^T` in the Frobenius inner product.

    Parameters
    ----------
    kernel
        Array of shape (..., n, n).
    targets
        Array of shape (..., n, c); the leading axes broadcast.

    Returns
    -------
    alignment
        float64 array of shape (...) in [-1, 1]; NaN where an entry is not finite
        or the kernel or the targets are zero.

    Examples
    --------
    >>> y = np.array([[1.0], [-1.0]])
    >>> float(kernel_alignment_kernel(np.eye(2), y).round(4))
    0.7071
    """
    K, k_size = _scaled(kernel)
    Y, y_size = _scaled(targets)
    inner = ((K @ Y) * Y).sum(axis=(-2, -1))
    target_norm = np.sqrt(np.square(np.swapaxes(Y, -1, -2) @ Y).sum(axis=(-2, -1)))
    norms = np.sqrt(np.square(K).sum(axis=(-2, -1))) * target_norm
    known = (k_size > 0) & (y_size > 0)
    return np.where(known, np.clip(divide_or_zero(inner, norms), -1.0, 1.0), np.nan)


def cka_kernel(A: FloatArray, B: FloatArray) -> FloatArray:
    r"""Linear CKA of stacked sets of features.

    Parameters
    ----------
    A, B
        Arrays of shapes (..., samples, units_a) and (..., samples, units_b); the
        leading axes broadcast.

    Returns
    -------
    cka
        float64 array of shape (...) in [0, 1]; NaN where an entry is not finite
        or features are constant over the samples.

    Examples
    --------
    >>> A = np.random.default_rng(0).standard_normal((20, 5))
    >>> float(cka_kernel(A, 3 * A[:, ::-1])).__round__(12)
    1.0
    """
    A, B = _centred(A), _centred(B)
    n, h = A.shape[-2], max(A.shape[-1], B.shape[-1])
    if h > n:  # the same numbers from the kernels over samples, which are smaller
        K, L = A @ np.swapaxes(A, -1, -2), B @ np.swapaxes(B, -1, -2)
        inner, norm_a, norm_b = (K * L).sum(axis=(-2, -1)), _norm(K), _norm(L)
    else:
        At, Bt = np.swapaxes(A, -1, -2), np.swapaxes(B, -1, -2)
        inner, norm_a, norm_b = np.square(At @ B).sum(axis=(-2, -1)), _norm(At @ A), _norm(Bt @ B)
    norms = norm_a * norm_b
    return divide_or_nan(inner, norms, norms > 0).clip(0.0, 1.0)


def spike_alignment_kernel(matrix: FloatArray, target: FloatArray, *, k: int = 1) -> FloatArray:
    """Absolute cosines between the k leading left singular vectors and a vector.

    Parameters
    ----------
    matrix
        Array of shape (..., n, m).
    target
        Array of shape (..., n); the leading axes broadcast.
    k
        At most min(n, m).

    Returns
    -------
    alignment
        float64 array of shape (..., k) in [0, 1]; NaN where an entry is not
        finite, the target is zero, or the singular value is zero.

    Examples
    --------
    >>> spike_alignment_kernel(np.diag([3.0, 1.0]), np.array([0.6, -0.8]), k=2)
    array([0.6, 0.8])
    """
    M, m_size = _scaled(matrix)
    y, y_size = _scaled(target[..., None])
    U, values, _ = np.linalg.svd(M, full_matrices=False)
    cosines = (
        np.abs(np.swapaxes(U[..., :k], -1, -2) @ y)[..., 0] / np.where(y_size > 0, _norm(y), 1.0)[..., None]
    )
    eps = np.finfo(np.float64).eps
    defined = values[..., :k] > max(M.shape[-2:]) * eps * values[..., :1]
    known = ((m_size > 0) & (y_size > 0))[..., None] & defined
    return np.where(known, np.minimum(cosines, 1.0), np.nan)


def _norm(matrices: FloatArray) -> FloatArray:
    return np.asarray(np.sqrt(np.square(matrices).sum(axis=(-2, -1))))


def _scaled(matrices: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Matrices by their largest entry, which keeps products in range, and that entry: NaN if not finite."""
    finite = finite_matrices(matrices)
    matrices = np.where(finite[..., None, None], matrices, 0.0).astype(np.float64, copy=False)
    size = np.abs(matrices).max(axis=(-2, -1), initial=0.0)
    return divide_or_zero(matrices, size[..., None, None]), np.where(finite, size, np.nan)


def _centred(features: FloatArray) -> FloatArray:
    """Features less their mean over the samples, by their largest entry; NaN or zero where undefined."""
    rounding = CONSTANT * np.finfo(features.dtype if features.dtype.kind == "f" else np.float64).eps
    scaled, size = _scaled(features)
    centred = scaled - scaled.mean(axis=-2, keepdims=True)
    spread = np.abs(centred).max(axis=(-2, -1), initial=0.0)
    spread = np.where(np.isnan(size), np.nan, np.where(spread > rounding, spread, 0.0))
    known = divide_or_zero(centred, spread[..., None, None])
    return np.asarray(np.where(np.isnan(size)[..., None, None], np.nan, known))


# ---------------------------------------------------------------------------- labelled


def conjugate_kernel(
    activations: xr.DataArray, *, sample_dim: str = DIM_SAMPLE, unit_dim: str = DIM_UNIT
) -> xr.DataArray:
    r"""Conjugate kernel :math:`K = \Phi \Phi^T / h` of recorded activations.

    Parameters
    ----------
    activations
        Activations with dims (..., sample, unit).
    sample_dim, unit_dim
        Names of the dims.

    Returns
    -------
    xarray.DataArray
        Kernel with the new last dims (sample, sample\_), both with the labels of
        the samples. NaN in the rows and columns of samples with NaN.

    Raises
    ------
    TypeError
        If the array is no DataArray or not real.
    ValueError
        If a dim is missing or empty.

    Examples
    --------
    >>> import xarray as xr
    >>> conjugate_kernel(xr.DataArray([[1.0, 1.0], [2.0, 0.0]], dims=("sample", "unit"))).values
    array([[1., 1.],
           [1., 2.]])
    """
    require_values("activations", activations, (sample_dim, unit_dim), "sample_dim=... and unit_dim")
    other = sample_dim + LAG
    result = apply_kernel(
        conjugate_kernel_kernel,
        [activations],
        [(sample_dim, unit_dim)],
        output_dims=[(sample_dim, other)],
        output_sizes={sample_dim: activations.sizes[sample_dim], other: activations.sizes[sample_dim]},
    )
    result = declared(result, "conjugate_kernel", vector_dims=[sample_dim, other])
    if sample_dim not in activations.indexes:
        return result
    labels = activations[sample_dim].values
    return result.assign_coords({sample_dim: labels, other: labels})


def kernel_alignment(
    kernel: xr.DataArray,
    targets: xr.DataArray,
    *,
    dims: tuple[str, str] = KERNEL_DIMS,
    target_dim: str | None = None,
) -> xr.DataArray:
    r"""Alignment of a kernel with targets, :math:`y^T K y / (\|K\|_F \|y\|^2)`.

    For several columns Y of targets (one-hot labels, say) it is the cosine
    :math:`\langle K, Y Y^T \rangle / (\|K\|_F \|Y Y^T\|_F)` of Cristianini et
    al. (2001), of which one column is the special case. Nothing is centred:
    subtract the mean from the targets, and centre the kernel, if it is meant.

    Parameters
    ----------
    kernel
        Symmetric kernels with dims (..., sample, sample\_).
    targets
        Targets with the dim sample, and `target_dim` if there are several
        columns; other dims are records.
    dims
        The two dims of the kernel; targets have the first one.
    target_dim
        Dim of the columns of the targets.

    Returns
    -------
    xarray.DataArray
        Numbers in [-1, 1], in [0, 1] for positive semidefinite kernels. NaN
        where entries are missing, or the kernel or the targets are zero.

    Raises
    ------
    TypeError
        If an array is no DataArray or not real.
    ValueError
        If a dim is missing or empty, the kernel is not square, or labels differ.

    Examples
    --------
    >>> import xarray as xr
    >>> y = xr.DataArray([1.0, -1.0], dims="sample")
    >>> float(kernel_alignment(xr.DataArray(np.eye(2), dims=("sample", "sample_")), y)).__round__(4)
    0.7071
    """
    require_values("kernel", kernel, dims, "dims")
    columns = () if target_dim is None else (target_dim,)
    require_values("targets", targets, (dims[0], *columns), "dims=... and target_dim")
    if kernel.sizes[dims[0]] != kernel.sizes[dims[1]]:
        raise ValueError(f"expected a square kernel along {dims}, came sizes {dict(kernel.sizes)}")
    require_same_labels({"kernel": kernel, "targets": targets})
    if target_dim is None:
        target_dim = "__target__"
        targets = targets.expand_dims(target_dim)
    result = apply_kernel(kernel_alignment_kernel, [kernel, targets], [dims, (dims[0], target_dim)])
    return declared(result, "kernel_alignment")


def cka(
    a: xr.DataArray, b: xr.DataArray, *, sample_dim: str = DIM_SAMPLE, unit_dim: str = DIM_UNIT
) -> xr.DataArray:
    r"""Linear centred kernel alignment of two sets of activations on the same samples.

    :math:`\|B^T A\|_F^2 / (\|A^T A\|_F \|B^T B\|_F)` with the mean over the
    samples subtracted from each unit (arXiv:1905.00414). It does not change
    under rotation and scaling of either set. With fewer samples than units it
    is near 1 for any two sets: use many samples.

    Parameters
    ----------
    a, b
        Activations with dims (..., sample, unit); the numbers of units may
        differ. Dims that only one has are broadcast: ``cka(acts,
        acts.sel(step=0, drop=True))`` compares all steps with the start.
    sample_dim, unit_dim
        Names of the dims.

    Returns
    -------
    xarray.DataArray
        Numbers in [0, 1]; NaN where activations are missing or do not depend on
        the sample.

    Raises
    ------
    TypeError
        If an array is no DataArray or not real.
    ValueError
        If a dim is missing or empty, or labels differ.

    Examples
    --------
    >>> import xarray as xr
    >>> a = xr.DataArray(np.random.default_rng(0).standard_normal((20, 5)), dims=("sample", "unit"))
    >>> float(cka(a, 3 * a.isel(unit=[4, 3, 2, 1, 0]))).__round__(12)
    1.0
    """
    named = {"a": a, "b": b}
    core = {name: (sample_dim, f"__unit_of_{name}__") for name in named}
    for name, array in named.items():
        require_values(name, array, (sample_dim, unit_dim), "sample_dim=... and unit_dim")
        along = [c for c in array.coords if unit_dim in array[c].dims]
        named[name] = array.drop_vars(along).rename({unit_dim: core[name][1]})
    require_same_labels(named)
    return declared(apply_kernel(cka_kernel, list(named.values()), list(core.values())), "cka")


def spike_alignment(
    matrix: xr.DataArray,
    target: xr.DataArray,
    *,
    dims: tuple[str, str] = KERNEL_DIMS,
    k: int = 1,
) -> xr.DataArray:
    r"""Alignment :math:`|\langle u_i, y \rangle| / \|y\|` of leading singular vectors with a vector.

    Of a kernel and the targets, or of a weight matrix and a direction of the
    teacher (arXiv:2211.06506). Where singular values nearly coincide the single
    vectors mean little, only their span does: see
    :func:`hild_xr.analysis.alignment`.

    Parameters
    ----------
    matrix
        Matrices with dims (..., `dims`).
    target
        Vectors along the first of `dims`; other dims are records.
    dims
        The dim that the singular vectors live on, and the other one: ``("out",
        "in")`` takes left, ``("in", "out")`` right singular vectors of weights.
    k
        Number of leading vectors.

    Returns
    -------
    xarray.DataArray
        Numbers in [0, 1] with the new last dim ``singular``. NaN where entries
        are missing, the target is zero, or a singular value is zero.

    Raises
    ------
    TypeError
        If an array is no DataArray or not real.
    ValueError
        If a dim is missing or empty, k is out of range, or labels differ.

    Examples
    --------
    >>> import xarray as xr
    >>> kernel = xr.DataArray(np.diag([3.0, 1.0]), dims=("sample", "sample_"))
    >>> spike_alignment(kernel, xr.DataArray([0.6, -0.8], dims="sample")).values
    array([0.6])
    """
    require_values("matrix", matrix, dims, "dims")
    require_values("target", target, dims[:1], "dims")
    largest = min(matrix.sizes[dim] for dim in dims)
    if not 1 <= k <= largest:
        raise ValueError(f"expected 1 <= k <= {largest}, the number of singular values, came k={k}")
    if dims[1] in target.dims:
        raise ValueError(f"expected no dim {dims[1]!r} on target, came {target.dims}: rename it first")
    require_same_labels({"matrix": matrix, "target": target})
    result = apply_kernel(
        functools.partial(spike_alignment_kernel, k=k),
        [matrix, target],
        [dims, dims[:1]],
        output_dims=[(DIM_SINGULAR,)],
        output_sizes={DIM_SINGULAR: k},
    )
    return declared(result, "spike_alignment")
