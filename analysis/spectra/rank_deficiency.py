"""Rank of the outlier eigenspace and what it lacks.

A classifier that misses some of the class centres has fewer outliers in the
last layer's Hessian and G-matrix than an optimal one: their number is the
number of centres that some neuron responds to (arXiv:2310.03010, Theorem 4.2).
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np

from hild_xr.analysis.base.arguments import apply_kernel, declared
from hild_xr.analysis.base.checks import whole_number
from hild_xr.analysis.spectra.outliers import outliers
from hild_xr.variables import DIM_EIG

if TYPE_CHECKING:
    import xarray as xr
    from numpy.typing import NDArray

    from hild_xr.analysis.subspaces.bases import IntArray

UNKNOWN = -1
"""Deficiency where the spectrum does not tell it."""


def rank_deficiency_kernel(
    outlier_count: IntArray, bulk_reached: NDArray[np.bool_], *, full_rank: int
) -> IntArray:
    """Return how many outliers are missing.

    Parameters
    ----------
    outlier_count
        Array of shape (...): -1 where it is not known.
    bulk_reached
        Array of shape (...): whether the count is the count of all outliers and
        not a lower bound.
    full_rank
        Number of outliers of the full rank.

    Returns
    -------
    deficiency
        Integer array of shape (...): 0 for the full rank and above, -1 where it
        is not known.

    Examples
    --------
    >>> rank_deficiency_kernel(np.array([4, 3, 3, -1]), np.array([False, True, False, False]), full_rank=4)
    array([ 0,  1, -1, -1])
    """
    known = (outlier_count >= full_rank) | ((outlier_count >= 0) & bulk_reached)
    return np.where(known, np.maximum(full_rank - outlier_count, 0), UNKNOWN)


def rank_deficiency(
    eigenvalues: xr.DataArray, full_rank: int, *, dim: str = DIM_EIG, **options: Any
) -> xr.Dataset:
    """Count the outliers of the last layer and those that the full rank has more.

    Parameters
    ----------
    eigenvalues
        Eigenvalues of the last layer's block, as for
        :func:`hild_xr.analysis.outliers`.
    full_rank
        Number of outliers of an optimal solution: the number of classes k for
        a mixture of k Gaussians, 4 for the XOR mixture.
    dim
        Dim of the eigenvalues.
    **options
        How to tell an outlier: as for :func:`hild_xr.analysis.outliers`.

    Returns
    -------
    xarray.Dataset
        The variables of :func:`hild_xr.analysis.outliers`, and
        ``rank_deficiency``: 0 for the full rank or more, -1 where the count is
        unknown, or only a lower bound below the full rank.

    Raises
    ------
    TypeError
        If an array is no DataArray or not real, or `full_rank` is no whole number.
    ValueError
        If `full_rank` is not positive, or as
        :func:`hild_xr.analysis.outliers`.

    Examples
    --------
    >>> import xarray as xr
    >>> eigenvalues = xr.DataArray([2.0, 1.8, 1.5, 0.01], dims="eig")
    >>> found = rank_deficiency(eigenvalues, 4, method="relative")
    >>> int(found.outlier_count), int(found.rank_deficiency)
    (3, 1)
    """
    full_rank = whole_number("full_rank", full_rank)
    if full_rank < 1:
        raise ValueError(
            f"expected full_rank of at least 1, the outliers of an optimal solution, came {full_rank}"
        )
    found = outliers(eigenvalues, dim=dim, **options)
    deficiency = apply_kernel(
        functools.partial(rank_deficiency_kernel, full_rank=full_rank),
        [found["outlier_count"], found["bulk_reached"]],
        [(), ()],
        output_dtypes=[np.dtype(np.int64)],
    )
    return found.assign(rank_deficiency=declared(deficiency, "rank_deficiency", full_rank=full_rank))
