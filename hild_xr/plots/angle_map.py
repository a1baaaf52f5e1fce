"""How far the eigenspace of every step is from that of every other step."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import holoviews as hv
import numpy as np

from hild_xr.plots.arguments import loaded, require_within
from hild_xr.plots.axes import decades_axis, horizontal_axis, label_of
from hild_xr.plots.heat_map import heat_map, pixel_axis
from hild_xr.variables import DIM_STEP

if TYPE_CHECKING:
    import xarray as xr

_OTHER = DIM_STEP + "_"
_TO_DEGREES = {"rad": 180 / np.pi, "degree": 1.0, "degrees": 1.0}


def angle_map(angles: xr.DataArray, *, log_x: bool = False, label: str = "") -> hv.Image:
    """Show the angle between the subspaces of each pair of steps, in degrees.

    Blocks along the diagonal are times at which the subspace stands still.

    Parameters
    ----------
    angles
        Dims (step, step_) in rad or degree, as its attr ``units`` says; for
        example the largest principal angle,
        ``pairwise_angles(eigenvectors).isel(seed=0, angle=-1)``.
    log_x
        Show the logarithm of 1 + step on both axes.
    label
        Title.

    Returns
    -------
    holoviews.Image
        Colours from 0 to 90 degrees.

    Raises
    ------
    TypeError
        If it is no DataArray of real numbers.
    ValueError
        If dims are missing or too many, the units are unknown, or an angle is
        outside [0, 90] degrees.

    Examples
    --------
    >>> import xarray as xr
    >>> angles = xr.DataArray(
    ...     [[0.0, np.pi / 2], [np.pi / 2, 0.0]],
    ...     dims=("step", "step_"),
    ...     coords={"step": [0, 5], "step_": [0, 5]},
    ...     attrs={"long_name": "principal angle", "units": "rad"},
    ... )
    >>> float(angle_map(angles)[0, 5])
    90.0
    """
    found = loaded("angles", angles, [DIM_STEP, _OTHER])
    units = found.attrs.get("units")
    if units not in _TO_DEGREES:
        raise ValueError(
            f"expected angles whose attr 'units' is one of {', '.join(_TO_DEGREES)}, came {units!r}; "
            "set it with angles.assign_attrs(units='rad')"
        )
    degrees = found.values * _TO_DEGREES[units]
    require_within("angles in degrees", degrees, 0, 90)
    first = horizontal_axis(found.isel({_OTHER: 0}, drop=True), log=log_x)
    second = horizontal_axis(found.isel({DIM_STEP: 0}, drop=True).rename({_OTHER: DIM_STEP}), log=log_x)
    x, y = (pixel_axis(decades_axis(axis)) for axis in (first, second))
    y = replace(y, dimension=y.dimension.clone(f"{y.dimension.name}_", label=f"other {y.dimension.label}"))
    value = hv.Dimension("angle", label=label_of(found), unit="°", range=(0, 90))
    return heat_map(x, y, degrees, value, label=label)
