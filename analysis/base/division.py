"""Division with NaN where the quotient is not defined (kernel)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from hild_xr.analysis.subspaces.bases import FloatArray


def divide_or_nan(array: ArrayLike, by: ArrayLike, defined: NDArray[np.bool_] | Any) -> FloatArray:
    """Divide where the quotient is defined; NaN elsewhere, without warnings.

    Parameters
    ----------
    array, by, defined
        Arrays that broadcast.

    Returns
    -------
    quotient
        float64 array.

    Examples
    --------
    >>> divide_or_nan([1.0, 1.0], [2.0, 0.0], np.array([True, False]))
    array([0.5, nan])
    """
    a, b, where = np.broadcast_arrays(
        np.asarray(array, dtype=np.float64), np.asarray(by, dtype=np.float64), np.asarray(defined)
    )
    quotient: FloatArray = np.divide(a, b, out=np.full(where.shape, np.nan), where=where)
    return quotient
