"""What counts as recorded in an array of eigenvalues or singular values (kernel).

Arrays over all layers are padded: a layer with fewer eigenvalues than the
others has NaN at the end. NaN at the end therefore means "no more values", and
a NaN before a number means that something is missing in between.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hild_xr.analysis.subspaces.bases import FloatArray, IntArray


def n_recorded(values: FloatArray) -> tuple[IntArray, NDArray[np.bool_]]:
    """Count the recorded values of stacked spectra.

    Parameters
    ----------
    values
        Array of shape (..., n). Infinite entries count as missing.

    Returns
    -------
    n
        Integer array of shape (...): number of finite values.
    usable
        Boolean array of shape (...): whether there is a value, and none is
        missing before another.

    Examples
    --------
    >>> nan = np.nan
    >>> n, usable = n_recorded(np.array([[3.0, 1.0, nan], [nan, 1.0, nan], [nan, nan, nan]]))
    >>> n.tolist(), usable.tolist()
    ([2, 1, 0], [True, False, False])
    """
    finite = np.isfinite(values)
    n = np.asarray(finite.sum(axis=-1))
    holes = (~finite[..., :-1] & finite[..., 1:]).any(axis=-1)
    return n, (n > 0) & ~holes
