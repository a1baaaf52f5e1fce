"""Checks of what a builder is given, before anything is drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray


def loaded(name: str, array: xr.DataArray, dims: Sequence[str], *, spread: bool = False) -> xr.DataArray:
    """Return the array in memory with its dims in order, the dims asked for last.

    A lazy array is computed here, once: HoloViews would compute it again for
    every frame and axis range. The caller's array stays lazy.

    Parameters
    ----------
    name
        What the array is called in messages.
    array
        Array to be drawn.
    dims
        Dims that it has to have.
    spread
        Whether further dims are welcome.

    Raises
    ------
    TypeError
        If it is no DataArray of real numbers.
    ValueError
        If a dim is missing or there are too many.

    Examples
    --------
    >>> loaded("loss", xr.DataArray([[1.0, 2.0]], dims=("step", "seed")), ["step"], spread=True).dims
    ('seed', 'step')
    """
    if not isinstance(array, xr.DataArray):
        raise TypeError(f"expected {name} as xarray.DataArray, came {type(array).__name__}")
    if array.dtype.kind not in "fiub":
        raise TypeError(f"expected real numbers as {name}, came dtype {array.dtype}")
    missing = [dim for dim in dims if dim not in array.dims]
    if missing:
        raise ValueError(f"expected {name} with dims {tuple(dims)}, came {array.dims}: {missing} missing")
    others = [str(dim) for dim in array.dims if dim not in dims]
    if others and not spread:
        picked = ", ".join(f"{dim}=0" for dim in others)
        raise ValueError(
            f"expected {name} with dims {tuple(dims)} and no other, came {array.dims}; "
            f"pick one record with .isel({picked})"
        )
    return array.compute().transpose(*others, *dims).astype(np.float64)


def named_arrays(
    name: str, given: Mapping[str, xr.DataArray] | xr.DataArray, label_dim: str
) -> dict[str, xr.DataArray]:
    """Return arrays by name: those of the mapping, or one for each label along ``label_dim``.

    Parameters
    ----------
    name
        What they are called in messages.
    given
        Mapping of names to arrays, or one array with the dim ``label_dim``.
    label_dim
        Dim whose labels are the names.

    Raises
    ------
    ValueError
        If the array has no such dim, or if there is nothing.

    Examples
    --------
    >>> rho = xr.DataArray([0.9, 0.1], dims="subspace", coords={"subspace": ["E_k(H)", "random"]})
    >>> list(named_arrays("alignments", rho, "subspace"))
    ['E_k(H)', 'random']
    """
    if isinstance(given, xr.DataArray):
        if label_dim not in given.dims:
            raise ValueError(
                f"expected {name} with the dim {label_dim!r} that names them, came {given.dims}; "
                "name the dim, or pass a mapping of names to arrays"
            )
        labels = [str(label) for label in given[label_dim].values]
        given = {label: given.isel({label_dim: at}, drop=True) for at, label in enumerate(labels)}
    if not given:
        raise ValueError(f"expected at least one array of {name}, came none")
    return dict(given)


def require_within(name: str, values: NDArray[np.float64], lower: float, upper: float) -> None:
    """Refuse numbers that the fixed range of an axis or colour scale would hide.

    Raises
    ------
    ValueError
        If a number lies outside by more than rounding; NaN may.

    Examples
    --------
    >>> require_within("overlap", np.array([0.2, np.nan]), 0, 1)
    """
    slack = 1e-5 * (upper - lower)  # 32-bit vectors give no more digits
    outside = (values < lower - slack) | (values > upper + slack)
    if outside.any():
        raise ValueError(
            f"expected {name} between {lower:g} and {upper:g}, came {values[outside][0]:g}; "
            "hand in what the analysis returned"
        )
