"""Dimensions of the plots: where a record stands on an axis and what the axis is called."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import holoviews as hv
import numpy as np
from numpy.typing import NDArray

from hild_xr.variables import DIM_EIG, DIM_STEP

if TYPE_CHECKING:
    import xarray as xr

_DIM_LABELS = {DIM_STEP: "training step", DIM_EIG: "eigenpair"}
"""Axis labels of coordinates whose long_name is missing or only repeats their name."""

_NO_UNITS = ("", "1")


class LogDimension(hv.Dimension):  # type: ignore[misc]  # holoviews is untyped
    """A dimension that the styles show on a logarithmic axis.

    A builder sets no options; this is how it says what the numbers need.
    """


@dataclass(frozen=True)
class HorizontalAxis:
    """Where the records of one array stand.

    Parameters
    ----------
    dimension
        Name, label and unit; a :class:`LogDimension` for a logarithmic axis.
    values
        Position of each record, shape (step,), increasing.
    """

    dimension: hv.Dimension
    values: NDArray[np.float64]


def horizontal_axis(array: xr.DataArray, x: str = DIM_STEP, *, log: bool = False) -> HorizontalAxis:
    """Return the positions of the records along ``step``.

    Parameters
    ----------
    array
        Array with the dim ``step``.
    x
        Name of a coordinate along ``step``: the step itself, or for example a
        time, learning rate times step.
    log
        Show a logarithmic axis. Steps are counted from 1 there, because the
        record of step 0 has no place on it; other coordinates have to be
        positive.

    Returns
    -------
    HorizontalAxis
        Positions and dimension.

    Raises
    ------
    ValueError
        If there is no such coordinate, if it does not increase, or if it is
        not positive on a logarithmic axis.

    Examples
    --------
    >>> import xarray as xr
    >>> loss = xr.DataArray([2.0, 1.0], dims="step", coords={"step": [0, 9]})
    >>> axis = horizontal_axis(loss, log=True)
    >>> axis.dimension.label, axis.values
    ('1 + training step', array([ 1., 10.]))
    """
    values = _positions(array, x)
    label, unit = label_of(array[x]), unit_of(array[x])
    if not log:
        return HorizontalAxis(hv.Dimension(x, label=label, unit=unit), values)
    if x == DIM_STEP:
        return HorizontalAxis(LogDimension(f"{x}_from_one", label=f"1 + {label}", unit=unit), values + 1.0)
    if values[0] <= 0:
        raise ValueError(
            f"expected positive values of {x!r} for a logarithmic axis, came {values[0]:g}; "
            f"use log_x=False, or x='step', which is counted from 1 there"
        )
    return HorizontalAxis(LogDimension(x, label=label, unit=unit), values)


def decades_axis(axis: HorizontalAxis) -> HorizontalAxis:
    """Return the axis with the logarithms themselves as positions.

    An image is a regular grid of pixels and stands on a linear axis, so a
    logarithmic one has to be spelled out.

    Examples
    --------
    >>> axis = HorizontalAxis(LogDimension("step_from_one", label="1 + step"), np.array([1.0, 100.0]))
    >>> decades_axis(axis).dimension.label, decades_axis(axis).values
    ('log₁₀(1 + step)', array([0., 2.]))
    """
    if not isinstance(axis.dimension, LogDimension):
        return axis
    of = axis.dimension.label if axis.dimension.unit is None else axis.dimension.pprint_label
    dimension = hv.Dimension(f"log10_{axis.dimension.name}", label=f"log₁₀({of})")
    return HorizontalAxis(dimension, np.log10(axis.values))


def value_dimension(array: xr.DataArray, name: str, *, log: bool = False, **options: Any) -> hv.Dimension:
    """Return the dimension of an array's values, labelled from its attrs.

    Parameters
    ----------
    array
        Array with the attrs ``long_name`` and ``units``; without them the name
        has to do.
    name
        Name of the dimension, the same for all arrays that share an axis.
    log
        Show a logarithmic axis.
    **options
        ``label``, ``unit`` or ``range`` instead of what the attrs say.

    Raises
    ------
    ValueError
        If values that are not positive would have to stand on a logarithmic axis.

    Examples
    --------
    >>> import xarray as xr
    >>> angle = xr.DataArray(0.5, attrs={"long_name": "principal angle", "units": "rad"})
    >>> value_dimension(angle, "angle").pprint_label
    'principal angle (rad)'
    """
    if log:
        smallest = array.min().item()
        if smallest <= 0:
            raise ValueError(
                f"expected positive values for a logarithmic axis, came a smallest {label_of(array)} of "
                f"{smallest:g}; use log_y=False, or show only the positive ones with array.where(array > 0)"
            )
    said = {"label": label_of(array), "unit": unit_of(array)}
    return (LogDimension if log else hv.Dimension)(name, **(said | options))


def label_of(array: xr.DataArray) -> str:
    """Return the long name, else the name in words."""
    name = "value" if array.name is None else str(array.name)
    long_name = str(array.attrs.get("long_name", name))
    return _DIM_LABELS.get(name, name.replace("_", " ")) if long_name == name else long_name


def unit_of(array: xr.DataArray) -> str | None:
    """Return the units, None for dimensionless numbers."""
    units = str(array.attrs.get("units", ""))
    return None if units in _NO_UNITS else units


def _positions(array: xr.DataArray, x: str) -> NDArray[np.float64]:
    if x not in array.coords or array[x].dims != (DIM_STEP,):
        along = [name for name, coord in array.coords.items() if coord.dims == (DIM_STEP,)]
        raise ValueError(
            f"expected a coordinate {x!r} along 'step', came {along or 'none'}; use assign_coords"
        )
    values = np.asarray(array[x].values, dtype=np.float64)
    if not values.size or not np.all(np.isfinite(values)) or np.any(np.diff(values) <= 0):
        raise ValueError(
            f"expected finite, increasing values of {x!r} and at least one, came {values}; sort them"
        )
    return values
