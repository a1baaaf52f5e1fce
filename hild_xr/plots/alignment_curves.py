"""Alignment with several subspaces against the step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import holoviews as hv
import numpy as np

from hild_xr.plots.arguments import loaded, named_arrays, require_within
from hild_xr.plots.axes import horizontal_axis, value_dimension
from hild_xr.plots.series import areas_first, spread
from hild_xr.variables import DIM_STEP

if TYPE_CHECKING:
    from collections.abc import Mapping

    import xarray as xr

BASELINE = "Baseline"
"""HoloViews group of the horizontal line."""


def alignment_curves(
    alignments: Mapping[str, xr.DataArray] | xr.DataArray,
    baseline: float | None = None,
    *,
    label_dim: str = "subspace",
    baseline_label: str = "random subspace",
    x: str = DIM_STEP,
    log_x: bool = False,
    label: str = "",
) -> hv.Overlay:
    """Show how alignment with each of several subspaces evolves.

    Made for the alignment rho of weights with the principal eigenspaces of
    Hessian and G-matrix, with the span of the class means and with a random
    subspace; any number between 0 and 1 will do.

    Parameters
    ----------
    alignments
        For each legend entry an array with the dim ``step``; all other dims
        (classes, neurons, seeds) become the spread. The steps may differ. Or
        one array with the dim ``label_dim``, whose labels are the entries.
    baseline
        Alignment that chance gives, such as ``random_alignment_baseline(k, p)``,
        as a horizontal line.
    label_dim
        Dim of the legend entries, if one array is given.
    baseline_label
        Legend entry of the baseline.
    x, log_x
        Coordinate of the horizontal axis; see :mod:`hild_xr.plots`.
    label
        Title.

    Returns
    -------
    holoviews.Overlay
        For each subspace a curve of group ``Median`` and, with a spread, an
        area of group ``Range``; a curve of group ``Baseline``.

    Raises
    ------
    TypeError
        If an array is no DataArray of real numbers.
    ValueError
        If there is nothing to show, a dim is missing or a number is outside
        [0, 1].

    Examples
    --------
    >>> import xarray as xr
    >>> rho = xr.DataArray([[0.1, 0.9], [0.2, 0.8]], dims=("out", "step"), coords={"step": [0, 10]})
    >>> [(element.group, element.label) for element in alignment_curves({"E_k(H)": rho}, baseline=0.3)]
    [('Range', 'E_k(H)'), ('Median', 'E_k(H)'), ('Baseline', 'random subspace')]
    """
    elements: list[hv.Element] = []
    ends: list[float] = []
    for name, given in named_arrays("alignments", alignments, label_dim).items():
        array = loaded(f"alignment with {name}", given, [DIM_STEP], spread=True)
        require_within(f"alignment with {name}", array.values, 0, 1)
        axis = horizontal_axis(array, x, log=log_x)
        y = value_dimension(array, "alignment", range=(0, 1))
        elements += spread(axis, array, y, label=name)
        ends += [axis.values[0], axis.values[-1]]
    if baseline is not None:
        require_within("baseline", np.array([baseline]), 0, 1)
        line = ([min(ends), max(ends)], [baseline, baseline])
        elements.append(hv.Curve(line, axis.dimension, y, group=BASELINE, label=baseline_label))
    return hv.Overlay(areas_first(elements), label=label)
