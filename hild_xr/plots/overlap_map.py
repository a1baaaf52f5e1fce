"""Overlap of a weight vector with each eigenvector of its block against the step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import holoviews as hv
import numpy as np

from hild_xr.plots.arguments import loaded, require_within
from hild_xr.plots.axes import HorizontalAxis, decades_axis, horizontal_axis
from hild_xr.plots.heat_map import heat_map, pixel_axis
from hild_xr.variables import DIM_EIG, DIM_STEP

if TYPE_CHECKING:
    import xarray as xr


def overlap_map(
    overlap: xr.DataArray, *, x: str = DIM_STEP, log_x: bool = False, label: str = ""
) -> hv.Image:
    """Show the size of the overlap with each eigenvector, the leading one on top.

    The form of the figures in arXiv:2310.03010: SGD in the basis of the
    eigenvectors of its own block.

    Parameters
    ----------
    overlap
        Cosine between a weight vector and each eigenvector, of dims
        (step, eig). The sign of an eigenvector is arbitrary, so the absolute
        value is shown.
    x, log_x
        Coordinate of the horizontal axis; see :mod:`hild_xr.plots`. On a
        logarithmic axis the logarithm itself is shown.
    label
        Title.

    Returns
    -------
    holoviews.Image
        Colours from 0 to 1.

    Raises
    ------
    TypeError
        If it is no DataArray of real numbers.
    ValueError
        If dims are missing or too many, or a number is outside [-1, 1].

    Examples
    --------
    >>> import xarray as xr
    >>> overlap = xr.DataArray([[0.1, 0.2], [-0.9, 0.1]], dims=("step", "eig"), coords={"step": [0, 5]})
    >>> float(overlap_map(overlap)[5, 1]).__round__(6)
    0.9
    """
    found = loaded("overlap", overlap, [DIM_STEP, DIM_EIG])
    require_within("overlap", found.values, -1, 1)
    across = decades_axis(horizontal_axis(found, x, log=log_x))
    first_is_one = np.arange(1.0, found.sizes[DIM_EIG] + 1)
    down = HorizontalAxis(hv.Dimension(DIM_EIG, label="eigenvector (1: leading)"), first_is_one)
    value = hv.Dimension("overlap", label="|overlap|", range=(0, 1))
    return heat_map(pixel_axis(across), pixel_axis(down), np.abs(found.values), value, label=label)
