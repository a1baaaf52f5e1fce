"""Loss, accuracy and other numbers of the training run against the step."""

from __future__ import annotations

import holoviews as hv
import xarray as xr

from hild_xr.plots.arguments import loaded
from hild_xr.plots.axes import horizontal_axis, label_of, value_dimension
from hild_xr.plots.panels import side_by_side
from hild_xr.plots.series import areas_first, spread
from hild_xr.variables import DIM_STEP

_QUANTITIES = ("loss", "accuracy")
"""Variables whose names end alike are one quantity and share a panel."""


def metric_curves(
    metrics: xr.Dataset, *, x: str = DIM_STEP, log_x: bool = False, log_y: bool = False
) -> hv.Layout:
    """Show metrics, a panel for each quantity, with their spread over seeds.

    Losses share one panel, accuracies another, everything else has its own.

    Parameters
    ----------
    metrics
        Variables with the dim ``step``; all other dims become the spread. Pick
        variables with ``metrics[["train_loss", "accuracy"]]``. Variables
        without ``step`` and the store's marker ``committed`` are left out.
    x, log_x
        Coordinate of the horizontal axis; see :mod:`hild_xr.plots`.
    log_y
        Show losses on a logarithmic axis.

    Returns
    -------
    holoviews.Layout
        One panel a quantity, of the groups ``Median`` and ``Range``.

    Raises
    ------
    TypeError
        If a variable does not hold real numbers.
    ValueError
        If no variable has the dim ``step``, or a loss that is not positive
        would have to stand on a logarithmic axis.

    Examples
    --------
    >>> loss, accuracy = ("step", [2.0, 1.0]), ("step", [0.1, 0.9])
    >>> metrics = xr.Dataset({"train_loss": loss, "accuracy": accuracy}, coords={"step": [0, 10]})
    >>> [panel.label for panel in metric_curves(metrics)]
    ['loss', 'accuracy']
    """
    panels: dict[str, list[hv.Element]] = {}
    for name, given in metrics.data_vars.items():
        if DIM_STEP not in given.dims or name == "committed":
            continue
        quantity = _quantity(str(name), given)
        array = loaded(str(name), given, [DIM_STEP], spread=True)
        y = value_dimension(array, quantity, label=quantity, log=log_y and quantity == "loss")
        lines = spread(horizontal_axis(array, x, log=log_x), array, y, label=label_of(array))
        panels.setdefault(quantity, []).extend(lines)
    if not panels:
        raise ValueError(f"expected metrics with the dim 'step', came {list(metrics.data_vars)}")
    return side_by_side({quantity: hv.Overlay(areas_first(lines)) for quantity, lines in panels.items()})


def _quantity(name: str, array: xr.DataArray) -> str:
    alike = (quantity for quantity in _QUANTITIES if name.endswith(quantity))
    return next(alike, label_of(array))
