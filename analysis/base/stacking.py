"""Flattening of the last axes of stacked arrays (kernel)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray


def flatten_last(array: NDArray[Any], n_axes: int) -> NDArray[Any]:
    """Make one axis of the last ones; unlike ``reshape(..., -1)`` also of stacks without records.

    Parameters
    ----------
    array
        Array of shape (..., *last axes).
    n_axes
        Number of axes that become one, at least 1.

    Returns
    -------
    flat
        Array of shape (..., product of the last axes).

    Examples
    --------
    >>> import numpy as np
    >>> flatten_last(np.ones((0, 2, 3)), 2).shape
    (0, 6)
    """
    lead = array.ndim - n_axes
    return array.reshape(*array.shape[:lead], math.prod(array.shape[lead:]))
