"""Number of outliers against the step, one panel a group of runs."""

from __future__ import annotations

from collections.abc import Mapping

import holoviews as hv
import numpy as np
import xarray as xr

from hild_xr.plots.arguments import loaded
from hild_xr.plots.axes import HorizontalAxis, horizontal_axis
from hild_xr.plots.panels import side_by_side
from hild_xr.plots.series import curve
from hild_xr.variables import DIM_STEP, variable

COUNT, EXPECTED = "Count", "Expected"
"""HoloViews groups of the counted lines and of the theory's number."""


def outlier_counts(
    counts: Mapping[str, xr.DataArray] | xr.DataArray,
    expected: Mapping[str, float] | float | None = None,
    *,
    x: str = DIM_STEP,
    log_x: bool = False,
    label: str = "",
) -> hv.Overlay | hv.Layout:
    """Show how many outliers each run has, for example optimal runs beside sub-optimal ones.

    Parameters
    ----------
    counts
        Dims (step) or (seed, step), each seed a line; any further dim gives
        lines as well. Negative where the spectrum was not recorded. With a
        mapping each entry is a panel of that title, and all panels have the
        same vertical axis.
    expected
        Number of outliers by the theory as a horizontal line: one for all
        panels, or by title.
    x, log_x
        Coordinate of the horizontal axis; see :mod:`hild_xr.plots`.
    label
        Title, if there is one panel.

    Returns
    -------
    holoviews.Overlay or holoviews.Layout
        Curves of group ``Count`` and ``Expected``.

    Raises
    ------
    TypeError
        If an array is no DataArray of real numbers.
    ValueError
        If there is no panel, the dim ``step`` is missing, or a number is
        expected for a panel that is not there.

    Examples
    --------
    >>> labels = {"step": [0, 10], "seed": [3]}
    >>> optimal = xr.DataArray([[-1, 4]], dims=("seed", "step"), coords=labels)
    >>> panels = outlier_counts({"optimal": optimal, "sub-optimal": optimal - 1}, {"optimal": 4})
    >>> [(panel.label, len(panel)) for panel in panels]
    [('optimal', 3), ('sub-optimal', 2)]
    """
    panels = dict(counts) if isinstance(counts, Mapping) else {label: counts}
    theory = dict(expected) if isinstance(expected, Mapping) else dict.fromkeys(panels, expected)
    if not theory.keys() <= panels.keys():
        raise ValueError(f"expected numbers for the panels {list(panels)}, came {list(theory)}")
    found = {title: _known(title, array) for title, array in panels.items()}
    numbers = [number for number in theory.values() if number is not None]
    top = max([1.0, *numbers, *(array.max().item() for array in found.values() if array.notnull().any())])
    # room above, so that a line along the upper end is seen in its full width
    y = hv.Dimension(
        "outlier_count", label=variable("outlier_count").long_name, type=int, soft_range=(0, 1.05 * top)
    )
    drawn = {
        title: hv.Overlay(
            _lines(array, horizontal_axis(array, x, log=log_x), y, theory.get(title)), label=title
        )
        for title, array in found.items()
    }
    return side_by_side(drawn) if isinstance(counts, Mapping) else drawn[label]


def _known(title: str, counts: xr.DataArray) -> xr.DataArray:
    found = loaded(f"counts {title!r}" if title else "counts", counts, [DIM_STEP], spread=True)
    return found.where(found >= 0)


def _lines(
    counts: xr.DataArray, axis: HorizontalAxis, y: hv.Dimension, theory: float | None
) -> list[hv.Element]:
    elements: list[hv.Element] = []
    if theory is not None:
        line = (axis.values, np.full(len(axis.values), float(theory)))
        elements.append(hv.Curve(line, axis.dimension, y, group=EXPECTED, label="theory"))
    others = counts.dims[:-1]
    for index in np.ndindex(counts.shape[:-1]):
        labels = (f"{dim} {counts[dim].values[at]}" for dim, at in zip(others, index, strict=True))
        name = ", ".join(labels) or "count"
        elements += curve(axis, counts.values[index], y, label=name, group=COUNT)
    return elements
