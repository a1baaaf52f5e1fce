"""Checks of arguments: values along named dims, whole numbers, real numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hild_xr.analysis.base.arguments import require_dims, require_real

if TYPE_CHECKING:
    from collections.abc import Sequence

    import xarray as xr


def require_values(name: str, array: xr.DataArray, dims: Sequence[str], argument: str) -> xr.DataArray:
    """Return the array if it is real and has at least one value along each dim.

    Parameters
    ----------
    name
        Name of the argument of the function.
    array
        What was passed.
    dims
        Dims that it has to have.
    argument
        Name of the argument that says which dims these are.

    Raises
    ------
    TypeError
        If it is no DataArray or not real.
    ValueError
        If a dim is missing or has size 0.

    Examples
    --------
    >>> import xarray as xr
    >>> require_values("weight", xr.DataArray([[]], dims=("out", "in")), ["in"], "row_dims")
    Traceback (most recent call last):
    ...
    ValueError: expected at least one value of weight along ['in'], came sizes {'out': 1, 'in': 0}
    """
    require_dims(name, require_real(name, array), dims, argument)
    if 0 in (array.sizes[dim] for dim in dims):
        raise ValueError(
            f"expected at least one value of {name} along {list(dims)}, came sizes {dict(array.sizes)}"
        )
    return array


def whole_number(name: str, value: object) -> int:
    """Return the argument as an int if it is a whole number; truth values and text are none.

    Raises
    ------
    TypeError
        If it is something else.

    Examples
    --------
    >>> whole_number("k", np.int64(3))
    3
    >>> whole_number("k", 2.5)
    Traceback (most recent call last):
    ...
    TypeError: expected a whole number as k, came 2.5 of type float
    """
    if not _is_number(value, "iu"):
        raise TypeError(f"expected a whole number as {name}, came {value!r} of type {type(value).__name__}")
    return int(value)  # type: ignore[call-overload, no-any-return]


def real_number(name: str, value: object) -> float:
    """Return the argument as a float if it is a real number; truth values and text are none.

    Raises
    ------
    TypeError
        If it is something else.

    Examples
    --------
    >>> real_number("width", 2)
    2.0
    >>> real_number("width", "2")
    Traceback (most recent call last):
    ...
    TypeError: expected a real number as width, came '2' of type str
    """
    if not _is_number(value, "iuf"):
        raise TypeError(f"expected a real number as {name}, came {value!r} of type {type(value).__name__}")
    return float(value)  # type: ignore[arg-type]


def _is_number(value: object, kinds: str) -> bool:
    return np.ndim(value) == 0 and np.asarray(value).dtype.kind in kinds  # type: ignore[arg-type]
