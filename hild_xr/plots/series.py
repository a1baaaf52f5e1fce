"""Curves against the step, with the spread over everything that is no axis."""

from __future__ import annotations

from typing import TYPE_CHECKING

import holoviews as hv
import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import xarray as xr

    from hild_xr.plots.axes import HorizontalAxis

MEDIAN, RANGE, POINTS = "Median", "Range", "Points"
"""HoloViews groups of a spread: the line, the band around it, and records that stand alone."""


def curve(
    axis: HorizontalAxis, values: NDArray[np.float64], y: hv.Dimension, *, label: str, group: str
) -> list[hv.Element]:
    """Return a line with gaps where the values are NaN.

    A record between two gaps has no line to either side and would not be seen:
    those stand in a second element, as points.

    Parameters
    ----------
    axis
        Positions of the records.
    values
        Values, shape (step,).
    y
        Dimension of the values.
    label
        Entry in the legend.
    group
        HoloViews group, by which the styles choose the look.

    Examples
    --------
    >>> from hild_xr.plots.axes import HorizontalAxis
    >>> axis = HorizontalAxis(hv.Dimension("step"), np.arange(4.0))
    >>> values = np.array([1.0, 2.0, np.nan, 3.0])
    >>> line, points = curve(axis, values, hv.Dimension("y"), label="a", group="Line")
    >>> points.data["step"].tolist()
    [3.0]
    """
    options = {"kdims": [axis.dimension], "vdims": [y], "label": label}
    elements = [hv.Curve((axis.values, values), group=group, **options)]
    alone = _stands_alone(values)
    if alone.any():
        elements.append(hv.Scatter((axis.values[alone], values[alone]), group=POINTS, **options))
    return elements


def band(
    axis: HorizontalAxis,
    lower: NDArray[np.float64],
    upper: NDArray[np.float64],
    y: hv.Dimension,
    *,
    label: str,
    group: str,
) -> hv.Area:
    """Return the area between two lines, with gaps where either is NaN.

    Parameters
    ----------
    axis
        Positions of the records.
    lower, upper
        Ends of the band, shape (step,).
    y
        Dimension of the values.
    label, group
        As for :func:`curve`.

    Examples
    --------
    >>> from hild_xr.plots.axes import HorizontalAxis
    >>> axis = HorizontalAxis(hv.Dimension("step"), np.arange(2.0))
    >>> area = band(axis, np.zeros(2), np.ones(2), hv.Dimension("y"), label="bulk", group="Bulk")
    >>> area.dimension_values("y"), area.dimension_values("y_lower")
    (array([1., 1.]), array([0., 0.]))
    """
    bottom = y.clone(f"{y.name}_lower", label=f"{y.label} (lower end)")
    return hv.Area(
        (axis.values, upper, lower), kdims=[axis.dimension], vdims=[y, bottom], label=label, group=group
    )


def spread(
    axis: HorizontalAxis, array: xr.DataArray, y: hv.Dimension, *, label: str, group: str = MEDIAN
) -> list[hv.Element]:
    """Return the median over all dims but the last, and the band from the smallest to the largest value.

    Parameters
    ----------
    axis
        Positions of the records.
    array
        Values with ``step`` as the last dim. NaN is left out; where all is NaN
        there is a gap.
    y
        Dimension of the values.
    label, group
        As for :func:`curve`.

    Returns
    -------
    list of holoviews.Element
        The band first, if there is anything to spread over, then the line.

    Examples
    --------
    >>> import xarray as xr
    >>> from hild_xr.plots.axes import HorizontalAxis
    >>> axis = HorizontalAxis(hv.Dimension("step"), np.arange(2.0))
    >>> seeds = xr.DataArray([[1.0, 5.0], [3.0, 5.0]], dims=("seed", "step"))
    >>> area, line = spread(axis, seeds, hv.Dimension("loss"), label="train")
    >>> line.dimension_values("loss")
    array([2., 5.])
    """
    values = array.values.reshape(-1, array.shape[-1])
    if len(values) == 1:
        return curve(axis, values[0], y, label=label, group=group)
    lower, upper = extremes(values)
    return [
        band(axis, lower, upper, y, label=label, group=RANGE),
        *curve(axis, _median(values), y, label=label, group=group),
    ]


def areas_first(elements: list[hv.Element]) -> list[hv.Element]:
    """Return the elements in an order in which no area covers a line.

    Examples
    --------
    >>> [type(element).__name__ for element in areas_first([hv.Curve([1, 2]), hv.Area([1, 2])])]
    ['Area', 'Curve']
    """
    return sorted(elements, key=lambda element: not isinstance(element, hv.Area))


def extremes(values: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the smallest and the largest of the values that are there, NaN in columns without any.

    Examples
    --------
    >>> extremes(np.array([[1.0, np.nan], [np.nan, np.nan]]))
    (array([ 1., nan]), array([ 1., nan]))
    """
    there = np.isfinite(values)
    some = there.any(axis=0)
    lower = np.min(values, axis=0, where=there, initial=np.inf)
    upper = np.max(values, axis=0, where=there, initial=-np.inf)
    return np.where(some, lower, np.nan), np.where(some, upper, np.nan)


def _median(values: NDArray[np.float64]) -> NDArray[np.float64]:
    some = np.isfinite(values).any(axis=0)
    median = np.full(values.shape[1], np.nan)
    median[some] = np.nanmedian(np.where(np.isfinite(values), values, np.nan)[:, some], axis=0)
    return median


def _stands_alone(values: NDArray[np.float64]) -> NDArray[np.bool_]:
    there = np.isfinite(values)
    before = np.concatenate(([False], there[:-1]))
    after = np.concatenate((there[1:], [False]))
    return there & ~before & ~after
