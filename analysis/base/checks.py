"""Checks of arguments that hold values along named dims."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
